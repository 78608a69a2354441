"""Finding the server, answering it, and finding it again."""

from __future__ import annotations

import queue
import random
import threading
import time
from pathlib import Path

from plumbing import VERSION
from plumbing.common import frames
from plumbing.common.arguments import join_address, split_address
from plumbing.common.process import UserError, printable, say
from plumbing.common.proof import is_same, make_pass, name_channel, new_nonce, prove_client, prove_server
from plumbing.common.state import float32_weights
from plumbing.common.wire import Holder, read_npy, write_npy
from plumbing.device.probe import PROBE_TIMEOUT, probe

import grpc
from flwr.common import Parameters

WHO = ("cid", "dataset", "device_id", "version")  # what of its properties a device tells before the server's proof
PATIENCE = 60  # seconds for the server to show that it is the right one
MAX_DELAY = 30 - PROBE_TIMEOUT  # seconds between two tries to reach the server; the probe of one takes some more
CLIENT_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # connect directly, as the probe does, whatever proxy is set for the web
    ("grpc.use_local_subchannel_pool", 1),  # a connection for each Connection of a process
]
BUSY, LATE = "the server at {} has no place for us at the moment", "the server did not wait for us any longer"


class Session:
    """The answers to a server, on one stream.

    client: a flwr NumPyClient with the attributes `task`, whose `model` is the net that travels, `secret`, and
        `answered`, when it gave its last answer; None at the start of a session.
    channel: see proof.name_channel.

    Until the server has proved that it knows the secret it is told who asks to take part, and no more.
    """

    def __init__(self, client, channel: str = ""):
        self.client, self.channel = client, channel
        self.holder = Holder(lambda: float32_weights(client.task.model))
        self.limit = frames.FIRST  # bytes that the server's next frame may have
        self.nonces, self.proved = None, client.secret is None
        self.ticket = None
        self.end = None  # why the server ends the stream, (why, text), once it has said so
        self.problem = None  # why the device does

    def answer(self, frame: bytes) -> bytes:
        """Return the answer to a frame. Raises frames.Malformed if it is none, or not yet the time for it."""
        header, arrays = frames.decode(frame)
        kind = header["kind"]
        try:
            question = frames.judge(header, frames.QUESTIONS)
        except frames.OtherVersion as other:
            self.problem = frames.describe_versions(VERSION, printable(other.version, 20))
            return frames.encode(kind, {"version": VERSION, "frames": frames.FRAMES, "nonce": new_nonce(), "about": {}})
        if kind != "goodbye" and (kind == "hello") is not (self.nonces is None):
            raise frames.Malformed(f"{kind} at the wrong time")
        if not self.proved and self.nonces is not None:
            self.proved = is_same(
                question.get("proof", ""), prove_server(self.client.secret, self.channel, self.nonces)
            )
        if not self.proved and kind not in ("hello", "goodbye"):
            raise frames.Malformed("it does not prove that it knows the secret")
        return frames.encode(kind, *getattr(self, f"on_{kind}")(question, arrays))

    def on_hello(self, question, arrays):
        nonce, properties = new_nonce(), self.client.get_properties({})
        about = {name: properties[name] for name in WHO if name in properties}
        self.nonces = question["nonce"], nonce
        answer = {"version": VERSION, "frames": frames.FRAMES, "nonce": nonce, "about": about}
        if self.client.secret is not None:
            answer["proof"] = prove_client(self.client.secret, self.channel, self.nonces, about)
        return answer, ()

    def on_task(self, question, arrays):
        say("connected to the server")
        self.ticket = question["ticket"]
        self.client.answered = None  # the time without a server is no waiting of a round
        about = self.client.get_properties(question)
        if self.client.task.model is not None:
            self.limit = frames.most_bytes(array.nbytes for array in self.client.get_parameters({}))
        trial = [about.pop("trial")] if "trial" in about else []
        return {"about": shorten(about)}, trial

    def on_fit(self, question, arrays):
        parameters, num_examples, metrics = self.client.fit(self.unpack(question, arrays), question["config"])
        try:
            sent = self.holder.pack(Parameters([write_npy(array) for array in parameters], "numpy.ndarray"))
        except ValueError as error:  # what the server has sent before is not the model that is trained here
            raise frames.Malformed(printable(error)) from None
        return {"num_examples": num_examples, "metrics": shorten(metrics)}, sent.tensors

    def on_evaluate(self, question, arrays):
        loss, num_examples, metrics = self.client.evaluate(self.unpack(question, arrays), question["config"])
        return {"num_examples": num_examples, "loss": loss, "metrics": shorten(metrics)}, ()

    def on_ping(self, question, arrays):
        return {}, ()

    def on_goodbye(self, question, arrays):
        self.end = question["why"], question.get("text", "")
        return {}, ()

    def unpack(self, question, arrays):
        """Return the model that the server has sent, or that this device holds: [array, …]."""
        try:
            plain = self.holder.unpack(Parameters(arrays, question["tensor_type"]))
            return [read_npy(data) for data in plain.tensors]
        except Exception as error:  # numpy has no end of them for what is no .npy
            raise frames.Malformed(printable(error)) from None


def shorten(entries):
    """Cut off what an error says too much for a frame."""
    return {name: value[:1000] if isinstance(value, str) else value for name, value in entries.items()}


class Connection:
    """The connections to one server, one at a time.

    client: see Session. root_certificate: path of the server's ca.pem, None without TLS.
    """

    def __init__(self, client, host: str, port: int, root_certificate: str | None = None):
        self.client, self.host, self.port, self.root_certificate = client, host, port, root_certificate
        self.address = join_address(host, port)
        self.authority = None if root_certificate is None else Path(root_certificate).read_bytes()
        self.heard = False  # whether the server was the right one on the current connection
        self.ticket = None  # of the last server that we were admitted to

    def serve(self) -> str | None:
        """Answer the server until the connection ends. Return None if training is over, else the reason as text.

        Raises UserError if the server turns this client away.
        """
        session, answers, channel = Session(self.client, name_channel(self.authority)), queue.SimpleQueue(), self.open()
        problem = f"lost the server at {self.address}"
        stream = channel.stream_stream(frames.METHOD)(iter(answers.get, None), metadata=self.make_metadata())
        patience = threading.Timer(PATIENCE, lambda: session.ticket or stream.cancel())
        patience.daemon = True
        patience.start()
        try:
            for frame in iter(lambda: frames.read(stream, session.limit), None):
                for message in frames.split(session.answer(frame)):
                    answers.put(message)
        except grpc.RpcError as error:
            problem = self.explain(error.code(), session.ticket is not None) or problem
        except frames.Malformed as error:
            problem = f"what the server at {self.address} says is not understood: {error}"
        finally:
            patience.cancel()
            answers.put(None)  # ends the thread in which gRPC waits for our answers
            channel.close()
        self.heard, self.ticket = session.ticket is not None, session.ticket or self.ticket
        return self.judge_end(session, problem)

    def judge_end(self, session, problem):
        """Return what `serve` returns for a session that is over; a server that has proved nothing is not obeyed."""
        why, text = session.end or (None, "")
        text = printable(session.problem or text)
        if not session.proved and (session.problem or session.end):
            said = f" (it says: {text})" if text else ""
            return f"the server at {self.address} does not prove that it knows the secret{said}"
        if session.problem or why == "turned_away":
            raise UserError(f"the server turned this client away: {text}")
        return {None: problem, "over": None}.get(why, text)

    def open(self):
        target = self.address.replace("%", "%25")  # for gRPC the address is a URI
        settings = [*frames.options(), *CLIENT_OPTIONS]
        if self.authority is None:
            return grpc.insecure_channel(target, settings)
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(self.authority), settings)

    def make_metadata(self):
        """Return the pass with which a device needs no place among the strangers (laptop/door), if it has one."""
        key = self.ticket.encode() if self.ticket is not None else self.client.secret
        if key is None:
            return ()
        nonce, device_id = new_nonce(), self.client.get_properties({})["device_id"] if self.ticket else ""
        return (("pass", f"{nonce} {device_id} {make_pass(key, nonce)}"),)

    def explain(self, code, admitted):
        """Return what gRPC's status means here, as text; None if the connection is lost, or there was none."""
        return {
            grpc.StatusCode.CANCELLED: LATE if admitted else BUSY.format(self.address),
            grpc.StatusCode.RESOURCE_EXHAUSTED: BUSY.format(self.address),
            grpc.StatusCode.UNIMPLEMENTED: f"the server at {self.address} is not this suite's, or runs FL-IoT before "
            f"1.2.0, and this device {VERSION}: make deploy",
        }.get(code)


def start_client(*, server_address: str, client, root_certificates: str | None = None, max_wait_time: float = 0) -> int:
    """Serve the server, across lost connections, until training is over. Return the exit code of the script.

    The parameters are those of Flower's start_client, which has no word for a lost connection, no proof that the server
    is the right one, and no future.

    client: see Session. root_certificates: path of the server's ca.pem, None without TLS.
    max_wait_time: seconds without a server until this gives up; 0: never.
    """
    host, port = split_address(server_address)
    connection = Connection(client, host, port, root_certificates)
    last_seen, tries, said = time.monotonic(), 0, None
    while True:
        problem = probe(connection.host, connection.port, connection.root_certificate)
        if problem is None:
            problem = connection.serve()
            if problem is None:
                say("training is over")
                return 0
            if connection.heard:
                last_seen, tries, said = time.monotonic(), 0, None
        waited = time.monotonic() - last_seen
        if max_wait_time and waited >= max_wait_time:
            say(f"{problem}; giving up after {max_wait_time:g} s (--max_wait_time)")
            return 1
        if problem != said:
            say(f"{problem}; trying again")
            said = problem
        delay = min(MAX_DELAY, 2**tries) * random.uniform(0.5, 1)
        time.sleep(max(1, min(delay, max_wait_time - waited if max_wait_time else delay)))
        tries = min(tries + 1, 10)
