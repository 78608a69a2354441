"""Cut a dataset into one shard a client: writes datasets/<dataset>/ as server.py and client.py read it.

    python partition.py --dataset CIFAR10 --num_clients 10
    python partition.py --dataset Flowers --source flowers.zip --num_clients 4 --partition dirichlet --bundles

Without --source, CIFAR10 comes from datasets/cifar-10-python.tar.gz, which is downloaded if it is not there, and
Shapes10 is drawn here. --source takes a folder, zip or tar: in the layout of CIFAR-10's, or with the images as
train/<class>/* and test/<class>/*, or only as <class>/*. Images are brought to one size; a set of grey images alone is
written with one channel. What an earlier run wrote for the dataset is replaced.
"""

import argparse
import hashlib
import http.client
import io
import json
import os
import pickle
import queue
import re
import shlex
import shutil
import sys
import tarfile
import tempfile
import threading
import unicodedata
import urllib.request
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

from libs import (
    DATASETS,
    UserError,
    cut_id,
    decode_image,
    image_digest,
    new_parser,
    np,
    number,
    prepare_image,
    run_script,
    say,
    table_digest,
    tqdm,
)

import cv2

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
START_TIMEOUT = 10  # seconds until a download must have started
STALL_TIMEOUT = 30  # seconds that a started download may be silent


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
    parser.add_argument("--source", type=Path, help="folder, zip or tar to read (default: see above)")
    size_help = "size to bring images to, N or HEIGHTxWIDTH; LeNet5 takes 32"
    parser.add_argument("--image_size", type=image_size, default="32", help=size_help)
    fit_help = "how: squash scales both sides, whatever they are; crop first takes the middle in the right proportion"
    parser.add_argument("--fit", choices=["squash", "crop"], default="squash", help=fit_help)
    parser.add_argument("--partition", choices=["iid", "dirichlet"], default="iid", help="equal shards, or label skew")
    positive, fraction = number(float, 0, inside=True), number(float, 0, 1, inside=True)
    parser.add_argument("--alpha", type=positive, default=0.5, help="dirichlet: the smaller, the more skewed")
    test_help = "share of each class for the test set, where the source has none"
    parser.add_argument("--test_fraction", type=fraction, default=0.2, help=test_help)
    parser.add_argument("--eval_fraction", type=fraction, default=0.2, help="share of each shard to evaluate on")
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, help="seed of every random choice")
    parser.add_argument("--bundles", action="store_true", help="also write one tar a client, with all it needs")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------------------------
# Sources. Each reader returns (classes, channels, splits): splits yields ("train" or "test", number of images, images)
# in turn, and images yields (image as prepare_image takes it, int label). Channels are None where the images decide.


def is_file(member):
    """Whether a member of a tar is a file, or a link to one."""
    return member.isfile() or member.islnk() or member.issym()


def is_zip(path):
    """Whether `path` is a zip, and not a tar that ends with one."""
    return zipfile.is_zipfile(path) and not tarfile.is_tarfile(path)


def list_members(source):
    """The files of a folder, zip or tar: yields (name with forward slashes, function that opens it), of a tar in turn.

    A tar's files have to be read one by one, as they are yielded. Raises UserError for a zip that is encrypted.
    """
    if source.is_dir():

        def fail(error):
            raise error

        for folder, folders, names in os.walk(source, onerror=fail, followlinks=True):
            here = os.path.realpath(folder) + os.sep  # a link to a folder above would lead around for ever
            folders[:] = [
                name for name in folders if not here.startswith(os.path.realpath(f"{folder}/{name}") + os.sep)
            ]
            for path in (Path(folder, name) for name in names):
                if path.is_file() or path.is_symlink():  # no pipe or device; a broken link is a file that is missing
                    yield path.relative_to(source).as_posix(), partial(open, path, "rb")
    elif is_zip(source):
        archive = zipfile.ZipFile(source)
        if any(member.flag_bits & 1 for member in archive.infolist()):
            raise UserError(f"{source} is encrypted: unpack it, and name the folder with --source")
        for member in archive.infolist():
            name = member.filename
            if not member.flag_bits & 0x800:  # not marked as UTF-8, which it may be all the same
                with suppress(UnicodeError):
                    name = name.encode("cp437").decode()
            if not name.endswith(("/", "\\")):
                yield name.replace("\\", "/"), partial(archive.open, member)
    else:
        with tarfile.open(source, "r|*") as tar:
            for member in tar:
                if is_file(member):
                    yield member.name, partial(tar.extractfile, member)


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


def read_archive(source):
    """Read CIFAR-10's layout, in a tar, zip or folder; None where none of it is there. Nothing is unpacked to disk."""
    wanted = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch", "batches.meta"]
    batches = {}
    try:
        for name, opened in list_members(source):
            name = name.rpartition("/")[2]
            if name in wanted:
                with opened() as file:
                    batches[name] = PlainUnpickler(file, encoding="bytes").load()
        if not batches:
            return None
        classes = [name.decode() for name in batches["batches.meta"][b"label_names"]]
        for name in wanted[:-1]:
            data, labels = batches[name][b"data"], np.array(batches[name][b"labels"])
            if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not len(labels):
                raise ValueError(f"{name} is not rows of 3,072 bytes with a label each")
            if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= len(classes):
                raise ValueError(f"{name} has a label outside 0..{len(classes) - 1}")
            batches[name] = data, labels
    except KeyError as error:
        raise UserError(f"{source} is not whole: of CIFAR-10's layout it lacks {error.args[0]!r}") from None
    except UserError:
        raise
    except Exception as error:  # whatever tarfile, zlib and pickle make of bytes that are damaged or something else
        raise UserError(f"{source} is damaged, or not what --source takes: {error}") from None

    def images(names):
        for name in names:
            data, labels = batches.pop(name)
            yield from zip(np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.tolist())

    train = sum(len(batches[name][1]) for name in wanted[:5])
    splits = [("train", train, images(wanted[:5])), ("test", len(batches["test_batch"][1]), images(wanted[5:6]))]
    return classes, 3, splits


FORMATS = """avif bmp dib exr gif hdr heic heif ico j2k jfif jp2 jpe jpeg jpg jxl pam pbm pcx pfm pgm pic png pnm ppm
    psd pxm ras sr svg tga tif tiff webp""".split()  # suffixes of images, also of those that OpenCV does not read
MAGIC = rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0{4}|RIFF.{4}WEBP|II\*\0|MM\0\*|.{4}ftypavi|\0\0\0\x0cjP|\xff\x4f\xff\x51"
DEEP = rb"\x89PNG.{20}\x10|II\*\0|MM\0\*|P[2356]\s|\0\0\0\x0cjP|\xff\x4f\xff\x51"  # how a file of 16 bits may begin
UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, ValueError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
HIDDEN = re.compile(r"\..*|__MACOSX|@eaDir|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # what systems leave in folders
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")


def some(names, count=10):
    """The first names of a list, as text that any terminal shows."""
    shown = [name.encode("utf-8", "backslashreplace").decode() for name in names[:count]]
    return ", ".join(shown) + (", …" if len(names) > count else "")


def sort_files(source, files):
    """Find out which of `files`, all the names in `source`, are images of a class: ({name: (split, class)}, others).

    The split is "train", "test", or None where the source has only <class>/*; `others` are names to be passed over.
    Raises UserError, which says what is there, where that is neither of the layouts.
    """
    images, others = {}, set()  # name: its folders and file, without those that all share
    for name in sorted(files):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        hidden = [number for number, part in enumerate(parts) if HIDDEN.fullmatch(part)]
        if hidden:
            others.add("/".join(parts[: hidden[0] + 1]) + "/" * (hidden[0] + 1 < len(parts)))
        elif name.rpartition(".")[2].lower() in FORMATS or looks_like_image(files[name]):
            images[name] = parts
        else:
            others.add(name)

    def tops():
        return sorted({parts[0] for parts in images.values() if len(parts) > 1})

    while len(tops()) == 1 and tops()[0].lower() not in SPLITS and max(map(len, images.values())) > 2:
        others |= {name for name, parts in images.items() if len(parts) == 1}
        images = {name: parts[1:] for name, parts in images.items() if len(parts) > 1}
    roles = {top: SPLITS[top.lower()] for top in tops() if top.lower() in SPLITS}
    if "test" not in roles.values():  # a set for validation serves as well
        roles = {top: "test" if role == "val" else role for top, role in roles.items()}
    sorted_in = {}
    for name, parts in images.items():
        if len(parts) > 2 and roles.get(parts[0]) in ("train", "test"):
            sorted_in[name] = roles[parts[0]], parts[1]
        elif len(parts) > 1 and not roles:
            sorted_in[name] = None, parts[0]
        else:
            others.add(name)
    found = {split for split, _ in sorted_in.values()}
    deeper = any(part.lower() in SPLITS for parts in images.values() for part in parts[1:-1])
    if found != {"train", "test"} and (found != {None} or len(tops()) < 2 or deeper):
        missing = [f"{split}/<class>/*" for split in ("train", "test") if roles and split not in found]
        expected = " or ".join(missing) or "train/<class>/* and test/<class>/*, or as <class>/* of two classes or more"
        counts = [f"{sum(parts[0] == top for parts in images.values())} in {top}/" for top in tops()]
        loose = sum(len(parts) == 1 for parts in images.values())
        content = some(counts + [f"{loose} in no folder"] * (loose > 0)) or "none at all"
        raise UserError(f"{source} has no images as {expected}; images there: {content}")
    return sorted_in, sorted(others)


def looks_like_image(opened):
    with suppress(*UNREADABLE), opened() as file:
        return re.match(MAGIC, file.read(16), re.DOTALL) is not None
    return False


def merge_spellings(pairs):
    """Give each class one name: {folder's name: class}, from pairs (split, folder's name).

    Spellings that differ in case, outer spaces or Unicode's form are one class, called as the training set has it.
    """
    called, names = {}, {}
    for _, name, folder in sorted((s == "test", unicodedata.normalize("NFC", f).strip(), f) for s, f in pairs):
        names[folder] = called.setdefault(name.casefold(), name)
    different = [f"{folder!r} is {name!r}" for folder, name in sorted(names.items()) if folder != name]
    if different:
        say(f"spellings of one class: {some(different)}")
    return names


def split_off(labels, fraction, seed):
    """Choose `fraction` of each class for the test set, at least one and not all: a bool for each of the labels."""
    rng, chosen = np.random.RandomState(seed), np.zeros(len(labels), bool)
    for label in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(len(members) * fraction)), len(members) - 1)]] = True
    return chosen


def find_levels(files, names):
    """The least and greatest value of all images of 16 bits, where they leave half of the range or more unused."""
    low, high, count = 2**16, -1, 0
    for name in names:
        with suppress(*UNREADABLE), files[name]() as file:
            head = file.read(32)
            if re.match(DEEP, head, re.DOTALL):
                image = decode_image(head + file.read())
                if image.dtype == np.uint16:
                    seen = image[image[:, :, 3] > 0, :3] if image.ndim == 3 and image.shape[2] == 4 else image
                    low, high = min(low, int(seen.min(initial=2**16 - 1))), max(high, int(seen.max(initial=0)))
                    count += 1
    if high < low or high - low >= 2**15:
        return None
    say(f"images of 16 bits with values from {low} to {high} alone, which become 0 to 255: {count}")
    return [low, high]


def read_images(source, args):
    """Read images as train/<class>/* and test/<class>/*, at any depth, or as <class>/* alone; classes in sorted order.

    Returns (levels for prepare_image, what every reader returns). Names all damaged files of the source at once.
    """
    if source.is_dir() or is_zip(source):
        files = dict(list_members(source))
    else:
        tar = tarfile.open(source)
        if not isinstance(tar.fileobj, io.BufferedReader):  # packed, so that only what comes next can be read
            unpacked = tempfile.TemporaryFile(dir=DATASETS)
            tar.fileobj.seek(0)
            shutil.copyfileobj(tar.fileobj, unpacked)
            unpacked.seek(0)
            tar = tarfile.open(fileobj=unpacked)
        files = {member.name: partial(tar.extractfile, member) for member in tar if is_file(member)}
    sorted_in, others = sort_files(source, files)
    if others:
        say(f"passed over, for it is no image of a class: {some(others, 5)} ({len(others)} in all)")
    spellings = merge_spellings(set(sorted_in.values()))
    sorted_in = {name: (split, spellings[spelling]) for name, (split, spelling) in sorted_in.items()}
    classes = sorted({name for split, name in sorted_in.values() if split != "test"})
    unknown = {name for _, name in sorted_in.values()} - set(classes)
    if unknown:
        raise UserError(f"{source} has the class {min(unknown)} in test/ and not in train/")
    labels = {name: classes.index(called) for name, (_, called) in sorted_in.items()}
    in_test = np.array([split == "test" for split, _ in sorted_in.values()])
    if {split for split, _ in sorted_in.values()} == {None}:
        in_test = split_off(np.array(list(labels.values())), args.test_fraction, args.seed)
        if not in_test.any():
            raise UserError(f"{source} has one image of each class, and none for a test set")
        say(f"no test set in {source}: split off for it were {in_test.sum()} of {len(in_test)} images")
    names = {"train": [], "test": []}
    for name, test in zip(labels, in_test):
        names["test" if test else "train"].append(name)
    damaged, transparent = [], 0

    def images(split):
        nonlocal transparent
        for name in names[split]:
            try:
                with files[name]() as file:
                    image = decode_image(file.read())
            except UNREADABLE as error:
                damaged.append(f"{name} ({getattr(error, 'strerror', None) or error})")
                continue
            alpha = image.ndim == 3 and image.shape[2] == 4
            transparent += bool(alpha and image[:, :, 3].min() < np.iinfo(image.dtype).max)
            yield image, labels[name]
        if split == "test" and damaged:
            raise UserError(f"{source}: {len(damaged)} of its images cannot be read: {some(damaged)}")
        if split == "test" and transparent:
            say(f"images that are transparent in places, put on white: {transparent}")

    return find_levels(files, labels), (classes, None, [(split, len(names[split]), images(split)) for split in names])


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
    """Choose the reader: (name of the source, its checksum or None, levels for prepare_image, what it returned)."""
    source = args.source
    if source is None and args.dataset == "Shapes10":
        return "built in", None, None, draw_shapes()
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
        checksum = None if source.is_dir() else f"md5: {file_md5(source)}"
        content = read_archive(source)
        levels, content = (None, content) if content else read_images(source, args)
        return str(source), checksum, levels, content
    except (OSError, zipfile.BadZipFile, tarfile.TarError, NotImplementedError) as error:
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
    source, checksum, levels, (classes, channels, splits) = open_source(args)
    labels, digests, grey, digest = {}, {}, [], hashlib.md5()
    for split, count, images in splits:
        if split == "train" and args.num_clients > count // 2:
            raise UserError(f"--num_clients {args.num_clients} is too many: {count} images, and each client needs two")
        (folder / split).mkdir()
        prefix = f"{folder / split}{os.sep}"
        labels[split], digests[split] = np.empty(count, np.int64), []
        bar = tqdm(images, f"{args.dataset} {split}", count, leave=False, unit="image", disable=not sys.stderr.isatty())
        for index, (image, label) in enumerate(bar):
            image = prepare_image(image, args.image_size, args.fit, levels, channels)
            np.save(f"{prefix}{index}.npy", image)
            labels[split][index] = label
            digests[split].append(image_digest(image))
            if image.ndim == 2:
                grey.append((split, index))
            if checksum is None:
                digest.update(np.ascontiguousarray(image))
    if channels is None:
        channels = 1 if len(grey) == len(digests["train"]) + len(digests["test"]) else 3
    for split, index in grey if channels == 3 else []:  # grey images of a coloured set
        path = folder / split / f"{index}.npy"
        image = np.dstack([np.load(path)] * 3)
        np.save(path, image)
        digests[split][index] = image_digest(image)
    warn_of_duplicates(digests, labels)

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
        "image_size": list(args.image_size),  # height, width
        "fit": args.fit,
        "levels": levels,  # the 16-bit values that became 0 and 255
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
    (folder / "dataset.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8", newline="\n")
    if args.bundles:
        (folder / "bundles").mkdir()
        for cid, ids in enumerate(tqdm(shards, "bundles", leave=False, disable=not sys.stderr.isatty())):
            write_bundle(folder, args.dataset, cid, ids)
    return [len(ids) for ids in shards]


def main():
    args = parse_args()
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
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    sizes = f"{min(sizes)} to {max(sizes)} images each"
    say(f"{shlex.quote(str(target))}: {args.num_clients} clients with {sizes}, {args.partition}")


if __name__ == "__main__":
    run_script(main)
