"""Write what was measured into the README, docs/ and benchmarks/README.md, between their markers; draw pictures.

    python benchmarks/report.py

Reads figure.csv (the history of the run that reproduces the published figure) and the .json files of the others, so
that no figure on these pages is typed by hand. bench.py and soak.py call it when they have written theirs.
"""

import itertools
import json
import re
import statistics

import pandas as pd
from common import HERE
from helpers import ROOT
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

DOCS = ROOT / "docs"
FIGURE_COMMANDS = """    .venv/bin/python partition.py --source cifar-10-python.tar.gz --num_clients 10
    .venv/bin/python server.py --num_clients 10 --num_rounds 100
    .venv/bin/python client.py --cid N --num_threads 1    # ten times, N from 0 to 9"""
SHOWN = "fit_loss fit_accuracy eval_loss eval_accuracy test_loss test_accuracy".split()
NEWCOMERS = (  # the rows that docs/performance.md has: how the name and the reference of each begin
    ("epoch of", "bare loop"),
    ("whole round", "slowest fit + slowest evaluate"),
    ("round with 10 clients on 20 Mbit/s, fp16: waiting", "whole models"),
    ("client: peak memory", "empty process"),
)


def read(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(about):
    packages = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "flwr", "wandb"))
    return f"{about['cpu']}, {about['cores']} cores, Python {about['python']}, {packages}; {about['date'][:10]}"


# ---------------------------------------------------------------------------------------------------------------------
# The figure.


def read_figure():
    """The rows of figure.csv by round, and the round with the best test accuracy."""
    history = pd.read_csv(HERE / "figure.csv").set_index("round")
    return history, history["test_accuracy"].idxmax()


def figure():
    history, best = read_figure()
    rows = [[current, *(f"{history[name][current]:.3f}" for name in SHOWN)] for current in (1, 10, 20, 50, 100)]
    return (
        "Ten clients, 4,000 fit and 1,000 eval images of CIFAR-10 each (IID), one local epoch per round, Adam 1e-3, "
        f"batch 32, {len(history)} rounds; the images are CIFAR-10's in JPEG coding. The server and the clients are "
        "eleven processes on one machine with 2 cores, one thread each:\n\n"
        f"{table(['round', *SHOWN], rows)}\n\n"
        f"The test accuracy is at its best in round {best}: {history['test_accuracy'][best]:.3f}. The run took "
        f"{history['round_seconds'].sum() / 60:.1f} minutes. All its rows are in `figure.csv`. The commands:\n\n"
        f"{FIGURE_COMMANDS}"
    )


def figure_in_short():
    history, best = read_figure()
    return (
        f"Ten clients, {len(history)} rounds on CIFAR-10: the test accuracy ends at "
        f"{history['test_accuracy'].iloc[-1]:.3f} and was at its best in round {best}, with "
        f"{history['test_accuracy'][best]:.3f} ([how it was made](benchmarks/README.md#the-figure))."
    )


def rounds_in_short():
    history, _ = read_figure()
    wire, seconds = read("results.json")["wire"]["ways"]["off"], history["round_seconds"]
    return (
        f"Ten clients with 4,000 training images each, on one machine with 2 cores: {seconds.median():.1f} s per round "
        f"(median), {seconds.sum() / 60:.1f} minutes for {len(history)} rounds. Each client receives "
        f"{wire['down'] / 1e6:.2f} MB and sends {wire['up'] / 1e6:.2f} MB per round. Boards are slower."
    )


def draw_figure(path):
    """The curves of figure.csv, as server.py draws them."""
    from plumbing.laptop.pictures import draw_metrics

    history, _ = read_figure()
    title = "CIFAR10 (iid): LeNet5, 10 clients, 1 epoch per round"
    draw_metrics(history.reset_index().astype({"round": int}).to_dict("records"), path, title)


# ---------------------------------------------------------------------------------------------------------------------
# The soak.


def read_soak():
    """What soak.json has of both trainings, how many faults there were and were survived, and the gap in accuracy."""
    about = read("soak.json")
    faulty, clean = about["faulty"], about["clean"]
    injected, survived = (sum(kind[name] for kind in faulty["faults"].values()) for name in ("injected", "survived"))
    return about, faulty, clean, injected, survived, 100 * abs(faulty["test_accuracy"] - clean["test_accuracy"])


def soak():
    about, faulty, clean, _, _, gap = read_soak()
    rows = [[kind, counts["injected"], counts["survived"]] for kind, counts in faulty["faults"].items()]
    return (
        f"`make soak` trains 10 clients for {faulty['rounds']} rounds with many faults, and once without any:\n\n"
        f"{table(['fault', 'injected', 'survived'], rows)}\n\n"
        f"Rows of the history that were lost: {faulty['rows_lost']}; that are there twice: {faulty['rows_double']}; "
        f"processes left at the end: {faulty['processes_left']}. Rounds that a killed server had not saved and ran "
        f"again: {faulty['rounds_trained_again']}. Test accuracy {faulty['test_accuracy']:.3f}, without faults "
        f"{clean['test_accuracy']:.3f}, a difference of {gap:.1f} points. ({machine(about)}.)"
    )


def soak_in_short():
    _, faulty, _, injected, survived, gap = read_soak()
    return (
        f"`make soak` trains 10 clients for {faulty['rounds']} rounds, and kills and freezes clients and the server: "
        f"{survived} of {injected} faults were survived, {faulty['rows_lost']} rows of the history were lost, and the "
        f"test accuracy is within {gap:.1f} points of a run without faults "
        "([more](../benchmarks/README.md#under-faults))."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory.


def goal_of(row):
    goals = [f"≤ {row['goal']:.2f}"] if row["goal"] is not None else []
    goals += [f"≤ {row['limit']} {row['unit']}"] if row["limit"] is not None else []
    return ", ".join(goals) + ("" if row["met"] in (None, True) else " (missed)")


def shown(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(row):
    """What, ours, reference and ratio of a row, as text."""
    return [
        row["name"],
        f"{shown(row['ours'])} {row['unit']}",
        f"{shown(row['reference'])} {row['unit']} ({row['against']})",
        f"{row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to {row['ratio']['max']:.2f})",
    ]


def find(rows, name, against):
    """The first row whose name and reference begin so."""
    return next(row for row in rows if row["name"].startswith(name) and row["against"].startswith(against))


def bench():
    about = read("results.json")
    rows, wire, speed = about["rows"], about["wire"], about["images_per_second"]
    header = ["bench", "what", "ours", "reference", "ratio", "n", "goal"]
    made = {}  # the benches of each run, in order
    for row in rows:
        made.setdefault(row["run"], {})[row["bench"]] = None
    machines = "\n".join(
        f"- {', '.join(names)}: {machine(about['runs'][run])}, at a load of {about['runs'][run]['load_at_start']}"
        for run, names in made.items()
    )

    def ratio(name, against):
        return f"{find(rows, name, against)['ratio']['median']:.2f}"

    saving, reading_too = (find(rows, "partition.py, ", against)["reference"] for against in ("np.save", "reading"))
    return (
        "`make bench` measures each figure and its reference in the same run on the same work, in alternating pairs. "
        "The table has medians, and for the ratio also the least and the greatest:\n\n"
        f"{table(header, [[row['bench'], *cells(row), row['n'], goal_of(row)] for row in rows])}\n\n"
        f"One torch thread; data: the real CIFAR-10. The machines:\n\n{machines}\n\n"
        "![The ratios, their spread and their goals](results.png)\n\n"
        f"`partition.py` writes {speed['ours']:,.0f} images per second.\n\n"
        f"A whole round takes {ratio('whole round', 'its slowest fit')} times as long as its slowest fit, because the "
        "devices then evaluate the averaged model on their eval images (`global_eval_*`). It takes "
        f"{ratio('whole round', 'slowest fit +')} times as long as both together. `partition.py` takes "
        f"{ratio('partition.py, ', 'np.save')} times as long as saving the images, because it first decompresses and "
        f"reads the archive, which takes {(reading_too - saving) / saving:.2f} times as long as saving. It takes "
        f"{ratio('partition.py, ', 'reading')} times as long as reading and saving together.\n\n"
        f"{wire_in_bytes(wire)}\n\n"
        f"{step_profile(about['step_profile'])}\n\n"
        f"{client_memory(about['client_memory'])}\n\n"
        "Flower's own embedded-devices example, on its deployment engine, took 9.28 s per round, of which 1.81 s were "
        "training, and 770 MB of memory at its peak (2 clients with 4,000 images each; measured separately). It starts "
        "a new process for each message.\n\n"
        "On CUDA the shard stays in the GPU's memory, and results are read back once per epoch. "
        "That is untested: no GPU was available, nor was a Jetson or a Raspberry Pi."
    )


def wire_in_bytes(wire):
    rows = []
    for way, sent in wire["ways"].items():
        both, goal = sent["down"] + sent["up"], wire["goals"][way]
        shown = "" if goal is None else f"≤ {goal:,}" + " (missed)" * (both > goal)
        rows.append([way, *(f"{number:,.0f}" for number in (sent["down"], sent["up"], both)), shown])
    return (
        f"Bytes of TCP that a client receives and sends per round, where the parameters are {wire['parameters']:,} "
        f"bytes. They are the means of {wire['rounds']} rounds after the first, in which the model is sent whole:\n\n"
        f"{table(['--compress', 'down', 'up', 'both', 'goal'], rows)}\n\n"
        "On a slow network the waiting falls less than the bytes, because both directions have a limit of their own: "
        "what is no longer sent down before a fit was sent while the first answers were coming up."
    )


def step_profile(shares):
    greatest = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(shares.items())[:9])
    return (
        f"Where the time of a step goes, by torch.profiler over an epoch: {greatest}. The convolutions are oneDNN's, "
        "and take as long in the bare loop."
    )


def client_memory(about):
    rows, before = [], {"anon": 0.0, "file": 0.0}
    for stage, now in about["stages"].items():
        rows.append([stage, *(f"{now[kind]:.0f} ({now[kind] - before[kind]:+.0f})" for kind in before)])
        before = now
    return (
        f"Memory of a client in MiB, of which the images of its shard are {about['shard']:.0f}:\n\n"
        f"{table(['after', 'its own', 'pages of files'], rows)}\n\n"
        "Pages of files are the code of torch and oneDNN that training uses. The system takes them back when memory is "
        "short, but they count in the peak, and with the shard they alone exceed what a goal of 1.15 allows. The rest "
        "is activations, and memory that malloc keeps for later. If malloc gives it back at once "
        "(MALLOC_TRIM_THRESHOLD_), a client needs 20 MiB less, and more than twice the time."
    )


def compress():
    runs = read("compress.json")["runs"]
    seeds = sorted({run["seed"] for run in runs})
    finals = {}
    for run in runs:
        finals.setdefault(run["compress"], {})[run["seed"]] = run["rounds"][-1]["test_accuracy"]
    rows = []
    for way, by_seed in finals.items():
        values = list(by_seed.values())
        differences = [value - finals["off"][seed] for seed, value in by_seed.items()]
        against = "" if way == "off" else f"{statistics.fmean(differences):+.4f}"
        each = [f"{by_seed[seed]:.4f}" if seed in by_seed else "–" for seed in seeds]
        rows.append([way, *each, f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})", against])
    off = finals["off"].values()
    within = all(min(off) <= statistics.fmean(by_seed.values()) <= max(off) for by_seed in finals.values())
    verdict = f"Their means are {'within' if within else 'outside'} the range of the seeds of off."
    count = len(runs[0]["rounds"])
    header = ["--compress", *(f"seed {seed}" for seed in seeds), "mean, least, greatest", "mean difference to off"]
    return (
        f"Test accuracy after {count} rounds on all of CIFAR-10, ten clients of 4,000 fit images each, n = "
        f"{len(seeds)} seeds, which fix the first model and the order of all images (`compress.py`):\n\n"
        f"{table(header, rows)}\n\n"
        "Both send the change of each array since the last model, fp16 with 11 significant bits and int8 in 255 steps. "
        "What is lost by rounding stays on the sender's side and goes with the next change. "
        f"{verdict}"
    )


def bench_in_short():
    rows = read("results.json")["rows"]
    chosen = [find(rows, *start) for start in NEWCOMERS]
    shortened = table(["what", "ours", "reference", "ratio"], [cells(row) for row in chosen])
    return (
        "Medians, measured in alternating pairs; for the ratio also the least and the greatest:\n\n"
        f"{shortened}\n\n"
        f"These and {len(rows) - len(chosen)} more rows, the machine and the goals are in "
        "[benchmarks/README.md](../benchmarks/README.md#speed-and-memory). `make bench` measures all of them again."
    )


def wire_in_short():
    wire = read("results.json")["wire"]
    rows = [
        [f"`--compress {way}`" if way in ("off", "fp16", "int8") else way, f"{down:,.0f}", f"{up:,.0f}"]
        for way, (down, up) in {way: each.values() for way, each in wire["ways"].items()}.items()
    ]
    return (
        f"Bytes of TCP per client and round for LeNet5, whose parameters are {wire['parameters']:,} bytes "
        f"([more](../benchmarks/README.md#speed-and-memory)):\n\n"
        f"{table(['what is sent', 'to the device', 'from the device'], rows)}"
    )


def draw_bench():
    """The ratios with their spread, and the goals, on a logarithmic axis."""
    about = read("results.json")
    rows = about["rows"]
    kinds = {True: ("tab:green", "goal met"), False: ("tab:red", "goal missed"), None: ("tab:gray", "no goal")}
    picture = Figure(figsize=(10, 0.28 * len(rows) + 1.8), layout="constrained")
    axes = picture.subplots()
    for place, row in enumerate(rows):
        ratio, (colour, _) = row["ratio"], kinds[row["met"]]
        axes.plot([ratio["min"], ratio["max"]], [place, place], "-", color=colour, linewidth=5, alpha=0.35)
        axes.plot(ratio["median"], place, "o", color=colour)
        if row["goal"] is not None:
            axes.plot(row["goal"], place, "|", color="black", markersize=16, markeredgewidth=2)
    axes.axvline(1, color="gray", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [f"{row['name']}, against {row['against']}" for row in rows])
    for colour, label in kinds.values():
        axes.plot([], [], "o-", color=colour, label=label)
    picture.legend(loc="outside lower right", ncols=len(kinds))
    axes.set(xscale="log", ylim=(len(rows) - 0.5, -0.5))
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("ours / reference, logarithmic: median (dot),\nleast to greatest (bar), goal (black mark)")
    machines = {f"{run['cpu']}, {run['cores']} cores, {run['date'][:10]}" for run in about["runs"].values()}
    picture.suptitle("\n".join(sorted(machines)), fontsize="medium")
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# Nets, and methods against skew.


def read_curves():
    """{net: {round: test accuracy}}: the simulated ones of frontier.json, and LeNet5's of the figure."""
    history, _ = read_figure()
    curves = {"LeNet5 (the figure above)": history["test_accuracy"].to_dict()}
    for name, curve in read("frontier.json")["curves"].items():
        curves[name] = {int(current): accuracy for current, accuracy in curve.items()}
    return curves


def frontier():
    about, curves = read("frontier.json"), read_curves()
    shown_rounds, rows = (10, 20, 50, 100), []
    for name, curve in curves.items():
        step = about["steps"][name.partition(" (")[0]]
        cells = [f"{curve[current]:.3f}" if current in curve else "–" for current in shown_rounds]
        rows.append([name, f"{step['parameters']:,}", f"{step['ratio']:.2f}", *cells])
    header = ["net", "parameters", "step over LeNet5's", *(f"round {current}" for current in shown_rounds)]
    return (
        "Test accuracy on all of CIFAR-10 with 10 clients, IID, with the settings of the figure, and processor time of "
        "a step on 32 images, of which a round has 1,250. All nets but LeNet5 are simulated in one process, with one "
        "seed (–: not run):"
        f"\n\n{table(header, rows)}\n\n"
        "![Test accuracy over rounds](frontier.png)\n\n"
        f"({machine(about['about'])}.)"
    )


def frontier_in_short():
    curves, steps = read_curves(), read("frontier.json")["steps"]
    (lenet5, *_), augmented = curves.values(), curves["GroupNet, augmented"]
    return (
        f"After 100 rounds with 10 clients on CIFAR-10, GroupNet's test accuracy is {augmented[100]:.2f}, LeNet5's "
        f"{lenet5[100]:.2f}. A step takes {steps['GroupNet, augmented']['ratio']:.1f} times as long, and it has "
        f"{steps['GroupNet, augmented']['parameters']:,} parameters instead of {steps['LeNet5']['parameters']:,} "
        "([more](../benchmarks/README.md#nets))."
    )


def draw_frontier():
    picture = Figure(figsize=(8, 4.5), layout="constrained")
    axes = picture.subplots()
    for (name, curve), style in zip(read_curves().items(), ("-", "--", "-.", ":", "-"), strict=False):
        axes.plot(curve.keys(), curve.values(), style, label=name.partition(" (")[0])
    axes.set(xlabel="round", ylabel="accuracy of the global model on the test set")
    axes.set_title("CIFAR10 (iid): 10 clients, 1 epoch per round", fontsize="large")
    axes.grid(alpha=0.3)
    axes.legend()
    return picture


def skew_figures():
    """(The methods, the alphas, {(method, alpha, measure): the figures of all seeds}) of skew.json, in its order."""
    methods, alphas, figures = {}, {}, {}
    for name, alpha, _, measures in read("skew.json")["runs"]:
        methods[name], alphas[alpha] = None, None
        for measure, value in measures.items():
            figures.setdefault((name, alpha, measure), []).append(value)
    return list(methods), list(alphas), figures


def skew():
    about, (methods, alphas, figures) = read("skew.json"), skew_figures()
    columns = [(alpha, measure) for alpha in alphas for measure in ("test_accuracy", "global_eval_accuracy")]
    rows = []
    for name in methods:
        cells = [figures[name, *column] for column in columns]
        rows.append([name, *(f"{sum(c) / len(c):.3f} ({min(c):.3f} to {max(c):.3f})" for c in cells)])
    header = ["method", *(f"alpha {alpha}, {measure}" for alpha, measure in columns)]
    name, alpha, seed, confirmed = about["confirmed"]
    simulated = next(run[3] for run in about["runs"] if run[:3] == [name, alpha, seed])
    return (
        "CIFAR-10, 10 clients with 1,000 fit images on average, Dirichlet 0.1 and 0.5, 40 rounds; means over the last "
        f"5 rounds and over {len(figures[methods[0], alphas[0], 'test_accuracy'])} seeds, least and greatest in "
        f"brackets:\n\n{table(header, rows)}\n\n"
        "![Accuracy of each method on the test set and on the devices' own images](skew.png)\n\n"
        f"Simulated in one process; by server.py and ten client.py, {name} with alpha {alpha} and seed {seed} has a "
        f"test accuracy of {confirmed['test_accuracy']:.3f}, simulated {simulated['test_accuracy']:.3f}. "
        f"({machine(about['about'])}.)"
    )


def skew_in_short():
    methods, alphas, figures = skew_figures()
    rows = []
    for name in methods:
        cells = [figures[name, alpha, "test_accuracy"] for alpha in alphas]
        rows.append([name, *(f"{sum(c) / len(c):.2f} ({min(c):.2f} to {max(c):.2f})" for c in cells)])
    return (
        "Test accuracy on CIFAR-10 after 40 rounds with 10 clients of 1,000 images each; mean of 3 seeds, in brackets "
        "the least and the greatest ([more](../benchmarks/README.md#skew)):\n\n"
        f"{table(['method', *(f'Dirichlet, alpha {alpha}' for alpha in alphas)], rows)}"
    )


def draw_skew():
    methods, alphas, figures = skew_figures()
    picture = Figure(figsize=(9.6, 4.6), layout="constrained")
    picture.suptitle("CIFAR10 (dirichlet): 10 clients, 40 rounds of 1 epoch, means of the last 5 rounds")
    titles = {"test_accuracy": "on the test set", "global_eval_accuracy": "on the devices' own images"}
    for axes, (measure, title) in zip(picture.subplots(1, 2, sharey=True), titles.items(), strict=True):
        for place, alpha in enumerate(alphas):
            for row, name in enumerate(methods):
                values, height = figures[name, alpha, measure], row + 0.25 * place - 0.12
                colour = f"C{place}"
                axes.plot([min(values), max(values)], [height] * 2, color=colour, linewidth=4, alpha=0.35)
                what = f"alpha {alpha}: mean of {len(values)} seeds (dot), least to greatest (bar)"
                axes.plot(sum(values) / len(values), height, "o", color=colour, label=what if row == 0 else None)
        axes.axvline(0.1, color="0.4", linestyle="--", linewidth=0.8, label="chance: 1 of 10 classes")
        axes.set_yticks(range(len(methods)), methods)
        axes.set(title=title, xlabel="accuracy of the global model", xlim=(0.08, None))
        axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    picture.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# Mixed shelves.

WAIT, TARGETS, MOMENTS, MOST = "all wait", (0.5, 0.55, 0.58), (20, 40), 3


def read_mixed():
    """{(split, shelf): {method: {seed: its run}}} of mixed.json; a run's `rounds` are [(time, accuracies), …].

    The devices of the second shelf train the same when all wait; only the time of a round is another one. It is left
    out of a split for which no other method was run on it.
    """
    about, runs = read("mixed.json"), {}
    for run in about["runs"]:
        runs.setdefault((run["split"], run["shelf"]), {}).setdefault(run["method"], {})[run["seed"]] = run
    first, second = about["shelves"]
    for split in [split for split, shelf in runs if shelf == second]:
        for seed, run in runs.get((split, first), {}).get(WAIT, {}).items():
            seconds = seconds_of_round(run["sizes"], about["shelves"][second], about["measuring"])
            rounds = [((place + 1) * seconds, classes) for place, (_, classes) in enumerate(run["rounds"])]
            methods = runs.setdefault((split, second), {})
            others = [each[seed]["held"] for method, each in methods.items() if method != WAIT and seed in each]
            methods.setdefault(WAIT, {})[seed] = {**run, "rounds": rounds, "held": (others or [run["held"]])[0]}
    return runs


def seconds_of_round(sizes, speeds, measuring):
    """The time of a round in which all wait, as mixed.py counts it; `sizes` is [(fit images, eval images), …]."""
    evals = [measuring * own / speed for (_, own), speed in zip(sizes, speeds, strict=True)]
    fits = [fit / speed + own for (fit, _), speed, own in zip(sizes, speeds, evals, strict=True)]
    return (max(fits) + max(evals)) / statistics.fmean([fit for fit, _ in sizes])


def reached(run, target):
    """The time at which a run of read_mixed first had the accuracy `target`, None if it never did."""
    return next((seconds for seconds, classes in run["rounds"] if statistics.fmean(classes) >= target), None)


def at(run, moment):
    """(The accuracy, that on the MOST classes of which the slow boards hold most) of a run at `moment`.

    Of the last round finished by then; None if there is none, or the run was not that long.
    """
    finished = [classes for seconds, classes in run["rounds"] if seconds <= moment]
    if not finished or run["rounds"][-1][0] < moment:
        return None
    classes = finished[-1]
    theirs = sorted(range(len(classes)), key=lambda label: -run["held"][label])[:MOST]
    return statistics.fmean(classes), statistics.fmean([classes[label] for label in theirs])


def spread(values, shape, number):
    """Mean, least and greatest of the values that are there; how many of `number` there are if some are missing."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    shown = f"{shape} ({shape} to {shape})".format(statistics.fmean(values), min(values), max(values))
    return shown if len(values) == number else f"{shown}, {len(values)} of {number}"


def mixed_rows(by_method):
    """The rows of the table for one shelf and split: method, n, the times to TARGETS, and the ratio to all wait."""
    rows = []
    for method, runs in by_method.items():
        times = [[reached(run, target) for run in runs.values()] for target in TARGETS]
        pairs = [(reached(run, 0.55), reached(by_method[WAIT][seed], 0.55)) for seed, run in runs.items()]
        ratios = [ours / theirs for ours, theirs in pairs if ours and theirs]
        cells = [spread(values, "{:.1f}", len(runs)) for values in times]
        rows.append([method, len(runs), *cells, spread(ratios, "{:.2f}", len(runs))])
    return rows


def mixed():
    about, runs, parts = read("mixed.json"), read_mixed(), []
    for (split, shelf), by_method in runs.items():
        if split == "IID":
            header = ["", "n", *(f"time to {target}" for target in TARGETS), "ratio to all wait, 0.55"]
            body = table(header, mixed_rows(by_method))
        else:
            header = ["", "n"]
            for moment in MOMENTS:
                header += [f"accuracy at {moment}", f"theirs at {moment}"]
            rows = []
            for method, by_seed in by_method.items():
                cells = []
                for moment in MOMENTS:
                    pairs = [at(run, moment) or (None, None) for run in by_seed.values()]
                    cells += [spread([pair[place] for pair in pairs], "{:.3f}", len(pairs)) for place in (0, 1)]
                rows.append([method, len(by_seed), *cells])
            body = table(header, rows)
        parts.append(f"**{split}; speeds {shelf}:**\n\n{body}")
    return (
        "All of CIFAR-10, 10 clients, LeNet5, one epoch a round; the rounds are simulated, and their time is counted "
        "in epochs of a fast board (measuring an image takes a quarter of the time of training on it, on any board). A "
        "budget is `--time_budget auto`, so that all wait in the first round, in which the devices are timed. Means, "
        "least and greatest of n seeds; a time is that of the first round with this test accuracy, – if no run had it. "
        f"*Theirs* is the accuracy on the {MOST} classes of which the boards slower than the median one hold most. "
        "`--round_timeout auto` is as all wait: its limit is three times a device's own median. A fixed one leaves the "
        "slow boards out.\n\n" + "\n\n".join(parts) + "\n\n![Test accuracy over time](mixed.png)\n\n"
        f"{mixed_confirmed(about)}({machine(about['about'])}.)"
    )


def mixed_in_short():
    runs, shelf = read_mixed(), next(iter(read("mixed.json")["shelves"]))
    iid, skewed = (runs[split, shelf] for split in ("IID", "Dirichlet 0.5"))
    moment, way = MOMENTS[0], "budget, weighted by shard"
    ratios = [reached(run, 0.55) / reached(iid[WAIT][seed], 0.55) for seed, run in iid[way].items()]
    ours, theirs = (statistics.fmean(at(run, moment)[0] for run in skewed[name].values()) for name in (way, WAIT))
    return (
        f"Simulated with ten boards, three of them a quarter as fast, means of {len(ratios)} seeds: on IID data a test "
        f"accuracy of 0.55 takes {statistics.fmean(ratios):.2f} of the time that it takes when all wait. On skewed "
        f"data (Dirichlet 0.5), in the time that a fast board needs for {moment} epochs, the test accuracy reaches "
        f"{ours:.2f}, and {theirs:.2f} when all wait."
    )


def mixed_confirmed(about, target=0.55):
    """How near mixed.py --confirm came to the simulation; "" if it was not run."""
    if "confirmed" not in about:
        return ""
    split, shelf, method, seed = about["confirmed"]["run"]
    simulated = {
        run["method"]: [(seconds, statistics.fmean(classes)) for seconds, classes in run["rounds"]]
        for run in about["runs"]
        if (run["split"], run["shelf"], run["seed"]) == (split, shelf, seed)
    }
    rounds, seconds = [], []
    for curves in (about["confirmed"]["curves"], simulated):
        for name in (WAIT, method):
            ends = [0, *(end for end, _ in curves[name])]
            rounds.append(1 + [accuracy >= target for _, accuracy in curves[name]].index(True))
            seconds.append(statistics.median(end - start for start, end in itertools.pairwise(ends)))
    ratios = [
        (seconds[place] + (rounds[place + 1] - 1) * seconds[place + 1]) / (rounds[place] * seconds[place])
        for place in (0, 2)
    ]
    return (
        f"By server.py and ten client.py with --slowdown, {split}, seed {seed}, a round takes {seconds[0]:.0f} s when "
        f"all wait and {seconds[1]:.0f} s with the {method} (medians), and a test accuracy of {target} is there after "
        f"{rounds[0]} and {rounds[1]} rounds, simulated after {rounds[2]} and {rounds[3]}. With a first round in which "
        f"all wait that is {ratios[0]:.2f} of the time, simulated {ratios[1]:.2f}. "
    )


def draw_mixed():
    """Test accuracy over time: a line a run, a colour a method."""
    runs = read_mixed()
    colours = {method: f"C{place}" for place, method in enumerate(dict.fromkeys(m for by in runs.values() for m in by))}
    picture = Figure(figsize=(11, 3.6 * -(-len(runs) // 2)), layout="constrained")
    grid = picture.subplots(-(-len(runs) // 2), min(len(runs), 2), squeeze=False).flat
    for axes, ((split, shelf), by_method) in zip(grid, runs.items(), strict=False):
        for method, by_seed in by_method.items():
            for run in by_seed.values():
                times, accuracies = zip(
                    *((seconds, statistics.fmean(classes)) for seconds, classes in run["rounds"]), strict=True
                )
                axes.plot(times, accuracies, color=colours[method], linewidth=1, alpha=0.8)
        axes.set(xlabel="time, in epochs of a fast board", ylabel="test accuracy", title=f"{split}; speeds {shelf}")
        axes.grid(alpha=0.3)
    handles = [Line2D([], [], color=colour, label=method) for method, colour in colours.items()]
    picture.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# Growth.


def read_growth(kind):
    """{number of clients: what growth.py has measured of a run with so many}, by number."""
    measured = {int(number): figures for number, figures in read("growth.json")[kind].items()}
    return dict(sorted(measured.items()))


def straight_line(measured):
    """{number of clients: seconds of a round}, if a round took as long for each as it does with the fewest."""
    fewest = min(measured)
    return {number: measured[fewest]["round_seconds"] * number / fewest for number in measured}


def growth():
    simulated, own, about = read_growth("simulation"), read_growth("scripts"), read("growth.json")["about"]
    lines, rows = straight_line(simulated), []
    for number, measured in simulated.items():
        seconds = f"{measured['round_seconds']:.1f}", f"{lines[number]:.1f}"
        rows.append([f"{number:,}", *seconds, f"{measured['server_mib']:.0f}", f"{measured['worker_mib']:.0f}"])
    idle, idle_lines = [], straight_line(own)
    for number, measured in own.items():
        seconds = f"{1000 * measured['round_seconds']:,.0f}", f"{1000 * idle_lines[number]:,.0f}"
        idle.append([f"{number:,}", *seconds, f"{measured['server_mib']:.0f}"])
    rounds = next(iter(simulated.values()))["n"]
    return (
        "Simulated clients (`make simulate`), each with one epoch of LeNet5 over 40 images and an evaluation of 10 per "
        f"round; medians of {rounds} rounds after the first, in which each process reads its shards:\n\n"
        f"{table(['clients', 'seconds per round', 'straight line', 'server, MiB', 'a worker, MiB'], rows)}\n\n"
        "Our own server, with clients that answer at once, so that a round takes only what the server and the messages "
        "need. The clients are threads in other processes of the same machine:\n\n"
        f"{table(['clients', 'milliseconds per round', 'straight line', 'server, MiB'], idle)}\n\n"
        "The straight line is the time of the first row, times the growth in clients. Memory is the peak.\n\n"
        "![Seconds a round and memory over the number of clients](growth.png)\n\n"
        f"(Simulation: {machine(about['simulation'])}. Own server: {machine(about['scripts'])}.)"
    )


def aggregation():
    costs = {number: measured["seconds_a_result"] for number, measured in read_growth("aggregation").items()}
    (small, *_, large), (quick, *_, slow) = costs, costs.values()
    return (
        f"- **Aggregation** of 1,000 results takes {1000 * quick:.2g} s for {small:,} parameters and "
        f"{1000 * slow:.2g} s for {large:,}; one core, in float64."
    )


def ways():
    about = read("ways.json")
    names = ("scripts", "simulation", "deployment")
    wanted = (
        ("round_seconds", "seconds per round", "{:.3g}"),
        ("beside_seconds", "of which not the slowest fit and evaluate", "{:.3g}"),
        ("device_mib", "memory of a device at its peak, MiB (simulation: of a core's worker)", "{:.0f}"),
        ("device_killed_seconds", "the round in which a device is killed, seconds", "{:.1f}"),
        ("device_back_seconds", "until it is back once started again, seconds", "{:.1f}"),
        ("server_killed_seconds", "from the start of a killed server to the end of its next round, seconds", "{:.1f}"),
    )
    rows = [
        [what, *(shape.format(about[way][key]) if key in about[way] else "–" for way in names)]
        for key, what, shape in wanted
    ]
    rounds = about["scripts"]["n"]
    return (
        f"{table(['measured', *names], rows)}\n\n"
        "LeNet5 with 2 clients of 240 fit and 60 eval images, on one machine that all processes share; medians of "
        f"{rounds} rounds, each kill once. Memory is the sum of what a device's processes have resident. "
        f"(`benchmarks/ways.py`; {machine(about['about'])}.)"
    )


def draw_growth():
    picture = Figure(figsize=(9.6, 4.6), layout="constrained")
    picture.suptitle("A round, and the server's memory, by number of clients")
    times, memory = picture.subplots(1, 2)
    kinds = {"simulation": "make simulate, clients that train", "scripts": "server.py, clients that answer at once"}
    for kind, label in kinds.items():
        measured = read_growth(kind)
        (line,) = times.plot(measured.keys(), [row["round_seconds"] for row in measured.values()], "o-", label=label)
        straight = straight_line(measured)
        times.plot(straight.keys(), straight.values(), ":", color=line.get_color())
        memory.plot(measured.keys(), [row["server_mib"] for row in measured.values()], "o-", label=label)
    times.set(xscale="log", yscale="log", xlabel="clients", ylabel="seconds per round")
    memory.set(xscale="log", xlabel="clients", ylabel="server's peak memory, MiB")
    memory.set_ylim(0, 1.05 * memory.get_ylim()[1])
    for axis in (times.xaxis, memory.xaxis, times.yaxis):
        axis.set_major_formatter("{x:g}")
    for axes in (times, memory):
        axes.grid(alpha=0.3)
    times.plot([], [], ":", color="0.4", label="in proportion to the number of clients")
    picture.legend(*times.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# The pages: what stands between the markers of each; and the pictures.

PICTURES = {
    "results": draw_bench,
    "frontier": draw_frontier,
    "skew": draw_skew,
    "mixed": draw_mixed,
    "growth": draw_growth,
}
PAGES = {
    ROOT / "README.md": {"figure": figure_in_short, "rounds": rounds_in_short, "mixed": mixed_in_short},
    DOCS / "strategies.md": {"frontier": frontier_in_short, "skew": skew_in_short},
    DOCS / "network.md": {"wire": wire_in_short},
    DOCS / "faults.md": {"soak": soak_in_short},
    DOCS / "performance.md": {"bench": bench_in_short},
    HERE / "README.md": {
        "figure": figure,
        "frontier": frontier,
        "skew": skew,
        "mixed": mixed,
        "soak": soak,
        "compress": compress,
        "growth": growth,
        "bench": bench,
    },
    DOCS / "scale.md": {"ways": ways, "aggregation": aggregation},
}


def render(text, page=ROOT / "README.md"):
    """The `text` of one of PAGES with all sections between markers written again."""
    for name, section in PAGES[page].items():
        text, count = re.subn(
            f"(<!-- {name} -->\n).*?(<!-- end {name} -->)",
            lambda match, section=section: f"{match[1]}{section()}\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
        assert count == 1, f"{page} has no markers for {name}, or more than one pair"
    return text


def main():
    for path in PAGES:
        path.write_text(render(path.read_text(encoding="utf-8"), path), encoding="utf-8")
        print(f"written: {path}")
    for name, draw in PICTURES.items():
        draw().savefig(HERE / f"{name}.png", dpi=110)
        print(f"written: {HERE / name}.png")
    draw_figure(HERE / "figure.png")


if __name__ == "__main__":
    main()
