"""When and in which order a round is saved."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from pathlib import Path

from plumbing.common.files import sync_folder
from plumbing.common.process import say
from plumbing.common.state import get_arrays, read_saved, save_checkpoint, set_arrays
from plumbing.laptop.curves import as_curves
from plumbing.laptop.earlier import best_of, earlier_run, keep_best, move_aside
from plumbing.laptop.history import COLUMNS, FILES, ClientHistory, History, measured, read_history
from plumbing.laptop.pictures import draw_confusion, draw_devices, draw_metrics, list_accuracies, try_to_draw
from plumbing.laptop.worker import Worker

BACKLOG = 16  # finished rounds that may wait for their test, before the next one waits too
SAVE_EVERY = 0.2  # seconds; rounds that are shorter are saved together, so that saving does not slow them down
DRAW_EVERY = 30  # seconds, or twenty times as long as the last drawing took


@dataclasses.dataclass
class Round:
    """A finished round: its row of history.csv, the global model's arrays, and {cid: {name: value}} of its clients."""

    row: dict
    arrays: list
    clients: dict
    is_sound: bool = False  # whether its test gave numbers


class Diverged(Exception):
    """The global model of a `round` has a `loss` on the test set that is no number."""

    def __init__(self, current, loss):
        super().__init__(f"the test_loss of round {current} is {loss}: its model is not kept")
        self.round = current


class Record:
    """Keeps what each finished round leaves: a thread tests, saves, logs and draws it, while the devices train on.

    model: the net; a copy of it takes the arrays of each round, to test and save them.
    save_ckp_path: where the newest global model goes; the rest of FILES goes beside it. What an earlier run left there
        is moved aside when the first round is saved, unless this run goes on from it.
    last_round: the last round that is finished already; history.csv is continued after it.
    source: the folder with the files of those rounds, where they are not those beside `save_ckp_path`.
    rows: their rows of history.csv, where they are read already (read_history).
    test: called as test(model), returns {"test_loss", "test_accuracy"} of each round's global model; None: no test.
    count: called as count(model), returns how often it takes class i for class j: int64 [i, j].
    about: further entries of the checkpoint (state.save_checkpoint).
    on_row: called with each row of history.csv when it is saved.
    log: called as log(dictionary, step=round), such as the `log` of a wandb run.

    What fails in the thread ends it; `check`, `add` and `close` raise it, and the rounds before stay saved. A round
    whose test_loss is not finite is not saved, nor are those after it, until `go_back`.
    """

    def __init__(
        self,
        model,
        save_ckp_path,
        last_round=0,
        source=None,
        rows=None,
        test=None,
        count=None,
        about=None,
        on_row=None,
        log=None,
    ):
        self.path = Path(save_ckp_path)
        self.folder = self.path.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        self.model = copy.deepcopy(model)
        self.test, self.count, self.about = test, count, about or {}
        self.on_row, self.log = on_row, log
        source = Path(source or self.folder)
        if last_round and rows is None:
            rows = read_history(source, last_round)
        self.history = History(self.path.with_name("history.csv"), rows or ())
        self.clients = ClientHistory(self.path.with_name("clients.csv"), last_round, source)
        self.best, self.best_path = best_of(source, last_round, self.about)
        self.goes_on = last_round > 0 and source.resolve() == self.folder.resolve()
        self.begun = False  # whether this run has saved anything
        self.sound = last_round, get_arrays(model)  # the newest that passed its test, or from which the run starts
        self.diverged = None  # the first that did not
        self.best_model, self.mistakes = None, None  # once the worker has ended: best.ptl, and its count_answers
        self.draw_at = time.monotonic() + DRAW_EVERY
        self.worker = Worker("record", self._test, self._save, self._end, BACKLOG, SAVE_EVERY)

    def add(self, row: dict, arrays: list, clients: dict[str, dict]) -> None:
        """Hand over a finished round (see Round); waits where BACKLOG of them wait already.

        `row` needs the key round; of the other COLUMNS what is missing could not be measured.
        """
        row = {**dict.fromkeys(COLUMNS, math.nan), **row}
        self.worker.put(Round(row, arrays, clients))

    def check(self) -> None:
        """Raise what went wrong in the worker, if anything did."""
        self.worker.check()

    def check_tests(self) -> bool:
        """Whether all rounds that were handed over are tested. Raises Diverged where one of them did not pass."""
        all_tested = self.worker.is_idle()
        if self.diverged is not None:
            raise self.diverged
        return all_tested

    def go_back(self) -> tuple[int, list]:
        """Forget all rounds from the one that diverged on: the round before it, and the arrays of its model."""
        while not self.worker.is_idle():
            self.check()
            time.sleep(0.01)
        self.diverged = None
        return self.sound

    def close(self) -> None:
        """End the worker: afterwards every round that was handed over is saved, logged and in the picture.

        Raises Diverged where one is not, for its test.
        """
        self.worker.close()
        self.check_tests()

    def models(self):
        """The files of this run's models, {"best": path, "latest": path}, as far as they are there."""
        files = {"best": self.folder / "best.ptl", "latest": self.path} if self.begun or self.goes_on else {}
        return {name: path for name, path in files.items() if path.exists()}

    def show_end(self):
        """Say what the clients and the best model were like, and where the files of the run are, or that it left none.

        After `close`.
        """
        if not self.begun and not self.goes_on:
            say(f"no round is finished, nothing is saved{' or moved' if earlier_run(self.folder) else ''}")
            return
        for line in self.clients.summarise(len(self.history.rows)):
            say(line)
        if self.best_model is not None:
            current, accuracy = self.best_model["round"], self.best_model["metrics"]["test_accuracy"]
            say(f"best round: {current} of {len(self.history.rows)}, test_accuracy {accuracy:.3f}")
            say(f"its accuracy by class: {list_accuracies(self.mistakes, self.about.get('classes'))}")
        beside = [name for name in FILES.values() if name != self.path.name and (self.folder / name).exists()]
        say(f"model: {self.path}; beside it {', '.join(beside)}")

    def _test(self, finished):
        if self.diverged is not None:
            return
        if self.test is not None:
            set_arrays(self.model, finished.arrays)
            finished.row.update(self.test(self.model))
            if not math.isfinite(finished.row["test_loss"]):
                self.diverged = Diverged(finished.row["round"], finished.row["test_loss"])
                return
        self.sound, finished.is_sound = (finished.row["round"], finished.arrays), True

    def _save(self, tested):
        """Save tested rounds, in this order: clients.csv, history.csv, server.ptl, best.ptl, wandb; screen and picture.

        server.ptl decides which rounds are finished, so that a kill between any two of these loses none: a run that
        goes on drops later rows of the tables and runs those rounds again; it takes best.ptl from server.ptl where
        that is better (best_of), and sends to wandb the rows that are missing there (start_wandb).
        """
        tested = [finished for finished in tested if finished.is_sound]
        if not tested:
            return
        if not self.begun:
            self._begin()
        new = (self.clients, self.clients.rows_of(tested)), (self.history, [finished.row for finished in tested])
        for table, rows in new:
            table.write(rows)
        for finished in tested:
            is_best = finished.row["test_accuracy"] > self.best
            if is_best or finished is tested[-1]:
                self._save_checkpoint(self.path.name, finished)
            if finished is tested[-1]:
                for table, rows in new:  # finished by now: rows that cannot be saved are not shown either
                    table.rows += rows
            if is_best:
                self.best = finished.row["test_accuracy"]
                self._save_checkpoint("best.ptl", finished)
        for finished in tested:
            if self.log is not None:
                self.log(as_curves(finished.row, finished.clients), step=finished.row["round"])
            if self.on_row is not None:
                self.on_row(finished.row)
        if time.monotonic() > self.draw_at:
            self._draw()

    def _begin(self):
        """Make the folder this run's: move aside what is not, and put best.ptl where it is missing."""
        best = self.path.with_name("best.ptl")
        if not self.goes_on:
            move_aside(self.folder, FILES.values())
        elif self.best_path is None:
            move_aside(self.folder, ["best.ptl"])  # of other data
        keep_best(best, self.best_path)
        self.begun = True

    def _save_checkpoint(self, name, finished):
        set_arrays(self.model, finished.arrays)
        metrics = {**dict.fromkeys(COLUMNS), **measured(finished.row)}
        about = {**self.about, "round": finished.row["round"], "metrics": metrics}
        save_checkpoint(self.path.with_name(name), self.model, about)

    def _draw(self):
        started, title = time.monotonic(), self.about.get("dataset") or ""
        try_to_draw(draw_metrics, self.history.rows, self.path.with_name("metrics.png"), title)
        try_to_draw(draw_devices, self.clients.by_cid(), self.path.with_name("devices.png"), title)
        self.draw_at = time.monotonic() + max(DRAW_EVERY, 20 * (time.monotonic() - started))

    def _end(self):
        if self.history.rows and (self.begun or self.goes_on):
            self._draw()
            path = self.folder / "best.ptl" if self.begun and self.best >= 0 else self.best_path
            if self.count is not None and path is not None:
                self._draw_confusion(path)

    def _draw_confusion(self, best_path):
        """Show the best model all test images once more, and draw which class it takes for which."""
        try:
            self.best_model = read_saved(best_path)
        except ValueError as error:
            say(f"{best_path} is not drawn: {error}")
            return
        self.model.load_state_dict(self.best_model["model"])
        self.mistakes = self.count(self.model)
        title = f"{self.about.get('dataset') or ''}: the best model, of round {self.best_model['round']}"
        path, classes = self.path.with_name("confusion.png"), self.about.get("classes")
        try_to_draw(draw_confusion, self.mistakes, classes, path, title)
