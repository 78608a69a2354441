"""Train one model on the data of many devices, by federated averaging.

    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100
    python server.py --server_address 0.0.0.0 --dataset CIFAR10 --num_clients 10 --num_rounds 100 --resume

Waits for the clients; in each round all of them train at the same time, and their models are averaged and tested.
Leaves server.ptl, best.ptl, history.csv, clients.csv, metrics.png, confusion.png and devices.png in ckps/<dataset>/,
and the curves in Weights & Biases.
"""

import argparse
import functools
import os
import secrets
import sys
from pathlib import Path

from libs import CKPS, DATASETS, UserError, run_script, say, torch
from plumbing.common.arguments import find_folder, new_parser, number, plain_args, read_secret, split_address
from plumbing.common.process import on_signal, quiet_flower
from plumbing.common.state import float32_weights
from plumbing.common.wire import COMPRESS, Sender
from plumbing.laptop import start
from plumbing.laptop.asking import Absences
from plumbing.laptop.budget import Budget
from plumbing.laptop.door import start_server  # Flower's is deprecated, and 1.43 takes it away (docs/flower.md)
from plumbing.laptop.earlier import find_run, read_args, resume
from plumbing.laptop.ending import Run, fail, show_results
from plumbing.laptop.flags import add_run_flags, app_settings, as_before, as_flags, optional, seconds_or_auto
from plumbing.laptop.handshake import name_task
from plumbing.laptop.history import MANY
from plumbing.laptop.listening import add_connection_flags, announce, check_address, read_certificates
from plumbing.laptop.nodes import Nodes, start_grid
from plumbing.laptop.record import Diverged, GlobalTest, Record
from plumbing.laptop.registry import Registry
from plumbing.laptop.rounds import LASTING, Rounds, Target
from plumbing.laptop.screen import Progress

from flwr.server import ServerApp, ServerConfig

from data import count_batches, describe_in_checkpoint, load_test
from engines import HYPER_PARAMETERS, count_answers, server_test_fn
from nets import build_net, find_net, normalise_input
from strategies import STRATEGIES, FedAvg


def add_training_flags(add):
    add("--net", default="LeNet5", help="net to train, one of nets.py; the devices build it, too")
    add("--num_rounds", type=number(int, 1), default=100, help="total number of rounds")
    add("--num_epochs", type=number(int, 1), default=1, help="epochs that a client trains per round")
    add("--lr", type=number(float, 0, inside=True), default=1e-3, help="learning rate of Adam")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="shift the training images at random, and mirror half of them if they are in colour: grey ones may be "
        "digits. --no-augment if a shifted or mirrored image means something else (default: the net's)",
    )
    add(
        "--strategy",
        choices=STRATEGIES,
        default=FedAvg.__name__,
        help="how n results become one model. FedAvg: their mean, weighted by images. The others withstand liars. "
        "FedMedian: the median; FedTrimmedAvg: the mean without n/5 values at each end (from n = 3 on at least 1); "
        "Krum: the mean without the (n-3)/2 models (at least 1) that are farthest from the others. These count "
        "all alike, however little --time_budget lets them train",
    )
    add("--proximal_mu", type=number(float, 0, 1000), default=0.0, help="FedProx: pull of local models to the global")
    add("--fedbn", action=argparse.BooleanOptionalAction, default=False, help="FedBN: devices keep their batch norm")
    add("--seed", type=optional(number(int, 0, 2**32 - 1)), help="make the run reproducible")
    add(
        "--target_accuracy",
        type=optional(number(float, 0, 1)),
        help=f"end the run once test_accuracy, 0 to 1, was this or more in {LASTING} rounds in a row (default: off)",
    )


def add_device_flags(add):
    add("--num_clients", type=number(int, 1), help="number of clients, cids from 0 (default and maximum: all shards)")
    add("--min_clients", type=number(int, 1), help="start rounds with this many (default: num_clients)")
    add("--fraction_fit", type=number(float, 0.001, 1), default=1.0, help="share of the clients that trains per round")
    add(
        "--round_timeout",
        type=seconds_or_auto,
        help="skip clients slower than this many seconds; auto: 3 times a client's median, at least 30 (default: off)",
    )
    add(
        "--time_budget",
        type=seconds_or_auto,
        help="each client trains what it can in this many seconds, at most num_epochs, and goes on from there in the "
        "next round; auto: what the median client takes for num_epochs. Nobody is skipped for it (default: off)",
    )
    add("--compress", choices=COMPRESS, default=COMPRESS[0], help="send differences in 16 bits (fp16) or 8 bits (int8)")


def make_parser(description=__doc__, shown=None):
    """Return the parser of the command line. Its --help shows only the flags named in `shown`, if that is given."""
    parser = new_parser(description)
    groups = {"training": add_training_flags, "devices": add_device_flags, "run": add_run_flags}
    for title, add_flags in {**groups, "connection": add_connection_flags}.items():
        add_flags(parser.add_argument_group(title).add_argument)
    for action in parser._actions if shown else ():
        if action.dest not in (*shown, "help"):
            action.help = argparse.SUPPRESS
    return parser


def parse_args(settings=None, ckps=CKPS):
    """Return the arguments, from the command line or from the `settings` of a Flower App: {name of the flag: value}.

    With --resume, those that are not given are taken from the checkpoint, in `ckps` if no other folder is named.
    """
    parser = make_parser()
    flags = sys.argv[1:] if settings is None else as_flags(settings, parser)
    args = parser.parse_args(flags)
    if args.allow_new_data and not args.resume:
        raise UserError("--allow_new_data goes with --resume")
    if args.resume:
        path = (ckps / args.dataset if args.resume is True else Path(args.resume)) / "server.ptl"
        earlier = read_args(path)
        earlier = {name: value for name, value in earlier.items() if settings is None or name in settings}
        args = as_before(parser, flags, earlier, path)
    args.server_address, args.server_port = split_address(args.server_address, args.server_port)
    return args


class Server(Rounds):
    """The loop of the rounds; laptop/rounds has what may happen around it."""

    def run_rounds(self, num_rounds):
        """Run the rounds up to `num_rounds`."""
        self.parameters = self.strategy.initialize_parameters(self.registry)
        current, over = len(self.strategy.record.history.rows) + 1, False  # after those of the run that is resumed
        while not over:
            try:
                if self.run_round(current):
                    over = self.is_over(current, num_rounds)
                    current += 1
            except Diverged as diverged:  # the test of this round or one before, which runs beside the training
                current = self.go_back(diverged)

    def run_round(self, current):
        """Run one round. Return whether anyone trained in it: otherwise it does not count, and is run again."""
        # 1. Wait for the clients, and choose those that train.
        self.wait_for_clients(current)
        instructions = self.strategy.configure_fit(current, self.parameters, self.registry)
        spared = set(self.registry.clients) - {client.cid for client, _ in instructions}
        if self.budget is not None:  # --time_budget: how many steps each of them trains
            instructions = self.budget.divide(current, instructions, self.registry.clients)

        # 2. They train the global model, all at the same time; the strategy averages what they send.
        results, failures = self.questions.ask("fit", instructions)
        parameters, _ = self.strategy.aggregate_fit(current, results, failures)
        if parameters is None:
            self.try_again(current, len(instructions))
            return False
        self.parameters = parameters

        # 3. All clients evaluate the new global model.
        instructions = self.strategy.configure_evaluate(current, self.parameters, self.registry)
        results, failures = self.questions.ask("evaluate", instructions)

        # 4. Hand the round to the record (laptop/record), which tests and saves it while the next one trains.
        self.strategy.aggregate_evaluate(current, results, failures)
        self.finish(current, spared)
        return True


def build_strategy(args, model, record, num_drawn, config, on_drop):
    """Return the strategy, which sends `config` to the clients with each question, and with a fit how to train."""
    fit_config = {name: getattr(args, name) for name in HYPER_PARAMETERS if getattr(args, name) is not None}
    fit_config.update({"num_rounds": args.num_rounds, **config})
    return STRATEGIES[args.strategy](
        model,
        record=record,
        on_drop=on_drop,
        num_drawn=num_drawn,
        seed=args.seed,
        on_fit_config_fn=lambda current: {"round": current, **fit_config},
        on_evaluate_config_fn=lambda current: config,
        min_fit_clients=1,  # the registry waits for the clients, not the strategy
        min_evaluate_clients=1,
        min_available_clients=1,
    )


def prepare(args, datasets, ckps, new_registry, in_app=False):
    """Read and check what is in the folders `datasets` and `ckps`. Return the Server, None if no round is left to run.

    new_registry: makes the Registry or the Nodes.
    in_app: whether this is a Flower App, where each message may meet a new process: all of them name net and split.
    """
    # 1. The data and the net: all of it is checked before anything is touched.
    net = find_net(args.net)
    if args.augment is None:
        args.augment = getattr(net, "augment", False)
    test, info = load_test(datasets / args.dataset, net.image_size)
    num_drawn = start.count_clients(args, info["num_clients"], STRATEGIES[args.strategy].least)
    if args.seed is not None:
        torch.manual_seed(args.seed)
    model = build_net(args.net, info["channels"], len(info["classes"]))
    normalise_input(model, info["mean"], info["std"])
    start.check_effects(args, model)
    task = start.describe_task(args, info, model, build_net)
    about = {"dataset": args.dataset, "args": plain_args(args), **describe_in_checkpoint(info)}

    # 2. The earlier run, if --resume goes on from one.
    folder = ckps / args.dataset
    lock = start.hold_folder(folder, args.dataset)
    earlier = resume(find_run(folder, args.resume), model, about, args.allow_new_data)
    about["resumed_after"] = [*earlier.resumed_after, earlier.last_round] if earlier.rows else []
    if args.fedbn:  # the names of this run and of those before, under which devices keep their batch norm
        about["fedbn"] = f"{secrets.token_hex(8)} {earlier.fedbn}".strip()
    target = Target(args.target_accuracy, earlier.last_round + 1 if args.allow_new_data else 1)
    over = target.why_over(earlier.rows, args.num_rounds)
    if over:  # no round is left, only what a kill in the last one has prevented
        folder = earlier.folder
        say(f"{folder / 'server.ptl'} {over}")

    # 3. The parts: each round goes from the clients in the registry through server and strategy into the record.
    curves = start.start_curves(args, info, model, earlier, needed=not over)
    tester = GlobalTest(functools.partial(server_test_fn, {"test": test}), functools.partial(count_answers, test))
    record = Record(model, folder / "server.ptl", earlier, tester, {**about, "wandb_run_id": curves.run.id})
    if over:
        record.close()
        show_results(record, curves)
        return None
    progress = Progress(args.num_rounds, earlier.last_round)
    record.on_saved += [curves.log_round, progress.show_round]
    config = name_task(args.net, info["id"]) if in_app else {}
    config.update({"fedbn": about["fedbn"]} if args.fedbn else {})
    strategy = build_strategy(args, model, record, num_drawn, config, progress.show_drop)
    on_join = curves.log_client if args.num_clients <= MANY else None  # more are too many for wandb's page
    registry = new_registry(args.num_clients, task, on_join, Sender(args.compress, float32_weights(model)))
    run = Run(registry, strategy, curves, progress, lock)
    absences = Absences(map(str, range(args.num_clients)), curves.watch)
    budget = args.time_budget and Budget(args.time_budget, args.num_epochs, count_batches, record.clients.rows)
    return Server(run, args.min_clients, args.round_timeout, target, absences, budget)


def main():
    args = parse_args()
    if not args.verbose:
        quiet_flower()
    certificates = read_certificates(args.certificates)
    address = check_address(args.server_address, args.server_port)
    server = prepare(args, DATASETS, CKPS, functools.partial(Registry, secret=read_secret(args.secret_file)))
    if server is None:
        return 0
    on_signal(server.run.stop)
    announce(args, address, server.run.next_round)

    def run_rounds():
        config = ServerConfig(num_rounds=args.num_rounds)
        start_server(server_address=address, server=server, config=config, certificates=certificates)

    return server.run.train(run_rounds)


# ---------------------------------------------------------------------------------------------------------------------
# The same server as a Flower App, for Flower's engines: the simulation and the deployment.

app = ServerApp()


@app.main()
def run_app(grid, context):
    """Train with the SuperNodes of `grid`, by the run's config: pyproject.toml, and what `flwr run` was told besides.

    Flower copies the app's files elsewhere before it runs them: datasets/ and ckps/ are in the `folder` of the config.
    All that differs from the scripts is listed in laptop/nodes.
    """
    code = 0
    if context.run_config.get("verbose") is not True:
        quiet_flower()
    try:
        folder = find_folder(context.run_config)
        os.environ.setdefault("WANDB_DIR", str(folder))
        args = parse_args(app_settings(context.run_config, folder), folder / "ckps")
        server = prepare(args, folder / "datasets", folder / "ckps", Nodes, in_app=True)
        if server is not None:
            say(f"round {server.run.next_round} to {args.num_rounds} with {args.num_clients} clients")
            config = ServerConfig(num_rounds=args.num_rounds)
            code = server.run.train(lambda: start_grid(grid=grid, server=server, config=config))
    except Exception as error:
        code = fail(error)
    if code != 0:
        raise RuntimeError(f"exit code {code}; the lines of server.py say why")  # so that Flower calls the run failed


if __name__ == "__main__":
    run_script(main)
