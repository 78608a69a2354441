"""Would it cost accuracy to send the parameters as float16? The answer decides whether a `--compress` is worth having.

    python benchmarks/fp16.py --seeds 3 --num_rounds 30

Simulates federated averaging in one process per case, with 10 clients of CIFAR-10 (drawn shapes where the real images
are not at hand): once with the parameters as they are, once rounded to float16 on the way down and on the way up; same
seeds, same order of batches. Writes benchmarks/fp16.json. Not part of `make bench`: three minutes a case, or so.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from common import BUILD_ARCHIVE, HERE, Suite, about_this_run, leave_on_signals, write_json

NUM_CLIENTS = 10


def simulate(dataset, kind, seed, num_rounds):
    """The test accuracies of the global model, one a round, with parameters sent as `kind` (float32 or float16)."""
    from libs import DATASETS, np, torch

    from client import load_shard
    from data import BatchLoader, ImageDataset, read_table
    from engines import client_fit_fn, server_test_fn
    from nets import Net, get_arrays, set_arrays
    from strategies import average

    def sent(arrays):
        if kind == "float32":
            return arrays
        return [array.astype(kind).astype(array.dtype) if array.dtype == np.float32 else array for array in arrays]

    torch.set_num_threads(1)
    shards = [load_shard(dataset, cid, "cpu")[0] for cid in range(NUM_CLIENTS)]
    test = ImageDataset(read_table(DATASETS / dataset / "test.csv", 10), DATASETS / dataset / "test")
    torch.manual_seed(seed)
    model = Net(3, 10)
    arrays, accuracies = get_arrays(model), []
    for current in range(num_rounds):
        updates = []
        for cid, loaders in enumerate(shards):
            set_arrays(model, sent(arrays))
            torch.manual_seed(seed * 10**6 + current * 10**3 + cid)
            client_fit_fn(loaders, model)
            updates.append((len(loaders["fit"].dataset), sent(get_arrays(model))))
        arrays = average(updates)
        set_arrays(model, arrays)
        accuracies.append(server_test_fn({"test": BatchLoader(test, 250)}, model)["test_accuracy"])
    return accuracies


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="pairs of runs (default: 3)")
    parser.add_argument("--num_rounds", type=int, default=30, help="rounds of each (default: 30)")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # dataset, kind, seed: one simulation
    args = parser.parse_args()
    if args.case is not None:
        dataset, kind, seed = args.case
        print(json.dumps(simulate(dataset, kind, int(seed), args.num_rounds)))
        return
    leave_on_signals()
    about, runs = about_this_run(), []
    with Suite() as suite:
        real = BUILD_ARCHIVE.exists()
        dataset, source = ("CIFAR10", ["--source", suite.root / "cifar-10-python.tar.gz"]) if real else ("Shapes10", [])
        if real:
            subprocess.run([sys.executable, BUILD_ARCHIVE, suite.root], check=True, timeout=300)
        suite.run("partition.py", "--dataset", dataset, "--num_clients", NUM_CLIENTS, *source)
        for seed in range(args.seeds):
            command = ["fp16.py", "--num_rounds", args.num_rounds, "--case", dataset]
            processes = {kind: suite.start(*command, kind, seed) for kind in ("float32", "float16")}
            started, run = time.monotonic(), {"seed": seed}
            for kind, process in processes.items():
                _, line = process.wait_for("[", 60 * args.num_rounds)
                run[kind] = json.loads(line)
            runs.append(run)
            last = {kind: statistics.mean(run[kind][-5:]) for kind in processes}
            print(f"seed {seed}: {last} (mean of the last 5 rounds), {time.monotonic() - started:.0f} s", flush=True)
    last = {kind: [statistics.mean(run[kind][-5:]) for run in runs] for kind in ("float32", "float16")}
    differences = [half - whole for half, whole in zip(last["float16"], last["float32"])]
    spread = max(last["float32"]) - min(last["float32"])
    print(f"float16 less float32: {differences}; spread of float32 over the seeds: {spread}")
    result = {"dataset": dataset, "last_5_rounds": last, "differences": differences, "spread_float32": spread}
    write_json(HERE / "fp16.json", {**about, "num_rounds": args.num_rounds, **result, "runs": runs})


if __name__ == "__main__":
    main()
