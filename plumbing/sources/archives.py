"""The files in a folder, zip or tar."""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

from plumbing.common.process import UserError, printable

# What reading a damaged file may raise.
UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, ValueError)
UNREADABLE += (lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
HIDDEN = re.compile(r"\..*|__MACOSX|@eaDir|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # left behind by operating systems


def is_zip(path):
    """Whether `path` is a zip, and not a tar that ends with one."""
    return zipfile.is_zipfile(path) and not tarfile.is_tarfile(path)


def list_members(source: Path):
    """Yield (name with forward slashes, function that opens it) for each file in the folder, zip or tar `source`.

    Open a tar's files as they are yielded; later they cannot be read. Raises UserError for an encrypted zip.
    """
    if source.is_dir():
        yield from list_folder(source)
    elif is_zip(source):
        yield from list_zip(source)
    else:
        with tarfile.open(source, "r|*") as tar:
            yield from list_tar(tar)


def index_members(source: Path, scratch: Path) -> dict:
    """Return {name: function that opens it} for each file in `source`, to be opened in any order.

    A compressed tar is decompressed to a temporary file in the folder `scratch`.
    """
    if source.is_dir() or is_zip(source):
        return dict(list_members(source))
    tar = tarfile.open(source)
    if not isinstance(tar.fileobj, io.BufferedReader):  # compressed: going back would decompress it from the start
        decompressed = tempfile.TemporaryFile(dir=scratch)
        tar.fileobj.seek(0)
        shutil.copyfileobj(tar.fileobj, decompressed)
        decompressed.seek(0)
        tar = tarfile.open(fileobj=decompressed)
    return dict(list_tar(tar))


def list_folder(source):
    def fail(error):
        raise error

    for folder, folders, names in os.walk(source, onerror=fail, followlinks=True):
        here = os.path.realpath(folder) + os.sep  # a link to a folder above would never end
        folders[:] = [name for name in folders if not here.startswith(os.path.realpath(f"{folder}/{name}") + os.sep)]
        for path in (Path(folder, name) for name in names):
            if path.is_file() or path.is_symlink():  # no pipe or device; a broken link is a file that is missing
                yield path.relative_to(source).as_posix(), partial(open, path, "rb")


def list_zip(source):
    archive = zipfile.ZipFile(source)
    if any(member.flag_bits & 1 for member in archive.infolist()):
        raise UserError(f"{source} is encrypted: unpack it and give the folder as --source")
    for member in archive.infolist():
        name = member.filename
        if not member.flag_bits & 0x800:  # not marked as UTF-8, but it may still be
            with suppress(UnicodeError):
                name = name.encode("cp437").decode()
        if not name.endswith(("/", "\\")):
            yield name.replace("\\", "/"), partial(archive.open, member)


def list_tar(tar):
    for member in tar:
        if member.isfile() or member.islnk() or member.issym():
            yield member.name, partial(tar.extractfile, member)


def some(names, count=10):
    """Return the first names of a list as text that is safe to print."""
    shown = [printable(name.encode("utf-8", "backslashreplace").decode()) for name in names[:count]]
    return ", ".join(shown) + (", …" if len(names) > count else "")


def file_md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
