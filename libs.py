"""Third-party names that the modules share, and what all scripts use from plumbing/.

All other modules import from here, by name, and before anything that is not Python's own: plumbing sets what other
packages read when they are imported. What only some need (cv2, pandas, wandb, matplotlib) they import themselves.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import hmac
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from plumbing import UNNAMED, VERSION
from plumbing.common.arguments import (
    find_folder,
    given_flags,
    join_address,
    list_datasets,
    new_parser,
    nonempty_path,
    number,
    plain_args,
    read_secret,
    split_address,
)
from plumbing.common.files import atomic_write, lock_file
from plumbing.common.process import UserError, mute_handlers, on_signal, printable, quiet_flower, run_script, say
from plumbing.common.sockets import KEEPALIVE, keep_alive, tcp_sockets


@contextlib.contextmanager
def quick_imports():
    """Import in this block without garbage collection, and leave what was imported out of later collections.

    Of a thousand modules nothing is garbage, and searching them took a third of the start.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


with quick_imports():
    import numpy as np
    from tqdm import tqdm


def __getattr__(name):
    """Import `torch` and `nn` when they are first asked for: partition.py needs neither, and would wait a second."""
    if name not in ("torch", "nn"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quick_imports():
        import torch
    globals().update(torch=torch, nn=torch.nn)
    return globals()[name]


ROOT = Path(__file__).resolve().parent
DATASETS = ROOT / "datasets"
CKPS = ROOT / "ckps"


# ---------------------------------------------------------------------------------------------------------------------
# Images and their digests: what partition.py, the devices and nets.predict have to do alike. Here and not in data.py,
# which imports torch, that partition.py needs not wait for; cv2 is imported where it is used, since most devices can
# spare its 15 MB.


def tiff_tags(block):
    """The tags of a TIFF file, or of an EXIF block, which has its form: {tag: number}, those of 16 bits alone."""
    order, tags = "<" if block[:2] == b"II" else ">", {}
    with contextlib.suppress(struct.error):  # it ends early
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", block, entry)
            if kind == 3:
                tags[tag] = value
    return tags


def decode_image(encoded: bytes) -> np.ndarray:
    """An image file's bytes as a viewer shows them: uint8 or uint16 of H×W, H×W×3 (RGB) or H×W×4 (RGB and alpha).

    Upright, as its EXIF says; of an animation the first frame. Raises ValueError, with the reason, for what is damaged
    or has no counterpart here.
    """
    import cv2

    def decode(flags):
        try:
            return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        except cv2.error:
            return None

    png, tiff = encoded.startswith(b"\x89PNG"), encoded[:4] in (b"II*\0", b"MM\0*")
    upright = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH  # turned as its EXIF says, and without alpha; the other neither
    image = decode(upright if encoded.startswith(b"\xff\xd8") else cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("damaged, or of a format that OpenCV does not read")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"its values are {image.dtype}, not whole numbers of 8 or 16 bits")
    if tiff and tiff_tags(encoded).get(277) == 2:  # SamplesPerPixel
        raise ValueError("a TIFF of grey and alpha, which OpenCV reads without the alpha")
    if png and image.ndim == 2:
        header = encoded[: encoded.find(b"IDAT")]
        at = header.find(b"tRNS")  # one grey value that is transparent, which OpenCV knows in coloured PNGs alone
        if at >= 0:
            depth, value = header[24], int.from_bytes(header[at + 4 : at + 6], "big")
            value = value * 255 // (2**depth - 1) if depth < 8 else value
            opaque = np.where(image == value, 0, np.iinfo(image.dtype).max).astype(image.dtype)
            image = np.dstack([image] * 3 + [opaque])
    alpha = image.ndim == 3 and image.shape[2] == 4
    if image.dtype == np.uint16 and encoded[4:8] == b"ftyp":  # AVIF of 10 or 12 bits, which OpenCV does not shift
        if alpha:
            raise ValueError("an AVIF of more than 8 bits with alpha")
        image = decode(cv2.IMREAD_COLOR)
    at = encoded.find(b"eXIf" if png else b"EXIF") if png or encoded[8:12] == b"WEBP" else -1
    if not alpha:
        image = decode(upright) if at >= 0 else image
        return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    exif = encoded[at + (4 if png else 8) :] if at >= 0 else b""
    turn = tiff_tags(exif[6:] if exif.startswith(b"Exif\0\0") else exif).get(274, 1)  # Orientation
    if turn in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    image = image[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
    image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGRA2RGBA)
    if tiff and image.dtype == np.uint8:  # libtiff has multiplied the colours by alpha
        alpha = np.maximum(image[:, :, 3:], 1).astype(np.uint16)
        image[:, :, :3] = np.minimum((image[:, :, :3] * np.uint16(255) + alpha // 2) // alpha, 255)
    return image


def prepare_image(image: np.ndarray, image_size, fit="squash", levels=None, channels=None) -> np.ndarray:
    """What a net sees of a decoded image: uint8 H×W if grey, H×W×3 (RGB) if coloured, of `image_size` (height, width).

    Of 16 bits a value of `levels` (low, high) becomes 0..255, or without them its upper byte is taken; alpha is put on
    white. `fit` "squash" scales both sides, whatever they were; "crop" first takes the middle in the right proportion.
    `channels` 1 makes any image grey, 3 any coloured; None leaves it to the image: one of grey pixels alone is grey.
    """
    import cv2

    if image.dtype == np.uint16:
        colours = image[:, :, :3] if image.ndim == 3 else image
        if levels is None:
            eight = (colours >> 8).astype(np.uint8)
        else:
            low, high = levels
            scaled = (colours.astype(np.float32) - low) * np.float32(255 / max(high - low, 1))
            eight = np.clip(scaled + 0.5, 0, 255).astype(np.uint8)
        alpha = image.ndim == 3 and image.shape[2] == 4
        image = np.dstack([eight, (image[:, :, 3] >> 8).astype(np.uint8)]) if alpha else eight
    if image.ndim == 3 and image.shape[2] == 4:
        alpha = image[:, :, 3:].astype(np.uint16)
        image = ((image[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    (height, width), (old_height, old_width) = image_size, image.shape[:2]
    if fit == "crop":
        new_height = max(1, min(old_height, round(old_width * height / width)))
        new_width = max(1, min(old_width, round(old_height * width / height)))
        top, left = (old_height - new_height) // 2, (old_width - new_width) // 2
        image = image[top : top + new_height, left : left + new_width]
    if image.shape[:2] != (height, width):
        image = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA)
    if channels == 3 and image.ndim == 2:
        return np.dstack([image] * 3)
    if channels == 1 and image.ndim == 3:
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    if channels is None and image.ndim == 3 and (image == image[:, :, :1]).all():
        return image[:, :, 0]
    return image
