"""What the user sees of the rounds on the terminal: a line per round above a bar, and a summary at the end."""

import collections
import itertools
import math
import shutil
import statistics
import sys

from plumbing.common.process import printable, say
from plumbing.laptop.history import FILES, TIMES, by_cid, power_trouble
from plumbing.laptop.pictures import accuracies

from tqdm import tqdm

MANY_LINES = 8  # devices, of which only those that stand out have a line at the end
SLOW = 1.5  # times as long as the median device
SLOWEST = 1.2  # times as long as the others, from which on the slowest device is named
BAR = "round {{n_fmt}}/{{total_fmt}} {{bar}} {} s per round, {} to go"  # for tqdm, once it has both times
ROOM = 3  # columns to the right of the bar, so that ^C does not fold it
HOT = 80  # °C, at which a Raspberry Pi slows down


class Progress:
    """A line per round, and below them a bar if this is a terminal."""

    def __init__(self, num_rounds, last_round):
        self.num_rounds, self.seconds = num_rounds, collections.deque(maxlen=9)  # the seconds of the last rounds
        columns, rows = shutil.get_terminal_size()  # 80 × 24 if the terminal does not know, where tqdm draws nothing
        options = {"ncols": columns - ROOM, "nrows": rows, "bar_format": BAR.format("?", "?"), "leave": False}
        self.bar = tqdm(total=num_rounds, initial=last_round, disable=not sys.stderr.isatty(), **options)

    def show_round(self, row, clients=None):
        """Show a row of history.csv, in 80 columns."""
        figures = "  ".join(f"{name} {row[name]:.3f}" for name in ("fit_loss", "test_loss", "test_accuracy"))
        say(f"round {row['round']}/{self.num_rounds}  {figures}  {row['round_seconds']:.1f} s")
        if self.bar.disable:
            return
        self.seconds.append(row["round_seconds"])
        usual = statistics.median(self.seconds)
        to_go = tqdm.format_interval(usual * (self.num_rounds - row["round"]))
        self.bar.ncols = shutil.get_terminal_size().columns - ROOM
        self.bar.bar_format = BAR.format(f"{usual:.1f}", to_go)
        self.bar.update()

    def show_drop(self, current, cid, reason):
        say(f"round {current}: dropped cid {cid}: {reason}")

    def close(self) -> None:
        """Take the bar away, with what the terminal has written after it: ^C."""
        if not self.bar.disable:
            self.bar.close()
            sys.stderr.write("\033[K")
            sys.stderr.flush()


def show_end(record):
    """Print what came of a closed Record: its best model, where its files are, and what its clients were like."""
    if not record.exist():
        say("no round is finished, nothing is saved")
        return
    if record.best_model is not None:
        current, accuracy = record.best_model["round"], record.best_model["metrics"]["test_accuracy"]
        say(f"best round: {current} of {len(record.history.rows)}, test_accuracy {accuracy:.3f}")
        say(f"its accuracy by class: {list_accuracies(record.mistakes, record.about.get('classes'))}")
    beside = [name for name in FILES if name != record.path.name and (record.folder / name).exists()]
    say(f"model: {record.path}; beside it {', '.join(beside)}")
    for line in describe_clients(record.clients.rows, len(record.history.rows)):
        say(line)


def describe_clients(rows, num_rounds):
    """Return lines on the clients of `num_rounds` rounds; `rows` are those of clients.csv."""
    clients = by_cid(rows)
    fits = {cid: [row for row in own if not math.isnan(row["examples"])] for cid, own in clients.items()}
    usual = {cid: statistics.median(seconds) for cid in fits if (seconds := known(fits[cid], "fit_seconds"))}
    shown = clients
    if len(clients) >= MANY_LINES:
        limit = SLOW * statistics.median(usual.values()) if usual else math.inf
        slow = {cid for cid in usual if usual[cid] > limit}
        shown = [cid for cid, own in clients.items() if cid in slow or not fits[cid] or stands_out(own, num_rounds)]
    longest = {}  # round: its longest fit
    for row in itertools.chain(*fits.values()):
        longest[row["round"]] = max(row["fit_seconds"], longest.get(row["round"], -1.0))
    lines = []
    for cid in shown:
        facts = [f"{len(fits[cid])} of {num_rounds} rounds"]
        if cid in usual:
            share = sum(row["fit_seconds"] == longest[row["round"]] for row in fits[cid]) / len(fits[cid])
            facts.append(f"fit {show_seconds(usual[cid])} (median), the slowest in {share:.0%} of its rounds")
        lines.append(f"cid {cid}: {', '.join(facts + describe_device(fits[cid]))}")
    if len(shown) < len(clients):
        others = f"the {len(clients) - len(shown):,} others do not stand out" if shown else "no device stands out"
        lines.append(f"{others}; clients.csv has the figures of each")
    if len(usual) > 1:
        slowest = max(usual, key=usual.get)
        others = statistics.median(usual[cid] for cid in usual if cid != slowest)
        if usual[slowest] > SLOWEST * others and all(share_of_images(own) is None for own in fits.values()):
            seconds = f"fit {show_seconds(usual[slowest])}, the others {show_seconds(others)}"
            lines.append(f"slowest device: cid {slowest}, {seconds} (medians)")
    return lines


def stands_out(rows, num_rounds):
    """Return whether a person should look after a device, by its rows: absent, hot, or without enough power."""
    is_hot = max(known(rows, "cpu_temp_c"), default=0) >= HOT
    return len(rows) < 0.9 * num_rounds or is_hot or any(map(power_trouble, rows))


def describe_device(rows):
    """Return phrases on what a device told in the rounds that it trained in."""
    facts = []
    if (share := share_of_images(rows)) is not None:
        facts.append(f"{share:.0%} of its images per round")
    for name in ("eval_seconds", "wait_seconds"):
        if seconds := known(rows, name):
            facts.append(f"{TIMES[name]} {show_seconds(statistics.median(seconds))}")
    if heat := known(rows, "cpu_temp_c"):
        facts.append(f"{max(heat):.0f} °C at most")
    for trouble, count in collections.Counter(map(power_trouble, rows)).items():
        if trouble is not None:
            facts.append(f"{trouble}, {count} of {len(rows)} rounds")
    return facts


def share_of_images(rows):
    """Return the share of its images that a device trained on per round, if --time_budget left it a part; else None."""
    shares = [images / row["examples"] for row in rows for images in known([row], "images")]
    share = statistics.median(shares or [1])
    return share if share < 0.995 else None


def show_seconds(seconds):
    return f"{seconds:.2g} s" if 0.001 <= seconds < 0.995 else f"{seconds:.1f} s"


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
