"""deploy/simulate.py for real, with Ray: the same history as by the scripts, --resume to and fro, Ctrl-C, mistakes."""

import contextlib
import signal
import time

import cv2
import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import NUM_ROUNDS, SAME, compare, train_by_scripts
from helpers import history, lines, tree, wait_until, wandb_folders, wandb_steps


def simulate(suite, *args):
    return suite.start("deploy/simulate.py", "--dataset", "Tiny", *SAME, *args)


def left_over(suite):
    """Names of the processes of Flower, Ray and wandb that run for this suite, but zombies."""
    names = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FLWR_HOME_OF_TEST") == str(suite.root) and process.status() != "zombie":
                names.append(" ".join(process.cmdline())[:80])
        except psutil.Error:
            continue
    return names


@pytest.fixture
def app(app):
    app.env["FLWR_HOME_OF_TEST"] = str(app.root)
    yield app
    assert not left_over(app)


def test_the_same_run_and_on_from_it(app, by_scripts):
    run = simulate(app, "--num_rounds", NUM_ROUNDS)
    assert run.wait(180) == 0, run
    compare(by_scripts, history(app), "simulation")
    assert len(lines(run, f"round {NUM_ROUNDS}/{NUM_ROUNDS}  fit_loss")) == 1 and "Traceback" not in run.out + run.err
    assert wandb_steps(wandb_folders(app)[0]) == list(range(1, NUM_ROUNDS + 1))
    clients = pd.read_csv(app.ckps("Tiny") / "clients.csv")
    assert sorted(set(clients["cid"])) == [0, 1, 2, 3] and len(clients) == 4 * NUM_ROUNDS
    assert {path.name for path in app.ckps("Tiny").glob("*.p*")} == {
        *("server.ptl", "best.ptl", "metrics.png", "confusion.png", "devices.png")
    }

    train_by_scripts(app, NUM_ROUNDS + 1, "--resume")
    run = simulate(app, "--num_rounds", NUM_ROUNDS + 2, "--resume", "--fraction_fit", 0.5)
    assert run.wait(180) == 0, run
    table = history(app)
    assert list(table["round"]) == list(range(1, NUM_ROUNDS + 3)) and list(table["clients"][-2:]) == [4, 2]
    pd.testing.assert_frame_equal(
        table[:NUM_ROUNDS][by_scripts.columns[:9]], by_scripts[by_scripts.columns[:9]], atol=1e-3
    )


def test_ctrl_c_leaves_nothing_behind(app):
    run = simulate(app, "--num_rounds", 1000)
    run.wait_for("round 2/1000", 120)
    assert any("ray" in name for name in left_over(app))
    run.send(signal.SIGINT)
    assert run.wait(30) == 130, run
    wait_until("all are gone", lambda: not left_over(app), 10)
    assert len(history(app)) >= 2


def test_run_that_flower_gives_up_before_it_has_started_is_started_again(app):
    run = simulate(app, "--num_rounds", 1)
    frozen = []

    def freeze():
        for process in psutil.Process(run.popen.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if any("flwr-simulation" in word for word in process.cmdline()):
                    process.suspend()
                    frozen.append(process)
        return frozen

    wait_until("Flower starts the simulation", freeze, 60)
    time.sleep(32)  # Flower waits 30 s
    for process in frozen:
        process.resume()
    assert run.wait(180) == 0 and len(lines(run, "round 1/1  fit_loss")) == 1, run
    assert list(history(app)["round"]) == [1]


def test_another_number_of_clients_is_split_as_the_first_was(app, tmp_path):
    source = tmp_path / "images"  # without a test set of its own
    for number in range(60):
        (source / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(source / "ab"[number % 2] / f"{number}.png"), np.full((40, 40, 3), 4 * number, np.uint8))
    args = ["--partition", "dirichlet", "--alpha", 5, "--seed", 3, "--eval_fraction", 0.3, "--test_fraction", 0.5]
    args += ["--image_size", 32, "--fit", "crop", "--source", source]
    app.partition("--dataset", "Other", "--num_clients", 2, *args)
    run = app.start("deploy/simulate.py", "--dataset", "Other", "--num_clients", 3, "--num_rounds", 1)
    assert run.wait(180) == 0 and list(history(app, "Other")["clients"]) == [3], run
    cut = {name: content for name, content in tree(app.root / "datasets/Other").items() if name.endswith("csv")}
    app.partition("--dataset", "Other", "--num_clients", 3, *args)
    after = tree(app.root / "datasets/Other")
    assert len(cut) == 4 and {name: after[name] for name in cut} == cut


def test_mistakes_end_it_in_one_line(app):
    (app.root / "datasets/Tiny/bundles").mkdir()
    before = tree(app.root / "datasets")
    for args, words in (
        (["--num_clients", "5"], "Tiny is split into 4 shards, and devices may have its bundles"),
        (["--num_rounds", "x"], "x is not a whole number"),
        (["--round_timeout", "9"], "--round_timeout has no effect in a simulation"),
        (["--server_port", "99"], "--server_port has no effect in a simulation"),
        (["--num_rounds", "1", "--resume", "nowhere"], "cannot resume from /nowhere: there is no server.ptl in it"),
    ):
        run = simulate(app, *args)
        assert run.wait(120) == 2 and len(run.err.splitlines()) == 1 and words in run.err, run
        assert "Traceback" not in run.out, run
    assert tree(app.root / "datasets") == before
