"""Images as partition.py brings them to a net: what PIL shows, in 8 bits, on white, of one size; or refused by name."""

import io
import json
import struct

from libs import UserError
from plumbing.common.images import decode_image, prepare_image

import cv2
import numpy as np
import pytest
from helpers import images
from PIL import Image, ImageOps

RGB = Image.fromarray(np.random.RandomState(0).randint(0, 256, (5, 7, 3)).astype(np.uint8)).resize((40, 30), 3)
ALPHA = np.zeros((30, 40), np.uint8)
ALPHA[3:15, 5:30], ALPHA[20:26] = 255, np.arange(0, 240, 6)
RGBA = RGB.copy()
RGBA.putalpha(Image.fromarray(ALPHA))
GREY, PALETTE = RGB.convert("L"), RGB.quantize(16)


def encoded(image, form, orientation=None, **options):
    if orientation is not None and form == "TIFF":
        options["tiffinfo"] = {274: orientation}
    elif orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def shown(content):
    """What a viewer shows, after PIL: upright, on white, uint8 H×W×3."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return np.array(white.convert("RGB"))


def animation(form, **options):
    return encoded(RGBA, form, save_all=True, append_images=[RGB.convert("RGBA")], **options)


LOSSLESS = {
    "PNG": encoded(RGB, "PNG"),
    "PNG grey": encoded(GREY, "PNG"),
    "PNG 1 bit": encoded(RGB.convert("1"), "PNG"),
    "PNG palette": encoded(PALETTE, "PNG"),
    "PNG palette of 4 bits": encoded(GREY.quantize(8), "PNG", bits=4),
    "PNG alpha": encoded(RGBA, "PNG"),
    "PNG grey and alpha": encoded(RGBA.convert("LA"), "PNG"),
    "PNG palette, one colour transparent": encoded(PALETTE, "PNG", transparency=3),
    "PNG palette and alpha": encoded(PALETTE, "PNG", transparency=bytes(range(0, 256, 16))),
    "PNG one colour transparent": encoded(RGB, "PNG", transparency=RGB.getpixel((9, 9))),
    "PNG one grey transparent": encoded(GREY, "PNG", transparency=GREY.getpixel((9, 9))),
    "PNG 1 bit, black transparent": encoded(RGB.convert("1"), "PNG", transparency=0),
    "APNG": animation("PNG"),
    "BMP": encoded(RGB, "BMP"),
    "BMP palette": encoded(PALETTE, "BMP"),
    "GIF": encoded(PALETTE, "GIF"),
    "GIF transparent": encoded(PALETTE, "GIF", transparency=3),
    "GIF animated": animation("GIF"),
    "WebP": encoded(RGB, "WEBP", lossless=True),
    "WebP alpha": encoded(RGBA, "WEBP", lossless=True),
    "WebP animated": animation("WEBP", lossless=True),
    "TIFF": encoded(RGB, "TIFF"),
    "TIFF LZW": encoded(RGB, "TIFF", compression="tiff_lzw"),
    "TIFF alpha": encoded(RGBA, "TIFF"),
    "TIFF grey and alpha": encoded(RGBA.convert("LA"), "TIFF"),
    "TIFF CMYK": encoded(RGB.convert("CMYK"), "TIFF"),
    "TIFF palette": encoded(PALETTE, "TIFF"),
    "TIFF 1 bit": encoded(RGB.convert("1"), "TIFF"),
    "PPM": encoded(RGB, "PPM"),
    "PGM": encoded(GREY, "PPM"),
    "PBM": encoded(RGB.convert("1"), "PPM"),
    "JPEG 2000": encoded(RGB, "JPEG2000"),
    "JPEG 2000 alpha": encoded(RGBA, "JPEG2000"),
    "PNG of 16 bits": cv2.imencode(".png", np.array(RGB).astype(np.uint16) * 257)[1].tobytes(),
    "PNG of 16 bits, alpha": cv2.imencode(".png", np.array(RGBA).astype(np.uint16) * 257)[1].tobytes(),
    "TIFF of 16 bits": cv2.imencode(".tiff", np.array(RGB)[:, :, 0].astype(np.uint16) * 257)[1].tobytes(),
}
LOSSY = {
    "JPEG": encoded(RGB, "JPEG", quality=95),
    "JPEG grey": encoded(GREY, "JPEG", quality=95),
    "JPEG progressive": encoded(RGB, "JPEG", quality=95, progressive=True),
    "JPEG CMYK": encoded(RGB.convert("CMYK"), "JPEG", quality=95),
    "AVIF": encoded(RGB, "AVIF", quality=90),
    "AVIF alpha": encoded(RGBA, "AVIF", quality=90),
    "WebP lossy": encoded(RGB, "WEBP", quality=90),
}
TURNED = {
    f"{form} {image.mode} turned {turn}": encoded(image, form, turn, **options)
    for form, options in (
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("JPEG", {"quality": 95}),
        ("AVIF", {"quality": 90}),
    )
    for image in (RGB, RGBA, GREY)
    if form != "JPEG" or image is not RGBA
    for turn in range(1, 9)
}  # AVIF's in its own properties (irot, imir)


@pytest.mark.parametrize("kind", [*LOSSLESS, *LOSSY, *TURNED])
def test_image_is_what_a_viewer_shows(kind):
    content = {**LOSSLESS, **LOSSY, **TURNED}[kind]
    expected = shown(content)
    if kind == "TIFF of 16 bits":  # which PIL does not bring to 8
        expected = np.dstack([np.array(Image.open(io.BytesIO(content))) >> 8] * 3)
    decoded = decode_image(content)
    image = prepare_image(decoded, decoded.shape[:2], channels=3)
    assert image.dtype == np.uint8 and image.shape == expected.shape
    tolerance = 4 if kind in LOSSY or kind.startswith("JPEG L") or kind.startswith("JPEG RGB") else 1
    assert np.abs(image.astype(int) - expected).max() <= tolerance
    if decoded.shape[2:] != (4,) and not kind.startswith("AVIF"):  # OpenCV turns no AVIF, and knows less of alpha
        other = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
        assert np.abs(image.astype(int) - other).max() <= tolerance


DEEP = cv2.resize(np.random.RandomState(1).randint(0, 65536, (5, 7, 4)).astype(np.uint16), (40, 30))
DEEP[:, :20, 3] = 65535
EIGHT = (DEEP >> 8).astype(np.uint8)
COLOURS, FOURTH = EIGHT[:, :, :3], EIGHT[:, :, 3:].astype(float)
ON_WHITE = (COLOURS * FOURTH + 255 * (255 - FOURTH)) / 255
GREYS = np.dstack([EIGHT[:, :, 0]] * 3)


def bmp(fourth, size=40, alpha_mask=0, compression=3):
    """COLOURS as a BMP of 32 bits with a header of `size` bytes; `compression` 3 has the channels' masks."""
    pixels = np.dstack([COLOURS[:, :, ::-1], fourth])[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", size, 40, 30, 1, 32, compression, len(pixels), 2835, 2835, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, alpha_mask)
    header = header + masks[:12] * (compression == 3) if size == 40 else (header + masks).ljust(size, b"\0")
    start = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + pixels


def tiff(array, photometric, planar=False, **tags):
    """A TIFF of an array, uncompressed; `tags` are numbers of tags ("t338") and their values of 16 bits."""
    array = array.reshape(*array.shape[:2], -1)
    height, width, channels = array.shape
    strips = [plane.tobytes() for plane in array.transpose(2, 0, 1)] if planar else [array.tobytes()]
    entries = {256: [width], 257: [height], 258: [array.itemsize * 8] * channels, 259: [1], 262: [photometric]}
    entries |= {273: [0] * len(strips), 277: [channels], 278: [height], 279: [len(strip) for strip in strips]}
    entries |= {284: [2 if planar else 1], **{int(tag[1:]): values for tag, values in tags.items()}}
    start = 8 + 2 + 12 * len(entries) + 4
    ends = np.cumsum([start + sum(10 for values in entries.values() if len(values) > 2)] + [len(s) for s in strips])
    entries[273], directory, rest = ends[:-1].tolist(), struct.pack("<H", len(entries)), b""
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(values) > 2:
            rest, packed = rest + packed.ljust(10, b"\0"), struct.pack("<I", start + len(rest))
        directory += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8) + directory + bytes(4) + rest + b"".join(strips)


KNOWN = {  # files made by hand: what is in them, as their formats' specifications have it
    "BMP, masks of three channels": (bmp(0 * FOURTH.astype(np.uint8)), COLOURS),
    "BMP, fourth byte is noise": (bmp(EIGHT[:, :, 3], compression=0), COLOURS),
    "BMP V5, no mask for alpha": (bmp(EIGHT[:, :, 3], 124), COLOURS),
    "BMP V5, masks are not in use": (bmp(EIGHT[:, :, 3], 124, 0xFF000000, 0), COLOURS),
    "BMP V4, alpha": (bmp(EIGHT[:, :, 3], 108, 0xFF000000), ON_WHITE),
    "BMP V5, alpha": (bmp(EIGHT[:, :, 3], 124, 0xFF000000), ON_WHITE),
    "TIFF, fourth is unspecified": (tiff(EIGHT, 2, t338=[0]), COLOURS),
    "TIFF, fourth is alpha": (tiff(EIGHT, 2, t338=[2]), ON_WHITE),
    "TIFF, five channels": (tiff(np.dstack([EIGHT, EIGHT[:, :, 0]]), 2, t338=[0, 0]), COLOURS),
    "TIFF, a plane each": (tiff(COLOURS, 2, planar=True), COLOURS),
    "TIFF, white is zero": (tiff(255 - EIGHT[:, :, 0], 0), GREYS),
    "TIFF, grey and alpha": (tiff(GREYS[:, :, :2], 1, t338=[0]), GREYS),
    "TIFF of 16 bits": (tiff(DEEP[:, :, :3], 2), COLOURS),
    "TIFF of 16 bits, alpha": (tiff(DEEP, 2, t338=[2]), ON_WHITE),
    "TIFF of 16 bits, turned": (tiff(DEEP[:, :, :3], 2, t274=[6]), np.rot90(COLOURS, -1)),
    "PNG, EXIF is none": (encoded(Image.fromarray(COLOURS), "PNG", exif=b"Exif\0\0neither"), COLOURS),
    "PGM up to 100": (b"P5 3 1 100\n\x00\x32\x64", np.dstack([[[0, 127.5, 255]]] * 3)),
    "PGM up to 1023": (b"P5 2 1 1023\n\x01\xf4\x03\xff", np.dstack([[[124.6, 255]]] * 3)),
    "PPM up to 100": (b"P6 1 1 100\n\x00\x32\x64", np.array([[[0, 127.5, 255]]])),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_channels_and_values_are_what_the_file_says(kind):
    image = decode_image(KNOWN[kind][0])
    image = prepare_image(image, image.shape[:2], channels=3).astype(int)
    assert image.shape == KNOWN[kind][1].shape and np.abs(image - KNOWN[kind][1]).max() <= 1


@pytest.mark.parametrize("bits", [10, 12])
def test_avif_of_more_than_8_bits_has_its_full_range(bits):
    wide = cv2.resize(DEEP, (64, 64)) >> (16 - bits)
    content = cv2.imencode(".avif", wide, [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100])[1].tobytes()
    expected = (wide >> (bits - 8))[:, :, [2, 1, 0, 3]].astype(int)
    assert np.abs(decode_image(content) - expected).max() <= 4


def raw_tiff(array):
    return cv2.imencode(".tiff", array)[1].tobytes()


REFUSED = {
    "floats": (encoded(Image.fromarray(np.linspace(0, 1, 1200).reshape(30, 40).astype(np.float32)), "TIFF"), "unsign"),
    "signed": (raw_tiff(np.arange(1200).reshape(30, 40).astype(np.int16) - 600), "unsigned"),
    "signed of 8 bits": (tiff(EIGHT[:, :, 0], 1, t339=[2]), "unsigned"),
    "32 bits": (encoded(Image.fromarray(np.arange(1200).reshape(30, 40).astype(np.int32)), "TIFF"), "unsigned"),
    "floats in a PFM": (b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0, 1), "unsigned"),
    "white is zero, in 16 bits": (tiff(65535 - DEEP[:, :, 0], 0), "zero as white"),
    "12 bits": (tiff(DEEP[:, :, 0], 1, t258=[12]), "12 bits"),
    "planes of 16 bits": (tiff(DEEP[:, :, :3], 2, planar=True), "as Pillow"),
    "CMYK of 16 bits": (tiff(DEEP, 5), "as Pillow"),
    "fourth of 16 bits is unspecified": (tiff(DEEP, 2, t338=[0]), "as Pillow"),
    "PPM up to 1023": (b"P6 1 1 1023\n\0\0\x01\xf4\x03\xff", "as Pillow"),
    "JPEG 2000, fourth is not named": (encoded(RGBA, "JPEG2000", no_jp2=True), "fourth"),
    "TGA": (encoded(RGB, "TGA"), "TGA is not supported"),
    "PCX": (encoded(RGB, "PCX"), "PCX is not supported"),
    "ICO": (encoded(RGB, "ICO"), "ICO is not supported"),
    "cut": (LOSSLESS["PNG"][:40], "Pillow"),
    "half a JPEG": (LOSSY["JPEG"][: len(LOSSY["JPEG"]) // 2], "runcated"),
    "nothing": (b"", "Pillow"),
    "text": (b"not an image at all", "Pillow"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_image_that_cannot_be_shown_is_refused_with_the_reason(kind):
    with pytest.raises(ValueError, match=REFUSED[kind][1]):
        decode_image(REFUSED[kind][0])


def save(folder, **content):
    """Write files as train/<class>/* and test/<class>/*: two classes with the same `content` {name: bytes}."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for file, encoded_image in content.items():
                (folder / split / name / file.replace("_", ".")).write_bytes(encoded_image)
    return folder


def info_of(folder):
    return json.loads((folder / "dataset.json").read_text())


def test_icons_whose_shape_is_in_the_alpha_channel(make, tmp_path, capsys):
    icon = np.zeros((64, 64, 4), np.uint8)
    icon[16:48, 16:48, 3] = 255
    save(tmp_path / "icons", icon_png=cv2.imencode(".png", icon)[1].tobytes(), full_png=LOSSLESS["PNG"])
    folder = make("Icons", "--source", tmp_path / "icons", "--num_clients", 2)
    squares = [image for _, image in images(folder, "train") if (image[:8] == 255).all()]
    assert len(squares) == 2 and all((image[9:23, 9:23] == 0).all() for image in squares)
    assert capsys.readouterr().out.count("images with transparent parts, put on white: 4") == 1


def test_set_with_nothing_transparent_says_nothing_of_it(make, tmp_path, capsys):
    opaque = RGBA.copy()
    opaque.putalpha(255)
    save(tmp_path / "opaque", a_png=encoded(opaque, "PNG"), b_png=LOSSLESS["PNG grey"])
    make("Opaque", "--source", tmp_path / "opaque", "--num_clients", 2)
    assert "transparent" not in capsys.readouterr().out


def ramp(low, high):
    return np.linspace(low, high, 32 * 32).round().reshape(32, 32).astype(np.uint16)


@pytest.mark.parametrize(
    "low, high", [(0, 1023), (0, 4095), (0, 16383), (800, 1400), (29000, 31000), (0, 255), (40000, 65535), (7, 7)]
)
@pytest.mark.parametrize("extension", [".png", ".tiff", ".pgm"])
def test_16_bit_values_are_scaled_by_the_range_of_the_whole_set(make, tmp_path, capsys, low, high, extension):
    middle = (low + high) // 2
    for split, name, array in (  # the test set has the greatest values
        ("train", "a", ramp(low, middle)), ("train", "b", ramp(middle, middle)),
        ("test", "a", ramp(middle, high)), ("test", "b", ramp(low, low)),
    ):  # fmt: skip
        for index in range(2):
            path = tmp_path / "xray" / split / name / f"{index}{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(extension, array)[1].tobytes())
    folder = make("Xray", "--source", tmp_path / "xray", "--num_clients", 2)
    assert info_of(folder)["levels"] == [low, high] and info_of(folder)["channels"] == 1

    def scaled(array):
        return np.rint((array.astype(float) - low) * 255 / max(high - low, 1))

    by_label = {split: dict(images(folder, split)) for split in ("train", "test")}
    assert np.abs(by_label["train"][0] - scaled(ramp(low, middle))).max() <= 1
    assert np.abs(by_label["test"][0] - scaled(ramp(middle, high))).max() <= 1
    assert by_label["test"][1].max() == 0 and np.ptp(by_label["train"][1]) == 0
    if high - low >= 600:
        assert len(np.unique(by_label["train"][0])) > 120  # not 3 levels
    assert (
        capsys.readouterr().out.count(f"16-bit images with values from {low} to {high} only, scaled to 0..255: 8\n")
        == 1
    )


def test_16_bit_images_that_use_their_range_give_their_upper_byte_without_a_word(make, tmp_path, capsys):
    save(tmp_path / "deep", a_png=cv2.imencode(".png", ramp(0, 65535))[1].tobytes(), b_png=LOSSLESS["PNG grey"])
    folder = make("Deep", "--source", tmp_path / "deep", "--num_clients", 2)
    assert info_of(folder)["levels"] is None and "16 bits" not in capsys.readouterr().out
    assert sum(np.array_equal(image, ramp(0, 65535) >> 8) for _, image in images(folder, "train")) == 2


def test_set_of_8_and_16_bits_scales_the_16_alone(make, tmp_path, capsys):
    eight = np.arange(1024).reshape(32, 32).astype(np.uint8)
    save(tmp_path / "mixed", a_png=cv2.imencode(".png", ramp(1000, 2000))[1].tobytes(), b_bmp=encoded(
        Image.fromarray(eight), "BMP"))  # fmt: skip
    folder = make("Mixed", "--source", tmp_path / "mixed", "--num_clients", 2)
    assert info_of(folder)["levels"] == [1000, 2000]
    assert sum(np.array_equal(image, eight) for _, image in images(folder, "train")) == 2
    assert "values from 1000 to 2000 only, scaled to 0..255: 4\n" in capsys.readouterr().out


def test_alpha_of_16_bits_is_put_on_the_white_of_the_scaled_image(make, tmp_path):
    image = np.zeros((32, 32, 4), np.uint16)
    image[8:24, 8:24] = 1000, 1000, 1000, 65535
    image[8:24, 8:16, :3] = 3000
    image[0, 0, :3] = 65535  # a value that nobody sees
    save(tmp_path / "deep", a_png=cv2.imencode(".png", image)[1].tobytes())
    folder = make("Deep", "--source", tmp_path / "deep", "--num_clients", 1)
    assert info_of(folder)["levels"] == [1000, 3000]
    for _, written in images(folder, "train"):
        assert (written[:8] == 255).all() and (written[8:24, 8:16] == 255).all() and (written[8:24, 16:24] == 0).all()


@pytest.mark.parametrize(
    "flags, size", [((), (32, 32)), (("--image_size", 48), (48, 48)), (("--image_size", "20x44"), (20, 44))]
)
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_photos_are_brought_to_one_size_once(make, tmp_path, flags, size, fit):
    photo = cv2.resize(np.random.RandomState(0).randint(0, 256, (30, 40, 3)).astype(np.uint8), (400, 300))
    tall = np.ascontiguousarray(photo.transpose(1, 0, 2))
    contents = {"a_png": cv2.imencode(".png", photo)[1].tobytes(), "b_bmp": cv2.imencode(".bmp", tall)[1].tobytes()}
    save(tmp_path / "photos", **contents)
    folder = make("Photos", "--source", tmp_path / "photos", "--num_clients", 2, "--fit", fit, "--bundles", *flags)
    assert info_of(folder)["image_size"] == list(size) and info_of(folder)["fit"] == fit

    def expected(image):
        height, width = image.shape[:2]
        if fit == "crop":  # the largest part in the proportion of `size`, in the middle
            scale = min(height / size[0], width / size[1])
            rows, columns = round(size[0] * scale), round(size[1] * scale)
            top, left = (height - rows) // 2, (width - columns) // 2
            image = image[top : top + rows, left : left + columns]
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)[:, :, ::-1]

    written = [image for _, image in images(folder, "train")]
    for image in (photo, tall):
        assert sum(np.array_equal(expected(image), other) for other in written) == 2
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 300_000


@pytest.mark.parametrize("value", ["0", "-1", "x", "32x", "3.5", "10x0", "100000", ""])
def test_sizes_that_are_none(make, value):
    with pytest.raises(UserError, match="--image_size"):
        make("Shapes10", f"--image_size={value}")
