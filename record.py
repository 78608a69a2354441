"""What a run leaves and shows: its history, checkpoints, curves and picture; and how a later run goes on from them.

strategies.py hands over each finished round to a Record, server.py builds it. Nothing here knows of Flower.
"""

import copy
import dataclasses
import math
import os
import queue
import sys
import threading
import time
from pathlib import Path

from libs import ROOT, UserError, atomic_write, printable, say, tqdm

import pandas as pd

from engines import server_test_fn
from nets import load_checkpoint, save_checkpoint, set_arrays

FIT_METRICS = ("fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy")
EVALUATE_METRICS = ("global_eval_loss", "global_eval_accuracy")
TEST_METRICS = ("test_loss", "test_accuracy")
MEASURES = FIT_METRICS + EVALUATE_METRICS + TEST_METRICS
COLUMNS = ("round", *MEASURES, "clients", "failures", "round_seconds")
FILES = {"model": "server.ptl", "best": "best.ptl", "history": "history.csv", "picture": "metrics.png"}
BACKLOG = 16  # finished rounds that may wait for their test, before the next one waits too
SAVE_EVERY = 0.2  # seconds; rounds that are shorter are saved together, so that saving does not slow them down
DRAW_EVERY = 30  # seconds
STALLED = 3600  # seconds without progress until the worker is given up, as on a network drive that hangs
END = object()  # the end of the worker's queue


def measured(row):
    """The figures of a row of history.csv without those that could not be measured, which are nan there."""
    return {name: value for name, value in row.items() if not math.isnan(value)}


class History:
    """The rows of history.csv, a dictionary each; the file is rewritten whole whenever some are added."""

    def __init__(self, path, last_round=0):
        """Take over the rows of the rounds 1 to `last_round` from `path`. Raises ValueError when not all are there."""
        self.path, self.rows = Path(path), []
        if last_round:
            try:
                table = pd.read_csv(self.path)[list(COLUMNS)].astype(float)
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

    def draw(self, path, title):
        """Draw loss and accuracy over rounds into the picture `path`."""
        from matplotlib.figure import Figure  # half a second that nothing else needs

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        rounds = [row["round"] for row in self.rows]
        style = ".-" if len(rounds) < 20 else "-"
        for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            for name in MEASURES:
                if name.endswith(measure):
                    axes.plot(rounds, [row[name] for row in self.rows], style, label=name)
            axes.set(xlabel="round", ylabel=measure)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(title)
        with atomic_write(path) as part:
            figure.savefig(part, format="png", dpi=110)


@dataclasses.dataclass
class Round:
    """A finished round: its row of history.csv, the global model's arrays, and its clients' figures for the curves."""

    row: dict
    arrays: list
    clients: dict


class Record:
    """Keeps what each finished round leaves. One thread tests, saves, logs and draws, while the devices train on.

    model: the net; a copy of it takes the arrays of each round, to test and save them.
    save_ckp_path: where the newest global model goes; best.ptl, history.csv and metrics.png go beside it.
    last_round: the last round that is finished already; history.csv is continued after it.
    test_loaders: {"test": loader} to test each round's global model on (engines.server_test_fn), or None.
    about: further entries of the checkpoint (nets.save_checkpoint).
    on_row: called with each row of history.csv when it is saved.
    log: called as log(dictionary, step=round), such as the `log` of a wandb run.

    What fails in the thread ends it; `check`, `add` and `close` raise it.
    """

    def __init__(self, model, save_ckp_path, last_round=0, test_loaders=None, about=None, on_row=None, log=None):
        self.path = Path(save_ckp_path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.model = copy.deepcopy(model)
        self.test_loaders, self.about = test_loaders, about or {}
        self.on_row, self.log = on_row, log
        self.history = History(self.path.with_name("history.csv"), last_round)
        accuracies = [measured(row).get("test_accuracy", -1.0) for row in self.history.rows]
        self.best = max(accuracies, default=-1.0)
        self.drawn_at = time.monotonic()
        self.steps_done = 0  # rounds tested and batches saved: the worker's sign of life
        self.error = None
        self.closed = False
        self.rounds = queue.Queue(BACKLOG)
        self.worker = threading.Thread(target=self._work, name="record", daemon=True)
        self.worker.start()

    def add(self, row, arrays, clients):
        """Hand over a finished round (see Round); waits where BACKLOG of them wait already.

        `row` needs the key round; of the other COLUMNS what is missing could not be measured.
        """
        if self.closed:
            raise RuntimeError("the record is closed")
        row = {**dict.fromkeys(COLUMNS, math.nan), **row}
        self._put(Round(row, arrays, clients))

    def check(self):
        """Raise what went wrong in the worker, if anything did."""
        if self.error is not None:
            raise self.error

    def close(self):
        """End the worker. Afterwards every round that was handed over is saved, logged and in the picture.

        Waits for that as long as it goes on; raises TimeoutError when nothing is finished for STALLED seconds, and
        what went wrong in the worker, where the rounds before stay saved. Does no more when called again.
        """
        if not self.closed:
            self.closed = True
            self._put(END)
        while self.worker.is_alive():
            before = self.steps_done
            self.worker.join(STALLED)
            if self.worker.is_alive() and self.steps_done == before:
                raise TimeoutError(f"the record of the last rounds hangs: {self.path.parent} answers no more")
        self.check()

    def _put(self, item):
        while self.worker.is_alive():
            try:
                self.rounds.put(item, timeout=0.5)
                return
            except queue.Full:
                continue
        self.check()

    def _work(self):
        """The thread: test the rounds as they come, save them at once or with those that come within SAVE_EVERY."""
        tested, save_at, ended = [], 0.0, False
        try:
            while not ended:
                finished = self._next(save_at if tested else None)
                if finished is END:
                    ended = True
                elif finished is not None:
                    self._test(finished)
                    tested.append(finished)
                if tested and (ended or time.monotonic() >= save_at):
                    self._save(tested)
                    tested, save_at = [], time.monotonic() + SAVE_EVERY
            if self.history.rows:
                self._draw()
        except BaseException as error:
            self.error = error

    def _next(self, until):
        """The next of the queue, or None where none comes until then; `until` None waits for ever."""
        timeout = None if until is None else max(0.0, until - time.monotonic())
        try:
            return self.rounds.get(timeout=timeout)
        except queue.Empty:
            return None

    def _test(self, finished):
        if self.test_loaders is not None:
            set_arrays(self.model, finished.arrays)
            finished.row.update(server_test_fn(self.test_loaders, self.model))
        self.steps_done += 1

    def _save(self, tested):
        """Save tested rounds. The checkpoint comes last: a killed run goes on from it and drops later rows."""
        self.history.extend([finished.row for finished in tested])
        for finished in tested:
            if finished.row["test_accuracy"] > self.best:
                self.best = finished.row["test_accuracy"]
                self._save_checkpoint("best.ptl", finished)
        self._save_checkpoint(self.path.name, tested[-1])
        for finished in tested:
            if self.log is not None:
                figures = measured(finished.row)
                step = figures.pop("round")
                self.log({**figures, **finished.clients}, step=step)
            if self.on_row is not None:
                self.on_row(finished.row)
        if time.monotonic() - self.drawn_at > DRAW_EVERY:
            self._draw()
        self.steps_done += 1

    def _save_checkpoint(self, name, finished):
        set_arrays(self.model, finished.arrays)
        metrics = {**dict.fromkeys(COLUMNS), **measured(finished.row)}
        about = {**self.about, "round": finished.row["round"], "metrics": metrics}
        save_checkpoint(self.path.with_name(name), self.model, about)

    def _draw(self):
        self.history.draw(self.path.with_name("metrics.png"), self.about.get("dataset") or "")
        self.drawn_at = time.monotonic()


# ---------------------------------------------------------------------------------------------------------------------
# The runs before.


def resume(path, model, dataset):
    """Put the checkpoint `path` into `model`: (its round, its wandb run id), (0, None) where there is none yet."""
    if not path.exists():
        say(f"nothing to resume in {path.parent}: starting at round 1")
        return 0, None
    try:
        saved, checkpoint = load_checkpoint(path)
        mine = {"dataset": dataset, "net": type(model).__name__, "num_classes": model.num_classes}
        for name, value in {**mine, "in_channels": model.in_channels}.items():
            if checkpoint[name] != value:
                raise UserError(f"cannot resume from {path}: its {name} is {checkpoint[name]}, not {value}")
        model.load_state_dict(saved.state_dict())
        History(path.with_name("history.csv"), checkpoint["round"])
        return checkpoint["round"], checkpoint["wandb_run_id"]
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"cannot resume from {path}: {error}") from None
    except Exception as error:  # whatever torch.load, load_state_dict and pandas make of files that are not ours
        reason = f"it or history.csv is damaged, or not of this suite ({type(error).__name__})"
        raise UserError(f"cannot resume from {path}: {reason}") from None


def move_aside(folder):
    """Move what an earlier run of the server left in `folder` to a folder with the date in its name."""
    if found := [folder / name for name in FILES.values() if (folder / name).exists()]:
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y-%m-%d_%H%M%S')}")
        aside.mkdir()
        for path in found:
            path.rename(aside / path.name)
        say(f"moved the earlier run to {aside} (--resume would go on from it)")


# ---------------------------------------------------------------------------------------------------------------------
# The curves, and what is seen of the rounds.


def start_wandb(dataset, run_id, config):
    """Start or continue a run in Weights & Biases: (the run, one line that says where it is to be seen).

    WANDB_MODE wins where it is set; else the run is online if a key is at hand and works, and offline if not.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or else its crashes are reported to its makers
    os.environ.setdefault("WANDB_SILENT", "true")  # what it has to say, we say
    try:
        import matplotlib  # noqa: F401 (for the picture; better missed now than at the end)
        import wandb  # here, after that variable is set
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install wandb matplotlib") from None

    mode = os.environ.get("WANDB_MODE")
    why = "no key is at hand" if mode in (None, "online") else "as WANDB_MODE says"
    if mode in (None, "online"):
        try:
            has_key = wandb.login(prompt=False)
        except Exception as error:
            has_key, why = False, printable(error)
        if mode == "online" and not has_key:
            raise UserError(f"WANDB_MODE is online, but {why}: run `wandb login` or set WANDB_MODE=offline")
        mode = "online" if has_key else "offline"
    settings = wandb.Settings(console="off", init_timeout=30, finish_timeout=30, finish_timeout_raises=True)
    options = {
        "settings": settings,
        "project": "FL-IoT",
        "name": dataset,
        "id": run_id,
        "config": config,
        "dir": os.environ.get("WANDB_DIR", ROOT),
    }
    if mode == "online":
        try:
            run = wandb.init(mode=mode, resume="allow", **options)
            return run, f"curves: {run.url}"
        except Exception as error:
            why = printable(error)
            mode = "offline"
    try:
        run = wandb.init(mode=mode, **options)
    except Exception as error:
        raise UserError(f"Weights & Biases cannot start with WANDB_MODE={mode}: {printable(error)}") from None
    if mode != "offline":
        return run, f"curves: WANDB_MODE is {mode}"
    return run, f"curves: Weights & Biases is offline ({why}); send them later with: wandb sync {Path(run.dir).parent}"


class Curves:
    """The run in Weights & Biases. Whatever happens to it, the training goes on."""

    def __init__(self, run):
        self.run, self.failed = run, False

    def log(self, figures, step):
        try:
            self.run.log(figures, step=step)
        except Exception as error:  # its process has died; all figures are in history.csv
            if not self.failed:
                say(f"curves: Weights & Biases fails from round {step} on: {printable(error)}")
            self.failed = True

    def finish(self):
        try:
            self.run.finish()
        except Exception:  # its server is gone, or its process
            folder = Path(self.run.dir).parent
            option = "" if folder.name.startswith("offline-") else "--no-skip-online "
            say(f"curves: not all are sent; send them later with: wandb sync {option}{folder}")


class Progress:
    """What the user sees of the rounds: one bar on a terminal, one line a round otherwise."""

    def __init__(self, num_rounds, last_round):
        self.num_rounds = num_rounds
        self.bar = tqdm(total=num_rounds, initial=last_round, unit="round", disable=not sys.stderr.isatty())

    def show_row(self, row):
        names = ("fit_loss", "fit_accuracy", "eval_accuracy", "test_accuracy")
        if not self.bar.disable:
            self.bar.set_postfix({name: f"{row[name]:.3f}" for name in names}, refresh=False)
            self.bar.update()
            return
        figures = "  ".join(f"{name} {row[name]:.3f}" for name in names)
        counts = f"{row['clients']} clients, {row['failures']} failures, {row['round_seconds']:.1f} s"
        say(f"round {row['round']}/{self.num_rounds}  {figures}  ({counts})")

    def show_drop(self, current, cid, reason):
        say(f"round {current}: dropped cid {cid}: {reason}")

    def close(self):
        self.bar.close()


def show_files(folder):
    """Say where the files of a run are."""
    for what, name in FILES.items():
        if (folder / name).exists():
            say(f"{what}: {folder / name}")
