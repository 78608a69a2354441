"""Who is connected to the server: each client's handshake, its heartbeat, and the questions that it is asked.

server.py runs the rounds with the clients that a Registry has admitted. This half of the server knows the wire and no
rounds, that one the rounds and no wire. On Flower's engines, which have a wire of their own, Nodes stands for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time

from plumbing.common.process import printable, say
from plumbing.common.sockets import KEEPALIVE, keep_alive, tcp_sockets
from plumbing.common.wire import WIRE, Sender, restore_all
from plumbing.laptop.handshake import TurnedAway, handshake

from flwr.common import Code, GetPropertiesIns, Parameters, ReconnectIns
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridgeClosed

# Flower keeps one stream to each client, on which it answers one question at a time. Besides fit and evaluate the
# questions are get_properties, whose dictionary says what is meant:
#     {"nonce", "version"}, {"net", "dataset_id"}  the handshake, answered within HANDSHAKE_TIMEOUT and READY_TIMEOUT
#     {}                                           are you there? every HEARTBEAT seconds, unless it is busy
#     {"turned_away"} or {"stopped"}               the reason, before the stream ends
# The server gives up a client that is idle and silent for HEARTBEAT, busy for --round_timeout, or on a machine whose
# kernel is silent for KEEPALIVE (libs.py); a client gives up a server that is silent for SILENCE (client.py).
# The main thread runs the rounds; one thread a connection, "client …", has the handshake and then the heartbeat; one a
# question, "fit 3", waits for the answer; "record" keeps the record, "signals" notes signals.
# Registry._cv guards who is there; RemoteClient.lock is held while the client has a question to answer.

HEARTBEAT = 20  # seconds between two words to a client that has nothing to do
BUSY = KEEPALIVE  # seconds after which the connection of a client that is busy has shown that it is alive
HANDSHAKE_TIMEOUT = 10  # seconds
READY_TIMEOUT = 120  # seconds for a client to read its shard anew, if it has to
MALFORMED = (TypeError, ValueError)  # what Flower raises on an answer that is none
SETTLE = 10  # seconds without a new client until a round starts with fewer than all
POLL = 0.5  # seconds until a signal or a failed worker is noticed while waiting
SAY_AGAIN = 60  # seconds until a reason to turn clients away is said again
REASONS = 50  # that are said in that time: strangers may cause any number
LOST = "connection lost"  # the one reason of ClientFailure that says nothing of the run


class ClientFailure(Exception):
    """A client gave no answer; `cid` says which, the text why."""

    def __init__(self, cid, reason):
        super().__init__(reason)
        self.cid = cid


class Admitted(ClientProxy):
    """A client that passed the handshake: Flower's proxy under its own cid, to which `ask` puts all questions."""

    def __init__(self, proxy, properties):
        super().__init__(str(properties["cid"]))
        self.proxy, self.properties = proxy, properties
        self.gone = threading.Event()

    def ask(self, method, ins, timeout, group_id):
        """The answer of the client, asked by `method` of its proxy. Raises ClientFailure where there is none."""
        raise NotImplementedError

    def _ask(self, *args):
        return self.ask(*args)  # of the subclass, which a partialmethod of ask would not find

    get_properties = functools.partialmethod(_ask, "get_properties")
    get_parameters = functools.partialmethod(_ask, "get_parameters")
    fit = functools.partialmethod(_ask, "fit")
    evaluate = functools.partialmethod(_ask, "evaluate")
    reconnect = functools.partialmethod(_ask, "reconnect")


class RemoteClient(Admitted):
    """A client of the scripts, for one question at a time.

    `sender` (wire.Sender) says how parameters cross to one that can do more than Flower's plain arrays.
    """

    def __init__(self, proxy, properties, sender=None):
        super().__init__(proxy, properties)
        self.sender = sender if properties.get("wire") == WIRE else None
        self.held = None  # the wire.Model that it has, as far as its last answer tells
        self.lock = threading.Lock()  # held while it has a question to answer

    def ask(self, method, ins, timeout, group_id):
        started = time.monotonic()
        if not self.lock.acquire(timeout=timeout or -1):
            raise ClientFailure(self.cid, f"no answer within {timeout:g} s")
        try:
            return self._exchange(method, ins, timeout, group_id)
        except MALFORMED as error:
            raise ClientFailure(self.cid, f"malformed answer: {printable(error)}") from error
        except GrpcBridgeClosed:
            late = timeout is not None and time.monotonic() - started >= timeout
            raise ClientFailure(self.cid, f"no answer within {timeout:g} s" if late else LOST) from None
        finally:
            self.lock.release()

    def _exchange(self, method, ins, timeout, group_id):
        """Put the question, with its parameters and those of the answer as they cross the wire."""
        ask = getattr(self.proxy, method)
        if self.sender is None or method not in ("fit", "evaluate"):
            return ask(ins, timeout, group_id)
        model, held, self.held = self.sender.model_of(ins.parameters), self.held, None
        res = ask(dataclasses.replace(ins, parameters=self.sender.pack(model, held)), timeout, group_id)
        self.held = model
        if method == "fit":
            res.parameters = Parameters(restore_all(res.parameters.tensors, model.tensors), "numpy.ndarray")
        return res

    def heartbeat(self):
        """Say a word to the client every HEARTBEAT seconds, unless it is busy, until it is gone.

        So that both sides notice when the other is gone; where the client does not answer, its connection is ended.
        """
        while not self.gone.wait(HEARTBEAT):
            if self.lock.acquire(blocking=False):
                try:
                    self._say_a_word()
                finally:
                    self.lock.release()

    def is_alive(self):
        """Whether the client is there, found out within BUSY + HEARTBEAT seconds; one that is not is let go.

        A busy one cannot answer. But the kernel of a dead board does not answer TCP's keepalive either, so a
        connection that lasts for BUSY seconds is alive.
        """
        if not self.lock.acquire(timeout=BUSY):
            return not self.gone.is_set()
        try:
            return self._say_a_word()
        finally:
            self.lock.release()

    def _say_a_word(self):
        try:
            self.proxy.get_properties(GetPropertiesIns({}), HEARTBEAT, 0)
            return True
        except (GrpcBridgeClosed, *MALFORMED):
            self.close()
            return False

    def close(self):
        """Fail the question under way, and end the connection."""
        self.gone.set()
        self.proxy.bridge.close()


def ask_all(proxy, questions):
    """Put the questions of a handshake to a connection: what it returns of the client. Raises TurnedAway."""
    answer = None
    while True:
        try:
            question = questions.send(answer)
        except StopIteration as end:
            return end.value
        try:
            timeout = READY_TIMEOUT if "net" in question else HANDSHAKE_TIMEOUT
            res = proxy.get_properties(GetPropertiesIns(question), timeout, 0)
        except MALFORMED:
            raise TurnedAway("it is not this suite's client.py") from None
        answer = res.properties if res.status.code == Code.OK else {}


def send_away(proxy: ClientProxy, notice: dict[str, str]) -> None:
    """Give a connection the notice, if it is not empty, and end it; where it says "stopped", to come back later."""
    try:
        if notice:
            proxy.get_properties(GetPropertiesIns(notice), HANDSHAKE_TIMEOUT, 0)
        if "stopped" not in notice:
            proxy.reconnect(ReconnectIns(seconds=None), HANDSHAKE_TIMEOUT, 0)
    except (GrpcBridgeClosed, *MALFORMED):
        pass  # it is gone already, which is as good
    proxy.bridge.close()


def say_goodbye(client, notice):
    """Send a client away, with the notice where it can hear it: not while it is busy."""
    if client.lock.acquire(timeout=1 if notice else HEARTBEAT):  # at the end nobody trains any more
        send_away(client.proxy, notice)
    client.close()


def in_use(client, other):
    """Why a client may not take part whose cid another one has that is alive."""
    reason = f"cid {client.cid} is in use by another device"
    if other.properties["device_id"] == client.properties["device_id"]:
        reason += ", with the same id: one card is a copy of the other's; give each device a cid of its own"
    return TurnedAway(reason, client.cid)


def describe(properties):
    """What a client says it is, for people: ": its board, its images"."""
    board = printable(properties.get("board", "unknown board"), 40)
    return f": {board}, {properties['num_fit']} fit + {properties['num_eval']} eval images"


class Seldom:
    """Says a line for a reason once in SAY_AGAIN seconds, and those of REASONS reasons in that time."""

    def __init__(self):
        self.said = {}  # {reason: (when it was said, how often it was not said since)}, one of REASONS entries at most
        self.lock = threading.Lock()

    def say(self, reason: str, text: str) -> bool:
        """Say `text` for `reason`, unless that has been said lately; whether it is said now."""
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
    """The clients that take part, by cid. Flower registers each connection here; the handshake decides on it."""

    def __init__(
        self,
        num_clients: int,
        task: dict,
        secret: bytes | None = None,
        port: int | None = None,
        on_join=None,
        sender: Sender | None = None,
    ):
        super().__init__()
        self.sender = sender or Sender()
        self.num_clients, self.task, self.secret, self.port = num_clients, task, secret, port
        self.on_join = on_join  # called with the cid and the properties of each client that is admitted
        self.connections = {}  # Flower's proxies of the open ones by their ids, admitted or not
        self.seen, self.last_joined = set(), time.monotonic()  # cids that ever joined, and when the newest of them did
        self.closed, self.notice = False, {}  # no more clients, and what they are told
        self.seldom = Seldom()

    def register(self, client):
        """Flower's: `client` is its proxy of a new connection."""
        if self.closed:
            raise ConnectionAbortedError("the server is about to stop")
        self.connections[client.cid] = client
        if self.port is not None:
            for sock in tcp_sockets(self.port):
                keep_alive(sock)
        threading.Thread(target=self._look_after, args=(client,), name=f"client {client.cid[:8]}", daemon=True).start()
        return True  # so that Flower carries our questions to it

    def unregister(self, client):
        """Flower's: the connection of its proxy `client` has ended."""
        with self._cv:
            if self.connections.get(client.cid) is client:
                del self.connections[client.cid]
            for admitted in list(self.clients.values()):
                if admitted.proxy is client:
                    self.remove(admitted)

    def remove(self, client):
        """Let a client go, whose connection is gone or as good as gone."""
        with self._cv:
            if self.clients.get(client.cid) is client:
                del self.clients[client.cid]
                if not self.closed:
                    say(f"cid {client.cid} left")
            client.close()
            self._cv.notify_all()

    def _look_after(self, proxy):
        """Have the handshake with a new connection; then keep the silence on it short, for as long as it lasts."""
        try:
            properties = ask_all(proxy, handshake(self.num_clients, self.task, self.secret))
            client = RemoteClient(proxy, properties, self.sender)
            admitted = self._admit(client)
        except GrpcBridgeClosed:
            proxy.bridge.close()
        except TurnedAway as reason:
            if not self.closed:
                self.seldom.say(str(reason), f"turned away cid {reason.cid}: {reason}")
            send_away(proxy, self.notice if self.closed else {"turned_away": str(reason)})
        else:
            if admitted:
                client.heartbeat()
            else:
                send_away(proxy, self.notice)

    def _admit(self, client):
        """Take a client in: whether it could be. Raises TurnedAway where another one with its cid is alive."""
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
                    if client.cid not in self.seen:  # for one that comes back no round is held up
                        self.seen.add(client.cid)
                        self.last_joined = time.monotonic()
                    self._cv.notify_all()
                    break
            if other.is_alive():
                raise in_use(client, other)
        count = f"({len(self.clients)} of {self.num_clients} clients)"
        say(f"cid {client.cid} {'is back' if before else 'joined'} {count}{describe(client.properties)}")
        if self.on_join is not None:
            self.on_join(client.cid, client.properties)
        return True

    def sample(self, num_clients, min_num_clients=None, criterion=None):
        """All clients that are there, at most `num_clients`; never waits (`wait_for_round` does)."""
        with self._cv:
            return sorted(self.clients.values(), key=lambda client: int(client.cid))[:num_clients]

    def wait_for_round(self, min_clients, check):
        """Wait until all clients are there, or `min_clients` and nobody new for SETTLE seconds; say who is missing.

        `check` is called every POLL seconds, to raise what should end the waiting.
        """
        say_at, pause = time.monotonic() + 2, 5
        with self._cv:
            while len(self.clients) < self.num_clients:
                check()
                now = time.monotonic()
                if len(self.clients) >= min_clients and now - self.last_joined >= SETTLE:
                    return
                if now >= say_at:
                    missing = [str(cid) for cid in range(self.num_clients) if str(cid) not in self.clients]
                    cids = ", ".join(missing[:20] + ["…"] * (len(missing) > 20))
                    say(f"waiting for {len(missing)} of {self.num_clients} clients: cid {cids}")
                    say_at, pause = now + pause, min(2 * pause, 600)
                self._cv.wait(POLL)

    def close(self, notice):
        """Admit nobody any more, and send all clients away, with a notice to those that can hear it: the idle ones."""
        with self._cv:
            if self.closed:
                return
            self.closed, self.notice = True, notice
            clients = list(self.clients.values())
        threads = [threading.Thread(target=say_goodbye, args=(client, notice), daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
