"""What a run leaves and shows: its history, checkpoints, curves and pictures; and how a later run goes on from them.

strategies.py hands over each finished round to a Record, server.py builds it. Nothing here knows of Flower.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

from libs import ROOT, UserError, atomic_write, np, printable, say, tqdm
from plumbing.common.files import sync_file, sync_folder
from plumbing.common.state import get_arrays, read_saved, save_checkpoint, set_arrays
from plumbing.laptop.pictures import (
    accuracies,
    draw_confusion,
    draw_devices,
    draw_metrics,
    list_accuracies,
    try_to_draw,
)
from plumbing.laptop.wandb_file import held_steps
from plumbing.laptop.worker import Worker

from engines import count_answers, server_test_fn
from nets import load_checkpoint

FIT_METRICS = ("fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy")
EVALUATE_METRICS = ("global_eval_loss", "global_eval_accuracy")
TEST_METRICS = ("test_loss", "test_accuracy")
MEASURES = FIT_METRICS + EVALUATE_METRICS + TEST_METRICS
COLUMNS = ("round", *MEASURES, "clients", "failures", "round_seconds")
TIMES = ("fit_seconds", "eval_seconds", "wait_seconds")
TELEMETRY = {  # what a device tells of itself, and the range in which that can be true
    **dict.fromkeys(TIMES, (0, 1e7)),
    "peak_memory_mb": (0, 1e7),
    "cpu_temp_c": (-100, 200),
    "throttled": (0, 2**20 - 1),  # 20 bits
    "load": (0, 1e5),
}
CLIENT_COLUMNS = ("round", "cid", "examples", *FIT_METRICS, *EVALUATE_METRICS, *TELEMETRY)
COUNTS = ("round", "clients", "failures", "examples")  # columns of whole numbers
SECTIONS = {name: "/".join(name.rsplit("_", 1)) for name in MEASURES}  # of wandb: fit/loss and so on
SECTIONS.update({name: f"system/{name}" for name in ("num_clients", "failures", "round_seconds")})
FILES = {
    "model": "server.ptl",
    "best": "best.ptl",
    "history": "history.csv",
    "clients": "clients.csv",
    "metrics": "metrics.png",
    "confusion": "confusion.png",
    "devices": "devices.png",
}
BACKLOG = 16  # finished rounds that may wait for their test, before the next one waits too
SAVE_EVERY = 0.2  # seconds; rounds that are shorter are saved together, so that saving does not slow them down
DRAW_EVERY = 30  # seconds, or twenty times as long as the last drawing took
REPLY = 15  # seconds to wait at most for what wandb's server has to answer, besides its own timeouts
ALERT_EVERY = 3600  # seconds between two alerts for one device
MANY = 100  # clients, beyond which clients.csv alone has the figures of each


def measured(row):
    """The figures of a row of history.csv without those that could not be measured, which are nan there."""
    return {name: value for name, value in row.items() if not math.isnan(value)}


def as_curves(row, clients):
    """What wandb gets of a finished round, {name: value}: its row of history.csv, and the figures of its clients.

    Each figure has its flat name and one in a section; `clients` is num_clients, since clients/ is a section. No page
    can show the curves of more than MANY clients.
    """
    row = {"num_clients" if name == "clients" else name: value for name, value in measured(row).items()}
    figures = {**row, **{SECTIONS[name]: value for name, value in row.items() if name in SECTIONS}}
    for cid, told in clients.items() if len(clients) <= MANY else ():
        figures.update({f"clients/{cid}/{name}": told[name] for name in told if name != "examples"})
    return figures


def cid_order(cid):
    """Sorts cids, str: as numbers where they are numbers, as text after those where they are Flower's own."""
    return (int(cid), cid) if cid.isdecimal() else (math.inf, cid)


def numbers(rows, name):
    """The figures under `name` that there are."""
    return [row[name] for row in rows if not math.isnan(row[name])]


def power_trouble(figures):
    """What a Raspberry Pi's bits say of a round (client.sensors), as a phrase, or None."""
    bits = figures.get("throttled", math.nan)
    bits = 0 if math.isnan(bits) else int(bits)
    if bits & 0b0001:
        return "power supply too weak"
    return "throttled for heat" if bits & 0b1100 else None


def read_table(path):
    """Read a CSV that a Table wrote: (its rows as dictionaries, the numbers of the lines that are no rows).

    Empty cells are nan. A last line without its end, as a power cut may leave it, is left out and not counted. Raises
    OSError, and ValueError where the file is no such CSV.
    """

    def value(name, text):
        if name == "cid":
            return text
        figure = float(text or "nan")
        return int(figure) if name in COUNTS and figure.is_integer() else figure

    header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    names, rows, bad = header.split(","), [], []
    if names[0] != "round":
        raise ValueError("its first column is not round")
    for number, line in enumerate(lines[:-1], 2):  # what follows the last newline is nothing, or cut
        try:
            rows.append({name: value(name, text) for name, text in zip(names, line.split(","), strict=True)})
        except ValueError:
            if number < len(lines):
                bad.append(number)
    return rows, bad


class Table:
    """A CSV that grows, of `rows`, a dictionary each: missing figures are empty cells.

    On the disk each row is there whole or not at all, but that a power cut may cut the last line. `write` leaves it to
    the caller to add to `rows`, once all that belongs to them is written.
    """

    columns = ()

    def __init__(self, path, rows=()):
        """`rows` are those of an earlier run that goes on, of which `path` may have more, or fewer, or be missing."""
        self.path, self.rows = Path(path), list(rows)
        self.columns = list(dict.fromkeys([*self.columns, *(self.rows[0] if self.rows else ())]))
        self.begun = False

    def write(self, rows):
        """Add `rows` to the file. The first time it is written anew, so that it has nothing but the rows that count."""
        if not self.begun or not self.path.exists():
            with atomic_write(self.path) as part:
                header = ",".join(self.columns) + "\n"
                part.write_text(header + self._lines(self.rows) + self._lines(rows), encoding="utf-8", newline="\n")
            self.begun = True
            return
        with open(self.path, "ab", buffering=0) as file:
            size, left = file.tell(), memoryview(self._lines(rows).encode())
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def _lines(self, rows):
        cells = ((row.get(name, math.nan) for name in self.columns) for row in rows)
        return "".join(",".join("" if cell != cell else str(cell) for cell in line) + "\n" for line in cells)


def read_history(folder, last_round, metrics=None):
    """The rows of history.csv in `folder` for the rounds 1 to `last_round`, a dictionary each.

    Says what is missing, and has nan for it: columns that are new, and the last rows, but for what `metrics`, those of
    the checkpoint of `last_round`, know. Raises ValueError where anything else is missing.
    """
    path = Path(folder) / FILES["history"]
    try:
        rows, bad = read_table(path)
        if bad:
            raise ValueError(f"line {bad[0]} is no row")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from None
    rows = [row for row in rows if row["round"] <= last_round]
    if [row["round"] for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"{path} has not one row for each of the rounds 1 to {last_round}")
    if rows and (new := [name for name in COLUMNS if name not in rows[0]]):
        say(f"{path} has no column {', '.join(new)}: its figures are unknown up to round {last_round}")
    empty = dict.fromkeys(COLUMNS, math.nan)
    if len(rows) < last_round:
        known = {name: value for name, value in (metrics or {}).items() if name in COLUMNS and value is not None}
        lost = [{**empty, "round": current} for current in range(len(rows) + 1, last_round + 1)]
        lost[-1].update(known, round=last_round)
        say(f"{path} has lost the rows from round {len(rows) + 1} to {last_round}: figures that are unknown are empty")
        rows += lost
    return [{**empty, **row} for row in rows]


class History(Table):
    """history.csv: a row a round."""

    columns = COLUMNS


class ClientHistory(Table):
    """clients.csv: a row a round and cid, with what the client measured and told; empty where it told nothing."""

    columns = CLIENT_COLUMNS

    def __init__(self, path, last_round=0, source=None):
        """Take over the rows of the rounds 1 to `last_round`, as far as they are there: no later round needs them."""
        old, rows = Path(source or Path(path).parent) / Path(path).name, []
        if last_round and old.exists():
            try:
                rows, bad = read_table(old)
                if bad:
                    say(f"{old}: {len(bad)} lines are no rows, from line {bad[0]} on, and are left out")
            except (OSError, ValueError) as error:  # the run is worth more
                say(f"{old} cannot be read ({error}): it begins again with round {last_round + 1}")
        empty = dict.fromkeys(CLIENT_COLUMNS, math.nan)
        super().__init__(path, [{**empty, **row} for row in rows if row["round"] <= last_round])

    @staticmethod
    def rows_of(rounds):
        """The rows of finished `rounds` (Round)."""
        empty = dict.fromkeys(CLIENT_COLUMNS, math.nan)
        return [
            {**empty, **figures, "round": finished.row["round"], "cid": cid}
            for finished in rounds
            for cid, figures in finished.clients.items()
        ]

    def by_cid(self):
        """The rows of each cid, the cids in order: {cid: [row, …]}."""
        rows = collections.defaultdict(list)
        for row in self.rows:
            rows[row["cid"]].append(row)
        return {cid: rows[cid] for cid in sorted(rows, key=cid_order)}

    def summarise(self, num_rounds):
        """What the user is told of each client at the end of `num_rounds` rounds: a list of lines."""
        trained = [row for row in self.rows if not math.isnan(row["examples"])]  # the others only evaluated
        longest = {}  # round: its longest fit
        for row in trained:
            longest[row["round"]] = max(row["fit_seconds"], longest.get(row["round"], -1.0))
        lines, usual = [], {}
        for cid, rows in self.by_cid().items():
            rows = [row for row in rows if not math.isnan(row["examples"])]
            facts = [f"{len(rows)} of {num_rounds} rounds"]
            fits, evaluations, waits, heat = (numbers(rows, name) for name in (*TIMES, "cpu_temp_c"))
            if fits:
                usual[cid] = statistics.median(fits)
                share = sum(row["fit_seconds"] == longest[row["round"]] for row in rows) / len(rows)
                facts.append(f"fit {usual[cid]:.1f} s (median), the slowest in {share:.0%}")
            for what, seconds in (("evaluate", evaluations), ("waiting", waits)):
                if seconds:
                    facts.append(f"{what} {statistics.median(seconds):.1f} s")
            if heat:
                facts.append(f"{max(heat):.0f} °C at most")
            for trouble, count in collections.Counter(map(power_trouble, rows)).items():
                if trouble is not None:
                    facts.append(f"{trouble}, {count} of {len(rows)} rounds")
            lines.append(f"cid {cid}: {', '.join(facts)}")
        if len(lines) > MANY:
            lines = [f"the figures of each of {len(lines):,} clients are in {FILES['clients']}"]
        if len(usual) > 1:
            slowest = max(usual, key=usual.get)
            others = statistics.median(usual[cid] for cid in usual if cid != slowest)
            medians = f"fit {usual[slowest]:.1f} s, the others {others:.1f} s (medians)"
            lines.append(f"slowest device: cid {slowest}, {medians}")
        return lines


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
    test_loaders: {"test": loader} to test each round's global model on (engines.server_test_fn), or None.
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
        test_loaders=None,
        about=None,
        on_row=None,
        log=None,
    ):
        self.path = Path(save_ckp_path)
        self.folder = self.path.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        self.model = copy.deepcopy(model)
        self.test_loaders, self.about = test_loaders, about or {}
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
        if self.test_loaders is not None:
            set_arrays(self.model, finished.arrays)
            finished.row.update(server_test_fn(self.test_loaders, self.model))
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
            if self.test_loaders is not None and path is not None:
                self._draw_confusion(path)

    def _draw_confusion(self, best_path):
        """Show the best model all test images once more, and draw which class it takes for which."""
        try:
            self.best_model = read_saved(best_path)
        except ValueError as error:
            say(f"{best_path} is not drawn: {error}")
            return
        self.model.load_state_dict(self.best_model["model"])
        self.mistakes = count_answers(self.test_loaders["test"], self.model)
        title = f"{self.about.get('dataset') or ''}: the best model, of round {self.best_model['round']}"
        path, classes = self.path.with_name("confusion.png"), self.about.get("classes")
        try_to_draw(draw_confusion, self.mistakes, classes, path, title)


# ---------------------------------------------------------------------------------------------------------------------
# The runs before.


def other_data(checkpoint, about):
    """What is other in the data of a checkpoint than `about` says, as a phrase, or None.

    Old checkpoints have no dataset_id, and old datasets no id: then only the classes are compared.
    """
    classes, now = checkpoint.get("classes"), about.get("classes")
    if classes is not None and now is not None and list(classes) != list(now):
        old, new = next(pair for pair in itertools.zip_longest(classes, now) if pair[0] != pair[1])
        return f"its classes are others, {printable(old, 40)} where {printable(new, 40)} is now"
    dataset_id, now = checkpoint.get("dataset_id"), about.get("dataset_id")
    if dataset_id is not None and now is not None and dataset_id != now:
        return f"its shards or its test set are others: id {printable(dataset_id, 8)}, now {printable(now, 8)}"
    return None


def find_run(folder: Path, resume: bool | str) -> Path | None:
    """The folder to resume from, or None: `resume` is the value of --resume, which means `folder` where it is True."""
    if not resume:
        if earlier_run(folder):
            if not os.access(folder.parent, os.W_OK):
                raise UserError(f"cannot write to {folder.parent}, to which the earlier run is to be moved")
            say(f"the earlier run in {folder} is moved aside when a round is finished (--resume would go on from it)")
        return None
    source = folder if resume is True else Path(resume)
    if (source / "server.ptl").exists():
        return source
    if resume is not True:
        raise UserError(f"cannot resume from {source}: there is no server.ptl in it")
    aside = moved_aside(folder)
    hint = f" (the newest run that was moved aside: {how_to_resume(aside[-1])})" if aside else ""
    say(f"nothing to resume in {folder}: starting at round 1{hint}")
    return None


def read_args(path: Path) -> dict:
    """The args of the run whose checkpoint is at `path`: {} where there is none, or it cannot be read (see resume)."""
    with contextlib.suppress(Exception):
        return dict(load_checkpoint(path)[1]["args"])
    return {}


def resume(folder: Path, model, about: dict, allow_new_data: bool = False) -> tuple[list[dict], str | None, str]:
    """Put the checkpoint in `folder` into `model`: (the rows of history.csv up to its round, its wandb run id, fedbn).

    The last names the run to its devices, "" where they keep nothing for it (server.py, --fedbn).

    `about` is what this run's checkpoints will say of themselves. Raises UserError where the checkpoint or its history
    cannot be read, or does not fit; other data is refused unless it is allowed.
    """
    path = folder / "server.ptl"
    try:
        saved, checkpoint = load_checkpoint(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot resume from {path}: {error}{way_out(folder)}") from None
    try:
        mine = {"dataset": about["dataset"], "net": type(model).__name__, "num_classes": model.num_classes}
        for name, value in {**mine, "in_channels": model.in_channels}.items():
            if checkpoint[name] != value:
                raise UserError(f"cannot resume from {path}: its {name} is {checkpoint[name]}, not {value}")
        other = other_data(checkpoint, about)
        if other is not None and not allow_new_data:
            raise UserError(f"cannot resume from {path}: {other}; --allow_new_data goes on with the new data")
        model.load_state_dict(saved.state_dict())
        rows = read_history(folder, checkpoint["round"], checkpoint["metrics"])
        return rows, checkpoint["wandb_run_id"], checkpoint.get("fedbn", "")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"cannot resume from {path}: {error}") from None
    except Exception as error:  # whatever load_state_dict makes of files that are not ours
        reason = f"it or history.csv is damaged, or not of this suite ({type(error).__name__})"
        raise UserError(f"cannot resume from {path}: {reason}") from None


def way_out(folder):
    """How to resume without server.ptl in `folder`, as the end of a sentence; "" where best.ptl cannot be read."""
    best = folder / FILES["best"]
    try:
        _, checkpoint = load_checkpoint(best)
    except (OSError, ValueError):
        return ""
    command = shlex.join(["cp", str(best), str(folder / FILES["model"])])
    return f"; to resume from best.ptl, of round {checkpoint.get('round')}, first: {command}"


def best_of(folder, last_round, about):
    """The best of the rounds up to `last_round`: (its test accuracy, the file that has its model), or (-1.0, None).

    That is best.ptl, or server.ptl where a kill came between the two. Models of other data do not count: their
    accuracy was measured on another test set.
    """
    best, best_path = -1.0, None
    for path in (folder / "best.ptl", folder / "server.ptl"):
        if not last_round or not path.exists():
            continue
        try:
            checkpoint = read_saved(path)
            accuracy = checkpoint["metrics"].get("test_accuracy")
            counts = checkpoint["round"] <= last_round and other_data(checkpoint, about) is None
        except Exception as error:  # a damaged best.ptl, which the next best model replaces
            say(f"{path} is not used: {printable(error)}")
            continue
        if counts and accuracy is not None and accuracy > best:
            best, best_path = accuracy, path
    return best, best_path


def keep_best(path, best_path):
    """Make `path`, best.ptl, a copy of what `best_of` found, where that is not best.ptl itself."""
    if best_path not in (None, path):
        with atomic_write(path) as part:
            shutil.copyfile(best_path, part)


def earlier_run(folder):
    """Whether an earlier run has left anything in `folder`."""
    return any((folder / name).exists() for name in FILES.values())


def moved_aside(folder):
    """The folders to which earlier runs of `folder` were moved and from which one can go on, the newest last."""
    dated = re.compile(re.escape(folder.name) + r"\.\d{4}-\d\d-\d\d_\d{6}(_\d+)?")  # no run of a dataset like Name.v2
    return sorted(path.parent for path in folder.parent.glob("*/server.ptl") if dated.fullmatch(path.parent.name))


def how_to_resume(folder):
    return f"--resume {shlex.quote(str(folder))}"


def move_aside(folder, names):
    """Move the files `names` of an earlier run, as far as they are in `folder`, to a folder with the date in its name.

    That one is whole before anything is taken away here, server.ptl first: a kill in between leaves a run whole that
    one can go on from.
    """
    found = [name for name in names if (folder / name).exists()]
    if not found:
        return
    name = f"{folder.name}.{time.strftime('%Y-%m-%d_%H%M%S')}"
    taken = sum(path.name.startswith(name) for path in folder.parent.iterdir())
    aside = folder.with_name(f"{name}_{taken + 1}" if taken else name)
    part = folder.with_name(f".{aside.name}.part")
    part.mkdir()
    try:
        for name in found:
            try:
                os.link(folder / name, part / name)
            except OSError:  # a file system without links, or another one
                shutil.copy2(folder / name, part / name)
                sync_file(part / name)
        sync_folder(part)
        part.rename(aside)
        sync_folder(folder.parent)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for name in found:
        (folder / name).unlink()
    hint = f"; to go on from it: {how_to_resume(aside)}" if "server.ptl" in found else ""
    say(f"moved {', '.join(found)} of the earlier run to {aside}{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# The curves, and what is seen of the rounds.


def wandb_mode(wandb):
    """How to run it, and why so: WANDB_MODE where it is set, else online if a key is at hand and works, or offline."""
    mode = os.environ.get("WANDB_MODE")
    if mode not in (None, "online"):
        return ("offline" if mode == "dryrun" else mode), "as WANDB_MODE says"
    why = "no key is at hand"
    try:
        has_key = wandb.login(prompt=False)
    except Exception as error:  # a key that is not known, no network: wandb has many errors of its own
        has_key, why = False, printable(error)
    if mode == "online" and not has_key:
        raise UserError(f"WANDB_MODE is online, but {why}: run `wandb login` or set WANDB_MODE=offline")
    return ("online" if has_key else "offline"), why


def start_wandb(dataset: str, run_id: str | None, config: dict, rows=(), needed: bool = True):
    """Start or continue a run in Weights & Biases: (Curves, one line that says where it is to be seen).

    `rows` are those of history.csv so far. Where the run `run_id` has later steps than those, or is not to be found,
    it would end up with double steps: a new one is started, which gets all rows (Curves.catch_up). Where it is not
    `needed` and nothing is left to send to it, none is started: (None, None).
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or else its crashes are reported to its makers
    os.environ.setdefault("WANDB_SILENT", "true")  # what it has to say, we say
    folder = os.environ.get("WANDB_DIR", str(ROOT))
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # or else tables and models go to the home too
        os.environ.setdefault(name, str(Path(folder) / "wandb"))
    try:
        import matplotlib  # noqa: F401 (for the pictures; better missed now than at the end)
        import wandb  # here, after those variables are set
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install wandb matplotlib") from None

    mode, why = wandb_mode(wandb)
    wandb_dir, last_round = wandb.Settings(root_dir=folder).wandb_dir, len(rows)
    options = {
        "settings": wandb.Settings(console="off", init_timeout=30, finish_timeout=30, finish_timeout_raises=True),
        "project": os.environ.get("WANDB_PROJECT") or "FL-IoT",
        "name": os.environ.get("WANDB_NAME") or dataset,
        "config": config,
        "dir": folder,
    }
    if mode == "online":
        try:
            run = wandb.init(mode=mode, resume="allow", id=run_id, **options)
            held = set(range(run.starting_step))  # as its server tells, if it knows the run
            if not run.resumed and run_id is not None:
                held = held_steps(wandb_dir, run_id, "run") or set()
            if max(held, default=0) > last_round:
                run.finish()
                if not needed:
                    return None, None
                run, held = wandb.init(mode=mode, **options), set()
            return Curves(run, held, online=True), f"curves: {run.url}"
        except Exception as error:
            why = printable(error)
            mode = "offline"
    held = set()
    if mode == "offline" and run_id is not None:
        held = held_steps(wandb_dir, run_id)
        if held is None or max(held, default=0) > last_round:
            run_id, held = None, set()
    if not needed and (mode != "offline" or run_id is None or all(row["round"] in held for row in rows)):
        return None, None
    try:
        run = wandb.init(mode=mode, id=run_id, **options)
    except Exception as error:
        raise UserError(f"Weights & Biases cannot start with WANDB_MODE={mode}: {printable(error)}") from None
    if mode != "offline":
        return Curves(run), f"curves: WANDB_MODE is {mode}"
    where = f"curves: Weights & Biases is offline ({why}); send them later with: {how_to_sync(run)}"
    return Curves(run, held), where


def how_to_sync(run):
    folder = Path(run.dir).parent
    option = "" if folder.name.startswith("offline-") else "--no-skip-online "
    command = Path(sys.executable).with_name("wandb")  # which is on no PATH, where the scripts run by .venv/bin/python
    return f"{shlex.quote(str(command)) if command.exists() else 'wandb'} sync {option}{shlex.quote(str(folder))}"


def describe_code() -> dict:
    """{"git_commit": hash, "git_modified": whether the files differ from it}; {} where no git has this folder."""

    def git(*args):
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if git("ls-files", Path(__file__).name):  # and not some other repository, in which this folder lies
            modified = git("status", "--porcelain", "--untracked-files=no", ".")
            return {"git_commit": git("rev-parse", "HEAD"), "git_modified": bool(modified)}
    return {}


def describe_data(folder: Path) -> dict:
    """What dataset.json in `folder` says, for people: without the digests and the table of the split; {} without it."""
    try:
        facts = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in facts.items() if name not in ("shards", "test", "split")}


class Curves:
    """The run in Weights & Biases. Whatever happens to it, the training goes on.

    `held` are the steps that the run has already. What its server has to answer, the tables and the models, is sent
    from a thread of its own, for which nobody waits longer than REPLY seconds.
    """

    def __init__(self, run, held=(), online=False):
        self.run, self.held, self.online = run, held, online
        self.failed = False
        self.last_step = None  # the last that was logged here: the one that can still be added to
        self.alerted = {}  # when the last alert for a device was sent
        with contextlib.suppress(Exception):  # as in log
            run.define_metric("*", step_metric="round")
            for name in SECTIONS:  # drawn once, in its section; the flat name is for the table of runs and old charts
                best = {"test_accuracy": "max", "test_loss": "min"}.get(name)
                run.define_metric(name, step_metric="round", summary=best, hidden=True)

    def catch_up(self, rows):
        """Log the rows of history.csv that the run has not, as after a kill, when its last ones were not sent yet."""
        missing = [row for row in rows if row["round"] not in self.held]
        for row in missing:
            self.log(as_curves(row, {}), step=row["round"])
        if missing:
            first, last = missing[0]["round"], missing[-1]["round"]
            say(f"curves: {len(missing)} of the rounds {first} to {last} were missing, and are sent from history.csv")

    def log(self, figures, step):
        try:
            self.run.log(figures, step=step)
            self.last_step = step
        except Exception as error:  # its process has died; all figures are in history.csv
            if not self.failed:
                say(f"curves: Weights & Biases fails from round {step} on: {printable(error)}")
            self.failed = True

    def describe_client(self, cid, facts):
        """Put what a client runs on into the run's config."""
        with contextlib.suppress(Exception):  # as in log
            self.run.config.update({f"clients/{cid}": facts}, allow_val_change=True)

    def show_split(self, split, classes):
        """Send the `split` (data.describe_dataset), where it is known, as a table beside the run's first round."""
        if split is not None and not self.held:
            table = {"columns": ["cid", *classes], "data": [[cid, *counts] for cid, counts in enumerate(split)]}
            self._in_time(lambda wandb: self.run.log({"split": wandb.Table(**table)}, step=1))

    def watch(self, current, missing, clients):
        """Send alerts for the devices that a person has to look after, in or before the round `current`.

        `missing` says for how long a device has been missing, {cid: "3 rounds"}; `clients` has the figures of those
        that took part, {cid: {name: value}}.
        """
        troubles = {cid: power_trouble(figures) for cid, figures in clients.items()}
        troubles.update({cid: f"missing for {how_long}" for cid, how_long in missing.items()})
        now = time.monotonic()
        for cid, trouble in troubles.items():
            if trouble is not None and now - self.alerted.get(cid, -math.inf) >= ALERT_EVERY:
                self.alerted[cid] = now
                self.alert(f"cid {cid}: {trouble}", f"{self.run.name}, round {current}: cid {cid}: {trouble}")

    def alert(self, title, text):
        with contextlib.suppress(Exception):  # as in log
            self.run.alert(title[:63], text, level="WARN", wait_duration=ALERT_EVERY)

    def finish(self, models=None, mistakes=None, classes=None):
        """End the run, with the best model's `mistakes` (engines.count_answers) and, online, the files of the `models`,
        {"best": path, "latest": path}."""
        if not self.failed:
            self._in_time(lambda wandb: self._log_end(wandb, models or {}, mistakes, classes))
        try:
            self.run.finish()
        except Exception:  # its server is gone, or its process
            say(f"curves: not all are sent; send them later with: {how_to_sync(self.run)}")

    def _in_time(self, act):
        """Do `act(wandb)`, and wait for it, but not for ever: a server that is gone is asked for 20 s, say."""

        def run():
            import wandb

            with contextlib.suppress(Exception):  # as in log
                act(wandb)

        thread = threading.Thread(target=run, name="curves", daemon=True)
        thread.start()
        thread.join(REPLY)

    def _log_end(self, wandb, models, mistakes, classes):
        if mistakes is not None and self.last_step is not None:
            names = [str(name) for name in classes or range(len(mistakes))]
            figures, most = {}, wandb.Table.MAX_ROWS  # of a longer table wandb keeps so many, without a word
            # Of many classes most are never mistaken for each other, and the counts of 0 are left out.
            cells = np.argwhere(mistakes if mistakes.size > most else mistakes + 1).tolist()
            if len(cells) > most:
                why = f"its {len(cells):,} rows are more than the {most:,} that Weights & Biases shows"
                say(f"curves: test/confusion is not sent, for {why}; {FILES['confusion']} has all of them")
            else:
                pairs = [[names[row], names[column], int(mistakes[row, column])] for row, column in cells]
                columns = ["Actual", "Predicted", "nPredictions"]
                table = wandb.Table(columns=columns, data=pairs)
                figures["test/confusion"] = wandb.plot_table(
                    "wandb/confusion_matrix/v1", table, dict(zip(columns, columns))
                )
            found = [[name, share] for name, share in zip(names, accuracies(mistakes)) if not math.isnan(share)]
            bars = wandb.plot.bar(wandb.Table(columns=["class", "accuracy"], data=found), "class", "accuracy")
            self.run.log({**figures, "test/class_accuracy": bars}, step=self.last_step)
        if self.online:
            self._log_models(wandb, models)

    def _log_models(self, wandb, models):
        """Send the best and the last model, once, as versions of one artifact; one where they are the same.

        So a run that is killed has sent none; they lie in ckps/, and the end of the resumed run sends them.
        """
        abouts = {alias: read_saved(path) for alias, path in models.items()}
        if len({about["round"] for about in abouts.values()}) == 1:
            models = dict(list(models.items())[:1])
        for alias, path in models.items():  # each is given "latest" too, by wandb itself, and the last one keeps it
            about = {"round": abouts[alias]["round"], "net": abouts[alias]["net"], **(abouts[alias]["metrics"] or {})}
            name = re.sub(r"[^\w.-]", "-", f"{self.run.name}-{self.run.id}", flags=re.ASCII)  # all that wandb takes
            artifact = wandb.Artifact(name, type="model", metadata=about)
            artifact.add_file(str(path), name="model.ptl", policy="immutable", skip_cache=True)
            self.run.log_artifact(artifact, aliases=[alias])


def complete(record, run_id):
    """Do what a kill in the last round of all has prevented: `record` is that of a run to which nothing is added.

    Puts best.ptl right, draws the pictures, and sends the last rows to wandb.
    """
    try:
        keep_best(record.folder / "best.ptl", record.best_path)
        record.close()
    except OSError as error:  # a copy on a medium that takes no more
        say(f"cannot write to {record.folder}: {error.strerror}")
    about, rows = record.about, record.history.rows
    curves, where = start_wandb(about["dataset"], run_id, about["args"], rows, needed=False)
    if curves is not None:
        say(where)
        curves.catch_up(rows)
        curves.finish(record.models(), record.mistakes, about["classes"])


class Progress:
    """What the user sees of the rounds: one bar on a terminal, one line a round otherwise."""

    def __init__(self, num_rounds, last_round):
        self.num_rounds, self.seconds = num_rounds, collections.deque(maxlen=9)  # the seconds of the last rounds
        columns, rows = (
            shutil.get_terminal_size()
        )  # 80 and 24 on a terminal that does not know, where tqdm draws nothing
        options = {"ncols": columns - 1, "nrows": rows, "bar_format": "round {n_fmt}/{total_fmt} {bar}"}
        self.bar = tqdm(total=num_rounds, initial=last_round, disable=not sys.stderr.isatty(), **options)

    def show_row(self, row):
        if not self.bar.disable:
            self.seconds.append(row["round_seconds"])
            usual = statistics.median(self.seconds)
            figures = " ".join(f"{name} {row[f'{name}_accuracy']:.3f}" for name in ("fit", "eval", "test"))
            to_go = tqdm.format_interval(usual * (self.num_rounds - row["round"]))
            self.bar.ncols = shutil.get_terminal_size().columns - 1
            self.bar.bar_format = (
                f"round {{n_fmt}}/{{total_fmt}} {{bar}} {figures}, {usual:.1f} s a round, {to_go} to go"
            )
            self.bar.update()
            return
        names = ("fit_loss", "fit_accuracy", "eval_accuracy", "test_accuracy")
        figures = "  ".join(f"{name} {row[name]:.3f}" for name in names)
        counts = f"{row['clients']} clients, {row['failures']} failures, {row['round_seconds']:.1f} s"
        say(f"round {row['round']}/{self.num_rounds}  {figures}  ({counts})")

    def show_drop(self, current, cid, reason):
        say(f"round {current}: dropped cid {cid}: {reason}")

    def close(self) -> None:
        self.bar.close()
