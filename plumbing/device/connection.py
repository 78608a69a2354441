"""Finding the server, and finding it again.

All that the device uses of Flower's insides is imported here: its gRPC stub, its messages, and their conversion.
"""

from __future__ import annotations

import contextlib
import queue
import random
import socket
import ssl
import threading
import time
from pathlib import Path

from plumbing import UNNAMED, VERSION
from plumbing.common.arguments import join_address
from plumbing.common.process import UserError, say
from plumbing.common.sockets import keep_alive, tcp_sockets
from plumbing.common.state import float32_weights
from plumbing.common.wire import Holder

import grpc
from flwr.common import serde
from flwr.proto.transport_pb2 import ClientMessage, Reason, ServerMessage
from flwr.proto.transport_pb2_grpc import FlowerServiceStub

SILENCE = 60  # seconds without a word from the server, which sends one every 20, until the connection counts as lost
MAX_DELAY = 25  # seconds between two tries to reach the server; a try takes up to PROBE_TIMEOUT more
PROBE_TIMEOUT = 5  # seconds
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2's preface, SETTINGS
SETTINGS = b"\x04"  # the type of that frame, in its fourth byte
NOT_YET_VALID, HAS_EXPIRED = 9, 10  # of X509_V_ERR_CERT_…
NOTICES = ("turned_away", "stopped")  # the server's reasons to end a connection
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),  # connect directly, as the probe does, whatever proxy is set for the web
]


class Connection:
    """The connections to one server, one at a time.

    client: a flwr NumPyClient; its `task.model` is the net whose parameters travel.
    root_certificate: path of the server's ca.pem, None without TLS.
    """

    def __init__(self, client, host: str, port: int, root_certificate: Path | None = None):
        self.client, self.host, self.port, self.root_certificate = client, host, port, root_certificate
        self.address = join_address(host, port)
        self.heard = False  # whether the server has asked anything on the current connection
        self.listening = None  # time since when it is the server's turn; None while the client works
        self.notice = {}  # why the server ends the connection
        self.versioned = True  # whether the server names its version, and so also compares ours

    def serve(self) -> str | None:
        """Answer the server until the connection ends. Return None if training is over, else the reason as text.

        Raises UserError if the server turns this client away. (Flower's start_client is deprecated, leaves a thread
        behind for each lost connection (grpc 21995), and takes the signals with flwr 1.11.)
        """
        flower_client, answers, over = self.client.to_client(), queue.SimpleQueue(), False
        holder = Holder(lambda: float32_weights(self.client.task.model))
        channel, problem = self.open_channel(), f"lost the server at {self.address}"
        self.notice, self.heard, self.listening = {}, False, time.monotonic()
        try:
            for message in FlowerServiceStub(channel).Join(iter(answers.get, None)):
                if not self.heard:
                    for sock in tcp_sockets(self.port, far=True):  # to notice a server that vanishes while we train
                        keep_alive(sock)
                self.heard, self.listening = True, None
                answers.put(self.answer(flower_client, message, holder))
                over = message.HasField("reconnect_ins")
                self.listening = time.monotonic()
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                problem = "the server did not wait for us any longer"
            elif self.listening is not None and time.monotonic() - self.listening >= SILENCE:
                problem = f"nothing heard from the server for {SILENCE} s"
        finally:
            self.listening = None
            answers.put(None)  # ends the thread in which gRPC waits for our answers
            channel.close()
        if "turned_away" in self.notice:
            raise UserError(f"the server turned this client away: {self.explain(self.notice['turned_away'])}")
        return self.notice.get("stopped", None if over else problem)

    def open_channel(self):
        target = self.address.replace("%", "%25")  # for gRPC the address is a URI
        if self.root_certificate is None:
            return grpc.insecure_channel(target, OPTIONS)
        credentials = grpc.ssl_channel_credentials(self.root_certificate.read_bytes())
        return grpc.secure_channel(target, credentials, OPTIONS)

    def answer(self, flower_client, message: ServerMessage, holder: Holder) -> ClientMessage:
        """Return the client's answer to one message of the server, both as Flower puts them on the wire."""
        kind = message.WhichOneof("msg")  # such as "fit_ins"
        if kind == "reconnect_ins":
            return ClientMessage(disconnect_res=ClientMessage.DisconnectRes(reason=Reason.ACK))
        name = kind[: -len("_ins")]
        ins = getattr(serde, f"{kind}_from_proto")(getattr(message, kind))
        if name == "get_properties":
            self.notice = {reason: ins.config[reason] for reason in NOTICES if reason in ins.config}
            if "nonce" in ins.config:
                self.versioned = "version" in ins.config
                say("connected to the server")
        if name in ("fit", "evaluate"):
            ins.parameters = holder.unpack(ins.parameters)
        res = getattr(flower_client, name)(ins)
        if name == "fit":
            res.parameters = holder.pack(res.parameters)
        return ClientMessage(**{f"{name}_res": getattr(serde, f"{name}_res_to_proto")(res)})

    def explain(self, reason):
        """Add both versions to a reason of a server that does not name its own."""
        if self.versioned:
            return reason
        return f"{reason} (this client runs FL-IoT {VERSION}, the server {UNNAMED}: update the older one)"

    def watch_silence(self):
        """Forever, hang up when the server is silent for SILENCE seconds though it is its turn.

        This is how a cable that was cut looks: no packet tells of it.
        """
        while True:
            time.sleep(1)
            since = self.listening
            if since is not None and time.monotonic() - since >= SILENCE:
                hang_up(self.port)


def hang_up(port: int) -> None:
    """Shut down this process's TCP connections to `port`.

    Closing a gRPC channel waits until all data is sent: on a dead link, for up to a quarter of an hour.
    """
    for sock in tcp_sockets(port, far=True):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def knock(host, port, context=None):
    """Send HTTP/2's first bytes, over TLS if `context` is given, and return the first bytes of the answer."""
    with socket.create_connection((host, port), timeout=PROBE_TIMEOUT) as sock:
        with context.wrap_socket(sock, server_hostname=host) if context else contextlib.nullcontext(sock) as stream:
            stream.sendall(HELLO)
            return stream.recv(9)


def tls_context(**kwargs):
    context = ssl.create_default_context(**kwargs)
    context.set_alpn_protocols(["h2"])
    return context


def probe(host: str, port: int, root_certificate: Path | None) -> str | None:
    """Return None if the server answers, else what is wrong at the moment, as text.

    Raises UserError if waiting would not help: only one side speaks TLS, or the certificate does not fit. gRPC reports
    all of these as the same UNAVAILABLE.
    """
    address = f"{host}:{port}"
    try:
        if root_certificate is not None:
            context = tls_context(cafile=str(root_certificate))
            return None if knock(host, port, context) else f"the server at {address} hangs up"
        if knock(host, port)[3:4] == SETTINGS:
            return None
        anyone = tls_context()
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        with contextlib.suppress(ssl.SSLError):
            knock(host, port, anyone)
            raise UserError(f"the server at {address} speaks TLS: give its ca.pem as --root_certificate")
        return f"what answers at {address} is not the server"
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == NOT_YET_VALID:  # a Pi has no clock of its own, and first has to ask for the time
            return f"the certificate of the server at {address} is not valid yet by this device's clock"
        if error.verify_code == HAS_EXPIRED:
            raise UserError(
                f"the certificate of the server at {address} has expired, by this device's clock: make a new one there "
                "with deploy/make_certificates.sh"
            ) from None
        raise UserError(
            f"the certificate of the server at {address} does not fit {root_certificate}: {error.verify_message}"
        ) from None
    except ssl.SSLEOFError:
        return f"the server at {address} hangs up"
    except ssl.SSLError:
        raise UserError(f"the server at {address} does not speak TLS: leave out --root_certificate") from None
    except OSError as error:
        return f"no server at {address} ({error.strerror or error})"
    except UnicodeError:
        raise UserError(f"--server_address {host} is neither a name nor an IP address") from None


def stay_connected(connection: Connection, max_wait_time: float) -> int:
    """Serve the server, across lost connections, until it says that training is over. Return the exit code.

    max_wait_time: seconds without a server until this gives up; 0: never.
    """
    threading.Thread(target=connection.watch_silence, name="silence", daemon=True).start()
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
