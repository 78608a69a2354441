"""What the user sees of the rounds on the terminal."""

from __future__ import annotations

import collections
import shutil
import statistics
import sys

from plumbing.common.process import say

from tqdm import tqdm


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
