"""The names of all figures of a run, and the two tables that hold them: history.csv and clients.csv."""

import collections
import math
import os
from pathlib import Path

from plumbing.common.files import atomic_write
from plumbing.common.process import say
from plumbing.laptop.drawing import FORMATS

FIT_METRICS = ("fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy")
EVALUATE_METRICS = ("global_eval_loss", "global_eval_accuracy")
TEST_METRICS = ("test_loss", "test_accuracy")
MEASURES = FIT_METRICS + EVALUATE_METRICS + TEST_METRICS
TRAFFIC = ("bytes_down", "bytes_up")  # to and from the devices
COUNTS = ("examples", "throttled", "steps", "images", *TRAFFIC)  # whole numbers in the tables
COLUMNS = ("round", *MEASURES, "clients", "failures", "round_seconds", "finished_at", *TRAFFIC)  # of history.csv
TIMES = {"fit_seconds": "fit", "eval_seconds": "evaluate", "wait_seconds": "waiting"}  # and how people read them
TELEMETRY = {  # what a device tells of itself, and the range in which that can be true
    **dict.fromkeys(TIMES, (0, 1e7)),
    "peak_memory_mb": (0, 1e7),
    "cpu_temp_c": (-100, 200),
    "throttled": (0, 2**20 - 1),  # 20 bits
    "load": (0, 1e5),
    "steps": (0, 1e9),
    "images": (0, 1e12),
    "images_per_second": (0, 1e9),
    "slowdown": (1, 1e3),
    **dict.fromkeys(TRAFFIC, (0, 1e15)),
}
CLIENT_COLUMNS = ("round", "cid", "examples", *FIT_METRICS, *EVALUATE_METRICS, *TELEMETRY)  # of clients.csv
PICTURES = tuple(f"{name}.{kind}" for kind in FORMATS for name in ("metrics", "confusion", "devices"))
FILES = ("server.ptl", "best.ptl", "history.csv", "clients.csv", *PICTURES)
MANY = 100  # clients; the figures of each of more than these are in clients.csv alone


def measured(row):
    """Return the figures of a row that were measured: the others are nan, which equals nothing."""
    return {name: value for name, value in row.items() if value == value}


def round_figures(rounds):
    """Round all fractions of finished `rounds` (saving.Round) to six digits, in place."""
    for finished in rounds:
        for figures in (finished.row, *finished.clients.values()):
            fractions = {name: value for name, value in figures.items() if isinstance(value, float) and value % 1}
            figures.update({name: float(f"{value:.6g}") for name, value in fractions.items()})


def cid_order(cid):
    """Sort cids, str: numbers by their value, then Flower's own cids."""
    return (int(cid), cid) if cid.isdecimal() else (math.inf, cid)


def by_cid(rows):
    """Return the rows of clients.csv of each cid, in the order of cids: {cid: [row, …]}."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row["cid"]].append(row)
    return {cid: groups[cid] for cid in sorted(groups, key=cid_order)}


def client_rows(rounds):
    """Return the rows of clients.csv of finished `rounds` (saving.Round)."""
    empty = dict.fromkeys(CLIENT_COLUMNS, math.nan)
    return [
        {**empty, **figures, "round": finished.row["round"], "cid": cid}
        for finished in rounds
        for cid, figures in finished.clients.items()
    ]


def power_trouble(figures):
    """Return what a Raspberry Pi's bits (`throttled`) say of a round, as a phrase, or None."""
    bits = figures.get("throttled", math.nan)
    bits = 0 if math.isnan(bits) else int(bits)
    if bits & 0b0001:
        return "power supply too weak"
    return "throttled for heat" if bits & 0b1100 else None


class Table:
    """A CSV file that grows by rows, {column: figure}. Missing figures are nan, and empty cells in the file.

    path: of the file, which the first `write` replaces.
    columns: names; those that only `rows` have come after them.
    rows: those of the run that this one continues.

    `write` leaves it to the caller to add to `rows`, once all that belongs to them is written.
    """

    def __init__(self, path, columns, rows=()):
        self.path, self.rows = Path(path), list(rows)
        self.columns = list(dict.fromkeys([*columns, *(self.rows[0] if self.rows else ())]))
        self.begun = False

    def write(self, rows):
        """Add `rows` to the file, whole or not at all; only a power cut can leave a part of the last line."""
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
        def as_text(name, cell):
            return "" if cell != cell else str(int(cell) if name in COUNTS else cell)

        lines = ([as_text(name, row.get(name, math.nan)) for name in self.columns] for row in rows)
        return "".join(",".join(cells) + "\n" for cells in lines)


def read_table(path):
    """Read a CSV file that a Table wrote. Return (its rows, the numbers of the damaged lines).

    A last line without its end, as a power cut may leave it, is dropped. Raises OSError, or ValueError if the file is
    no such CSV.
    """

    def parse(name, text):
        if name in ("cid", "finished_at"):
            return text or math.nan
        return int(text) if text.isdecimal() else float(text or "nan")

    header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    names, rows, bad = header.split(","), [], []
    if names[0] != "round":
        raise ValueError("its first column is not round")
    for number, line in enumerate(lines[:-1], 2):  # after the last newline there is nothing, or a part of a line
        try:
            rows.append({name: parse(name, text) for name, text in zip(names, line.split(","), strict=True)})
        except ValueError:
            if number < len(lines):
                bad.append(number)
    return rows, bad


def read_history(folder, last_round, metrics=None):
    """Return the rows of history.csv in `folder` for the rounds 1 to `last_round`.

    New columns are nan, and so are rows lost at the end, except for what `metrics`, those of the checkpoint of
    `last_round`, have; both are printed. Raises ValueError if anything else is missing.
    """
    path = Path(folder) / "history.csv"
    try:
        rows, bad = read_table(path)
        if bad:
            raise ValueError(f"line {bad[0]} is not a row")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from None
    rows = [row for row in rows if row["round"] <= last_round]
    if [row["round"] for row in rows] != list(range(1, len(rows) + 1)):
        raise ValueError(f"{path} does not have one row for each of the rounds 1 to {last_round}")
    if rows and (new := [name for name in COLUMNS if name not in rows[0]]):
        say(f"{path} has no column {', '.join(new)}: empty up to round {last_round}")
    empty = dict.fromkeys(COLUMNS, math.nan)
    if len(rows) < last_round:
        say(f"{path} has lost the rows of rounds {len(rows) + 1} to {last_round}: their unknown figures are empty")
        rows += [{"round": current} for current in range(len(rows) + 1, last_round + 1)]
        known = {name: value for name, value in (metrics or {}).items() if name in COLUMNS and value is not None}
        rows[-1].update(known, round=last_round)
    return [{**empty, **row} for row in rows]


def read_clients(folder, last_round):
    """Return the rows of clients.csv in `folder` up to `last_round` that can be read: no round needs them."""
    path, rows = Path(folder) / "clients.csv", []
    if path.exists():
        try:
            rows, bad = read_table(path)
            if bad:
                say(f"{path}: skipped {len(bad)} damaged lines, the first is line {bad[0]}")
        except (OSError, ValueError) as error:  # the run is worth more
            say(f"{path} cannot be read ({error}): it starts again with round {last_round + 1}")
    empty = dict.fromkeys(CLIENT_COLUMNS, math.nan)
    return [{**empty, **row} for row in rows if row["round"] <= last_round]
