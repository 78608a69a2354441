"""What partition.py reads: one reader per file, and which of them reads a source."""

from __future__ import annotations

from plumbing.common.process import UserError
from plumbing.sources.archives import UNREADABLE, file_md5
from plumbing.sources.cifar import read_cifar
from plumbing.sources.folders import read_images
from plumbing.sources.idx import read_idx
from plumbing.sources.official import OFFICIAL, official_source
from plumbing.sources.shapes import draw_shapes

# Sources. A reader takes (source, args), and returns (classes, channels, splits, levels for prepare_image), or None if
# nothing has its layout. splits yields ("train" or "test", number of images, images) in turn, and images yields (image
# as prepare_image takes it, int label), no more than that number; channels are None where the images decide. All of the
# readers are in READERS.


# Asked in turn: one that returns None, or cannot open the source, leaves it to the next. A new one goes before the
# last, which takes any folder, zip or tar, or says what is wrong with it.
READERS = (read_cifar, read_idx, read_images)


def open_source(args):
    """Choose the reader: (name of the source, its checksum or None, what the reader returned)."""
    source, name, known = args.source, str(args.source or args.dataset), (*OFFICIAL, "Shapes10")
    if source is None or (name in known and not source.exists()):
        if name not in known:
            raise UserError(f"no source is built in for {name}, only for {', '.join(known)}: name one with --source")
        if name == "Shapes10":
            return "built in", None, (*draw_shapes(), None)
        source = official_source(name, args.datasets)
    target = (args.datasets / args.dataset).resolve()
    if source.resolve() == target or target in source.resolve().parents:
        raise UserError(f"--source {source} lies in {target}, which this run would replace: move it elsewhere")
    try:
        checksum = None if source.is_dir() else f"md5: {file_md5(source)}"
    except OSError as error:
        raise UserError(f"cannot read {source}: {error}") from None
    reason = None
    for reader in READERS:
        try:
            found = reader(source, args)
        except UNREADABLE as error:  # damaged, or no archive, and perhaps what the next one reads
            reason = reason or error
            continue
        if found:
            return str(source.absolute()), checksum, found
    raise UserError(f"cannot read {source} as a folder, zip or tar: {reason}")
