"""How long a shelf of unequal boards takes to an accuracy: all wait for the slowest, or each trains what it can.

    PYTHONPATH=. python benchmarks/mixed.py [METHOD …]
    PYTHONPATH=. python benchmarks/mixed.py --confirm

All of CIFAR-10, 10 clients, IID and Dirichlet 0.5, one epoch a round, Adam 1e-3, seeds 0 to 2. The rounds run in this
process, over engines.client_fit_fn, data.Steps, laptop/budget and strategies.average; their time is counted: an image
takes 1 to train on and MEASURING to measure, divided by the board's speed, and a round lasts as long as its slowest fit
and its slowest evaluate. Adds each finished run to mixed.json, and skips those that it has; takes hours on one core.
--confirm runs two of them by server.py and ten client.py instead, in ten minutes on an idle machine with 2 cores.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys

from libs import np, torch
from plumbing.common.state import float32_weights
from plumbing.laptop.budget import Budget, plan_steps

import report
from common import BUILD_ARCHIVE, HERE, BenchSuite, about_this_run, leave_on_signals, parse_names

import nets
from data import Steps, load_shard, load_test
from engines import client_fit_fn, count_answers
from strategies import average

NUM_CLIENTS, SEEDS = 10, (0, 1, 2)
MEASURING = 0.25  # of the time that an image takes in training: what LeNet5 takes here
SPLITS = {"IID": ("iid", 120, 0.58), "Dirichlet 0.5": ("dirichlet", 40, 0.58)}  # the longest time, when to end early
SHELVES = {
    "7 of 1, 3 of 1/4": [1] * 7 + [1 / 4] * 3,
    "3 of 1, 3 of 1/2, 2 of 1/4, 2 of 1/8": [1] * 3 + [1 / 2] * 3 + [1 / 4] * 2 + [1 / 8] * 2,
}
WAIT, IMAGES, SHARD, NOVA, OUT = METHODS = (
    "all wait",
    "budget, weighted by images",
    "budget, weighted by shard",
    "budget, FedNova",
    "the slow ones left out",
)
CONFIRMED, SCALE, CONFIRM_WAIT = ("IID", "7 of 1, 3 of 1/4", SHARD, 0), 8, 1e6


class Shelf:
    """Ten boards with the shards of a dataset, of unequal `speeds`, and the net that they train."""

    def __init__(self, folder, seed, speeds):
        self.seed, self.speeds = seed, speeds
        self.test, info = load_test(folder)
        self.loaders = [load_shard(folder, cid, "cpu")[0] for cid in range(NUM_CLIENTS)]
        self.sizes = [{phase: len(loader.dataset) for phase, loader in each.items()} for each in self.loaders]
        torch.manual_seed(seed)
        self.model = nets.build_net("LeNet5", info["channels"], len(info["classes"]))
        self.epoch = sum(size["fit"] for size in self.sizes) / NUM_CLIENTS  # the unit of time

    def fit(self, cid, arrays, current, first_step, num_steps):
        """Train `arrays` on the board: (the arrays then, the images that it has trained on)."""
        nets.set_arrays(self.model, arrays)
        steps = Steps(self.loaders[cid]["fit"], first_step, num_steps, (self.seed, cid))
        eval_batch = next(iter(self.loaders[cid]["eval"]))
        seed = int(np.random.SeedSequence([self.seed, current, cid]).generate_state(1)[0])
        client_fit_fn({"fit": steps, "eval": [eval_batch]}, self.model, seed=seed)
        return nets.get_arrays(self.model), sum(len(labels) for _, labels in steps)

    def measure(self, arrays):
        """The accuracy on the test images of each class."""
        nets.set_arrays(self.model, arrays)
        counts = count_answers(self.test, self.model)
        return [round(float(share), 4) for share in np.diag(counts) / counts.sum(1)]

    def seconds(self, cid, images):
        """The time that the board takes to train on so many images and to measure the trained model."""
        return (images + MEASURING * self.sizes[cid]["eval"]) / self.speeds[cid] / self.epoch

    def held(self):
        """The share of the fit images of each class that the boards slower than the median one hold."""
        counts = [np.bincount(each["fit"].dataset.labels, minlength=10) for each in self.loaders]
        usual = statistics.median_high(self.speeds)
        slow = sum(count for count, speed in zip(counts, self.speeds, strict=True) if speed < usual)
        return [round(float(share), 4) for share in slow / sum(counts)]


def nova(model, arrays, updates):
    """FedNova (Wang et al. 2020, arXiv 2007.07481): `updates` is [(fit images of the shard, arrays, steps), …].

    Each change of the weights is divided by its steps; their mean times the mean number of steps is the change of the
    global model. Buffers are averaged.
    """
    mean = average([(size, trained) for size, trained, _ in updates])
    total = sum(size for size, _, _ in updates)
    steps = sum(size * steps for size, _, steps in updates) / total
    for place, is_weight in enumerate(float32_weights(model)):
        if is_weight:
            changes = [(size / total / own) * (trained[place] - arrays[place]) for size, trained, own in updates]
            mean[place] = (arrays[place] + steps * sum(changes)).astype(np.float32)
    return mean


def run_round(shelf, method, current, arrays, plan):
    """One round: (the averaged arrays, the time that it takes, the figures of each board as in clients.csv)."""
    updates, figures = [], {}
    for cid, (first_step, num_steps) in plan.items():
        trained, images = shelf.fit(int(cid), arrays, current, first_step, num_steps)
        updates.append((images if method == IMAGES else shelf.sizes[int(cid)]["fit"], trained, num_steps))
        figures[cid] = {
            "steps": num_steps,
            "images": images,
            "fit_seconds": shelf.seconds(int(cid), images),
            "images_per_second": shelf.speeds[int(cid)] * shelf.epoch,
        }
    seconds = max(each["fit_seconds"] for each in figures.values()) + max(shelf.seconds(int(cid), 0) for cid in plan)
    if method == NOVA:
        return nova(shelf.model, arrays, updates), seconds, figures
    return average([(size, trained) for size, trained, _ in updates]), seconds, figures


@functools.lru_cache(maxsize=1)
def first_round(folder, seed, speeds):
    """The first round, in which all wait with every method that asks all: nobody's speed is known yet."""
    shelf = Shelf(folder, seed, speeds)
    arrays = nets.get_arrays(shelf.model)
    plan = {str(cid): (0, len(loaders["fit"])) for cid, loaders in enumerate(shelf.loaders)}
    arrays, seconds, figures = run_round(shelf, WAIT, 1, arrays, plan)
    return shelf, arrays, seconds, figures, shelf.measure(arrays)


def train(folder, split, shelf_name, method, seed):
    """One run: {…, "rounds": [[the time at the end of the round, the test accuracy of each class], …]}."""
    torch.set_num_threads(1)
    speeds, (_, longest, enough) = tuple(SHELVES[shelf_name]), SPLITS[split]
    if method == OUT:
        shelf = Shelf(folder, seed, speeds)
        arrays, rounds = nets.get_arrays(shelf.model), []
    else:
        shelf, arrays, seconds, figures, classes = first_round(folder, seed, speeds)
        rounds = [[seconds, classes]]
    budget = Budget("auto", 1, None)
    there = [cid for cid, speed in enumerate(speeds) if speed == max(speeds) or method != OUT]
    batches = {str(cid): len(shelf.loaders[cid]["fit"]) for cid in there}
    while not rounds or (rounds[-1][0] < longest and np.mean(rounds[-1][1]) < enough):
        current = len(rounds) + 1
        if method in (WAIT, OUT):
            plan = {cid: ((current - 1) * steps, steps) for cid, steps in batches.items()}
        else:
            budget.note(current - 1, figures)
            plan = plan_steps("auto", 1, budget.fits, batches)
        arrays, seconds, figures = run_round(shelf, method, current, arrays, plan)
        rounds.append([round((rounds[-1][0] if rounds else 0) + seconds, 4), shelf.measure(arrays)])
        print(split, method, seed, current, *rounds[-1][:1], round(np.mean(rounds[-1][1]), 4), flush=True)
    about = {"split": split, "shelf": shelf_name, "method": method, "seed": seed, "held": shelf.held()}
    about["sizes"] = [[size["fit"], size["eval"]] for size in shelf.sizes]
    return {**about, "steps": {cid: steps for cid, (_, steps) in plan.items()}, "rounds": rounds}


def tasks():
    """What is run, the most important first: the run of those that all wait is counted for both shelves."""
    first, second = SHELVES
    for methods, shelf in (((WAIT, IMAGES, SHARD), first), ((OUT, NOVA), first), ((IMAGES, SHARD, NOVA), second)):
        for split in SPLITS:
            for seed in SEEDS:
                for method in methods:
                    yield split, shelf, method, seed


def partition(suite, split, seed):
    """Split CIFAR-10, unless it is: the dataset's folder."""
    folder = suite.root / "datasets" / f"{split} {seed}".replace(" ", "-")
    if not folder.exists():
        kind = ("--partition", SPLITS[split][0], "--alpha", 0.5) if split != "IID" else ()
        common = ("--dataset", folder.name, "--num_clients", NUM_CLIENTS, "--seed", seed)
        suite.partition(*common, "--source", suite.root / "cifar-10-python.tar.gz", *kind, timeout=900)
    return folder


def confirm(suite, folder, runs):
    """Train by server.py and ten client.py with --slowdown, all waiting and with a budget: what report.py shows of it.

    The fast boards are slowed down too, SCALE times: they are to share few cores as if each had its own. With a budget
    of CONFIRM_WAIT seconds all wait, for images in the same order.
    """
    curves, speeds = {}, SHELVES[CONFIRMED[1]]
    for method, budget in ((WAIT, CONFIRM_WAIT), (CONFIRMED[2], "auto")):
        (run,) = (
            run
            for run in runs
            if (run["split"], run["shelf"], run["seed"]) == (*CONFIRMED[:2], CONFIRMED[3]) and run["method"] == method
        )
        needed = 1 + [np.mean(classes) >= 0.55 for _, classes in run["rounds"]].index(True)
        args = ("--dataset", folder.name, "--num_rounds", needed + 4 * (method != WAIT), "--seed", CONFIRMED[3])
        server = suite.server(*args, "--time_budget", budget)
        clients = [
            suite.client(cid, "--dataset", folder.name, "--slowdown", SCALE / speed) for cid, speed in enumerate(speeds)
        ]
        server.wait(7200)
        for process in clients:
            process.wait(60)
        rows = suite.history(folder.name)
        times = np.cumsum([row["round_seconds"] for row in rows])
        accuracies = [row["test_accuracy"] for row in rows]
        curves[method] = [[round(seconds, 2), accuracy] for seconds, accuracy in zip(times, accuracies, strict=True)]
    return {"run": CONFIRMED, "scale": SCALE, "curves": curves}


def save(path, results):
    """Write the results, a run a line."""
    runs = ",\n".join(json.dumps(run) for run in results["runs"])
    others = {name: value for name, value in results.items() if name != "runs"}
    others.update(shelves=SHELVES, measuring=MEASURING)
    path.write_text(json.dumps(others)[:-1] + f',\n"runs": [\n{runs}\n]}}\n', encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--confirm", action="store_true")
    args = parse_names(parser, "method", METHODS)
    leave_on_signals()
    path = HERE / "mixed.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"about": about_this_run(), "runs": []}
    done = {(run["split"], run["shelf"], run["method"], run["seed"]) for run in results["runs"]}
    with BenchSuite() as suite:
        subprocess.run([sys.executable, BUILD_ARCHIVE, suite.root], check=True, stdout=sys.stderr)
        if args.confirm:
            results["confirmed"] = confirm(suite, partition(suite, CONFIRMED[0], CONFIRMED[3]), results["runs"])
            save(path, results)
        for split, shelf, method, seed in [] if args.confirm else tasks():
            if (split, shelf, method, seed) in done or (args.names and method not in args.names):
                continue
            folder = partition(suite, split, seed)
            results["runs"].append(train(folder, split, shelf, method, seed))
            save(path, results)
    report.main()


if __name__ == "__main__":
    main()
