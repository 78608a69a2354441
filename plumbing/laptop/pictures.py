"""All pictures: metrics, devices, confusion and partition.png, to be seen at 800 pixels' width."""

import math

from plumbing.laptop.drawing import FORMATS, name_classes, picture, plain, try_to_draw
from plumbing.laptop.history import TIMES, by_cid

import numpy as np

CURVES = {  # how the figures of a model are drawn, and what people call them
    "fit": ("C0-", "local training (fit)"),
    "eval": ("C1--", "local evaluation (eval)"),
    "global_eval": ("C2-.", "global model on devices (global_eval)"),
    "test": ("C3:", "global model on test set (test)"),
}
MOST_DEVICES = 50  # in one picture
USUAL = {  # flags that change what is trained, and their defaults: titles name those that differ
    "strategy": "FedAvg",
    "proximal_mu": 0.0,
    "fedbn": False,
    "augment": False,
    "lr": 1e-3,
    "fraction_fit": 1.0,
    "time_budget": None,
    "compress": "off",
}


def describe_run(about):
    """Return what was trained on what, for a title. about: what checkpoints say of a run, or a part of it."""
    title, args = about.get("dataset") or "", about.get("args") or {}
    title += f" ({about['partition']})" if about.get("partition") else ""
    if {"net", "num_clients", "num_epochs"} <= set(args):
        epochs = f"{args['num_epochs']} epoch{'s' * (args['num_epochs'] != 1)} per round"
        title += f": {args['net']}, {args['num_clients']} clients, {epochs}"
        for name, usual in USUAL.items():
            value = args.get(name, usual)
            if value not in (usual, None):
                title += f", {value if name == 'strategy' else name if value is True else f'{name} {value}'}"
    return title


def draw_rounds(folder, about, rows, client_rows):
    """Draw the rows of history.csv and of clients.csv into `folder`. about: as in describe_run."""
    title, resumed = describe_run(about), about.get("resumed_after", ())
    try_to_draw(draw_metrics, rows, picture_path(folder, about, "metrics"), title, resumed)
    try_to_draw(draw_devices, by_cid(client_rows), picture_path(folder, about, "devices"), title)


def draw_best(folder, about, mistakes, current):
    """Draw the `mistakes` (engines.count_answers) of the best model, of the round `current`, into `folder`."""
    title = f"{describe_run(about)}\nbest model, of round {current}"
    try_to_draw(draw_confusion, mistakes, about.get("classes"), picture_path(folder, about, "confusion"), title)


def picture_path(folder, about, name):
    return folder / f"{name}.{(about.get('args') or {}).get('picture_format', FORMATS[0])}"


def draw_metrics(rows, path, title, resumed=()):
    """Draw the `rows` of history.csv, [{"round", …}, …], into `path`: loss and accuracy, and where it was best.

    resumed: the rounds after which the run was resumed.
    """
    rounds, tested = [row["round"] for row in rows], [row for row in rows if not math.isnan(row["test_accuracy"])]
    best = max(tested, key=lambda row: row["test_accuracy"], default=None)
    resumed = [current for current in resumed if current < rounds[-1]]
    with picture(path, (9.6, 4.8), title) as figure:
        for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            for name, (style, _) in CURVES.items():
                values = np.array([row[f"{name}_{measure}"] for row in rows], float)
                values[~(np.abs(values) < 1e30)] = math.nan  # or no axis fits
                there = np.concatenate([[False], np.isfinite(values), [False]])
                alone = there[1:-1] & ~there[:-2] & ~there[2:]  # a number between two gaps, which no line shows
                marked = alone | (len(rows) < 20)
                dot = "." if marked.any() else ""
                axes.plot(rounds, values, style, marker=dot, markevery=marked, label=f"{name}_{measure}")
            names = [name for _, name in CURVES.values()]
            if best is not None:
                names.append(f"best: the highest test accuracy, {best['test_accuracy']:.3f} in round {best['round']}")
                axes.plot(best["round"], best[f"test_{measure}"], "k*", markersize=10, zorder=3)
            for current in resumed:
                axes.axvline(current + 0.5, color="0.4", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
            if resumed:
                where = f"after round {', '.join(map(str, resumed))}" if len(resumed) <= 5 else f"{len(resumed)} times"
                names.append(f"resumed {where}")
            axes.set(xlabel="round", ylabel=measure)
            axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
            axes.grid(alpha=0.3)
        figure.legend(axes.lines[: len(names)], names, loc="outside lower center", ncols=2)


def draw_devices(clients, path, title):
    """Draw into `path` how long each device trained, evaluated and waited per round: the medians, and their spread.

    clients: the rows of clients.csv, {cid: [row, …]}. Of more than MOST_DEVICES, those that train longest are drawn.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    seconds = {cid: {name: usable(row[name] for row in rows) for name in TIMES} for cid, rows in clients.items()}
    kinds = {name: kind for name, kind in TIMES.items() if any(own[name] for own in seconds.values())}
    if not kinds:
        return
    longest = sorted(clients, key=lambda cid: np.median(seconds[cid]["fit_seconds"] or [0]), reverse=True)
    cids = [cid for cid in clients if cid in longest[:MOST_DEVICES]]
    which = f" (the {len(cids)} of {len(clients):,} that trained longest)" if len(cids) < len(clients) else ""
    size = 9.6, 1.7 + len(cids) * min(max(8 / len(cids), 0.2), 0.5)
    with picture(path, size, f"{title}\nseconds of each device per round{which}") as figure:
        axes, lines = figure.subplots(), {}
        for place in range(0, len(cids), 2):  # shaded, to tell which lines belong to which device
            axes.axhspan(place - 0.5, place + 0.5, color="0.95")
        for lane, (name, kind) in enumerate(kinds.items()):
            for place, cid in enumerate(cids):
                if own := seconds[cid][name]:
                    height = [place + (lane - (len(kinds) - 1) / 2) * 0.25] * 2
                    axes.plot([min(own), max(own)], height, f"C{lane}", linewidth=1)
                    axes.plot(np.percentile(own, (10, 90)), height, f"C{lane}", linewidth=4, alpha=0.4)
                    (lines[kind],) = axes.plot(np.median(own), height[0], f"C{lane}o", markersize=4)
        most = max(map(len, clients.values()))
        rounds = [f": {len(clients[cid])} of {most} rounds" if len(clients[cid]) < most else "" for cid in cids]
        axes.set_yticks(range(len(cids)), [plain(f"cid {cid}{text}", 40) for cid, text in zip(cids, rounds)])
        axes.set(xscale="log", ylim=(len(cids) - 0.5, -0.5))
        axes.set_xlim(axes.get_xlim()[0] / 2, axes.get_xlim()[1] * 2)  # or there is no tick where all took as long
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("seconds, logarithmic: median (dot), 80% of the rounds (thick), all rounds (thin)")
        axes.grid(axis="x", alpha=0.3)
        figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines))


def usable(seconds):
    """Return those of the `seconds` that were measured, within what a logarithmic axis can show."""
    return [min(max(value, 1e-3), 1e6) for value in seconds if not math.isnan(value)]


def draw_confusion(counts, classes, path, title):
    """Draw `counts` (engines.count_answers) into `path`: a row a class, a column what its images were taken for."""
    names = name_classes(tuple(classes or range(len(counts))), 20)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    title += f": accuracy {np.trace(counts) / max(counts.sum(), 1):.3f} on {counts.sum():,} test images"
    with picture(path, (9.2, 5 if len(counts) <= 4 else 8), title, names) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
        bar = figure.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)))  # as tall as the matrix
        bar.set_label("share of the images of the true class")
        axes.set(xlabel="predicted class", ylabel="true class (recall)")
        step = math.ceil(len(counts) / 50)
        found = [
            f"{name} ({'–' if math.isnan(share) else f'{share:.2f}'})" for name, share in zip(names, accuracies(counts))
        ]
        slope = 45 if len(counts) <= 20 else 90
        size = "medium" if len(counts) <= 20 else "small"
        style = {"rotation": slope, "ha": "right", "rotation_mode": "anchor", "fontsize": size}
        axes.set_xticks(range(0, len(counts), step), names[::step], **style)
        axes.set_yticks(range(0, len(counts), step), found[::step], fontsize=size)
        for row, column in np.argwhere(counts) if len(counts) <= 20 else ():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], color=colour, ha="center", va="center", fontsize="small")


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
    names = name_classes(tuple(classes), 30) if len(classes) <= 20 else []
    with picture(path, (9, 4.2), title, names) as figure:
        axes = figure.subplots()
        extent, limits = (-0.5, len(split) - 0.5, 0, highest), (-0.5, colours.N - 0.5)
        style = {"aspect": "auto", "interpolation": "nearest", "origin": "lower", "extent": extent}
        image = axes.imshow(bars.T, colours, vmin=limits[0], vmax=limits[1], **style)
        axes.set(xlabel="cid", ylabel="images")
        if len(split) <= 20:
            axes.set_xticks(range(len(split)))
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        if len(classes) <= 20:
            handles = [Patch(color=colours(label)) for label in range(len(classes))]
            beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
            axes.legend(handles[::-1], names[::-1], ncols=1 if len(classes) <= 14 else 2, **beside)
        else:
            figure.colorbar(image, ax=axes, label="class, by its number in dataset.json")


def accuracies(counts):
    """The share of the images of each class that are found, a list; nan for a class of which there are none."""
    return [row[index] / row.sum() if row.any() else math.nan for index, row in enumerate(counts)]
