"""What a run leaves and shows: its history, checkpoints, curves and pictures; and how a later run goes on from them.

strategies.py hands over each finished round to a Record, server.py builds it. Nothing here knows of Flower.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import glob
import itertools
import json
import math
import os
import queue
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

from libs import ROOT, UserError, atomic_write, np, picture, plain, printable, say, torch, tqdm, try_to_draw

import pandas as pd

from engines import count_answers, server_test_fn
from nets import load_checkpoint, save_checkpoint, set_arrays

FIT_METRICS = ("fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy")
EVALUATE_METRICS = ("global_eval_loss", "global_eval_accuracy")
TEST_METRICS = ("test_loss", "test_accuracy")
MEASURES = FIT_METRICS + EVALUATE_METRICS + TEST_METRICS
COLUMNS = ("round", *MEASURES, "clients", "failures", "round_seconds")
TIMES = ("fit_seconds", "eval_seconds", "wait_seconds")
TELEMETRY = (*TIMES, "peak_memory_mb", "cpu_temp_c", "throttled", "load")
CLIENT_COLUMNS = ("round", "cid", "examples", *FIT_METRICS, *EVALUATE_METRICS, *TELEMETRY)
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
STALLED = 3600  # seconds without progress until the worker is given up, as on a network drive that hangs
END = object()  # the end of the worker's queue


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


class History:
    """The rows of history.csv, a dictionary each; the file is rewritten whole whenever some are added."""

    def __init__(self, path, last_round=0, source=None):
        """Take over the rows of the rounds 1 to `last_round`, from the folder `source` where it is another than that of
        `path`. Raises ValueError when not all are there."""
        self.path, self.rows = Path(path), []
        if last_round:
            path = Path(source or self.path.parent) / self.path.name
            try:
                table = pd.read_csv(path)[list(COLUMNS)].astype(float)
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"{path} is missing or damaged: {error}") from None
            table = table[table["round"] <= last_round]
            if list(table["round"]) != list(range(1, last_round + 1)):
                raise ValueError(f"{path} has not one row for each of the rounds 1 to {last_round}")
            self.rows = table.astype({"round": int, "clients": int, "failures": int}).to_dict("records")

    def extend(self, rows):
        self.rows.extend(rows)
        with atomic_write(self.path) as part:
            pd.DataFrame(self.rows, columns=COLUMNS).to_csv(part, index=False)


class ClientHistory:
    """clients.csv: a row a round and cid, with what the client measured and told; empty where it told nothing."""

    def __init__(self, path, last_round=0, source=None):
        """Take over the rows of the rounds 1 to `last_round`, as far as they are there: no later round needs them."""
        self.path, self.rows = Path(path), []
        old = Path(source or self.path.parent) / self.path.name
        if last_round and old.exists():
            with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: the run is worth more
                table = pd.read_csv(old, dtype={"cid": str})[list(CLIENT_COLUMNS)]
                self.rows = table[table["round"] <= last_round].to_dict("records")
        self.lines = [self._line(row) for row in self.rows]

    def extend(self, rounds):
        for finished in rounds:
            for cid, figures in finished.clients.items():
                row = {**dict.fromkeys(CLIENT_COLUMNS, math.nan), **figures, "round": finished.row["round"], "cid": cid}
                self.rows.append(row)
                self.lines.append(self._line(row))
        with atomic_write(self.path) as part:
            part.write_text("\n".join([",".join(CLIENT_COLUMNS), *self.lines, ""]), encoding="utf-8")

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

    @staticmethod
    def _line(row):
        cells = [row[name] for name in CLIENT_COLUMNS]
        return ",".join("" if isinstance(cell, float) and math.isnan(cell) else str(cell) for cell in cells)


@dataclasses.dataclass
class Round:
    """A finished round: its row of history.csv, the global model's arrays, and {cid: {name: value}} of its clients."""

    row: dict
    arrays: list
    clients: dict


class Worker:
    """A thread that does what it is given, in order. `check`, `put` and `close` raise what fails in it, and ends it.

    `one` is called with each item as it comes, `some` with a list of those that came since, at most every `pause`
    seconds, and `last` with nothing, at the end.
    """

    def __init__(self, name, one, some, last, backlog, pause):
        self.one, self.some, self.last, self.pause = one, some, last, pause
        self.items = queue.Queue(backlog)
        self.error = None
        self.closed = False
        self.steps = 0  # calls that are over: the sign of life
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def put(self, item):
        """Give it an item; waits where `backlog` of them wait already."""
        if self.closed:
            raise RuntimeError(f"{self.thread.name} is closed")
        self._put(item)

    def close(self) -> None:
        """End the thread. Afterwards all that was put is done, or this raises what prevented it.

        Waits as long as it goes on; raises TimeoutError when nothing is done for STALLED seconds. May be called again.
        """
        if not self.closed:
            self.closed = True
            self._put(END)
        while self.thread.is_alive():
            before = self.steps
            self.thread.join(STALLED)
            if self.thread.is_alive() and self.steps == before:
                raise TimeoutError(f"the {self.thread.name} hangs: nothing was done for {STALLED} s")
        self.check()

    def _put(self, item):
        while self.thread.is_alive():
            try:
                self.items.put(item, timeout=0.5)
                return
            except queue.Full:
                continue
        self.check()

    def _run(self):
        waiting, due, ended = [], 0.0, False
        try:
            while not ended:
                item = self._next(due if waiting else None)
                if item is END:
                    ended = True
                elif item is not None:
                    self.one(item)
                    waiting.append(item)
                if waiting and (ended or time.monotonic() >= due):
                    self.some(waiting)
                    waiting, due = [], time.monotonic() + self.pause
                self.steps += 1
            self.last()
        except BaseException as error:
            self.error = error

    def _next(self, until):
        """The next item, or None where none comes until then; `until` None waits for ever."""
        timeout = None if until is None else max(0.0, until - time.monotonic())
        try:
            return self.items.get(timeout=timeout)
        except queue.Empty:
            return None


class Record:
    """Keeps what each finished round leaves: a thread tests, saves, logs and draws it, while the devices train on.

    model: the net; a copy of it takes the arrays of each round, to test and save them.
    save_ckp_path: where the newest global model goes; the rest of FILES goes beside it. What an earlier run left there
        is moved aside when the first round is saved, unless this run goes on from it.
    last_round: the last round that is finished already; history.csv is continued after it.
    source: the folder with the files of those rounds, where they are not those beside `save_ckp_path`.
    test_loaders: {"test": loader} to test each round's global model on (engines.server_test_fn), or None.
    about: further entries of the checkpoint (nets.save_checkpoint).
    on_row: called with each row of history.csv when it is saved.
    log: called as log(dictionary, step=round), such as the `log` of a wandb run.

    What fails in the thread ends it; `check`, `add` and `close` raise it, and the rounds before stay saved.
    """

    def __init__(
        self, model, save_ckp_path, last_round=0, source=None, test_loaders=None, about=None, on_row=None, log=None
    ):
        self.path = Path(save_ckp_path)
        self.folder = self.path.parent
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = copy.deepcopy(model)
        self.test_loaders, self.about = test_loaders, about or {}
        self.on_row, self.log = on_row, log
        source = Path(source or self.folder)
        self.history = History(self.path.with_name("history.csv"), last_round, source)
        self.clients = ClientHistory(self.path.with_name("clients.csv"), last_round, source)
        self.best, self.best_path = best_of(source, last_round, self.about)
        self.goes_on = last_round > 0 and source.resolve() == self.folder.resolve()
        self.begun = False  # whether this run has saved anything
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

    def close(self) -> None:
        """End the worker: afterwards every round that was handed over is saved, logged and in the picture."""
        self.worker.close()

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
        if self.test_loaders is not None:
            set_arrays(self.model, finished.arrays)
            finished.row.update(server_test_fn(self.test_loaders, self.model))

    def _save(self, tested):
        """Save tested rounds, in this order: clients.csv, history.csv, server.ptl, best.ptl, wandb; screen and picture.

        server.ptl decides which rounds are finished, so that a kill between any two of these loses none: a run that
        goes on drops later rows of the tables and runs those rounds again; it takes best.ptl from server.ptl where
        that is better (best_of), and sends to wandb the rows that are missing there (start_wandb).
        """
        if not self.begun:
            self._begin()
        self.clients.extend(tested)
        self.history.extend([finished.row for finished in tested])
        for finished in tested:
            is_best = finished.row["test_accuracy"] > self.best
            if is_best or finished is tested[-1]:
                self._save_checkpoint(self.path.name, finished)
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
        self.best_model = torch.load(best_path, map_location="cpu", weights_only=True)
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


def resume(folder: Path, model, about: dict, allow_new_data: bool = False) -> tuple[list[dict], str | None, str]:
    """Put the checkpoint in `folder` into `model`: (the rows of history.csv up to its round, its wandb run id, fedbn).

    The last names the run to its devices, "" where they keep nothing for it (server.py, --fedbn).

    `about` is what this run's checkpoints will say of themselves. Raises UserError where the checkpoint or its history
    cannot be read, or does not fit; other data is refused unless it is allowed.
    """
    path = folder / "server.ptl"
    try:
        saved, checkpoint = load_checkpoint(path)
        mine = {"dataset": about["dataset"], "net": type(model).__name__, "num_classes": model.num_classes}
        for name, value in {**mine, "in_channels": model.in_channels}.items():
            if checkpoint[name] != value:
                raise UserError(f"cannot resume from {path}: its {name} is {checkpoint[name]}, not {value}")
        other = other_data(checkpoint, about)
        if other is not None and not allow_new_data:
            raise UserError(f"cannot resume from {path}: {other}; --allow_new_data goes on with the new data")
        model.load_state_dict(saved.state_dict())
        rows = History(folder / "history.csv", checkpoint["round"]).rows
        return rows, checkpoint["wandb_run_id"], checkpoint.get("fedbn", "")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"cannot resume from {path}: {error}") from None
    except Exception as error:  # whatever torch.load, load_state_dict and pandas make of files that are not ours
        reason = f"it or history.csv is damaged, or not of this suite ({type(error).__name__})"
        raise UserError(f"cannot resume from {path}: {reason}") from None


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
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            accuracy = checkpoint["metrics"].get("test_accuracy")
            counts = checkpoint["round"] <= last_round and other_data(checkpoint, about) is None
        except Exception:  # a damaged best.ptl, which the next best model replaces
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
    return sorted(path.parent for path in folder.parent.glob(f"{glob.escape(folder.name)}.*/server.ptl"))


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
    for name in found:
        try:
            os.link(folder / name, part / name)
        except OSError:  # a file system without links, or another one
            shutil.copy2(folder / name, part / name)
    part.rename(aside)
    for name in found:
        (folder / name).unlink()
    hint = f"; to go on from it: {how_to_resume(aside)}" if "server.ptl" in found else ""
    say(f"moved {', '.join(found)} of the earlier run to {aside}{hint}")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, to be seen at 800 pixels' width.

STYLES = {"fit": "C0-", "eval": "C1--", "global_eval": "C2-.", "test": "C3:"}


def best_row(rows):
    """The row of history.csv with the best test accuracy, or None where none was measured."""
    tested = [row for row in rows if not math.isnan(row["test_accuracy"])]
    return max(tested, key=lambda row: row["test_accuracy"], default=None)


def draw_metrics(rows, path, title):
    """Draw the `rows` of history.csv, [{"round", …}, …], into `path`: loss and accuracy, and where it was best."""
    rounds, best = [row["round"] for row in rows], best_row(rows)
    with picture(path, 11, 4.4, title) as figure:
        for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            for name, style in STYLES.items():
                values = np.array([row[f"{name}_{measure}"] for row in rows], float)
                values[~(np.abs(values) < 1e30)] = math.nan  # or no axis fits
                there = np.concatenate([[False], np.isfinite(values), [False]])
                alone = there[1:-1] & ~there[:-2] & ~there[2:]  # a number between two gaps, which no line shows
                marked = alone | (len(rows) < 20)
                axes.plot(rounds, values, style, marker=".", markevery=marked, label=f"{name}_{measure}")
            if best is not None:
                label = f"best: round {best['round']}, {best['test_accuracy']:.3f}" if measure == "accuracy" else None
                axes.axvline(best["round"], color="0.6", linewidth=0.8, zorder=0)
                axes.plot(best["round"], best[f"test_{measure}"], "k*", markersize=10, label=label)
            axes.set(xlabel="round", ylabel=measure)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.3)
            axes.legend()


def draw_devices(clients, path, title):
    """Draw into `path` how long each device trained, evaluated and waited in each round.

    `clients` are the rows of clients.csv, {cid: [row, …]}. A device that was slow has a bright line under fit, and
    waits least; white is a round without it.
    """
    rounds = [row["round"] for rows in clients.values() for row in rows]
    if not rounds:
        return
    first, last = min(rounds), max(rounds)
    height, title = min(2.4 + 0.22 * len(clients), 9), f"{title}: seconds of each device in each round"
    with picture(path, 11, height, title) as figure:
        for axes, name, what in zip(figure.subplots(1, 3, sharey=True), TIMES, ("fit", "evaluate", "waiting")):
            seconds = np.full((len(clients), last - first + 1), math.nan)
            for line, rows in zip(seconds, clients.values()):
                line[[row["round"] - first for row in rows]] = [row[name] for row in rows]
            seconds = seconds.clip(0, 1e6)
            known = [line[np.isfinite(line)] for line in seconds]
            # By what is usual for the slowest, so that one long pause does not darken all the rest.
            most = max([0.01] + [1.25 * np.median(line) for line in known if len(line)])
            extent = (first - 0.5, last + 0.5, len(clients) - 0.5, -0.5)
            image = axes.imshow(seconds, aspect="auto", interpolation="nearest", vmin=0, vmax=most, extent=extent)
            figure.colorbar(image, ax=axes, location="bottom", extend="max", label="s")
            axes.set(title=what, xlabel="round")
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            step = math.ceil(len(clients) / 30)
            axes.set_yticks(range(0, len(clients), step), [f"cid {cid}" for cid in list(clients)[::step]])


def draw_confusion(counts, classes, path, title):
    """Draw `counts` (engines.count_answers) into `path`: a row a class, a column what its images were taken for."""
    names = [plain(name, 20) for name in classes or range(len(counts))]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right, all_images = np.trace(counts), max(counts.sum(), 1)
    with picture(path, 8, 7, f"{title}: accuracy {right / all_images:.3f} on {all_images:,} test images") as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        figure.colorbar(image, ax=axes, label="share of the images of a class")
        axes.set(xlabel="what the model says", ylabel="class, and how many of its images are found")
        step = math.ceil(len(counts) / 40)
        found = [
            f"{name}  {'–' if math.isnan(share) else f'{share:.2f}'}" for name, share in zip(names, accuracies(counts))
        ]
        slope = 45 if len(counts) <= 20 else 90
        axes.set_xticks(range(0, len(counts), step), names[::step], rotation=slope, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(0, len(counts), step), found[::step])
        for (row, column), count in np.ndenumerate(counts if len(counts) <= 20 else np.zeros((0, 0))):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, count, color=colour, ha="center", va="center", fontsize="small")


def accuracies(counts):
    """The share of the images of each class that are found, a list; nan for a class of which there are none."""
    return [row[index] / row.sum() if row.any() else math.nan for index, row in enumerate(counts)]


def list_accuracies(counts, classes):
    """The accuracy of each class, as text; of many classes that of the worst and the best alone."""
    names = [printable(name, 20) for name in classes or range(len(counts))]
    known = [(share, name) for share, name in zip(accuracies(counts), names) if not math.isnan(share)]
    if len(known) > 12:
        known.sort()
        return f"worst {list_pairs(known[:5])}; best {list_pairs(known[-5:])}"
    return list_pairs(known)


def list_pairs(pairs):
    return ", ".join(f"{name} {share:.2f}" for share, name in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# The curves, and what is seen of the rounds.


def logged_steps(path):
    """The steps in a .wandb file, as far as it can be read: its writer may have been killed.

    It is a log in LevelDB's format (its doc/log_format.md) of wandb's own records, after 7 bytes of wandb's.
    """
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    steps, record = set(), b""
    with open(path, "rb") as file:
        for number, block in enumerate(iter(lambda: file.read(32768), b"")):
            at = 0 if number else 7
            while at + 7 <= len(block):
                _, length, kind = struct.unpack_from("<IHB", block, at)
                part = block[at + 7 : at + 7 + length]
                if kind not in (1, 2, 3, 4) or len(part) < length:  # whole, first, middle, last; else the end was lost
                    return steps
                record = part if kind in (1, 2) else record + part
                at += 7 + length
                if kind in (1, 4):
                    try:
                        logged = WandbRecord.FromString(record)
                    except Exception:  # protobuf's own error, of which only the name differs from version to version
                        return steps
                    if logged.HasField("history"):
                        steps.add(logged.history.step.num)
    return steps


def held_steps(wandb_dir, run_id, names="*run"):
    """The steps that the folders `names` of a run in `wandb_dir` hold; None where there are none."""
    paths = list(Path(wandb_dir).glob(f"{names}-*-{glob.escape(str(run_id))}/*.wandb"))
    return set().union(*map(logged_steps, paths)) if paths else None


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
        "project": "FL-IoT",
        "name": dataset,
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
            pairs = [[names[row], names[column], int(count)] for (row, column), count in np.ndenumerate(mistakes)]
            columns = ["Actual", "Predicted", "nPredictions"]
            table = wandb.Table(columns=columns, data=pairs)
            matrix = wandb.plot_table("wandb/confusion_matrix/v1", table, dict(zip(columns, columns)))
            found = [[name, share] for name, share in zip(names, accuracies(mistakes)) if not math.isnan(share)]
            bars = wandb.plot.bar(wandb.Table(columns=["class", "accuracy"], data=found), "class", "accuracy")
            self.run.log({"test/confusion": matrix, "test/class_accuracy": bars}, step=self.last_step)
        if self.online:
            self._log_models(wandb, models)

    def _log_models(self, wandb, models):
        """Send the best and the last model, once, as versions of one artifact; one where they are the same.

        So a run that is killed has sent none; they lie in ckps/, and the end of the resumed run sends them.
        """
        abouts = {alias: torch.load(path, map_location="cpu", weights_only=True) for alias, path in models.items()}
        if len({about["round"] for about in abouts.values()}) == 1:
            models = dict(list(models.items())[:1])
        for alias, path in models.items():  # each is given "latest" too, by wandb itself, and the last one keeps it
            about = {"round": abouts[alias]["round"], "net": abouts[alias]["net"], **(abouts[alias]["metrics"] or {})}
            artifact = wandb.Artifact(f"{self.run.name}-{self.run.id}", type="model", metadata=about)
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
