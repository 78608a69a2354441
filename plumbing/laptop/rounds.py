"""What ends a run, who is missing, and how long to wait: all of the rounds but the loop."""

from __future__ import annotations

import collections
import math
import statistics
import time

LEAST_PATIENCE = 60  # seconds that a client may be away at least, until its absence is told
LAST_ANSWERS = 9  # of a client, by which --round_timeout auto knows what is usual for it
HOPELESS = 5  # times in a row that a round may fail on all clients for the same reason
LASTING = 3  # rounds in a row that --target_accuracy has to be reached


def has_reached(target, rows, current, first=1):
    """Whether the test accuracy was `target` or more in the last LASTING rounds up to `current`, from `first` on.

    None as long as that depends on rounds that are not among the `rows` of the history; no `target` is never reached.
    """
    last = [row["test_accuracy"] for row in rows[-LASTING:] if row["round"] > current - LASTING]
    if target is None or current - first + 1 < LASTING or not all(accuracy >= target for accuracy in last):
        return False
    return True if len(last) == LASTING else None


def describe_target(target, current):
    return f"test_accuracy was {target:g} or more in the rounds {current - LASTING + 1} to {current}: the run is over"


class Stopped(Exception):
    """A signal asked the server to stop."""


class Hopeless(Exception):
    """A round fails again and again, for reasons that do not pass by themselves."""


def describe_failure(current, reasons):
    """Why the run ends with the round `current`, which fails for `reasons`, in one line."""
    shown = "; ".join(reasons[:3]) + "; …" * (len(reasons) > 3)
    return f"round {current} failed on all clients {HOPELESS} times in a row: {shown} ({describe_saved(current - 1)})"


def describe_saved(last):
    return f"rounds 1 to {last} are saved" if last else "no round was finished, nothing is saved"


class Absences:
    """Tells of the clients `cids` that are missing: for three rounds, or while a round waits for as long as three take.

    `tell` is called as record.Curves.watch is.
    """

    def __init__(self, cids, tell=lambda current, missing, clients: None):
        self.cids, self.tell = set(cids), tell
        self.rounds = collections.Counter()  # finished ones in a row without the client, by cid
        self.seconds = collections.deque(maxlen=LAST_ANSWERS)  # that the last finished rounds took
        self.marked = None

    def mark(self):
        """Note the time: a round begins to wait for clients, or to train."""
        self.marked = time.monotonic()

    def wait(self, current, there):
        """A round waits; `there` are the cids that are connected. (Before the first round, people are about.)"""
        patience = max(LEAST_PATIENCE, 3 * statistics.median(self.seconds)) if self.seconds else math.inf
        if time.monotonic() - self.marked > patience:
            self.tell(current, {cid: f"{patience:.0f} s" for cid in self.cids if cid not in there}, {})

    def finish(self, current, spared, clients):
        """A round is finished, with the figures of `clients`, by cid; the cids `spared` had not been asked to train."""
        self.seconds.append(time.monotonic() - self.marked)
        absent = self.cids - set(spared) - set(clients)
        self.rounds = collections.Counter({cid: self.rounds[cid] + 1 for cid in absent})
        self.tell(current, {cid: f"{count} rounds" for cid, count in self.rounds.items() if count >= 3}, clients)
