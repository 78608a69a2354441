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


def sync_file(path: Path | str) -> None:
    """Wait until the disk has what was written to the file `path`. Raises OSError where it cannot be written there."""
    with open(path, "rb+") as file:  # "+": Windows syncs only what may be written
        os.fsync(file.fileno())


def sync_folder(path: Path | str) -> None:
    """Wait until the disk has the names in the folder `path`: new files, and those that were renamed or removed.

    Windows and some network drives cannot do that: there it does nothing, like SQLite.
    """
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a path to write to; what was written gets the name `path` when the block ends well, and else vanishes.

    The disk has the file before it is renamed, and its name before this returns: a power cut leaves the old file or
    the new one, and the new one wherever anything that was written later is left.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        sync_file(part)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it has its name, or what went wrong is raised already
            part.unlink()
