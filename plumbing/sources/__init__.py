"""partition.py's readers, one per file.

A reader takes (Archive, Options) and returns a Source, or None if the archive has another layout. It raises UserError
for what has its layout and is damaged or incomplete. To add a source, write a reader and put it into READERS.
"""

from pathlib import Path

from plumbing.common.process import UserError
from plumbing.sources.archives import Archive, NotAnArchive, file_md5
from plumbing.sources.cifar import read_cifar
from plumbing.sources.folders import read_folders
from plumbing.sources.idx import read_idx
from plumbing.sources.official import OFFICIAL, find_official
from plumbing.sources.shapes import draw_shapes
from plumbing.sources.source import Options, Source

# Asked in this order, until one returns a Source: a reader that returns None, or in which Archive.files raises
# NotAnArchive, leaves it to the next. Put a new one before the last, which reads any folder, zip or tar, or says what
# is wrong with it.
READERS = (read_cifar, read_idx, read_folders)


def open_source(path: Path | None, options: Options, datasets: Path) -> Source:
    """Open `path`, or the dataset of that name if there is no such path; None stands for the name options.dataset.

    Official files, and temporary ones, are in the folder `datasets`. Raises UserError if no reader takes the source.
    """
    name, names = str(path or options.dataset), (*OFFICIAL, "Shapes10")
    if path is None or (name in names and not path.exists()):
        if name not in names:
            raise UserError(f"{name} is none of the known datasets ({', '.join(names)}): give its images as --source")
        if name == "Shapes10":
            return draw_shapes()
        path = find_official(name, datasets)
    target = (datasets / options.dataset).resolve()
    if target in (path.resolve(), *path.resolve().parents):
        raise UserError(f"--source {path} is in {target}, which will be replaced: move it elsewhere")
    reason = None
    try:
        checksum = None if path.is_dir() else f"md5: {file_md5(path)}"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    archive = Archive(path, datasets)
    for reader in READERS:
        try:
            source = reader(archive, options)
        except NotAnArchive as error:
            reason = error
            continue
        if source:
            source.name, source.checksum = str(path.absolute()), checksum
            return source
    raise UserError(f"cannot read {path} as a folder, zip or tar: {reason}")
