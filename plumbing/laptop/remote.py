"""One client of the scripts: the questions that it is asked, and its heartbeat."""

from __future__ import annotations

import dataclasses
import threading
import time

from plumbing.common.process import printable
from plumbing.common.sockets import KEEPALIVE
from plumbing.common.wire import WIRE, count_bytes, restore_all
from plumbing.laptop.flower import GrpcBridgeClosed
from plumbing.laptop.handshake import TurnedAway
from plumbing.laptop.history import TRAFFIC

from flwr.common import Code, GetPropertiesIns, Parameters, ReconnectIns
from flwr.server.client_proxy import ClientProxy

# Flower keeps one stream to each client, on which it answers one question at a time. Besides fit and evaluate the
# questions are get_properties, whose dictionary says what is meant:
#     {"nonce", "version"}, {"net", "dataset_id"}  the handshake, answered within HANDSHAKE_TIMEOUT and READY_TIMEOUT
#     {}                                           are you there? every HEARTBEAT seconds, unless it is busy
#     {"turned_away"} or {"stopped"}               the reason, before the stream ends
# The server drops a client that is idle and silent for HEARTBEAT, busy for --round_timeout, or on a machine whose
# kernel is silent for KEEPALIVE; a client hangs up on a server that is silent for SILENCE (device/connection).
# The main thread runs the rounds. Each connection has a thread, "client …", for the handshake and then the heartbeat,
# and each question one, "fit 3", that waits for the answer. "record" keeps the record, "signals" notes signals.
# Registry._cv guards who is there; RemoteClient.lock is held while the client has a question to answer.

HEARTBEAT = 20  # seconds between two messages to a client that has nothing to do
BUSY = KEEPALIVE  # seconds after which the connection of a busy client has shown that it is alive
HANDSHAKE_TIMEOUT = 10  # seconds
READY_TIMEOUT = 120  # seconds for a client to build the net, and to read its shard again if it has to
MALFORMED = (TypeError, ValueError)  # what Flower raises on an answer that is none
LOST = "connection lost"  # the one reason of ClientFailure that says nothing about the run


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
        """Return the client's answer, asked by `method` of its proxy. Raise ClientFailure if there is none."""
        raise NotImplementedError

    def get_properties(self, ins, timeout, group_id):
        return self.ask("get_properties", ins, timeout, group_id)

    def get_parameters(self, ins, timeout, group_id):
        return self.ask("get_parameters", ins, timeout, group_id)

    def fit(self, ins, timeout, group_id):
        return self.ask("fit", ins, timeout, group_id)

    def evaluate(self, ins, timeout, group_id):
        return self.ask("evaluate", ins, timeout, group_id)

    def reconnect(self, ins, timeout, group_id):
        return self.ask("reconnect", ins, timeout, group_id)


class RemoteClient(Admitted):
    """A client of the scripts, for one question at a time.

    sender: says how parameters are sent to a client that understands more than Flower's plain arrays.
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
        """Put the question, and translate its parameters and those of the answer to and from the wire."""
        ask = getattr(self.proxy, method)
        if self.sender is None or method not in ("fit", "evaluate"):
            return ask(ins, timeout, group_id)
        model, held = self.sender.model_of(ins.parameters), self.held
        self.held = None  # until it answers: without an answer nobody knows whether the model has arrived
        sent = dataclasses.replace(ins, parameters=self.sender.pack(model, held))
        res = ask(sent, timeout, group_id)
        self.held, answer = model, getattr(res, "parameters", None)
        numbers = count_bytes(sent.parameters, sent.config), count_bytes(answer, res.metrics)
        res.metrics = {**res.metrics, **dict(zip(TRAFFIC, numbers))}
        if method == "fit":
            res.parameters = Parameters(restore_all(answer.tensors, model.tensors), "numpy.ndarray")
        return res

    def heartbeat(self):
        """Send the client a message every HEARTBEAT seconds, unless it is busy, until it is gone.

        So both sides notice when the other is gone. The connection of a client that does not answer is ended.
        """
        while not self.gone.wait(HEARTBEAT):
            if self.lock.acquire(blocking=False):
                try:
                    self._answers()
                finally:
                    self.lock.release()

    def is_alive(self):
        """Return, within BUSY + HEARTBEAT seconds, whether the client is there; end the connection if it is not.

        A busy client cannot answer. But the kernel of a dead board does not answer TCP's keepalive either, so a
        connection that lasts for BUSY seconds is alive.
        """
        if not self.lock.acquire(timeout=BUSY):
            return not self.gone.is_set()
        try:
            return self._answers()
        finally:
            self.lock.release()

    def _answers(self):
        try:
            self.proxy.get_properties(GetPropertiesIns({}), HEARTBEAT, 0)
            return True
        except (GrpcBridgeClosed, *MALFORMED):
            self.close()
            return False

    def close(self):
        """Fail the pending question, and end the connection."""
        self.gone.set()
        self.proxy.bridge.close()

    def say_goodbye(self, notice):
        """Send the client away, with the notice if it can hear it: not while it is busy."""
        if self.lock.acquire(timeout=1 if notice else HEARTBEAT):  # without a notice the run is over, and nobody trains
            send_away(self.proxy, notice)
        self.close()


def ask_stranger(proxy, question):
    """Put one question of the handshake to a connection, and return the answer. Raise TurnedAway if it is none."""
    try:
        res = proxy.get_properties(
            GetPropertiesIns(question), READY_TIMEOUT if "net" in question else HANDSHAKE_TIMEOUT, 0
        )
    except MALFORMED:
        raise TurnedAway("it is not this suite's client.py") from None
    return res.properties if res.status.code == Code.OK else {}


def send_away(proxy, notice):
    """Give a connection the notice, if it is not empty, and end it; after "stopped", the client reconnects later."""
    try:
        if notice:
            proxy.get_properties(GetPropertiesIns(notice), HANDSHAKE_TIMEOUT, 0)
        if "stopped" not in notice:
            proxy.reconnect(ReconnectIns(seconds=None), HANDSHAKE_TIMEOUT, 0)
    except (GrpcBridgeClosed, *MALFORMED):
        pass  # it is gone already, which is as good
    proxy.bridge.close()
