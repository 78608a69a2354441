"""What the user sees of the rounds on the terminal: a bar or lines, and a summary at the end."""

from __future__ import annotations

import collections
import math
import shutil
import statistics
import sys

from plumbing.common.process import printable, say
from plumbing.laptop.history import FILES, MANY, TIMES, by_cid, power_trouble
from plumbing.laptop.pictures import accuracies

from tqdm import tqdm


class Progress:
    """One bar on a terminal, one line per round otherwise."""

    def __init__(self, num_rounds, last_round):
        self.num_rounds, self.seconds = num_rounds, collections.deque(maxlen=9)  # the seconds of the last rounds
        columns, rows = shutil.get_terminal_size()  # 80 × 24 if the terminal does not know, where tqdm draws nothing
        options = {"ncols": columns - 1, "nrows": rows, "bar_format": "round {n_fmt}/{total_fmt} {bar}"}
        self.bar = tqdm(total=num_rounds, initial=last_round, disable=not sys.stderr.isatty(), **options)

    def show_round(self, row, clients=None):
        """Show a row of history.csv."""
        if self.bar.disable:
            names = ("fit_loss", "fit_accuracy", "eval_accuracy", "test_accuracy")
            figures = "  ".join(f"{name} {row[name]:.3f}" for name in names)
            counts = f"{row['clients']} clients, {row['failures']} failures, {row['round_seconds']:.1f} s"
            say(f"round {row['round']}/{self.num_rounds}  {figures}  ({counts})")
            return
        self.seconds.append(row["round_seconds"])
        usual = statistics.median(self.seconds)
        figures = " ".join(f"{name} {row[f'{name}_accuracy']:.3f}" for name in ("fit", "eval", "test"))
        to_go = tqdm.format_interval(usual * (self.num_rounds - row["round"]))
        self.bar.ncols = shutil.get_terminal_size().columns - 1
        self.bar.bar_format = f"round {{n_fmt}}/{{total_fmt}} {{bar}} {figures}, {usual:.1f} s/round, {to_go} to go"
        self.bar.update()

    def show_drop(self, current, cid, reason):
        say(f"round {current}: dropped cid {cid}: {reason}")

    def close(self) -> None:
        self.bar.close()


def show_end(record):
    """Print what the clients and the best model of a closed Record were like, and where its files are."""
    if not record.exist():
        say("no round is finished, nothing is saved")
        return
    for line in describe_clients(record.clients.rows, len(record.history.rows)):
        say(line)
    if record.best_model is not None:
        current, accuracy = record.best_model["round"], record.best_model["metrics"]["test_accuracy"]
        say(f"best round: {current} of {len(record.history.rows)}, test_accuracy {accuracy:.3f}")
        say(f"its accuracy by class: {list_accuracies(record.mistakes, record.about.get('classes'))}")
    beside = [name for name in FILES if name != record.path.name and (record.folder / name).exists()]
    say(f"model: {record.path}; beside it {', '.join(beside)}")


def describe_clients(rows, num_rounds):
    """Return lines on the clients of `num_rounds` rounds; `rows` are those of clients.csv."""
    trained = [row for row in rows if not math.isnan(row["examples"])]  # the others only evaluated
    longest = {}  # round: its longest fit
    for row in trained:
        longest[row["round"]] = max(row["fit_seconds"], longest.get(row["round"], -1.0))
    lines, usual = [], {}
    for cid, all_rows in by_cid(rows).items():
        fits = [row for row in all_rows if not math.isnan(row["examples"])]
        seconds = known(fits, "fit_seconds")
        facts = [f"{len(fits)} of {num_rounds} rounds"]
        if seconds:
            usual[cid] = statistics.median(seconds)
            share = sum(row["fit_seconds"] == longest[row["round"]] for row in fits) / len(fits)
            facts.append(f"fit {usual[cid]:.1f} s (median), the slowest in {share:.0%}")
        lines.append(f"cid {cid}: {', '.join(facts + describe_device(fits))}")
    if len(lines) > MANY:
        lines = [f"the figures of each of {len(lines):,} clients are in clients.csv"]
    if len(usual) > 1:
        slowest = max(usual, key=usual.get)
        others = statistics.median(usual[cid] for cid in usual if cid != slowest)
        lines.append(f"slowest device: cid {slowest}, fit {usual[slowest]:.1f} s, the others {others:.1f} s (medians)")
    return lines


def describe_device(rows):
    """Return phrases on what a device told in the rounds that it trained in."""
    facts = []
    shares = [images / row["examples"] for row in rows for images in known([row], "images")]
    if shares and statistics.median(shares) < 0.995:  # with --time_budget
        facts.append(f"{statistics.median(shares):.0%} of its images in a round")
    for name in ("eval_seconds", "wait_seconds"):
        if seconds := known(rows, name):
            facts.append(f"{TIMES[name]} {statistics.median(seconds):.1f} s")
    if heat := known(rows, "cpu_temp_c"):
        facts.append(f"{max(heat):.0f} °C at most")
    for trouble, count in collections.Counter(map(power_trouble, rows)).items():
        if trouble is not None:
            facts.append(f"{trouble}, {count} of {len(rows)} rounds")
    return facts


def known(rows, name):
    return [row[name] for row in rows if not math.isnan(row.get(name, math.nan))]


def list_accuracies(counts, classes):
    """Return the accuracy of each class as text; of more than 12 classes, only the worst and the best five."""
    names = [printable(name, 20) for name in classes or range(len(counts))]
    found = [(share, name) for share, name in zip(accuracies(counts), names) if not math.isnan(share)]
    pairs = [f"{name} {share:.2f}" for share, name in (sorted(found) if len(found) > 12 else found)]
    if len(pairs) > 12:
        return f"worst {', '.join(pairs[:5])}; best {', '.join(pairs[-5:])}"
    return ", ".join(pairs)
