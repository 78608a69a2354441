"""Who is connected to the server and takes part: each connection from its handshake to its end."""

import concurrent.futures
import math
import secrets
import threading
import time

from plumbing.common.frames import Malformed
from plumbing.common.process import printable, say
from plumbing.common.proof import make_ticket
from plumbing.common.wire import Sender
from plumbing.laptop.handshake import TurnedAway, make_ready, meet
from plumbing.laptop.remote import RemoteClient
from plumbing.laptop.stream import Gone

from flwr.server import SimpleClientManager

SETTLE = 10  # seconds without a new client until a round starts with fewer than all
POLL = 0.5  # seconds until a signal or a failed record is noticed while waiting
SAY_AGAIN = 60  # seconds until a reason to turn clients away is printed again
REASONS = 50  # that are printed in that time: strangers may cause any number


class Seldom:
    """Prints at most one line per reason in SAY_AGAIN seconds, and at most REASONS reasons in that time."""

    def __init__(self):
        self.said = {}  # {reason: (when it was printed, how often it was left out since)}, at most REASONS entries
        self.lock = threading.Lock()

    def say(self, reason: str, text: str) -> bool:
        """Print `text`, unless a line for `reason` was printed lately. Return whether it is printed."""
        now = time.monotonic()
        with self.lock:
            when, unsaid = self.said.get(reason, (-math.inf, 0))
            if now - when < SAY_AGAIN:
                self.said[reason] = when, unsaid + 1
                return False
            if len(self.said) >= REASONS:
                self.said = {one: (when, n) for one, (when, n) in self.said.items() if now - when < SAY_AGAIN}
            if len(self.said) >= REASONS:
                return False
            self.said[reason] = now, 0
        say(f"{text} ({unsaid} more for this reason since it was last said)" if unsaid else text)
        return True


class Clients(SimpleClientManager):
    """The clients that take part, by cid: those of the scripts (Registry) or of Flower's engines (laptop/nodes).

    num_clients, task: see laptop/handshake.
    on_join: called with the cid and the properties of each client that is admitted.
    sender: sends parameters (common/wire).

    Each kind has `register`, `close`, and `_is_gone`: whether the connection of a client that joins has ended.
    """

    def __init__(self, num_clients, task, on_join=lambda cid, properties: None, sender=None):
        super().__init__()
        self.num_clients, self.task = num_clients, task
        self.on_join, self.sender = on_join, sender or Sender()
        self.seen, self.last_joined = set(), time.monotonic()  # cids that ever joined, and when the newest of them did
        self.closed = False  # whether no client is admitted any more
        self.without = ""  # the cids without which the rounds go on, as text
        self.seldom = Seldom()

    def unregister(self, proxy):
        """Be called when the connection `proxy` has ended."""
        with self._cv:
            for admitted in list(self.clients.values()):
                if admitted.proxy is proxy:
                    self.remove(admitted)

    def remove(self, client):
        """Drop a client whose connection is gone or as good as gone."""
        with self._cv:
            if self.clients.get(client.cid) is client:
                del self.clients[client.cid]
                if not self.closed:
                    say(f"cid {client.cid} left")
        client.close()

    def _admit(self, client):
        """Take a client in, and return whether it could be. Raise TurnedAway if another one with its cid is alive."""
        how = "joined"
        while True:
            with self._cv:
                if self._is_gone(client) or self.closed:
                    return False
                other = self.clients.get(client.cid)
                if other is None:
                    self.clients[client.cid] = client
                    if client.cid not in self.seen:  # no round waits longer for a client that comes back
                        self.seen.add(client.cid)
                        self.last_joined = time.monotonic()
                    self._cv.notify_all()
                    break
            if other.is_alive():
                raise in_use(client, other)
            self.remove(other)
            how = "is back"
        count = f"({len(self.clients)} of {self.num_clients} clients)"
        say(f"cid {client.cid} {how} {count}: {describe(client.properties)}")
        self.on_join(client.cid, client.properties)
        return True

    def sample(self, num_clients, min_num_clients=None, criterion=None):
        """Return all clients that are there, at most `num_clients`. Never waits: `wait_for_round` does."""
        with self._cv:
            return sorted(self.clients.values(), key=lambda client: int(client.cid))[:num_clients]

    def wait_for_round(self, min_clients, check):
        """Wait until all clients are there, or `min_clients` and nobody new for SETTLE seconds; print who is missing.

        check: called every POLL seconds, to raise what should end the waiting.
        """
        say_at, pause = time.monotonic() + 2, 5
        with self._cv:
            while len(self.clients) < self.num_clients:
                check()
                now = time.monotonic()
                if len(self.clients) >= min_clients and now - self.last_joined >= SETTLE:
                    break
                if now >= say_at:
                    count, missing = list_missing(self.num_clients, self.clients)
                    say(f"waiting for {count} of {self.num_clients} clients: cid {missing}")
                    say_at, pause = now + pause, min(2 * pause, 600)
                self._cv.wait(POLL)
            _, missing = list_missing(self.num_clients, self.clients)
            if missing and missing != self.without:
                say(f"continuing without cid {missing} (--min_clients {min_clients})")
            self.without = missing

    def _say_reason(self, reason, key=None):
        """Print why a client was turned away, unless that, or the same `key`, was said lately. Return whether it is."""
        return not self.closed and self.seldom.say(key or str(reason), f"turned away cid {reason.cid}: {reason}")


class Registry(Clients):
    """The clients of the scripts. The door registers each stream here; the handshake decides on it.

    secret: see laptop/handshake. The other arguments are those of Clients.
    """

    def __init__(self, *args, secret=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.secret, self.ticket_key = secret, secrets.token_bytes(32)
        self.guests = {}  # the streams of those that are known but not ready yet, by cid
        self.notice = None  # what clients are told once no more are admitted

    def register(self, stream):
        """Be called by the door, which has a new stream."""
        stream.on_end = lambda: self.unregister(stream)
        threading.Thread(target=self._look_after, args=(stream,), name="client", daemon=True).start()

    def _look_after(self, stream):
        """Have the handshake with a new stream."""
        try:
            if self.closed or not self._admit(RemoteClient(stream, self._greet(stream), self.sender)):
                stream.say_goodbye(**(self.notice or {"why": "stopped"}))
        except Gone:
            pass
        except Malformed as error:
            self._say_reason(TurnedAway(f"it is not this suite's client.py: {error}"), key="malformed")
        except TurnedAway as reason:
            self._say_reason(reason)
            stream.say_goodbye(**(self.notice or {"why": "turned_away", "text": str(reason)}))

    def _greet(self, stream):
        """Return what a client says of itself once it is ready. Raises TurnedAway, Gone or Malformed."""
        about = meet(stream, self.num_clients, self.task, self.secret)
        stream.leave()
        with self._cv:
            older, self.guests[about["cid"]] = self.guests.get(about["cid"]), stream
        if older is not None:  # of a device that has started again
            older.close()
        try:
            return make_ready(stream, about, self.task, make_ticket(self.ticket_key, about["device_id"]))
        finally:
            if self.guests.get(about["cid"]) is stream:
                del self.guests[about["cid"]]

    def turn_away_old(self):
        """Be called by the door, at which a client has knocked that speaks Flower's own frames."""
        self._say_reason(TurnedAway("it runs FL-IoT before 1.2.0 (make deploy), or is not this suite's client.py"))

    def _is_gone(self, client):
        return client.proxy.ended.is_set()

    def close(self, notice):
        """Admit nobody any more, and send all clients away, with a notice to those that can hear it: the idle ones."""
        with self._cv:
            if self.closed:
                return
            self.closed, self.notice = True, notice
            clients = list(self.clients.values())
        with concurrent.futures.ThreadPoolExecutor(len(clients) or 1) as pool:  # all at the same time
            pool.map(lambda client: client.say_goodbye(notice), clients)


def in_use(client, other):
    """Return why a client may not take part while another one with its cid is alive."""
    reason = f"cid {client.cid} is in use by another device"
    if other.properties["device_id"] == client.properties["device_id"]:
        reason += ", with the same id: one card is a copy of the other's; give each device its own cid"
    return TurnedAway(reason, client.cid)


def list_missing(num_clients, there):
    """Return how many of the cids 0 to num_clients - 1 are not `there`, and which, as text."""
    missing = [str(cid) for cid in range(num_clients) if str(cid) not in there]
    return len(missing), ", ".join(missing[:20] + ["…"] * (len(missing) > 20))


def describe(properties):
    """Return what a client says it is, for people: its board and its images."""
    board = printable(properties.get("board", "unknown board"), 40)
    if "slowdown" in properties:
        board += f" slowed down {printable(properties['slowdown'], 10)} times"
    return f"{board}, {properties['num_fit']} fit + {properties['num_eval']} eval images"
