"""How a run continues an earlier one (--resume), and where the earlier one is kept without it."""

import contextlib
import dataclasses
import glob
import itertools
import os
import shlex
import shutil
import time
from pathlib import Path

from plumbing.common.files import sync_file, sync_folder
from plumbing.common.process import UserError, printable, say
from plumbing.common.state import read_saved
from plumbing.laptop.history import FILES, read_history


@dataclasses.dataclass
class Earlier:
    """The run that this one continues; without arguments, none.

    folder: of its files.
    rows: of its history.csv, one for each of its rounds.
    run_id: of its run in Weights & Biases.
    fedbn: the names under which devices keep their batch norm for it, the newest first; "" without --fedbn.
    resumed_after: the rounds after which it was itself resumed.
    """

    folder: Path | None = None
    rows: list[dict] = dataclasses.field(default_factory=list)
    run_id: str | None = None
    fedbn: str = ""
    resumed_after: list[int] = dataclasses.field(default_factory=list)

    @property
    def last_round(self):
        return len(self.rows)


def find_run(folder: Path, resume: bool | str) -> Path | None:
    """Return the folder to resume from, or None. `resume` is the value of --resume; True means `folder`."""
    if not resume:
        if any((folder / name).exists() for name in FILES):
            if not os.access(folder.parent, os.W_OK):
                raise UserError(f"cannot write to {folder.parent}, where the previous run is to be kept")
            say(f"starting a new run; the previous one will be kept in {folder}.<date>. Use --resume to continue it")
        return None
    source = folder if resume is True else Path(resume)
    if (source / "server.ptl").exists():
        return source
    if resume is not True:
        raise UserError(f"cannot resume from {source}: there is no server.ptl in it")
    kept = kept_runs(folder)
    hint = f" (the newest run that was kept: --resume {shlex.quote(str(kept[-1]))})" if kept else ""
    say(f"nothing to resume in {folder}: starting at round 1{hint}")
    return None


def read_args(path: Path) -> dict:
    """Return the args of the run whose checkpoint is at `path`; {} if it cannot be read, which `resume` reports."""
    with contextlib.suppress(Exception):
        return dict(read_saved(path)["args"])
    return {}


def resume(folder: Path | None, model, about: dict, allow_new_data: bool) -> Earlier:
    """Put the parameters of the checkpoint in `folder` into `model`, and return its run; none if `folder` is None.

    about: what this run's checkpoints will say of themselves (state.save_checkpoint).
    allow_new_data: whether the classes, the shards or the test set may be others.

    Raises UserError if the checkpoint or its history cannot be read, or does not fit.
    """
    if folder is None:
        return Earlier()
    path = folder / "server.ptl"
    try:
        checkpoint = read_saved(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot resume from {path}: {error}{way_out(folder)}") from None
    try:
        mine = {"net": type(model).__name__, "dataset": about["dataset"], "num_classes": model.num_classes}
        for name, value in {**mine, "in_channels": model.in_channels}.items():
            if checkpoint[name] != value:
                raise ValueError(f"its {name} is {checkpoint[name]}, not {value}")
        other = other_data(checkpoint, about)
        if other is not None and not allow_new_data:
            raise ValueError(f"{other}; --allow_new_data continues with the new data")
        model.load_state_dict(checkpoint["model"])
        rows = read_history(folder, checkpoint["round"], checkpoint["metrics"])
        again = [current for current in checkpoint.get("resumed_after", ()) if current < len(rows)]
        return Earlier(folder, rows, checkpoint["wandb_run_id"], checkpoint.get("fedbn", ""), again)
    except ValueError as error:
        raise UserError(f"cannot resume from {path}: {error}") from None
    except Exception as error:  # whatever load_state_dict makes of files that are not ours
        reason = f"it is not of this suite, or does not fit the {type(model).__name__} of nets.py: {printable(error)}"
        raise UserError(f"cannot resume from {path}: {reason}") from None


def other_data(checkpoint, about):
    """Return how the data of a checkpoint differs from what `about` says, as a phrase, or None.

    Old checkpoints have no dataset_id, and old datasets no id: then only the classes are compared.
    """
    classes, now = checkpoint.get("classes"), about.get("classes")
    if classes is not None and now is not None and list(classes) != list(now):
        old, new = next(pair for pair in itertools.zip_longest(classes, now) if pair[0] != pair[1])
        return f"its classes differ: {printable(old, 40)} is now {printable(new, 40)}"
    dataset_id, now = checkpoint.get("dataset_id"), about.get("dataset_id")
    if dataset_id is not None and now is not None and dataset_id != now:
        return f"its shards or its test set differ: id {printable(dataset_id, 8)} is now {printable(now, 8)}"
    return None


def way_out(folder):
    """Return how to resume without server.ptl, as the end of a sentence; "" if best.ptl cannot be read either."""
    best = folder / "best.ptl"
    try:
        current = read_saved(best).get("round")
    except (OSError, ValueError):
        return ""
    command = shlex.join(["cp", str(best), str(folder / "server.ptl")])
    return f"; to resume from best.ptl, of round {current}, first: {command}"


def best_of(folder, last_round, about):
    """Return the best of the rounds up to `last_round`: (its test accuracy, the file of its model), or (-1.0, None).

    That file is best.ptl, or server.ptl if a kill came between the two. Models of other data do not count: their
    accuracy was measured on another test set.
    """
    best, best_path = -1.0, None
    for path in (folder / "best.ptl", folder / "server.ptl") if last_round else ():
        if not path.exists():
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


def kept_runs(folder):
    """Return the folders in which `move_aside` has kept runs of `folder` that can be resumed, the newest last."""
    dated = f"{glob.escape(folder.name)}.????-??-??_??????*"  # no run of a dataset like Name.v2
    return sorted(path.parent for path in folder.parent.glob(f"{dated}/server.ptl"))


def move_aside(folder, names):
    """Move those of the files `names` that are in `folder` to a folder with the date in its name.

    That folder is whole before anything is removed here, server.ptl first: after a kill, one of the two is a whole run.
    """
    found = [name for name in names if (folder / name).exists()]
    if not found:
        return
    name = f"{folder.name}.{time.strftime('%Y-%m-%d_%H%M%S')}"
    taken = sum(path.name.startswith(name) for path in folder.parent.iterdir())
    kept = folder.with_name(f"{name}_{taken + 1}" if taken else name)
    part = folder.with_name(f".{kept.name}.part")
    part.mkdir()
    try:
        for name in found:
            shutil.copy2(folder / name, part / name)
            sync_file(part / name)
        sync_folder(part)
        part.rename(kept)
        sync_folder(folder.parent)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for name in found:
        (folder / name).unlink()
    hint = f"; to continue it: --resume {shlex.quote(str(kept))}" if "server.ptl" in found else ""
    say(f"kept {', '.join(found)} of the previous run in {kept}{hint}")
