"""Train one model over the data of many devices, by federated averaging.

    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100
    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100 --resume

Waits for the clients, has all of them train at the same time in every round, averages what they send and tests the
result. Leaves server.ptl, best.ptl, history.csv, clients.csv, metrics.png, confusion.png and devices.png in
ckps/<dataset>/, and the curves in Weights & Biases.
"""

import argparse
import collections
import dataclasses
import functools
import os
import queue
import re
import secrets
import signal
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
    find_folder,
    lock_file,
    mute_handlers,
    new_parser,
    nonempty_path,
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
from plumbing.common.compare import fingerprint, seeded, trial
from plumbing.common.state import batch_norm_names, count_parameters, float32_weights
from plumbing.common.wire import COMPRESS, Sender
from plumbing.laptop.curves import Curves, complete, describe_code, describe_data, start_wandb
from plumbing.laptop.earlier import find_run, read_args, resume
from plumbing.laptop.flags import as_before, as_flags, optional
from plumbing.laptop.flower import start_grid, start_server
from plumbing.laptop.handshake import name_task
from plumbing.laptop.history import MANY
from plumbing.laptop.listening import check_address, describe_client_command, is_loopback, read_certificates
from plumbing.laptop.nodes import Nodes
from plumbing.laptop.record import Diverged, Record
from plumbing.laptop.registry import POLL, Registry
from plumbing.laptop.remote import LOST, ClientFailure
from plumbing.laptop.rounds import (
    HOPELESS,
    LAST_ANSWERS,
    LASTING,
    Absences,
    Hopeless,
    Stopped,
    describe_failure,
    describe_saved,
    describe_target,
    has_reached,
)
from plumbing.laptop.screen import Progress

import flwr.server
from flwr.common import Code, ndarrays_to_parameters
from flwr.server import ServerApp, ServerConfig

from data import describe_in_checkpoint, load_test
from engines import HYPER_PARAMETERS, count_answers, server_test_fn
from nets import build_net, find_net, load_checkpoint, normalise_input
from strategies import STRATEGIES, FedAvg

LEAST_TIMEOUT = 30  # seconds that --round_timeout auto leaves a client at least
MAX_RETRY_DELAY = 30  # seconds until a round in which nobody trained is run again
MACHINE = ("board", "torch", "flwr", "python", "threads", "free_mb", "num_fit", "num_eval")  # for wandb's config
# Flags that --resume does not take from the checkpoint: where the server is reached, which run this is, what it prints.


def make_parser(description=__doc__, shown=None):
    """The parser of the command line; its --help shows the flags named in `shown` alone, where that is given."""
    parser = new_parser(description)
    positive, seed = number(float, 0, inside=True), number(int, 0, 2**32 - 1)
    parser.add_argument("--server_address", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all networks")
    parser.add_argument("--server_port", type=number(int, 1, 65535), help="port to listen on (default: 8080)")
    parser.add_argument(
        "--num_clients", type=number(int, 1), help="number of clients, cids from 0 (default, and at most: all shards)"
    )
    parser.add_argument("--num_rounds", type=number(int, 1), default=100, help="number of the last round")
    parser.add_argument("--num_epochs", type=number(int, 1), default=1, help="epochs that a client trains in a round")
    parser.add_argument("--lr", type=positive, default=1e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=optional(seed), help="make the run one that can be repeated")
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
        help="send parameters as differences in half of the bytes (fp16) or a quarter (int8), for a slow network",
    )
    parser.add_argument("--min_clients", type=number(int, 1), help="start rounds with this many (default: num_clients)")
    parser.add_argument(
        "--round_timeout",
        type=optional(lambda text: text if text == "auto" else positive(text)),
        help="seconds until stragglers are left out; auto: three times a client's own usual, 30 or more (default: off)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        type=lambda text: str(nonempty_path(text)),
        metavar="FOLDER",
        help="go on from server.ptl in FOLDER, or in ckps/<dataset> if none is named, with the same flags but for its "
        "address and those that are given; `off` and --no-fedbn turn off what was on (default: off)",
    )
    parser.add_argument(
        "--allow_new_data", action="store_true", help="resume though the classes, the shards or the test set are others"
    )
    parser.add_argument(
        "--secret_file", type=optional(nonempty_path), help="file with a secret that clients must know too"
    )
    parser.add_argument(
        "--certificates",
        type=optional(nonempty_path),
        metavar="DIR",
        help="use TLS, with its ca.pem, server.pem, server.key",
    )
    parser.add_argument("--verbose", action="store_true", help="show the log of Flower too")
    parser.add_argument("--net", default="LeNet5", help="net to train, one of nets.py's: the devices build it too")
    parser.add_argument(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="shift the images to train on at random, and mirror coloured ones; grey ones may be digits. --no-augment "
        "where a shifted or mirrored image means something else (default: as the net has it)",
    )
    parser.add_argument(
        "--proximal_mu",
        type=number(float, 0, 1000),
        default=0.0,
        help="FedProx: how strongly the devices' models are held near the global one",
    )
    parser.add_argument(
        "--fedbn",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="FedBN: each device keeps its own batch norm",
    )
    parser.add_argument(
        "--fraction_fit",
        type=number(float, 0.001, 1),
        default=1.0,
        help="part of num_clients that trains in a round, drawn anew each time, by --seed if given; all evaluate",
    )
    parser.add_argument(
        "--target_accuracy",
        type=optional(number(float, 0, 1)),
        help=f"end the run once test_accuracy, 0 to 1, was this or more in {LASTING} rounds in a row (default: off)",
    )
    for action in parser._actions if shown else ():
        if action.dest not in (*shown, "help"):
            action.help = argparse.SUPPRESS
    return parser


def parse_args(settings=None, ckps=CKPS):
    """The arguments, from the command line, or from the run's `settings` of a Flower App: {name of the flag: value}.

    With --resume those that are not given are what the checkpoint says, which is in the folder `ckps` if in no other.
    """
    parser = make_parser()
    flags = sys.argv[1:] if settings is None else as_flags(settings, parser)
    args = parser.parse_args(flags)
    if args.allow_new_data and not args.resume:
        raise UserError("--allow_new_data goes with --resume")
    if args.resume:
        path = (ckps / args.dataset if args.resume is True else Path(args.resume)) / "server.ptl"
        earlier = read_args(path, load_checkpoint)
        earlier = {name: value for name, value in earlier.items() if settings is None or name in settings}
        args = as_before(parser, flags, earlier, path)
    args.server_address, args.server_port = split_address(args.server_address, args.server_port)
    return args


def count_clients(args, shards):
    """Settle num_clients and min_clients in `args`; `shards` is how many partition.py has made, None if unknown."""
    args.num_clients = args.num_clients or shards or 10
    if shards is not None and args.num_clients > shards:
        raise UserError(f"--num_clients {args.num_clients}: {args.dataset} is split into {shards} shards only")
    args.min_clients = args.min_clients or args.num_clients
    if args.min_clients > args.num_clients:
        raise UserError(f"--min_clients {args.min_clients} is more than --num_clients {args.num_clients}")
    least = STRATEGIES[args.strategy].least
    if args.min_clients < least:
        raise UserError(
            f"--strategy {args.strategy} needs rounds of {least} clients or more; "
            f"--num_clients {args.num_clients} --min_clients {args.min_clients} allow smaller ones"
        )


def count_fits(args):
    """How many clients train in a round. Raises UserError where these are always too few for the strategy."""
    num_fit = max(1, int(args.fraction_fit * args.num_clients + 1e-9))  # 0.29 * 100 is 28.999999999999996
    least = STRATEGIES[args.strategy].least
    if num_fit < least:
        raise UserError(
            f"--strategy {args.strategy} needs rounds of {least} clients or more; "
            f"--fraction_fit {args.fraction_fit:g} of {args.num_clients} clients is {num_fit}"
        )
    return num_fit


def new_model(args, info):
    """The net to start from, for the data set `info`. Raises UserError where --fedbn would have no effect on it."""
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = build_net(args.net, info["channels"], len(info["classes"]))
    normalise_input(model, info["mean"], info["std"])
    if args.fedbn and not batch_norm_names(model):
        raise UserError(f"--fedbn has nothing to keep on the devices: {args.net} has no batch norm")
    return model


class Server(flwr.server.Server):
    """Flower's server with a loop that waits for the right clients, can be stopped, and goes on from any round.

    A round is counted only if somebody trained in it.
    """

    def __init__(
        self, registry, strategy, min_clients=1, first_round=1, auto_timeout=False, target=(None, 1), absences=None
    ):
        super().__init__(client_manager=registry, strategy=strategy)
        self.registry, self.min_clients, self.first_round = registry, min_clients, first_round
        self.auto_timeout = auto_timeout
        self.target_accuracy, self.first_that_counts = target
        self.absences = absences or Absences(())
        self.seconds = collections.defaultdict(list)  # that a client's answers took, by (method, cid)
        self.trained = False  # whether any round has succeeded
        self.diverged = collections.Counter()  # how often each round has
        self.signum, self.stopped = None, None  # what asked the server to stop, and when
        self.error = None  # what else ended it early

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

    def check_waiting(self, current):
        """`check` while the round `current` waits for clients."""
        self.check()
        self.absences.wait(current, self.registry.clients)

    def fit(self, num_rounds, timeout):
        """Run the rounds up to `num_rounds`, with `timeout` seconds (or None) for each question to the clients."""
        if hasattr(on_signal, "writer"):  # we watch signals; Flower's start_server has just put its own handlers there
            mute_handlers()
        started, current = time.monotonic(), self.first_round
        self.parameters = self.strategy.initialize_parameters(self.registry)
        while current is not None:
            try:
                current = self.run_from(current, num_rounds, timeout)
            except Diverged as end:
                current = self.go_back(end)
        return flwr.server.History(), time.monotonic() - started

    def go_back(self, end):
        """Take the model back from which the round that diverged was trained: the number of that round.

        Raises Hopeless where it has diverged too often.
        """
        last, arrays = self.strategy.go_back()
        self.parameters = ndarrays_to_parameters(arrays)
        self.diverged[end.round] += 1
        if self.diverged[end.round] >= HOPELESS:
            self.strategy.close()
            raise Hopeless(f"{end}; so it was {HOPELESS} times ({describe_saved(last)})")
        say(f"{end}; the round is run again")
        return end.round

    def run_from(self, current, num_rounds, timeout):
        """Run the rounds from `current` on. Raises Diverged where the test of a model says so, sooner or later."""
        delay, failed = 1, []  # for which lasting reasons the current round failed, a set a try
        while current <= num_rounds:
            self.absences.mark()
            self.registry.wait_for_round(self.min_clients, lambda current=current: self.check_waiting(current))
            self.absences.mark()
            instructions = self.strategy.configure_fit(current, self.parameters, self.registry)
            spared = set(self.registry.clients) - {client.cid for client, _ in instructions}
            results, failures = self.ask("fit", instructions, timeout, current)
            parameters, _ = self.strategy.aggregate_fit(current, results, failures)
            if parameters is None:
                failed.append(self.lasting_reasons(len(instructions)))
                if len(failed) >= HOPELESS and set.intersection(*failed[-HOPELESS:]):
                    self.wait_for_tests()
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
            self.absences.finish(current, spared, self.strategy.clients)
            if self.reached_target(current):
                self.strategy.close()
                say(describe_target(self.target_accuracy, current))
                return
            current += 1
        self.wait_for_tests()

    def wait_for_tests(self):
        """Wait until all rounds are tested. Raises Diverged."""
        while not self.strategy.record.check_tests():
            self.check()
            time.sleep(0.02)

    def reached_target(self, current):
        """Whether the run ends with the round `current`; waits for the record only where that depends on its tests."""
        rows = self.strategy.record.history.rows  # to which the record adds each round that it has tested
        while (reached := has_reached(self.target_accuracy, rows, current, self.first_that_counts)) is None:
            self.check()
            self.strategy.record.check_tests()
            time.sleep(0.02)
        return reached

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


def describe_task(args, info, facts, model):
    """What is trained on what, in one line; `facts` is what dataset.json says, {} where there is none."""
    about = f"{args.dataset}: {len(info['classes'])} classes"
    if "partition" in facts:
        how = facts["partition"] if facts.get("alpha") is None else f"{facts['partition']}, alpha {facts['alpha']}"
        about += f", {facts['num_train']:,} images in {facts['num_clients']} shards ({how})"
        about += f", {facts['num_test']:,} for the test"
    return f"{about}; {args.net}: {count_parameters(model):,} parameters"


def hold_folder(folder, dataset):
    """Be the one server that writes to `folder`, as long as the lock that this returns is kept."""
    try:
        lock = lock_file(folder / "server.lock")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    if lock is None:
        raise UserError(
            f"another server is training {dataset} in {folder}: end it first; "
            "one that flwr run has started goes on until flwr stop"
        )
    return lock


def main():
    args = parse_args()
    if not args.verbose:
        quiet_flower()

    # What the user gave: all of it is checked before anything is touched.
    secret = read_secret(args.secret_file)
    certificates = read_certificates(args.certificates)
    address = check_address(args.server_address, args.server_port)
    run = prepare(args, DATASETS, CKPS, functools.partial(Registry, secret=secret, port=args.server_port))
    if run is None:
        return 0
    if secret is None and not is_loopback(args.server_address):
        say(f"warning: whoever reaches {address} can take part in the training; --secret_file prevents that")

    on_signal(run.server.stop)
    say(f"round {run.server.first_round} to {args.num_rounds} with {args.num_clients} clients, on {address}")
    say(describe_client_command(args))
    code = train(run, start_server, server_address=address, certificates=certificates)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gRPC's threads, which wait for clients that are cut off or frozen, would keep the process alive


@dataclasses.dataclass
class Run:
    """What a run needs on the server, and must be kept until its end."""

    server: Server
    config: ServerConfig
    record: Record
    progress: Progress
    curves: Curves
    lock: object


def prepare(args, datasets, ckps, new_registry, in_app=False):
    """Read and check what lies in the folders `datasets` and `ckps`: the Run of `args`, None where all of it is done.

    `new_registry` makes the registry of those who take part: a registry.Registry or Nodes. In a Flower App, where each
    message may meet a new process, all of them tell which net to train, on which cut of the data.
    """
    net = find_net(args.net)
    if args.augment is None:
        args.augment = getattr(net, "augment", False)
    test, info = load_test(datasets / args.dataset, net.image_size)
    count_clients(args, info["num_clients"])
    num_fit, model = count_fits(args), new_model(args, info)
    if args.target_accuracy is not None and args.num_rounds < LASTING:
        raise UserError(f"--target_accuracy needs {LASTING} rounds or more, and --num_rounds is {args.num_rounds}")
    if args.compress != "off" and not any(float32_weights(model)):
        raise UserError(f"--compress {args.compress} is for float32 parameters, and {args.net} has none")
    with seeded(0):  # a net may have random buffers
        outputs = trial(build_net(args.net, info["channels"], len(info["classes"])))
    folder = ckps / args.dataset
    settings = plain_args(args)
    about = {"dataset": args.dataset, "args": settings, **describe_in_checkpoint(info)}
    lock = hold_folder(folder, args.dataset)
    source = find_run(folder, args.resume)
    rows, run_id, known_as = [], None, ""
    if source:
        rows, run_id, known_as = resume(source, model, about, load_checkpoint, args.allow_new_data)
    tests = {"test": functools.partial(server_test_fn, {"test": test}), "count": functools.partial(count_answers, test)}
    last_round = len(rows)
    if args.fedbn:
        about["fedbn"] = f"{secrets.token_hex(8)} {known_as}".strip()
    first_that_counts = last_round + 1 if args.allow_new_data else 1  # of those tested on the test set that is there
    over = None
    if last_round >= args.num_rounds:
        over = f"has finished round {last_round} already; --num_rounds {args.num_rounds} adds none"
    elif has_reached(args.target_accuracy, rows, last_round, first_that_counts):
        over = f"says that {describe_target(args.target_accuracy, last_round)} already"
    if over:
        checkpoint = source / "server.ptl"
        say(f"{checkpoint} {over}")
        record = Record(model, checkpoint, last_round, rows=rows, about=about, **tests)
        complete(record, run_id)
        record.show_end()
        return None

    # The parts, from the last to the first.
    facts = describe_data(datasets / args.dataset)
    config = {**settings, "data": facts, **describe_code()}
    curves, where = start_wandb(args.dataset, run_id, config, rows)
    say(describe_task(args, info, facts, model))
    say(where)
    if info["num_clients"] not in (None, args.num_clients):
        say(f"note: {args.dataset} is split into {info['num_clients']} shards, and --num_clients is {args.num_clients}")
    if args.augment:
        how = "shifted, and mirrored half of the time" if info["channels"] == 3 else "shifted"
        say(f"note: images to train on are {how}; --no-augment leaves them as they are")
    curves.show_split(info["split"], info["classes"])
    curves.catch_up(rows)
    progress = Progress(args.num_rounds, last_round)
    record = Record(
        model,
        folder / "server.ptl",
        last_round=last_round,
        source=source,
        rows=rows,
        **tests,
        about={**about, "wandb_run_id": curves.run.id},
        on_row=progress.show_row,
        log=curves.log,
    )
    hyper_parameters = {name: settings[name] for name in HYPER_PARAMETERS if settings[name] is not None}
    told = name_task(args.net, info["id"]) if in_app else {}
    if args.fedbn:
        told["fedbn"] = about["fedbn"]
    strategy = STRATEGIES[args.strategy](
        model,
        record=record,
        on_drop=progress.show_drop,
        num_fit=num_fit,
        seed=args.seed,
        on_fit_config_fn=lambda current: {"round": current, "num_rounds": args.num_rounds, **hyper_parameters, **told},
        on_evaluate_config_fn=lambda current: told,
        min_fit_clients=1,
        min_evaluate_clients=1,
        min_available_clients=1,
    )
    task = {
        "dataset": args.dataset,
        "dataset_id": info["id"],
        "channels": info["channels"],
        "num_classes": len(info["classes"]),
        "sizes": info["sizes"],
        "net": args.net,
        "fingerprint": fingerprint(model),
        "trial": outputs,
    }

    def describe_client(cid, properties):
        if args.num_clients > MANY:
            return
        facts = {name: value for name, value in properties.items() if name in MACHINE}
        curves.describe_client(cid, {name: printable(value) for name, value in facts.items()})

    sender = Sender(args.compress, float32_weights(model))
    registry = new_registry(args.num_clients, task, on_join=describe_client, sender=sender)
    auto_timeout = args.round_timeout == "auto"
    target = args.target_accuracy, first_that_counts
    absences = Absences(map(str, range(args.num_clients)), curves.watch)
    server = Server(registry, strategy, args.min_clients, last_round + 1, auto_timeout, target, absences)
    config = ServerConfig(num_rounds=args.num_rounds, round_timeout=None if auto_timeout else args.round_timeout)
    return Run(server, config, record, progress, curves, lock)


def train(run, start, **kwargs):
    """Have Flower `start` the rounds, to the last of them or whatever ends them. Returns the exit code."""
    code = run_rounds(run.server, start, config=run.config, **kwargs)
    code = end_rounds(run.server, code)
    run.progress.close()
    about, server = run.record.about, run.server
    if code:
        why = server.error or (server.signum and signal.Signals(server.signum).name) or f"exit code {code}"
        rounds = len(run.record.history.rows)
        run.curves.alert("the run ended early", f"{about['dataset']}, after round {rounds}: {printable(why)}")
    run.curves.finish(run.record.models(), run.record.mistakes, about["classes"])
    run.record.show_end()
    return code


def run_rounds(server, start, **kwargs):
    """Run the rounds, up to the last or to whatever ends them before it. Returns the exit code."""
    try:
        start(server=server, **kwargs)
    except Stopped:
        say(f"stopping ({signal.Signals(server.signum).name}; Ctrl-C now leaves at once)")
    except SystemExit as end:  # Flower's own way out: a port taken in the meantime, a signal before the first round
        if isinstance(end.code, str):
            say(f"server.py: {end.code}", sys.stderr)
            return 1
        return end.code or 128 + signal.SIGTERM
    except BaseException as error:
        server.error = error
        return fail(error)
    return 0


def end_rounds(server, code):
    """Tell the clients, and save what is finished. Returns the exit code; `code` is that of the rounds."""
    server.registry.close({"stopped": "the server stopped before the last round"})
    try:
        server.strategy.close()
    except BaseException as error:
        server.error = server.error or error
        code = code or fail(error)
    return 128 + server.signum if server.signum is not None else code


def fail(error):
    """Say why the server ends: in a line where the run or a disk is at fault, else with the traceback. Returns the exit
    code, 2 for a UserError and else 1."""
    if isinstance(error, (Hopeless, Diverged, UserError)):
        say(f"server.py: {error}", sys.stderr)
    elif isinstance(error, OSError):
        say(f"server.py: cannot go on: {error}", sys.stderr)
    else:
        traceback.print_exception(error)
        say(f"server.py: cannot go on: {type(error).__name__}: {error}", sys.stderr)
    return 2 if isinstance(error, UserError) else 1


# ---------------------------------------------------------------------------------------------------------------------
# The same server as a Flower App, for Flower's engines: the simulation and the deployment.


app = ServerApp()


@app.main()
def run_app(grid, context):
    """Train with the SuperNodes of `grid`, by the run's config: pyproject.toml, and what `flwr run` was told besides.

    Flower copies the app's files elsewhere before it runs them: datasets/ and ckps/ lie in the `folder` of the config.
    """
    code = 0
    if context.run_config.get("verbose") is not True:
        quiet_flower()
    try:
        folder = find_folder(context.run_config)
        os.environ.setdefault("WANDB_DIR", str(folder))
        settings = {name: value for name, value in context.run_config.items() if name != "folder"}
        if isinstance(settings.get("resume"), str) and settings["resume"]:
            settings["resume"] = str(folder / settings["resume"])  # the SuperLink may run elsewhere
        args = parse_args(settings, folder / "ckps")
        run = prepare(args, folder / "datasets", folder / "ckps", Nodes, in_app=True)
        if run is not None:
            say(f"round {run.server.first_round} to {args.num_rounds} with {args.num_clients} clients")
            code = train(run, start_grid, grid=grid)
    except Exception as error:
        code = fail(error)
    if code != 0:
        raise RuntimeError(f"exit code {code}; the lines of server.py say why")  # so that Flower calls the run failed


if __name__ == "__main__":
    run_script(main)
