"""A shelf of unequal boards: what each trains in a round's time (--time_budget), and --slowdown."""

import dataclasses
import signal
import statistics
import time

from plumbing.device.pace import Paced
from plumbing.device.task import Task
from plumbing.laptop.budget import Budget, Fit, plan_steps

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from helpers import history, lines, new_suite, start_patched

import client
import nets
from data import BatchLoader, Steps, batch_sizes, load_shard


class Images:
    """A dataset of which each image is its own number."""

    def __init__(self, count):
        self.images = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1)
        self.labels = torch.arange(count)

    def __len__(self):
        return len(self.images)


def ids(steps):
    return [labels.tolist() for _, labels in steps]


@pytest.mark.parametrize("count", [20, 25, 2])  # batches of 8: 8 8 4, 8 8 9 and 2
def test_steps_go_on_where_they_were_in_an_order_of_seed_and_pass_alone(count):
    loader = BatchLoader(Images(count), 8, shuffle=True)
    in_one = ids(Steps(loader, 0, 3 * len(loader), (7, 2)))
    assert [len(batch) for batch in in_one] == 3 * batch_sizes(count, 8)
    passes = [sum(in_one[first : first + len(loader)], []) for first in range(0, len(in_one), len(loader))]
    assert all(sorted(order) == list(range(count)) for order in passes)
    torch.manual_seed(time.time_ns())
    pieces = [ids(Steps(loader, step, 1, (7, 2))) for step in range(len(in_one))]
    assert sum(pieces, []) == in_one
    if count > 2:
        assert passes[0] != passes[1] != passes[2]
        assert ids(Steps(loader, 0, len(loader), (8, 2))) != in_one[: len(loader)] != ids(Steps(loader, 0, 3, (7, 1)))


def fits(*pairs, images=32, rest=0.0, first=0):
    """The fits of a device, of (steps, seconds of a step) each, `rest` seconds beside them."""
    return [
        Fit(steps, steps * images, steps * seconds + rest, images / seconds, current, first + steps)
        for current, (steps, seconds) in enumerate(pairs, 1)
    ]


BATCHES = {"0": 25, "1": 25, "2": 25, "3": 25}
UNEQUAL = {"0": fits((25, 1.0)), "1": fits((25, 1.0), rest=2), "2": fits((25, 2.0)), "3": fits((25, 4.0), rest=8)}


@pytest.mark.parametrize(
    "seconds, num_epochs, known, numbers",
    [
        ("auto", 1, {}, [25, 25, 25, 25]),  # nobody is timed
        ("auto", 1, UNEQUAL, [25, 25, 13, 4]),  # cid 1's 27 s, of which cid 3 has 8 beside its steps
        ("auto", 2, UNEQUAL, [50, 50, 26, 11]),  # 52 s
        (40, 2, UNEQUAL, [40, 38, 20, 8]),
        (1e9, 2, UNEQUAL, [50, 50, 50, 50]),
        (0.1, 2, UNEQUAL, [1, 1, 1, 1]),
        (40, 2, {"3": UNEQUAL["3"]}, [25, 25, 25, 8]),
        ("auto", 1, {"0": fits((25, 9.0), (25, 1.0), (25, 1.0)), "3": fits((25, 5.0))}, [25, 25, 25, 5]),
        ("auto", 1, {"0": fits((25, 1.0), (25, 3.0), (25, 3.0)), "3": fits((25, 5.0))}, [25, 25, 25, 15]),
    ],
)
def test_each_device_gets_the_steps_that_fit_into_the_time(seconds, num_epochs, known, numbers):
    plan = plan_steps(seconds, num_epochs, known, BATCHES)
    assert [num_steps for _, num_steps in plan.values()] == numbers
    assert [first for first, _ in plan.values()] == [
        known[cid][-1].next_step if known.get(cid) else 0 for cid in BATCHES
    ]


@dataclasses.dataclass
class Device:
    cid: str
    properties: dict


def test_budget_knows_the_rounds_before_those_of_the_resumed_run_too_and_forgets_what_is_run_again():
    device = Device("3", {"num_fit": 800})
    row = {"steps": 25.0, "images": 800.0, "fit_seconds": 100.0, "images_per_second": 8.0}
    damaged = [{"steps": 9.0}, {**row, "steps": float("nan")}, {**row, "images_per_second": 0.0}]
    rows = [{"round": 1, "cid": "3", **row}, *({"round": 2, "cid": "3", **each} for each in damaged)]
    budget = Budget(41, 1, lambda num_images: num_images // 32, rows)

    def ask(current):
        ((asked, ins),) = budget.divide(current, [(device, FitIns(None, {"lr": 0.1, "num_epochs": 3}))], {"3": device})
        assert asked is device and ins.config["lr"] == 0.1 and ins.config["num_epochs"] == 1
        return ins.config["first_step"], ins.config["num_steps"]

    assert ask(2) == (25, 10)
    budget.note(2, {"3": {**row, "steps": 10, "images": 320, "fit_seconds": 40.0}})
    assert ask(3) == (35, 10) and ask(3) == (35, 10)
    assert ask(2) == (25, 10)  # the run went back


def test_slow_device_takes_its_time_and_tells_it():
    class Work:
        def __len__(self):
            return 5

        def __iter__(self):
            for _ in range(5):
                time.sleep(0.01)
                yield torch.zeros(8, 1), torch.zeros(8)

    def run(slowdown):
        paced, started = Paced(Work(), slowdown), time.monotonic()
        for _ in paced:
            time.sleep(0.02)
        seconds = time.monotonic() - started
        told = paced.telemetry()
        assert told.pop("images_per_second") == pytest.approx(40 / seconds, rel=0.1)
        assert len(paced) == 5 and (told.pop("steps"), told.pop("images")) == (5, 40)
        return seconds, told

    (fast, told), (slow, slow_told) = run(1), run(4)
    assert 3 < slow / fast < 6 and (told, slow_told) == ({}, {"slowdown": 4})


def test_under_the_simulation_engine_the_same_steps_give_the_same_numbers(three_shards, monkeypatch, tmp_path):
    @dataclasses.dataclass
    class Context:
        node_config: dict
        run_config: dict

    (tmp_path / "datasets").symlink_to(three_shards)
    loaders, info = load_shard(three_shards / "Tiny", 1, "cpu")
    model = nets.build_net("LeNet5", 3, 10)
    start = ndarrays_to_parameters(nets.get_arrays(model))
    config = {"round": 3, "seed": 5, "num_epochs": 1, "first_step": 7, "num_steps": 4, "lr": 1e-3}
    about = {"classes": info["classes"], "dataset_id": info["id"]}
    by_script = client.Client(Task(model, loaders, about), properties={"cid": 1}).to_client().fit(FitIns(start, config))
    context = Context({"partition-id": 1}, {"dataset": "Tiny", "folder": str(tmp_path)})
    config.update(net="LeNet5", dataset_id=info["id"])
    simulated = client.client_fn(context).fit(FitIns(start, config))
    for ours, theirs in zip(*(parameters_to_ndarrays(res.parameters) for res in (by_script, simulated)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert simulated.metrics["steps"] == 4 and simulated.metrics["images"] == 4 * 32
    assert simulated.num_examples == len(loaders["fit"].dataset) == 160


# ---------------------------------------------------------------------------------------------------------------------
# Three clients as processes, one of them slowed down; server and slow client are killed in between.

SHOW = """
from data import BatchLoader, batch_sizes
import time
take = BatchLoader.take
def shown(self, order, first=0):
    parts = order.split(batch_sizes(len(self.dataset), self.batch_size))[first:]
    for part, batch in zip(parts, take(self, order, first)):
        if self.shuffle:
            print("trained on", *part.tolist(), flush=True)
            time.sleep(0.05)
        yield batch
BatchLoader.take = shown
"""
ROUNDS, KILLED, SEED = 7, 3, 11


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, three_shards):
    suite = new_suite(tmp_path_factory.mktemp("shelf"), three_shards)
    flags = ("--num_rounds", ROUNDS, "--time_budget", "auto", "--seed", SEED)
    slow = ("client", SHOW, "--cid", 2, "--num_threads", 1, "--slowdown", 4)
    try:
        server = suite.server("--dataset", "Tiny", *flags)
        fast = [start_patched(suite, "client", SHOW, "--cid", cid, "--num_threads", 1) for cid in (0, 1)]
        first = start_patched(suite, *slow)
        server.wait_for(f"round {KILLED}/{ROUNDS}")
        for process in (server, first):
            process.send(signal.SIGKILL)
            process.wait()
        again, second = suite.server("--dataset", "Tiny", *flags, "--resume"), start_patched(suite, *slow)
        assert [process.wait() for process in (again, second, *fast)] == [0, 0, 0, 0], again
        suite.server_again, suite.slow, suite.fast = again, (first, second), fast
        suite.table = pd.read_csv(suite.ckps("Tiny") / "clients.csv").set_index(["cid", "round"]).sort_index()
        yield suite
    finally:
        suite.close()


def trained_on(processes, table):
    """The batches of each finished round, {round: [[index, …], …]}, as a client has printed them."""
    batches, found = [], {}
    for line in "".join(process.out for process in processes).splitlines():
        if line.startswith("trained on "):
            batches.append([int(word) for word in line.split()[2:]])
        elif line.startswith("round "):
            current = int(line.split()[1].split("/")[0])
            found[current] = batches[-int(table.loc[current, "steps"]) :]  # after those of a fit that was killed
            batches = []
    return found


def test_round_lasts_as_long_as_a_fast_device_takes(shelf):
    seconds = shelf.table["fit_seconds"]
    fast = [statistics.median(max(seconds[0, current], seconds[1, current]) for current in range(2, ROUNDS + 1))]
    late = [seconds[2, current] for current in range(2, ROUNDS + 1)]
    assert seconds[2, 1] > 2 * max(seconds[0, 1], seconds[1, 1])  # nobody was timed, all waited
    assert statistics.median(late) < 1.8 * fast[0]
    assert (shelf.table.loc[2, "slowdown"] == 4).all() and shelf.table.loc[0, "slowdown"].isna().all()
    assert len(lines(shelf.server_again, "slowed down 4.0 times, 160 fit")) == 1
    assert len(lines(shelf.server_again, "% of its images per round")) == 1


def test_all_images_of_a_slow_device_are_trained_on_in_turn_whoever_was_killed(shelf):
    for cid, processes in ((2, shelf.slow), (0, shelf.fast[:1])):
        table = shelf.table.loc[cid]
        assert list(table.index) == list(range(1, ROUNDS + 1))
        found = trained_on(processes, table)
        loader = BatchLoader(Images(160), 32, shuffle=True)
        expected = ids(Steps(loader, 0, int(table["steps"].sum()), (SEED, cid)))
        assert sum((found[current] for current in sorted(found)), []) == expected
        assert sorted(sum(expected[5:10], [])) == list(range(160)) and len(expected) >= 10
    assert list(history(shelf)["round"]) == list(range(1, ROUNDS + 1))
