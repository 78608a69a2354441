"""Which files a run leaves, and in which order a round is saved."""

import contextlib
import copy
import dataclasses
import errno
import shutil
import time

from plumbing.common.files import atomic_write, sync_folder
from plumbing.common.process import say
from plumbing.common.state import read_saved, save_checkpoint, set_arrays
from plumbing.laptop.earlier import best_of, move_aside
from plumbing.laptop.history import CLIENT_COLUMNS, COLUMNS, FILES, Table, client_rows, measured, read_clients
from plumbing.laptop.pictures import draw_best, draw_rounds

DRAW_EVERY = 30  # seconds, or twenty times as long as the last drawing took
PATIENCE = 60  # seconds in which a shortage of files or memory may pass, which others on this machine can cause
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclasses.dataclass
class Round:
    """A finished round: its row of history.csv, the global model's arrays, and {cid: {name: figure}} of its clients."""

    row: dict
    arrays: list
    clients: dict


def patiently(act, *args):
    """Call `act(*args)`, again for PATIENCE seconds while the system is short of files or memory."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return act(*args)
        except OSError as error:
            if error.errno not in SHORTAGES or time.monotonic() > until:
                raise
        time.sleep(0.2)


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
        """Save `rounds` in this order: clients.csv, history.csv, server.ptl, best.ptl; before the first, `_begin`.

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
                patiently(self._save_checkpoint, finished)
            if finished is rounds[-1]:
                for table, rows in new:  # finished by now: rows that cannot be saved are not shown either
                    table.rows += rows
            if is_best:
                self.best = finished.row["test_accuracy"]
                patiently(self._keep_best, self.path)

    def _begin(self):
        """Make the folder this run's: move aside what is not, and put best.ptl where it is missing."""
        if not self.goes_on:
            move_aside(self.folder, FILES)
        elif self.best_path is None:
            move_aside(self.folder, ["best.ptl"])  # of other data
        self._keep_best(self.best_path)
        self.begun = True

    def _keep_best(self, source):
        """Make best.ptl a copy of the checkpoint `source`; None: there is no best one yet."""
        path = self.folder / "best.ptl"
        if source not in (None, path):
            with atomic_write(path) as part:
                shutil.copyfile(source, part)
        self.best_path = source and path

    def _save_checkpoint(self, finished):
        set_arrays(self.model, finished.arrays)
        metrics = {**dict.fromkeys(COLUMNS), **measured(finished.row)}
        save_checkpoint(self.path, self.model, {**self.about, "round": finished.row["round"], "metrics": metrics})

    def draw(self):
        """Draw the pictures of metrics and devices."""
        started = time.monotonic()
        draw_rounds(self.folder, self.about, self.history.rows, self.clients.rows)
        self.draw_at = time.monotonic() + max(DRAW_EVERY, 20 * (time.monotonic() - started))

    def finish(self, count):
        """Draw all pictures for the last time, also that of the best model's mistakes; `count` is GlobalTest's."""
        if not self.exist():
            return
        self.draw()
        if not self.begun:  # no round was left to run, or none was finished; a kill came before best.ptl
            with contextlib.suppress(OSError):  # a copy on a medium that cannot be written to
                self._keep_best(self.best_path)
        if count is None or self.best_path is None:
            return
        try:
            self.best_model = read_saved(self.best_path)
        except ValueError as error:
            say(f"{self.best_path} is not drawn: {error}")
            return
        self.model.load_state_dict(self.best_model["model"])
        self.mistakes = count(self.model)
        draw_best(self.folder, self.about, self.mistakes, self.best_model["round"])
