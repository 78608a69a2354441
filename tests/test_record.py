"""The record of a run: what its worker saves, in which order, how it ends, and how a later run goes on from it."""

import os
import shutil
import signal
import threading
import time
import zipfile
from pathlib import Path

from libs import UserError

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import as_logged, start_patched, wandb_history

from nets import LeNet5, get_arrays, save_checkpoint
from record import FILES, Record, logged_steps, move_aside, resume

FIGURES = {"fit_loss": 1.5, "fit_accuracy": 0.4, "eval_loss": 1.6, "eval_accuracy": 0.3, "clients": 2, "failures": 0}


def add(record, current, value=1.0):
    arrays = [np.full(array.shape, value, array.dtype) for array in get_arrays(record.model)]
    record.add({"round": current, **FIGURES}, arrays, {})


def test_after_close_every_round_is_there_and_closing_again_changes_nothing(tmp_path):
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl")
    for current in (1, 2, 3):
        add(record, current, current)
    record.close()
    assert list(pd.read_csv(tmp_path / "history.csv")["round"]) == [1, 2, 3]
    assert torch.load(tmp_path / "server.ptl", weights_only=True)["round"] == 3
    assert (tmp_path / "metrics.png").exists()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    record.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    with pytest.raises(RuntimeError, match="closed"):
        add(record, 4)


def test_the_worker_has_a_name_and_is_gone_after_close(tmp_path):
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl")
    assert "record" in [thread.name for thread in threading.enumerate()]
    record.close()
    assert not record.worker.thread.is_alive()


def test_what_fails_in_the_worker_is_raised_by_all_that_its_caller_calls(tmp_path):
    def log(figures, step):
        raise OSError("no space")

    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", log=log)
    add(record, 1)
    record.worker.thread.join(10)
    for call in (record.check, lambda: add(record, 2), record.close, record.close):
        with pytest.raises(OSError, match="no space"):
            call()


def test_closing_gives_up_on_a_worker_that_hangs(tmp_path, monkeypatch):
    import record as module

    monkeypatch.setattr(module, "STALLED", 0.2)
    release = threading.Event()
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", on_row=lambda row: release.wait(30))
    add(record, 1)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="the record hangs"):
        record.close()
    assert time.monotonic() - started < 5
    monkeypatch.undo()
    release.set()
    record.close()  # it went on after all


@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 1e200, 1e30, 5e-324, 0.0, -1.0])
def test_no_figure_that_a_device_can_send_ends_the_drawing(tmp_path, value):
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl")
    for current in (1, 2):
        arrays = get_arrays(record.model)
        record.add({"round": current, **FIGURES, "fit_loss": value, "eval_loss": value * 0.99}, arrays, {})
    record.close()
    assert (tmp_path / "metrics.png").stat().st_size > 1000
    assert list(pd.read_csv(tmp_path / "history.csv")["fit_loss"]) == [value, value]


# ---------------------------------------------------------------------------------------------------------------------
# A kill between any two writes.

KILL = """
import os, signal, record
record.SAVE_EVERY = 0  # each round by itself, however short

def kill_after(owner, name, when):
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = real(*args, **kwargs)
        if when(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapped)

kill_after({})
"""
ROUND_3 = {
    "test": 'record.Record, "_test", lambda self, finished: finished.row["round"] == 3',
    "history.csv": 'record.History, "extend", lambda self, rows: rows[-1]["round"] >= 3',
    "server.ptl": 'record, "save_checkpoint", lambda path, _, about: (path.name, about["round"]) == ("server.ptl", 3)',
    "best.ptl": 'record, "save_checkpoint", lambda path, _, about: (path.name, about["round"]) == ("best.ptl", 3)',
    "wandb": 'record.Curves, "log", lambda self, figures, step: step == 3',
    "screen": 'record.Progress, "show_row", lambda self, row: row["round"] == 3',
}
RISING = """
import record
accuracy = [0.0]

def test(loaders, model):
    accuracy[0] += 0.01  # so that every round is the best
    return {"test_loss": 1.0, "test_accuracy": accuracy[0] + FIRST}

record.server_test_fn = test
"""


def steps_of(suite):
    """What the folders of wandb hold, by wandb's own reader: {folder: [a step's figures, …]}."""
    return {folder: wandb_history(folder) for folder in sorted((suite.root / "wandb").glob("*run-*"))}


def assert_complete(suite, last):
    """history.csv, both checkpoints and wandb tell the same of the rounds 1 to `last`, each once."""
    folder = suite.ckps("Tiny")
    rows = pd.read_csv(folder / "history.csv")
    assert list(rows["round"]) == list(range(1, last + 1))
    server, best = (torch.load(folder / name, weights_only=True) for name in ("server.ptl", "best.ptl"))
    assert server["round"] == last
    assert best["metrics"]["test_accuracy"] == pytest.approx(rows["test_accuracy"].max())
    assert best["round"] == rows["round"][rows["test_accuracy"].idxmax()]
    folders = steps_of(suite)
    assert {path.name.rpartition("-")[2] for path in folders} == {server["wandb_run_id"]}
    for path, steps in folders.items():
        (file,) = path.glob("*.wandb")
        assert logged_steps(file) == {step["_step"] for step in steps}
    steps = pd.DataFrame([step for steps in folders.values() for step in steps]).sort_values("_step")
    assert list(steps["_step"]) == list(steps["round"]) == list(rows["round"])
    rows = as_logged(rows)
    for name in rows.columns[1:]:
        assert list(steps[name]) == pytest.approx(list(rows[name]), nan_ok=True), name


def prompt_client(suite):
    """A client that tries again every second."""
    return start_patched(suite, "client", "script.MAX_DELAY = 1", "--num_threads", 1, "--cid", 0)


@pytest.mark.parametrize(
    "point, last", [*((point, 5) for point in ROUND_3), ("server.ptl", 3), ("best.ptl", 3), ("wandb", 3)]
)
def test_a_kill_between_any_two_writes_loses_no_round(tiny, point, last):
    args, first = ("--num_clients", 1), prompt_client(tiny)
    rising = RISING.replace("FIRST", "0.1")
    killed = start_patched(tiny, "server", rising + KILL.format(ROUND_3[point]), *args, "--num_rounds", last)
    assert killed.wait(120) == -signal.SIGKILL, killed
    first.kill()
    prompt_client(tiny)
    rising = RISING.replace("FIRST", "0.2" if point != "server.ptl" else "0.0")
    resumed = start_patched(tiny, "server", rising, *args, "--num_rounds", last, "--resume")
    assert resumed.wait(120) == 0, resumed
    assert_complete(tiny, last)


def train(suite, *args, num_rounds):
    server = suite.server("--dataset", "Tiny", "--num_clients", 1, "--num_rounds", num_rounds, *args)
    client = prompt_client(suite)
    assert server.wait(120) == 0 and client.wait(20) == 0, server
    return server


def test_two_runs_that_go_on_from_one_have_complete_curves_each(tiny):
    train(tiny, num_rounds=2)
    train(tiny, num_rounds=2)
    (aside,) = (tiny.root / "ckps").glob("Tiny.*")
    before = {path.name: path.read_bytes() for path in aside.iterdir()}
    for _ in range(2):
        server = train(tiny, "--resume", aside, num_rounds=4)
        run_id = torch.load(tiny.ckps("Tiny") / "server.ptl", weights_only=True)["wandb_run_id"]
        steps = [s["_step"] for path, part in steps_of(tiny).items() if path.name.endswith(run_id) for s in part]
        assert steps == [1, 2, 3, 4], server
        assert list(pd.read_csv(tiny.ckps("Tiny") / "history.csv")["round"]) == [1, 2, 3, 4]
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
        assert (tiny.ckps("Tiny") / "best.ptl").exists()
    assert len(list((tiny.root / "ckps").glob("Tiny.*"))) == 3
    shutil.rmtree(tiny.root / "wandb")  # as `wandb sync --clean` does
    train(tiny, "--resume", num_rounds=5)
    ((_, steps),) = steps_of(tiny).items()
    assert [step["_step"] for step in steps] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------------------------------------------------------------
# The runs before.


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_forgotten_resume_loses_nothing_and_what_is_said_can_be_done(tiny):
    folder = tiny.ckps("Tiny")
    train(tiny, num_rounds=2)
    before = files_in(folder)
    for env in ({}, {"WANDB_MODE": "online"}):  # waiting for clients when it is stopped; refused, since there is no key
        server = tiny.server("--dataset", "Tiny", "--num_clients", 1, env=env)
        if not env:
            server.wait_for("waiting for 1 of 1 clients")
            server.send(signal.SIGINT)
        assert server.wait() == (2 if env else 130), server
        assert files_in(folder) == before and list(folder.parent.iterdir()) == [folder]
        assert "--resume would go on from it" in server.out and "model:" not in server.out
    train(tiny, "--resume", num_rounds=3)
    assert list(pd.read_csv(folder / "history.csv")["round"]) == [1, 2, 3]

    server = train(tiny, num_rounds=1)  # now it is saved
    (aside,) = folder.parent.glob("Tiny.*")
    assert f"to go on from it: --resume {aside}\n" in server.out
    (folder / "server.ptl").unlink()  # as when the new run is killed in its first save
    server = train(tiny, "--resume", num_rounds=1)
    assert (
        f"nothing to resume in {folder}: starting at round 1 (the newest run that was moved aside: --resume "
        in server.out
    )
    train(tiny, "--resume", aside, num_rounds=4)
    assert list(pd.read_csv(folder / "history.csv")["round"]) == [1, 2, 3, 4]
    assert list(pd.read_csv(aside / "history.csv")["round"]) == [1, 2, 3]
    refused = tiny.run("server.py", "--dataset", "Tiny", "--resume", tiny.root)
    assert refused.popen.returncode == 2
    assert refused.err == f"server.py: cannot resume from {tiny.root}: there is no server.ptl in it\n"


@pytest.mark.parametrize("steps", range(2 * len(FILES) + 1))  # a link and an unlink each, and the renaming
def test_moving_aside_survives_a_kill_at_any_file(tmp_path, monkeypatch, steps):
    class Killed(Exception):
        pass

    def counted(real):
        def run(*args, **kwargs):
            if len(done) == steps:
                raise Killed
            done.append(args)
            return real(*args, **kwargs)

        return run

    files, done, folder = {name: name.encode() for name in FILES.values()}, [], tmp_path / "Tiny"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", counted(os.link))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Path, "rename", counted(Path.rename))
        with pytest.raises(Killed):
            move_aside(folder, FILES.values())
    runs = [path.parent for path in tmp_path.glob("[!.]*/server.ptl")]
    assert any({path.name: path.read_bytes() for path in run.iterdir()} == files for run in runs)


def test_two_runs_moved_in_one_second_keep_apart(tmp_path):
    folder = tmp_path / "Tiny"
    folder.mkdir()
    for content in (b"1", b"2", b"3"):
        (folder / "server.ptl").write_bytes(content)
        move_aside(folder, FILES.values())
    assert sorted(path.read_bytes() for path in tmp_path.glob("Tiny.*/server.ptl")) == [b"1", b"2", b"3"]
    assert list(folder.iterdir()) == []


OLD = {"dataset": "D", "classes": ["ant", "bee"], "dataset_id": "1" * 64}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"classes": ["ant", "cat"]}, "classes are others, bee where cat is now"),
        ({"classes": ["bee", "ant"]}, "classes are others, ant where bee is now"),
        ({"dataset_id": "2" * 64}, "its shards or its test set are others"),
        ({}, None),
        ({"dataset_id": None}, None),
        ({"images": {"fit": "crop"}, "args": {"lr": 1}}, None),
    ],
)
def test_other_data_is_refused_unless_it_is_allowed(tmp_path, change, reason):
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", about=OLD)
    add(record, 1)
    record.close()
    for old in (OLD, {**OLD, "dataset_id": None}):
        save_checkpoint(tmp_path / "server.ptl", LeNet5(1, 2), {**old, "round": 1})
        now = {**OLD, **change}
        if reason is None or (old["dataset_id"] is None and "classes" not in change):
            assert len(resume(tmp_path, LeNet5(1, 2), now)[0]) == 1
            continue
        with pytest.raises(UserError, match=f"{reason}.*--allow_new_data"):
            resume(tmp_path, LeNet5(1, 2), now)
        assert len(resume(tmp_path, LeNet5(1, 2), now, allow_new_data=True)[0]) == 1
    for model, dataset in ((LeNet5(1, 3), "D"), (LeNet5(3, 2), "D"), (LeNet5(1, 2), "E")):
        with pytest.raises(UserError) as refused:
            resume(tmp_path, model, {**OLD, "dataset": dataset}, allow_new_data=True)
        assert "--allow_new_data" not in str(refused.value)


def test_best_starts_anew_on_new_data(tiny, shapes_zip):
    folder = tiny.ckps("Tiny")
    train(tiny, num_rounds=1)
    best = torch.load(folder / "best.ptl", weights_only=True)
    torch.save({**best, "metrics": {**best["metrics"], "test_accuracy": 0.99}}, folder / "best.ptl")
    before = files_in(folder)
    renamed = tiny.root / "renamed.zip"
    with zipfile.ZipFile(shapes_zip) as old, zipfile.ZipFile(renamed, "w") as new:
        some_class = old.namelist()[0].split("/")[1]
        for name in old.namelist():
            new.writestr(name.replace(f"/{some_class}/", "/zebra/"), old.read(name))
    tiny.partition("--dataset", "Tiny", "--source", renamed, "--num_clients", 3)
    refused = tiny.run("server.py", "--dataset", "Tiny", "--resume")
    assert refused.popen.returncode == 2 and refused.err.count("\n") == 1, refused
    assert "classes" in refused.err and "--allow_new_data" in refused.err and files_in(folder) == before
    train(tiny, "--resume", "--allow_new_data", num_rounds=2)
    assert list(pd.read_csv(folder / "history.csv")["round"]) == [1, 2]
    best = torch.load(folder / "best.ptl", weights_only=True)
    assert best["round"] == 2 and "zebra" in best["classes"]
    (aside,) = folder.parent.glob("Tiny.*/best.ptl")  # the old one is not lost
    assert torch.load(aside, weights_only=True)["metrics"]["test_accuracy"] == 0.99
    train(tiny, "--resume", num_rounds=3)  # nothing is other any more


@pytest.mark.parametrize("number", [100, 101])
def test_no_more_than_a_hundred_clients_have_curves_and_lines_of_their_own(tmp_path, capsys, number):
    logged = {}
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", log=lambda figures, step: logged.update(figures))
    told = {str(cid): {"examples": 5, "fit_loss": 1.0, "fit_seconds": 1.0 + cid} for cid in range(number)}
    record.add({"round": 1, **FIGURES}, get_arrays(record.model), told)
    record.close()
    record.show_end()
    out = capsys.readouterr().out
    shown = [f"clients/{cid}/fit_loss" in logged for cid in told], [f"cid {cid}: 1 of 1" in out for cid in told]
    assert shown == ([number <= 100] * number, [number <= 100] * number)
    assert (f"the figures of each of {number} clients are in clients.csv" in out) == (number > 100)
    assert f"slowest device: cid {number - 1}, fit {number:.1f} s" in out and logged["fit/loss"] == 1.5
    assert len(pd.read_csv(tmp_path / "clients.csv")) == number
