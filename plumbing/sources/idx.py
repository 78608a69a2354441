"""IDX files, as MNIST, EMNIST, QMNIST and FashionMNIST come in."""

from __future__ import annotations

import gzip
import math
import re

from plumbing.common.process import UserError
from plumbing.sources.archives import HIDDEN, UNREADABLE, list_members, some

import numpy as np

CLASSES = {  # of IDX files, which hold numbers alone
    "FashionMNIST": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
}


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
