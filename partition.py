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
import csv
import gzip
import hashlib
import http.client
import io
import json
import lzma
import math
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
    decode_image,
    given_flags,
    list_datasets,
    new_parser,
    nonempty_path,
    np,
    number,
    prepare_image,
    printable,
    run_script,
    say,
    tqdm,
)
from plumbing.common.files import atomic_write, sync_folder
from plumbing.common.split import count_eval, image_digest, split_id, table_digest
from plumbing.laptop.pictures import draw_split, try_to_draw

import cv2

OFFICIAL = {  # dataset: (where its files are, {file: MD5})
    "CIFAR10": ("https://www.cs.toronto.edu/~kriz", {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}),
    "CIFAR100": ("https://www.cs.toronto.edu/~kriz", {"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"}),
    "MNIST": (
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        {
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "FashionMNIST": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        {
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}
CLASSES = {  # of IDX files, which hold numbers alone
    "FashionMNIST": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
}
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


# ---------------------------------------------------------------------------------------------------------------------
# Sources. A reader takes (source, args), and returns (classes, channels, splits, levels for prepare_image), or None if
# nothing has its layout. splits yields ("train" or "test", number of images, images) in turn, and images yields (image
# as prepare_image takes it, int label), no more than that number; channels are None where the images decide. All of the
# readers are in READERS.


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


CIFAR_LAYOUTS = {  # name: (training files, test file, file with the names, their key, the labels' key)
    "CIFAR-10": ([f"data_batch_{k}" for k in range(1, 6)], "test_batch", "batches.meta", b"label_names", b"labels"),
    "CIFAR-100": (["train"], "test", "meta", b"fine_label_names", b"fine_labels"),
}


def read_cifar(source, args):
    """Read CIFAR-10's or CIFAR-100's layout (fine labels); None where none of it is there. Unpacks nothing to disk."""
    batches = {}
    layout_of = {name: key for key, (train, *others) in CIFAR_LAYOUTS.items() for name in (*train, *others[:2])}
    for name, opened in list_members(source):
        name = name.rpartition("/")[2]
        if name in layout_of:
            with opened() as file:
                if layout_of[name] == "CIFAR-100" and file.peek(1)[:1] != b"\x80":
                    continue  # something else with that plain name, and no pickle
                try:
                    batches[name] = PlainUnpickler(file, encoding="bytes").load()
                except Exception as error:  # whatever pickle makes of bytes that are damaged or something else
                    raise UserError(f"{source}: {name} is damaged, or not {layout_of[name]}'s: {error}") from None
    layout = next((key for key in CIFAR_LAYOUTS if any(layout_of[name] == key for name in batches)), None)
    if layout is None:
        return None
    train, test, meta, classes_key, labels_key = CIFAR_LAYOUTS[layout]
    try:
        classes = [name.decode() for name in batches[meta][classes_key]]
        for name in (*train, test):
            data, labels = batches[name][b"data"], np.array(batches[name][labels_key])
            if data.dtype != np.uint8 or data.shape != (len(labels), 3072) or not len(labels):
                raise ValueError(f"{name} is not rows of 3,072 bytes with a label each")
            if labels.dtype.kind != "i" or labels.min() < 0 or labels.max() >= len(classes):
                raise ValueError(f"{name} has a label outside 0..{len(classes) - 1}")
            batches[name] = data, labels
    except KeyError as error:
        raise UserError(f"{source} is not whole: of {layout}'s layout it lacks {error.args[0]!r}") from None
    except (ValueError, TypeError, AttributeError) as error:  # pickles of something else
        raise UserError(f"{source} is damaged, or not in {layout}'s layout: {error}") from None

    def images(names):
        for name in names:
            data, labels = batches.pop(name)
            yield from zip(np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels.tolist())

    num_train = sum(len(batches[name][1]) for name in train)
    splits = [("train", num_train, images(train)), ("test", len(batches[test][1]), images([test]))]
    return classes, 3, splits, None


IDX_NAME = re.compile(
    r"(train|t10k|test).*(images[-._]idx3[-._]ubyte|labels[-._]idx(1[-._]ubyte|2[-._]int))(\.gz)?", re.IGNORECASE
)
IDX_TYPES = {"images": {"00000803": "u1"}, "labels": {"00000801": "u1", "00000c02": ">i4"}}  # how each file may begin


def parse_idx(data, types):
    """The array that the bytes of an IDX file hold. `types` are its possible beginnings, as in IDX_TYPES.

    The format, http://yann.lecun.com/exdb/mnist: two zero bytes, the type (8: uint8, 12: int32), the number of axes,
    the length of each as a big-endian uint32, the values. Raises ValueError.
    """
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    begin = data[:4].hex()
    start = 4 + 4 * data[3] if begin in types else 0
    if not start or len(data) < start:
        raise ValueError(f"it begins with {begin} and not with {' or '.join(types)}, the type and number of axes")
    shape = np.frombuffer(data, ">u4", data[3], offset=4).tolist()
    count, rest = divmod(len(data) - start, np.dtype(types[begin]).itemsize)
    if count != math.prod(shape) or rest or 0 in shape:
        raise ValueError(f"it has {count} values, and not {' times '.join(map(str, shape))}")
    return np.frombuffer(data, types[begin], offset=start).reshape(shape)


def read_idx(source, args):
    """Read four IDX files, gzipped or not, named as MNIST's are; None where none is there.

    EMNIST's, which hold each image transposed, are known by their names; its mapping file names the classes. QMNIST's
    labels are the first number of each row. Else classes are called by their labels, but for the datasets in CLASSES,
    whose labels are the places in that list.
    """
    found, mappings = {}, {}  # (split, "images" or "labels"): (name, array); EMNIST's set: bytes
    for name, opened in list_members(source):
        file_name = name.rpartition("/")[2].lower()
        match = IDX_NAME.search(file_name)
        if any(HIDDEN.fullmatch(part) for part in name.split("/") if part != "."):
            continue
        if re.fullmatch(r"emnist-.*-mapping\.txt", file_name):
            with opened() as file:
                mappings[file_name[: -len("-mapping.txt")]] = file.read()
        if not match:
            continue
        key = "train" if match[1] == "train" else "test", match[2][:6]
        try:
            with opened() as file:
                array = parse_idx(file.read(), IDX_TYPES[key[1]])
        except UNREADABLE as error:
            raise UserError(f"{source}: {name} cannot be read: {error}") from None
        if array.ndim == 2:
            array = array[:, 0]
        if array.ndim == 3 and "emnist" in file_name:
            array = array.transpose(0, 2, 1)
        if key in found and not np.array_equal(found[key][1], array):  # packed and unpacked, side by side, are the same
            raise UserError(
                f"{source} has {' and '.join(key)} twice: {found[key][0]} and {name}; name a folder with one set"
            )
        found[key] = name, array
    if not found:
        return None
    for key in ((split, kind) for split in ("train", "test") for kind in ("images", "labels")):
        if key not in found:
            there = some(sorted(name for name, _ in found.values()))
            raise UserError(f"{source} lacks the IDX file with the {key[1]} for {key[0]}; it has {there}")
    splits = {}
    for split in ("train", "test"):
        (name, images), (_, labels) = found[split, "images"], found[split, "labels"]
        if len(images) != len(labels):
            raise UserError(f"{source}: {name} has {len(images)} images, and {len(labels)} labels belong to it")
        splits[split] = images, labels
    called = dict(enumerate(CLASSES.get(args.dataset, [])))
    which = found["train", "labels"][0].rpartition("/")[2].lower().partition("-train-")[0]
    if which in mappings:
        try:  # lines of a label and the codes of its letters, upper case first
            rows = [line.split() for line in mappings[which].splitlines() if line.strip()]
            called = {int(row[0]): chr(int(row[1])) for row in rows}
        except (ValueError, IndexError, OverflowError) as error:
            raise UserError(f"{source}: the mapping file of its classes cannot be read: {error}") from None
    values = np.unique(splits["train"][1]).tolist()
    if not set(values) <= called.keys():
        called = {value: str(value) for value in values}
    values, classes = zip(*sorted(called.items()))
    unknown = np.setdiff1d(splits["test"][1], values)
    if len(unknown):
        raise UserError(f"{source} has the label {unknown[0]} in its test set, which is none of {some(classes)}")
    splits = [
        (split, len(labels), zip(images, np.searchsorted(values, labels).tolist()))
        for split, (images, labels) in splits.items()
    ]
    return classes, None, splits, None


FORMATS = """avif bmp dib exr gif hdr heic heif ico j2k jfif jp2 jpe jpeg jpg jxl pam pbm pcx pfm pgm pic png pnm ppm
    psd pxm ras sr svg tga tif tiff webp""".split()  # suffixes of images, also of those that OpenCV does not read
MAGIC = rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0{4}|RIFF.{4}WEBP|II\*\0|MM\0\*|.{4}ftypavi|\0\0\0\x0cjP|\xff\x4f\xff\x51"
DEEP = rb"\x89PNG.{20}\x10|II\*\0|MM\0\*|P[2356]\s|\0\0\0\x0cjP|\xff\x4f\xff\x51"  # how a file of 16 bits may begin
UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, ValueError)
UNREADABLE += (lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
HIDDEN = re.compile(r"\..*|__MACOSX|@eaDir|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # what systems leave in folders
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")


def some(names, count=10):
    """The first names of a list, as text that any terminal shows."""
    shown = [printable(name.encode("utf-8", "backslashreplace").decode()) for name in names[:count]]
    return ", ".join(shown) + (", …" if len(names) > count else "")


def sort_files(source, files):
    """Find out which of `files`, all the names in `source`, are images of a class: ({name: (split, class)}, others).

    The split is "train", "test", or None where the source has only <class>/* or train/<class>/*; `others` are names to
    be passed over.
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
    if len(roles) < len(tops()) and not any(len(parts) > 2 and parts[0] in roles for parts in images.values()):
        roles = {}  # a class of that name, among others
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
    if roles.keys() == set(tops()) and "test" not in roles.values():  # train/<class>/* alone
        sorted_in = {name: (None, folder) for name, (_, folder) in sorted_in.items()}
    found = {split for split, _ in sorted_in.values()}
    classes = {folder for _, folder in sorted_in.values()}
    deeper = any(part.lower() in SPLITS for parts in images.values() for part in parts[2 if roles else 1 : -1])
    if found != {"train", "test"} and (found != {None} or len(classes) < 2 or deeper):
        missing = [f"{split}/<class>/*" for split in ("train", "test") if roles and split not in found]
        expected = " or ".join(missing) or "train/<class>/* and test/<class>/*, or as <class>/* of two classes or more"
        counts = [f"{sum(parts[0] == top for parts in images.values())} in {top}/" for top in tops()]
        loose = sum(len(parts) == 1 for parts in images.values())
        content = some(counts + [f"{loose} in no folder"] * (loose > 0)) or "none at all"
        archives = [name for name in sorted(files) if re.search(r"\.(zip|tar|tgz|tar\.\w+)$", name, re.IGNORECASE)]
        hint = f"; it holds {some(archives)}: name such a file with --source, or unpack it" if archives else ""
        raise UserError(f"{source} has no images as {expected}; images there: {content}{hint}")
    return sorted_in, sorted(others)


def looks_like_image(opened):
    with suppress(*UNREADABLE), opened() as file:
        return re.match(MAGIC, file.read(16), re.DOTALL) is not None
    return False


def merge_spellings(pairs):
    """Give each class one name: {folder's name: class}, from pairs (split, folder's name).

    Spellings that differ in outer spaces or Unicode's form are one class, called as the training set has it. Those that
    differ in case are as well, unless each of them is in each split: then they are letters, as A and a.
    """
    tidy = {folder: unicodedata.normalize("NFC", folder).strip() for _, folder in pairs}
    splits, there = {split for split, _ in pairs}, {(split, tidy[folder]) for split, folder in pairs}
    alike, called = {}, {}
    for _, name in sorted((split == "test", name) for split, name in there):
        alike.setdefault(name.casefold(), []).append(name)
    for same in alike.values():
        apart = all((split, name) in there for split in splits for name in same)
        called.update((name, name if apart else same[0]) for name in same)
    names = {folder: called[name] for folder, name in sorted(tidy.items())}
    different = [f"{folder!r} is {name!r}" for folder, name in names.items() if folder != name]
    if different:
        say(f"spellings of one class: {some(different)}")
    classes = sorted(set(names.values()), key=lambda name: (name.casefold(), name))
    apart = [f"{one!r} and {other!r}" for one, other in zip(classes, classes[1:]) if one.casefold() == other.casefold()]
    if apart:
        say(f"classes that differ in case alone: {some(apart)}")
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

    Names all damaged files of the source at once; with --skip_damaged goes on without them.
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
        args.without_test_set = True  # which dataset.json is to say
        in_test = split_off(np.array(list(labels.values())), args.test_fraction, args.seed)
        if not in_test.any():
            raise UserError(f"{source} has one image of each class, and none for a test set")
        say(f"no test set in {source}: split off for it were {in_test.sum()} of {len(in_test)} images")
    names = {"train": [], "test": []}
    for name, test in zip(labels, in_test):
        names["test" if test else "train"].append(name)
    damaged, transparent, left = [], 0, {"train": set(), "test": set()}  # left: the labels that have an image

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
            left[split].add(labels[name])
            yield image, labels[name]
        if split == "test" and damaged:
            if not args.skip_damaged:
                count = f"{len(damaged)} of its images cannot be read (--skip_damaged skips them)"
                raise UserError(f"{source}: {count}: {some(damaged)}")
            lost = sorted({labels[name] for name in names["train"]} - left["train"])
            if lost:
                whose = some([classes[label] for label in lost])
                raise UserError(f"{source}: all training images of {whose} are damaged: {some(damaged)}")
            if not left["test"]:
                raise UserError(f"{source}: all images of the test set are damaged: {some(damaged)}")
            say(f"skipped damaged images: {some(damaged)} ({len(damaged)} in all)")
        if split == "test" and transparent:
            say(f"images that are transparent in places, put on white: {transparent}")

    splits = [(split, len(names[split]), images(split)) for split in names]
    return classes, None, splits, find_levels(files, labels)


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
    digest = hashlib.md5()
    try:
        total = int(response.headers.get("Content-Length", 0)) or None
        bar = tqdm(desc=path.name, total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
        with atomic_write(path) as part:
            with response, bar, open(part, "wb") as file:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != md5:
                raise UserError(f"{url} was not received whole (its MD5 is {digest.hexdigest()}): run this again")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"the download of {url} broke off ({error}): run this again") from None


def file_md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


# Asked in turn: one that returns None, or cannot open the source, leaves it to the next. A new one goes before the
# last, which takes any folder, zip or tar, or says what is wrong with it.
READERS = (read_cifar, read_idx, read_images)


def official_source(dataset):
    """The official files of `dataset` in datasets/, downloaded if they are not there: an archive, or a folder."""
    url, files = OFFICIAL[dataset]
    folder = DATASETS if len(files) == 1 else DATASETS / f"{dataset}-idx"
    folder.mkdir(exist_ok=True)
    for name, md5 in files.items():
        path = folder / name
        if not path.exists():
            download(f"{url}/{name}", path, md5)
        elif file_md5(path) != md5:
            raise UserError(f"{path} is not the official file (wrong MD5): delete it, or name it with --source")
    return path if len(files) == 1 else folder


def open_source(args):
    """Choose the reader: (name of the source, its checksum or None, what the reader returned)."""
    source, name, known = args.source, str(args.source or args.dataset), (*OFFICIAL, "Shapes10")
    if source is None or (name in known and not source.exists()):
        if name not in known:
            raise UserError(f"no source is built in for {name}, only for {', '.join(known)}: name one with --source")
        if name == "Shapes10":
            return "built in", None, (*draw_shapes(), None)
        source = official_source(name)
    target = (DATASETS / args.dataset).resolve()
    if source.resolve() == target or target in source.resolve().parents:
        raise UserError(f"--source {source} lies in {target}, which this run would replace: move it elsewhere")
    try:
        checksum = None if source.is_dir() else f"md5: {file_md5(source)}"
    except OSError as error:
        raise UserError(f"cannot read {source}: {error}") from None
    reason = None
    for reader in READERS:
        try:
            found = reader(source, args)
        except UNREADABLE as error:  # damaged, or no archive, and perhaps what the next one reads
            reason = reason or error
            continue
        if found:
            return str(source.absolute()), checksum, found
    raise UserError(f"cannot read {source} as a folder, zip or tar: {reason}")


# ---------------------------------------------------------------------------------------------------------------------
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


def show(folder):
    """Print how many images of each class each client of the dataset in `folder` has, as its CSVs say."""
    try:
        classes = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        others = list_datasets(folder.parent)
        raise UserError(f"{folder} has no dataset.json that this script wrote{others}: cut the dataset first") from None
    cids = [path.stem[len("client_") :] for path in (folder / "clients").glob("client_*.csv")]
    rows = []
    for cid in sorted(int(cid) for cid in cids if cid.isdecimal()):
        path = folder / "clients" / f"client_{cid}.csv"
        counts = np.zeros((2, len(classes)), int)
        try:
            with open(path, encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    counts[["fit", "eval"].index(row["phase"]), range(len(classes)).index(int(row["label"]))] += 1
        except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error):
            raise UserError(f"{path} is not as this script wrote it: cut the dataset anew") from None
        rows.append([cid, *counts.sum(axis=0), counts.sum(), *counts.sum(axis=1)])
    if not rows:
        raise UserError(f"{folder / 'clients'} has no client_<cid>.csv: cut the dataset first")
    rows = [
        ["cid", *(printable(name, 40) for name in classes), "all", "fit", "eval"],
        *rows,
        ["all", *np.sum(rows, axis=0)[1:]],
    ]
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    for row in rows:
        say("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths)))


def main():
    args = parse_args()
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
