"""Train on one shard, on one device, for the server.

    python client.py --server_address 192.168.1.10 --dataset CIFAR10 --cid 3

Reads the shard that partition.py wrote, waits for the server and trains in each of its rounds. Sends back parameters
and metrics, never an image. Reconnects by itself; ends with exit code 0 when the server says that training is over.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import queue
import random
import re
import secrets
import socket
import ssl
import sys
import threading
import time
import traceback
from pathlib import Path

from libs import (
    CKPS,
    DATASETS,
    UserError,
    atomic_write,
    find_folder,
    join_address,
    keep_alive,
    lock_file,
    new_parser,
    np,
    number,
    on_signal,
    plain_args,
    prove,
    quiet_flower,
    read_secret,
    run_script,
    say,
    split_address,
    tcp_sockets,
    torch,
)

import flwr
import grpc
from flwr.client import ClientApp, NumPyClient
from flwr.common import serde
from flwr.proto.transport_pb2 import ClientMessage, Reason, ServerMessage
from flwr.proto.transport_pb2_grpc import FlowerServiceStub

from data import describe_in_checkpoint, load_shard
from engines import client_fit_fn, run_epoch
from nets import NETS, batch_norm_names, build_net, fingerprint, get_arrays, learned, set_arrays, trial
from wire import WIRE, Holder

SILENCE = 60  # seconds without a word from the server, which sends one every 20, until it is taken for lost
MAX_DELAY = 25  # seconds between two tries to reach the server; a try takes up to PROBE_TIMEOUT more
PROBE_TIMEOUT = 5  # seconds
TOLD = ("round", "num_rounds", "net", "dataset_id", "fedbn")  # what comes with a fit besides the hyper-parameters
KEPT_RUNS = 8  # of which a device keeps its batch norm


def parse_args():
    parser = new_parser(__doc__)
    parser.add_argument("--server_address", default="127.0.0.1", help="name or IP address of the server")
    parser.add_argument("--server_port", type=number(int, 1, 65535), help="its port (default: 8080)")
    parser.add_argument("--cid", type=number(int, 0), required=True, help="which shard: clients/client_<cid>.csv")
    parser.add_argument("--device", default="auto", help="where to train: cpu, cuda, …; auto takes CUDA if it can")
    parser.add_argument("--num_threads", type=number(int, 1), help="CPU threads to train with (default: all)")
    parser.add_argument(
        "--max_wait_time", type=number(float, 0), default=600, help="seconds without a server until giving up; 0: never"
    )
    parser.add_argument("--secret_file", type=Path, help="file with the secret that the server knows too")
    parser.add_argument("--root_certificate", type=Path, help="the server's ca.pem; makes the connection TLS")
    parser.add_argument("--verbose", action="store_true", help="show the log of Flower too")
    args = parser.parse_args()
    args.server_address, args.server_port = split_address(args.server_address, args.server_port)
    return args


class OwnBatchNorm:
    """A device's batch norm, which it keeps to itself with --fedbn (FedBN, Li et al. 2021, arXiv 2102.07623).

    The file `path` holds that of the last KEPT_RUNS runs, {name of the run: {name: tensor}}. It is written whole after
    each fit, so that a device that starts anew goes on with what it had.
    """

    def __init__(self, path):
        self.path, self.kept = path, None  # read when it is asked for

    def put_into(self, model, runs):
        """Put what was kept for the first of the `runs` for which anything was into `model`; whether there was any."""
        if runs and self.kept is None:
            self.kept = self._read()
        for run in runs:
            if run in self.kept:
                self.kept[run] = self.kept.pop(run)  # the newest now: not the one to be dropped
                state = model.state_dict()
                for name, tensor in self.kept[run].items():
                    state[name].copy_(tensor)
                return True
        return False

    def keep(self, model, run):
        """Keep the batch norm of `model`, unless it has diverged: the server, too, drops what is not finite."""
        state = model.state_dict()
        own = {name: state[name].detach().cpu().clone() for name in batch_norm_names(model)}
        if not all(torch.isfinite(tensor).all() for tensor in own.values()):
            return
        self.kept.pop(run, None)
        self.kept[run] = own
        for old in list(self.kept)[:-KEPT_RUNS]:
            del self.kept[old]
        try:
            with atomic_write(self.path) as part, open(part, "wb") as file:
                torch.save(self.kept, file)
        except OSError as error:
            say(f"cannot write {self.path} ({error.strerror}): batch norm is lost when this process ends")

    def _read(self):
        if self.path is None:
            raise UserError("--fedbn needs a folder to keep batch norm in")
        if not self.path.exists():
            return {}
        try:
            return dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except Exception as error:  # whatever torch makes of a damaged file
            say(f"{self.path} cannot be read ({type(error).__name__}): batch norm begins with the server's")
            return {}


class Client(NumPyClient):
    """Flower's client for one shard: trains and evaluates `model` on loaders["fit"] and loaders["eval"].

    `properties` says who this is (registry.handshake), `about` describes the checkpoints that go to `save_ckp_path`
    (nets.save_checkpoint); `secret` is bytes or None. The server says which net to train, on which cut of the data:
    `load(image_size)` reads anew what lies on the disk by then (data.load_shard).
    """

    def __init__(
        self, model, loaders, device="cpu", save_ckp_path=None, properties=None, about=None, secret=None, load=None
    ):
        self.model, self.loaders, self.device = model, loaders, device
        self.save_ckp_path, self.about, self.secret = save_ckp_path, about or {}, secret
        self.properties, self.load = properties or {}, load
        self.own = OwnBatchNorm(save_ckp_path and Path(save_ckp_path).with_suffix(".bn"))
        self.notice = {}  # what the server said before it sends us away
        self.heard = False  # whether the server has asked anything yet on this connection
        self.listening = None  # since when it is the server's turn; None while we work
        self.answered = None  # when a fit or evaluate was answered last
        self.waited = 0.0  # seconds, since the last line about a round

    def get_properties(self, config):
        """Answer what the server asks besides training: who this is ("nonce"), and to make ready ("net").

        Also takes its notices, "turned_away" or "stopped", each with its reason.
        """
        self.notice = {name: config[name] for name in ("turned_away", "stopped") if name in config}
        if "net" in config:
            return {**self.properties, **self.make_ready(config["net"], config.get("dataset_id"))}
        if "nonce" in config:
            say("connected to the server")
            if self.secret is not None:
                return {**self.properties, "proof": prove(self.secret, config["nonce"], self.properties["cid"])}
        return self.properties

    def build(self, net, dataset_id):
        """Build `net`, for the cut `dataset_id` of the data (None: any). Raises UserError where that cannot be."""
        if net not in NETS:
            raise UserError(f"its nets.py has no net {net}")
        size = self.loaders and tuple(self.loaders["fit"].dataset.images.shape[2:])
        if size != NETS[net].image_size or dataset_id not in (None, self.about["dataset_id"]):
            again = " anew" if self.loaders else ""
            self.loaders, info = self.load(NETS[net].image_size)
            self.about.update(describe_in_checkpoint(info))
            say(f"the shard was read{again}: {sizes(self.loaders)} images")
        self.model = build_net(net, self.loaders["fit"].dataset.images.shape[1], len(self.about["classes"]))

    def make_ready(self, net, dataset_id):
        """Build the net as `build` does: what the server has to know of it and of the data."""
        try:
            self.build(net, dataset_id)
            answer = {"fingerprint": fingerprint(self.model), "trial": trial(self.model).tobytes()}
            self.model.to(self.device)  # the parameters to start from come with the first fit
        except UserError as error:
            answer = {"error": str(error)}
            if self.loaders is None:
                return answer
        return {
            **answer,
            "channels": self.loaders["fit"].dataset.images.shape[1],
            "num_classes": len(self.about["classes"]),
            "dataset_id": self.about["dataset_id"] or "",
            "num_fit": len(self.loaders["fit"].dataset),
            "num_eval": len(self.loaders["eval"].dataset),
        }

    def heed(self, config):
        """Build what `config` names, the net and the cut of the data, as it does on Flower's engines.

        There, another process may have answered the last message. Raises UserError where the server has other data.
        """
        if "net" in config:
            self.build(config["net"], config.get("dataset_id"))
            if config.get("dataset_id") not in (None, self.about["dataset_id"]):
                raise UserError("its shard is not of the server's cut of the data any more")
            self.model.to(self.device)

    def get_parameters(self, config):
        """The parameters and buffers of the local model, a list of arrays in the order of its state dict."""
        return get_arrays(self.model)

    def set_parameters(self, parameters):
        """Put such a list into the local model. Raises ValueError where number or shapes differ."""
        set_arrays(self.model, parameters)

    def runs(self, config):
        """The names under which this device may have kept its batch norm of the server's run, the newest first.

        Another cut of the data, or another net, is another run. [] without --fedbn.
        """
        names = config.get("fedbn", "").split()
        return [f"{name} {self.about.get('dataset_id')} {fingerprint(self.model)}" for name in names]

    def fit(self, parameters, config):
        """Train from `parameters` with the hyper-parameters in `config`: all of it but those in TOLD.

        Returns (parameters, number of fit images, metrics of engines.client_fit_fn and telemetry), or ([], 0, {"error":
        reason}).
        """
        try:
            started, telemetry = time.monotonic(), waited_since(self.answered)
            self.heed(config)
            self.waited += telemetry.get("wait_seconds", 0.0)
            self.set_parameters(parameters)
            runs, current = self.runs(config), config.get("round")
            if runs and not self.own.put_into(self.model, runs) and current != 1:
                say("batch norm begins with the server's: this device has none of this run")
            hyper_parameters = {name: config[name] for name in config if name not in TOLD}
            if "seed" in config:  # another one in each round and on each device
                sequence = np.random.SeedSequence([config["seed"], current, self.properties["cid"]])
                hyper_parameters["seed"] = int(sequence.generate_state(1)[0])
            metrics = client_fit_fn(
                self.loaders,
                self.model,
                device=self.device,
                save_ckp_path=self.save_ckp_path,
                about={**self.about, "round": current},
                **hyper_parameters,
            )
            if runs:
                self.own.keep(self.model, runs[0])
            figures = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            title = f"round {config.get('round', '?')}/{config.get('num_rounds', '?')}  waited {self.waited:.1f} s"
            self.waited = 0.0
            telemetry["fit_seconds"] = time.monotonic() - started
            say(f"{title}  {figures}  {telemetry['fit_seconds']:.1f} s")
            telemetry.update(sensors())
            return self.get_parameters({}), len(self.loaders["fit"].dataset), {**metrics, **telemetry}
        except Exception as error:
            traceback.print_exc()
            return [], 0, {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.answered = time.monotonic()

    def evaluate(self, parameters, config):
        """Measure the global model `parameters` on the eval images, with --fedbn under the device's own batch norm.

        Returns (loss, number of eval images, {"global_eval_loss", "global_eval_accuracy", and telemetry}), or
        (0.0, 0, {"error": reason}).
        """
        try:
            started, telemetry = time.monotonic(), waited_since(self.answered)
            self.heed(config)
            self.waited += telemetry.get("wait_seconds", 0.0)
            self.set_parameters(parameters)
            self.own.put_into(self.model, self.runs(config))
            loss, accuracy = run_epoch(self.loaders["eval"], self.model, self.device)
            metrics = {"global_eval_loss": loss, "global_eval_accuracy": accuracy}
            telemetry["eval_seconds"] = time.monotonic() - started
            return loss, len(self.loaders["eval"].dataset), {**metrics, **telemetry}
        except Exception as error:
            traceback.print_exc()
            return 0.0, 0, {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.answered = time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# Finding the server, and finding it again.


def probe(host: str, port: int, root_certificate: Path | None) -> str | None:
    """Knock at the server's door: None where it answers, else what is wrong for now, as text.

    Raises UserError where waiting would not help: one side speaks TLS and the other does not, or the certificate is
    not the server's. gRPC reports all of these as the same UNAVAILABLE.
    """
    address = f"{host}:{port}"
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2's preface and SETTINGS

    def knock(context):
        with socket.create_connection((host, port), timeout=PROBE_TIMEOUT) as sock:
            with context.wrap_socket(sock, server_hostname=host) if context else contextlib.nullcontext(sock) as stream:
                stream.sendall(hello)
                return stream.recv(9)

    def tls(**kwargs):
        context = ssl.create_default_context(**kwargs)
        context.set_alpn_protocols(["h2"])
        return context

    try:
        if root_certificate is not None:
            return None if knock(tls(cafile=str(root_certificate))) else f"the server at {address} hangs up"
        if knock(None)[3:4] == b"\x04":  # the type of its SETTINGS frame
            return None
        anyone = tls()
        anyone.check_hostname, anyone.verify_mode = False, ssl.CERT_NONE
        with contextlib.suppress(ssl.SSLError):
            knock(anyone)
            raise UserError(f"the server at {address} speaks TLS: give its ca.pem as --root_certificate")
        return f"what answers at {address} is not the server"
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == 9:  # X509_V_ERR_CERT_NOT_YET_VALID: a Pi without a clock has to ask the time first
            return f"the certificate of the server at {address} is not valid yet by this device's clock"
        if error.verify_code == 10:  # X509_V_ERR_CERT_HAS_EXPIRED
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


def hang_up(port: int) -> None:
    """Shut down this process's TCP connections to `port`.

    gRPC, asked to close a channel, would wait until what it still has to send is gone: on a dead link a quarter of an
    hour at worst.
    """
    for sock in tcp_sockets(port, far=True):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def watch_silence(client, port):
    """Hang up, for ever watching, whenever the server has been silent for SILENCE seconds though it is its turn.

    A cut that no packet tells of looks like silence.
    """
    while True:
        time.sleep(1)
        since = client.listening
        if since is not None and time.monotonic() - since >= SILENCE:
            hang_up(port)


def answer(flower_client, message: ServerMessage, holder: Holder) -> ClientMessage:
    """The client's answer to one message of the server, both as Flower puts them on the wire."""
    kind = message.WhichOneof("msg")  # "fit_ins", say
    if kind == "reconnect_ins":
        return ClientMessage(disconnect_res=ClientMessage.DisconnectRes(reason=Reason.ACK))
    name = kind[: -len("_ins")]
    ins = getattr(serde, f"{kind}_from_proto")(getattr(message, kind))
    if name in ("fit", "evaluate"):
        ins.parameters = holder.unpack(ins.parameters)
    res = getattr(flower_client, name)(ins)
    if name == "fit":
        res.parameters = holder.pack(res.parameters)
    return ClientMessage(**{f"{name}_res": getattr(serde, f"{name}_res_to_proto")(res)})


def serve(client: Client, host: str, port: int, certificate: bytes | None) -> str | None:
    """Answer the server over one connection until that ends: None where training is over, else what ended it, as text.

    Raises UserError where the server turns this client away. (In place of Flower's start_client, which is deprecated,
    leaves a thread behind for each connection that is lost (grpc 21995), and with flwr 1.11 takes the signals.)
    """
    address, flower_client, answers, over = join_address(host, port), client.to_client(), queue.SimpleQueue(), False
    holder = Holder(lambda: learned(client.model))
    options = [
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.enable_http_proxy", 0),  # straight to the server, as the probe goes, whatever proxy is set for the web
    ]
    target = address.replace("%", "%25")  # gRPC takes it for a URI
    if certificate is None:
        channel = grpc.insecure_channel(target, options)
    else:
        channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(certificate), options)
    problem = f"lost the server at {address}"
    client.notice, client.heard, client.listening = {}, False, time.monotonic()
    try:
        for message in FlowerServiceStub(channel).Join(iter(answers.get, None)):
            if not client.heard:
                for sock in tcp_sockets(port, far=True):  # so that a server that vanishes while we train is noticed
                    keep_alive(sock)
            client.heard, client.listening = True, None
            answers.put(answer(flower_client, message, holder))
            over = message.HasField("reconnect_ins")
            client.listening = time.monotonic()
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
            problem = "the server did not wait for us any longer"
        elif client.listening is not None and time.monotonic() - client.listening >= SILENCE:
            problem = f"nothing heard from the server for {SILENCE} s"
    finally:
        client.listening = None
        answers.put(None)  # ends the thread in which gRPC waits for our answers
        channel.close()
    if "turned_away" in client.notice:
        raise UserError(f"the server turned this client away: {client.notice['turned_away']}")
    return client.notice.get("stopped", None if over else problem)


def stay_connected(client: Client, host: str, port: int, root_certificate: Path | None, max_wait_time: float) -> int:
    """Serve the server until it says that training is over, through every loss of it. Returns the exit code."""
    threading.Thread(target=watch_silence, args=(client, port), name="silence", daemon=True).start()
    certificate = root_certificate.read_bytes() if root_certificate is not None else None
    last_seen, tries, said = time.monotonic(), 0, None
    while True:
        problem = probe(host, port, root_certificate)
        if problem is None:
            problem = serve(client, host, port, certificate)
            if problem is None:
                say("training is over")
                return 0
            if client.heard:
                last_seen, tries, said = time.monotonic(), 0, None
        waited = time.monotonic() - last_seen
        if max_wait_time and waited >= max_wait_time:
            say(f"{problem}; giving up after {max_wait_time:g} s")
            return 1
        if problem != said:
            say(f"{problem}; trying again")
            said = problem
        delay = min(MAX_DELAY, 2**tries) * random.uniform(0.5, 1)
        time.sleep(max(1, min(delay, max_wait_time - waited if max_wait_time else delay)))
        tries = min(tries + 1, 10)


# ---------------------------------------------------------------------------------------------------------------------
# What must be there before the first connection.


def choose_device(name: str) -> torch.device:
    """The torch device for `--device`. Raises UserError where there is none of that name here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0][:200]}") from None
    return device


def waited_since(answered):
    """{"wait_seconds": since the last answer}, which the network and the other devices took; {} before the first."""
    return {} if answered is None else {"wait_seconds": time.monotonic() - answered}


def describe_machine(root: Path = Path("/")) -> dict:
    """What this client runs on, for the server and for people: board, versions, threads, free memory in MB.

    `root` is where /proc lies.
    """
    facts = {
        "board": platform.machine(),
        "torch": torch.__version__,
        "flwr": getattr(flwr, "__version__", "before 1.8"),
    }
    facts.update(python=platform.python_version(), threads=torch.get_num_threads())
    with contextlib.suppress(OSError):
        facts["board"] = (root / "proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    with contextlib.suppress(OSError, AttributeError):
        found = re.search(r"^MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        facts["free_mb"] = int(found[1]) // 1024
    return facts


def sensors(root: Path = Path("/")) -> dict[str, float]:
    """What the board tells of itself now; what it has no sensor for is absent. `root` is where /sys lies.

    peak_memory_mb: of this process. cpu_temp_c: °C. load: processes that want a core, mean of a minute. throttled: a
    Raspberry Pi's bits (vcgencmd get_throttled): 0 undervoltage, 1 capped, 2 throttled, 3 soft limit now; 16 to 19 the
    same since the boot.
    """
    found = {}
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["peak_memory_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
    with contextlib.suppress(OSError, ValueError):
        found["cpu_temp_c"] = int((root / "sys/class/thermal/thermal_zone0/temp").read_text()) / 1000
    with contextlib.suppress(OSError, ValueError):
        path = root / "sys/devices/platform/soc/soc:firmware/get_throttled"
        found["throttled"] = int(path.read_text(), 16)
    with contextlib.suppress(OSError, AttributeError):
        found["load"] = os.getloadavg()[0]
    return found


def board_id():
    """What the board, or else the system on it, calls itself (bytes), or b"" where neither says.

    So that the copy of an SD card in another board is another device. (Copies share /etc/machine-id where it was not
    emptied first; the server tells these apart by their both being alive.)
    """
    for path in ("/proc/device-tree/serial-number", "/etc/machine-id"):
        with contextlib.suppress(OSError):
            name = Path(path).read_bytes().strip(b"\0 \n")
            if name.strip(b"0"):
                return name
    return b""


def device_id(path: Path) -> str:
    """The id by which the server knows this device again after a cut or a reboot (32 hex digits).

    Made of a random one in the file `path`, which is written where it is missing or damaged, and of the board's own.
    Where it cannot be written, as on a full card, it is made of the board's alone.
    """
    stored = b""
    with contextlib.suppress(OSError):
        stored = path.read_bytes().strip()
    if re.fullmatch(rb"[0-9a-f]{32}", stored) is None:
        stored = secrets.token_hex(16).encode()
        try:
            with atomic_write(path) as part:
                part.write_bytes(stored)
        except OSError as error:
            say(f"cannot write {path} ({error.strerror}); training does without")
            stored = b""
    return hashlib.sha256(stored + board_id()).hexdigest()[:32]


def lock_cid(cid, folder):
    """Be the one process for `cid` on this device: the lock, to be kept, or None where the disk takes none."""
    try:
        lock = lock_file(folder / f"client_{cid}.lock")
    except PermissionError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    except OSError as error:  # a full card, or one that has turned read-only
        say(f"cannot write to {folder} ({error.strerror}); training does without")
        return None
    if lock is None:
        raise UserError(f"a client with --cid {cid} is running on this device already")
    return lock


def sizes(loaders):
    return " + ".join(f"{len(loaders[phase].dataset)} {phase}" for phase in loaders)


def main():
    args = parse_args()
    if not args.verbose:
        quiet_flower()
    try:
        ssl.create_default_context(cafile=args.root_certificate)
    except OSError as error:
        raise UserError(f"no certificate can be read from {args.root_certificate}: {error.strerror or error}") from None
    secret = read_secret(args.secret_file)
    device = choose_device(args.device)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)

    def load(image_size=(32, 32)):
        return load_shard(DATASETS / args.dataset, args.cid, device, image_size)

    loaders, info = load()
    machine = describe_machine()
    folder = CKPS / args.dataset
    lock = lock_cid(args.cid, folder)  # noqa: F841 (held until the process ends)
    client = Client(
        None,  # the net is the server's choice
        loaders,
        device,
        folder / f"client_{args.cid}.ptl",
        properties={
            "cid": args.cid,
            "dataset": args.dataset,
            "device_id": device_id(folder / f"client_{args.cid}.id"),
            "process": secrets.token_hex(8),
            "wire": WIRE,
            **machine,
        },
        about={"dataset": args.dataset, "args": plain_args(args), **describe_in_checkpoint(info)},
        secret=secret,
        load=load,
    )
    say(f"client {args.cid} of {args.dataset}: {sizes(loaders)} images on {device}")
    free = f", {machine['free_mb']} MB free" if "free_mb" in machine else ""
    say("on {board}: {threads} threads, torch {torch}, flwr {flwr}, Python {python}".format(**machine) + free)
    on_signal(lambda signum: os._exit(128 + signum))  # nothing has to be brought to an end
    return stay_connected(client, args.server_address, args.server_port, args.root_certificate, args.max_wait_time)


# ---------------------------------------------------------------------------------------------------------------------
# The same client as a Flower App, for Flower's engines: the simulation and the deployment.

SHARDS = {}  # what this process has read, by folder and cid


def client_fn(context):
    """The client for one message to a SuperNode, which knows its cid and the suite's folder by its node config.

    In a simulation the cid is the SuperNode's number, and the folder that of the server.
    """
    simulated = "partition-id" in context.node_config
    config = {**context.node_config, **context.run_config} if simulated else context.node_config
    cid, root = config.get("partition-id" if simulated else "cid"), find_folder(config)
    if type(cid) is not int or cid < 0:
        raise UserError(f"cid is {cid!r} in the SuperNode's --node-config, not the number of a shard")
    dataset, device = context.run_config["dataset"], choose_device("auto")
    folder, ckps = root / "datasets" / dataset, root / "ckps" / dataset

    def load(image_size):
        SHARDS[folder, cid] = load_shard(folder, cid, device, image_size)
        return SHARDS[folder, cid]

    with contextlib.suppress(OSError):  # a full card: training does without
        ckps.mkdir(parents=True, exist_ok=True)
    loaders, info = SHARDS.get((folder, cid), (None, None))
    about = {"dataset": dataset, "args": dict(config), **(describe_in_checkpoint(info) if info else {})}
    device_id_ = f"simulated {cid}" if simulated else device_id(ckps / f"client_{cid}.id")
    properties = {"cid": cid, "dataset": dataset, "device_id": device_id_, "process": device_id_}
    properties.update({"board": "simulated"} if simulated else describe_machine())
    path = ckps / f"client_{cid}.ptl"
    if simulated and not context.run_config["fedbn"]:
        path = None  # no device that could use it, and a thousand files a round
    return Client(None, loaders, device, path, properties, about, load=load).to_client()


app = ClientApp(client_fn)


if __name__ == "__main__":
    run_script(main)
