"""The files of a folder, zip or tar, whatever they hold."""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

from plumbing.common.process import UserError, printable

UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, ValueError)
UNREADABLE += (lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
HIDDEN = re.compile(r"\..*|__MACOSX|@eaDir|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # what systems leave in folders


def is_file(member):
    """Whether a member of a tar is a file, or a link to one."""
    return member.isfile() or member.islnk() or member.issym()


def is_zip(path):
    """Whether `path` is a zip, and not a tar that ends with one."""
    return zipfile.is_zipfile(path) and not tarfile.is_tarfile(path)


def list_members(source):
    """The files of a folder, zip or tar: yields (name with forward slashes, function that opens it), of a tar in turn.

    A tar's files have to be read one by one, as they are yielded. Raises UserError for a zip that is encrypted.
    """
    if source.is_dir():

        def fail(error):
            raise error

        for folder, folders, names in os.walk(source, onerror=fail, followlinks=True):
            here = os.path.realpath(folder) + os.sep  # a link to a folder above would lead around for ever
            folders[:] = [
                name for name in folders if not here.startswith(os.path.realpath(f"{folder}/{name}") + os.sep)
            ]
            for path in (Path(folder, name) for name in names):
                if path.is_file() or path.is_symlink():  # no pipe or device; a broken link is a file that is missing
                    yield path.relative_to(source).as_posix(), partial(open, path, "rb")
    elif is_zip(source):
        archive = zipfile.ZipFile(source)
        if any(member.flag_bits & 1 for member in archive.infolist()):
            raise UserError(f"{source} is encrypted: unpack it, and name the folder with --source")
        for member in archive.infolist():
            name = member.filename
            if not member.flag_bits & 0x800:  # not marked as UTF-8, which it may be all the same
                with suppress(UnicodeError):
                    name = name.encode("cp437").decode()
            if not name.endswith(("/", "\\")):
                yield name.replace("\\", "/"), partial(archive.open, member)
    else:
        with tarfile.open(source, "r|*") as tar:
            for member in tar:
                if is_file(member):
                    yield member.name, partial(tar.extractfile, member)


def some(names, count=10):
    """The first names of a list, as text that any terminal shows."""
    shown = [printable(name.encode("utf-8", "backslashreplace").decode()) for name in names[:count]]
    return ", ".join(shown) + (", …" if len(names) > count else "")


def file_md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
