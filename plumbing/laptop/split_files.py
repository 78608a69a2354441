"""The files of a split dataset: its folder, replaced as a whole; CSVs; bundles; and --show, which reads them."""

import contextlib
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from plumbing.common.arguments import list_datasets
from plumbing.common.files import sync_folder
from plumbing.common.process import UserError, printable, say
from plumbing.common.split import describe_dataset, read_table

import numpy as np


@contextlib.contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to write to, which replaces the dataset `path` when the block ends without an error.

    Raises UserError if `path` is something else than a dataset, or cannot be written.
    """
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*\.", path.name, re.IGNORECASE):
        raise UserError(f"--dataset {path.name}: Windows does not allow a folder of this name, choose another")
    target = path.resolve()
    if target.exists() and not (target / "dataset.json").exists():
        raise UserError(f"{target} exists and was not written by this script: move it elsewhere")
    new, old = (target.with_name(f".{target.name}.{end}") for end in ("new", "old"))
    try:
        path.parent.mkdir(exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        yield new
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


def write_table(path: Path, columns, rows) -> None:
    """Write a CSV, with the same bytes on every system."""
    lines = [",".join(row) for row in (columns, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def write_bundle(folder: Path, dataset: str, cid: int, ids) -> None:
    """Write bundles/client_<cid>.tar, dataset.json and the client's CSV and images, to unpack in the suite's folder."""

    def anonymous(member):
        member.mtime = member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    names = ["dataset.json", f"clients/client_{cid}.csv"] + [f"train/{image_id}.npy" for image_id in ids]
    with tarfile.open(folder / "bundles" / f"client_{cid}.tar", "w") as tar:
        for name in names:
            tar.add(folder / name, f"datasets/{dataset}/{name}", filter=anonymous)


def show(folder: Path) -> None:
    """Print how many images of each class each client of the dataset in `folder` has, according to the CSVs."""
    import pandas as pd  # takes half a second to import

    if not (folder / "dataset.json").exists():
        others = list_datasets(folder.parent)
        raise UserError(f"{folder} has no dataset.json of this script{others}: run it without --show first")
    classes, rows = describe_dataset(folder.name, folder)["classes"], {}
    cids = [path.stem[len("client_") :] for path in (folder / "clients").glob("client_*.csv")]
    for cid in sorted(int(cid) for cid in cids if cid.isdecimal()):
        shard = read_table(folder / "clients" / f"client_{cid}.csv", len(classes), ("fit", "eval"))
        counts = np.bincount(shard["label"].astype(int), minlength=len(classes))
        num_eval = sum(shard["phase"] == "eval")
        rows[cid] = [*counts, len(shard), len(shard) - num_eval, num_eval]
    if not rows:
        raise UserError(f"{folder / 'clients'} has no client_<cid>.csv: run this without --show first")
    columns = [*(printable(name, 40) for name in classes), "all", "fit", "eval"]
    table = pd.DataFrame.from_dict(rows, "index", columns=columns)
    table.loc["all"] = table.sum().to_numpy()
    shown = table.rename_axis("cid").reset_index().to_string(index=False)
    columns = shutil.get_terminal_size((0, 0)).columns if sys.stdout.isatty() else 0
    if 0 < columns < shown.index("\n"):  # in parts, one below the other
        shown = table.rename_axis(index=None, columns="cid").to_string(line_width=columns)
    say(shown)
