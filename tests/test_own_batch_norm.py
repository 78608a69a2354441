"""Batch norm that stays on the device (--fedbn): kept through kills, resumes and damage."""

import os
import re
import signal

from plumbing.common.state import get_arrays
from plumbing.device.own_batch_norm import OwnBatchNorm
from plumbing.device.task import Task

import numpy as np
import pytest
import torch
from helpers import start_patched, wait_until

import client
from data import BatchLoader
from nets import LeNet5

NORM = re.compile(r"layer[12]\.1\.")  # what belongs to batch norm in LeNet5's state dict


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
