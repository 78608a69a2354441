"""The tables that partition.py wrote, and the digests by which a change in them is found."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path

from plumbing.common.process import UserError

import numpy as np


def read_cells(path):
    """The cells of a CSV as anyone may have saved it: [[str, …], …], a list a line. Raises UserError where it is none.

    Takes UTF-8 and UTF-16, commas, semicolons and tabs, spaces around cells, and a first line such as "sep=;".
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"PK\x03\x04") or content.startswith(b"\xd0\xcf\x11\xe0"):
            raise ValueError("it is a spreadsheet's own file; save it as CSV")
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it is no text")
        title = next((line for line in text.splitlines() if line.strip() and not line.startswith("sep=")), "")
        separator = max(",;\t", key=title.count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        return [[cell.strip() for cell in line] for line in lines]
    except (ValueError, OSError, csv.Error) as error:
        raise UserError(f"{path} is not a readable CSV: {error}") from None


def read_table(path: Path, num_classes: int, phases: tuple[str, ...] = ()) -> np.ndarray:
    """Read a CSV with the columns id and label, and phase where `phases` are named, each of which must have rows.

    Returns a structured array with the fields id (str), label (int in 0..num_classes-1) and phase (str). Raises
    UserError, naming file and line, for a missing column, a duplicate id, a label out of range, an unknown or an empty
    phase. (Without pandas, for which a small device has no memory to spare.)
    """
    columns = ["id", "label"] + (["phase"] if phases else [])
    lines = [(number, line) for number, line in enumerate(read_cells(path), start=1) if any(line)]
    if lines and lines[0][1][0].startswith("sep="):
        del lines[0]
    header = [name.lower() for name in lines[0][1]] if lines else []
    for column in columns:
        if column not in header:
            raise UserError(f"{path} has no column {column}; it needs {','.join(columns)}")
    labels, rows, seen = {str(label): label for label in range(num_classes)}, [], set()
    for number, line in lines[1:]:
        if len(line) != len(header):
            raise UserError(f"{path}, line {number}: {len(line)} cells, not {len(header)}")
        # A spreadsheet may have made 3.0 of 3; what it has made 1E+05 of cannot be told.
        row = [re.sub(r"^(\d+)[.,]0+$", r"\1", line[header.index(column)]) for column in columns]
        problem = None
        if re.fullmatch(r"\d([.,]\d+)?E[+-]\d+", row[0]):
            problem = f"id {row[0]} is a number that a spreadsheet has rounded: take the file as it was"
        elif row[0] in seen:
            problem = f"id {row[0]} stands twice"
        elif row[1] not in labels:
            problem = f"label {row[1]} is not in 0..{num_classes - 1}"
        elif phases and row[2] not in phases:
            problem = f"phase {row[2]} is not one of {', '.join(phases)}"
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        seen.add(row[0])
        rows.append((row[0], labels[row[1]], *row[2:]))
    table = np.array(rows, [(column, object) for column in columns])
    for phase in phases:
        if not (table["phase"] == phase).any():
            raise UserError(f"{path} has no row of phase {phase}")
    if not rows:
        raise UserError(f"{path} has no rows")
    return table


def image_digest(image: np.ndarray) -> bytes:
    """16 bytes that two uint8 arrays share when their shapes and pixels are the same."""
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
    digest.update(image.tobytes())  # row by row, whatever the order in memory
    return digest.digest()


def table_digest(rows, image_digests) -> str:
    """32 hex digits over the rows of a CSV, each a sequence of str, and over the images that they name, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for row, image in zip(rows, image_digests):
        digest.update(",".join(row).encode() + b"\n" + image)
    return digest.hexdigest()


def count_eval(num_images: int, eval_fraction: float) -> int:
    """Return how many images of a shard of `num_images` (2 or more) are for evaluation; the others are to train on."""
    return min(max(1, round(num_images * eval_fraction)), num_images - 1)


def split_id(info: dict) -> str:
    """The id of a cut, 32 hex digits over what dataset.json says of it: two cuts share it when they are the same."""
    what = [info[name] for name in ("classes", "channels", "image_size", "shards", "test")]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
