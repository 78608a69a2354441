"""Train one model over the data of many devices, by federated averaging.

    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100
    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100 --resume

Waits for the clients, has all of them train at the same time in every round, averages what they send and tests the
result. Leaves server.ptl, best.ptl, history.csv, clients.csv and metrics.png in ckps/<dataset>/, and the curves in
Weights & Biases.
"""

import collections
import errno
import inspect
import ipaddress
import os
import queue
import re
import signal
import socket
import ssl
import statistics
import sys
import threading
import time
import traceback
from pathlib import Path

from libs import (
    CKPS,
    DATASETS,
    UserError,
    join_address,
    lock_file,
    mute_handlers,
    new_parser,
    number,
    on_signal,
    plain_args,
    printable,
    quiet_flower,
    read_secret,
    run_script,
    say,
    split_address,
    torch,
)

import flwr.server
from flwr.common import Code
from flwr.server import ServerConfig, start_server

from data import describe_in_checkpoint, load_test
from engines import client_fit_fn
from nets import build_net, find_net, fingerprint, learned, trial
from record import Progress, Record, complete, find_run, resume, start_wandb
from registry import LOST, POLL, ClientFailure, Registry
from strategies import STRATEGIES, FedAvg
from wire import COMPRESS, Sender

LEAST_TIMEOUT = 30  # seconds that --round_timeout auto leaves a client at least
LAST_ANSWERS = 9  # of a client, by which --round_timeout auto knows what is usual for it
MAX_RETRY_DELAY = 30  # seconds until a round in which nobody trained is run again
MACHINE = ("board", "torch", "flwr", "python", "threads", "free_mb", "num_fit", "num_eval")  # for wandb's config
HOPELESS = 5  # times in a row that a round may fail on all clients for the same reason


def parse_args():
    parser = new_parser(__doc__)
    positive = number(float, 0, inside=True)
    parser.add_argument("--server_address", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks")
    parser.add_argument("--server_port", type=number(int, 1, 65535), help="port to listen on (default: 8080)")
    parser.add_argument(
        "--num_clients", type=number(int, 1), help="number of clients, with cids from 0 (default: as many as shards)"
    )
    parser.add_argument("--num_rounds", type=number(int, 1), default=100, help="number of the last round")
    parser.add_argument("--num_epochs", type=number(int, 1), default=1, help="epochs that a client trains in a round")
    parser.add_argument("--lr", type=positive, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), help="make the run one that can be repeated")
    parser.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default=FedAvg.__name__,
        help="how n results become one model: FedAvg takes their mean, weighted by images; the others withstand liars: "
        "FedMedian takes the median, FedTrimmedAvg the mean without n/5 values at each end (from n = 3 on at least 1), "
        "Krum the mean without the (n-3)/2 models (at least 1) that are farthest from the others",
    )
    parser.add_argument(
        "--compress",
        choices=COMPRESS,
        default=COMPRESS[0],
        help="send parameters in half of the bytes (fp16) or a quarter (int8: as differences), for a slow network",
    )
    parser.add_argument("--min_clients", type=number(int, 1), help="start rounds with this many (default: num_clients)")
    parser.add_argument(
        "--round_timeout",
        type=lambda text: text if text == "auto" else positive(text),
        help="seconds until stragglers are left out; auto: three times a client's own usual, 30 or more (default: off)",
    )
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
    parser.add_argument("--net", default="LeNet5", help="net to train, one of nets.py's: the devices build it too")
    args = parser.parse_args()
    args.server_address, args.server_port = split_address(args.server_address, args.server_port)
    return args


def count_clients(args, shards):
    """Settle num_clients and min_clients in `args`; `shards` is how many partition.py has cut, None if unknown."""
    args.num_clients = args.num_clients or shards or 10
    args.min_clients = args.min_clients or args.num_clients
    if args.min_clients > args.num_clients:
        raise UserError(f"--min_clients {args.min_clients} is more than --num_clients {args.num_clients}")
    least = STRATEGIES[args.strategy].least
    if args.min_clients < least:
        raise UserError(
            f"--strategy {args.strategy} needs rounds of {least} clients or more; "
            f"--num_clients {args.num_clients} --min_clients {args.min_clients} allow smaller ones"
        )


class Stopped(Exception):
    """A signal asked the server to stop."""


class Hopeless(Exception):
    """A round fails again and again, for reasons that do not pass by themselves."""


def describe_failure(current, reasons):
    """Why the run ends with the round `current`, which fails for `reasons`, in one line."""
    shown = "; ".join(reasons[:3]) + "; …" * (len(reasons) > 3)
    saved = f"rounds 1 to {current - 1} are saved" if current > 1 else "no round was finished, nothing is saved"
    return f"round {current} failed on all clients {HOPELESS} times in a row: {shown} ({saved})"


class Server(flwr.server.Server):
    """Flower's server with a loop that waits for the right clients, can be stopped, and goes on from any round.

    A round is counted only if somebody trained in it.
    """

    def __init__(self, registry, strategy, min_clients=1, first_round=1, auto_timeout=False):
        super().__init__(client_manager=registry, strategy=strategy)
        self.registry, self.min_clients, self.first_round = registry, min_clients, first_round
        self.auto_timeout = auto_timeout
        self.seconds = collections.defaultdict(list)  # that a client's answers took, by (method, cid)
        self.trained = False  # whether any round has succeeded
        self.signum, self.stopped = None, None  # what asked the server to stop, and when

    def stop(self, signum):
        """Note a signal (libs.on_signal). Ctrl-C a second time, a second later or more, ends the process at once."""
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
        mute_handlers()  # Flower's start_server has just put its own there
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
                    self.strategy.close()  # raises where what is said to be saved is not
                    raise Hopeless(describe_failure(current, sorted(set(self.strategy.reasons.values()))))
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

    def ask(self, method, instructions, timeout, current):
        """Ask all clients at the same time: ([(client, its answer), …], [ClientFailure or (client, answer), …])."""
        answers, waiting, started = queue.SimpleQueue(), {client for client, _ in instructions}, time.monotonic()
        limits = {client: self.limit(method, client.cid, timeout) for client in waiting}

        def ask_one(client, ins, limit):
            try:
                answers.put((client, (client, getattr(client, method)(ins, limit, current))))
            except Exception as error:
                answers.put((client, error))

        for client, ins in instructions:
            args, name = (client, ins, limits[client]), f"{method} {client.cid}"
            threading.Thread(target=ask_one, args=args, name=name, daemon=True).start()
        results, failures = [], []
        while waiting:
            self.check()
            for client in waiting:  # Flower's own limit starts when all is sent, which to a dead link it never is
                if limits[client] is not None and time.monotonic() > started + limits[client] + 1:
                    limits[client] = None
                    self.registry.remove(client)
            try:
                client, answer = answers.get(timeout=POLL)
            except queue.Empty:
                continue
            waiting.remove(client)
            if isinstance(answer, tuple) and answer[1].status.code == Code.OK:
                self.seconds[method, client.cid].append(time.monotonic() - started)
                results.append(answer)
            else:
                if not isinstance(answer, (tuple, ClientFailure)):  # an error of ours
                    traceback.print_exception(answer)
                failures.append(answer)
        return results, failures

    def limit(self, method, cid, timeout):
        """The seconds that a client has to answer, None for no limit: `timeout`, or by its own last answers."""
        seconds = self.seconds[method, cid][-LAST_ANSWERS:]
        if not self.auto_timeout:
            return timeout
        return max(LEAST_TIMEOUT, 3 * statistics.median(seconds)) if len(seconds) >= 3 else None

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
    """The address to listen on, "IP:port" or "[IP]:port". Raises UserError unless the server can listen there."""
    if "%" in host:  # Flower's start_server binds without the zone
        raise UserError(f"cannot listen on {host} alone: take --server_address :: (all networks)")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        return join_address(address[0], port)
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


def hold_folder(folder, dataset):
    """Be the one server that writes to `folder`, as long as the lock that this returns is kept."""
    try:
        lock = lock_file(folder / "server.lock")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if lock is None:
        raise UserError(f"another server is training {dataset} in {folder}")
    return lock


def main():
    args = parse_args()
    if not args.verbose:
        quiet_flower()

    # What the user gave: all of it is checked before anything is touched.
    secret = read_secret(args.secret_file)
    certificates = read_certificates(args.certificates)
    address = check_address(args.server_address, args.server_port)
    test, info = load_test(DATASETS / args.dataset, find_net(args.net).image_size)
    count_clients(args, info["num_clients"])
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = build_net(args.net, info["channels"], len(info["classes"]))
    if args.compress != "off" and not any(learned(model)):
        raise UserError(f"--compress {args.compress} is for float32 parameters, and {args.net} has none")
    folder = CKPS / args.dataset
    settings = plain_args(args)
    about = {"dataset": args.dataset, "args": settings, **describe_in_checkpoint(info)}
    lock = hold_folder(folder, args.dataset)  # noqa: F841 (as long as this process lives)
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
    if info["num_clients"] not in (None, args.num_clients):
        say(f"note: {args.dataset} was cut into {info['num_clients']} shards, and --num_clients is {args.num_clients}")
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
    known = inspect.signature(client_fit_fn).parameters
    hyper_parameters = {name: value for name, value in settings.items() if name in known and value is not None}
    strategy = STRATEGIES[args.strategy](
        model,
        record=record,
        on_drop=progress.show_drop,
        on_fit_config_fn=lambda current: {"round": current, "num_rounds": args.num_rounds, **hyper_parameters},
        min_fit_clients=1,
        min_evaluate_clients=1,
        min_available_clients=1,
    )
    task = {
        "dataset": args.dataset,
        "dataset_id": info["id"],
        "channels": info["channels"],
        "num_classes": len(info["classes"]),
        "net": args.net,
        "fingerprint": fingerprint(model),
        "trial": trial(build_net(args.net, info["channels"], len(info["classes"]))),
    }

    def describe_client(cid, properties):
        facts = {name: value for name, value in properties.items() if name in MACHINE}
        curves.describe_client(cid, {name: printable(value) for name, value in facts.items()})

    sender = Sender(args.compress, learned(model))
    registry = Registry(args.num_clients, task, secret, args.server_port, describe_client, sender)
    server = Server(registry, strategy, args.min_clients, last_round + 1, args.round_timeout == "auto")

    on_signal(server.stop)
    say(f"round {last_round + 1} to {args.num_rounds} with {args.num_clients} clients, on {address}")
    auto_timeout = args.round_timeout == "auto"
    config = ServerConfig(num_rounds=args.num_rounds, round_timeout=None if auto_timeout else args.round_timeout)
    code = run_rounds(server, server_address=address, config=config, certificates=certificates)
    code = end_rounds(server, code)
    progress.close()
    curves.finish()
    record.show_end()
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
