"""IDX files, the format of MNIST, EMNIST, QMNIST and FashionMNIST."""

import gzip
import math
import re

from plumbing.common.process import UserError
from plumbing.sources.archives import HIDDEN, UNREADABLE, Archive, some
from plumbing.sources.source import Options, Source

import numpy as np

CLASSES = {  # names for the labels, which are numbers
    "FashionMNIST": "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")
}
NAME = re.compile(
    r"(train|t10k|test).*(images[-._]idx3[-._]ubyte|labels[-._]idx(1[-._]ubyte|2[-._]int))(\.gz)?", re.IGNORECASE
)
MAPPING = re.compile(r"(emnist-.*)-mapping\.txt")
TYPES = {"images": {"00000803": "u1"}, "labels": {"00000801": "u1", "00000c02": ">i4"}}  # first four bytes: dtype


def parse_idx(data: bytes, types: dict[str, str]) -> np.ndarray:
    """Return the array in the bytes of an IDX file, gzipped or not. `types` are as in TYPES. Raises ValueError.

    The format, http://yann.lecun.com/exdb/mnist: two zero bytes, the type (8: uint8, 12: int32), the number of axes,
    the length of each as a big-endian uint32, the values.
    """
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    begin = data[:4].hex()
    start = 4 + 4 * data[3] if begin in types else 0
    if not start or len(data) < start:
        raise ValueError(f"it begins with {begin}, not with {' or '.join(types)}, the type and number of axes")
    shape = np.frombuffer(data, ">u4", data[3], offset=4).tolist()
    count, rest = divmod(len(data) - start, np.dtype(types[begin]).itemsize)
    if count != math.prod(shape) or rest or 0 in shape:
        raise ValueError(f"it has {count} values, not {' times '.join(map(str, shape))}")
    return np.frombuffer(data, types[begin], offset=start).reshape(shape)


def read_idx(archive: Archive, options: Options) -> Source | None:
    """Read four IDX files, gzipped or not, named as MNIST's are."""
    found, mappings = find_files(archive)
    if not found:
        return None
    for split, kind in ((split, kind) for split in ("train", "test") for kind in ("images", "labels")):
        if (split, kind) not in found:
            names = some(sorted(name for name, _ in found.values()))
            raise UserError(f"{archive} lacks the IDX file with the {kind} for {split}; it has {names}")
    arrays = {key: array for key, (_, array) in found.items()}
    for split in ("train", "test"):
        num_images, num_labels = len(arrays[split, "images"]), len(arrays[split, "labels"])
        if num_images != num_labels:
            raise UserError(f"{archive}: {found[split, 'images'][0]} has {num_images} images, but {num_labels} labels")
    called = dict(enumerate(CLASSES.get(options.dataset, [])))
    which = found["train", "labels"][0].rpartition("/")[2].lower().partition("-train-")[0]
    if which in mappings:
        called = parse_mapping(archive, mappings[which])
    values = np.unique(arrays["train", "labels"]).tolist()
    if not set(values) <= called.keys():
        called = {value: str(value) for value in values}
    values, classes = zip(*sorted(called.items()))
    unknown = np.setdiff1d(arrays["test", "labels"], values)
    if len(unknown):
        raise UserError(f"{archive} has the label {unknown[0]} in its test set, which is none of {some(classes)}")
    splits = []
    for split in ("train", "test"):
        labels = np.searchsorted(values, arrays[split, "labels"]).tolist()
        splits.append((split, len(labels), zip(arrays[split, "images"], labels)))
    return Source(list(classes), splits)


def find_files(archive):
    """Read all IDX files and EMNIST's mappings: {(split, "images" or "labels"): (name, array)}, {set: bytes}."""
    found, mappings = {}, {}
    for name, opened in archive.files.items():
        if any(HIDDEN.fullmatch(part) for part in name.split("/") if part != "."):
            continue
        file_name = name.rpartition("/")[2].lower()
        mapping, match = MAPPING.fullmatch(file_name), NAME.search(file_name)
        if not (mapping or match):
            continue
        try:
            with opened() as file:
                content = file.read()
            if mapping:
                mappings[mapping[1]] = content
                continue
            key = split, kind = "train" if match[1] == "train" else "test", match[2][:6]
            array = parse_idx(content, TYPES[kind])
        except UNREADABLE as error:
            raise UserError(f"{archive}: {name} cannot be read: {error}") from None
        if array.ndim == 2:  # QMNIST's rows about an image begin with its label
            array = array[:, 0]
        if array.ndim == 3 and "emnist" in file_name:  # EMNIST's images are transposed
            array = array.transpose(0, 2, 1)
        if key in found and not np.array_equal(found[key][1], array):  # a file and its .gz may be side by side
            raise UserError(f"{archive} has the {kind} for {split} twice, in {found[key][0]} and {name}: keep one")
        found[key] = name, array
    return found, mappings


def parse_mapping(archive, mapping):
    """Return EMNIST's {label: letter} from lines of a label and the codes of its letters, upper case first."""
    try:
        rows = [line.split() for line in mapping.splitlines() if line.strip()]
        return {int(row[0]): chr(int(row[1])) for row in rows}
    except (ValueError, IndexError, OverflowError) as error:
        raise UserError(f"{archive}: the mapping file of its classes cannot be read: {error}") from None
