"""What accuracy a net reaches in 100 rounds, and what its step costs: GroupNet, LeNet5, and nets near them.

    PYTHONPATH=. python benchmarks/frontier.py [NET …]

All of CIFAR-10, 10 clients, IID, one epoch a round, Adam 1e-3, seed 0: the settings of the published figure. The
rounds run in this process, over engines.client_fit_fn and strategies.average. Writes frontier.json, in which the nets
that are named are measured anew; takes 10 to 20 minutes a net.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

from libs import nn, torch
from plumbing.common.fast import Adam

import report
from common import BUILD_ARCHIVE, HERE, BenchSuite, about_this_run, parse_names, write_json

import nets
from data import load_shard, load_test
from engines import client_fit_fn, server_test_fn
from strategies import average

DATASET, NUM_CLIENTS, NUM_ROUNDS, EVERY, SEED = "CIFAR10", 10, 100, 5, 0
REPEATS, STEPS = 9, 15
MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of CIFAR-10's training images


def block(inputs, outputs, kernel, stride):
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.ReLU())


class Candidate(nn.Module):
    """Normalises its input by CIFAR-10's mean and spread, as GroupNet does."""

    image_size = (32, 32)

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.register_buffer("input_mean", torch.tensor(MEAN).reshape(1, 3, 1, 1))
        self.register_buffer("input_std", torch.tensor(STD).reshape(1, 3, 1, 1))

    def forward(self, images):
        return self.layers((images - self.input_mean) / self.input_std)


def three_convolutions():
    head = nn.Flatten(), nn.Linear(4096, 32), nn.ReLU(), nn.Linear(32, 10)
    return Candidate(block(3, 32, 5, 2), block(32, 48, 3, 2), block(48, 64, 3, 1), *head)


def groupnet():
    model = nets.build_net("GroupNet", 3, 10)
    nets.normalise_input(model, MEAN, STD)
    return model


def lenet5():
    return nets.build_net("LeNet5", 3, 10)


NETS = {  # name: (what builds it, whether its images are augmented)
    "LeNet5": (lenet5, False),
    "LeNet5, augmented": (lenet5, True),
    "three convolutions": (three_convolutions, False),
    "GroupNet": (groupnet, False),
    "GroupNet, augmented": (groupnet, True),
}


def train(root, name):
    """The test accuracy after every EVERY rounds, {round: accuracy}."""
    torch.set_num_threads(1)
    build, augment = NETS[name]
    torch.manual_seed(SEED)
    model = build()
    folder = root / "datasets" / DATASET
    test, _ = load_test(folder)
    shards = [load_shard(folder, cid, "cpu")[0] for cid in range(NUM_CLIENTS)]
    curve, arrays = {}, nets.get_arrays(model)
    for current in range(1, NUM_ROUNDS + 1):
        updates = []
        for cid, loaders in enumerate(shards):
            nets.set_arrays(model, arrays)
            client_fit_fn(loaders, model, seed=(SEED * 1000 + current) * NUM_CLIENTS + cid, augment=augment)
            updates.append((len(loaders["fit"].dataset), nets.get_arrays(model)))
        arrays = average(updates)
        if current % EVERY == 0:
            nets.set_arrays(model, arrays)
            curve[current] = server_test_fn({"test": test}, model)["test_accuracy"]
            print(name, current, curve[current], flush=True)
    return name, curve


def time_steps():
    """{name: seconds of processor time of a step on 32 images in each of REPEATS}, measured in turns."""
    torch.set_num_threads(1)
    images, labels = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    works = {}
    for name, (build, _) in NETS.items():
        model = build().train()
        works[name] = model, Adam(model.parameters())
    seconds = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, (model, optimizer) in works.items():
            started = time.process_time()
            for _ in range(STEPS):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), labels).backward()
                optimizer.step()
            seconds[name].append((time.process_time() - started) / STEPS)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parse_names(parser, "net", NETS)
    path = HERE / "frontier.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"curves": {}}
    results["about"] = about_this_run()
    seconds = time_steps()
    results["steps"] = {
        name: {
            "parameters": sum(parameter.numel() for parameter in NETS[name][0]().parameters()),
            "ratio": statistics.median(mine / other for mine, other in zip(times, seconds["LeNet5"], strict=True)),
        }
        for name, times in seconds.items()
    }
    with BenchSuite() as suite:
        subprocess.run([sys.executable, BUILD_ARCHIVE, suite.root], check=True, stdout=sys.stderr)
        suite.partition(
            "--dataset", DATASET, "--num_clients", NUM_CLIENTS, "--source", suite.root / "cifar-10-python.tar.gz"
        )
        with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
            for task in [pool.apply_async(train, (suite.root, name)) for name in args.names or NETS]:
                name, curve = task.get()
                results["curves"][name] = curve
    write_json(path, results)
    report.main()


if __name__ == "__main__":
    main()
