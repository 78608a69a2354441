"""What helps where the data is skewed: GroupNet, batch norm that stays on the device, who trains, when a run ends."""

import json
import os
import re
import shutil
import signal
import sys

from libs import UserError
from plumbing.common.compare import fingerprint, same_trial, trial
from plumbing.common.state import get_arrays
from plumbing.device.own_batch_norm import OwnBatchNorm
from plumbing.device.task import Task
from plumbing.laptop import rounds
from plumbing.laptop.start import count_fits

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Suite, history, lines, start_patched, wait_until

import client
import server
from data import BatchLoader
from nets import GroupNet, LeNet5, load_checkpoint, normalise_input, predict
from strategies import STRATEGIES, FedAvg

NORM = re.compile(r"layer[12]\.1\.")  # what belongs to batch norm in LeNet5's state dict


@pytest.fixture(autouse=True)
def one_thread():
    """As a child of a fork must have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# GroupNet.


@pytest.mark.parametrize("channels, num_classes", [(3, 10), (1, 10), (3, 100)])
def test_group_net_is_small_without_batch_norm_and_each_image_for_itself(channels, num_classes):
    torch.manual_seed(0)
    net = GroupNet(channels, num_classes)
    assert sum(parameter.numel() for parameter in GroupNet(3, 10).parameters()) <= 300_000
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in net.modules())
    images = torch.rand(5, channels, 32, 32)
    together = net.train()(images)
    assert together.shape == (5, num_classes)
    alone = torch.cat([net.eval()(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_group_net_is_told_from_its_like_by_the_handshake(channels):
    def other():
        net = GroupNet(channels, 10)
        next(module for module in net.modules() if isinstance(module, torch.nn.GroupNorm)).num_groups //= 2
        return net

    assert fingerprint(GroupNet(channels, 10)) == fingerprint(other()) != fingerprint(LeNet5(channels, 10))
    assert np.isfinite(trial(GroupNet(channels, 10))[:, 1:]).all()  # nor is anything in it random
    one = trial(GroupNet(channels, 10))
    assert same_trial(one, trial(GroupNet(channels, 10)))
    assert not same_trial(one, trial(other()))


@pytest.mark.parametrize("channels", [1, 3])
def test_input_is_normalised_by_what_the_data_set_says(channels):
    images, mean, std = torch.rand(7, channels, 32, 32), [0.5, 0.25, 0.0][:channels], [0.25, 0.5, 0.0][:channels]
    net = GroupNet(channels, 10)
    usual = net(images)
    normalise_input(net, None, None)  # an old data set
    assert net(images).equal(usual)
    normalise_input(net, mean, std)
    found = dict(net.named_buffers())
    assert found["input_mean"].shape == found["input_std"].shape == (1, channels, 1, 1)
    assert found["input_mean"].dtype == found["input_std"].dtype == torch.float32
    assert found["input_mean"].flatten().tolist() == mean
    assert net(images).isfinite().all()  # also where all images are of one colour
    normalise_input(LeNet5(channels, 10), mean, std)  # which has no such buffers


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


# ---------------------------------------------------------------------------------------------------------------------
# Batch norm that stays on the device.


class Shard:
    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randint(256, (40, 1, 32, 32), generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(40) % 2

    def __len__(self):
        return 40


def device(folder, **about):
    """A client for a shard of its own, which keeps its files in `folder`."""
    shard = Shard(0)
    loaders = {"fit": BatchLoader(shard, 10, shuffle=True), "eval": BatchLoader(shard, 40)}
    about = {"dataset_id": "a cut", **about}
    task = Task(LeNet5(1, 2), loaders, about)
    return client.Client(task, save_ckp_path=folder / "client_0.ptl", properties={"cid": 0})


def fit(one, current, fedbn="run", parameters=None):
    """What the client sends back, by name."""
    parameters = parameters or get_arrays(seeded(0))
    arrays, _, metrics = one.fit(parameters, {"round": current, "seed": 1, "fedbn": fedbn})
    assert "error" not in metrics, metrics
    return dict(zip(one.task.model.state_dict(), arrays, strict=True))


def seeded(seed):
    torch.manual_seed(seed)
    return LeNet5(1, 2)


def starts_from(one, monkeypatch, fedbn="run"):
    """The state in which the client's next training begins, by name; then it ends without one."""
    seen = []

    def look(loaders, model, **kwargs):
        seen.append({name: tensor.numpy().copy() for name, tensor in model.state_dict().items()})
        raise RuntimeError("seen enough")

    with monkeypatch.context() as patch:
        patch.setattr(client, "client_fit_fn", look)
        one.fit(get_arrays(seeded(9)), {"round": 9, "fedbn": fedbn})
    return seen[0]


def norm(arrays):
    return np.concatenate([np.ravel(array) for name, array in arrays.items() if NORM.match(name)])


def rest(arrays):
    return np.concatenate([np.ravel(array) for name, array in arrays.items() if not NORM.match(name)])


GLOBAL = {name: tensor.numpy() for name, tensor in seeded(9).state_dict().items()}


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(kept, file):
    file.write(b"PK\x03\x04half of it")
    file.flush()
    die()


MOMENTS = {  # in the second round, and whether its batch norm is kept by then
    "training": (client, "client_fit_fn", die, False),
    "trained": (OwnBatchNorm, "keep", die, False),
    "writing": (torch, "save", die_half_way, False),
    "renaming": (os, "replace", die, False),
    "written": (client, "sensors", die, True),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_own_batch_norm_survives_a_kill_between_any_two_moments(tmp_path, monkeypatch, moment):
    owner, name, act, kept = MOMENTS[moment]
    twin = device(tmp_path)
    states = [fit(twin, current) for current in (1, 2)]
    (tmp_path / "client_0.bn").unlink()
    pid = os.fork()
    if pid == 0:
        one = device(tmp_path)
        fit(one, 1)
        one.save_ckp_path = None  # the only file is that of batch norm
        setattr(owner, name, act)
        one.fit(get_arrays(seeded(0)), {"round": 2, "seed": 1, "fedbn": "run"})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    start = starts_from(device(tmp_path), monkeypatch)
    np.testing.assert_allclose(norm(start), norm(states[kept]), rtol=0, atol=1e-6)
    assert (rest(start) == rest(GLOBAL)).all()


def test_a_device_begins_with_the_servers_batch_norm_in_another_run_or_cut_or_net(tmp_path, monkeypatch, capsys):
    one = device(tmp_path)
    kept = norm(fit(one, 1, "b a"))
    assert (norm(starts_from(device(tmp_path), monkeypatch, "b a")) == kept).all()
    assert (norm(starts_from(device(tmp_path), monkeypatch, "c b a")) == kept).all()  # a resume of it
    capsys.readouterr()
    for fedbn, about in (("d", {}), ("c a", {}), ("b a", {"dataset_id": "another split"})):
        start = starts_from(device(tmp_path, **about), monkeypatch, fedbn)
        assert (norm(start) == norm(GLOBAL)).all()
        assert "batch norm begins with the server's" in capsys.readouterr().out
    other = device(tmp_path)
    other.task.model = LeNet5(1, 3)
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(client, "client_fit_fn", lambda loaders, model, **kwargs: seen.append(get_arrays(model)) or {})
        other.fit(get_arrays(LeNet5(1, 3)), {"round": 1, "fedbn": "b a"})
    assert not np.isclose(seen[0][4], kept[12:18], atol=1e-6).any()  # layer1.1.running_mean, 0 in a new net
    plain = device(tmp_path)
    plain.fit(get_arrays(seeded(9)), {"round": 1})  # without --fedbn it keeps nothing
    assert (norm(starts_from(device(tmp_path), monkeypatch, "b a")) == kept).all()


def test_two_runs_that_go_on_from_one_keep_their_batch_norms_apart(tmp_path, monkeypatch):
    first = norm(fit(device(tmp_path), 1, "a"))
    one, other = norm(fit(device(tmp_path), 2, "b a")), norm(fit(device(tmp_path), 2, "c a"))
    np.testing.assert_array_equal(one, other)  # both from the same
    assert (one != first).any()
    for branch in range(20):  # many that end before anything is saved
        fit(device(tmp_path), 2, f"d{branch} a")
    assert (norm(starts_from(device(tmp_path), monkeypatch, "e a")) == first).all()
    assert (tmp_path / "client_0.bn").stat().st_size < 100_000


def test_batch_norm_that_has_diverged_or_cannot_be_read_or_written_ends_nothing(tmp_path, monkeypatch, capsys):
    one = device(tmp_path)
    kept = norm(fit(one, 1))
    nonsense = [
        np.full_like(array, np.nan) if array.dtype.kind == "f" else array for array in get_arrays(one.task.model)
    ]
    fit(one, 2, parameters=nonsense)
    assert (norm(starts_from(one, monkeypatch)) == kept).all()
    (tmp_path / "client_0.bn").write_bytes(b"PK\x03\x04half of it")
    assert (norm(starts_from(device(tmp_path), monkeypatch)) == norm(GLOBAL)).all()
    assert "client_0.bn cannot be read" in capsys.readouterr().out
    (tmp_path / "client_0.bn").unlink()
    (tmp_path / ".client_0.bn.part").mkdir()  # nothing can be written under that name now
    kept = norm(fit(one, 3))
    assert (norm(starts_from(one, monkeypatch)) == kept).all()
    assert "batch norm is lost when this process ends" in capsys.readouterr().out


def test_evaluation_is_under_the_devices_own_batch_norm(tmp_path):
    one = device(tmp_path)
    state = fit(one, 1)
    reference = seeded(9)
    reference.load_state_dict(
        {**reference.state_dict(), **{n: torch.tensor(a) for n, a in state.items() if NORM.match(n)}}
    )
    with torch.no_grad():
        logits = reference.eval()(Shard(0).images.float() / 255)
    loss, _, _ = device(tmp_path).evaluate(get_arrays(seeded(9)), {"fedbn": "run"})
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, Shard(0).labels).item(), abs=1e-5)
    plain, _, _ = one.evaluate(get_arrays(seeded(9)), {})
    assert abs(plain - loss) > 1e-4


WATCH = """
import hashlib, re
from plumbing.device import connection
connection.MAX_DELAY = 1
real_fit, real_epoch = script.client_fit_fn, script.run_epoch

def digests(model):
    parts = [hashlib.sha256(), hashlib.sha256()]
    for name, tensor in model.state_dict().items():
        parts[re.match(r"layer[12].1.", name) is None].update(tensor.numpy().tobytes())
    return " ".join(part.hexdigest()[:8] for part in parts)

def fit(loaders, model, *args, about, **kwargs):
    print("seen fit", digests(model), flush=True)
    metrics = real_fit(loaders, model, *args, about=about, **kwargs)
    print("seen end", digests(model), flush=True)
    if about["round"] == KILL:
        import os
        os.kill(os.getpid(), 9)
    return metrics

def epoch(loader, model, device):
    print("seen evaluate", digests(model), flush=True)
    return real_epoch(loader, model, device)

script.client_fit_fn, script.run_epoch = fit, epoch
"""


def watched(suite, cid, kill=0):
    return start_patched(suite, "client", WATCH.replace("KILL", str(kill)), "--num_threads", 1, "--cid", cid)


def seen(process, what=r"\w+"):
    """What a watched client had: [(its batch norm, the rest), …]."""
    return re.findall(f"seen {what} (.*) (.*)", process.out)


def test_batch_norm_stays_on_real_devices_through_kills_and_a_resume(tiny):
    args = ("--dataset", "Tiny", "--num_clients", 2, "--fedbn")
    laptop = tiny.server(*args, "--num_rounds", 1000)
    killed, steady = watched(tiny, 0, kill=2), watched(tiny, 1)
    assert killed.wait() == -signal.SIGKILL
    again = watched(tiny, 0)
    wait_until("some rounds", lambda: len(seen(again, "evaluate")) > 1)
    laptop.kill()
    again.wait_for("lost the server")
    again.kill()
    last = torch.load(tiny.ckps("Tiny") / "server.ptl", weights_only=True)["round"]
    laptop, third = tiny.server(*args, "--resume", "--num_rounds", last + 1), watched(tiny, 0)
    assert [process.wait() for process in (laptop, steady, third)] == [0, 0, 0], laptop

    def was(process):
        return [one for one, _ in seen(process)]

    # each part begins with what the one before has kept: the fit after which the first was killed was not
    assert was(killed)[0] == was(steady)[0]  # the server's
    assert was(again)[0] == seen(killed, "end")[0][0] != was(killed)[0]
    assert was(third)[0] == seen(again, "end")[-1][0]
    for process in (killed, steady, again, third):
        fits, ends = seen(process, "fit"), seen(process, "end")
        assert [one for one, _ in fits[1:]] == [one for one, _ in ends[: len(fits) - 1]]
        assert all(a != b for a, b in zip(fits, ends, strict=False))
    assert set(was(steady)[1:]).isdisjoint(was(again) + was(third))
    assert {other for _, other in seen(third, "fit")} <= {
        other for _, other in seen(steady, "fit")
    }  # the rest is global
    for process in (steady, third):  # the last evaluation
        assert seen(process)[-1][0] == seen(process, "end")[-1][0] and seen(process)[-1][1] == seen(third)[-1][1]

    models = [torch.load(tiny.ckps("Tiny") / f"client_{cid}.ptl", weights_only=True)["model"] for cid in (0, 1)]
    for name, tensor in torch.load(tiny.ckps("Tiny") / "server.ptl", weights_only=True)["model"].items():
        mean = np.mean([model[name].double().numpy() for model in models], 0)  # of shards of one size
        np.testing.assert_allclose(tensor.numpy(), mean, rtol=1e-5, atol=0.5 if tensor.ndim == 0 else 1e-7)

    laptop, new = tiny.server("--dataset", "Tiny", "--num_clients", 1, "--fedbn", "--num_rounds", 1), watched(tiny, 0)
    assert [process.wait() for process in (laptop, new)] == [0, 0], laptop
    assert seen(new, "fit")[0][0] == was(steady)[0]  # in a new run, batch norm as it is before any training


# ---------------------------------------------------------------------------------------------------------------------
# Who trains.


class Manager:
    """Clients by cid, as Flower's strategies ask for them."""

    def __init__(self, cids):
        self.clients = [type("Proxy", (), {"cid": str(cid)})() for cid in cids]

    def num_available(self):
        return len(self.clients)

    def sample(self, num_clients, min_num_clients=None, criterion=None):
        return self.clients[:num_clients]


def draws(tmp_path, cids=range(10), rounds=range(1, 201), num_fit=3, seed=None, cls=FedAvg):
    """The cids that train in each of the rounds."""
    strategy = cls(LeNet5(1, 2), tmp_path / "server.ptl", num_fit=num_fit, seed=seed, min_available_clients=1)
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
    assert draws(tmp_path, num_fit=None, rounds=[1]) == [list(range(10))]


def test_draw_is_the_same_for_those_who_are_there(tmp_path):
    whole = draws(tmp_path, seed=7)
    for one, other in zip(whole, draws(tmp_path, cids=[0, 1, 2, 3, 5, 6, 7, 8, 9], seed=7), strict=True):
        assert one == other if 4 not in one else len(set(one) & set(other)) == 2  # one stands in for it
    assert draws(tmp_path, cids=[4, 8], rounds=[1], seed=7) == [[4, 8]]


def test_a_round_in_which_nobody_trained_is_run_again_with_others(tmp_path):
    drawn = draws(tmp_path, rounds=[5] * 20, num_fit=1, seed=7)
    assert len({cids[0] for cids in drawn}) > 4
    assert drawn[0] == draws(tmp_path, rounds=[5], num_fit=1, seed=7)[0]


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
        assert rows["global_eval_loss"][current - 1] == pytest.approx(part["global_eval_loss"].mean())  # 40 images each
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
    assert count_fits(fraction, num_clients) == expected
