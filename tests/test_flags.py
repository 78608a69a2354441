"""Options of server.py: who trains in a round, FedProx and a median, when a run ends, what is refused."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

from libs import UserError
from plumbing.laptop import rounds
from plumbing.laptop.start import count_clients

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Suite, history, lines, start_patched

import server
from nets import LeNet5, load_checkpoint, predict
from strategies import STRATEGIES, FedAvg

NORM = re.compile(r"layer[12]\.1\.")  # what belongs to batch norm in LeNet5's state dict


def pixels(suite):
    """The values of all training images, in 0..1."""
    return np.stack([np.load(path) for path in (suite.root / "datasets" / "Tiny" / "train").iterdir()]) / 255


@pytest.fixture(scope="module")
def skewed(tmp_path_factory, three_shards):
    """A suite in which two of three clients at a time have trained GroupNet, with FedProx, a median and a resume."""
    suite = Suite(tmp_path_factory.mktemp("skewed"))
    shutil.copytree(three_shards, suite.root / "datasets")
    path = suite.root / "datasets" / "Tiny" / "dataset.json"
    info, values = json.loads(path.read_text()), pixels(suite)
    info.setdefault("mean", values.mean((0, 1, 2)).tolist())
    info.setdefault("std", values.std((0, 1, 2)).tolist())
    path.write_text(json.dumps(info))
    args = ("--dataset", "Tiny", "--net", "GroupNet", "--fraction_fit", 0.67, "--seed", 7)
    args += ("--strategy", "FedMedian", "--proximal_mu", 0.1)
    suite.laptops = []
    for extra in (["--num_rounds", 2], ["--num_rounds", 5, "--resume", "--no-augment"]):
        laptop = suite.server(*args, *extra)
        devices = [suite.client(cid, "--dataset", "Tiny") for cid in range(3)]
        assert [process.wait() for process in (laptop, *devices)] == [0, 0, 0, 0], laptop
        suite.laptops.append(laptop)
    yield suite
    suite.close()


def test_group_net_trains_is_resumed_and_its_checkpoint_alone_is_as_right_as_the_test_says(skewed):
    note = "training images are shifted, and half of them mirrored"
    assert [len(lines(laptop, note)) for laptop in skewed.laptops] == [1, 0]
    rows = history(skewed)
    assert list(rows["round"]) == [1, 2, 3, 4, 5] and list(rows["failures"]) == [0] * 5
    model, checkpoint = load_checkpoint(skewed.ckps("Tiny") / "server.ptl")
    assert checkpoint["args"]["augment"] is False and checkpoint["args"]["proximal_mu"] == 0.1

    folder = skewed.root / "datasets" / "Tiny"
    values = pixels(skewed)
    for name, expected in (("input_mean", values.mean((0, 1, 2))), ("input_std", values.std((0, 1, 2)))):
        assert checkpoint["model"][name].flatten().tolist() == pytest.approx(expected, abs=1e-4)
    table = pd.read_csv(folder / "test.csv")
    said = [predict(model, checkpoint, np.load(folder / "test" / f"{name}.npy"))[0] for name in table["id"]]
    right = np.mean([word == checkpoint["classes"][label] for word, label in zip(said, table["label"], strict=True)])
    assert right == pytest.approx(rows["test_accuracy"].iloc[-1], abs=1e-6)


class Manager:
    """Clients by cid, as Flower's strategies ask for them."""

    def __init__(self, cids):
        self.clients = [type("Proxy", (), {"cid": str(cid)})() for cid in cids]

    def num_available(self):
        return len(self.clients)

    def sample(self, num_clients, min_num_clients=None, criterion=None):
        return self.clients[:num_clients]


def draws(tmp_path, cids=range(10), rounds=range(1, 201), num_drawn=3, seed=None, cls=FedAvg):
    """The cids that train in each of the rounds."""
    strategy = cls(LeNet5(1, 2), tmp_path / "server.ptl", num_drawn=num_drawn, seed=seed, min_available_clients=1)
    strategy.close()
    asked = [strategy.configure_fit(current, None, Manager(cids)) for current in rounds]
    return [[int(proxy.cid) for proxy, _ in instructions] for instructions in asked]


@pytest.mark.parametrize("name", STRATEGIES)
def test_draw_is_even_anew_each_round_and_repeated_by_its_seed(tmp_path, name):
    drawn = draws(tmp_path, seed=7, cls=STRATEGIES[name])
    assert all(len(set(cids)) == 3 and cids == sorted(cids) for cids in drawn)
    counts = np.bincount(np.ravel(drawn), minlength=10)
    assert counts.sum() == 600 and counts.min() > 35 and counts.max() < 90  # 60 each, ± 6.5
    assert len({tuple(cids) for cids in drawn}) > 60  # of 120
    assert drawn == draws(tmp_path, seed=7, cls=STRATEGIES[name])
    assert drawn[100:] == draws(tmp_path, seed=7, rounds=range(101, 201))  # a resume
    assert drawn != draws(tmp_path, seed=8)
    assert draws(tmp_path) != draws(tmp_path)
    assert draws(tmp_path, num_drawn=None, rounds=[1]) == [list(range(10))]


def test_draw_is_the_same_for_those_who_are_there(tmp_path):
    whole = draws(tmp_path, seed=7)
    for one, other in zip(whole, draws(tmp_path, cids=[0, 1, 2, 3, 5, 6, 7, 8, 9], seed=7), strict=True):
        assert one == other if 4 not in one else len(set(one) & set(other)) == 2  # one stands in for it
    assert draws(tmp_path, cids=[4, 8], rounds=[1], seed=7) == [[4, 8]]


def test_a_round_in_which_nobody_trained_is_run_again_with_others(tmp_path):
    drawn = draws(tmp_path, rounds=[5] * 20, num_drawn=1, seed=7)
    assert len({cids[0] for cids in drawn}) > 4
    assert drawn[0] == draws(tmp_path, rounds=[5], num_drawn=1, seed=7)[0]


def test_those_who_do_not_train_still_evaluate(skewed):
    rows, table = history(skewed), pd.read_csv(skewed.ckps("Tiny") / "clients.csv")
    assert list(rows["clients"]) == [2] * 5 and list(rows["failures"]) == [0] * 5
    assert list(table["cid"]) == [0, 1, 2] * 5
    assert table["global_eval_loss"].notna().all()
    fits = table[table["examples"].notna()]
    drawn = [sorted(part["cid"]) for _, part in fits.groupby("round")]
    assert drawn == draws(skewed.root, range(3), range(1, 6), 2, seed=7)
    assert fits["fit_loss"].notna().all() and table["fit_loss"].notna().sum() == 10
    for current, part in table.groupby("round"):
        assert rows["global_eval_loss"][current - 1] == pytest.approx(part["global_eval_loss"].mean(), rel=1e-5)
    for cid in range(3):
        (line,) = lines(skewed.laptops[-1], f"cid {cid}: ")
        assert f"cid {cid}: {sum(cid in cids for cids in drawn)} of 5 rounds" in line
    shares = [int(share) for share in re.findall(r"the slowest in (\d+)%", skewed.laptops[-1].out)]
    assert sum(share * sum(cid in cids for cids in drawn) / 100 for cid, share in enumerate(shares)) == pytest.approx(
        5, abs=0.1
    )


# ---------------------------------------------------------------------------------------------------------------------
# When the run ends.

ACCURACIES = """
import time
from plumbing.laptop import record
accuracies = [0.9, 0.2, 0.8, 0.8, 0.7, 0.8, 0.8, 0.95, 0.1, 0.1, 0.1, 0.1]
real_test = record.Record._test

def test(self, finished):
    real_test(self, finished)
    time.sleep(0.5)  # longer than a round takes
    finished.row["test_accuracy"] = accuracies[finished.row["round"] - 1]

record.Record._test = test
"""


def test_run_ends_well_once_the_target_has_lasted_also_across_a_resume(tiny):
    def start(*args):
        return start_patched(tiny, "server", ACCURACIES, "--num_clients", 1, "--target_accuracy", 0.8, *args)

    laptop, device = start("--num_rounds", 7), tiny.client(0, "--dataset", "Tiny")  # two of the three rounds
    assert [laptop.wait(), device.wait()] == [0, 0] and not lines(laptop, "was 0.8 or more"), laptop
    laptop, device = start("--num_rounds", 12, "--resume"), tiny.client(0, "--dataset", "Tiny")
    assert [laptop.wait(), device.wait(10)] == [0, 0] and "training is over" in device.out, laptop
    (line,) = lines(laptop, "test_accuracy was 0.8 or more in the rounds 6 to 8: the run is over")
    assert laptop.out.index("round 8/12") < laptop.out.index(line) and laptop.err == ""
    assert list(history(tiny)["round"]) == list(range(1, 9))
    folder = tiny.ckps("Tiny")
    server, best = (torch.load(folder / name, weights_only=True) for name in ("server.ptl", "best.ptl"))
    assert (server["round"], best["round"]) == (
        8,
        8,
    ) and f"model: {folder / 'server.ptl'}; beside it best.ptl" in laptop.out
    before = {path: path.read_bytes() for path in folder.glob("*.*") if "client_" not in path.name}
    laptop = start("--num_rounds", 12, "--resume")  # as after a kill right before the end
    assert laptop.wait() == 0 and lines(laptop, "rounds 6 to 8: the run is over already"), laptop
    assert {path: path.read_bytes() for path in before} == before


def rows(*accuracies):
    return [{"round": current, "test_accuracy": value} for current, value in enumerate(accuracies, start=1)]


@pytest.mark.parametrize(
    "accuracies, current, reached",
    [
        ([], 0, False),
        ([0.9, 0.9], 2, False),
        ([0.9, 0.9, 0.9], 3, True),
        ([0.5, 0.5, 0.5], 3, True),
        ([0.9, 0.9, 0.499], 3, False),
        ([0.9, 0.9, float("nan")], 3, False),
        ([0.1, 0.1, 0.9, 0.9], 5, None),  # the fifth decides, and is not tested yet
        ([0.1, 0.9, 0.1], 5, False),  # whatever the next two will be
        ([0.1], 4, None),
        ([], 3, None),
    ],
)
def test_target_waits_only_for_tests_that_decide(accuracies, current, reached):
    target = rounds.Target(0.5)
    assert target.is_reached(rows(*accuracies), current) is (reached is True)
    assert target.is_possible(rows(*accuracies), current) is (reached is not False)  # None: the tests decide
    assert not rounds.Target(None).is_possible(rows(*accuracies), current)
    if current > 2:  # tested on another test set
        assert not rounds.Target(0.5, first=current - 1).is_possible(rows(*accuracies), current)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize(
    "flag, values",
    [
        ("--fraction_fit", ["0", "-0.1", "1.01", "nan", "inf", "half"]),
        ("--target_accuracy", ["-0.01", "1.01", "75", "nan", "inf", "best"]),
        ("--proximal_mu", ["-0.1", "nan", "inf", "1e9", "some"]),
    ],
)
def test_value_out_of_range_is_refused(monkeypatch, flag, values):
    for value in values:
        monkeypatch.setattr(sys, "argv", ["server.py", f"{flag}={value}"])
        with pytest.raises(UserError, match=f"argument {flag}: {value} is not a number from"):
            server.main()


@pytest.mark.parametrize(
    "args, reason",
    [
        (["--fedbn", "--net", "GroupNet"], "--fedbn has nothing to keep on the devices: GroupNet has no batch norm"),
        (
            ["--strategy", "Krum", "--num_clients", 3, "--fraction_fit", 0.67],
            "--strategy Krum needs rounds of 3 clients or more; --fraction_fit 0.67 of 3 clients is 2",
        ),
        (
            ["--target_accuracy", 0.5, "--num_rounds", 2],
            "--target_accuracy needs 3 rounds or more, and --num_rounds is 2",
        ),
    ],
)
def test_option_that_cannot_work_is_refused_before_anything_is_touched(tiny, args, reason):
    process = tiny.run("server.py", "--dataset", "Tiny", *args)
    assert process.popen.returncode == 2 and process.err == f"server.py: {reason}\n", process
    assert not tiny.ckps("Tiny").exists()


@pytest.mark.parametrize(
    "fraction, num_clients, expected",
    [(1, 7, 7), (0.5, 5, 2), (0.29, 100, 29), (0.1, 4, 1), (0.7, 10, 7), (0.34, 3, 1)],
)
def test_fraction_is_rounded_down_to_at_least_one(fraction, num_clients, expected):
    args = SimpleNamespace(num_clients=num_clients, min_clients=None, fraction_fit=fraction, strategy="FedAvg")
    assert count_clients(args, None, 1) == expected
