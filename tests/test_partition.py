"""partition.py: each image goes to one shard, as it was, from every kind of source; and nothing is ever half done."""

import contextlib
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

from libs import UserError
from plumbing.laptop import drawing, pictures
from plumbing.sources import official
from plumbing.sources.shapes import draw_shapes

import cv2
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from helpers import Suite, free_port, images, shards, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import partition
from data import describe_dataset, load_shard, load_test
from nets import LeNet5

TABLEAU = matplotlib.colormaps["tab10"].colors

# ---------------------------------------------------------------------------------------------------------------------
# Shards.


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
@pytest.mark.parametrize("num_clients", [1, 7, 300])
def test_each_training_image_is_in_one_shard_and_shards_are_equal(make, shapes_zip, num_clients, scheme):
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", num_clients, "--partition", scheme)
    tables = shards(folder)
    assert len(tables) == num_clients
    assert sorted(pd.concat(tables)["id"]) == list(range(600))
    sizes = {len(table) for table in tables}
    assert max(sizes) - min(sizes) == (600 % num_clients > 0)
    for table in tables:
        assert list(table.columns) == ["id", "label", "phase"]
        assert set(table["phase"]) == {"fit", "eval"}
    test = pd.read_csv(folder / "test.csv")
    assert list(test.columns) == ["id", "label"] and sorted(test["id"]) == list(range(100))


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.25, 0.9, 0.999])
def test_eval_fraction_of_each_shard_is_for_evaluation(make, shapes_zip, fraction):
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", 7, "--eval_fraction", fraction)
    for table in shards(folder):
        count = (table["phase"] == "eval").sum()
        assert abs(count - fraction * len(table)) <= 0.5 or count in (1, len(table) - 1)


def test_the_server_knows_how_many_images_each_shard_has(make, shapes_zip):
    from data import describe_dataset

    folder = make("Sizes", "--source", shapes_zip, "--num_clients", 7, "--sizes", "lognormal", "--eval_fraction", 0.3)
    counts = [table["phase"].value_counts() for table in shards(folder)]
    expected = {cid: (count["fit"], count["eval"]) for cid, count in enumerate(counts)}
    assert describe_dataset("Sizes", folder)["sizes"] == expected


def test_same_seed_gives_the_same_bytes_in_another_process(make, shapes_zip, three_shards):
    assert tree(make("Tiny", "--source", shapes_zip, "--num_clients", 3)) == tree(three_shards / "Tiny")


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
def test_seed_decides_on_the_shuffle_alone(make, shapes_zip, scheme):
    def run(seed):
        return tree(make("Tiny", "--source", shapes_zip, "--partition", scheme, "--seed", seed, "--bundles"))

    first, second, other = run(1), run(1), run(2)
    assert first == second
    assert first.keys() == other.keys()
    changed = {name for name in first if first[name] != other[name]}
    names = {f"clients/client_{cid}.csv" for cid in range(10)} | {f"bundles/client_{cid}.tar" for cid in range(10)}
    assert changed == names | {"dataset.json", "partition.png"}


def test_iid_shards_have_all_classes_though_the_source_is_sorted_by_class(make, shapes_zip):
    for table in shards(make("Tiny", "--source", shapes_zip, "--num_clients", 5)):
        for phase in ("fit", "eval"):
            assert table["label"][table["phase"] == phase].nunique() >= 8


def test_dirichlet_is_the_more_skewed_the_smaller_alpha():
    distances, labels = [], np.arange(600) % 10
    for alpha in (0.05, 1, 10, 1e6):
        mixes = []
        for seed in (1, 2, 3):
            parts = partition.split_dirichlet(labels, [120] * 5, np.random.RandomState(seed), alpha)
            mixes += [np.bincount(labels[part], minlength=10) / len(part) for part in parts]
        distances.append(np.mean([np.abs(mix - 0.1).sum() / 2 for mix in mixes]))  # total variation distance
    assert all(more > less + 0.05 for more, less in zip(distances, distances[1:])), distances
    assert distances[0] > 0.6 and distances[-1] < 0.17  # 120 draws from ten equal classes lie near 0.11


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 4).flatmap(lambda classes: st.lists(st.integers(0, classes - 1), min_size=2, max_size=200)),
    st.integers(1, 100),
    st.floats(-6, 6).map(lambda exponent: 10**exponent),
    st.integers(0, 2**32 - 1),
)
def test_dirichlet_keeps_its_promises_for_any_labels_and_alpha(labels, num_clients, alpha, seed):
    labels = np.array(labels)
    num_clients = min(num_clients, len(labels) // 2)
    rng = np.random.RandomState(seed)
    for kind in ("equal", "lognormal"):
        wanted = partition.draw_sizes(len(labels), num_clients, rng, kind)
        parts = partition.split_dirichlet(labels, wanted, rng, alpha)
        assert sorted(np.concatenate(parts)) == list(range(len(labels)))
        sizes = [len(part) for part in parts]
        assert sizes == wanted and len(sizes) == num_clients and min(sizes) >= 2
        assert kind == "lognormal" or max(sizes) - min(sizes) <= 1


def test_shards_are_two_slices_of_the_images_in_the_order_of_their_classes(make, shapes_zip):
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", 20, "--partition", "shards")
    tables = shards(folder)
    assert sorted(pd.concat(tables)["id"]) == list(range(600)) and {len(table) for table in tables} == {30}
    counts = np.stack([np.bincount(table["label"], minlength=10) for table in tables])
    assert set(counts.ravel()) == {0, 15, 30}  # 40 slices of 15, four a class
    again = tree(folder / "clients")
    args = ("--source", shapes_zip, "--num_clients", 20, "--partition", "shards")
    assert tree(make("Tiny", *args) / "clients") == again
    assert tree(make("Tiny", *args, "--seed", 1) / "clients") != again
    with pytest.raises(UserError, match="--sizes lognormal"):
        make("Tiny", *args, "--sizes", "lognormal")


@pytest.mark.parametrize("scheme", ["iid", "dirichlet"])
def test_lognormal_sizes_differ_as_their_name_says(make, shapes_zip, scheme):
    tables = []
    for seed in range(4):
        args = ("--num_clients", 30, "--partition", scheme, "--sizes", "lognormal", "--seed", seed)
        folder = make("Tiny", "--source", shapes_zip, *args)
        assert sorted(pd.concat(shards(folder))["id"]) == list(range(600))
        assert all(set(table["phase"]) == {"fit", "eval"} for table in shards(folder))
        tables += shards(folder)
    logarithms = np.log([len(table) - 2 for table in tables if len(table) > 4])  # beyond the two that each has
    assert 0.7 < logarithms.std() < 1.2, logarithms.std()


def test_show_prints_what_is_there_and_changes_nothing(make, shapes_zip, capsys):
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", 3, "--partition", "dirichlet", "--alpha", 0.2)
    before = tree(folder)
    capsys.readouterr()
    make("Tiny", "--show")
    table = pd.read_csv(io.StringIO(capsys.readouterr().out), sep=r"\s+", index_col="cid")
    assert tree(folder) == before
    for cid, shard in enumerate(shards(folder)):
        phases = shard["phase"].value_counts()
        expected = [*np.bincount(shard["label"], minlength=10), len(shard), phases["fit"], phases["eval"]]
        assert list(table.loc[str(cid)]) == expected
    assert list(table.loc["all"]) == list(table.iloc[:3].sum())
    assert json.loads((folder / "dataset.json").read_text())["split"] == table.iloc[:3, :10].to_numpy().tolist()
    lines = (folder / "clients" / "client_1.csv").read_text().splitlines()
    (folder / "clients" / "client_1.csv").write_text("\n".join([*lines, "9,10,fit"]))
    with pytest.raises(UserError, match="client_1.csv, line .*: label 10 is not in 0..9"):
        make("Tiny", "--show")
    with pytest.raises(UserError, match=r"tiny has no dataset.json .* \(--dataset can be Tiny\)"):
        make("tiny", "--show")


def test_partition_png_shows_each_class_of_each_client_as_high_as_its_count(make, shapes_zip):
    args = ("--num_clients", 2, "--partition", "dirichlet", "--alpha", 0.5)
    folder = make("Tiny", "--source", shapes_zip, *args, "--sizes", "lognormal")
    picture = np.array(Image.open(folder / "partition.png").convert("RGB"))
    assert 800 < picture.shape[1] < 1100 and 400 < picture.shape[0] < 520
    split = np.array(json.loads((folder / "dataset.json").read_text())["split"])
    # Two bars; right of the second is the legend.
    bars = picture[:, : picture.shape[1] * 4 // 9], picture[:, picture.shape[1] * 4 // 9 : picture.shape[1] * 6 // 7]
    colours = [np.round(np.array(colour) * 255) for colour in TABLEAU]
    pixels = np.array([[np.all(bar == colour, axis=2).sum() for colour in colours] for bar in bars])
    assert np.allclose(pixels / pixels.sum(), split / split.sum(), atol=0.01), (pixels, split)


@pytest.fixture
def legend(monkeypatch):
    """The names in the legends of the pictures that are drawn, with the fonts that matplotlib brings alone."""
    fonts = font_manager.fontManager
    monkeypatch.setattr(fonts, "ttflist", [font for font in fonts.ttflist if font.name.startswith("DejaVu")])
    drawing.fonts_for.cache_clear()
    names, real = [], Axes.legend

    def legend(figure, handles, labels, **kwargs):
        drawn = real(figure, handles, labels, **kwargs)
        names.extend(text.get_text() for text in drawn.get_texts())
        return drawn

    monkeypatch.setattr(Axes, "legend", legend)
    yield names
    drawing.fonts_for.cache_clear()


def test_names_of_classes_are_drawn_as_they_are_whatever_letters_they_have(tmp_path, legend):
    classes = ["_unknown_", "$10-$20", "rich $_$ face", "a\x1b[2J\nb", "\u732b", "\udcff", "x" * 99]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures.draw_split(tmp_path / "x.png", "$_$ \u732b", [[1, 0, 3, 1, 1, 1, 1], [0, 2, 0, 1, 1, 1, 1]], classes)
    assert (tmp_path / "x.png").stat().st_size > 5000
    names = ["_unknown_", r"\$10-\$20", r"rich \$_\$ face", "a?[2J b", "4", "?", "x" * 29 + "…"]
    assert [name.strip() for name in legend[::-1]] == names


def font_with(letters, path):
    """Write a font in which each of the `letters` is a square."""
    square, pen = TTGlyphPen(None), FontBuilder(1000, isTTF=True)
    square.moveTo((0, 0))
    for corner in ((0, 500), (500, 500), (500, 0)):
        square.lineTo(corner)
    square.closePath()
    pen.setupGlyphOrder([".notdef", "square"])
    pen.setupCharacterMap({ord(letter): "square" for letter in letters})
    pen.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": square.glyph()})
    pen.setupHorizontalMetrics({".notdef": (600, 0), "square": (600, 0)})
    pen.setupHorizontalHeader(ascent=800, descent=-200)
    pen.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    pen.setupOS2()
    pen.setupPost()
    pen.save(path)


def test_names_are_drawn_in_a_font_that_has_their_letters_and_else_as_numbers_which_is_said_once(
    tmp_path, legend, capsys
):
    classes, split = ["cat", "\u732b", "\u72ac, a dog"], [[1, 2, 3]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            pictures.draw_split(tmp_path / "x.svg", "\u732b", split, classes)
        assert legend[::-1] == ["cat", "1", "2"] * 2
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("note: no font here has all letters of some classes") and "1 for \u732b, 2 " in line
        font_with("\u732b", tmp_path / "squares.ttf")
        font_manager.fontManager.addfont(tmp_path / "squares.ttf")
        drawing.fonts_for.cache_clear()
        drawing.name_classes.cache_clear()
        for kind in ("png", "svg", "pdf"):
            pictures.draw_split(tmp_path / f"x.{kind}", "\u732b", split, classes)
    assert legend[:-7:-3] == ["cat", "cat"] and legend[-1:-4:-1] == ["cat", "\u732b", "2"]


def test_thousand_classes_of_a_thousand_clients_are_drawn_in_seconds(tmp_path):
    split, started = np.random.RandomState(0).multinomial(500, np.full(1000, 1e-3), 1000), time.monotonic()
    pictures.draw_split(tmp_path / "x.png", "many", split.tolist(), [str(label) for label in range(1000)])
    assert time.monotonic() - started < 20


def test_picture_that_fails_does_not_fail_the_run(make, shapes_zip, monkeypatch, capsys):
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: 1 / 0)
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", 2)
    assert (folder / "dataset.json").exists() and not (folder / "partition.png").exists()
    assert "warning: draw_split failed, so its picture is missing: division by zero" in capsys.readouterr().out


def test_dataset_json_says_where_the_data_came_from_and_how_it_was_cut(make, shapes_zip):
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", 3, "--eval_fraction", 0.25, "--seed", 7)
    info = json.loads((folder / "dataset.json").read_text())
    assert hashlib.md5(shapes_zip.read_bytes()).hexdigest() in info.pop("checksum")
    digests = [info.pop("id"), info.pop("test"), *info.pop("shards")]  # tests/test_split.py has more on them
    assert len(set(digests)) == 5 and all(re.fullmatch("[0-9a-f]{32}", digest) for digest in digests)
    pixels = np.stack([image for _, image in images(folder, "train")]) / 255
    assert info == {
        "dataset": "Tiny",
        "classes": "bar circle cross diamond hexagon ring sector square star triangle".split(),
        "channels": 3,
        "image_size": [32, 32],
        "fit": "squash",
        "levels": None,
        "mean": pytest.approx(pixels.mean((0, 1, 2)), abs=1e-9),
        "std": pytest.approx(pixels.std((0, 1, 2)), abs=1e-9),
        "num_train": 600,
        "num_test": 100,
        "num_clients": 3,
        "partition": "iid",
        "sizes": "equal",
        "alpha": None,
        "eval_fraction": 0.25,
        "seed": 7,
        "split": [[(table["label"] == label).sum() for label in range(10)] for table in shards(folder)],
        "source": str(shapes_zip),
    }
    assert {name: describe_dataset("Tiny", folder)[name] for name in ("mean", "std", "split")}.items() <= info.items()


@pytest.mark.parametrize("mode, channels", [("L", 1), ("RGB", 3)])
def test_mean_and_spread_are_those_of_the_training_images_as_written(make, tmp_path, mode, channels):
    write_pictures(tmp_path / "pictures", "png", mode)
    Image.new("L", (40, 40), 200).save(tmp_path / "pictures" / "train" / "ant" / "grey.png")
    folder = make("Pictures", "--source", tmp_path / "pictures", "--num_clients", 2)
    pixels = np.stack([image for _, image in images(folder, "train")]).reshape(-1, channels) / 255
    info = describe_dataset("Pictures", folder)
    assert info["mean"] == pytest.approx(pixels.mean(0), abs=1e-9)
    assert info["std"] == pytest.approx(pixels.std(0), abs=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Archives in CIFAR-10's layout.


def test_real_images_arrive_as_an_independent_reader_sees_them(make, cifar10, tmp_path):
    subprocess.run([sys.executable, cifar10 / "build_archive", tmp_path, "20"], check=True, timeout=60)
    archive = tmp_path / "cifar-10-python.tar.gz"
    folder = make("CIFAR10", "--source", archive, "--num_clients", 3)
    with tarfile.open(archive) as tar:
        members = {Path(member.name).name: pickle.load(tar.extractfile(member), encoding="bytes") for member in tar}
    for split, names in (("train", [f"data_batch_{k}" for k in range(1, 6)]), ("test", ["test_batch"])):
        expected = []
        for name in names:
            for label, row in zip(members[name][b"labels"], members[name][b"data"]):
                expected.append((label, np.dstack([row[:1024], row[1024:2048], row[2048:]]).reshape(32, 32, 3)))
        written = images(folder, split)
        assert {(image.dtype, image.shape) for _, image in written} == {(np.dtype(np.uint8), (32, 32, 3))}
        assert len(expected) == {"train": 200, "test": 40}[split]
        assert sorted((label, image.tobytes()) for label, image in written) == sorted(
            (label, image.tobytes()) for label, image in expected
        )
    info = json.loads((folder / "dataset.json").read_text())
    assert info["classes"] == "airplane automobile bird cat deer dog frog horse ship truck".split()
    assert info["channels"] == 3 and info["image_size"] == [32, 32]


def write_archive(path, **members):
    """A small archive in CIFAR-10's layout, with random images; `members` adds pickles or replaces some of its own."""
    rng = np.random.RandomState(0)
    content = {"batches.meta": pickle.dumps({b"label_names": [b"cat", b"dog"]}, protocol=2)}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        batch = {b"data": rng.randint(0, 256, (4, 3072)).astype(np.uint8), b"labels": [0, 1, 0, 1]}
        content[name] = pickle.dumps(batch, protocol=2)
    with tarfile.open(path, "w:gz") as tar:
        for name, payload in {**content, **members}.items():
            member = tarfile.TarInfo(name if "/" in name else f"cifar-10-batches-py/{name}")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return path


class Evil:
    """Calls what it was given when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def evil_pickle(kind, path):
    """A pickle that makes the file `path`."""
    code = f"open({str(path)!r}, 'w')"
    if kind == "system":
        return pickle.dumps(Evil(os.system, (f"touch {path}",)), protocol=2)
    if kind == "eval":
        return pickle.dumps({b"data": Evil(eval, (code,)), b"labels": [0]}, protocol=2)
    return b"cnumpy.testing\nrundocs\n0" + pickle.dumps(Evil(exec, (code,)), protocol=2)  # through an admitted package


@pytest.mark.parametrize("kind", ["system", "eval", "numpy"])
@pytest.mark.parametrize("member", ["data_batch_1", "batches.meta"])
def test_pickle_that_runs_code_is_refused(make, tmp_path, kind, member):
    bait = tmp_path / "bait"
    payload = evil_pickle(kind, bait)
    archive = write_archive(tmp_path / "evil.tar.gz", **{member: payload})
    with pytest.raises(UserError, match="evil.tar.gz"):
        make("Evil", "--source", archive, "--num_clients", 2)
    assert not bait.exists() and tree(tmp_path / "datasets") == {}
    pickle.loads(payload)  # the bait is a real one
    assert bait.exists()


def test_pickle_that_runs_code_ends_the_script_with_2(suite):
    archive = write_archive(suite.root / "evil.tar.gz", data_batch_1=evil_pickle("system", suite.root / "bait"))
    process = suite.run("partition.py", "--dataset", "Evil", "--source", archive, "--num_clients", 2)
    assert process.popen.returncode == 2 and process.err.count("\n") == 1 and "evil.tar.gz" in process.err
    assert not (suite.root / "bait").exists()


def outside(folder):
    return {name: content for name, content in tree(folder).items() if Path(name).parts[0] != "datasets"}


def test_archive_with_paths_that_lead_out_writes_nothing_outside(make, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    names = ["../out.npy", "../../../out.npy", "cifar-10-batches-py/../../out.npy", f"{work}/out.npy"]
    archive = write_archive(work / "a.tar.gz", **dict.fromkeys(names, b"x"))
    before = outside(tmp_path)
    folder = make("Paths", "--source", archive, "--num_clients", 2)
    assert outside(tmp_path) == before
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["Paths"]
    assert len(images(folder, "train")) == 20


def test_zip_with_paths_that_lead_out_writes_nothing_outside(make, tmp_path, shapes_zip):
    work = tmp_path / "work"
    work.mkdir()
    source = work / "evil.zip"
    shutil.copy(shapes_zip, source)
    png = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    with zipfile.ZipFile(source, "a") as archive:
        for name in ("../out.png", "train/../out.png", "train/bar/../../../out.png", f"{work}/out.png"):
            archive.writestr(name, png)
    before = outside(tmp_path)
    with contextlib.suppress(UserError):  # to take the rest or to refuse it all are both fine
        make("Paths", "--source", source, "--num_clients", 2)
    assert outside(tmp_path) == before
    assert {path.name for path in (tmp_path / "datasets").iterdir()} <= {"Paths"}


# ---------------------------------------------------------------------------------------------------------------------
# Folders and zips of images.


def write_pictures(folder, extension, mode="RGB", **options):
    """Images of two classes as train/<class>/* and test/<class>/*: [(split, class, PIL's pixels at 32×32)].

    Some are of that size, others larger; PIL knows INTER_AREA as BOX only where it divides, so OpenCV resizes them.
    """
    rng = np.random.RandomState(0)
    expected = []
    for number, (split, name) in enumerate((s, c) for s in ("train", "test") for c in ("zebra", "ant") for _ in "123"):
        small = rng.randint(0, 256, (4, 4, 3)).astype(np.uint8)
        size = (20 + number, 40 - number) if number % 3 else (32, 32)
        picture = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC).convert(mode)
        path = folder / split / name / f"{number}.{extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)
        with Image.open(path) as reread:
            pixels = np.array(reread.convert("L" if mode == "L" else "RGB"))
        expected.append((split, name, cv2.resize(pixels, (32, 32), interpolation=cv2.INTER_AREA)))
    return expected


def zipped(folder):
    return Path(shutil.make_archive(str(folder), "zip", folder))


def check_pictures(folder, expected, tolerance=0):
    """Each picture is there once, in its split and class."""
    info = json.loads((folder / "dataset.json").read_text())
    assert info["classes"] == ["ant", "zebra"] and info["image_size"] == [32, 32]
    written = [(split, label, image) for split in ("train", "test") for label, image in images(folder, split)]
    assert len(written) == len(expected)
    for split, name, pixels in expected:
        for index, (written_split, label, image) in enumerate(written):
            assert image.dtype == np.uint8 and image.shape == pixels.shape
            if (written_split, info["classes"][label]) == (split, name):
                if np.abs(image.astype(int) - pixels).max() <= tolerance:
                    del written[index]
                    break
        else:
            raise AssertionError(f"no such image in {split}/{name}")


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("extension, mode", [("png", "RGB"), ("bmp", "RGB"), ("png", "P"), ("png", "RGBA")])
def test_lossless_images_arrive_with_the_pixels_that_pil_reads(make, tmp_path, extension, mode, packed):
    source = tmp_path / "pictures"
    expected = write_pictures(source, extension, mode)
    check_pictures(make("Pictures", "--source", zipped(source) if packed else source, "--num_clients", 2), expected)


def test_jpegs_arrive_nearly_as_pil_reads_them(make, tmp_path):
    expected = write_pictures(tmp_path / "pictures", "jpg", quality=95)
    check_pictures(make("Pictures", "--source", tmp_path / "pictures", "--num_clients", 2), expected, tolerance=4)


@pytest.mark.parametrize("name", ["FashionMNIST", "Pictures"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_dataset_of_grey_images_is_grey(make, tmp_path, packed, name):
    source = tmp_path / "pictures"
    expected = write_pictures(source, "png", "L")
    folder = make(name, "--source", zipped(source) if packed else source, "--num_clients", 2)
    check_pictures(folder, expected)
    assert {image.ndim for _, image in images(folder, "train")} == {2}
    assert json.loads((folder / "dataset.json").read_text())["channels"] == 1
    assert load_shard(folder, 0, "cpu")[0]["fit"].dataset.images.shape[1:] == (1, 32, 32)


def test_grey_images_in_a_coloured_dataset_get_three_equal_channels(make, tmp_path):
    expected = write_pictures(tmp_path / "pictures", "png", "L")
    (tmp_path / "pictures" / "test" / "ant" / "9.png").unlink()  # its place is taken by a coloured one
    coloured = np.full((32, 32, 3), (10, 200, 90), np.uint8)
    Image.fromarray(coloured).save(tmp_path / "pictures" / "test" / "ant" / "9.png")
    expected = [(split, name, np.dstack([grey] * 3)) for split, name, grey in expected]
    expected[9] = "test", "ant", coloured
    folder = make("MNIST-M", "--source", tmp_path / "pictures", "--num_clients", 2)
    check_pictures(folder, expected)
    assert json.loads((folder / "dataset.json").read_text())["channels"] == 3
    load_shard(folder, 0, "cpu")
    load_test(folder)


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR-100 and IDX files.


def test_cifar100_is_read_with_its_fine_labels(make, tmp_path):
    rng = np.random.RandomState(0)
    pixels = {"train": rng.randint(0, 256, (12, 3072), np.uint8), "test": rng.randint(0, 256, (6, 3072), np.uint8)}
    fine = {split: [index % 3 for index in range(len(rows))] for split, rows in pixels.items()}
    content = {
        name: {b"data": pixels[name], b"fine_labels": fine[name], b"coarse_labels": [0] * len(fine[name])}
        for name in pixels
    }
    content["meta"] = {b"fine_label_names": [b"apple", b"bee", b"cup"], b"coarse_label_names": [b"things"]}
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, what in content.items():
        (folder / name).write_bytes(pickle.dumps(what, protocol=2))
    (folder / "file.txt~").write_text("as in the official archive")
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as tar:
        tar.add(folder, folder.name)
    for source in (folder, tmp_path, tmp_path / "cifar-100-python.tar.gz"):
        made = make("CIFAR100", "--source", source, "--num_clients", 2)
        assert json.loads((made / "dataset.json").read_text())["classes"] == ["apple", "bee", "cup"]
        assert sorted(pd.concat(shards(made))["label"]) == sorted(fine["train"])
        for index, row in enumerate(pixels["test"]):
            image = np.load(made / "test" / f"{index}.npy")
            assert np.array_equal(image, row.reshape(3, 32, 32).transpose(1, 2, 0))
    (folder / "test").unlink()
    with pytest.raises(UserError, match="is incomplete: 'test' of CIFAR-100 is missing"):
        make("CIFAR100", "--source", folder, "--num_clients", 2)


def idx(array):
    """The bytes of an IDX file, as yann.lecun.com/exdb/mnist describes them."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def idx_files(num_train=30, num_test=10, num_classes=5, seed=0):
    """{name: content}, named as MNIST's."""
    rng = np.random.RandomState(seed)
    files = {}
    for split, count in (("train", num_train), ("t10k", num_test)):
        files[f"{split}-images-idx3-ubyte"] = idx(rng.randint(0, 256, (count, 32, 32)))
        files[f"{split}-labels-idx1-ubyte"] = idx(np.arange(count) % num_classes)
    return files


@pytest.mark.parametrize("kind", ["plain", "gzipped", "dots", "zip", "tar.gz", "both"])
def test_four_idx_files_are_read_as_they_are(make, tmp_path, kind):
    files = idx_files()
    stored = dict(files)
    if kind in ("gzipped", "both"):
        stored = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    if kind == "both":
        stored.update(files)
    if kind == "dots":
        stored = {name.replace("-idx", ".idx"): content for name, content in files.items()}
    source = tmp_path / "raw"
    source.mkdir()
    for name, content in stored.items():
        (source / name).write_bytes(content)
        (source / f"._{name}").write_bytes(b"what macOS leaves")
    if kind in ("zip", "tar.gz"):
        source = Path(shutil.make_archive(source, {"zip": "zip", "tar.gz": "gztar"}[kind], source))
    folder = make("Digits", "--source", source, "--num_clients", 2)
    info = json.loads((folder / "dataset.json").read_text())
    assert (info["channels"], info["classes"]) == (1, ["0", "1", "2", "3", "4"])
    for split, name in (("train", "train"), ("test", "t10k")):
        expected = np.frombuffer(files[f"{name}-images-idx3-ubyte"][16:], np.uint8).reshape(-1, 32, 32)
        for index, image in enumerate(expected):
            assert np.array_equal(np.load(folder / split / f"{index}.npy"), image)
    table = pd.concat(shards(folder)).set_index("id").sort_index()
    assert list(table["label"]) == [index % 5 for index in range(30)]


def test_labels_of_idx_files_are_names_and_those_of_fashion_mnist_have_theirs(make, tmp_path):
    files = idx_files()
    for split, count in (("train", 30), ("t10k", 10)):
        files[f"{split}-labels-idx1-ubyte"] = idx(np.array([1, 7])[np.arange(count) % 2])
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    folder = make("Two", "--source", tmp_path, "--num_clients", 2)
    assert json.loads((folder / "dataset.json").read_text())["classes"] == ["1", "7"]
    assert set(pd.concat(shards(folder))["label"]) == {0, 1}
    folder = make("FashionMNIST", "--source", tmp_path, "--num_clients", 2)
    classes = json.loads((folder / "dataset.json").read_text())["classes"]
    assert (len(classes), classes[1], classes[7]) == (10, "Trouser", "Sneaker")
    assert set(pd.concat(shards(folder))["label"]) == {1, 7}


def test_emnist_is_turned_upright_and_named_by_its_mapping(make, tmp_path):
    files, names = idx_files(), {"train": "train", "t10k": "test"}
    for name, data in files.items():
        split, _, rest = name.partition("-")
        if "images" in name:
            data = idx(np.frombuffer(data[16:], np.uint8).reshape(-1, 32, 32).transpose(0, 2, 1))
        (tmp_path / f"emnist-letters-{names[split]}-{rest}").write_bytes(data)
    classes = json.loads((make("Plain", "--source", tmp_path, "--num_clients", 2) / "dataset.json").read_text())[
        "classes"
    ]
    assert classes == ["0", "1", "2", "3", "4"]
    (tmp_path / "emnist-letters-mapping.txt").write_text("".join(f"{n} {65 + n} {97 + n}\n" for n in range(5)))
    (tmp_path / "emnist-digits-mapping.txt").write_text("0 48\n")
    folder = make("Letters", "--source", tmp_path, "--num_clients", 2)
    assert json.loads((folder / "dataset.json").read_text())["classes"] == ["A", "B", "C", "D", "E"]
    written = {image.tobytes(): label for label, image in images(folder, "train")}
    upright = np.frombuffer(files["train-images-idx3-ubyte"][16:], np.uint8).reshape(-1, 32, 32)
    assert [written[image.tobytes()] for image in upright] == [n % 5 for n in range(30)]


def test_qmnist_has_its_labels_first_in_rows_of_int32(make, tmp_path):
    for name, data in idx_files().items():
        name = "qmnist-" + name.replace("t10k", "test")
        if "labels" in name:
            rows = np.random.RandomState(0).randint(0, 2**30, (len(data) - 8, 8))
            rows[:, 0] = np.frombuffer(data[8:], np.uint8)
            name = name.replace("idx1-ubyte", "idx2-int")
            data = struct.pack(">BBBBII", 0, 0, 12, 2, *rows.shape) + rows.astype(">i4").tobytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    folder = make("QMNIST", "--source", tmp_path, "--num_clients", 2)
    assert sorted(label for label, _ in images(folder, "train")) == sorted(n % 5 for n in range(30))


def test_idx_labels_outside_the_named_classes_are_refused_in_a_test_set_too(make, tmp_path):
    for name, data in {**idx_files(), "t10k-labels-idx1-ubyte": idx(np.full(10, 12))}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="label 12 in its test set, which is none of T-shirt/top"):
        make("FashionMNIST", "--source", tmp_path, "--num_clients", 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda files: files.pop("t10k-labels-idx1-ubyte"), "lacks the IDX file with the labels for test"),
        (
            lambda files: files.update({"train-images-idx3-ubyte": files["train-images-idx3-ubyte"][:-1]}),
            "30719 values",
        ),
        (lambda files: files.update({"train-images-idx3-ubyte": b"\0\0\x0d\x03" + b"\0" * 40}), "begins with 00000d03"),
        (lambda files: files.update({"train-labels-idx1-ubyte": idx(np.arange(29) % 5)}), "30 images, but 29 labels"),
        (lambda files: files.update({"t10k-labels-idx1-ubyte": idx(np.full(10, 9))}), "label 9 in its test set"),
        (lambda files: files.update({"t10k-labels-idx1-ubyte": b""}), "t10k-labels-idx1-ubyte cannot be read"),
        (lambda files: files.update({"t10k-labels-idx1-ubyte": b"\x1f\x8bnothing"}), "t10k-labels-idx1-ubyte cannot"),
        (lambda files: files.update({"letters-train-labels-idx1-ubyte": idx(np.zeros(30))}), "labels for train twice"),
    ],
)
def test_idx_files_that_are_not_whole_are_refused_by_name(make, tmp_path, change, message):
    files = idx_files()
    change(files)
    (tmp_path / "raw").mkdir()
    for name, content in files.items():
        (tmp_path / "raw" / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        make("Digits", "--source", tmp_path / "raw", "--num_clients", 2)
    assert not (tmp_path / "datasets" / "Digits").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server of our own.

PAYLOAD = bytes(range(256)) * 1000
MD5 = hashlib.md5(PAYLOAD).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path in self.server.files:
            content = self.server.files[self.path]
            self.answer(content, ("Content-Length", len(content)))
        else:
            getattr(self, self.path[1:])()

    def log_message(self, *args):
        pass

    def answer(self, body, *headers, status=200):
        self.send_response(status)
        for header in headers or [("Content-Length", len(PAYLOAD))]:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def whole(self):
        self.answer(PAYLOAD)

    def changed(self):
        self.answer(b"x" + PAYLOAD[1:])

    def short(self):
        self.answer(PAYLOAD[: len(PAYLOAD) // 2])

    def short_without_length(self):
        self.answer(PAYLOAD[: len(PAYLOAD) // 2], ("Connection", "close"))

    def short_chunked(self):
        self.protocol_version = "HTTP/1.1"
        self.answer(b"1000\r\n" + PAYLOAD[:0x1000] + b"\r\n1000\r\nabc", ("Transfer-Encoding", "chunked"))
        self.close_connection = True

    def reset(self):
        self.answer(PAYLOAD[:1000])
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def stalls(self):
        self.answer(PAYLOAD[:1000])
        self.server.stop.wait(20)

    def missing(self):
        self.answer(PAYLOAD, status=404)


@pytest.fixture
def web():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url, server.asked, server.stop = f"http://127.0.0.1:{server.server_port}", [], threading.Event()
    server.files = {}  # path: content
    server.handle_error = lambda *args: None  # of the connections that a test breaks
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_arrives_and_nothing_else(web, tmp_path):
    official.download(f"{web.url}/whole", tmp_path / "file", MD5)
    assert tree(tmp_path) == {"file": PAYLOAD}


@pytest.mark.parametrize(
    "how", ["changed", "short", "short_without_length", "short_chunked", "reset", "stalls", "missing"]
)
def test_broken_download_leaves_nothing(web, tmp_path, monkeypatch, how):
    monkeypatch.setattr(official, "STALL_TIMEOUT", 0.5)
    with pytest.raises(UserError) as caught:
        official.download(f"{web.url}/{how}", tmp_path / "file", MD5)
    assert tree(tmp_path) == {}
    assert f"{web.url}/{how}" in str(caught.value) and "\n" not in str(caught.value)


def test_server_that_never_answers_is_given_up(tmp_path, monkeypatch):
    assert official.START_TIMEOUT <= 10
    monkeypatch.setattr(official, "START_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        started = time.monotonic()
        with pytest.raises(UserError, match="0.5 s"):
            official.download(f"http://127.0.0.1:{sock.getsockname()[1]}/", tmp_path / "file", MD5)
        assert 0.4 < time.monotonic() - started < 3
    assert tree(tmp_path) == {}


def test_name_that_never_resolves_is_given_up(tmp_path, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr(official, "START_TIMEOUT", 0.5)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: stop.wait(20) and [])
    started = time.monotonic()
    with pytest.raises(UserError, match="host.invalid"):
        official.download("http://host.invalid/", tmp_path / "file", MD5)
    assert time.monotonic() - started < 3
    stop.set()


def test_refused_connection_is_given_up_at_once(tmp_path):
    started = time.monotonic()
    with pytest.raises(UserError, match="refused"):
        official.download(f"http://127.0.0.1:{free_port()}/", tmp_path / "file", MD5)
    assert time.monotonic() - started < 3
    assert tree(tmp_path) == {}


def test_official_files_are_downloaded_once_and_then_taken_from_datasets(web, make, tmp_path, monkeypatch):
    archive = write_archive(tmp_path / "a.tar.gz").read_bytes()
    web.files["/cifar-10-python.tar.gz"] = archive
    files = {"cifar-10-python.tar.gz": hashlib.md5(archive).hexdigest()}
    monkeypatch.setitem(official.OFFICIAL, "CIFAR10", (web.url, files))
    for num_clients in (2, 5):
        folder = make("CIFAR10", "--num_clients", num_clients)
        assert len(shards(folder)) == num_clients and len(images(folder, "train")) == 20
    assert web.asked == ["/cifar-10-python.tar.gz"]
    assert (tmp_path / "datasets" / "cifar-10-python.tar.gz").read_bytes() == archive


def test_four_official_files_are_downloaded_once_and_each_is_checked(web, make, tmp_path, monkeypatch):
    files = {f"{name}.gz": gzip.compress(content) for name, content in idx_files().items()}
    web.files.update({f"/{name}": content for name, content in files.items()})
    digests = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setitem(official.OFFICIAL, "MNIST", (web.url, digests))
    for num_clients in (2, 3):
        assert len(shards(make("MNIST", "--num_clients", num_clients))) == num_clients
    assert sorted(web.asked) == sorted(web.files)
    changed = tmp_path / "datasets" / "MNIST-idx" / "t10k-images-idx3-ubyte.gz"
    changed.write_bytes(gzip.compress(idx_files(seed=1)["t10k-images-idx3-ubyte"]))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte.gz is not the official file"):
        make("MNIST", "--num_clients", 2)


def test_archive_in_datasets_that_is_not_the_official_one_is_refused(make, tmp_path):
    path = tmp_path / "datasets" / "cifar-10-python.tar.gz"
    path.parent.mkdir()
    write_archive(path)  # readable, yet not the official bytes
    before = tree(tmp_path / "datasets")
    with pytest.raises(UserError, match="cifar-10-python.tar.gz"):
        make("CIFAR10", "--num_clients", 2)
    assert tree(tmp_path / "datasets") == before
    assert len(images(make("CIFAR10", "--source", path, "--num_clients", 2), "train")) == 20  # the user's own word


# ---------------------------------------------------------------------------------------------------------------------
# Shapes10.


def test_shapes10_is_always_the_same_and_of_ten_classes(make):
    folder = make("Shapes10", "--num_clients", 4, "--seed", 1)
    info = json.loads((folder / "dataset.json").read_text())
    first = tree(folder)
    second = tree(make("Shapes10", "--num_clients", 2, "--seed", 2))
    npys = [name for name in first if name.endswith(".npy")]
    assert len(npys) == info["num_train"] + info["num_test"] == 12000
    assert all(first[name] == second[name] for name in npys)
    assert len({first[name] for name in npys}) == len(npys)  # no image twice, so none of the test set in training
    assert len(info["classes"]) == 10 and info["image_size"] == [32, 32] and info["channels"] == 3
    assert set(pd.read_csv(folder / "test.csv")["label"].value_counts()) == {info["num_test"] // 10}
    assert set(pd.concat(shards(folder))["label"].value_counts()) == {info["num_train"] // 10}


def test_shapes10_is_learnt_in_a_few_epochs_and_not_in_one():
    torch.manual_seed(0)
    data = {}
    for split, _, drawn in draw_shapes().splits:
        pictures, labels = zip(*drawn)
        data[split] = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255, torch.tensor(labels)
    model = LeNet5(3, 10)
    optimizer = torch.optim.Adam(model.parameters())
    accuracies = []
    while len(accuracies) < 6 and max(accuracies, default=0) < 0.8:
        model.train()
        for indices in torch.randperm(len(data["train"][1])).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(data["train"][0][indices]), data["train"][1][indices]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracies.append((model(data["test"][0]).argmax(1) == data["test"][1]).float().mean().item())
    assert 0.2 < accuracies[0] < 1 and accuracies[-1] >= 0.8, accuracies


# ---------------------------------------------------------------------------------------------------------------------
# Bundles.


def test_bundle_is_all_that_a_device_needs_and_nothing_else(make, shapes_zip, tmp_path):
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", 3, "--bundles")
    assert sorted(path.name for path in (folder / "bundles").iterdir()) == [f"client_{cid}.tar" for cid in range(3)]
    for cid, table in enumerate(shards(folder)):
        with tarfile.open(folder / "bundles" / f"client_{cid}.tar") as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
            assert all(member.isfile() or member.isdir() for member in tar)
        names = ["dataset.json", f"clients/client_{cid}.csv"] + [f"train/{image_id}.npy" for image_id in table["id"]]
        assert content == {f"datasets/Tiny/{name}": (folder / name).read_bytes() for name in names}


def test_bundle_unpacked_at_the_root_of_a_device_gives_its_shard(make, shapes_zip, tmp_path):
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", 3, "--bundles")
    (tmp_path / "device").mkdir()
    device = Suite(tmp_path / "device")
    with tarfile.open(folder / "bundles" / "client_1.tar") as tar:
        tar.extractall(device.root, filter="data")
    code = f"""import sys; sys.path.insert(0, {str(device.root)!r})
from client import DATASETS, load_shard
loaders, info = load_shard(DATASETS / "Tiny", 1, "cpu")
for phase in ("fit", "eval"):
    print(phase, int(loaders[phase].dataset.images.sum()), loaders[phase].dataset.labels.tolist())
print(info["channels"], *info["classes"])"""
    printed = device.run("-c", code)
    table = shards(folder)[1]
    lines = []
    for phase in ("fit", "eval"):
        rows = table[table["phase"] == phase]
        total = sum(int(np.load(folder / "train" / f"{image_id}.npy").sum()) for image_id in rows["id"])
        lines.append(f"{phase} {total} {rows['label'].tolist()}")
    lines.append("3 bar circle cross diamond hexagon ring sector square star triangle")
    assert printed.out.splitlines() == lines, printed


def test_what_a_device_without_its_shard_is_told_brings_the_shard(make, shapes_zip, tmp_path):
    """Also where the bundle was unpacked in the dataset's own folder, and there is some folder but no table."""
    bundles = make("Tiny", "--source", shapes_zip, "--num_clients", 3, "--bundles") / "bundles"
    for unpacked_in in (None, "datasets/Tiny"):
        device = tmp_path / f"device of {unpacked_in}".replace("/", "-")
        device.mkdir()
        if unpacked_in:
            shutil.unpack_archive(bundles / "client_2.tar", device / unpacked_in)
        with pytest.raises(UserError, match="there is no" if unpacked_in else "no dataset") as told:
            load_shard(device / "datasets" / "Tiny", 2, "cpu")
        command = str(told.value).rpartition(": ")[2]
        assert command.startswith("tar xf client_2.tar -C ")
        subprocess.run(command, shell=True, cwd=bundles, check=True)
        loaders, _ = load_shard(device / "datasets" / "Tiny", 2, "cpu")
        assert len(loaders["fit"].dataset) == 160


# ---------------------------------------------------------------------------------------------------------------------
# Running again.


def test_running_again_leaves_nothing_of_the_former_partition(make, shapes_zip, tmp_path):
    small = tmp_path / "small.zip"
    with zipfile.ZipFile(shapes_zip) as old, zipfile.ZipFile(small, "w") as new:
        for name in old.namelist()[::3]:
            new.writestr(name, old.read(name))
    make("Tiny", "--source", shapes_zip, "--num_clients", 9, "--bundles")
    again = tree(make("Tiny", "--source", small, "--num_clients", 4))
    shutil.rmtree(tmp_path / "datasets")
    assert again == tree(make("Tiny", "--source", small, "--num_clients", 4))
    assert sorted(path.name for path in (tmp_path / "datasets").iterdir()) == ["Tiny"]


def test_new_split_is_on_the_disk_before_the_old_one_goes(make, shapes_zip, monkeypatch):
    def noted(owner, name, what):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (done.append(what(*args)), real(*args, **kwargs))[1])

    folder, done = make("Tiny", "--source", shapes_zip, "--num_clients", 3), []
    noted(os, "sync", lambda: "all")
    noted(os, "fsync", lambda fd: os.readlink(f"/proc/self/fd/{fd}"))
    noted(Path, "rename", lambda path, target: target.name)
    noted(shutil, "rmtree", lambda path, *args: f"without {path.name}" if path.exists() else None)
    make("Tiny", "--source", shapes_zip, "--num_clients", 2)
    done = [*filter(None, done)]  # of partition.png first
    assert done[done.index("all") :] == ["all", ".Tiny.old", "Tiny", str(folder.parent), "without .Tiny.old"]


def test_running_again_into_a_linked_folder(make, shapes_zip, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "datasets").mkdir()
    shutil.move(make("Tiny", "--source", shapes_zip, "--num_clients", 9), tmp_path / "disk" / "Tiny")
    (tmp_path / "datasets" / "Tiny").symlink_to(tmp_path / "disk" / "Tiny")
    for num_clients in (5, 4, 3):
        folder = make("Tiny", "--source", shapes_zip, "--num_clients", num_clients)
        assert len(shards(folder)) == num_clients
    assert sorted(path.name for path in (tmp_path / "datasets").iterdir()) == ["Tiny"]


def test_failing_run_leaves_the_former_partition_untouched(make, shapes_zip, tmp_path):
    make("Tiny", "--source", shapes_zip, "--num_clients", 3)
    before = tree(tmp_path / "datasets")
    bad = tmp_path / "bad.zip"
    shutil.copy(shapes_zip, bad)
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr("test/triangle/zzz.png", "no image")  # the very last file that is read
    with pytest.raises(UserError, match=r"test/triangle/zzz\.png"):
        make("Tiny", "--source", bad, "--num_clients", 2)
    with pytest.raises(UserError, match="601"):
        make("Tiny", "--source", shapes_zip, "--num_clients", 601)
    assert tree(tmp_path / "datasets") == before


def test_stopped_run_leaves_the_former_partition_untouched(tiny):
    shutil.move(tiny.root / "datasets" / "Tiny", tiny.root / "datasets" / "Shapes10")
    before = tree(tiny.root / "datasets")
    process = tiny.start("partition.py", "--dataset", "Shapes10")
    until = time.monotonic() + 30
    while tree(tiny.root / "datasets").keys() == before.keys() and time.monotonic() < until:
        time.sleep(0.02)
    process.send(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM and process.err == ""
    assert tree(tiny.root / "datasets") == before


@pytest.mark.parametrize("how", ["itself", "inside", "linked", "dotted"])
def test_source_inside_the_folder_to_replace_is_refused(make, shapes_zip, tmp_path, how):
    folder = make("Tiny", "--source", shapes_zip, "--num_clients", 3)
    write_pictures(folder / "pictures", "png")
    write_pictures(folder, "png")
    (tmp_path / "link").symlink_to(folder / "pictures")
    source = {
        "itself": folder,
        "inside": folder / "pictures",
        "linked": tmp_path / "link",
        "dotted": folder / "train" / ".." / "pictures",
    }[how]
    before = tree(tmp_path / "datasets")
    with pytest.raises(UserError, match="--source"):
        make("Tiny", "--source", source, "--num_clients", 2)
    assert tree(tmp_path / "datasets") == before


def test_folder_with_anything_else_in_it_is_refused(make, shapes_zip, tmp_path):
    target = tmp_path / "datasets" / "Tiny"
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("years of work")
    before = tree(tmp_path / "datasets")
    with pytest.raises(UserError, match="Tiny"):
        make("Tiny", "--source", shapes_zip, "--num_clients", 3)
    assert tree(tmp_path / "datasets") == before
