"""Write files whole or not at all, and lock them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def lock_file(path: Path):
    """Lock the file `path` until this process ends. Return the lock, to be kept, or None if another process has it.

    The file is empty: on some systems locking truncates it. Raises OSError if it cannot be made.
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
    """Wait until what was written to the file `path` is on the disk. Raises OSError if it cannot be written there."""
    with open(path, "rb+") as file:  # "+": Windows syncs only what may be written
        os.fsync(file.fileno())


def sync_folder(path: Path | str) -> None:
    """Wait until the names in the folder `path` are on the disk: new files, and those that were renamed or removed.

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
    """Give a path to write to. The file is renamed to `path` at the end of the block, or removed if the block raises.

    It is on the disk before it is renamed, and so is its name before this returns: a power cut leaves the old file or
    the new one, and certainly the new one if anything that was written later is there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        sync_file(part)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or an error is raised already
            part.unlink()
