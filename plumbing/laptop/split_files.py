"""What partition.py writes beside the images, for devices and for people: CSVs, bundles, --show."""

from __future__ import annotations

import csv
import json
import tarfile

from plumbing.common.arguments import list_datasets
from plumbing.common.process import UserError, printable, say

import numpy as np


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
