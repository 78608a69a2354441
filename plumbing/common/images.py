"""Read an image file, and prepare it for a net.

Pillow and OpenCV are imported where they are used: devices do without them.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path

from plumbing.common.process import UserError, printable

import numpy as np

DECODED = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"}  # by Pillow's names
PIL_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # those of a PIL image that say what each channel is


def decode_image(encoded: bytes) -> np.ndarray:
    """Decode an image file's bytes as a viewer shows them: uint8 or uint16 of H×W, H×W×3 (RGB) or H×W×4 (with alpha).

    Upright, as the file says; the first frame of an animation; with alpha only if the file says so. Raises ValueError,
    with the reason, for what is damaged or not read reliably.

    Pillow decodes: it knows for each format which channel is alpha and which value is the greatest. But it reduces
    colours of 16 bits to 8, so these come from OpenCV, provided that both see the same image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata
            image = Image.open(io.BytesIO(encoded))
            if image.format not in DECODED:
                raise ValueError(f"{image.format} is not supported: convert it to PNG")
            return decode_pil(image, encoded)
    except UnidentifiedImageError:
        raise ValueError("damaged, or of a format that Pillow does not read") from None
    except Exception as error:  # of damaged bytes its plugins raise anything
        raise ValueError(str(error) or type(error).__name__) from None


def decode_pil(image, encoded: bytes | None = None) -> np.ndarray:
    """Return what decode_image does, for a PIL image, and the bytes of its file if there is one."""
    rawmode, tags = str(getattr(image, "tile", "")), dict(getattr(image, "tag_v2", {}))  # how values are stored
    image.load()
    turn = 1
    with contextlib.suppress(SyntaxError):  # no EXIF, though it is called so
        turn = image.getexif().get(274, 1)  # Orientation; Pillow has already turned a TIFF
    sixteen = ";16" in rawmode or max(tags.get(258, [8])) > 8  # BitsPerSample
    grey = image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        pixels = np.asarray(image).astype(np.uint16)
    else:
        mode = "RGBA" if image.has_transparency_data else "L" if grey else "RGB"
        pixels = np.asarray(image.convert(mode))
    if image.mode == "F" or (image.mode == "I" and pixels.dtype == np.uint8) or max(tags.get(339, [1])) > 1:
        raise ValueError("its values are not unsigned whole numbers of 8 or 16 bits")
    if pixels.dtype == np.uint16:
        if tags and (tags[258] != (16,) or tags[262] == 0):  # PhotometricInterpretation: zero is white
            raise ValueError("a grey TIFF of 12 bits, or of 16 bits with zero as white")
        if "transparency" in image.info:
            opaque = np.where(pixels == image.info["transparency"], 0, 65535).astype(np.uint16)
            pixels = np.dstack([pixels] * 3 + [opaque])
    elif encoded is not None and (sixteen or image.format in ("JPEG2000", "PPM")):  # Pillow does not tell their bits
        pixels = sixteen_bits(encoded, pixels, sixteen)
    if encoded is not None and image.format == "JPEG2000" and pixels.shape[2:] == (4,) and b"cdef" not in encoded:
        raise ValueError("a JPEG 2000 with four channels that does not say what the fourth is")
    if turn in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1])


def as_pixels(image) -> np.ndarray:
    """Return what decode_image does, for a path, bytes, a file object, a PIL image or an array. Raises UserError."""
    if isinstance(image, np.ndarray):
        return check_pixels(image)
    from PIL import Image

    shown = printable(image, 100) if isinstance(image, (str, os.PathLike)) else type(image).__name__
    try:
        if isinstance(image, Image.Image):
            if image.mode not in PIL_MODES:
                raise UserError(f'a PIL image cannot be of mode {image.mode}: give image.convert("RGB")')
            return decode_pil(image)
        if isinstance(image, (str, os.PathLike)):
            image = Path(image).read_bytes()
        elif hasattr(image, "read"):
            image = image.read()
        if not isinstance(image, (bytes, bytearray, memoryview)):
            raise UserError(f"no image can be made of a {shown}: give a path, bytes, a PIL image or a numpy array")
        return decode_image(bytes(image))
    except (OSError, ValueError) as error:
        raise UserError(f"image {shown} cannot be read: {error}") from None


def check_pixels(array: np.ndarray) -> np.ndarray:
    """Return an image that is given as an array as decode_image would return it. Raises UserError if it is none."""
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        raise UserError(f"an array has to be uint8 or uint16, not {array.dtype}: scale it to 0..255 and convert it")
    if not array.size or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise UserError(f"an array has to be H×W, H×W×1, H×W×3 or H×W×4, not {'×'.join(map(str, array.shape))}")
    array = np.ascontiguousarray(array, f"u{array.dtype.itemsize}")
    return array[:, :, 0] if array.shape[2:] == (1,) else array


def sixteen_bits(encoded, eight, known):
    """Return the colours of an image in 16 bits, as OpenCV reads them, if they have as many.

    `eight` are the same in 8 bits, as Pillow reads them; `known` says that the file has 16. Raises ValueError if the
    two differ.
    """
    import cv2

    deep = None
    with contextlib.suppress(cv2.error):
        deep = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    if not known and (deep is None or deep.dtype == np.uint8):
        return eight
    if deep is not None and deep.shape == eight.shape:
        deep = deep[:, :, [2, 1, 0, 3][: deep.shape[2]]]
        if np.abs((deep >> 8) - eight.astype(int)).max() <= 1:
            return deep
    raise ValueError("colours of 16 bits that OpenCV does not read as Pillow does")


def prepare_image(image: np.ndarray, image_size, fit="squash", levels=None, channels=None) -> np.ndarray:
    """Return what a net sees of a decoded image: uint8 H×W (grey) or H×W×3 (RGB), of `image_size` (height, width).

    `levels` (low, high) of 16 bits become 0..255; without them the upper byte is taken. Alpha is put on white. `fit`
    "squash" scales both sides, whatever they were; "crop" first takes the middle in the right proportion. `channels` 1
    makes any image grey, 3 any coloured; with None an image of grey pixels alone is grey.
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
