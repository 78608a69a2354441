"""The names of all figures of a run, and the two tables that hold them: history.csv and clients.csv."""

from __future__ import annotations

import collections
import math
import os
import statistics
from pathlib import Path

from plumbing.common.files import atomic_write
from plumbing.common.process import say

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
FILES = {
    "model": "server.ptl",
    "best": "best.ptl",
    "history": "history.csv",
    "clients": "clients.csv",
    "metrics": "metrics.png",
    "confusion": "confusion.png",
    "devices": "devices.png",
}
MANY = 100  # clients, beyond which clients.csv alone has the figures of each


def measured(row):
    """The figures of a row of history.csv without those that could not be measured, which are nan there."""
    return {name: value for name, value in row.items() if not math.isnan(value)}


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
