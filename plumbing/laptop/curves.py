"""What is sent to the run in Weights & Biases: figures by round, alerts, and at the end tables and models."""

import contextlib
import math
import re
import shlex
import sys
import threading
import time
from pathlib import Path

from plumbing.common.process import printable, say
from plumbing.common.state import read_saved
from plumbing.laptop.history import MANY, MEASURES, TRAFFIC, measured, power_trouble
from plumbing.laptop.pictures import accuracies

import numpy as np

SECTIONS = {name: "/".join(name.rsplit("_", 1)) for name in MEASURES}  # of wandb: fit/loss and so on
SECTIONS.update({name: f"system/{name}" for name in ("num_clients", "failures", "round_seconds", *TRAFFIC)})
MACHINE = ("board", "torch", "flwr", "python", "threads", "free_mb", "slowdown", "num_fit", "num_eval")  # for config
REPLY = 15  # seconds to wait at most for what wandb's server has to answer, besides its own timeouts
ALERT_EVERY = 3600  # seconds between two alerts for one device


def as_curves(row, clients):
    """Return what wandb gets of a finished round: {name: figure}.

    row: of history.csv. Each figure has its flat name and one in a section; `clients` is num_clients, since clients/
        is a section.
    clients: {cid: {name: figure}}; no page can show the curves of more than MANY clients.
    """
    row = {"num_clients" if name == "clients" else name: value for name, value in measured(row).items()}
    row.pop("finished_at", None)  # wandb has times of its own
    figures = {**row, **{SECTIONS[name]: value for name, value in row.items() if name in SECTIONS}}
    for cid, own in clients.items() if len(clients) <= MANY else ():
        figures.update({f"clients/{cid}/{name}": own[name] for name in own if name != "examples"})
    return figures


def how_to_sync(run):
    folder = Path(run.dir).parent
    option = "" if folder.name.startswith("offline-") else "--no-skip-online "
    command = Path(sys.executable).with_name("wandb")  # which is on no PATH, where the scripts run by .venv/bin/python
    return f"{shlex.quote(str(command)) if command.exists() else 'wandb'} sync {option}{shlex.quote(str(folder))}"


class Curves:
    """The run in Weights & Biases. Whatever happens to it, the training goes on.

    run: of wandb.
    held: the steps that it has already.
    online: whether models are sent too.

    What its server has to answer, the tables and the models, is sent by another thread, for which nobody waits longer
    than REPLY seconds.
    """

    def __init__(self, run, held=(), online=False):
        self.run, self.held, self.online = run, held, online
        self.failed = False
        self.last_step = None  # the last that was logged here: the one that can still be added to
        self.alerted = {}  # when the last alert for a device was sent
        with contextlib.suppress(Exception):  # as in log_round
            run.define_metric("*", step_metric="round")
            for name in SECTIONS:  # drawn once, in its section; the flat name is for the table of runs and old charts
                best = {"test_accuracy": "max", "test_loss": "min"}.get(name)
                run.define_metric(name, step_metric="round", summary=best, hidden=True)

    def catch_up(self, rows):
        """Log the rows of history.csv that the run lacks: after a kill, its last ones may not have been sent."""
        missing = [row for row in rows if row["round"] not in self.held]
        for row in missing:
            self.log_round(row, {})
        if missing:
            first, last = missing[0]["round"], missing[-1]["round"]
            say(f"curves: {len(missing)} of the rounds {first} to {last} were missing, and are sent from history.csv")

    def log_round(self, row, clients):
        try:
            self.run.log(as_curves(row, clients), step=row["round"])
            self.last_step = row["round"]
        except Exception as error:  # its process has died; all figures are in history.csv
            if not self.failed:
                say(f"curves: Weights & Biases fails from round {row['round']} on: {printable(error)}")
            self.failed = True

    def log_client(self, cid, properties):
        """Put what a client runs on into the run's config."""
        facts = {name: printable(value) for name, value in properties.items() if name in MACHINE}
        with contextlib.suppress(Exception):  # as in log_round
            self.run.config.update({f"clients/{cid}": facts}, allow_val_change=True)

    def show_split(self, split, classes):
        """Send the `split` (common/split), if it is known, as a table beside the run's first round."""
        if split is not None and not self.held:
            table = {"columns": ["cid", *classes], "data": [[cid, *counts] for cid, counts in enumerate(split)]}
            in_time(lambda wandb: self.run.log({"split": wandb.Table(**table)}, step=1))

    def watch(self, current, missing, clients):
        """Send alerts for the devices that a person has to look after, in or before the round `current`.

        missing: how long devices have been missing, {cid: "3 rounds"}.
        clients: the figures of those that took part, {cid: {name: figure}}.
        """
        troubles = {cid: power_trouble(figures) for cid, figures in clients.items()}
        troubles.update({cid: f"missing for {how_long}" for cid, how_long in missing.items()})
        now = time.monotonic()
        for cid, trouble in troubles.items():
            if trouble is not None and now - self.alerted.get(cid, -math.inf) >= ALERT_EVERY:
                self.alerted[cid] = now
                self.alert(f"cid {cid}: {trouble}", f"{self.run.name}, round {current}: cid {cid}: {trouble}")

    def alert(self, title, text):
        with contextlib.suppress(Exception):  # as in log_round
            self.run.alert(title[:63], text, level="WARN", wait_duration=ALERT_EVERY)

    def finish(self, models=None, mistakes=None, classes=None):
        """End the run.

        models: the checkpoints to send if it is online, {"best": path, "latest": path}.
        mistakes: of the best model (GlobalTest.count), int64 [class, answer].
        """

        def send(wandb):
            if mistakes is not None and self.last_step is not None:
                names = [str(name) for name in classes or range(len(mistakes))]
                self.run.log(mistakes_tables(wandb, mistakes, names), step=self.last_step)
            if self.online:
                log_models(wandb, self.run, models or {})

        if not self.failed:
            in_time(send)
        try:
            self.run.finish()
        except Exception:  # its server is gone, or its process
            say(f"curves: not all are sent; send them later with: {how_to_sync(self.run)}")


def in_time(act):
    """Call `act(wandb)`, and wait for it REPLY seconds at most. What it raises is lost, as in Curves.log_round."""

    def run():
        import wandb

        with contextlib.suppress(Exception):
            act(wandb)

    thread = threading.Thread(target=run, name="curves", daemon=True)
    thread.start()
    thread.join(REPLY)


def mistakes_tables(wandb, mistakes, names):
    """Return {name: table of wandb}: which class is taken for which, and the accuracy of each."""
    tables, most = {}, wandb.Table.MAX_ROWS  # of a longer table wandb keeps so many, without a word
    # Of many classes most are never mistaken for each other, and the counts of 0 are left out.
    cells = np.argwhere(mistakes if mistakes.size > most else mistakes + 1).tolist()
    if len(cells) > most:
        why = f"its {len(cells):,} rows are more than the {most:,} that Weights & Biases shows"
        say(f"curves: test/confusion is not sent, for {why}; confusion.png has all of them")
    else:
        columns = ["Actual", "Predicted", "nPredictions"]
        pairs = [[names[row], names[column], int(mistakes[row, column])] for row, column in cells]
        table = wandb.Table(columns=columns, data=pairs)
        tables["test/confusion"] = wandb.plot_table("wandb/confusion_matrix/v1", table, dict(zip(columns, columns)))
    found = [[name, share] for name, share in zip(names, accuracies(mistakes)) if not math.isnan(share)]
    table = wandb.Table(columns=["class", "accuracy"], data=found)
    return {**tables, "test/class_accuracy": wandb.plot.bar(table, "class", "accuracy")}


def log_models(wandb, run, models):
    """Send the best and the last model, once, as versions of one artifact; one if they are the same.

    So a run that is killed has sent none; they are in ckps/, and the end of the resumed run sends them.
    """
    saved = {alias: read_saved(path) for alias, path in models.items()}
    if len({checkpoint["round"] for checkpoint in saved.values()}) == 1:
        models = dict(list(models.items())[:1])
    for alias, path in models.items():  # wandb itself gives each the alias "latest" too, and the last one keeps it
        about = {name: saved[alias][name] for name in ("round", "net")}
        name = re.sub(r"[^\w.-]", "-", f"{run.name}-{run.id}", flags=re.ASCII)  # all that wandb takes
        artifact = wandb.Artifact(name, type="model", metadata={**about, **(saved[alias]["metrics"] or {})})
        artifact.add_file(str(path), name="model.ptl", policy="immutable", skip_cache=True)
        run.log_artifact(artifact, aliases=[alias])
