"""How a run goes on from an earlier one (--resume), and where the files of an earlier run go without it."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import shutil
import time
from pathlib import Path

from plumbing.common.files import atomic_write, sync_file, sync_folder
from plumbing.common.process import UserError, printable, say
from plumbing.common.state import read_saved
from plumbing.laptop.history import FILES, read_history


def other_data(checkpoint, about):
    """What is other in the data of a checkpoint than `about` says, as a phrase, or None.

    Old checkpoints have no dataset_id, and old datasets no id: then only the classes are compared.
    """
    classes, now = checkpoint.get("classes"), about.get("classes")
    if classes is not None and now is not None and list(classes) != list(now):
        old, new = next(pair for pair in itertools.zip_longest(classes, now) if pair[0] != pair[1])
        return f"its classes are others, {printable(old, 40)} where {printable(new, 40)} is now"
    dataset_id, now = checkpoint.get("dataset_id"), about.get("dataset_id")
    if dataset_id is not None and now is not None and dataset_id != now:
        return f"its shards or its test set are others: id {printable(dataset_id, 8)}, now {printable(now, 8)}"
    return None


def find_run(folder: Path, resume: bool | str) -> Path | None:
    """The folder to resume from, or None: `resume` is the value of --resume, which means `folder` where it is True."""
    if not resume:
        if earlier_run(folder):
            if not os.access(folder.parent, os.W_OK):
                raise UserError(f"cannot write to {folder.parent}, to which the earlier run is to be moved")
            say(f"the earlier run in {folder} is moved aside when a round is finished (--resume would go on from it)")
        return None
    source = folder if resume is True else Path(resume)
    if (source / "server.ptl").exists():
        return source
    if resume is not True:
        raise UserError(f"cannot resume from {source}: there is no server.ptl in it")
    aside = moved_aside(folder)
    hint = f" (the newest run that was moved aside: {how_to_resume(aside[-1])})" if aside else ""
    say(f"nothing to resume in {folder}: starting at round 1{hint}")
    return None


def read_args(path: Path, load) -> dict:
    """The args of the run whose checkpoint is at `path`: {} where there is none, or it cannot be read (see resume)."""
    with contextlib.suppress(Exception):
        return dict(load(path)[1]["args"])
    return {}


def resume(folder: Path, model, about: dict, load, allow_new_data: bool = False) -> tuple[list[dict], str | None, str]:
    """Put the checkpoint in `folder` into `model`: (the rows of history.csv up to its round, its wandb run id, fedbn).

    The last names the run to its devices, "" where they keep nothing for it (server.py, --fedbn).

    `about` is what this run's checkpoints will say of themselves, `load` is nets.load_checkpoint. Raises UserError
    where the checkpoint or its history cannot be read, or does not fit; other data is refused unless it is allowed.
    """
    path = folder / "server.ptl"
    try:
        saved, checkpoint = load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot resume from {path}: {error}{way_out(folder, load)}") from None
    try:
        mine = {"dataset": about["dataset"], "net": type(model).__name__, "num_classes": model.num_classes}
        for name, value in {**mine, "in_channels": model.in_channels}.items():
            if checkpoint[name] != value:
                raise UserError(f"cannot resume from {path}: its {name} is {checkpoint[name]}, not {value}")
        other = other_data(checkpoint, about)
        if other is not None and not allow_new_data:
            raise UserError(f"cannot resume from {path}: {other}; --allow_new_data goes on with the new data")
        model.load_state_dict(saved.state_dict())
        rows = read_history(folder, checkpoint["round"], checkpoint["metrics"])
        return rows, checkpoint["wandb_run_id"], checkpoint.get("fedbn", "")
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"cannot resume from {path}: {error}") from None
    except Exception as error:  # whatever load_state_dict makes of files that are not ours
        reason = f"it or history.csv is damaged, or not of this suite ({type(error).__name__})"
        raise UserError(f"cannot resume from {path}: {reason}") from None


def way_out(folder, load):
    """How to resume without server.ptl in `folder`, as the end of a sentence; "" where best.ptl cannot be read."""
    best = folder / FILES["best"]
    try:
        _, checkpoint = load(best)
    except (OSError, ValueError):
        return ""
    command = shlex.join(["cp", str(best), str(folder / FILES["model"])])
    return f"; to resume from best.ptl, of round {checkpoint.get('round')}, first: {command}"


def best_of(folder, last_round, about):
    """The best of the rounds up to `last_round`: (its test accuracy, the file that has its model), or (-1.0, None).

    That is best.ptl, or server.ptl where a kill came between the two. Models of other data do not count: their
    accuracy was measured on another test set.
    """
    best, best_path = -1.0, None
    for path in (folder / "best.ptl", folder / "server.ptl"):
        if not last_round or not path.exists():
            continue
        try:
            checkpoint = read_saved(path)
            accuracy = checkpoint["metrics"].get("test_accuracy")
            counts = checkpoint["round"] <= last_round and other_data(checkpoint, about) is None
        except Exception as error:  # a damaged best.ptl, which the next best model replaces
            say(f"{path} is not used: {printable(error)}")
            continue
        if counts and accuracy is not None and accuracy > best:
            best, best_path = accuracy, path
    return best, best_path


def keep_best(path, best_path):
    """Make `path`, best.ptl, a copy of what `best_of` found, where that is not best.ptl itself."""
    if best_path not in (None, path):
        with atomic_write(path) as part:
            shutil.copyfile(best_path, part)


def earlier_run(folder):
    """Whether an earlier run has left anything in `folder`."""
    return any((folder / name).exists() for name in FILES.values())


def moved_aside(folder):
    """The folders to which earlier runs of `folder` were moved and from which one can go on, the newest last."""
    dated = re.compile(re.escape(folder.name) + r"\.\d{4}-\d\d-\d\d_\d{6}(_\d+)?")  # no run of a dataset like Name.v2
    return sorted(path.parent for path in folder.parent.glob("*/server.ptl") if dated.fullmatch(path.parent.name))


def how_to_resume(folder):
    return f"--resume {shlex.quote(str(folder))}"


def move_aside(folder, names):
    """Move the files `names` of an earlier run, as far as they are in `folder`, to a folder with the date in its name.

    That one is whole before anything is taken away here, server.ptl first: a kill in between leaves a run whole that
    one can go on from.
    """
    found = [name for name in names if (folder / name).exists()]
    if not found:
        return
    name = f"{folder.name}.{time.strftime('%Y-%m-%d_%H%M%S')}"
    taken = sum(path.name.startswith(name) for path in folder.parent.iterdir())
    aside = folder.with_name(f"{name}_{taken + 1}" if taken else name)
    part = folder.with_name(f".{aside.name}.part")
    part.mkdir()
    try:
        for name in found:
            try:
                os.link(folder / name, part / name)
            except OSError:  # a file system without links, or another one
                shutil.copy2(folder / name, part / name)
                sync_file(part / name)
        sync_folder(part)
        part.rename(aside)
        sync_folder(folder.parent)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for name in found:
        (folder / name).unlink()
    hint = f"; to go on from it: {how_to_resume(aside)}" if "server.ptl" in found else ""
    say(f"moved {', '.join(found)} of the earlier run to {aside}{hint}")
