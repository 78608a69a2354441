"""Files that are written whole or not at all, and locks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def lock_file(path: Path):
    """Lock the file `path` for this process, until it ends: the lock, to be kept, or None where another process has it.

    The file holds nothing: on some systems locking empties it. Raises OSError where it cannot be made.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a path to write to; what was written gets the name `path` when the block ends well, and else vanishes.

    The file is on the disk before it is renamed, so that a power cut leaves the old file or the new one.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with open(part, "rb+") as file:  # "+": Windows syncs only what may be written
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if part.exists():
            part.unlink()
