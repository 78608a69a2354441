"""Asking all clients at the same time, how long each may take, and who is missing."""

import collections
import math
import queue
import statistics
import threading
import time
import traceback

from plumbing.laptop.registry import POLL
from plumbing.laptop.remote import ClientFailure

LEAST_TIMEOUT = 30  # seconds that --round_timeout auto leaves a client at least
LEAST_PATIENCE = 60  # seconds that a client may be away at least before someone is told
LAST_ANSWERS = 9  # of a client, or rounds, whose median is what is usual


class Questions:
    """Puts the questions of a round to all clients at the same time.

    timeout: seconds that a client may take to answer; "auto": by its own last answers; None: no limit.
    check: called every POLL seconds, to raise what should end the waiting.
    """

    def __init__(self, timeout, check):
        self.timeout, self.check = timeout, check
        self.seconds = collections.defaultdict(list)  # that a client's answers took, by (method, cid)

    def ask(self, method, instructions):
        """Ask all clients at the same time: ([(client, its answer), …], [ClientFailure, …]).

        Each question has a thread, which sleeps: an answer takes as long as the client trains, and a pool of fewer
        threads than clients would have some devices wait for others.
        """
        answers, waiting, started = queue.SimpleQueue(), {client for client, _ in instructions}, time.monotonic()

        def ask_one(client, ins, limit):
            try:
                answers.put((client, client.ask(method, ins, limit)))
            except Exception as error:
                answers.put((client, error))

        for client, ins in instructions:
            args, name = (client, ins, self.limit(method, client.cid)), f"{method} {client.cid}"
            threading.Thread(target=ask_one, args=args, name=name, daemon=True).start()
        results, failures = [], []
        while waiting:
            self.check()
            try:
                client, answer = answers.get(timeout=POLL)
            except queue.Empty:
                continue
            waiting.remove(client)
            if isinstance(answer, Exception):
                if not isinstance(answer, ClientFailure):  # an error of ours
                    traceback.print_exception(answer)
                failures.append(answer)
            else:
                self.seconds[method, client.cid].append(time.monotonic() - started)
                results.append((client, answer))
        return results, failures

    def limit(self, method, cid):
        """Return the seconds that a client has to answer, None for no limit."""
        if self.timeout != "auto":
            return self.timeout
        seconds = self.seconds[method, cid][-LAST_ANSWERS:]
        return max(LEAST_TIMEOUT, 3 * statistics.median(seconds)) if len(seconds) >= 3 else None


class Absences:
    """Tells of the clients `cids` that are missing: for three rounds, or while a round waits as long as three take.

    tell: called as Curves.watch is.
    """

    def __init__(self, cids, tell):
        self.cids, self.tell = set(cids), tell
        self.rounds = collections.Counter()  # finished ones in a row without the client, by cid
        self.seconds = collections.deque(maxlen=LAST_ANSWERS)  # that the last finished rounds took
        self.marked = None

    def mark(self):
        """Note the time: a round begins to wait for clients, or to train."""
        self.marked = time.monotonic()

    def wait(self, current, there):
        """Be told that a round waits, and which cids are connected. (Before the first round, people are about.)"""
        patience = max(LEAST_PATIENCE, 3 * statistics.median(self.seconds)) if self.seconds else math.inf
        if time.monotonic() - self.marked > patience:
            self.tell(current, {cid: f"{patience:.0f} s" for cid in self.cids if cid not in there}, {})

    def finish(self, current, spared, clients):
        """Be told that a round is finished: the figures of `clients`, by cid, and the cids not asked to train."""
        self.seconds.append(time.monotonic() - self.marked)
        absent = self.cids - set(spared) - set(clients)
        self.rounds = collections.Counter({cid: self.rounds[cid] + 1 for cid in absent})
        self.tell(current, {cid: f"{count} rounds" for cid, count in self.rounds.items() if count >= 3}, clients)
