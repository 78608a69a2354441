"""What --compress costs in accuracy: federated averaging with both ends of the wire and no network between; run as

    python benchmarks/compress.py DATASETS/CIFAR10 fp16 --seed 1

Ten clients of 4,000 images in one process train as client.py has them train, with the same seeds in each way. The
rounds go to benchmarks/compress.json, in place of those that it had of that way and seed (a run takes minutes).
"""

import argparse
import json
from pathlib import Path

from libs import np, torch
from plumbing.common.state import float32_weights, get_arrays, set_arrays
from plumbing.common.wire import COMPRESS, Holder, Sender, restore_all

from common import HERE, about_this_run, write_json
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays

from data import load_shard, load_test
from engines import client_fit_fn, run_epoch
from nets import build_net
from strategies import average

CLIENTS, NET = 10, "LeNet5"


def train(folder, compress, seed, rounds):
    """Yields (test loss, test accuracy) of the server's model after each round."""
    shards = [load_shard(folder, cid, "cpu") for cid in range(CLIENTS)]
    test, info = load_test(folder)
    torch.manual_seed(seed)
    model = build_net(NET, info["channels"], len(info["classes"]))
    marks = float32_weights(model)
    sender, holders = Sender(compress, marks), [Holder(lambda: marks) for _ in range(CLIENTS)]
    arrays, held = get_arrays(model), None
    for current in range(1, rounds + 1):
        sent, updates = sender.model_of(ndarrays_to_parameters(arrays)), []
        for cid, (holder, (loaders, _)) in enumerate(zip(holders, shards, strict=True)):
            set_arrays(model, parameters_to_ndarrays(holder.unpack(sender.pack(sent, held))))
            sequence = np.random.SeedSequence([seed, current, cid])
            client_fit_fn(loaders, model, training_verbose=False, seed=int(sequence.generate_state(1)[0]))
            answer = holder.pack(ndarrays_to_parameters(get_arrays(model)))
            answer.tensors = restore_all(answer.tensors, sent.tensors)
            updates.append((len(loaders["fit"].dataset), parameters_to_ndarrays(answer)))
        arrays, held = average(updates), sent
        set_arrays(model, arrays)
        yield run_epoch(test, model, "cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the dataset, as partition.py writes it for 10 clients")
    parser.add_argument("compress", choices=COMPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds = []
    for loss, accuracy in train(args.folder, args.compress, args.seed, args.rounds):
        rounds.append({"test_loss": loss, "test_accuracy": accuracy})
        print(
            json.dumps({"compress": args.compress, "seed": args.seed, "round": len(rounds), **rounds[-1]}), flush=True
        )
    keep(args.compress, args.seed, rounds)


def keep(compress, seed, rounds):
    """Put a run into compress.json."""
    path = HERE / "compress.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": []}
    runs = [run for run in kept["runs"] if (run["compress"], run["seed"]) != (compress, seed)]
    runs.append({"compress": compress, "seed": seed, "rounds": rounds})
    runs.sort(key=lambda run: (COMPRESS.index(run["compress"]), run["seed"]))
    write_json(path, {"about": about_this_run(), "runs": runs})


if __name__ == "__main__":
    main()
