"""When a round is tested and saved: in a thread, while the devices train the next one."""

import math
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from plumbing.common.state import get_arrays, set_arrays
from plumbing.laptop.earlier import Earlier
from plumbing.laptop.history import COLUMNS, TRAFFIC, round_figures
from plumbing.laptop.saving import Files, Round

BACKLOG = 16  # finished rounds that may wait for their test, before the next one waits too
SAVE_EVERY = 0.2  # seconds; rounds that are shorter are saved together, so that saving does not slow them down
STALLED = 3600  # seconds without progress until `close` gives up, as on a network drive that hangs


class Diverged(Exception):
    """The global model of a `round` has a `loss` on the test set that is not finite."""

    def __init__(self, current, loss):
        super().__init__(f"the test_loss of round {current} is {loss}: its model is not kept")
        self.round = current


class GlobalTest(NamedTuple):
    """The functions that test a global model.

    measure: called as measure(model), returns {"test_loss", "test_accuracy"}.
    count: called as count(model), returns how often it takes an image of class i for class j: int64 [i, j].
    """

    measure: Callable
    count: Callable | None = None


class Record(Files):
    """Keeps what each finished round leaves. A thread tests and saves it, then tells of it, while the devices train.

    model: the net.
    save_ckp_path: of the newest global model; the other FILES are beside it. What an earlier run left there is moved
        aside when the first round is saved, unless this run continues that one.
    earlier: the run that this one continues (Earlier).
    test: GlobalTest; without one, global models are not tested.
    about: further entries of the checkpoints (state.save_checkpoint).
    on_saved: functions, each called as f(row of history.csv, {cid: {name: figure}}) with each saved round.

    An error in the thread ends it; `check`, `add` and `close` raise it, and the rounds before stay saved. A round
    whose test_loss is not finite is not saved, nor are those after it, until `go_back`.
    """

    def __init__(self, model, save_ckp_path, earlier=None, test=None, about=None, on_saved=()):
        earlier = earlier or Earlier()
        super().__init__(model, Path(save_ckp_path), earlier, about or {})
        self.test, self.on_saved = test or GlobalTest(None), list(on_saved)
        self.sound = earlier.last_round, get_arrays(model)  # the newest that passed its test, or the one to start from
        self.diverged = None  # the first that did not
        self.error = None  # what ended the thread
        self.waiting, self.closed = queue.Queue(), False  # Rounds to test; None: the end
        self.turns = 0  # of the thread's loop: the sign of life
        self.thread = threading.Thread(target=self._run, name="record", daemon=True)
        self.thread.start()

    def add(self, row: dict, arrays: list, clients: dict[str, dict]) -> None:
        """Hand over a finished round (see Round); wait while BACKLOG of them are waiting already.

        `row` needs the key round; those of the other COLUMNS that are missing were not measured.
        """
        if self.closed:
            raise RuntimeError("the record is closed")
        self.check()
        while self.waiting.unfinished_tasks >= BACKLOG:
            time.sleep(0.01)
            self.check()
        traffic = {name: sum(figures.get(name, math.nan) for figures in clients.values()) for name in TRAFFIC}
        self.waiting.put(Round({**dict.fromkeys(COLUMNS, math.nan), **traffic, **row}, arrays, clients))

    def check(self) -> None:
        """Raise what failed in the thread, if anything did."""
        if self.error is not None:
            raise self.error

    def check_tests(self) -> bool:
        """Return whether all rounds that were handed over are tested. Raises Diverged if one of them did not pass."""
        all_tested = self.waiting.unfinished_tasks == 0
        if self.diverged is not None:
            raise self.diverged
        return all_tested

    def go_back(self) -> tuple[int, list]:
        """Forget the rounds from the one that diverged on. Return (the number of the round before, its arrays)."""
        while self.waiting.unfinished_tasks:
            self.check()
            time.sleep(0.01)
        self.diverged = None
        return self.sound

    def close(self) -> None:
        """End the thread: afterwards every round that was handed over is saved, told of and drawn.

        May be called again. Raises Diverged if one is not saved because of its test, and TimeoutError when the thread
        makes no progress for STALLED seconds.
        """
        if not self.closed:
            self.closed = True
            self.waiting.put(None)
        while self.thread.is_alive():
            before = self.turns
            self.thread.join(STALLED)
            if self.thread.is_alive() and self.turns == before:
                raise TimeoutError(f"the record hangs: no progress for {STALLED} s")
        self.check()
        self.check_tests()

    def _run(self):
        tested, due, ended = [], 0.0, False
        try:
            while not ended:
                try:
                    finished = self.waiting.get(timeout=max(0.0, due - time.monotonic()) if tested else None)
                    ended = finished is None
                except queue.Empty:
                    finished = None
                if finished is not None:
                    self._test(finished)
                    if self.diverged is None:
                        tested.append(finished)
                    self.waiting.task_done()
                if tested and (ended or time.monotonic() >= due):
                    self._save(tested)
                    tested, due = [], time.monotonic() + SAVE_EVERY
                self.turns += 1
            self.finish(self.test.count)
        except BaseException as error:
            self.error = error

    def _test(self, finished):
        if self.diverged is not None:
            return
        if self.test.measure is not None:
            set_arrays(self.model, finished.arrays)
            finished.row.update(self.test.measure(self.model))
            if not math.isfinite(finished.row["test_loss"]):
                self.diverged = Diverged(finished.row["round"], finished.row["test_loss"])
                return
        self.sound = finished.row["round"], finished.arrays

    def _save(self, tested):
        """Save tested rounds, then tell of them, then draw them."""
        round_figures(tested)  # so tables, checkpoints and curves have the same ones
        self.save(tested)
        for finished in tested:
            for tell in self.on_saved:
                tell(finished.row, finished.clients)
        if time.monotonic() > self.draw_at:
            self.draw()
