"""Sources as people have them: nested, wrapped, of other systems, half empty; each is read, or refused in one line."""

import io
import json
import os
import pickle
import re
import shutil
import struct
import tarfile
import unicodedata
import zipfile

from libs import UserError
from plumbing import sources
from plumbing.sources.source import Source

import cv2
import numpy as np
import pytest
from helpers import images, tree


def png(value):
    """A picture that can be found again: 32×32 of one colour, and a PNG's bytes."""
    image = np.full((32, 32, 3), (value % 256, value // 256, 7), np.uint8)
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


def layout(*names):
    """{name: bytes}, each picture another one, by the names' order."""
    return {name: png(number) for number, name in enumerate(names)}


PLAIN = layout(*(f"{split}/{name}/{n}.png" for split in ("train", "test") for name in ("ant", "bee") for n in range(3)))


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pack(path, files, mode):
    """A zip, or a tar as `mode` says."""
    if mode == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(path, mode) as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def content(folder):
    """What arrived: {(split, class, number of the picture)}."""
    classes = json.loads((folder / "dataset.json").read_text())["classes"]
    return {
        (split, classes[label], int(image[0, 0, 0]) + 256 * int(image[0, 0, 1]))
        for split in ("train", "test")
        for label, image in images(folder, split)
    }


def expected(files, where=lambda name: name.split("/")[:2]):
    """The same of files: `where` gives a name's split and class, or None."""
    places = [(where(name), number) for number, name in enumerate(files)]
    return {(*place, number) for place, number in places if place}


@pytest.fixture
def read(make, tmp_path):
    """Cuts what is written to a folder, or packed; gives the dataset's folder."""

    def read(files, mode=None, *args):
        if mode is None:
            shutil.rmtree(tmp_path / "source of mine", ignore_errors=True)
            source = write(tmp_path / "source of mine", files)
        else:
            source = pack(tmp_path / f"packed.{mode.replace('w:', 'tar.')}", files, mode)
        return make("Set", "--source", source, "--num_clients", 2, *args)

    return read


MODES = [None, "zip", "w:", "w:gz", "w:bz2", "w:xz"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change",
    [
        lambda name: name,
        lambda name: f"flowers/{name}",
        lambda name: f"a/b c/d/{name}",
        lambda name: f"./{name}",
        lambda name: name.replace("train/", "Train/").replace("test/", "TEST/"),
        lambda name: name.replace("train/", "training/").replace("test/", "testing/"),
        lambda name: name.replace("test/", "val/"),
        lambda name: name.replace("test/", "Validation/"),
        lambda name: name.replace("test/", "valid/"),
        lambda name: name.replace("/0", "/monday/0").replace("/1", "/monday/am/1"),
        lambda name: name.replace("bee/", "bee/all/"),
        lambda name: name.replace(".png", ".PNG"),
        lambda name: name.replace(".png", ""),
        lambda name: name.replace(".png", ".png.1"),
    ],
    ids=range(14),
)
def test_layouts(read, change, mode):
    folder = read({change(name): image for name, image in PLAIN.items()}, mode)
    assert content(folder) == expected(PLAIN)


def test_set_for_validation_beside_a_test_set_is_skipped_and_said(read, capsys):
    folder = read({**PLAIN, "val/ant/a.png": png(999)})
    assert content(folder) == expected(PLAIN)
    assert "skipped, not images of a class: val/ant/a.png (1 in all)" in capsys.readouterr().out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapped", ["", "flowers/", "train/", "flowers/Train/"])
def test_source_without_a_test_set_is_split_by_class(read, capsys, mode, wrapped):
    files = layout(
        *(f"{wrapped}{name}/{n}.png" for name, count in (("ant", 20), ("bee", 5), ("cat", 2)) for n in range(count))
    )
    found = content(read(files, mode))
    truth = {number: name.split("/")[-2] for number, name in enumerate(files)}
    assert sorted(number for _, _, number in found) == sorted(truth)
    assert all(truth[number] == name for _, name, number in found)
    counts = {
        name: [sum(f[:2] == (s, name) for f in found) for s in ("train", "test")] for name in ("ant", "bee", "cat")
    }
    assert counts == {"ant": [16, 4], "bee": [4, 1], "cat": [1, 1]}
    assert "has no test set: 6 of 27 images are split off as one" in capsys.readouterr().out
    tests = [{number for split, _, number in content(read(files, mode, *args)) if split == "test"} for args in (
        (), ("--seed", 1), ("--test_fraction", 0.5))]  # fmt: skip
    assert tests[0] == {number for split, _, number in found if split == "test"} != tests[1]
    assert len(tests[1]) == 6 and len(tests[2]) == 13


def test_a_fraction_for_a_test_set_that_is_there_has_no_effect_and_that_is_said(make, shapes_zip, capsys):
    make("Tiny", "--source", shapes_zip, "--num_clients", 3, "--test_fraction", 0.2)
    assert "note: --test_fraction has no effect: the source has a test set\n" in capsys.readouterr().out


def test_what_is_no_image_of_a_class_is_skipped_counted_and_named(read, capsys):
    litter = {
        "train/.DS_Store": b"x", "train/ant/.DS_Store": b"x", "train/ant/._0.png": b"x", "train/ant/Thumbs.db": b"x",
        "train/bee/desktop.ini": b"x", ".git/objects/ab/0.png": png(999), ".git/HEAD": b"x",
        "train/.ipynb_checkpoints/0.png": png(998), "train/bee/.ipynb_checkpoints/0-checkpoint.png": png(997),
        "__MACOSX/train/ant/._0.png": b"x", "README.md": b"x", "labels.csv": b"x", "train/ant/notes.txt": b"to do",
        "train/ant/more.zip": b"PK\x03\x04", "sample.png": png(996), "train/loose.png": png(995),
    }  # fmt: skip
    for mode in (None, "zip", "w:gz"):
        assert content(read({**PLAIN, **litter}, mode)) == expected(PLAIN)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped, "))
        assert line.count(", ") == 6 and line.endswith(", … (15 in all)")  # what lies in .git counts once
    litter = {name: litter[name] for name in ("README.md", "train/ant/notes.txt")}
    read({**PLAIN, **litter}, "zip")
    assert "README.md, train/ant/notes.txt (2 in all)\n" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["zip", "w:"])
def test_spellings_of_one_class(read, capsys, mode):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert composed != apart
    files = layout(
        "train/Ant/0.png", "train/ant/1.png", "train/ant /2.png", f"train/{apart}/3.png", f"train/{composed}/4.png",
        "test/ANT/5.png", f"test/{composed}/6.png", f"test/{composed.upper()}/7.png",
    )  # fmt: skip
    found = content(read(files, mode))
    assert found == {("train" if n < 5 else "test", "Ant" if n in (0, 1, 2, 5) else composed, n) for n in range(8)}
    out = capsys.readouterr().out
    assert "spellings of one class" in out and "'ant' is 'Ant'" in out and "'ANT' is 'Ant'" in out


@pytest.mark.parametrize("splits", [("train/", "test/"), ("",)])
def test_upper_and_lower_case_are_two_classes_where_no_split_lacks_one(read, capsys, splits):
    files = layout(*(f"{split}{name}/{n}.png" for split in splits for name in ("A", "a", "B") for n in range(4)))
    found = content(read(files))
    assert len(found) == len(files) and {name for _, name, _ in found} == {"A", "a", "B"}
    assert "classes that differ only in case: 'A' and 'a'\n" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["", "train/"])
def test_class_named_train(read, split):
    files = layout(*(f"{split}{name}/{n}.png" for name in ("car", "plane", "train") for n in range(4)))
    assert {name for _, name, _ in content(read(files))} == {"car", "plane", "train"}


def zip_of_another_system(path, files, kind):
    with zipfile.ZipFile(path, "w") as archive:
        for name, image in files.items():
            archive.writestr(zipfile.ZipInfo("x" * len(name.encode())), image)
    raw = path.read_bytes()
    for name in files:  # in the order of writing, each in its local header and in the central directory
        written = name.encode()
        if kind == "Windows":
            written = written.replace(b"/", b"\\")
        blank = b"x" * len(written)
        for magic, offset, flags in ((b"PK\x03\x04", 30, 6), (b"PK\x01\x02", 46, 8)):
            at = next(m.start() for m in re.finditer(magic, raw) if raw[m.start() + offset :].startswith(blank))
            raw = raw[: at + offset] + written + raw[at + offset + len(blank) :]
            assert struct.unpack_from("<H", raw, at + flags)[0] & 0x800 == 0  # not marked as UTF-8
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("kind", ["Windows", "macOS"])
def test_zips_of_other_systems(make, tmp_path, kind):
    apart = unicodedata.normalize("NFD", "caf\u00e9") if kind == "macOS" else "cafe"
    files = {name.replace("bee", apart): image for name, image in PLAIN.items()}
    path = zip_of_another_system(tmp_path / "other.zip", files, kind)
    with zipfile.ZipFile(path) as archive:
        assert ("\\" in archive.namelist()[0]) == (kind == "Windows")
    name = unicodedata.normalize("NFC", apart)
    folder = make("Set", "--source", path, "--num_clients", 2)
    assert content(folder) == {(split, name if c == "bee" else c, n) for split, c, n in expected(PLAIN)}


def test_links_are_followed_but_not_around_for_ever(make, tmp_path):
    write(tmp_path / "store", PLAIN)
    (tmp_path / "source" / "train").mkdir(parents=True)
    (tmp_path / "source" / "test").symlink_to(tmp_path / "store" / "test")
    for name in ("ant", "bee"):
        (tmp_path / "source" / "train" / name).symlink_to(tmp_path / "store" / "train" / name)
    (tmp_path / "store" / "train" / "ant" / "up").symlink_to(tmp_path / "store" / "train")
    (tmp_path / "store" / "train" / "ant" / "self").symlink_to(tmp_path / "store" / "train" / "ant")
    folder = make("Set", "--source", tmp_path / "source", "--num_clients", 2)
    assert {place for place in content(folder) if place[0] == "test"} == {p for p in expected(PLAIN) if p[0] == "test"}
    os.unlink(tmp_path / "store" / "train" / "ant" / "up")
    assert content(make("Set", "--source", tmp_path / "source", "--num_clients", 2)) == expected(PLAIN)


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR's own files.


def batches(seed=0):
    rng = np.random.RandomState(seed)
    files = {"batches.meta": {b"label_names": [b"cat", b"dog"]}, "readme.html": None}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        files[name] = {b"data": rng.randint(0, 256, (4, 3072)).astype(np.uint8), b"labels": [0, 1, 0, 1]}
    return {name: b"" if value is None else pickle.dumps(value, protocol=2) for name, value in files.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapped", ["", "cifar-10-batches-py/", "downloads/cifar/"])
def test_cifars_own_files_unpacked_or_packed(make, tmp_path, mode, wrapped):
    files = {f"{wrapped}{name}": data for name, data in batches().items()}
    source = write(tmp_path / "cifar", files) if mode is None else pack(tmp_path / "cifar.x", files, mode)
    folder = make("CIFAR10", "--source", source, "--num_clients", 2)
    rows = [row for k in range(1, 6) for row in pickle.loads(batches()[f"data_batch_{k}"])[b"data"]]
    written = sorted(image.tobytes() for _, image in images(folder, "train"))
    assert written == sorted(row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes() for row in rows)


def test_cifars_folder_with_a_file_missing_is_named(make, tmp_path):
    files = batches()
    del files["data_batch_3"]
    with pytest.raises(UserError, match="data_batch_3"):
        make("CIFAR10", "--source", write(tmp_path / "cifar", files), "--num_clients", 2)


# ---------------------------------------------------------------------------------------------------------------------
# Refused, in words.


@pytest.mark.parametrize("mode", [None, "zip", "w:gz"])
@pytest.mark.parametrize(
    "files, words",
    [
        (layout("1.png", "2.png"), ["train/<class>/*", "<class>/*", "2 in no folder"]),
        (layout("pictures/1.png", "pictures/2.png"), ["train/<class>/*", "2 in pictures/"]),
        (layout("train/1.png", "test/2.png"), ["train/<class>/*", "test/<class>/*", "1 in train/"]),
        (layout("train/a/1.png", "train/b/2.png", "more/c/3.png"), ["test/<class>/*", "1 in more/, 2 in train/"]),
        (layout("train/a/1.png", "train/b/test/2.png"), ["test/<class>/*", "2 in train/"]),
        ({"cifar-10-python.tar.gz": b"x"}, ["none at all", "cifar-10-python.tar.gz: use such a file as --source"]),
        (layout("val/a/1.png", "val/b/2.png"), ["train/<class>/*", "2 in val/"]),
        (layout("a/train/1.png", "a/test/2.png", "b/train/3.png", "b/test/4.png"), ["train/<class>/*", "2 in a/"]),
        ({"data_batch_1.bin": b"x", "notes.txt": b"x"}, ["train/<class>/*", "none at all"]),
    ],
    ids=range(9),
)
def test_layouts_that_are_not_known_are_described(read, files, words, mode):
    with pytest.raises(UserError) as caught:
        read(files, mode)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("mode", [None, "zip", "w:gz"])
def test_all_damaged_files_are_named_at_once(make, read, tmp_path, mode):
    before = tree(make("Set", "--source", write(tmp_path / "good", PLAIN), "--num_clients", 3))
    bad = {f"{split}/ant/bad{n:02}.png": png(5)[:50] for split in ("train", "test") for n in range(6)}
    with pytest.raises(UserError) as caught:
        read({**PLAIN, **bad, "train/bee/photo.heic": b"\0\0\0\x18ftypheic", "train/bee/note.jpg": b"to do"}, mode)
    text = str(caught.value)
    assert "14 of its images" in text and text.count(".png (") + text.count(".heic (") + text.count(".jpg (") == 10
    assert text.endswith("…") and "train/bee/note.jpg" in text and "train/ant/bad05.png" in text
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["Set"]
    assert tree(tmp_path / "datasets" / "Set") == before


@pytest.mark.parametrize("mode", [None, "w:gz"])
def test_damaged_files_are_skipped_where_it_is_asked_for(read, capsys, mode):
    with pytest.raises(UserError, match="--skip_damaged"):
        read({**PLAIN, "train/ant/0.png": png(0)[:50]}, mode)
    damaged = dict.fromkeys(["train/ant/0.png", "train/bee/1.png", "test/ant/2.png"], png(5)[:50])
    folder = read({**PLAIN, **damaged}, mode, "--skip_damaged")
    assert content(folder) == {place for place in expected(PLAIN) if list(PLAIN)[place[2]] not in damaged}
    info = json.loads((folder / "dataset.json").read_text())
    assert (info["num_train"], info["num_test"], np.sum(info["split"], axis=0).tolist()) == (4, 5, [2, 2])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped damaged images: "))
    assert all(name in line for name in damaged) and line.endswith("(3 in all)")


@pytest.mark.parametrize(
    "gone, words",
    [
        ("train/ant", "all training images of ant are damaged"),
        ("test", "all images of the test set are"),
        ("1.png", "2 is too many: 2"),
    ],
)
def test_too_little_is_left_without_the_damaged_files(read, gone, words):
    files = {name: png(0)[:50] if gone in name else image for name, image in PLAIN.items() if "2.png" not in name}
    with pytest.raises(UserError, match=words):
        read(files, None, "--skip_damaged")


@pytest.mark.parametrize("content", [b"no archive at all", b"\x1f\x8b\x08\0 a damaged one"])
def test_each_reader_is_asked_before_a_source_is_refused(make, tmp_path, monkeypatch, content):
    source = tmp_path / "numbers.bin"
    source.write_bytes(content)
    with pytest.raises(UserError, match="cannot read .*numbers.bin as a folder, zip or tar: "):
        make("Set", "--source", source, "--num_clients", 2)

    def read_numbers(archive, options):
        assert archive.path.read_bytes() == content
        image = np.zeros((32, 32), np.uint8)
        return Source(["zero"], [(split, 4, [(image, 0)] * 4) for split in ("train", "test")], channels=1)

    *others, last = sources.READERS
    monkeypatch.setattr(sources, "READERS", (*others, read_numbers, last))
    assert len(images(make("Set", "--source", source, "--num_clients", 2), "train")) == 4


def test_an_error_of_a_reader_is_its_own(read, monkeypatch):
    """And not taken for a source that is another reader's."""

    def read_wrongly(archive, options):
        return {}["layout"]

    monkeypatch.setattr(sources, "READERS", (read_wrongly, *sources.READERS))
    with pytest.raises(KeyError, match="layout"):
        read(PLAIN, "zip")


def test_names_of_files_cannot_command_the_terminal(read, make, capsys):
    files = {name.replace("ant", "a\x1b[2Jnt"): image for name, image in PLAIN.items()}
    read({**files, "train/bee/\x1b]0;x.txt": b"x"}, "zip")
    make("Set", "--show")
    with pytest.raises(UserError) as caught:
        read({**files, "train/\x1b[2J/x.png": b"x"}, "zip")
    shown = capsys.readouterr().out + str(caught.value)
    assert "\x1b" not in shown and "a?[2Jnt" in shown and "?]0;x.txt" in shown and "?[2J/x.png" in shown


def test_one_image_of_each_class_gives_no_test_set(read):
    with pytest.raises(UserError, match="test set"):
        read(layout("ant/1.png", "bee/2.png", "cat/3.png", "dog/4.png"))


def test_tar_that_ends_with_a_zip_is_a_tar(make, tmp_path):
    inner = pack(tmp_path / "inner.zip", {name: png(900) for name in PLAIN}, "zip").read_bytes()
    source = pack(tmp_path / "outer.tar", {**PLAIN, "train/zz.zip": inner}, "w:")
    assert zipfile.is_zipfile(source)  # by its end
    assert content(make("Set", "--source", source, "--num_clients", 2)) == expected(PLAIN)


def test_encrypted_zip_is_named(make, tmp_path):
    raw = bytearray(pack(tmp_path / "locked.zip", PLAIN, "zip").read_bytes())
    for magic, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(magic) + offset] |= 1
    (tmp_path / "locked.zip").write_bytes(raw)
    with pytest.raises(UserError, match="locked.zip is encrypted"):
        make("Set", "--source", tmp_path / "locked.zip", "--num_clients", 2)


@pytest.mark.parametrize("name", ["con", "AUX", "nul.txt", "com1", "Set."])
def test_names_that_windows_has_no_folders_for(make, name):
    with pytest.raises(UserError, match="Windows"):
        make(name)


def test_link_to_an_image_that_is_gone_is_named(make, tmp_path):
    write(tmp_path / "source", PLAIN)
    (tmp_path / "source" / "train" / "ant" / "gone.png").symlink_to("/nowhere/gone.png")
    with pytest.raises(UserError, match="train/ant/gone.png .No such file"):
        make("Set", "--source", tmp_path / "source", "--num_clients", 2)


# ---------------------------------------------------------------------------------------------------------------------
# Duplicates, and the last line.


def test_duplicates_are_counted_and_said(read, capsys):
    files = {
        **PLAIN,
        "test/ant/x.png": png(0),
        "test/bee/y.png": png(3),
        "train/bee/z.png": png(1),
        "test/bee/w.png": png(2),
    }
    read(files)
    out = capsys.readouterr().out
    assert "3 of 9 test images are also in the training set" in out  # x, y, w
    assert "images that are in two classes or more: 2" in out  # 1 in training alone, 2 over both


def test_same_pixels_in_another_coding_are_duplicates_and_within_a_class_nothing_is_said(read, capsys):
    bmp = cv2.imencode(".bmp", cv2.imdecode(np.frombuffer(png(0), np.uint8), cv2.IMREAD_COLOR))[1].tobytes()
    read({**PLAIN, "test/ant/again.bmp": bmp, "train/bee/twice.png": png(3)})
    out = capsys.readouterr().out
    assert "1 of 7 test images are also in the training set" in out and "two classes" not in out


def test_set_without_duplicates_says_nothing_of_them(read, capsys):
    read(PLAIN)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "2 clients" in lines[0]


def test_line_that_is_printed_can_be_pasted_from_any_folder(suite, tmp_path):
    root = tmp_path / "my suite's copy"
    root.mkdir()
    copy = type(suite)(root)
    process = copy.partition("--dataset", "Set", "--source", write(tmp_path / "source", PLAIN), "--num_clients", 2)
    quoted = process.out.strip().rpartition(": 2 clients")[0]
    listed = copy.run("-c", f"import subprocess; subprocess.run('ls ' + {quoted!r}, shell=True, check=True)")
    assert "dataset.json" in listed.out
