"""Who is connected to the server and takes part: each connection from its handshake to its end."""

from __future__ import annotations

import math
import threading
import time

from plumbing.common.process import printable, say
from plumbing.common.sockets import keep_alive, tcp_sockets
from plumbing.common.wire import Sender
from plumbing.laptop.flower import GrpcBridgeClosed
from plumbing.laptop.handshake import TurnedAway, handshake
from plumbing.laptop.remote import RemoteClient, ask_stranger, send_away

from flwr.server import SimpleClientManager

SETTLE = 10  # seconds without a new client until a round starts with fewer than all
POLL = 0.5  # seconds until a signal or a failed worker is noticed while waiting
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


class Registry(SimpleClientManager):
    """The clients that take part, by cid. Flower registers each connection here; the handshake decides on it.

    num_clients, task, secret: see laptop/handshake.
    port: the server's, of which the connections are kept alive; None: none.
    on_join: called with the cid and the properties of each client that is admitted.
    sender: sends parameters (common/wire).
    """

    def __init__(self, num_clients, task, secret=None, port=None, on_join=None, sender=None):
        super().__init__()
        self.num_clients, self.port, self.terms = num_clients, port, (num_clients, task, secret)
        self.on_join, self.sender = on_join, sender or Sender()
        self.connections = {}  # Flower's proxies of the open connections by their ids, admitted or not
        self.seen, self.last_joined = set(), time.monotonic()  # cids that ever joined, and when the newest of them did
        self.closed, self.notice = False, {}  # whether clients are still admitted, and what they are told if not
        self.seldom = Seldom()

    def register(self, client):
        """Be called by Flower: `client` is its proxy of a new connection."""
        if self.closed:
            raise ConnectionAbortedError("the server is about to stop")
        self.connections[client.cid] = client
        if self.port is not None:
            for sock in tcp_sockets(self.port):
                keep_alive(sock)
        threading.Thread(target=self._look_after, args=(client,), name=f"client {client.cid[:8]}", daemon=True).start()
        return True  # so that Flower carries our questions to it

    def unregister(self, client):
        """Be called by Flower: the connection of its proxy `client` has ended."""
        with self._cv:
            if self.connections.get(client.cid) is client:
                del self.connections[client.cid]
            for admitted in list(self.clients.values()):
                if admitted.proxy is client:
                    self.remove(admitted)

    def remove(self, client):
        """Drop a client whose connection is gone or as good as gone."""
        with self._cv:
            if self.clients.get(client.cid) is client:
                del self.clients[client.cid]
                if not self.closed:
                    say(f"cid {client.cid} left")
            client.close()
            self._cv.notify_all()

    def _look_after(self, proxy):
        """Have the handshake with a new connection, then its heartbeat for as long as it lasts."""
        try:
            properties = handshake(lambda question: ask_stranger(proxy, question), *self.terms)
            client = RemoteClient(proxy, properties, self.sender)
            if self._admit(client):
                client.heartbeat()
            else:
                send_away(proxy, self.notice)
        except GrpcBridgeClosed:
            proxy.bridge.close()
        except TurnedAway as reason:
            if not self.closed:
                self.seldom.say(str(reason), f"turned away cid {reason.cid}: {reason}")
            send_away(proxy, self.notice if self.closed else {"turned_away": str(reason)})

    def _admit(self, client):
        """Take a client in, and return whether it could be. Raise TurnedAway if another one with its cid is alive."""
        before = None
        while True:
            with self._cv:
                if self.connections.get(client.proxy.cid) is not client.proxy or self.closed:
                    return False
                other = self.clients.get(client.cid)
                before = other or before
                if other is None or other.gone.is_set() or other.properties["process"] == client.properties["process"]:
                    if other is not None:
                        other.close()
                    self.clients[client.cid] = client
                    if client.cid not in self.seen:  # no round waits longer for a client that comes back
                        self.seen.add(client.cid)
                        self.last_joined = time.monotonic()
                    self._cv.notify_all()
                    break
            if other.is_alive():
                raise in_use(client, other)
        count = f"({len(self.clients)} of {self.num_clients} clients)"
        say(f"cid {client.cid} {'is back' if before else 'joined'} {count}: {describe(client.properties)}")
        if self.on_join is not None:
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
                    return
                if now >= say_at:
                    say(describe_missing(self.num_clients, self.clients))
                    say_at, pause = now + pause, min(2 * pause, 600)
                self._cv.wait(POLL)

    def close(self, notice):
        """Admit nobody any more, and send all clients away, with a notice to those that can hear it: the idle ones."""
        with self._cv:
            if self.closed:
                return
            self.closed, self.notice = True, notice
            clients = list(self.clients.values())
        say_goodbye(clients, notice)


def say_goodbye(clients, notice):
    """Send all clients away at the same time."""
    threads = [threading.Thread(target=client.say_goodbye, args=(notice,), daemon=True) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def in_use(client, other):
    """Return why a client may not take part while another one with its cid is alive."""
    reason = f"cid {client.cid} is in use by another device"
    if other.properties["device_id"] == client.properties["device_id"]:
        reason += ", with the same id: one card is a copy of the other's; give each device its own cid"
    return TurnedAway(reason, client.cid)


def describe_missing(num_clients, there):
    missing = [str(cid) for cid in range(num_clients) if str(cid) not in there]
    cids = ", ".join(missing[:20] + ["…"] * (len(missing) > 20))
    return f"waiting for {len(missing)} of {num_clients} clients: cid {cids}"


def describe(properties):
    """Return what a client says it is, for people: its board and its images."""
    board = printable(properties.get("board", "unknown board"), 40)
    if "slowdown" in properties:
        board += f" slowed down {printable(properties['slowdown'], 10)} times"
    return f"{board}, {properties['num_fit']} fit + {properties['num_eval']} eval images"
