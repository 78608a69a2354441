"""Image files in folders named after their classes."""

import re
import unicodedata
from contextlib import suppress

from plumbing.common.images import decode_image
from plumbing.common.process import UserError, say
from plumbing.sources.archives import HIDDEN, UNREADABLE, Archive, some
from plumbing.sources.source import Options, Source

import numpy as np

SUFFIXES = """avif bmp dib exr gif hdr heic heif ico j2k jfif jp2 jpe jpeg jpg jxl pam pbm pcx pfm pgm pic png pnm ppm
    psd pxm ras sr svg tga tif tiff webp""".split()  # of images, even of those that cannot be read
MAGIC = rb"\xff\xd8\xff|\x89PNG|GIF8|BM.{4}\0{4}|RIFF.{4}WEBP|II\*\0|MM\0\*|.{4}ftypavi|\0\0\0\x0cjP|\xff\x4f\xff\x51"
DEEP = rb"\x89PNG.{20}\x10|II\*\0|MM\0\*|P[2356]\s|\0\0\0\x0cjP|\xff\x4f\xff\x51"  # how a file of 16 bits may begin
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation"), "val")


def read_folders(archive: Archive, options: Options) -> Source:
    """Read images as train/<class>/* and test/<class>/*, at any depth, or as <class>/* alone; classes in sorted order.

    Raises UserError where the layout is neither, and for damaged images, all at once, unless they are to be skipped.
    """
    places, others = sort_files(archive)
    if others:
        say(f"skipped, not images of a class: {some(others, 5)} ({len(others)} in all)")
    class_of = merge_spellings(set(places.values()))
    classes = sorted({class_of[folder] for split, folder in places.values() if split != "test"})
    unknown = {class_of[folder] for _, folder in places.values()} - set(classes)
    if unknown:
        raise UserError(f"{archive} has the class {min(unknown)} in test/ but not in train/")
    labels = {name: classes.index(class_of[folder]) for name, (_, folder) in places.items()}
    test_fraction = None
    names = {split: [name for name in labels if places[name][0] == split] for split in ("train", "test")}
    if not names["test"]:
        test_fraction = options.test_fraction
        in_test = split_off(np.array(list(labels.values())), test_fraction, options.seed)
        if not in_test.any():
            raise UserError(f"{archive} has one image of each class, so none for a test set")
        say(f"{archive} has no test set: {in_test.sum()} of {len(in_test)} images are split off as one")
        for split, chosen in (("train", ~in_test), ("test", in_test)):
            names[split] = [name for name, here in zip(labels, chosen) if here]
    levels = find_levels(archive.files, labels)
    splits = Reading(archive, labels, classes).splits(names, options.skip_damaged)
    return Source(classes, splits, levels=levels, test_fraction=test_fraction)


class Reading:
    """Decodes the images, and remembers which are damaged or transparent."""

    def __init__(self, archive, labels, classes):
        self.archive, self.labels, self.classes = archive, labels, classes
        self.damaged, self.transparent, self.left = [], 0, {"train": set(), "test": set()}  # left: labels with an image

    def splits(self, names, skip_damaged):
        for split in names:
            yield split, len(names[split]), self.images(split, names[split])
        if self.damaged:
            self.check_damaged(names, skip_damaged)
        if self.transparent:
            say(f"images with transparent parts, put on white: {self.transparent}")

    def images(self, split, names):
        for name in names:
            try:
                with self.archive.files[name]() as file:
                    image = decode_image(file.read())
            except UNREADABLE as error:
                self.damaged.append(f"{name} ({getattr(error, 'strerror', None) or error})")
                continue
            alpha = image.ndim == 3 and image.shape[2] == 4
            self.transparent += bool(alpha and image[:, :, 3].min() < np.iinfo(image.dtype).max)
            self.left[split].add(self.labels[name])
            yield image, self.labels[name]

    def check_damaged(self, names, skip_damaged):
        damaged = some(self.damaged)
        if not skip_damaged:
            count = f"{len(self.damaged)} of its images cannot be read (--skip_damaged skips them)"
            raise UserError(f"{self.archive}: {count}: {damaged}")
        lost = sorted({self.labels[name] for name in names["train"]} - self.left["train"])
        if lost:
            lost = some([self.classes[label] for label in lost])
            raise UserError(f"{self.archive}: all training images of {lost} are damaged: {damaged}")
        if not self.left["test"]:
            raise UserError(f"{self.archive}: all images of the test set are damaged: {damaged}")
        say(f"skipped damaged images: {damaged} ({len(self.damaged)} in all)")


def sort_files(archive):
    """Tell the images of a class from other files: ({name: (split, name of the class's folder)}, names of others).

    The split is "train", "test", or None if the source has only <class>/* or train/<class>/*. Raises UserError, with
    what is there, for any other layout.
    """
    images, others = find_images(archive.files)  # {name: its folders and file, without those that all share}

    def tops():
        return sorted({parts[0] for parts in images.values() if len(parts) > 1})

    while len(tops()) == 1 and tops()[0].lower() not in SPLITS and max(map(len, images.values())) > 2:
        others |= {name for name, parts in images.items() if len(parts) == 1}
        images = {name: parts[1:] for name, parts in images.items() if len(parts) > 1}
    roles = {top: SPLITS[top.lower()] for top in tops() if top.lower() in SPLITS}
    if len(roles) < len(tops()) and not any(len(parts) > 2 and parts[0] in roles for parts in images.values()):
        roles = {}  # a class of that name, among others
    if "test" not in roles.values():  # a validation set will do
        roles = {top: "test" if role == "val" else role for top, role in roles.items()}
    places = {}
    for name, parts in images.items():
        if len(parts) > 2 and roles.get(parts[0]) in ("train", "test"):
            places[name] = roles[parts[0]], parts[1]
        elif len(parts) > 1 and not roles:
            places[name] = None, parts[0]
        else:
            others.add(name)
    if roles.keys() == set(tops()) and "test" not in roles.values():  # only train/<class>/*
        places = {name: (None, folder) for name, (_, folder) in places.items()}
    splits, classes = {split for split, _ in places.values()}, {folder for _, folder in places.values()}
    deeper = any(part.lower() in SPLITS for parts in images.values() for part in parts[2 if roles else 1 : -1])
    if splits != {"train", "test"} and (splits != {None} or len(classes) < 2 or deeper):
        missing = [f"{split}/<class>/*" for split in ("train", "test") if roles and split not in splits]
        counts = [f"{sum(parts[0] == top for parts in images.values())} in {top}/" for top in tops()]
        loose = sum(len(parts) == 1 for parts in images.values())
        raise wrong_layout(archive, missing, counts + [f"{loose} in no folder"] * (loose > 0))
    return places, sorted(others)


def find_images(files):
    """Return ({name: [folder, …, file]} of all images, names of other files); of a hidden folder the folder's name."""
    images, others = {}, set()
    for name in sorted(files):
        parts = [part for part in name.split("/") if part not in ("", ".")]
        hidden = [number for number, part in enumerate(parts) if HIDDEN.fullmatch(part)]
        if hidden:
            others.add("/".join(parts[: hidden[0] + 1]) + "/" * (hidden[0] + 1 < len(parts)))
        elif name.rpartition(".")[2].lower() in SUFFIXES or looks_like_image(files[name]):
            images[name] = parts
        else:
            others.add(name)
    return images, others


def looks_like_image(opened):
    with suppress(*UNREADABLE), opened() as file:
        return re.match(MAGIC, file.read(16), re.DOTALL) is not None
    return False


def wrong_layout(archive, missing, counts):
    """Return a UserError with the folders that are missing, and how many images are where."""
    expected = " or ".join(missing) or "train/<class>/* and test/<class>/*, or as <class>/* of two classes or more"
    archives = [name for name in sorted(archive.files) if re.search(r"\.(zip|tar|tgz|tar\.\w+)$", name, re.IGNORECASE)]
    hint = f"; it contains {some(archives)}: use such a file as --source, or unpack it" if archives else ""
    return UserError(f"{archive} has no images as {expected}; images there: {some(counts) or 'none at all'}{hint}")


def merge_spellings(places):
    """Give each class one name: {folder's name: class}, from pairs (split, folder's name).

    Spellings that differ in outer spaces or Unicode's form are one class, called as the training set has it. So are
    those that differ in case, unless each split has all of them: then they are letters, such as A and a.
    """
    tidy = {folder: unicodedata.normalize("NFC", folder).strip() for _, folder in places}
    splits, there = {split for split, _ in places}, {(split, tidy[folder]) for split, folder in places}
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
        say(f"classes that differ only in case: {some(apart)}")
    return names


def split_off(labels, fraction, seed):
    """Choose `fraction` of each class for the test set, at least one but not all: a bool for each of the labels."""
    rng, chosen = np.random.RandomState(seed), np.zeros(len(labels), bool)
    for label in range(labels.max() + 1):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(max(1, round(len(members) * fraction)), len(members) - 1)]] = True
    return chosen


def find_levels(files, names):
    """Return the least and greatest value of all 16-bit images, if they leave half of the range or more unused."""
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
    say(f"16-bit images with values from {low} to {high} only, scaled to 0..255: {count}")
    return [low, high]
