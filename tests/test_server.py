"""Partition, server and three clients as real processes, on real images, and what they leave."""

import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import Suite, as_logged, wandb_folders, wandb_history

COLUMNS = (
    "round fit_loss fit_accuracy eval_loss eval_accuracy global_eval_loss global_eval_accuracy "
    "test_loss test_accuracy clients failures round_seconds finished_at bytes_down bytes_up"
).split()


@pytest.fixture(scope="module")
def trained(cifar10, tmp_path_factory):
    """A suite in which three clients have trained for three rounds on 3,000 images of CIFAR-10."""
    suite = Suite(tmp_path_factory.mktemp("end_to_end"))
    subprocess.run([sys.executable, cifar10 / "build_archive", suite.root, "300"], check=True, timeout=60)
    suite.partition("--source", suite.root / "cifar-10-python.tar.gz", "--num_clients", 3)
    suite.trained = suite.server("--num_clients", 3, "--num_rounds", 3)
    suite.clients = [suite.client(cid) for cid in range(3)]
    assert suite.trained.wait(120) == 0, suite.trained
    assert [client.wait(20) for client in suite.clients] == [0, 0, 0]
    yield suite
    suite.close()


def test_history_has_a_row_a_round_with_every_figure(trained):
    history = pd.read_csv(trained.ckps("CIFAR10") / "history.csv")
    assert list(history.columns) == COLUMNS
    assert list(history["round"]) == [1, 2, 3]
    assert np.isfinite(history.drop(columns="finished_at").to_numpy()).all() and history["finished_at"].notna().all()
    assert (history["clients"] == 3).all() and (history["failures"] == 0).all()
    assert history["fit_loss"].is_monotonic_decreasing
    assert history["test_accuracy"].iloc[-1] > 0.2  # ten classes: chance is 0.1


def test_checkpoint_alone_is_enough_to_repeat_the_test(trained):
    sys.path.insert(0, str(trained.root))
    from nets import load_checkpoint

    folder = trained.root / "datasets" / "CIFAR10"
    model, checkpoint = load_checkpoint(trained.ckps("CIFAR10") / "server.ptl")
    history = pd.read_csv(trained.ckps("CIFAR10") / "history.csv")
    assert checkpoint["round"] == 3 and checkpoint["dataset"] == "CIFAR10" and checkpoint["net"] == "LeNet5"
    assert checkpoint["classes"][0] == "airplane" and checkpoint["num_classes"] == 10
    table = pd.read_csv(folder / "test.csv")
    images = np.stack([np.load(folder / "test" / f"{image_id}.npy") for image_id in table["id"]])
    with torch.no_grad():
        logits = model(torch.tensor(images.transpose(0, 3, 1, 2) / np.float32(255)))
    accuracy = (logits.argmax(1).numpy() == table["label"]).mean()
    assert accuracy == pytest.approx(history["test_accuracy"].iloc[-1], abs=1e-6)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(table["label"].to_numpy())).item()
    assert loss == pytest.approx(history["test_loss"].iloc[-1], rel=1e-4)


def test_best_checkpoint_is_of_the_best_round(trained):
    best = torch.load(trained.ckps("CIFAR10") / "best.ptl", weights_only=True)
    history = pd.read_csv(trained.ckps("CIFAR10") / "history.csv")
    assert best["metrics"]["test_accuracy"] == history["test_accuracy"].max()
    assert best["round"] == history["round"][history["test_accuracy"].idxmax()]


def test_wandb_has_the_same_curves(trained):
    (folder,) = wandb_folders(trained)
    steps = pd.DataFrame(wandb_history(folder))
    history = as_logged(pd.read_csv(trained.ckps("CIFAR10") / "history.csv"))
    assert list(steps["_step"]) == list(steps["round"]) == [1, 2, 3]
    for name in history.columns[1:]:
        assert list(steps[name]) == pytest.approx(list(history[name])), name
    for cid in range(3):
        assert steps[f"clients/{cid}/fit_loss"].notna().all()


def test_devices_leave_their_own_checkpoints(trained):
    for cid in range(3):
        checkpoint = torch.load(trained.ckps("CIFAR10") / f"client_{cid}.ptl", weights_only=True)
        assert checkpoint["round"] == 3 and checkpoint["dataset"] == "CIFAR10"
        assert checkpoint["metrics"]["fit_loss"] > 0


def test_nothing_but_our_own_short_lines_is_shown(trained):
    for process in [trained.trained, *trained.clients]:
        assert process.err == ""
        said = [line for line in process.out.splitlines() if not line.startswith("on ")]  # that one names versions
        for word in ("deprecat", "Traceback", "INFO", "flwr", "Flower"):
            assert not any(word in line for line in said)
    assert trained.trained.out.count("\n") < 20
    assert "model:" in trained.trained.out and "wandb sync" in trained.trained.out


def test_picture_is_drawn(trained):
    picture = cv2.imread(str(trained.ckps("CIFAR10") / "metrics.png"))
    assert picture.shape[0] > 300 and picture.shape[1] > 800 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 8


def test_the_strategy_that_is_asked_for_makes_the_global_model(tiny):
    server = tiny.server("--dataset", "Tiny", "--num_clients", 3, "--num_rounds", 2, "--strategy", "FedMedian")
    clients = [tiny.client(cid, "--dataset", "Tiny") for cid in range(3)]
    assert server.wait(120) == 0 and [client.wait(20) for client in clients] == [0, 0, 0], server
    assert list(pd.read_csv(tiny.ckps("Tiny") / "history.csv")["clients"]) == [3, 3]
    local = [torch.load(tiny.ckps("Tiny") / f"client_{cid}.ptl", weights_only=True)["model"] for cid in range(3)]
    for name, tensor in torch.load(tiny.ckps("Tiny") / "server.ptl", weights_only=True)["model"].items():
        median = np.median([model[name].numpy() for model in local], axis=0)
        assert tensor.dtype == local[0][name].dtype
        np.testing.assert_allclose(tensor.numpy(), median, rtol=1e-6)


def test_a_strategy_that_needs_more_clients_says_so(tiny):
    for args in (["--num_clients", 2], ["--num_clients", 3, "--min_clients", 2]):
        process = tiny.run("server.py", "--dataset", "Tiny", "--strategy", "Krum", *args)
        assert process.popen.returncode == 2 and process.err.count("\n") == 1
        assert "--strategy Krum needs rounds of 3 clients or more" in process.err


def seeded_history(suite, *args):
    """The rows of a run of two rounds with two clients, without the times."""
    server = suite.server("--dataset", "Tiny", "--num_clients", 2, "--num_rounds", 2, *args)
    clients = [suite.client(cid, "--dataset", "Tiny") for cid in range(2)]
    assert [process.wait() for process in (server, *clients)] == [0, 0, 0]
    return pd.read_csv(suite.ckps("Tiny") / "history.csv").drop(
        columns=["round_seconds", "finished_at", "bytes_down", "bytes_up"]
    )


def test_seed_makes_a_run_reproducible(tiny):
    first, second, other, unseeded = (
        seeded_history(tiny, *args) for args in (["--seed", 7], ["--seed", 7], ["--seed", 8], [])
    )
    np.testing.assert_allclose(first, second, rtol=1e-5)
    for different in (other, unseeded):
        assert (first["fit_loss"] != different["fit_loss"]).all()


def test_order_of_the_images_differs_per_round_and_per_device(monkeypatch):
    from plumbing.device.task import Task

    import client

    seeds = []
    monkeypatch.setattr(client, "client_fit_fn", lambda *args, seed, **kwargs: seeds.append(seed) or {})
    monkeypatch.setattr(client.Client, "set_parameters", lambda *args: None)
    monkeypatch.setattr(client.Client, "get_parameters", lambda *args: [])
    for cid in (0, 1):
        device = client.Client(Task(None, {"fit": type("Loader", (), {"dataset": [0]})}), properties={"cid": cid})
        for current in (1, 2, 1):
            device.fit([], {"round": current, "seed": 7})
    assert seeds[0] == seeds[2] and seeds[3] == seeds[5] and len(set(seeds)) == 4
