"""When and in which order a round is saved."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from plumbing.common.files import sync_folder
from plumbing.common.process import say
from plumbing.common.state import get_arrays, read_saved, save_checkpoint, set_arrays
from plumbing.laptop.earlier import Earlier, best_of, keep_best, move_aside
from plumbing.laptop.history import (
    CLIENT_COLUMNS,
    COLUMNS,
    FILES,
    TRAFFIC,
    Table,
    client_rows,
    measured,
    read_clients,
    round_figures,
)
from plumbing.laptop.pictures import Pictures
from plumbing.laptop.worker import Worker, patiently

BACKLOG = 16  # finished rounds that may wait for their test, before the next one waits too
SAVE_EVERY = 0.2  # seconds; rounds that are shorter are saved together, so that saving does not slow them down
DRAW_EVERY = 30  # seconds, or twenty times as long as the last drawing took


@dataclasses.dataclass
class Round:
    """A finished round: its row of history.csv, the global model's arrays, and {cid: {name: figure}} of its clients."""

    row: dict
    arrays: list
    clients: dict
    is_sound: bool = False  # whether its test gave numbers


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


class Files:
    """The files of a run (history.FILES): its tables, checkpoints and pictures."""

    def __init__(self, model, path, earlier, about):
        self.path, self.folder, self.about = path, path.parent, about
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        self.model = copy.deepcopy(model)  # takes the arrays of each round, to test and save them
        rows, source, last_round = earlier.rows, earlier.folder, earlier.last_round
        self.history = Table(self.folder / "history.csv", COLUMNS, rows)
        self.clients = Table(self.folder / "clients.csv", CLIENT_COLUMNS, rows and read_clients(source, last_round))
        self.best, self.best_path = best_of(source, last_round, about)
        self.goes_on = last_round > 0 and source.resolve() == self.folder.resolve()
        self.pictures = Pictures(self.folder, about)
        self.begun = False  # whether this run has saved anything
        self.best_model, self.mistakes = None, None  # at the end: best.ptl, and its GlobalTest.count
        self.draw_at = time.monotonic() + DRAW_EVERY

    def exist(self):
        """Return whether this run has left anything in its folder."""
        return self.begun or self.goes_on

    def models(self):
        """Return the checkpoints of this run that exist: {"best": path, "latest": path}."""
        files = {"best": self.folder / "best.ptl", "latest": self.path} if self.exist() else {}
        return {name: path for name, path in files.items() if path.exists()}

    def save(self, rounds):
        """Save `rounds` in this order: clients.csv, history.csv, server.ptl, best.ptl.

        server.ptl decides which rounds are finished, so a kill between any two of these loses none: a resumed run
        drops later rows of the tables and runs those rounds again, it takes best.ptl from server.ptl if that is better
        (best_of), and it sends the rows that Weights & Biases lacks (Curves.catch_up).
        """
        if not self.begun:
            patiently(self._begin)
        new = (self.clients, client_rows(rounds)), (self.history, [finished.row for finished in rounds])
        for table, rows in new:
            patiently(table.write, rows)
        for finished in rounds:
            is_best = finished.row["test_accuracy"] > self.best
            # A best round has server.ptl written even if it is not the last of `rounds`: best.ptl must never be of a
            # later round than server.ptl, or a resumed run would ignore it, and the best round before it is gone.
            if is_best or finished is rounds[-1]:
                patiently(self._save_checkpoint, self.path, finished)
            if finished is rounds[-1]:
                for table, rows in new:  # finished by now: rows that cannot be saved are not shown either
                    table.rows += rows
            if is_best:
                self.best = finished.row["test_accuracy"]
                patiently(self._save_checkpoint, self.folder / "best.ptl", finished)

    def _begin(self):
        """Make the folder this run's: move aside what is not, and put best.ptl where it is missing."""
        if not self.goes_on:
            move_aside(self.folder, FILES)
        elif self.best_path is None:
            move_aside(self.folder, ["best.ptl"])  # of other data
        keep_best(self.folder / "best.ptl", self.best_path)
        self.begun = True

    def _save_checkpoint(self, path, finished):
        set_arrays(self.model, finished.arrays)
        metrics = {**dict.fromkeys(COLUMNS), **measured(finished.row)}
        save_checkpoint(path, self.model, {**self.about, "round": finished.row["round"], "metrics": metrics})

    def draw(self):
        """Draw the pictures of metrics and devices."""
        started = time.monotonic()
        self.pictures.draw_rounds(self.history.rows, self.clients.rows)
        self.draw_at = time.monotonic() + max(DRAW_EVERY, 20 * (time.monotonic() - started))

    def finish(self, count):
        """Draw all pictures for the last time, also that of the best model's mistakes; `count` is GlobalTest's."""
        if not self.history.rows or not self.exist():
            return
        self.draw()
        path = self.folder / "best.ptl"
        try:
            if not self.begun:  # no round was left to run, or none was finished; a kill came before best.ptl
                keep_best(path, self.best_path)
        except OSError as error:  # a copy on a medium that cannot be written to
            say(f"cannot write to {self.folder}: {error.strerror}")
        if count is not None and self.best >= 0:
            self._draw_confusion(path if self.begun else self.best_path, count)

    def _draw_confusion(self, path, count):
        try:
            self.best_model = read_saved(path)
        except ValueError as error:
            say(f"{path} is not drawn: {error}")
            return
        self.model.load_state_dict(self.best_model["model"])
        self.mistakes = count(self.model)
        self.pictures.draw_best(self.mistakes, self.best_model["round"])


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
        end = functools.partial(self.finish, self.test.count)
        self.worker = Worker("record", self._test, self._save, end, BACKLOG, SAVE_EVERY)

    def add(self, row: dict, arrays: list, clients: dict[str, dict]) -> None:
        """Hand over a finished round (see Round); wait while BACKLOG of them are waiting already.

        `row` needs the key round; those of the other COLUMNS that are missing were not measured.
        """
        traffic = {name: sum(figures.get(name, math.nan) for figures in clients.values()) for name in TRAFFIC}
        self.worker.put(Round({**dict.fromkeys(COLUMNS, math.nan), **traffic, **row}, arrays, clients))

    def check(self) -> None:
        """Raise what failed in the thread, if anything did."""
        self.worker.check()

    def check_tests(self) -> bool:
        """Return whether all rounds that were handed over are tested. Raises Diverged if one of them did not pass."""
        all_tested = self.worker.is_idle()
        if self.diverged is not None:
            raise self.diverged
        return all_tested

    def go_back(self) -> tuple[int, list]:
        """Forget the rounds from the one that diverged on. Return (the number of the round before, its arrays)."""
        while not self.worker.is_idle():
            self.check()
            time.sleep(0.01)
        self.diverged = None
        return self.sound

    def close(self) -> None:
        """End the thread: afterwards every round that was handed over is saved, told of and drawn.

        Raises Diverged if one is not, because of its test.
        """
        self.worker.close()
        self.check_tests()

    def _test(self, finished):
        if self.diverged is not None:
            return
        if self.test.measure is not None:
            set_arrays(self.model, finished.arrays)
            finished.row.update(self.test.measure(self.model))
            if not math.isfinite(finished.row["test_loss"]):
                self.diverged = Diverged(finished.row["round"], finished.row["test_loss"])
                return
        self.sound, finished.is_sound = (finished.row["round"], finished.arrays), True

    def _save(self, tested):
        """Save tested rounds, then tell of them, then draw them."""
        tested = [finished for finished in tested if finished.is_sound]
        if not tested:
            return
        round_figures(tested)  # so tables, checkpoints and curves have the same ones
        self.save(tested)
        for finished in tested:
            for tell in self.on_saved:
                tell(finished.row, finished.clients)
        if time.monotonic() > self.draw_at:
            self.draw()
