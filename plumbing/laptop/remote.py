"""One client of the scripts: the questions that it is asked."""

import threading

from plumbing.common.frames import FIRST, KEEPALIVE, PING_TIMEOUT, Malformed, most_bytes
from plumbing.common.process import printable
from plumbing.common.wire import restore_all
from plumbing.laptop.history import TRAFFIC
from plumbing.laptop.stream import Gone

from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status

# A client is dropped if it is busy for longer than --round_timeout. Both ends drop a stream whose other end has not
# answered a ping for KEEPALIVE + PING_TIMEOUT seconds (common/frames).
BUSY = KEEPALIVE + PING_TIMEOUT + 10  # seconds after which the stream of a busy client has shown that it is alive
IDLE = 20  # seconds for one that has nothing to do to say that it is there


class ClientFailure(Exception):
    """A client gave no answer; `cid` says which, the text why."""

    def __init__(self, cid, reason):
        super().__init__(reason)
        self.cid = cid


class RemoteClient:
    """A client of the scripts that passed the handshake, for one question at a time: fit or evaluate.

    proxy: its stream.Stream.
    properties: what it says of itself, with its cid.
    sender: says how parameters are sent (common/wire).
    """

    def __init__(self, proxy, properties, sender):
        self.cid, self.proxy, self.properties = str(properties["cid"]), proxy, properties
        self.sender = sender
        self.held = None  # the wire.Model that it has, as far as its last answer tells
        self.lock = threading.Lock()  # held while it has a question to answer

    def ask(self, method, ins, timeout):
        """Return the answer to "fit" or "evaluate" within `timeout` seconds, None: no limit. Raise ClientFailure."""
        with self.lock:  # is_alive holds it for IDLE seconds at most
            try:
                return self._exchange(method, ins, timeout)
            except (Malformed, ValueError, TypeError) as error:
                raise ClientFailure(self.cid, f"malformed answer: {printable(error)}") from error
            except Gone as error:
                raise ClientFailure(self.cid, str(error)) from None

    def _exchange(self, method, ins, timeout):
        """Put the question, and translate its parameters and those of the answer to and from the wire."""
        model, held = self.sender.model_of(ins.parameters), self.held
        self.held = None  # until it answers: without an answer nobody knows whether the model has arrived
        sent = self.sender.pack(model, held)
        limit = most_bytes(map(len, model.tensors)) if method == "fit" else FIRST
        question = {"config": ins.config, "tensor_type": sent.tensor_type}
        answer, tensors = self.proxy.ask(method, question, sent.tensors, limit, timeout)
        self.held, ok = model, Status(Code.OK, "")
        metrics = {**answer["metrics"], **dict(zip(TRAFFIC, self.proxy.traffic))}
        if method == "evaluate":
            return EvaluateRes(ok, answer["loss"], answer["num_examples"], metrics)
        parameters = Parameters(restore_all(tensors, model.tensors), "numpy.ndarray")
        return FitRes(ok, parameters, answer["num_examples"], metrics)

    def is_alive(self):
        """Return, within BUSY + IDLE seconds, whether the client is there; end its stream if it is not.

        A busy client cannot answer. But gRPC ends the stream of a dead board, whose pings stay unanswered: one that
        still lasts after BUSY seconds is alive.
        """
        if not self.lock.acquire(timeout=BUSY):
            return not self.proxy.ended.is_set()
        try:
            self.proxy.ask("ping", timeout=IDLE)
            return True
        except (Gone, Malformed):
            return False
        finally:
            self.lock.release()

    def close(self):
        """Fail the pending question, and end the stream."""
        self.proxy.close()

    def say_goodbye(self, notice):
        """Send the client away with the notice, unless it is busy: then it sees its stream end."""
        # Nobody trains once the run is over, so this waits for an evaluate. The lock is kept: no more questions.
        if self.lock.acquire(timeout=IDLE if notice["why"] == "over" else 1):
            self.proxy.say_goodbye(**notice)
