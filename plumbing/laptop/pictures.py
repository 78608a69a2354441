"""All pictures: metrics, devices, confusion and partition.png, to be seen at 800 pixels' width."""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from plumbing.common.files import atomic_write
from plumbing.common.process import printable, say
from plumbing.laptop.history import TIMES

import numpy as np

STYLES = {"fit": "C0-", "eval": "C1--", "global_eval": "C2-.", "test": "C3:"}


def plain(text, limit: int = 120) -> str:
    """Return a text for matplotlib, to which dollars are a formula, and a label that begins with "_" is hidden."""
    return re.sub("^_", " _", printable(text, limit)).replace("$", r"\$")


@contextlib.contextmanager
def picture(path: Path, width: float, height: float, title: str):
    """Give a figure of matplotlib, in inches, to draw on. It becomes the PNG `path` when the block ends."""
    from matplotlib.figure import Figure  # half a second that nothing else needs

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(plain(title))
    yield figure
    with warnings.catch_warnings(), atomic_write(path) as part:
        warnings.simplefilter("ignore")  # of letters that its font lacks
        figure.savefig(part, format="png", dpi=110)


def try_to_draw(draw: Callable, *args) -> None:
    """Call `draw(*args)`, which draws a picture. If it fails, only print that: no run ends because of a picture."""
    try:
        draw(*args)
    except Exception as error:
        say(f"warning: {draw.__name__} failed, so its picture is missing: {printable(error)}")


def best_row(rows):
    """Return the row of history.csv with the best test accuracy, or None if none was measured."""
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
        for axes, name, what in zip(figure.subplots(1, 3, sharey=True), *zip(*TIMES.items())):
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


def draw_split(path, title, split, classes):
    """Draw how many images of each class each client has, `split` as dataset.json has it, into the picture `path`.

    The bars are one image, of a number for each pixel: polygons of 1,000 classes and clients would take minutes.
    """
    import matplotlib
    from matplotlib.patches import Patch

    tops = np.cumsum(split, axis=1)
    highest = 1.05 * tops[:, -1].max()
    heights = (np.arange(600) + 0.5) / 600 * highest
    width = 20 if len(split) <= 50 else 1  # pixels for each bar and the gaps beside it
    bars = np.array([np.searchsorted(top, heights, side="right") for top in tops]).repeat(width, axis=0).astype(float)
    bars[bars == len(classes)] = np.nan
    if width > 1:
        bars[np.arange(len(bars)) % width < 2] = bars[np.arange(len(bars)) % width >= width - 2] = np.nan
    name = "tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "nipy_spectral"
    colours = matplotlib.colormaps[name].resampled(max(len(classes), 10 if name == "tab10" else 20))
    with picture(path, 9, 4.2, title) as figure:
        axes = figure.subplots()
        extent, limits = (-0.5, len(split) - 0.5, 0, highest), (-0.5, colours.N - 0.5)
        style = {"aspect": "auto", "interpolation": "nearest", "origin": "lower", "extent": extent}
        image = axes.imshow(bars.T, colours, vmin=limits[0], vmax=limits[1], **style)
        axes.set(xlabel="cid", ylabel="images")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if len(classes) <= 20:
            handles = [Patch(color=colours(label)) for label in range(len(classes))]
            names = [plain(called, 30) for called in classes]
            figure.legend(handles[::-1], names[::-1], loc="outside right upper")
        else:
            figure.colorbar(image, ax=axes, label="class, by its number in dataset.json")


def accuracies(counts):
    """The share of the images of each class that are found, a list; nan for a class of which there are none."""
    return [row[index] / row.sum() if row.any() else math.nan for index, row in enumerate(counts)]
