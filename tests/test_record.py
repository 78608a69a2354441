"""The record of a run: what its worker saves, in which order, how it ends, and how a later run goes on from it."""

import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

from nets import LeNet5, get_arrays
from record import Record

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
    assert not record.worker.is_alive()


def test_what_fails_in_the_worker_is_raised_by_all_that_its_caller_calls(tmp_path):
    def log(figures, step):
        raise OSError("no space")

    record = Record(LeNet5(1, 2), tmp_path / "server.ptl", log=log)
    add(record, 1)
    record.worker.join(10)
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
    with pytest.raises(TimeoutError, match=str(tmp_path)):
        record.close()
    assert time.monotonic() - started < 5
    monkeypatch.undo()
    release.set()
    record.close()  # it went on after all
