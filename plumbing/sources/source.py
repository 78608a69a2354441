"""What a reader is given besides the archive, and what it returns."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class Options:
    """The flags of partition.py that a reader needs."""

    dataset: str  # its name
    test_fraction: float  # share of each class for the test set, where the source has none
    seed: int  # of the choice of the test set
    skip_damaged: bool  # skip images that cannot be read


@dataclass
class Source:
    """The images of a source, and what is known of them.

    `splits` yields ("train", N, images) and then ("test", N, images). `images` yields up to N pairs of an image, as
    common.images.prepare_image takes it, and an int label, which indexes `classes`.
    """

    classes: list[str]
    splits: Iterable[tuple[str, int, Iterable]]
    channels: int | None = None  # 1 or 3; None: 1 if all images are grey
    levels: list[int] | None = None  # of 16-bit images, for prepare_image
    test_fraction: float | None = None  # set where the reader split off the test set
    name: str = "built in"
    checksum: str | None = None  # of the file, if it is one
