"""Train on skewed shards with each method against skew, and compare.

    PYTHONPATH=. python benchmarks/skew.py [METHOD …]
    PYTHONPATH=. python benchmarks/skew.py --confirm

CIFAR-10, 10 clients with 1,000 fit images on average, Dirichlet 0.1 and 0.5, 40 rounds of one epoch, seeds 0 to 2. The
rounds run in this process, over client.Client and the strategies of the suite as server.py builds them; --confirm runs
one of them by server.py and ten client.py instead, and writes how near the two are. Writes skew.json, in which what is
named is measured anew; takes about an hour on 2 cores, --confirm two minutes.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

from libs import nn, torch
from plumbing.device.task import Task

import report
from common import BUILD_ARCHIVE, HERE, BenchSuite, about_this_run, parse_names, write_json
from flwr.common import Code, EvaluateRes, FitRes, Status, ndarrays_to_parameters, parameters_to_ndarrays

import nets
from client import Client
from data import describe_in_checkpoint, load_shard, load_test
from engines import server_test_fn
from strategies import STRATEGIES

NUM_CLIENTS, NUM_ROUNDS, LAST, ALPHAS, SEEDS = 10, 40, 5, (0.1, 0.5), (0, 1, 2)
PER_CLASS = 1250  # training images of each class: 1,000 fit and 250 eval images a client
CONFIRMED = ("FedAvg", 0.1, 0)


class LeNet5GroupNorm(nets.LeNet5):
    """LeNet5 with group norm, two and four groups, in place of batch norm."""

    def __init__(self, in_channels, num_classes):
        super().__init__(in_channels, num_classes)
        self.layer1[1], self.layer2[1] = nn.GroupNorm(2, 6), nn.GroupNorm(4, 16)


nets.NETS["LeNet5GroupNorm"] = LeNet5GroupNorm
METHODS = {  # what differs from FedAvg with LeNet5: the strategy, the net, what travels with the round
    "FedAvg": {},
    "FedProx, mu 0.01": {"proximal_mu": 0.01},
    "FedProx, mu 0.1": {"proximal_mu": 0.1},
    "FedBN": {"fedbn": "skew"},
    "FedMedian": {"strategy": "FedMedian"},
    "LeNet5 with group norm": {"net": "LeNet5GroupNorm"},
}


class Device:
    """What a strategy sees of a client: its cid."""

    def __init__(self, cid):
        self.cid = str(cid)


class Rows:
    """A record that keeps the rows alone."""

    def __init__(self):
        self.rows = []

    def add(self, row, arrays, clients):
        self.rows.append(row)

    def check(self):
        pass


def dataset_of(root, alpha, seed):
    return Path(root) / "datasets" / f"Skew{alpha}-{seed}"


def train(root, name, alpha, seed):
    """The rounds of one training: (its name, alpha, seed, and its figures, means over the last rounds)."""
    torch.set_num_threads(1)
    folder, options = dataset_of(root, alpha, seed), {"strategy": "FedAvg", "net": "LeNet5", **METHODS[name]}
    strategy_name, net = options.pop("strategy"), options.pop("net")
    test, info = load_test(folder)
    torch.manual_seed(seed)
    model = nets.build_net(net, info["channels"], len(info["classes"]))
    nets.normalise_input(model, info.get("mean"), info.get("std"))
    strategy = STRATEGIES[strategy_name](model, record=Rows(), on_drop=fail)
    clients = []
    for cid in range(NUM_CLIENTS):
        loaders, info = load_shard(folder, cid, "cpu")
        local = nets.build_net(net, info["channels"], len(info["classes"]))
        kept = root / f"{name}-{alpha}-{seed}-{cid}.ptl" if "fedbn" in options else None
        about = describe_in_checkpoint(info)
        clients.append(Client(Task(local, loaders, about), save_ckp_path=kept, properties={"cid": cid}))
    parameters, tests, ok = ndarrays_to_parameters(nets.get_arrays(model)), [], Status(Code.OK, "")
    for current in range(1, NUM_ROUNDS + 1):
        config = {"round": current, "num_rounds": NUM_ROUNDS, "seed": seed, **options}
        results = []
        with contextlib.redirect_stdout(io.StringIO()):
            for cid, client in enumerate(clients):
                arrays, num_fit, metrics = client.fit(parameters_to_ndarrays(parameters), config)
                results.append((Device(cid), FitRes(ok, ndarrays_to_parameters(arrays), num_fit, metrics)))
        parameters, _ = strategy.aggregate_fit(current, results, [])
        results = []
        for cid, client in enumerate(clients):
            loss, num_eval, metrics = client.evaluate(parameters_to_ndarrays(parameters), config)
            results.append((Device(cid), EvaluateRes(ok, loss, num_eval, metrics)))
        strategy.aggregate_evaluate(current, results, [])
        if current > NUM_ROUNDS - LAST:
            nets.set_arrays(model, parameters_to_ndarrays(parameters))
            tests.append(server_test_fn({"test": test}, model)["test_accuracy"])
    own = [row["global_eval_accuracy"] for row in strategy.record.rows[-LAST:]]
    return name, alpha, seed, {"test_accuracy": sum(tests) / LAST, "global_eval_accuracy": sum(own) / LAST}


def fail(current, cid, reason):
    raise RuntimeError(f"round {current}, client {cid}: {reason}")


def confirm(suite):
    """The figures of the training CONFIRMED by server.py and client.py, with sockets and processes."""
    _, alpha, seed = CONFIRMED
    dataset = dataset_of(suite.root, alpha, seed).name
    args = ("--dataset", dataset, "--num_rounds", NUM_ROUNDS, "--seed", seed)
    server = suite.server(*args)
    for cid in range(NUM_CLIENTS):
        suite.client(cid, "--dataset", dataset)
    server.wait(1800)
    rows = suite.history(dataset)[-LAST:]
    return {name: sum(row[name] for row in rows) / LAST for name in ("test_accuracy", "global_eval_accuracy")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--confirm", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parse_names(parser, "method", METHODS)
    path = HERE / "skew.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    results["about"] = about_this_run()
    cuts = [CONFIRMED[1:]] if args.confirm else [(alpha, seed) for alpha in ALPHAS for seed in SEEDS]
    with BenchSuite() as suite:
        subprocess.run([sys.executable, BUILD_ARCHIVE, suite.root, str(PER_CLASS)], check=True, stdout=sys.stderr)
        for alpha, seed in cuts:
            suite.partition(
                *("--dataset", dataset_of(suite.root, alpha, seed).name, "--num_clients", NUM_CLIENTS, "--seed", seed),
                *("--source", suite.root / "cifar-10-python.tar.gz", "--partition", "dirichlet", "--alpha", alpha),
            )
        if args.confirm:
            results["confirmed"] = [*CONFIRMED, confirm(suite)]
        else:
            names = args.names or list(METHODS)
            tasks = [(suite.root, name, alpha, seed) for seed in SEEDS for alpha in ALPHAS for name in names]
            results["runs"] = [run for run in results["runs"] if run[0] not in names]
            with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
                for task in [pool.apply_async(train, task) for task in tasks]:
                    results["runs"].append(task.get())
                    print(*results["runs"][-1], flush=True)
    write_json(path, results)
    report.main()


if __name__ == "__main__":
    main()
