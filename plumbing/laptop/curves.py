"""The run in Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

from plumbing.common.process import UserError, printable, say
from plumbing.common.state import read_saved
from plumbing.laptop.earlier import keep_best
from plumbing.laptop.history import FILES, MANY, MEASURES, measured, power_trouble
from plumbing.laptop.pictures import accuracies
from plumbing.laptop.wandb_file import held_steps

import numpy as np

ROOT = Path(__file__).resolve().parents[2]

SECTIONS = {name: "/".join(name.rsplit("_", 1)) for name in MEASURES}  # of wandb: fit/loss and so on
SECTIONS.update({name: f"system/{name}" for name in ("num_clients", "failures", "round_seconds")})
REPLY = 15  # seconds to wait at most for what wandb's server has to answer, besides its own timeouts
ALERT_EVERY = 3600  # seconds between two alerts for one device


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
        if git("ls-files", __file__):  # and not some other repository, in which this folder lies
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
