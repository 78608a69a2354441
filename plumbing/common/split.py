"""What partition.py wrote, and how it is checked."""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
from pathlib import Path

from plumbing.common.arguments import list_datasets
from plumbing.common.process import UserError

import numpy as np


def describe_dataset(dataset: str, folder: Path) -> dict:
    """Return what `folder`/dataset.json says of a dataset. Raises UserError if it is not what partition.py writes.

    "channels" (int), "classes" ([str, …]); each None if not known: "id" of the split, "num_clients", "image_size"
    ([height, width] of the files), "shards" (a digest per cid), "test" (a digest), "mean" and "std" (of all training
    images, a float in 0..1 per channel), "split" (per cid how many images of each class), "sizes" ({cid: (fit images,
    eval images)}), "partition" (describe_partition); "images", by which nets.predict prepares an image as these
    were prepared; and "written", all that the file has, {} without it.
    Without the file, a name that contains MNIST means one channel, any other three, and the classes are the ten digits.
    """
    path = folder / "dataset.json"
    info = dict.fromkeys(("id", "num_clients", "image_size", "shards", "test", "mean", "std", "split"))
    info.update({"channels": 1 if "MNIST" in dataset else 3, "classes": [str(digit) for digit in range(10)]})
    written, sizes = {}, None
    if path.exists():
        try:
            written = dict(json.loads(path.read_text(encoding="utf-8")))
            info.update({name: written[name] for name in info if name in written})
            assert info["channels"] in (1, 3) and info["classes"] == [str(name) for name in info["classes"]]
            assert info["id"] is None or (isinstance(info["shards"], list) and isinstance(info["test"], str))
            for values in (info["mean"], info["std"]):
                assert values is None or len(values) in (1, 3) and all(0 <= value <= 1 for value in values)
            if info["id"] and info["split"] and written.get("eval_fraction") is not None:
                evals = [(sum(counts), count_eval(sum(counts), written["eval_fraction"])) for counts in info["split"]]
                sizes = {cid: (total - num_eval, num_eval) for cid, (total, num_eval) in enumerate(evals)}
        except (ValueError, TypeError, AssertionError):
            raise UserError(f"{path} is damaged: run partition.py again") from None
    images = {"image_size": info["image_size"], "fit": written.get("fit") or "squash", "levels": written.get("levels")}
    info.update({"sizes": sizes, "images": images, "partition": describe_partition(written), "written": written})
    return info


def describe_partition(facts: dict) -> str | None:
    """Return how the images of dataset.json (`facts`) are split among clients, such as "dirichlet, alpha 0.5"."""
    return facts.get("partition") if facts.get("alpha") is None else f"{facts.get('partition')}, alpha {facts['alpha']}"


def find_shard(folder: Path, cid: int) -> Path:
    """Return the path of a shard's table. Raises UserError, with what to do, if it is not there."""
    path = folder / "clients" / f"client_{cid}.csv"
    names = [other.stem[len("client_") :] for other in path.parent.glob("client_*.csv")]
    cids = sorted(int(name) for name in names if name.isdecimal())
    if cids and not path.exists():
        raise UserError(f"there is no {path}; --cid can be {', '.join(map(str, cids))}")
    root = shlex.quote(str(folder.parent.parent))
    check_there(path, folder, f"unpack the device's bundle: tar xf client_{cid}.tar -C {root}")
    return path


def check_there(path: Path, folder: Path, remedy: str) -> None:
    """Raise UserError, with the `remedy`, unless the dataset's `folder` and the table `path` in it are there."""
    if not folder.is_dir():
        raise UserError(f"no dataset in {folder}{list_datasets(folder.parent)}: {remedy}")
    if not path.exists():
        raise UserError(f"there is no {path}: {remedy}")


def read_table(path: Path, num_classes: int, phases: tuple[str, ...] = ()) -> np.ndarray:
    """Read a CSV that partition.py wrote, with the columns id and label, and phase if `phases` are given.

    Returns a structured array with the fields id (str), label (int in 0..num_classes-1) and phase (str). Raises
    UserError, naming the file and the line, for anything else, and if a phase has no rows. (Without pandas, for which a
    small device has no memory to spare.)
    """
    columns = ["id", "label"] + (["phase"] if phases else [])
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(f"{path} is not as partition.py wrote it: {error}") from None
    if lines[:1] != [columns]:
        raise UserError(f"{path} is not as partition.py wrote it: its first line is not {','.join(columns)}")
    labels, rows, seen = {str(label): label for label in range(num_classes)}, [], set()
    for number, row in enumerate(lines[1:], start=2):
        if len(row) != len(columns):
            problem = f"{len(row)} cells, not {len(columns)}"
        elif row[0] in seen:
            problem = f"id {row[0]} stands twice"
        elif row[1] not in labels:
            problem = f"label {row[1]} is not in 0..{num_classes - 1}"
        elif phases and row[2] not in phases:
            problem = f"phase {row[2]} is not one of {', '.join(phases)}"
        else:
            seen.add(row[0])
            rows.append((row[0], labels[row[1]], *row[2:]))
            continue
        raise UserError(f"{path}, line {number}: {problem}")
    table = np.array(rows, [(column, object) for column in columns])
    for phase in phases:
        if not (table["phase"] == phase).any():
            raise UserError(f"{path} has no row of phase {phase}")
    if not rows:
        raise UserError(f"{path} has no rows")
    return table


def image_digest(image: np.ndarray) -> bytes:
    """Return 16 bytes that two uint8 arrays share if their shapes and pixels are the same."""
    pixels = image.tobytes()  # row by row, whatever the order in memory
    return hashlib.blake2b(str(image.shape).encode() + pixels, digest_size=16).digest()


def table_digest(rows, image_digests) -> str:
    """Return 32 hex digits over the rows of a CSV, each a sequence of cells, and the images that they name."""
    digest = hashlib.blake2b(digest_size=16)
    for row, image in zip(rows, image_digests):
        digest.update(",".join(map(str, row)).encode() + b"\n" + image)
    return digest.hexdigest()


def count_eval(num_images: int, eval_fraction: float) -> int:
    """Return how many images of a shard of `num_images` (2 or more) are for evaluation; the others are to train on."""
    return min(max(1, round(num_images * eval_fraction)), num_images - 1)


def split_id(info: dict) -> str:
    """Return the id of a split, 32 hex digits over what dataset.json says of it: two that share it are the same."""
    what = [info[name] for name in ("classes", "channels", "image_size", "shards", "test")]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()


def check_split(info: dict, path: Path, digest: str, expected: str | None, remedy: str) -> None:
    """Raise UserError, with the `remedy`, unless the table `path` and its images are of the split in dataset.json.

    `info` is what describe_dataset returned, `digest` the table_digest of what was read, `expected` the one that
    dataset.json has for it. A dataset without an id, of an older partition.py, is not checked.
    """
    if info["id"] is None:
        return
    if split_id(info) != info["id"]:
        raise UserError(f"dataset.json, which describes {path}, is not as partition.py wrote it: {remedy}")
    if digest != expected:
        raise UserError(f"{path}: its ids, labels or images are of another split than dataset.json: {remedy}")
