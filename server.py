"""Train one model over the data of many devices, by federated averaging.

    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100
    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100 --resume

Waits for the clients, has all of them train at the same time in every round, averages what they send and tests the
result. Leaves server.ptl, best.ptl, history.csv and metrics.png in ckps/<dataset>/, and the curves in Weights & Biases.
"""

import errno
import functools
import hmac
import ipaddress
import os
import queue
import re
import secrets
import signal
import socket
import ssl
import sys
import threading
import time
import traceback
from pathlib import Path

from libs import CKPS, DATASETS, UserError, claim, new_parser, number, printable, quiet_flower, run_script, say

import flwr.server
from flwr.common import Code, GetPropertiesIns, ReconnectIns
from flwr.server import ServerConfig, SimpleClientManager, start_server
from flwr.server.client_proxy import ClientProxy

from client import plain_args, prove, read_secret
from data import BatchLoader, ImageDataset, describe_dataset, read_table
from nets import Net, fingerprint
from record import Progress, Record, complete, find_run, resume, start_wandb
from strategies import STRATEGIES, FedAvg

HEARTBEAT = 20  # seconds between two words to a client that has nothing to do
HANDSHAKE_TIMEOUT = 10  # seconds
SETTLE = 10  # seconds without a new client until a round starts with fewer than all
POLL = 0.5  # seconds until a signal or a failed worker is noticed while waiting
MAX_RETRY_DELAY = 30  # seconds until a round in which nobody trained is run again
HOPELESS = 5  # times in a row that a round may fail on all clients for the same reason
LOST = "connection lost"  # the one reason of DeviceFailure that says nothing of the run


def parse_args():
    parser = new_parser(__doc__)
    positive = number(float, 0, inside=True)
    parser.add_argument("--server_address", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks")
    parser.add_argument("--server_port", type=number(int, 1, 65535), default=8080, help="port to listen on")
    parser.add_argument("--num_clients", type=number(int, 1), default=10, help="number of clients, with cids from 0")
    parser.add_argument("--num_rounds", type=number(int, 1), default=100, help="number of the last round")
    parser.add_argument("--num_epochs", type=number(int, 1), default=1, help="epochs that a client trains in a round")
    parser.add_argument("--lr", type=positive, default=1e-3, help="learning rate of Adam")
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default=FedAvg.__name__,
        help="how n results become one model: FedAvg takes their mean, weighted by images; the others withstand liars: "
        "FedMedian takes the median, FedTrimmedAvg the mean without n/5 values at each end (from n = 3 on at least 1), "
        "Krum the mean without the (n-3)/2 models (at least 1) that are farthest from the others",
    )
    parser.add_argument("--min_clients", type=number(int, 1), help="start rounds with this many (default: num_clients)")
    parser.add_argument("--round_timeout", type=positive, help="seconds until stragglers are left out (default: off)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="go on from server.ptl in FOLDER, or in ckps/<dataset> if none is named (default: off)",
    )
    parser.add_argument(
        "--allow_new_data", action="store_true", help="resume though the classes, the shards or the test set are others"
    )
    parser.add_argument("--secret_file", type=Path, help="file with a secret that clients must know too")
    parser.add_argument(
        "--certificates", type=Path, metavar="DIR", help="use TLS, with its ca.pem, server.pem, server.key"
    )
    parser.add_argument("--verbose", action="store_true", help="show the log of Flower too")
    args = parser.parse_args()
    args.min_clients = args.min_clients or args.num_clients
    if args.min_clients > args.num_clients:
        raise UserError(f"--min_clients {args.min_clients} is more than --num_clients {args.num_clients}")
    least = STRATEGIES[args.strategy].least
    if args.min_clients < least:
        raise UserError(
            f"--strategy {args.strategy} needs rounds of {least} clients or more; "
            f"--num_clients {args.num_clients} --min_clients {args.min_clients} allow smaller ones"
        )
    return args


class Stopped(Exception):
    """A signal asked the server to stop."""


class Hopeless(Exception):
    """A round fails again and again, for reasons that do not pass by themselves."""


class DeviceFailure(Exception):
    """A client gave no answer; `cid` says which, the text why."""

    def __init__(self, cid, reason):
        super().__init__(reason)
        self.cid = cid


class Device(ClientProxy):
    """A client that passed the handshake: Flower's proxy under its own cid, for one question at a time."""

    def __init__(self, proxy, properties):
        super().__init__(str(properties["cid"]))
        self.proxy, self.device_id = proxy, properties["device_id"]
        self.lock = threading.Lock()
        self.gone = threading.Event()

    def _ask(self, method, ins, timeout, group_id):
        started = time.monotonic()
        if not self.lock.acquire(timeout=timeout or -1):
            raise DeviceFailure(self.cid, f"no answer within {timeout:g} s")
        try:
            return getattr(self.proxy, method)(ins, timeout, group_id)
        except Exception:
            late = timeout is not None and time.monotonic() - started >= timeout
            raise DeviceFailure(self.cid, f"no answer within {timeout:g} s" if late else "connection lost") from None
        finally:
            self.lock.release()

    get_properties = functools.partialmethod(_ask, "get_properties")
    get_parameters = functools.partialmethod(_ask, "get_parameters")
    fit = functools.partialmethod(_ask, "fit")
    evaluate = functools.partialmethod(_ask, "evaluate")
    reconnect = functools.partialmethod(_ask, "reconnect")

    def beat(self):
        """Say a word to the client, unless it is busy, so that both sides notice when the other is gone."""
        if self.lock.acquire(blocking=False):
            try:
                self.proxy.get_properties(GetPropertiesIns({}), HEARTBEAT, 0)
            except Exception:
                self.close()
            finally:
                self.lock.release()

    def close(self):
        """Fail the question under way, and end the connection."""
        self.gone.set()
        self.proxy.bridge.close()


class Registry(SimpleClientManager):
    """The clients that take part, by cid. Flower registers each connection here; a handshake decides on it.

    `expected` is what the clients must have like the server: dataset, net, fingerprint. With a `secret` (bytes) they
    must also prove that they know it, before they get anything else.
    """

    def __init__(self, num_clients, expected, secret=None):
        super().__init__()
        self.num_clients, self.expected, self.secret = num_clients, expected, secret
        self.connections = set()  # Flower's ids of the open ones, admitted or not
        self.seen, self.last_joined = set(), time.monotonic()  # cids that ever joined, and when the newest of them did
        self.closed, self.notice = False, {}  # no more clients, and what they are told

    def register(self, client):
        if self.closed:
            raise ConnectionAbortedError("the server is about to stop")
        self.connections.add(client.cid)
        threading.Thread(target=self._greet, args=(client,), daemon=True).start()
        return True  # so that Flower carries our questions to it

    def unregister(self, client):
        with self._cv:
            self.connections.discard(client.cid)
            for device in [device for device in self.clients.values() if device.proxy is client]:
                self.drop(device)

    def drop(self, device):
        """Let a client go, whose connection is gone or as good as gone."""
        with self._cv:
            if self.clients.get(device.cid) is device:
                del self.clients[device.cid]
                if not self.closed:
                    say(f"cid {device.cid} left")
            device.close()
            self._cv.notify_all()

    def _greet(self, proxy):
        """Admit a connection or turn it away; then keep the silence on it short, for as long as it lasts."""
        nonce = secrets.token_hex(16)
        try:
            res = proxy.get_properties(GetPropertiesIns({"nonce": nonce}), HANDSHAKE_TIMEOUT, 0)
        except Exception:
            proxy.bridge.close()
            return
        properties = res.properties if res.status.code == Code.OK else {}
        reason = self._why_not(properties, nonce)
        if reason is None:
            device = Device(proxy, properties)
            reason = self._admit(device)
        if reason is not None and self.closed:
            self._send_away(proxy, self.notice)
            return
        if reason is not None:
            say(f"turned away cid {printable(properties.get('cid', 'unknown'), 20)}: {reason}")
            self._send_away(proxy, {"turned_away": reason})
            return
        while not device.gone.wait(HEARTBEAT):
            device.beat()

    def _why_not(self, properties, nonce):
        """The reason not to admit a client with these properties, if there is one."""
        cid = properties.get("cid")
        if self.secret is not None:
            proof = properties.get("proof")
            if proof is None:
                return "the server asks for a secret: start the client with --secret_file"
            if not hmac.compare_digest(str(proof).encode(), prove(self.secret, nonce, cid).encode()):
                return "its secret is not the server's"
        if type(cid) is not int or not isinstance(properties.get("device_id"), str):
            return "it is not this suite's client.py"
        if not 0 <= cid < self.num_clients:
            return f"cid {cid} is not in 0..{self.num_clients - 1} (server's --num_clients {self.num_clients})"
        for name, value in self.expected.items():
            if properties.get(name) != value:
                return f"its {name} is {printable(properties.get(name), 40)}, the server's is {value}"
        for name in ("num_fit", "num_eval"):
            if type(properties.get(name)) is not int or properties[name] < 1:
                return f"its {name} is {printable(properties.get(name), 40)}, not a positive number of images"
        return None

    def _admit(self, device):
        """Take a device in; the reason why not, if there is one."""
        with self._cv:
            if device.proxy.cid not in self.connections or self.closed:
                return "its connection is lost"
            before = self.clients.get(device.cid)
            if before is not None and before.device_id != device.device_id:
                return f"cid {device.cid} is in use by another device"
            if before is not None:
                before.close()
            self.clients[device.cid] = device
            if device.cid not in self.seen:  # for one that comes back no round is held up
                self.seen.add(device.cid)
                self.last_joined = time.monotonic()
            self._cv.notify_all()
        say(f"cid {device.cid} {'is back' if before else 'joined'} ({len(self.clients)} of {self.num_clients} clients)")
        return None

    def _send_away(self, proxy, notice):
        """Give a connection the notice, if it is not empty, and end it; where it says "stopped", to come back later."""
        try:
            if notice:
                proxy.get_properties(GetPropertiesIns(notice), HANDSHAKE_TIMEOUT, 0)
            if "stopped" not in notice:
                proxy.reconnect(ReconnectIns(seconds=None), HANDSHAKE_TIMEOUT, 0)
        except Exception:
            pass  # it is gone already, which is as good
        proxy.bridge.close()

    def sample(self, num_clients, min_num_clients=None, criterion=None):
        """All clients that are there, at most `num_clients`; never waits (`wait_for_round` does)."""
        with self._cv:
            return sorted(self.clients.values(), key=lambda device: int(device.cid))[:num_clients]

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
            devices = list(self.clients.values())

        def end(device):
            if device.lock.acquire(timeout=1 if notice else HEARTBEAT):  # at the end nobody trains any more
                self._send_away(device.proxy, notice)
            device.close()

        threads = [threading.Thread(target=end, args=(device,), daemon=True) for device in devices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class Server(flwr.server.Server):
    """Flower's server with a loop that waits for the right clients, can be stopped, and goes on from any round.

    A round is counted only if somebody trained in it.
    """

    def __init__(self, registry, strategy, min_clients=1, first_round=1):
        super().__init__(client_manager=registry, strategy=strategy)
        self.registry, self.min_clients, self.first_round = registry, min_clients, first_round
        self.trained = False  # whether any round has succeeded
        self.signum, self.stopped = None, None  # what asked the server to stop, and when

    def stop(self, signum, frame):
        """The handler of SIGINT and SIGTERM. Ctrl-C a second time, a second later or more, ends the process at once."""
        if self.signum is None:
            self.signum, self.stopped = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.stopped > 1:
            os._exit(128 + signum)

    def check(self):
        """Raise what should end the training early: a signal, or a failure to keep the record."""
        if self.signum is not None:
            raise Stopped
        self.strategy.check()

    def fit(self, num_rounds, timeout):
        """Run the rounds up to `num_rounds`, with `timeout` seconds (or None) for each question to the clients."""
        signal.signal(signal.SIGINT, self.stop)  # Flower's start_server has just put its own there
        signal.signal(signal.SIGTERM, self.stop)
        started, delay, current = time.monotonic(), 1, self.first_round
        failed = []  # for which lasting reasons the current round failed, a set a try
        self.parameters = self.strategy.initialize_parameters(self.registry)
        while current <= num_rounds:
            self.registry.wait_for_round(self.min_clients, self.check)
            instructions = self.strategy.configure_fit(current, self.parameters, self.registry)
            results, failures = self.ask("fit", instructions, timeout, current)
            parameters, _ = self.strategy.aggregate_fit(current, results, failures)
            if parameters is None:
                failed.append(self.lasting_reasons(len(instructions)))
                if len(failed) >= HOPELESS and set.intersection(*failed[-HOPELESS:]):
                    raise Hopeless(self.describe_failure(current))
                say(f"round {current}: nobody trained; it is run again in {delay} s")
                self.pause(delay)
                delay = min(2 * delay, MAX_RETRY_DELAY)
                continue
            self.parameters, self.trained, delay, failed = parameters, True, 1, []
            instructions = self.strategy.configure_evaluate(current, self.parameters, self.registry)
            results, failures = self.ask("evaluate", instructions, timeout, current)
            self.strategy.aggregate_evaluate(current, results, failures)
            current += 1
        return flwr.server.History(), time.monotonic() - started

    def lasting_reasons(self, num_asked):
        """Why the last try failed on all that were asked, without the numbers in it; empty where that may pass.

        A lost connection passes: Wi-Fi heals, devices come back, and the run is to survive the night. So does a
        timeout that has been met before: it is long enough, and the devices are cut off or busy for a while.
        """
        reasons = set(self.strategy.reasons.values())
        may_pass = LOST in reasons or (self.trained and any("no answer within" in reason for reason in reasons))
        if may_pass or len(self.strategy.reasons) < num_asked:
            return set()
        return {re.sub(r"nan|inf|[\d.]+(e[+-]?\d+)?", "#", reason) for reason in reasons}

    def describe_failure(self, current):
        reasons = sorted(set(self.strategy.reasons.values()))
        shown = "; ".join(reasons[:3]) + "; …" * (len(reasons) > 3)
        saved = f"rounds 1 to {current - 1} are saved" if current > 1 else "no round was finished, nothing is saved"
        return f"round {current} failed on all clients {HOPELESS} times in a row: {shown} ({saved})"

    def ask(self, method, instructions, timeout, current):
        """Ask all clients at the same time: ([(client, its answer), …], [DeviceFailure or (client, answer), …])."""
        answers, waiting = queue.SimpleQueue(), {client for client, _ in instructions}
        late = time.monotonic() + timeout + 1 if timeout else float("inf")

        def ask_one(client, ins):
            try:
                answers.put((client, (client, getattr(client, method)(ins, timeout, current))))
            except Exception as error:
                answers.put((client, error))

        for client, ins in instructions:
            threading.Thread(target=ask_one, args=(client, ins), daemon=True).start()
        results, failures = [], []
        while waiting:
            self.check()
            if time.monotonic() > late:  # Flower's own limit starts when all is sent, which to a dead link it never is
                late = float("inf")
                for client in waiting:
                    self.registry.drop(client)
            try:
                client, answer = answers.get(timeout=POLL)
            except queue.Empty:
                continue
            waiting.remove(client)
            good = isinstance(answer, tuple) and answer[1].status.code == Code.OK
            (results if good else failures).append(answer)
        return results, failures

    def pause(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check()
            time.sleep(min(POLL, max(0, until - time.monotonic())))

    def disconnect_all_clients(self, timeout):
        """Tell all clients that training is over."""
        self.registry.close({})


# ---------------------------------------------------------------------------------------------------------------------
# What must be there before the first round.


def check_address(host, port):
    """The address to give to Flower, "IP:port" or "[IP]:port". Raises UserError unless the server can listen there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        return f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"
    except (OSError, UnicodeError) as error:
        in_use = getattr(error, "errno", None) == errno.EADDRINUSE
        reason = "the port is in use; choose another with --server_port" if in_use else error
        raise UserError(f"cannot listen on {host}:{port}: {reason}") from None


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_certificates(folder):
    """The three certificates that Flower takes (bytes: CA, server, key), or None where `folder` is None."""
    if folder is None:
        return None
    paths = [folder / name for name in ("ca.pem", "server.pem", "server.key")]
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(paths[1], paths[2])
        ssl.create_default_context(cafile=paths[0])
        return tuple(path.read_bytes() for path in paths)
    except (OSError, ssl.SSLError) as error:
        raise UserError(
            f"no usable ca.pem, server.pem and server.key in {folder} ({error.strerror or error}): "
            "make them with deploy/make_certificates.sh"
        ) from None


def load_test(folder):
    """The test set of the dataset in `folder`, in batches, and what is known of the dataset (data.describe_dataset)."""
    info = describe_dataset(folder.name, folder)
    test = ImageDataset(read_table(folder / "test.csv", len(info["classes"])), folder / "test")
    if test.images.shape[1] != info["channels"]:
        raise UserError(f"images of {folder / 'test'} have {test.images.shape[1]} channels, not {info['channels']}")
    return BatchLoader(test, 250), info


def hold_folder(folder, dataset):
    """Be the one server that writes to `folder`, as long as the file that this returns is open."""
    try:
        held = claim(folder / "server.lock")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if held is None:
        raise UserError(f"another server is training {dataset} in {folder}")
    return held


def main():
    args = parse_args()
    if not args.verbose:
        quiet_flower()

    # What the user gave: all of it is checked before anything is touched.
    secret = read_secret(args.secret_file)
    certificates = read_certificates(args.certificates)
    address = check_address(args.server_address, args.server_port)
    test, info = load_test(DATASETS / args.dataset)
    model = Net(info["channels"], len(info["classes"]))
    settings = plain_args(args)
    about = {"dataset": args.dataset, "classes": info["classes"], "dataset_id": info.get("id"), "args": settings}
    about["images"] = info.get("images")
    folder = CKPS / args.dataset
    held = hold_folder(folder, args.dataset)  # noqa: F841 (as long as this process lives)
    source = find_run(folder, args.resume)
    rows, run_id = resume(source, model, about, args.allow_new_data) if source else ([], None)
    last_round = len(rows)
    if secret is None and not is_loopback(args.server_address):
        say(f"warning: whoever reaches {address} can take part in the training; --secret_file prevents that")

    if last_round >= args.num_rounds:
        checkpoint = source / "server.ptl"
        say(f"{checkpoint} has finished round {last_round} already; --num_rounds {args.num_rounds} adds none")
        complete(source, rows, run_id, about)
        return 0

    # The parts, from the last to the first.
    curves, where = start_wandb(args.dataset, run_id, settings, rows)
    say(where)
    curves.catch_up(rows)
    progress = Progress(args.num_rounds, last_round)
    record = Record(
        model,
        folder / "server.ptl",
        last_round=last_round,
        source=source,
        test_loaders={"test": test},
        about={**about, "wandb_run_id": curves.run.id},
        on_row=progress.show_row,
        log=curves.log,
    )
    hyper_parameters = {"num_rounds": args.num_rounds, "num_epochs": args.num_epochs, "lr": args.lr}
    strategy = STRATEGIES[args.strategy](
        model,
        record=record,
        on_drop=progress.show_drop,
        on_fit_config_fn=lambda current: {"round": current, **hyper_parameters},
        min_fit_clients=1,
        min_evaluate_clients=1,
        min_available_clients=1,
    )
    expected = {"dataset": args.dataset, "net": type(model).__name__, "fingerprint": fingerprint(model)}
    registry = Registry(args.num_clients, expected, secret)
    server = Server(registry, strategy, args.min_clients, last_round + 1)

    say(f"round {last_round + 1} to {args.num_rounds} with {args.num_clients} clients, on {address}")
    config = ServerConfig(num_rounds=args.num_rounds, round_timeout=args.round_timeout)
    code = run_rounds(server, server_address=address, config=config, certificates=certificates)
    code = end_rounds(server, code)
    progress.close()
    curves.finish()
    record.show_files()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gRPC's threads, which wait for clients that are cut off or frozen, would keep the process alive


def run_rounds(server, **kwargs):
    """Run the rounds, up to the last or to whatever ends them before it. Returns the exit code."""
    try:
        start_server(server=server, **kwargs)
    except Stopped:
        say(f"stopping ({signal.Signals(server.signum).name}; Ctrl-C now leaves at once)")
    except SystemExit as end:  # Flower's own way out: a port taken in the meantime, a signal before the first round
        if isinstance(end.code, str):
            say(f"server.py: {end.code}", sys.stderr)
            return 1
        return end.code or 128 + signal.SIGTERM
    except BaseException as error:
        return fail(error)
    return 0


def end_rounds(server, code):
    """Tell the clients, and save what is finished. Returns the exit code; `code` is that of the rounds."""
    server.registry.close({"stopped": "the server stopped before the last round"})
    try:
        server.strategy.close()
    except BaseException as error:
        code = code or fail(error)
    return 128 + server.signum if server.signum is not None else code


def fail(error):
    """Say why the server ends: in a line where the run or a disk is at fault, else with the traceback. Returns 1."""
    if isinstance(error, Hopeless):
        say(f"server.py: {error}", sys.stderr)
    elif isinstance(error, OSError):
        say(f"server.py: cannot go on: {error}", sys.stderr)
    else:
        traceback.print_exception(error)
        say(f"server.py: cannot go on: {type(error).__name__}: {error}", sys.stderr)
    return 1


if __name__ == "__main__":
    run_script(main)
