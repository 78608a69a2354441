"""Write what was measured into README.md, between its markers, so that no figure there is typed by hand.

    python benchmarks/report.py

Reads figure.csv (the history of the run that reproduces the published figure), soak.json and results.json.
"""

import json
import re

import pandas as pd
from common import HERE, ROOT

FIGURE_COMMANDS = """    .venv/bin/python partition.py --source cifar-10-python.tar.gz --num_clients 10
    .venv/bin/python server.py --num_clients 10 --num_rounds 100
    .venv/bin/python client.py --cid N --num_threads 1    # ten times, N from 0 to 9"""
SHOWN = "fit_loss fit_accuracy eval_loss eval_accuracy test_loss test_accuracy".split()


def read(name):
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(about):
    packages = ", ".join(f"{name} {about['packages'][name]}" for name in ("torch", "flwr", "wandb"))
    return f"{about['cpu']}, {about['cores']} cores, Python {about['python']}, {packages}; {about['date'][:10]}"


def figure():
    history = pd.read_csv(HERE / "figure.csv").set_index("round")
    rows = [[current, *(f"{history[name][current]:.3f}" for name in SHOWN)] for current in (1, 10, 20, 50, 100)]
    best = history["test_accuracy"].idxmax()
    return (
        "Ten clients, 4,000 fit and 1,000 eval images of CIFAR-10 each (IID), one local epoch a round, Adam 1e-3, "
        f"batch 32, {len(history)} rounds; the images are CIFAR-10's in JPEG coding, the server and the clients eleven "
        "processes on one machine with 2 cores, one thread each:\n\n"
        f"{table(['round', *SHOWN], rows)}\n\n"
        f"The test accuracy is at its best in round {best}: {history['test_accuracy'][best]:.3f}. The run took "
        f"{history['round_seconds'].sum() / 60:.1f} minutes. All its rows are in `benchmarks/figure.csv`. It was made "
        f"with\n\n{FIGURE_COMMANDS}"
    )


def soak():
    about = read("soak.json")
    faulty, clean = about["faulty"], about["clean"]
    rows = [[kind, counts["injected"], counts["survived"]] for kind, counts in faulty["faults"].items()]
    gap = abs(faulty["test_accuracy"] - clean["test_accuracy"])
    return (
        f"`make soak` trains 10 clients for {faulty['rounds']} rounds under a hail of faults, and without any:\n\n"
        f"{table(['fault', 'injected', 'survived'], rows)}\n\n"
        f"Rows of the history lost: {faulty['rows_lost']}; double: {faulty['rows_double']}; processes left at the end: "
        f"{faulty['processes_left']}. Rounds that a killed server had not saved yet and ran again: "
        f"{faulty['rounds_trained_again']}. Test accuracy {faulty['test_accuracy']:.3f}, without faults "
        f"{clean['test_accuracy']:.3f}, a difference of {100 * gap:.1f} points. ({machine(about)}.)"
    )


def goal_of(line):
    goals = [f"≤ {line['goal']:.2f}"] if line["goal"] is not None else []
    goals += [f"≤ {line['limit']} {line['unit']}"] if line["limit"] is not None else []
    return ", ".join(goals) + ("" if line["met"] in (None, True) else " (missed)")


def shown(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bench():
    about = read("results.json")
    rows = [
        [
            line["name"],
            f"{shown(line['ours'])} {line['unit']}",
            f"{shown(line['reference'])} {line['unit']} ({line['against']})",
            f"{line['ratio']['median']:.2f} ({line['ratio']['min']:.2f} to {line['ratio']['max']:.2f})",
            line["n"],
            goal_of(line),
        ]
        for line in about["rows"]
    ]
    wire, speed = about["wire"], about["images_per_second"]

    def ratio(number, against):
        lines = [line for line in about["rows"] if line["row"] == number and against in line["against"]]
        return f"{lines[0]['ratio']['median']:.2f}"

    saving, reading_too = (line["reference"] for line in about["rows"] if line["row"] == 6 and line["unit"] == "s")

    return (
        "`make bench` measures each figure beside its reference in the same run on the same work, in alternating "
        "pairs. Medians; of the ratio the least and greatest too:\n\n"
        f"{table(['what', 'ours', 'reference', 'ratio', 'n', 'goal'], rows)}\n\n"
        f"{machine(about)}; one torch thread; data: {about['data']}. `partition.py` writes "
        f"{speed['ours']:,.0f} images a second.\n\n"
        f"Where the rest goes: a whole round takes {ratio(5, 'its slowest fit')} times its slowest fit, for then the "
        "devices measure the averaged model on their eval images, which is what `global_eval_*` needs; it takes "
        f"{ratio(5, 'evaluate')} times both together. Partitioning takes {ratio(6, 'np.save of')} times as long as "
        "saving alone, for the archive has to be decompressed and read, which by itself takes "
        f"{(reading_too - saving) / saving:.2f} times as long; it takes {ratio(6, 'reading')} times reading and "
        "saving.\n\n"
        f"On the wire: the parameters are {wire['parameters']:,} bytes; a client gets {wire['down_per_round']:,.0f} a "
        f"round (the model to train, and the averaged one to evaluate) and sends {wire['up_per_round']:,.0f}.\n\n"
        "Flower's own embedded-devices example on its deployment engine took 9.28 s a round, of which 1.81 s were "
        "training, and 770 MB at peak on the device (2 clients with 4,000 images each, measured elsewhere on this "
        "work): it starts a new process for each message.\n\n"
        "On CUDA the shard lies on the device, batches are cut there, and a pass reads its sums back once, at its end. "
        "That path is untested: no GPU was at hand, nor was a Jetson or a Raspberry Pi."
    )


def render(text):
    """README.md's `text` with all sections between markers written anew."""
    for section in (figure, soak, bench):
        name = section.__name__
        text, count = re.subn(
            f"(<!-- {name} -->\n).*?(<!-- end {name} -->)",
            lambda match, section=section: f"{match[1]}{section()}\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
        assert count == 1, f"README.md has no markers for {name}"
    return text


def main():
    path = ROOT / "README.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
