"""Image files in folders named after their classes."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import tempfile
import unicodedata
from contextlib import suppress
from functools import partial

from plumbing.common.images import decode_image
from plumbing.common.process import UserError, say
from plumbing.sources.archives import HIDDEN, UNREADABLE, is_file, is_zip, list_members, some

import numpy as np

FORMATS = """avif bmp dib exr gif hdr heic heif ico j2k jfif jp2 jpe jpeg jpg jxl pam pbm pcx pfm pgm pic png pnm ppm
    psd pxm ras sr svg tga tif tiff webp""".split()  # suffixes of images, also of those that OpenCV does not read
MAGIC = rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0{4}|RIFF.{4}WEBP|II\*\0|MM\0\*|.{4}ftypavi|\0\0\0\x0cjP|\xff\x4f\xff\x51"
DEEP = rb"\x89PNG.{20}\x10|II\*\0|MM\0\*|P[2356]\s|\0\0\0\x0cjP|\xff\x4f\xff\x51"  # how a file of 16 bits may begin


SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")


def sort_files(source, files):
    """Find out which of `files`, all the names in `source`, are images of a class: ({name: (split, class)}, others).

    The split is "train", "test", or None where the source has only <class>/* or train/<class>/*; `others` are names to
    be passed over.
    Raises UserError, which says what is there, where that is neither of the layouts.
    """
    images, others = {}, set()  # name: its folders and file, without those that all share
    for name in sorted(files):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        hidden = [number for number, part in enumerate(parts) if HIDDEN.fullmatch(part)]
        if hidden:
            others.add("/".join(parts[: hidden[0] + 1]) + "/" * (hidden[0] + 1 < len(parts)))
        elif name.rpartition(".")[2].lower() in FORMATS or looks_like_image(files[name]):
            images[name] = parts
        else:
            others.add(name)

    def tops():
        return sorted({parts[0] for parts in images.values() if len(parts) > 1})

    while len(tops()) == 1 and tops()[0].lower() not in SPLITS and max(map(len, images.values())) > 2:
        others |= {name for name, parts in images.items() if len(parts) == 1}
        images = {name: parts[1:] for name, parts in images.items() if len(parts) > 1}
    roles = {top: SPLITS[top.lower()] for top in tops() if top.lower() in SPLITS}
    if len(roles) < len(tops()) and not any(len(parts) > 2 and parts[0] in roles for parts in images.values()):
        roles = {}  # a class of that name, among others
    if "test" not in roles.values():  # a set for validation serves as well
        roles = {top: "test" if role == "val" else role for top, role in roles.items()}
    sorted_in = {}
    for name, parts in images.items():
        if len(parts) > 2 and roles.get(parts[0]) in ("train", "test"):
            sorted_in[name] = roles[parts[0]], parts[1]
        elif len(parts) > 1 and not roles:
            sorted_in[name] = None, parts[0]
        else:
            others.add(name)
    if roles.keys() == set(tops()) and "test" not in roles.values():  # train/<class>/* alone
        sorted_in = {name: (None, folder) for name, (_, folder) in sorted_in.items()}
    found = {split for split, _ in sorted_in.values()}
    classes = {folder for _, folder in sorted_in.values()}
    deeper = any(part.lower() in SPLITS for parts in images.values() for part in parts[2 if roles else 1 : -1])
    if found != {"train", "test"} and (found != {None} or len(classes) < 2 or deeper):
        missing = [f"{split}/<class>/*" for split in ("train", "test") if roles and split not in found]
        expected = " or ".join(missing) or "train/<class>/* and test/<class>/*, or as <class>/* of two classes or more"
        counts = [f"{sum(parts[0] == top for parts in images.values())} in {top}/" for top in tops()]
        loose = sum(len(parts) == 1 for parts in images.values())
        content = some(counts + [f"{loose} in no folder"] * (loose > 0)) or "none at all"
        archives = [name for name in sorted(files) if re.search(r"\.(zip|tar|tgz|tar\.\w+)$", name, re.IGNORECASE)]
        hint = f"; it holds {some(archives)}: name such a file with --source, or unpack it" if archives else ""
        raise UserError(f"{source} has no images as {expected}; images there: {content}{hint}")
    return sorted_in, sorted(others)


def looks_like_image(opened):
    with suppress(*UNREADABLE), opened() as file:
        return re.match(MAGIC, file.read(16), re.DOTALL) is not None
    return False


def merge_spellings(pairs):
    """Give each class one name: {folder's name: class}, from pairs (split, folder's name).

    Spellings that differ in outer spaces or Unicode's form are one class, called as the training set has it. Those that
    differ in case are as well, unless each of them is in each split: then they are letters, as A and a.
    """
    tidy = {folder: unicodedata.normalize("NFC", folder).strip() for _, folder in pairs}
    splits, there = {split for split, _ in pairs}, {(split, tidy[folder]) for split, folder in pairs}
    alike, called = {}, {}
    for _, name in sorted((split == "test", name) for split, name in there):
        alike.setdefault(name.casefold(), []).append(name)
    for same in alike.values():
        apart = all((split, name) in there for split in splits for name in same)
        called.update((name, name if apart else same[0]) for name in same)
    names = {folder: called[name] for folder, name in sorted(tidy.items())}
    different = [f"{folder!r} is {name!r}" for folder, name in names.items() if folder != name]
    if different:
        say(f"spellings of one class: {some(different)}")
    classes = sorted(set(names.values()), key=lambda name: (name.casefold(), name))
    apart = [f"{one!r} and {other!r}" for one, other in zip(classes, classes[1:]) if one.casefold() == other.casefold()]
    if apart:
        say(f"classes that differ in case alone: {some(apart)}")
    return names


def split_off(labels, fraction, seed):
    """Choose `fraction` of each class for the test set, at least one and not all: a bool for each of the labels."""
    rng, chosen = np.random.RandomState(seed), np.zeros(len(labels), bool)
    for label in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(len(members) * fraction)), len(members) - 1)]] = True
    return chosen


def find_levels(files, names):
    """The least and greatest value of all images of 16 bits, where they leave half of the range or more unused."""
    low, high, count = 2**16, -1, 0
    for name in names:
        with suppress(*UNREADABLE), files[name]() as file:
            head = file.read(32)
            if re.match(DEEP, head, re.DOTALL):
                image = decode_image(head + file.read())
                if image.dtype == np.uint16:
                    seen = image[image[:, :, 3] > 0, :3] if image.ndim == 3 and image.shape[2] == 4 else image
                    low, high = min(low, int(seen.min(initial=2**16 - 1))), max(high, int(seen.max(initial=0)))
                    count += 1
    if high < low or high - low >= 2**15:
        return None
    say(f"images of 16 bits with values from {low} to {high} alone, which become 0 to 255: {count}")
    return [low, high]


def read_images(source, args):
    """Read images as train/<class>/* and test/<class>/*, at any depth, or as <class>/* alone; classes in sorted order.

    Names all damaged files of the source at once; with --skip_damaged goes on without them.
    """
    if source.is_dir() or is_zip(source):
        files = dict(list_members(source))
    else:
        tar = tarfile.open(source)
        if not isinstance(tar.fileobj, io.BufferedReader):  # packed, so that only what comes next can be read
            unpacked = tempfile.TemporaryFile(dir=args.datasets)
            tar.fileobj.seek(0)
            shutil.copyfileobj(tar.fileobj, unpacked)
            unpacked.seek(0)
            tar = tarfile.open(fileobj=unpacked)
        files = {member.name: partial(tar.extractfile, member) for member in tar if is_file(member)}
    sorted_in, others = sort_files(source, files)
    if others:
        say(f"passed over, for it is no image of a class: {some(others, 5)} ({len(others)} in all)")
    spellings = merge_spellings(set(sorted_in.values()))
    sorted_in = {name: (split, spellings[spelling]) for name, (split, spelling) in sorted_in.items()}
    classes = sorted({name for split, name in sorted_in.values() if split != "test"})
    unknown = {name for _, name in sorted_in.values()} - set(classes)
    if unknown:
        raise UserError(f"{source} has the class {min(unknown)} in test/ and not in train/")
    labels = {name: classes.index(called) for name, (_, called) in sorted_in.items()}
    in_test = np.array([split == "test" for split, _ in sorted_in.values()])
    if {split for split, _ in sorted_in.values()} == {None}:
        args.without_test_set = True  # which dataset.json is to say
        in_test = split_off(np.array(list(labels.values())), args.test_fraction, args.seed)
        if not in_test.any():
            raise UserError(f"{source} has one image of each class, and none for a test set")
        say(f"no test set in {source}: split off for it were {in_test.sum()} of {len(in_test)} images")
    names = {"train": [], "test": []}
    for name, test in zip(labels, in_test):
        names["test" if test else "train"].append(name)
    damaged, transparent, left = [], 0, {"train": set(), "test": set()}  # left: the labels that have an image

    def images(split):
        nonlocal transparent
        for name in names[split]:
            try:
                with files[name]() as file:
                    image = decode_image(file.read())
            except UNREADABLE as error:
                damaged.append(f"{name} ({getattr(error, 'strerror', None) or error})")
                continue
            alpha = image.ndim == 3 and image.shape[2] == 4
            transparent += bool(alpha and image[:, :, 3].min() < np.iinfo(image.dtype).max)
            left[split].add(labels[name])
            yield image, labels[name]
        if split == "test" and damaged:
            if not args.skip_damaged:
                count = f"{len(damaged)} of its images cannot be read (--skip_damaged skips them)"
                raise UserError(f"{source}: {count}: {some(damaged)}")
            lost = sorted({labels[name] for name in names["train"]} - left["train"])
            if lost:
                whose = some([classes[label] for label in lost])
                raise UserError(f"{source}: all training images of {whose} are damaged: {some(damaged)}")
            if not left["test"]:
                raise UserError(f"{source}: all images of the test set are damaged: {some(damaged)}")
            say(f"skipped damaged images: {some(damaged)} ({len(damaged)} in all)")
        if split == "test" and transparent:
            say(f"images that are transparent in places, put on white: {transparent}")

    splits = [(split, len(names[split]), images(split)) for split in names]
    return classes, None, splits, find_levels(files, labels)
