"""Cut a dataset into one shard a client: writes datasets/<dataset>/ as server.py and client.py read it.

    python partition.py --dataset CIFAR10 --num_clients 10
    python partition.py --dataset Flowers --source flowers.zip --num_clients 4 --partition dirichlet --bundles

Without --source, CIFAR10, CIFAR100, MNIST and FashionMNIST come from their official files in datasets/, which are
downloaded if they are not there, and Shapes10 is drawn here. --source takes one of these names, for a --dataset of
another name; or a folder, zip or tar: in the layout of CIFAR-10's or CIFAR-100's, or with four IDX files such as
MNIST's, or with the images as train/<class>/* and test/<class>/*, or only as <class>/* or train/<class>/*. Images are
brought to one size; a set of grey images alone is written with one channel. What an earlier run wrote for the dataset
is replaced. --show writes nothing: it prints what is there.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys

from libs import (
    DATASETS,
    UserError,
    given_flags,
    new_parser,
    nonempty_path,
    np,
    number,
    prepare_image,
    run_script,
    say,
    tqdm,
)
from plumbing.common.files import sync_folder
from plumbing.common.split import count_eval, image_digest, split_id, table_digest
from plumbing.laptop.pictures import draw_split, try_to_draw
from plumbing.laptop.split_files import show, write_bundle, write_table
from plumbing.sources import open_source


def image_size(text):
    """An argparse type: N or HEIGHTxWIDTH, as (height, width)."""
    match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text.lower())
    size = match and (int(match[1]), int(match[2] or match[1]))
    if not size or 0 in size:
        raise argparse.ArgumentTypeError(f"{text} is not N or HEIGHTxWIDTH in pixels")
    return size


def parse_args():
    parser = new_parser(__doc__)
    parser.add_argument("--num_clients", type=number(int, 1), default=10, help="number of shards")
    parser.add_argument("--source", type=nonempty_path, help="folder, zip or tar to read (default: see above)")
    size_help = "size to bring images to, N or HEIGHTxWIDTH; LeNet5 takes 32"
    parser.add_argument("--image_size", type=image_size, default="32", help=size_help)
    fit_help = "how: squash scales both sides, whatever they are; crop first takes the middle in the right proportion"
    parser.add_argument("--fit", choices=["squash", "crop"], default="squash", help=fit_help)
    partition_help = "who gets which images: iid, all the same mix of classes; dirichlet, a mix of each client's own; "
    partition_help += "shards, two slices of the images in the order of their classes"
    parser.add_argument("--partition", choices=["iid", "dirichlet", "shards"], default="iid", help=partition_help)
    positive, fraction = number(float, 0, inside=True), number(float, 0, 1, inside=True)
    parser.add_argument("--alpha", type=positive, default=0.5, help="dirichlet: the smaller, the more skewed")
    sizes_help = "how many images a client has: equal, or lognormal, in proportion to the exponential of a normal draw"
    parser.add_argument("--sizes", choices=["equal", "lognormal"], default="equal", help=sizes_help)
    test_help = "share of each class for the test set, where the source has none"
    parser.add_argument("--test_fraction", type=fraction, default=0.2, help=test_help)
    parser.add_argument("--eval_fraction", type=fraction, default=0.2, help="share of each shard to evaluate on")
    damaged_help = "skip images that cannot be read, and name them, rather than stop"
    parser.add_argument("--skip_damaged", action="store_true", help=damaged_help)
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of every random choice")
    parser.add_argument("--bundles", action="store_true", help="also write one tar a client, with all it needs")
    parser.add_argument("--show", action="store_true", help="only print how many images of each class each client has")
    args = parser.parse_args()
    args.given, args.without_test_set = given_flags(parser), False
    if args.show and args.given - {"dataset", "show"}:
        raise UserError(f"--show writes nothing: leave out --{min(args.given - {'dataset', 'show'})}")
    if "alpha" in args.given and args.partition != "dirichlet":
        raise UserError(f"--alpha has no effect on --partition {args.partition}, only on dirichlet")
    if args.partition == "shards" and args.sizes != "equal":
        raise UserError("--sizes lognormal goes with --partition iid or dirichlet: slices are of one size")
    return args


# Shards.


def draw_sizes(count, num_clients, rng, kind):
    """How many of `count` images each client gets: [int, …], at least two each (one to fit, one to evaluate)."""
    weights = np.exp(rng.normal(size=num_clients)) if kind == "lognormal" else np.ones(num_clients)
    wanted = (count - 2 * num_clients) * weights / weights.sum()
    sizes = 2 + wanted.astype(int)
    first = np.argsort(-(wanted % 1), kind="stable")[: count - sizes.sum()]  # those that rounding took most from
    sizes[first] += 1
    return sizes.tolist()


def split_iid(labels, sizes, rng):
    """Shuffle the ids 0..len(labels)-1 into shards (int arrays) of the given `sizes`."""
    return np.split(rng.permutation(len(labels)), np.cumsum(sizes)[:-1])


def split_shards(labels, sizes, rng):
    """Two slices a client of the ids in the order of their labels, after McMahan et al. 2017 (arXiv 1602.05629)."""
    order = rng.permutation(len(labels))
    slices = np.array_split(order[np.argsort(labels[order], kind="stable")], 2 * len(sizes))
    return [
        np.concatenate([slices[one], slices[other]]) for one, other in rng.permutation(2 * len(sizes)).reshape(-1, 2)
    ]


def split_dirichlet(labels, sizes, rng, alpha):
    """Shards of the given `sizes` with skewed labels, after Hsu et al. 2019 (arXiv 1909.06335).

    Each client draws its own mix of classes from Dirichlet(alpha × the whole set's mix) and takes its images by it,
    each image once; from classes that are used up the rest goes to the others.
    """
    num_classes = labels.max() + 1
    mix = np.bincount(labels, minlength=num_classes) / len(labels)
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]
    shards = []
    for size in sizes:
        # Gamma draws, as they make up a Dirichlet's, but as logarithms: for a small alpha all of them would be zero.
        weights = np.maximum(alpha * mix, 1e-300)
        wanted = np.log(rng.gamma(weights + 1)) + np.log1p(-rng.uniform(size=num_classes)) / weights
        shard = []
        while len(shard) < size:
            left = np.array([len(pool) for pool in pools])
            chances = np.where(left > 0, np.exp(np.minimum(wanted - wanted[left > 0].max(), 0)), 0)
            counts = rng.multinomial(size - len(shard), chances / chances.sum())
            for label, count in enumerate(np.minimum(counts, left)):
                shard.extend(pools[label][:count])
                pools[label] = pools[label][count:]
        shards.append(rng.permutation(np.array(shard)))
    return shards


def warn_of_duplicates(digests, labels):
    """Say how many test images are also in the training set, and how many pictures stand under two classes."""
    train, test = (digests[split] for split in ("train", "test"))
    known = set(train)
    shared = sum(digest in known for digest in test)
    if shared:
        say(f"warning: test images that are in the training set too: {shared} of {len(test)}; they flatter the model")
    label_of = {}
    pairs = zip(train + test, [*labels["train"].tolist(), *labels["test"].tolist()])
    unsure = {digest for digest, label in pairs if label_of.setdefault(digest, label) != label}
    if unsure:
        say(f"warning: pictures that stand under two classes or more: {len(unsure)}")


def write_dataset(folder, args):
    """Write the whole dataset into the empty `folder`. Returns the number of train images of each client."""
    source, checksum, (classes, channels, splits, levels) = open_source(args)
    if "test_fraction" in args.given and not args.without_test_set:
        say("note: --test_fraction has no effect: the source has a test set")
    labels, digests, grey, digest = {}, {}, [], hashlib.md5()
    sums = np.zeros((2, 3), np.int64)  # of the training images' values and of their squares, a channel

    def check(count):
        if args.num_clients > count // 2:
            raise UserError(f"--num_clients {args.num_clients} is too many: {count} images, and each client needs two")

    for split, count, images in splits:
        if split == "train":
            check(count)
        (folder / split).mkdir()
        prefix = f"{folder / split}{os.sep}"
        labels[split], digests[split] = [], []
        bar = tqdm(images, f"{args.dataset} {split}", count, leave=False, unit="image", disable=not sys.stderr.isatty())
        for index, (image, label) in enumerate(bar):
            image = prepare_image(image, args.image_size, args.fit, levels, channels)
            np.save(f"{prefix}{index}.npy", image)
            labels[split].append(label)
            digests[split].append(image_digest(image))
            if image.ndim == 2:
                grey.append((split, index))
            if split == "train":
                values = image.reshape(-1, 1 if image.ndim == 2 else 3).astype(np.int64)
                sums += values.sum(0), np.square(values).sum(0)
            if checksum is None:
                digest.update(np.ascontiguousarray(image))
        labels[split] = np.array(labels[split], np.int64)
    check(len(labels["train"]))  # which are fewer where damaged ones were skipped
    if channels is None:
        channels = 1 if len(grey) == len(digests["train"]) + len(digests["test"]) else 3
    for split, index in grey if channels == 3 else []:  # grey images of a coloured set
        path = folder / split / f"{index}.npy"
        image = np.dstack([np.load(path)] * 3)
        np.save(path, image)
        digests[split][index] = image_digest(image)
    warn_of_duplicates(digests, labels)

    rng = np.random.RandomState(args.seed)  # unlike default_rng, the same stream in every numpy
    sizes = draw_sizes(len(labels["train"]), args.num_clients, rng, args.sizes)
    if args.partition == "iid":
        shards = split_iid(labels["train"], sizes, rng)
    elif args.partition == "shards":
        shards = [rng.permutation(shard) for shard in split_shards(labels["train"], sizes, rng)]
    else:
        shards = split_dirichlet(labels["train"], sizes, rng, args.alpha)
    (folder / "clients").mkdir()
    shard_digests = []
    for cid, ids in enumerate(shards):
        num_eval = count_eval(len(ids), args.eval_fraction)
        phases = ["fit"] * (len(ids) - num_eval) + ["eval"] * num_eval
        rows = [(str(row), str(labels["train"][row]), phase) for row, phase in zip(ids, phases)]
        write_table(folder / "clients" / f"client_{cid}.csv", ("id", "label", "phase"), rows)
        shard_digests.append(table_digest(rows, (digests["train"][row] for row in ids)))
    rows = [(str(row), str(label)) for row, label in enumerate(labels["test"])]
    write_table(folder / "test.csv", ("id", "label"), rows)
    pixels = len(labels["train"]) * args.image_size[0] * args.image_size[1]
    variances = [pixels * squares - total * total for total, squares in sums.T[:channels].tolist()]  # times pixels²
    info = {
        "dataset": args.dataset,
        "classes": list(classes),
        "channels": channels,
        "image_size": list(args.image_size),  # height, width
        "fit": args.fit,
        "levels": levels,  # the 16-bit values that became 0 and 255
        "mean": [total / pixels / 255 for total in sums[0, :channels].tolist()],  # of the training images, in 0..1
        "std": [math.sqrt(variance) / pixels / 255 for variance in variances],
        "num_train": len(labels["train"]),
        "num_test": len(labels["test"]),
        "num_clients": args.num_clients,
        "partition": args.partition,
        "sizes": args.sizes,
        "alpha": args.alpha if args.partition == "dirichlet" else None,
        "eval_fraction": args.eval_fraction,
        "seed": args.seed,
        "split": [np.bincount(labels["train"][ids], minlength=len(classes)).tolist() for ids in shards],
        "source": source,
        "checksum": checksum or f"md5 of all pixels: {digest.hexdigest()}",
        "shards": shard_digests,
        "test": table_digest(rows, digests["test"]),
    }
    if args.without_test_set:
        info["test_fraction"] = args.test_fraction
    info["id"] = split_id(info)
    (folder / "dataset.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8", newline="\n")
    title = f"{args.dataset}, {args.partition}"
    try_to_draw(draw_split, folder / "partition.png", title, info["split"], classes)
    if args.bundles:
        (folder / "bundles").mkdir()
        for cid, ids in enumerate(tqdm(shards, "bundles", leave=False, disable=not sys.stderr.isatty())):
            write_bundle(folder, args.dataset, cid, ids)
    return [len(ids) for ids in shards]


def main():
    args = parse_args()
    args.datasets = DATASETS
    if args.show:
        return show(DATASETS / args.dataset)
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", args.dataset, re.IGNORECASE):
        raise UserError(f"--dataset {args.dataset}: Windows allows no folder of this name, take another")
    target = (DATASETS / args.dataset).resolve()
    new, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    if target.exists() and not (target / "dataset.json").exists():
        raise UserError(f"{target} exists and is not of this script's making: move it away")
    try:
        DATASETS.mkdir(exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        sizes = write_dataset(new, args)
        if hasattr(os, "sync"):  # on Linux and macOS: all files in a tenth of a second; one by one they take minutes
            os.sync()
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
        sync_folder(target.parent)  # only now may the old one go
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    sizes = f"{' to '.join(map(str, sorted({min(sizes), max(sizes)})))} images each"
    say(f"{shlex.quote(str(target))}: {args.num_clients} clients with {sizes}, {args.partition}")


if __name__ == "__main__":
    run_script(main)
