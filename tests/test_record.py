"""The record of a run: what its thread saves, in which order, how it ends, and how a later run goes on from it."""

import contextlib
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

from libs import UserError
from plumbing.common.state import get_arrays, save_checkpoint
from plumbing.laptop import record as record_module
from plumbing.laptop.curves import as_curves
from plumbing.laptop.earlier import Earlier, best_of, kept_runs, move_aside, resume
from plumbing.laptop.history import CLIENT_COLUMNS, FILES, read_history
from plumbing.laptop.record import Record
from plumbing.laptop.saving import Round, patiently
from plumbing.laptop.screen import describe_clients, show_end

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import as_logged, start_patched, wandb_history

import server
from nets import LeNet5

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


def test_shortage_of_files_is_waited_for(tmp_path):
    """Whoever opens many connections to a server can cause one."""
    record, held = Record(LeNet5(1, 2), tmp_path / "server.ptl"), []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        add(record, 1)
        time.sleep(1)
        record.check()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    record.close()
    assert list(pd.read_csv(tmp_path / "history.csv")["round"]) == [1] and (tmp_path / "server.ptl").exists()
    with pytest.raises(IsADirectoryError):  # which does not pass
        patiently(os.open, tmp_path, os.O_WRONLY)


def test_the_worker_has_a_name_and_is_gone_after_close(tmp_path):
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl")
    assert "record" in [thread.name for thread in threading.enumerate()]
    record.close()
    assert not record.thread.is_alive()


def test_what_fails_in_the_worker_is_raised_by_all_that_its_caller_calls(tmp_path):
    def fail(row, clients):
        raise OSError("no space")

    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", on_saved=[fail])
    add(record, 1)
    record.thread.join(10)
    for call in (record.check, lambda: add(record, 2), record.close, record.close):
        with pytest.raises(OSError, match="no space"):
            call()


def test_closing_gives_up_on_a_worker_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(record_module, "STALLED", 0.2)
    release = threading.Event()
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", on_saved=[lambda *saved: release.wait(30)])
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


def test_tables_have_six_digits_and_whole_numbers_as_they_are(tmp_path):
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl")
    told = {"examples": 24, "fit_loss": 2 / 3e9, "fit_seconds": 1234567.25, "throttled": float(2**20 - 1)}
    record.add({"round": 1, **FIGURES, "fit_loss": 2 / 3}, get_arrays(record.model), {"0": told})
    record.close()
    row, own = (pd.read_csv(tmp_path / name, dtype=str).iloc[0] for name in ("history.csv", "clients.csv"))
    assert [row["fit_loss"], own["fit_loss"], own["fit_seconds"]] == ["0.666667", "6.66667e-10", "1234570.0"]
    assert int(float(own["throttled"])) == 2**20 - 1 and own["examples"] == "24"


def test_pictures_that_fail_do_not_fail_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *args, **kwargs: 1 / 0)
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl")
    record.add({"round": 1, **FIGURES}, get_arrays(record.model), {})
    record.close()
    assert "draw_metrics failed, so its picture is missing: division by zero" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1 and (tmp_path / "server.ptl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The tables, as a power cut, a full disk or another version of the suite leaves them.


def record_of(folder, rounds, last_round=0, rows=None):
    """Records `rounds` with one client, whose figures tell the round; gives the record, which is closed."""
    earlier = Earlier(folder, read_history(folder, last_round) if rows is None else rows) if last_round else None
    record = Record(LeNet5(1, 2), folder / "server.ptl", earlier)
    record.draw = lambda: None
    for current in rounds:
        told = {"examples": 24, "fit_loss": current / 8, "fit_seconds": 1.0}
        record.add({"round": current, **FIGURES, "fit_loss": current / 8}, get_arrays(record.model), {"0": told})
    record.close()
    return record


def go_on(folder):
    """What --resume reads: the rows up to the checkpoint's round."""
    return resume(folder, LeNet5(1, 2), {"dataset": None}, False).rows


def test_tables_after_a_resume_are_those_of_one_run(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    record_of(tmp_path / "one", range(1, 5))
    record_of(tmp_path / "two", range(1, 4))
    with open(tmp_path / "two" / "clients.csv", "a") as file:
        file.write("3,0,24,0.3")  # a kill, or a power cut
    record_of(tmp_path / "two", range(3, 5), last_round=2)
    for name in ("history.csv", "clients.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("kept, cut", [(3, 4), (3, -1), (2, 0), (0, 0)])
def test_rows_that_history_has_lost_are_empty_but_for_what_the_checkpoint_knows(tmp_path, capsys, kept, cut):
    whole = record_of(tmp_path, range(1, 5)).history.rows
    header, *lines = (tmp_path / "history.csv").read_text().splitlines()
    (tmp_path / "history.csv").write_text("\n".join([header, *lines[:kept], lines[kept][:cut]]))
    rows = go_on(tmp_path)
    assert f"has lost the rows of rounds {kept + 1} to 4" in capsys.readouterr().out
    assert [row["round"] for row in rows] == [1, 2, 3, 4] and all(math.isnan(row["eval_loss"]) for row in rows[kept:-1])
    np.testing.assert_equal([*rows[:kept], rows[-1]], [*whole[:kept], whole[-1]])
    record_of(tmp_path, [5], last_round=4, rows=rows)
    assert list(pd.read_csv(tmp_path / "history.csv")["round"]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "text", ["", "no table\n", "round,fit_loss\n1,1.0\ntwo,2.0\n3,3.0\n", "round,fit_loss\n2,1.0\n"]
)
def test_history_that_is_damaged_elsewhere_is_refused(tmp_path, text):
    record_of(tmp_path, range(1, 4))
    (tmp_path / "history.csv").write_text(text)
    with pytest.raises(UserError, match="history.csv"):
        go_on(tmp_path)


def test_columns_that_come_and_go_cost_no_run_its_figures(tmp_path, capsys):
    record_of(tmp_path, range(1, 4))
    for name in ("history.csv", "clients.csv"):  # as a version with `old` and without fit_accuracy has written it
        table = pd.read_csv(tmp_path / name).drop(columns="fit_accuracy").assign(old=7)
        table.to_csv(tmp_path / name, index=False)
    rows = go_on(tmp_path)
    assert "history.csv has no column fit_accuracy" in capsys.readouterr().out
    record_of(tmp_path, [4], last_round=3, rows=rows)
    for name in ("history.csv", "clients.csv"):
        table = pd.read_csv(tmp_path / name)
        assert list(table["old"].fillna(0)) == [7, 7, 7, 0] and list(table["fit_loss"]) == [0.125, 0.25, 0.375, 0.5]
        assert table["fit_accuracy"].isna().sum() == (3 if name == "history.csv" else 4)


def test_damaged_lines_of_clients_are_left_out_and_said(tmp_path, capsys):
    record_of(tmp_path, range(1, 4))
    lines = (tmp_path / "clients.csv").read_text().splitlines()
    (tmp_path / "clients.csv").write_text("\n".join([lines[0], "\0\0", *lines[2:], ""]))
    record_of(tmp_path, [4], last_round=3)
    assert "skipped 1 damaged lines, the first is line 2" in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / "clients.csv")["round"]) == [2, 3, 4]


@pytest.mark.parametrize("limit", [1, 100])
def test_rows_that_cannot_be_written_leave_nothing_and_do_not_count(tmp_path, limit):
    record = record_of(tmp_path, [1])
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", Earlier(tmp_path, read_history(tmp_path, 1)))
    record.close()

    def save(current):
        row = {"round": current, **FIGURES, "test_accuracy": current / 10}
        record.save([Round(row, get_arrays(record.model), {"0": {"examples": 24}})])

    save(2)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.csv")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # a full disk: clients.csv takes another row, or a part of it, and server.ptl nothing
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "clients.csv").stat().st_size + limit, limits[1]))
        with pytest.raises(OSError):
            save(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = describe_clients(record.clients.rows, len(record.history.rows))
    assert line.startswith("cid 0: 2 of 2 rounds")
    for path, content in before.items():
        after = path.read_bytes()
        assert after.startswith(content) and after.endswith(b"\n") and after.count(b"\n") <= content.count(b"\n") + 1


# ---------------------------------------------------------------------------------------------------------------------
# A kill between any two writes.

KILL = """
import os, signal
from plumbing.laptop import curves, history, record, saving, screen
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
    "clients.csv": 'history.Table, "write", lambda self, rows: "cid" in rows[-1] and rows[-1]["round"] >= 3',
    "history.csv": 'history.Table, "write", lambda self, rows: "clients" in rows[-1] and rows[-1]["round"] >= 3',
    "server.ptl": 'saving, "save_checkpoint", lambda path, _, about: about["round"] == 3',
    "best.ptl": 'saving.Files, "_keep_best", lambda self, source: len(self.history.rows) == 3',
    "wandb": 'curves.Curves, "log_round", lambda self, row, clients: row["round"] == 3',
    "screen": 'screen.Progress, "show_round", lambda self, row, clients: row["round"] == 3',
}
RISING = """
import engines
accuracy = [0.0]

def test(loaders, model):
    accuracy[0] += 0.01  # so that every round is the best
    return {"test_loss": 1.0, "test_accuracy": accuracy[0] + FIRST}

engines.server_test_fn = script.server_test_fn = test
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
    steps = pd.DataFrame([step for steps in folders.values() for step in steps]).sort_values("_step")
    assert list(steps["_step"]) == list(steps["round"]) == list(rows["round"])
    rows = as_logged(rows)
    for name in rows.columns[1:]:
        assert list(steps[name]) == pytest.approx(list(rows[name]), nan_ok=True), name


@pytest.fixture
def as_before(tmp_path, monkeypatch):
    """Parses a command line with --resume, the args of whose checkpoint are given."""

    def parse(args, *flags, settings=None):
        save_checkpoint(tmp_path / "Tiny" / "server.ptl", LeNet5(1, 2), {"args": args})
        monkeypatch.setattr(sys, "argv", ["server.py", "--dataset", "Tiny", "--resume", *flags])
        return vars(server.parse_args(settings, tmp_path))

    (tmp_path / "Tiny").mkdir()
    return parse


def test_what_is_not_given_is_as_before_and_what_is_other_is_said(as_before, capsys):
    earlier = {"num_epochs": 8, "lr": 0.01, "seed": 3, "fedbn": True, "compress": "int8", "secret_file": "a secret"}
    earlier.update(num_clients=3, min_clients=3, server_address="0.0.0.0", round_timeout=None, gone="since")
    args = as_before(earlier)
    assert {name: args[name] for name in ("num_epochs", "lr", "seed", "fedbn", "compress")}.items() <= earlier.items()
    assert (args["secret_file"], args["num_clients"]) == (Path("a secret"), 3)
    assert (args["server_address"], args["num_rounds"]) == ("127.0.0.1", 100)
    assert " → " not in capsys.readouterr().out
    flags = "--num_epochs 1 --lr 0.01 --seed off --no-fedbn --secret_file off --num_clients 2 --compress=off".split()
    args = as_before(earlier, *flags)
    assert (args["num_epochs"], args["lr"], args["seed"], args["fedbn"]) == (1, 0.01, None, False)
    assert (args["secret_file"], args["num_clients"], args["min_clients"]) == (None, 2, None)
    changes = capsys.readouterr().out.splitlines()[0].partition(": ")[2].split(", ")
    assert set(changes) == {
        *("num_epochs: 8 → 1", "seed: 3 → off", "fedbn: on → off", "secret_file: a secret → off"),
        *("num_clients: 3 → 2", "compress: int8 → off"),
    }
    settings = {"dataset": "Tiny", "resume": True, "lr": 0.1, "num_epochs": "", "fedbn": "", "num_rounds": ""}
    args = as_before(earlier, settings=settings)  # of a Flower App, which has no wire
    assert (args["lr"], args["num_epochs"], args["fedbn"], args["secret_file"]) == (0.1, 8, True, None)


def test_values_of_a_checkpoint_that_are_none_any_more_are_named_and_can_be_replaced(as_before):
    for earlier in ({"strategy": "Gone"}, {"num_epochs": 0}, {"lr": "fast"}):
        with pytest.raises(UserError, match=f"server.ptl.*--{[*earlier][0]}"):
            as_before(earlier)
    assert as_before({"strategy": "Gone"}, "--strategy", "Krum")["strategy"] == "Krum"
    for earlier in (None, {}, "none"):
        assert as_before(earlier)["num_epochs"] == 1


def prompt_client(suite):
    """A client that tries again every second."""
    return start_patched(
        suite,
        "client",
        "from plumbing.device import connection; connection.MAX_DELAY = 1",
        "--num_threads",
        1,
        "--cid",
        0,
    )


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
        rows = pd.read_csv(tiny.ckps("Tiny") / "history.csv", parse_dates=["finished_at"])
        assert list(rows["round"]) == [1, 2, 3, 4] and rows["finished_at"].is_monotonic_increasing
        assert abs(time.time() - rows["finished_at"].iloc[-1].timestamp()) < 60
        assert torch.load(tiny.ckps("Tiny") / "server.ptl", weights_only=True)["resumed_after"] == [2]
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
        assert (tiny.ckps("Tiny") / "best.ptl").exists()
    assert len(list((tiny.root / "ckps").glob("Tiny.*"))) == 3
    shutil.rmtree(tiny.root / "wandb")  # as `wandb sync --clean` does
    train(tiny, "--resume", num_rounds=5)
    ((_, steps),) = steps_of(tiny).items()
    assert [step["_step"] for step in steps] == [1, 2, 3, 4, 5]
    assert torch.load(tiny.ckps("Tiny") / "server.ptl", weights_only=True)["resumed_after"] == [2, 4]


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
        assert "Use --resume to continue it" in server.out and "model:" not in server.out
    train(tiny, "--resume", num_rounds=3)
    assert list(pd.read_csv(folder / "history.csv")["round"]) == [1, 2, 3]

    server = train(tiny, num_rounds=1)  # now it is saved
    (aside,) = folder.parent.glob("Tiny.*")
    assert f"to continue it: --resume {aside}\n" in server.out
    (folder / "server.ptl").unlink()  # as when the new run is killed in its first save
    server = train(tiny, "--resume", num_rounds=1)
    assert f"nothing to resume in {folder}: starting at round 1 (the newest run that was kept: --resume " in server.out
    train(tiny, "--resume", aside, num_rounds=4)
    assert list(pd.read_csv(folder / "history.csv")["round"]) == [1, 2, 3, 4]
    assert list(pd.read_csv(aside / "history.csv")["round"]) == [1, 2, 3]
    refused = tiny.run("server.py", "--dataset", "Tiny", "--resume", tiny.root)
    assert refused.popen.returncode == 2
    assert refused.err == f"server.py: cannot resume from {tiny.root}: there is no server.ptl in it\n"


@pytest.mark.parametrize("steps", range(2 * len(FILES) + 1))  # a copy and an unlink each, and the renaming
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

    files, done, folder = {name: name.encode() for name in FILES}, [], tmp_path / "Tiny"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", counted(shutil.copy2))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Path, "rename", counted(Path.rename))
        with pytest.raises(Killed):
            move_aside(folder, FILES)
    runs = [path.parent for path in tmp_path.glob("[!.]*/server.ptl")]
    assert any({path.name: path.read_bytes() for path in run.iterdir()} == files for run in runs)


def test_two_runs_moved_in_one_second_keep_apart(tmp_path):
    folder = tmp_path / "Tiny"
    folder.mkdir()
    for content in (b"1", b"2", b"3"):
        (folder / "server.ptl").write_bytes(content)
        move_aside(folder, FILES)
    assert sorted(path.read_bytes() for path in tmp_path.glob("Tiny.*/server.ptl")) == [b"1", b"2", b"3"]
    assert list(folder.iterdir()) == []


def test_runs_of_a_dataset_with_a_longer_name_are_not_offered(tmp_path):
    for name in ("Num.2026-11-26_120000", "Num.2026-11-26_120000_2", "Num.v2", "Num.v2.2026-11-27_120000", "Num2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "server.ptl").write_bytes(b"")
    offered = [path.name for path in kept_runs(tmp_path / "Num")]
    assert offered == ["Num.2026-11-26_120000", "Num.2026-11-26_120000_2"]


OLD = {"dataset": "D", "classes": ["ant", "bee"], "dataset_id": "1" * 64}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"classes": ["ant", "cat"]}, "classes differ: bee is now cat"),
        ({"classes": ["bee", "ant"]}, "classes differ: ant is now bee"),
        ({"dataset_id": "2" * 64}, "its shards or its test set differ"),
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
            assert len(resume(tmp_path, LeNet5(1, 2), now, False).rows) == 1
            continue
        with pytest.raises(UserError, match=f"{reason}.*--allow_new_data"):
            resume(tmp_path, LeNet5(1, 2), now, False)
        assert len(resume(tmp_path, LeNet5(1, 2), now, True).rows) == 1
    for model, dataset in ((LeNet5(1, 3), "D"), (LeNet5(3, 2), "D"), (LeNet5(1, 2), "E")):
        with pytest.raises(UserError) as refused:
            resume(tmp_path, model, {**OLD, "dataset": dataset}, True)
        assert "--allow_new_data" not in str(refused.value)


def test_damaged_server_ptl_is_named_with_a_way_out_that_works(tmp_path, capsys):
    about = {**OLD, "dataset": "Tiny"}
    with contextlib.closing(Record(LeNet5(1, 2), tmp_path / "server.ptl", about=about)) as record:
        for current, accuracy in enumerate((0.5, 0.75, 0.25), start=1):
            row = {"round": current, "clients": 1, "failures": 0, "test_accuracy": accuracy}
            record.add(row, get_arrays(LeNet5(1, 2)), {})
    path = tmp_path / "server.ptl"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"server.ptl: it is damaged.*of round 2, first: cp ") as refused:
        resume(tmp_path, LeNet5(1, 2), about, False)
    subprocess.run(str(refused.value).split("first: ")[1], shell=True, check=True)
    rows = resume(tmp_path, LeNet5(1, 2), about, False).rows
    assert [row["test_accuracy"] for row in rows] == [0.5, 0.75]
    (tmp_path / "best.ptl").write_bytes(damaged)
    assert best_of(tmp_path, 2, about) == (0.75, path)
    assert "best.ptl is not used: it is damaged" in capsys.readouterr().out
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="server.ptl: it is damaged") as refused:
        resume(tmp_path, LeNet5(1, 2), about, False)
    assert "cp " not in str(refused.value)


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
def test_no_more_than_a_hundred_clients_have_curves_of_their_own(tmp_path, capsys, number):
    logged = {}
    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", on_saved=[lambda *saved: logged.update(as_curves(*saved))])
    counts = {"examples": 5, "steps": 19.0, "bytes_down": 2009620.0}
    told = {str(cid): {**counts, "fit_loss": 1.0, "fit_seconds": 1.0 + cid} for cid in range(number)}
    record.add({"round": 1, **FIGURES}, get_arrays(record.model), told)
    record.close()
    show_end(record)
    assert [f"clients/{cid}/fit_loss" in logged for cid in told] == [number <= 100] * number
    assert f"slowest device: cid {number - 1}, fit {number:.1f} s" in capsys.readouterr().out
    history, clients = (pd.read_csv(tmp_path / f"{name}.csv", dtype=str) for name in ("history", "clients"))
    assert logged["fit/loss"] == 1.5 and len(clients) == number
    assert history["bytes_down"][0] == str(2009620 * number) and history["bytes_up"].isna().all()
    assert list(clients.loc[0, [*counts, "fit_loss"]]) == ["5", "19", "2009620", "1.0"]


def test_from_eight_devices_on_only_those_that_stand_out_have_a_line():
    def shown(number, odd):
        known = {"fit_seconds": 2.0, "eval_seconds": 0.5, "wait_seconds": 1.0, "cpu_temp_c": 60.0, "throttled": 0.0}
        rows = [
            {**dict.fromkeys(CLIENT_COLUMNS, math.nan), "examples": 5, "round": current, "cid": str(cid), **known}
            for current in range(1, 11)
            for cid in range(number)
        ]
        for cid, figures in odd.items():
            for row in rows:
                row.update(figures if row["cid"] == cid else {})
        return describe_clients([row for row in rows if row["cid"] != "6" or row["round"] <= row.get("last", 10)], 10)

    odd = {"1": {"fit_seconds": 4.0}, "3": {"cpu_temp_c": 81.0}, "4": {"throttled": 1.0}, "6": {"last": 5}}
    odd["5"] = {"examples": math.nan, "fit_seconds": math.nan}  # all that it sent was dropped
    assert [line.split(":")[0] for line in shown(7, {})] == [f"cid {cid}" for cid in range(7)]
    assert shown(8, {})[0] == "no device stands out; clients.csv has the figures of each"
    lines = shown(8, odd)
    assert lines[0].startswith(
        "cid 1: 10 of 10 rounds, fit 4.0 s (median), the slowest in 100% of its rounds, evaluate 0.5 s, "
    )
    assert [line.split(" of")[0] for line in lines[1:-2]] == ["cid 3: 10", "cid 4: 10", "cid 5: 0", "cid 6: 5"]
    assert lines[-2] == "the 3 others do not stand out; clients.csv has the figures of each"
    assert lines[-1] == "slowest device: cid 1, fit 4.0 s, the others 2.0 s (medians)"
    part = shown(3, {"0": {"fit_seconds": 0.9}, "1": {"images": 2.0, "wait_seconds": 0.0123}})  # with --time_budget
    assert "cid 1: 10 of 10 rounds, fit 2.0 s (median)" in part[1] and "40% of its images" in part[1]
    assert "fit 0.9 s" in part[0] and "waiting 0.012 s" in part[1] and len(part) == 3
