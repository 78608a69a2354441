"""Train on one shard, on one device, for the server.

    python client.py --server_address 192.168.1.10 --dataset CIFAR10 --cid 3

Reads the shard that partition.py wrote, waits for the server and trains in each of its rounds. Sends back parameters
and metrics, never an image. Reconnects by itself; ends with exit code 0 when the server says that training is over.
"""

import contextlib
import functools
import hashlib
import hmac
import os
import random
import secrets
import signal
import socket
import ssl
import stat
import threading
import time
import traceback
from pathlib import Path

from libs import CKPS, DATASETS, UserError, claim, new_parser, number, quiet_flower, run_script, say, torch

import grpc
from flwr.client import NumPyClient, start_client

from data import load_shard
from engines import client_fit_fn, run_epoch
from nets import Net, fingerprint, get_arrays, set_arrays

SILENCE = 60  # seconds without a word from the server, which sends one every 20, until it is taken for lost
MAX_DELAY = 25  # seconds between two tries to reach the server; a try takes up to PROBE_TIMEOUT more
PROBE_TIMEOUT = 5  # seconds


def parse_args():
    parser = new_parser(__doc__)
    parser.add_argument("--server_address", default="127.0.0.1", help="name or IP address of the server")
    parser.add_argument("--server_port", type=number(int, 1, 65535), default=8080, help="its port")
    parser.add_argument("--cid", type=number(int, 0), required=True, help="which shard: clients/client_<cid>.csv")
    parser.add_argument("--device", default="auto", help="where to train: cpu, cuda, …; auto takes CUDA if it can")
    parser.add_argument("--num_threads", type=number(int, 1), help="CPU threads to train with (default: all)")
    parser.add_argument(
        "--max_wait_time", type=number(float, 0), default=600, help="seconds without a server until giving up; 0: never"
    )
    parser.add_argument("--secret_file", type=Path, help="file with the secret that the server knows too")
    parser.add_argument("--root_certificate", type=Path, help="the server's ca.pem; makes the connection TLS")
    parser.add_argument("--verbose", action="store_true", help="show the log of Flower too")
    return parser.parse_args()


def plain_args(args):
    """The arguments of a script as a checkpoint can hold them: a dictionary of plain types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def read_secret(path):
    """The secret in the file `path` (bytes, without surrounding white space), or None where `path` is None."""
    if path is None:
        return None
    try:
        if path.stat().st_mode & 0o077:
            raise UserError(f"secret file {path} can be read by others: chmod 600 {path}")
        secret = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"secret file {path} cannot be read: {error.strerror}") from None
    if not secret:
        raise UserError(f"secret file {path} is empty")
    return secret


def prove(secret, nonce, cid):
    """The answer to the server's challenge: HMAC-SHA-256 over nonce and cid, as hex digits."""
    return hmac.new(secret, f"{nonce} {cid}".encode(), hashlib.sha256).hexdigest()


def answers(method):
    """Marks the methods that answer the server, to note when it was heard last; while they work nothing is expected."""

    @functools.wraps(method)
    def answer(self, *args, **kwargs):
        self.heard, self.listening = True, False
        for signum, handler in self.handlers.items():  # an older Flower has put its own there
            signal.signal(signum, handler)
        try:
            return method(self, *args, **kwargs)
        finally:
            self.last_heard, self.listening = time.monotonic(), True

    return answer


class Client(NumPyClient):
    """Flower's client for one shard: trains and evaluates `model` on loaders["fit"] and loaders["eval"].

    `properties` is what the server asks for at the start (server.Registry), `about` what describes the checkpoints that
    go to `save_ckp_path` (nets.save_checkpoint); `secret` is bytes or None.
    """

    def __init__(self, model, loaders, device="cpu", save_ckp_path=None, properties=None, about=None, secret=None):
        self.model, self.loaders, self.device = model.to(device), loaders, device
        self.save_ckp_path, self.about, self.secret = save_ckp_path, about or {}, secret
        self.properties = {
            "net": type(model).__name__,
            "fingerprint": fingerprint(model),
            "num_fit": len(loaders["fit"].dataset),
            "num_eval": len(loaders["eval"].dataset),
            **(properties or {}),
        }
        self.handlers = {}  # the signal handlers to keep
        self.notice = {}  # what the server said before it sends us away
        self.heard = False  # whether the server has asked anything yet on this connection
        self.listening, self.last_heard = False, 0.0  # whether it is the server's turn, and since when

    @answers
    def get_properties(self, config):
        """Who this is. Also takes the server's notices: "turned_away" or "stopped", each with its reason."""
        self.notice = {name: config[name] for name in ("turned_away", "stopped") if name in config}
        if "nonce" in config:
            say("connected to the server")
        if "nonce" in config and self.secret is not None:
            return {**self.properties, "proof": prove(self.secret, config["nonce"], self.properties["cid"])}
        return self.properties

    def get_parameters(self, config):
        """The parameters and buffers of the local model, a list of arrays in the order of its state dict."""
        return get_arrays(self.model)

    def set_parameters(self, parameters):
        """Put such a list into the local model. Raises ValueError where number or shapes differ."""
        set_arrays(self.model, parameters)

    @answers
    def fit(self, parameters, config):
        """Train from `parameters` for config["num_epochs"] with config["lr"].

        Returns (parameters, number of fit images, metrics of engines.client_fit_fn), or ([], 0, {"error": reason}).
        """
        try:
            started = time.monotonic()
            self.set_parameters(parameters)
            metrics = client_fit_fn(
                self.loaders,
                self.model,
                config.get("num_epochs", 1),
                self.device,
                self.save_ckp_path,
                lr=config.get("lr", 1e-3),
                about={**self.about, "round": config.get("round")},
            )
            figures = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            title = f"round {config.get('round', '?')}/{config.get('num_rounds', '?')}"
            say(f"{title}  {figures}  {time.monotonic() - started:.1f} s")
            return self.get_parameters({}), len(self.loaders["fit"].dataset), metrics
        except Exception as error:
            traceback.print_exc()
            return [], 0, {"error": f"{type(error).__name__}: {error}"}

    @answers
    def evaluate(self, parameters, config):
        """Measure the global model `parameters` on the eval images.

        Returns (loss, number of eval images, {"global_eval_loss", "global_eval_accuracy"}), or (0.0, 0, {"error"}).
        """
        try:
            self.set_parameters(parameters)
            loss, accuracy = run_epoch(self.loaders["eval"], self.model, self.device)
            metrics = {"global_eval_loss": loss, "global_eval_accuracy": accuracy}
            return loss, len(self.loaders["eval"].dataset), metrics
        except Exception as error:
            traceback.print_exc()
            return 0.0, 0, {"error": f"{type(error).__name__}: {error}"}


# ---------------------------------------------------------------------------------------------------------------------
# Finding the server, and finding it again.


def probe(host, port, root_certificate):
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


def hang_up(port):
    """Shut down this process's TCP connections to `port`.

    gRPC, asked to close a channel, would wait until what it still has to send is gone: on a dead link a quarter of an
    hour at worst.
    """
    for fd in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                with socket.socket(fileno=os.dup(fd)) as sock:
                    if sock.getpeername()[1:2] == (port,):
                        sock.shutdown(socket.SHUT_RDWR)


def watch_silence(client, port):
    """Hang up, for ever watching, whenever the server has been silent for SILENCE seconds though it is its turn.

    A cut that no packet tells of looks like silence.
    """
    while True:
        time.sleep(1)
        if client.listening and time.monotonic() - client.last_heard >= SILENCE:
            hang_up(port)


def stay_connected(client, host, port, root_certificate, max_wait_time):
    """Serve the server until it says that training is over, through every loss of it. Returns the exit code."""
    client.handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    threading.Thread(target=watch_silence, args=(client, port), daemon=True).start()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    os.environ["no_grpc_proxy"] = host  # straight to the server, as the probe goes, whatever proxy is set for the web
    certificate = root_certificate.read_bytes() if root_certificate is not None else None
    last_seen, tries, said = time.monotonic(), 0, None
    while True:
        problem = probe(host, port, root_certificate)
        if problem is None:
            client.heard, client.notice = False, {}
            client.last_heard, client.listening = time.monotonic(), True
            try:
                start_client(
                    server_address=address,
                    client=client.to_client(),
                    root_certificates=certificate,
                    insecure=certificate is None,
                )
                problem = client.notice.get("stopped")
            except (grpc.RpcError, StopIteration) as error:  # the latter: it closed the connection in good order
                problem = f"lost the server at {address}"
                if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    problem = "the server did not wait for us any longer"
                elif time.monotonic() - client.last_heard >= SILENCE:
                    problem = f"nothing heard from the server for {SILENCE} s"
                problem = client.notice.get("stopped", problem)
            client.listening = False
            if "turned_away" in client.notice:
                raise UserError(f"the server turned this client away: {client.notice['turned_away']}")
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


def choose_device(name):
    """The torch device for `--device`. Raises UserError where there is none of that name here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0][:200]}") from None
    return device


def claim_cid(cid, folder):
    """Be the one process for `cid` on this device: (the open file that holds the claim, the device's random id).

    The id lasts: by it the server knows the device again, after a cut or a reboot.
    """
    try:
        file = claim(folder / f"client_{cid}.id")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if file is None:
        raise UserError(f"a client with --cid {cid} is running on this device already")
    file.seek(0)
    device_id = file.read().strip()
    if len(device_id) != 32:
        device_id = secrets.token_hex(16)
        file.truncate(0)
        file.write(device_id)
        file.flush()
        os.fsync(file.fileno())
    return file, device_id


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
    held, device_id = claim_cid(args.cid, CKPS / args.dataset)
    with held:
        loaders, info = load_shard(DATASETS / args.dataset, args.cid, device)
        client = Client(
            Net(info["channels"], len(info["classes"])),
            loaders,
            device,
            CKPS / args.dataset / f"client_{args.cid}.ptl",
            properties={"cid": args.cid, "dataset": args.dataset, "device_id": device_id},
            about={
                "dataset": args.dataset,
                "dataset_id": info["id"],
                "classes": info["classes"],
                "images": info["images"],
                "args": plain_args(args),
            },
            secret=secret,
        )
        sizes = " + ".join(f"{len(loaders[phase].dataset)} {phase}" for phase in loaders)
        say(f"client {args.cid} of {args.dataset}: {sizes} images on {device}")
        return stay_connected(client, args.server_address, args.server_port, args.root_certificate, args.max_wait_time)


if __name__ == "__main__":
    run_script(main)
