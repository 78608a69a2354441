"""The files in a folder, zip or tar."""

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
from functools import cached_property, partial
from pathlib import Path

from plumbing.common.process import UserError, printable

# What reading a damaged file may raise.
UNREADABLE = (OSError, EOFError, KeyError, RuntimeError, ValueError)
UNREADABLE += (lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
HIDDEN = re.compile(r"\..*|__MACOSX|@eaDir|Thumbs\.db|desktop\.ini", re.IGNORECASE)  # left behind by operating systems


class NotAnArchive(Exception):
    """A path is no folder, zip or tar, or its files cannot be listed."""


class Archive:
    """A folder, zip or tar; or another file, of which a reader has the `path` alone."""

    def __init__(self, path: Path, scratch: Path):
        self.path, self.scratch = path, scratch  # scratch: folder for temporary files

    def __str__(self):
        return str(self.path)

    @cached_property
    def files(self) -> dict:
        """{name with forward slashes: function that opens it}. Raises NotAnArchive; UserError for an encrypted zip."""
        try:
            if self.path.is_dir():
                return dict(list_folder(self.path))
            if zipfile.is_zipfile(self.path) and not tarfile.is_tarfile(self.path):  # a tar can end with a zip
                return dict(list_zip(self.path))
            tar = tarfile.open(self.path)
            if not isinstance(tar.fileobj, io.BufferedReader):  # compressed: going back would decompress it all
                decompressed = tempfile.TemporaryFile(dir=self.scratch)
                tar.fileobj.seek(0)
                shutil.copyfileobj(tar.fileobj, decompressed)
                decompressed.seek(0)
                tar = tarfile.open(fileobj=decompressed)
            members = [member for member in tar if member.isfile() or member.islnk() or member.issym()]
            return {member.name: partial(tar.extractfile, member) for member in members}
        except UNREADABLE as error:
            raise NotAnArchive(str(error)) from error


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


def some(names, count=10):
    """Return the first names of a list as text that is safe to print."""
    shown = [printable(name.encode("utf-8", "backslashreplace").decode()) for name in names[:count]]
    return ", ".join(shown) + (", …" if len(names) > count else "")


def file_md5(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
