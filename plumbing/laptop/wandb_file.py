"""Which steps a .wandb file holds: wandb 0.31 has no reader of its own files."""

from __future__ import annotations

import glob
import struct
from pathlib import Path


def logged_steps(path):
    """The steps in a .wandb file, as far as it can be read: its writer may have been killed.

    It is a log in LevelDB's format (its doc/log_format.md) of wandb's own records, after 7 bytes of wandb's.
    """
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    steps, record = set(), b""
    with open(path, "rb") as file:
        for number, block in enumerate(iter(lambda: file.read(32768), b"")):
            at = 0 if number else 7
            while at + 7 <= len(block):
                _, length, kind = struct.unpack_from("<IHB", block, at)
                part = block[at + 7 : at + 7 + length]
                if kind not in (1, 2, 3, 4) or len(part) < length:  # whole, first, middle, last; else the end was lost
                    return steps
                record = part if kind in (1, 2) else record + part
                at += 7 + length
                if kind in (1, 4):
                    try:
                        logged = WandbRecord.FromString(record)
                    except Exception:  # protobuf's own error, of which only the name differs from version to version
                        return steps
                    if logged.HasField("history"):
                        steps.add(logged.history.step.num)
    return steps


def held_steps(wandb_dir, run_id, names="*run"):
    """The steps that the folders `names` of a run in `wandb_dir` hold; None where there are none."""
    paths = list(Path(wandb_dir).glob(f"{names}-*-{glob.escape(str(run_id))}/*.wandb"))
    return set().union(*map(logged_steps, paths)) if paths else None
