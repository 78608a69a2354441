"""Cut a dataset into one shard a client: writes datasets/<dataset>/ as server.py and client.py read it.

    python partition.py --dataset CIFAR10 --num_clients 10
    python partition.py --dataset Flowers --source flowers.zip --num_clients 4 --partition dirichlet --bundles

Without --source, CIFAR10 comes from datasets/cifar-10-python.tar.gz, which is downloaded if it is not there, and
Shapes10 is drawn here. --source takes an archive in the layout of CIFAR-10's, or a folder or zip with the images as
train/<class>/* and test/<class>/*. What an earlier run wrote for the dataset is replaced.
"""

import hashlib
import http.client
import json
import os
import pickle
import queue
import shutil
import sys
import tarfile
import threading
import urllib.request
import zipfile
import zlib
from pathlib import Path

from libs import (
    DATASETS,
    UserError,
    cut_id,
    cv2,
    image_digest,
    new_parser,
    np,
    number,
    run_script,
    say,
    table_digest,
    tqdm,
)

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
START_TIMEOUT = 10  # seconds until a download must have started
STALL_TIMEOUT = 30  # seconds that a started download may be silent


def parse_args():
    parser = new_parser(__doc__)
    parser.add_argument("--num_clients", type=number(int, 1), default=10, help="number of shards")
    parser.add_argument("--source", type=Path, help="archive, zip or folder to read (default: see above)")
    parser.add_argument("--partition", choices=["iid", "dirichlet"], default="iid", help="equal shards, or label skew")
    positive, fraction = number(float, 0, inside=True), number(float, 0, 1, inside=True)
    parser.add_argument("--alpha", type=positive, default=0.5, help="dirichlet: the smaller, the more skewed")
    parser.add_argument("--eval_fraction", type=fraction, default=0.2, help="share of each shard to evaluate on")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of every random choice")
    parser.add_argument("--bundles", action="store_true", help="also write one tar a client, with all it needs")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# Sources. Each reader returns (classes, channels, splits): splits yields ("train" or "test", number of images, images)
# in turn, and images yields (uint8 H×W or H×W×3 in RGB order, int label).


class PlainUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain types only, so that an archive cannot run code."""

    ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),  # how Python 3 pickles bytes
    }

    def find_class(self, module, name):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ADMITTED[module, name]


def read_archive(path):
    """Read an archive in the layout of cifar-10-python.tar.gz. Nothing is unpacked to disk."""
    wanted = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]
    batches = {}
    try:
        with tarfile.open(path, "r|*") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isfile():
                    batches[name] = PlainUnpickler(tar.extractfile(member), encoding="bytes").load()
        classes = [name.decode() for name in batches["batches.meta"][b"label_names"]]
        for name in wanted[:-1]:
            data, labels = batches[name][b"data"], np.array(batches[name][b"labels"])
            if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not len(labels):
                raise ValueError(f"{name} is not rows of 3,072 bytes with a label each")
            if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= len(classes):
                raise ValueError(f"{name} has a label outside 0..{len(classes) - 1}")
            batches[name] = data, labels
    except KeyError as error:
        raise UserError(f"{path} is not an archive in CIFAR-10's layout: it has no {error.args[0]!r}") from None
    except Exception as error:  # whatever tarfile, zlib and pickle make of bytes that are damaged or something else
        raise UserError(f"{path} is damaged, or not an archive in CIFAR-10's layout: {error}") from None

    def images(names):
        for name in names:
            data, labels = batches.pop(name)
            yield from zip(np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.tolist())

    train = sum(len(batches[name][1]) for name in wanted[:5])
    splits = [("train", train, images(wanted[:5])), ("test", len(batches["test_batch"][1]), images(wanted[5:6]))]
    return classes, 3, splits


def read_images(source, channels):
    """Read a folder or a zip of images as train/<class>/* and test/<class>/*; classes in sorted order."""
    if source.is_dir():
        paths = [path for path in source.glob("*/*/*") if path.is_file()]
        files = {path.relative_to(source).as_posix(): path.read_bytes for path in paths}
    else:
        archive = zipfile.ZipFile(source)
        files = {name: lambda name=name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    names = {"train": [], "test": []}
    for name in sorted(files):
        parts = name.split("/")
        if len(parts) == 3 and parts[0] in names and not parts[2].startswith("."):
            names[parts[0]].append(name)
    classes = sorted({name.split("/")[1] for name in names["train"]})
    for split in names:
        if not names[split]:
            raise UserError(f"{source} has no images as {split}/<class>/*")
    unknown = {name.split("/")[1] for name in names["test"]} - set(classes)
    if unknown:
        raise UserError(f"{source} has the class {min(unknown)} in test/ and not in train/")

    def images(split):
        for name in names[split]:
            try:
                encoded = np.frombuffer(files[name](), np.uint8)
                image = cv2.imdecode(encoded, cv2.IMREAD_COLOR if channels == 3 else cv2.IMREAD_GRAYSCALE)
            except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise UserError(f"{source}: {name} cannot be read: {error}") from None
            except cv2.error:
                image = None
            if image is None:
                raise UserError(f"{source}: {name} is not an image that OpenCV reads")
            yield image if channels == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB), classes.index(name.split("/")[1])

    return classes, channels, [(split, len(names[split]), images(split)) for split in names]


def regular(corners, *radii):
    """A polygon's corners as (radii, angles), at equal angles, with the radii in turn (all 1 without any)."""
    return np.resize(radii or (1,), corners), np.arange(corners) * 2 * np.pi / corners


SHAPES = "bar circle cross diamond hexagon ring sector square star triangle".split()
POLYGONS = {
    "bar": (np.ones(4), np.array([0.3, np.pi - 0.3, np.pi + 0.3, -0.3])),
    "cross": (np.resize([1, 1, 0.42], 12), np.repeat(np.arange(4) * np.pi / 2, 3) + np.tile([-0.3, 0.3, np.pi / 4], 4)),
    "diamond": regular(4, 1, 0.55),
    "hexagon": regular(6),
    "square": regular(4),
    "star": regular(10, 1, 0.45),
    "triangle": regular(3),
}


def draw_shape(shape, rng):
    """One 32×32 image of a shape, uint8 H×W×3: random place, size, turn, colours, and noise."""
    back, fore = rng.randint(0, 100, 3), rng.randint(130, 256, 3)
    image = np.full((32, 32, 3), back, np.uint8)
    size, turn = rng.uniform(7, 13), rng.uniform(-0.3, 0.3)
    x, y = rng.uniform(max(size, 11), 32 - max(size, 11), 2)
    colour = fore.tolist()

    centre, radius = (round(x), round(y)), round(size * 0.8)
    if shape == "circle":
        cv2.circle(image, centre, radius, colour, -1, cv2.LINE_AA)
    elif shape == "ring":
        cv2.circle(image, centre, radius, colour, 2, cv2.LINE_AA)
    elif shape == "sector":
        cv2.ellipse(image, centre, (radius, radius), np.degrees(turn), 0, 240, colour, -1, cv2.LINE_AA)
    else:
        radii, angles = POLYGONS[shape]
        points = np.stack([x + size * radii * np.cos(turn + angles), y + size * radii * np.sin(turn + angles)], axis=1)
        cv2.fillPoly(image, [np.round(points * 16).astype(np.int32)], colour, cv2.LINE_AA, shift=4)
    return np.clip(image + rng.normal(0, rng.uniform(5, 25), image.shape), 0, 255).astype(np.uint8)


def draw_shapes(num_train=10000, num_test=2000, seed=0):
    """The built-in dataset Shapes10: always the same images, so that two machines can compare what they see."""

    def images(count, rng):
        for index in range(count):
            label = index % len(SHAPES)
            yield draw_shape(SHAPES[label], rng), label

    counts = {"train": num_train, "test": num_test}
    rng = np.random.RandomState(seed)
    return SHAPES, 3, [(split, count, images(count, rng)) for split, count in counts.items()]


def download(url, path, md5):
    """Download `url` to `path`, which appears only when it is whole and its MD5 is right. Raises UserError."""
    answers = queue.Queue()

    def start():  # in a thread: looking up a host's name obeys no timeout
        try:
            answers.put(urllib.request.urlopen(url, timeout=STALL_TIMEOUT))
        except Exception as error:
            answers.put(error)

    threading.Thread(target=start, daemon=True).start()
    try:
        response = answers.get(timeout=START_TIMEOUT)
    except queue.Empty:
        response = f"no answer within {START_TIMEOUT} s"
    if isinstance(response, (str, Exception)):
        raise UserError(f"cannot download {url} ({response}): put the file into {path.parent}/ by hand") from None
    part = path.with_name(f"{path.name}.part")
    digest = hashlib.md5()
    try:
        total = int(response.headers.get("Content-Length", 0)) or None
        bar = tqdm(desc=path.name, total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
        with response, bar, open(part, "wb") as file:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        if digest.hexdigest() != md5:
            raise UserError(f"{url} was not received whole (its MD5 is {digest.hexdigest()}): run this again")
        os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"the download of {url} broke off ({error}): run this again") from None
    finally:
        part.unlink(missing_ok=True)


def file_md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def open_source(args):
    """Choose the reader for the arguments: (name of the source, its checksum or None, what the reader returned)."""
    channels = 1 if "MNIST" in args.dataset else 3
    source = args.source
    if source is None and args.dataset == "Shapes10":
        return "built in", None, draw_shapes()
    if source is None and args.dataset == "CIFAR10":
        source = DATASETS / "cifar-10-python.tar.gz"
        if not source.exists():
            download(CIFAR10_URL, source, CIFAR10_MD5)
        elif file_md5(source) != CIFAR10_MD5:
            raise UserError(f"{source} is not the official archive (wrong MD5): delete it, or name it with --source")
    if source is None:
        raise UserError(f"no source is built in for {args.dataset}: name one with --source")
    target = (DATASETS / args.dataset).resolve()
    if source.resolve() == target or target in source.resolve().parents:
        raise UserError(f"--source {source} lies in {target}, which this run would replace: move it elsewhere")
    try:
        if source.is_dir():
            return str(source), None, read_images(source, channels)
        checksum = f"md5: {file_md5(source)}"
        reader = read_images(source, channels) if zipfile.is_zipfile(source) else read_archive(source)
        return str(source), checksum, reader
    except (OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f"cannot read {source}: {error}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Shards.


def split_iid(labels, num_clients, rng):
    """Shuffle the ids 0..len(labels)-1 into `num_clients` shards (int arrays) whose sizes differ by at most one."""
    return np.array_split(rng.permutation(len(labels)), num_clients)


def split_dirichlet(labels, num_clients, rng, alpha):
    """Shards of the same sizes with skewed labels, after Hsu et al. 2019 (arXiv 1909.06335).

    Each client draws its own mix of classes from Dirichlet(alpha × the whole set's mix) and takes its images by it,
    each image once; from classes that are used up the rest goes to the others.
    """
    num_classes = labels.max() + 1
    mix = np.bincount(labels, minlength=num_classes) / len(labels)
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in range(num_classes)]
    shards = []
    for size in [len(part) for part in np.array_split(labels, num_clients)]:
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


def write_bundle(folder, dataset, cid, ids):
    """Write bundles/client_<cid>.tar: the client's images, its CSV and dataset.json, to unpack at the suite's root."""

    def anonymous(member):
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    names = ["dataset.json", f"clients/client_{cid}.csv"] + [f"train/{image_id}.npy" for image_id in ids]
    with tarfile.open(folder / "bundles" / f"client_{cid}.tar", "w") as tar:
        for name in names:
            tar.add(folder / name, f"datasets/{dataset}/{name}", filter=anonymous)


def write_table(path, columns, rows):
    """Write a CSV with the same bytes on every system."""
    lines = [",".join(row) for row in (columns, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def write_dataset(folder, args):
    """Write the whole dataset into the empty `folder`. Returns the number of train images of each client."""
    source, checksum, (classes, channels, splits) = open_source(args)
    labels, digests, sizes, digest = {}, {}, set(), hashlib.md5()
    for split, count, images in splits:
        if split == "train" and args.num_clients > count // 2:
            raise UserError(f"--num_clients {args.num_clients} is too many: {count} images, and each client needs two")
        (folder / split).mkdir()
        prefix = f"{folder / split}{os.sep}"
        labels[split], digests[split] = np.empty(count, np.int64), []
        bar = tqdm(images, f"{args.dataset} {split}", count, leave=False, unit="image", disable=not sys.stderr.isatty())
        for index, (image, label) in enumerate(bar):
            np.save(f"{prefix}{index}.npy", image)
            labels[split][index] = label
            digests[split].append(image_digest(image))
            sizes.add(image.shape[:2])
            if checksum is None:
                digest.update(np.ascontiguousarray(image))

    rng = np.random.RandomState(args.seed)  # unlike default_rng, the same stream in every numpy
    if args.partition == "iid":
        shards = split_iid(labels["train"], args.num_clients, rng)
    else:
        shards = split_dirichlet(labels["train"], args.num_clients, rng, args.alpha)
    (folder / "clients").mkdir()
    shard_digests = []
    for cid, ids in enumerate(shards):
        num_eval = min(max(1, round(len(ids) * args.eval_fraction)), len(ids) - 1)
        phases = ["fit"] * (len(ids) - num_eval) + ["eval"] * num_eval
        rows = [(str(row), str(labels["train"][row]), phase) for row, phase in zip(ids, phases)]
        write_table(folder / "clients" / f"client_{cid}.csv", ("id", "label", "phase"), rows)
        shard_digests.append(table_digest(rows, (digests["train"][row] for row in ids)))
    rows = [(str(row), str(label)) for row, label in enumerate(labels["test"])]
    write_table(folder / "test.csv", ("id", "label"), rows)
    info = {
        "dataset": args.dataset,
        "classes": list(classes),
        "channels": channels,
        "image_size": list(sizes.pop()) if len(sizes) == 1 else None,  # height, width; None where they differ
        "fit": "squash",
        "levels": None,
        "num_train": len(labels["train"]),
        "num_test": len(labels["test"]),
        "num_clients": args.num_clients,
        "partition": args.partition,
        "alpha": args.alpha if args.partition == "dirichlet" else None,
        "eval_fraction": args.eval_fraction,
        "seed": args.seed,
        "source": source,
        "checksum": checksum or f"md5 of all pixels: {digest.hexdigest()}",
        "shards": shard_digests,
        "test": table_digest(rows, digests["test"]),
    }
    info["id"] = cut_id(info)
    (folder / "dataset.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    if args.bundles:
        (folder / "bundles").mkdir()
        for cid, ids in enumerate(tqdm(shards, "bundles", leave=False, disable=not sys.stderr.isatty())):
            write_bundle(folder, args.dataset, cid, ids)
    return [len(ids) for ids in shards]


def main():
    args = parse_args()
    target = (DATASETS / args.dataset).resolve()
    new, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    if target.exists() and not (target / "dataset.json").exists():
        raise UserError(f"{target} exists and is not of this script's making: move it away")
    try:
        DATASETS.mkdir(exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        sizes = write_dataset(new, args)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    say(f"{target}: {args.num_clients} clients with {min(sizes)} to {max(sizes)} images each, {args.partition}")


if __name__ == "__main__":
    run_script(main)
