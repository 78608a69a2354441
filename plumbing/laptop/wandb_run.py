"""Which run in Weights & Biases this one is: a new one or one that goes on, online or offline; and its config."""

import contextlib
import functools
import glob
import json
import os
import subprocess
import sys
from pathlib import Path

from plumbing.common.process import UserError, printable
from plumbing.laptop.curves import Curves, how_to_sync

ROOT = Path(__file__).resolve().parents[2]


def import_wandb():
    """Return (wandb, the folder for its files), after setting the variables that it reads when it is imported."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # or else its crashes are reported to its makers
    os.environ.setdefault("WANDB_SILENT", "true")  # what it has to say, we say
    folder = os.environ.get("WANDB_DIR", str(ROOT))
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # or else tables and models go to the home too
        os.environ.setdefault(name, str(Path(folder) / "wandb"))
    try:
        import matplotlib  # noqa: F401 (for the pictures; better missed now than at the end)
        import wandb
    except ImportError as error:
        raise UserError(f"the server needs {error.name}: pip install wandb matplotlib") from None
    return wandb, folder


def choose_mode(wandb):
    """Return (mode, why): WANDB_MODE if it is set, else online if there is a key that works, else offline."""
    mode = os.environ.get("WANDB_MODE")
    if mode not in (None, "online"):
        return ("offline" if mode == "dryrun" else mode), "as WANDB_MODE says"
    why = "no key is at hand"
    try:
        has_key = wandb.login(prompt=False)
    except Exception as error:  # a key that is not known, no network: wandb has many errors of its own
        has_key, why = False, printable(error)
    if mode == "online" and not has_key:
        raise UserError(f"WANDB_MODE is online, but {why}: run `wandb login` or set WANDB_MODE=offline")
    return ("online" if has_key else "offline"), why


def held_steps(wandb_dir: str, run_id: str, names: str) -> set[int] | None:
    """Return the steps that the folders `names` of a run in `wandb_dir` hold; None if there are none, or not readable.

    wandb itself reads them, 1.2 s for a folder: of a run that was killed, all that is there.
    """
    paths, steps = list(Path(wandb_dir).glob(f"{names}-*-{glob.escape(run_id)}/*.wandb")), set()
    for path in paths:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", path]
        done = subprocess.run(command, cwd=path.parent, capture_output=True)
        if done.returncode != 0:
            return None
        records = map(json.loads, done.stdout.splitlines())  # of bytes: only at newlines
        steps.update(record["history"]["item"]["_step"] for record in records if record["type"] == "history")
    return steps if paths else None


def start_wandb(dataset: str, run_id: str | None, config: dict, rows=(), needed: bool = True):
    """Continue the run `run_id` in Weights & Biases, or start one. Return (Curves, a line that says where to see it).

    rows: those of history.csv so far. A run that has later steps, or is not found, would get steps twice: a new one is
        started, which gets all rows (Curves.catch_up).
    needed: False if no rounds follow. Then no new run is started, and none is continued that has all rows.
    """
    wandb, folder = import_wandb()
    mode, why = choose_mode(wandb)
    init = functools.partial(
        wandb.init,
        settings=wandb.Settings(console="off", init_timeout=30, finish_timeout=30, finish_timeout_raises=True),
        project=os.environ.get("WANDB_PROJECT") or "FL-IoT",
        name=os.environ.get("WANDB_NAME") or dataset,
        config=config,
        dir=folder,
    )
    wandb_dir, rounds, held = wandb.Settings(root_dir=folder).wandb_dir, {row["round"] for row in rows}, None
    if mode == "online":
        try:
            run = init(mode=mode, resume="allow", id=run_id)
            held = set(range(run.starting_step))  # as its server tells, if it knows the run
            if not run.resumed and run_id is not None:
                held = held_steps(wandb_dir, run_id, "run") or set()
            is_ahead = max(held, default=0) > len(rows)
            if is_ahead and needed:
                run.finish()
                run, held = init(mode=mode), set()
            return Curves(run, held, online=needed or not is_ahead), f"curves: {run.url}"
        except Exception as error:
            mode, why = "offline", printable(error)
    if mode == "offline":
        held = held_steps(wandb_dir, run_id, "*run") if run_id is not None else None
        if held is None or max(held, default=0) > len(rows):
            run_id, held = None, None
        if not needed and (held is None or rounds <= held):
            mode, why, held = "disabled", "nothing is left to send", rounds
    try:
        run = init(mode=mode, id=run_id)
    except Exception as error:
        raise UserError(f"Weights & Biases cannot start with WANDB_MODE={mode}: {printable(error)}") from None
    later = f"; send them later with: {how_to_sync(run)}" if mode == "offline" else ""
    return Curves(run, held or ()), f"curves: Weights & Biases is {mode} ({why}){later}"


def describe_code() -> dict:
    """Return {"git_commit": hash, "git_modified": whether files differ from it}; {} if no git has this folder."""

    def git(*args):
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if git("ls-files", __file__):  # and not some other repository, in which this folder lies
            modified = git("status", "--porcelain", "--untracked-files=no", ".")
            return {"git_commit": git("rev-parse", "HEAD"), "git_modified": bool(modified)}
    return {}
