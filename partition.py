"""Split a dataset among clients: write datasets/<dataset>/ for server.py and client.py.

    python partition.py --dataset CIFAR10 --num_clients 10
    python partition.py --dataset Flowers --source flowers.zip --num_clients 4 --partition dirichlet --bundles

Without --source, CIFAR10, CIFAR100, MNIST and FashionMNIST are read from their official files in datasets/, which are
downloaded if they are not there, and Shapes10 is drawn. --source takes one of these names, for a --dataset of another
name; or a folder, zip or tar with CIFAR-10's or CIFAR-100's own files, with four IDX files such as MNIST's, or with
images as train/<class>/* and test/<class>/*, or only as <class>/* or train/<class>/*. All images are brought to one
size; if all of them are grey, they are written with one channel. An earlier split of the dataset is replaced.
"""

import argparse
import hashlib
import json
import math
import re
import shlex
import sys
from dataclasses import dataclass, field

from libs import DATASETS, UserError, np, prepare_image, run_script, say, tqdm
from plumbing.common.arguments import given_flags, new_parser, nonempty_path, number
from plumbing.common.split import count_eval, describe_partition, image_digest, split_id, table_digest
from plumbing.laptop.drawing import FORMATS, try_to_draw
from plumbing.laptop.pictures import draw_split
from plumbing.laptop.split_files import replace_folder, show, write_bundle, write_table
from plumbing.sources import Options, open_source


def image_size(text):
    """Parse N or HEIGHTxWIDTH, for argparse: (height, width)."""
    match = re.fullmatch(r"(\d{1,4})(?:x(\d{1,4}))?", text.lower())
    size = match and (int(match[1]), int(match[2] or match[1]))
    if not size or 0 in size:
        raise argparse.ArgumentTypeError(f"{text} is not N or HEIGHTxWIDTH in pixels")
    return size


def parse_args():
    parser = new_parser(__doc__)
    parser.add_argument("--num_clients", type=number(int, 1), default=10, help="number of shards")
    parser.add_argument("--source", type=nonempty_path, help="folder, zip or tar to read (default: see above)")
    size_help = "size of the images, N or HEIGHTxWIDTH; LeNet5 takes 32"
    parser.add_argument("--image_size", type=image_size, default="32", help=size_help)
    fit_help = "how to resize: squash scales both sides separately; crop takes the middle in the right ratio first"
    parser.add_argument("--fit", choices=["squash", "crop"], default="squash", help=fit_help)
    partition_help = "who gets which images: iid, a random sample of all; dirichlet, a mix of classes of its own; "
    partition_help += "shards, two slices of the images sorted by class"
    parser.add_argument("--partition", choices=["iid", "dirichlet", "shards"], default="iid", help=partition_help)
    positive, fraction = number(float, 0, inside=True), number(float, 0, 1, inside=True)
    parser.add_argument("--alpha", type=positive, default=0.5, help="dirichlet: the smaller, the more skewed")
    sizes_help = "how many images a client gets: equal, or lognormal, in proportion to the exponential of a normal draw"
    parser.add_argument("--sizes", choices=["equal", "lognormal"], default="equal", help=sizes_help)
    test_help = "share of each class for the test set, if the source has none (default: 0.2)"
    parser.add_argument("--test_fraction", type=fraction, help=test_help)
    parser.add_argument("--eval_fraction", type=fraction, default=0.2, help="share of each shard to evaluate on")
    damaged_help = "skip images that cannot be read, and list them, instead of stopping"
    parser.add_argument("--skip_damaged", action="store_true", help=damaged_help)
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of all random choices")
    parser.add_argument("--bundles", action="store_true", help="also write a tar for each client, with all it needs")
    picture_help = "draw partition.png as pdf or svg, too"
    parser.add_argument("--picture_format", choices=FORMATS, default=FORMATS[0], help=picture_help)
    show_help = "write nothing; print how many images of each class each client has"
    parser.add_argument("--show", action="store_true", help=show_help)
    args, given = parser.parse_args(), given_flags(parser)
    if args.show and given - {"dataset", "show"}:
        raise UserError(f"--show writes nothing: leave out --{min(given - {'dataset', 'show'})}")
    if "alpha" in given and args.partition != "dirichlet":
        raise UserError(f"--alpha has no effect on --partition {args.partition}, only on dirichlet")
    if args.partition == "shards" and args.sizes != "equal":
        raise UserError("--sizes lognormal goes with --partition iid or dirichlet: slices are of one size")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The split: which client gets which images.


def draw_sizes(count, num_clients, rng, kind):
    """Draw how many of `count` images each client gets: [int, …], at least two each (one to fit, one to evaluate)."""
    weights = np.exp(rng.normal(size=num_clients)) if kind == "lognormal" else np.ones(num_clients)
    wanted = (count - 2 * num_clients) * weights / weights.sum()
    sizes = 2 + wanted.astype(int)
    first = np.argsort(-(wanted % 1), kind="stable")[: count - sizes.sum()]  # those that lost most by rounding
    sizes[first] += 1
    return sizes.tolist()


def split_iid(labels, sizes, rng):
    """Split the ids 0..len(labels)-1 at random into shards (int arrays) of the given `sizes`."""
    return np.split(rng.permutation(len(labels)), np.cumsum(sizes)[:-1])


def split_shards(labels, sizes, rng):
    """Give each client two slices of the ids sorted by label, after McMahan et al. 2017 (arXiv 1602.05629)."""
    order = rng.permutation(len(labels))
    slices = np.array_split(order[np.argsort(labels[order], kind="stable")], 2 * len(sizes))
    pairs = rng.permutation(2 * len(sizes)).reshape(-1, 2)
    return [rng.permutation(np.concatenate([slices[one], slices[other]])) for one, other in pairs]


def split_dirichlet(labels, sizes, rng, alpha):
    """Split the ids into shards of the given `sizes` with skewed labels, after Hsu et al. 2019 (arXiv 1909.06335).

    Each client draws a mix of classes from Dirichlet(alpha × the mix of all images), and then its images from that mix,
    without replacement. What it would draw from classes that are used up, it draws from the others.
    """
    num_classes = labels.max() + 1
    mix = np.bincount(labels, minlength=num_classes) / len(labels)
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]
    shards = []
    for size in sizes:
        # A Dirichlet draw is gamma draws, normalised. These are their logarithms: for a small alpha all would be zero.
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


# ---------------------------------------------------------------------------------------------------------------------
# The dataset: images first, then the split of their ids, then dataset.json.


@dataclass
class Images:
    """The images of a dataset as they were written, by split."""

    channels: int | None  # 1 or 3; None until all images are read
    labels: dict = field(default_factory=dict)  # {"train": int64 array, "test": …}, by id
    digests: dict = field(default_factory=dict)  # {"train": [image_digest, …], "test": …}
    mean: list | None = None  # per channel, of the training images, in 0..1
    std: list | None = None
    checksum: str | None = None


def write_images(folder, source, args):
    """Write each image as <split>/<id>.npy, uint8 H×W if all are grey, else H×W×3 (RGB). Returns Images."""
    images, grey, checksum = Images(source.channels), [], hashlib.md5()
    sums = np.zeros((2, 3), np.int64)  # of the values of the training images and of their squares, per channel
    for split, count, pairs in source.splits:
        if split == "train":
            check_count(args.num_clients, count)
        (folder / split).mkdir()
        labels, digests = [], []
        for index, (image, label) in enumerate(progress(pairs, f"{args.dataset} {split}", count)):
            image = prepare_image(image, args.image_size, args.fit, source.levels, source.channels)
            np.save(f"{folder}/{split}/{index}.npy", image)
            labels.append(label)
            digests.append(image_digest(image))
            if image.ndim == 2:
                grey.append((split, index))
            if split == "train":
                values = image.reshape(-1, 1 if image.ndim == 2 else 3).astype(np.int64)
                sums += values.sum(0), np.square(values).sum(0)
            if source.checksum is None:
                checksum.update(np.ascontiguousarray(image))
        images.labels[split], images.digests[split] = np.array(labels, np.int64), digests
    num_train = len(images.labels["train"])
    check_count(args.num_clients, num_train)  # again, as damaged images may have been skipped
    if images.channels is None:
        images.channels = 1 if len(grey) == sum(map(len, images.labels.values())) else 3
    for split, index in grey if images.channels == 3 else []:  # grey images among coloured ones
        image = np.dstack([np.load(folder / split / f"{index}.npy")] * 3)
        np.save(folder / split / f"{index}.npy", image)
        images.digests[split][index] = image_digest(image)
    images.mean, images.std = mean_and_std(sums[:, : images.channels], num_train * math.prod(args.image_size))
    images.checksum = source.checksum or f"md5 of all pixels: {checksum.hexdigest()}"
    return images


def mean_and_std(sums, count):
    """Return both per channel, in 0..1, from the sums of `count` values in 0..255 and of their squares, int64 2×C."""
    sums = sums.T.tolist()  # Python's integers, as the products need more than 64 bits
    mean = [total / count / 255 for total, _ in sums]
    return mean, [math.sqrt(count * squares - total * total) / count / 255 for total, squares in sums]


def check_count(num_clients, count):
    if num_clients > count // 2:
        raise UserError(f"--num_clients {num_clients} is too many: {count} images, and each client needs two")


def progress(items, title, total):
    return tqdm(items, title, total, leave=False, unit="image", disable=not sys.stderr.isatty())


def warn_of_duplicates(images):
    """Say how many test images are also in the training set, and how many images are in more than one class."""
    train, test = images.digests["train"], images.digests["test"]
    known, label_of = set(train), {}
    shared = sum(digest in known for digest in test)
    if shared:
        say(f"warning: {shared} of {len(test)} test images are also in the training set, which flatters the model")
    pairs = zip(train + test, np.concatenate([images.labels["train"], images.labels["test"]]).tolist())
    unsure = {digest for digest, label in pairs if label_of.setdefault(digest, label) != label}
    if unsure:
        say(f"warning: images that are in two classes or more: {len(unsure)}")


def split_images(labels, args):
    """Split the ids of the training images as the flags say: [int array of ids, …], one per client."""
    rng = np.random.RandomState(args.seed)  # unlike default_rng, the same stream in every numpy
    sizes = draw_sizes(len(labels), args.num_clients, rng, args.sizes)
    if args.partition == "iid":
        return split_iid(labels, sizes, rng)
    if args.partition == "shards":
        return split_shards(labels, sizes, rng)
    return split_dirichlet(labels, sizes, rng, args.alpha)


def write_tables(folder, images, shards, eval_fraction):
    """Write clients/client_<cid>.csv and test.csv; return their digests, which dataset.json holds."""
    (folder / "clients").mkdir()
    labels, digests = images.labels["train"], []
    for cid, ids in enumerate(shards):
        num_eval = count_eval(len(ids), eval_fraction)
        phases = ["fit"] * (len(ids) - num_eval) + ["eval"] * num_eval  # at random, as the ids are in random order
        rows = [(str(image_id), str(labels[image_id]), phase) for image_id, phase in zip(ids, phases)]
        write_table(folder / "clients" / f"client_{cid}.csv", ("id", "label", "phase"), rows)
        digests.append(table_digest(rows, (images.digests["train"][image_id] for image_id in ids)))
    rows = [(str(image_id), str(label)) for image_id, label in enumerate(images.labels["test"])]
    write_table(folder / "test.csv", ("id", "label"), rows)
    return digests, table_digest(rows, images.digests["test"])


def write_dataset(folder, args):
    """Write the whole dataset into the empty `folder`. Returns the shards, an int array of ids per client."""
    options = Options(args.dataset, args.test_fraction or 0.2, args.seed, args.skip_damaged)
    source = open_source(args.source, options, DATASETS)
    if args.test_fraction and not source.test_fraction:
        say("note: --test_fraction has no effect: the source has a test set")
    images = write_images(folder, source, args)
    warn_of_duplicates(images)
    shards = split_images(images.labels["train"], args)
    shard_digests, test_digest = write_tables(folder, images, shards, args.eval_fraction)
    num_classes = len(source.classes)
    info = {
        "dataset": args.dataset,
        "classes": source.classes,
        "channels": images.channels,
        "image_size": list(args.image_size),  # height, width
        "fit": args.fit,
        "levels": source.levels,  # the 16-bit values that became 0 and 255
        "mean": images.mean,
        "std": images.std,
        "num_train": len(images.labels["train"]),
        "num_test": len(images.labels["test"]),
        "num_clients": args.num_clients,
        "partition": args.partition,
        "sizes": args.sizes,
        "alpha": args.alpha if args.partition == "dirichlet" else None,
        "eval_fraction": args.eval_fraction,
        "seed": args.seed,
        "split": [np.bincount(images.labels["train"][ids], minlength=num_classes).tolist() for ids in shards],
        "source": source.name,
        "checksum": images.checksum,
        "shards": shard_digests,
        "test": test_digest,
    }
    if source.test_fraction:
        info["test_fraction"] = source.test_fraction
    info["id"] = split_id(info)
    (folder / "dataset.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8", newline="\n")
    title = f"{args.dataset} ({describe_partition(info)}): {args.num_clients} clients"
    picture = folder / f"partition.{args.picture_format}"
    try_to_draw(draw_split, picture, title, info["split"], source.classes)
    if args.bundles:
        (folder / "bundles").mkdir()
        for cid, ids in enumerate(progress(shards, "bundles", len(shards))):
            write_bundle(folder, args.dataset, cid, ids)
    return shards


def main():
    args = parse_args()
    folder = DATASETS / args.dataset
    if args.show:
        return show(folder)
    with replace_folder(folder) as new:
        sizes = sorted({len(ids) for ids in write_dataset(new, args)})
    sizes = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else sizes[0]
    say(f"{shlex.quote(str(folder))}: {args.num_clients} clients with {sizes} images each, {args.partition}")
    if args.bundles:
        say(f"a bundle for each client: {shlex.quote(str(folder / 'bundles'))}")


if __name__ == "__main__":
    run_script(main)
