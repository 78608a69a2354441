"""The id of a cut and its digests: whatever a device or the server reads of another cut is found at the start."""

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path

from libs import UserError

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from helpers import write_images

from data import describe_dataset, load_shard, load_test


@pytest.fixture
def cut(suite):
    """Runs partition.py as a process of its own; gives the dataset's folder, moved aside under `name`."""

    def cut(name, *args):
        suite.partition("--dataset", "Tiny", "--bundles", *args)
        folder = suite.root / name / "Tiny"
        folder.parent.mkdir()
        return Path(shutil.move(suite.root / "datasets" / "Tiny", folder))

    return cut


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with 40 training images and 10 test images of ten shapes."""
    root = tmp_path_factory.mktemp("pictures")
    shutil.unpack_archive(write_images(root / "pictures.zip", 40, 10), root / "pictures")
    return root / "pictures"


def dataset_id(folder):
    return json.loads((folder / "dataset.json").read_text())["id"]


def unpack(folder, cid, device):
    """Unpack a bundle at the root of a device; the dataset's folder there."""
    with tarfile.open(folder / "bundles" / f"client_{cid}.tar") as tar:
        tar.extractall(device, filter="data")
    return device / "datasets" / "Tiny"


def test_id_is_the_same_for_the_same_cut_and_another_for_any_difference(cut, pictures, tmp_path):
    sources = {name: shutil.copytree(pictures, tmp_path / f"source {name}") for name in ("pixel", "class", "test")}
    picture = sorted((sources["pixel"] / "train" / "star").iterdir())[0]
    image = cv2.imread(str(picture))
    image[3, 4, 1] ^= 1
    cv2.imwrite(str(picture), image)
    for split in ("train", "test"):
        (sources["class"] / split / "star").rename(sources["class"] / split / "starfish")  # the order stays
    next((sources["test"] / "test" / "bar").iterdir()).unlink()
    common = ("--num_clients", 2, "--source")
    ids = [dataset_id(cut("first", *common, pictures)), dataset_id(cut("second", *common, pictures))]
    assert ids[0] == ids[1] and len(ids[0]) == 32
    ids += [dataset_id(cut(name, *common, source)) for name, source in sources.items()]
    ids += [dataset_id(cut(f"flag {flag}", *common, pictures, flag, value)) for flag, value in (
        ("--seed", 1), ("--eval_fraction", 0.3), ("--partition", "dirichlet"), ("--num_clients", 3))]  # fmt: skip
    assert len(set(ids)) == len(ids) - 1


def test_id_is_the_same_on_every_machine_and_in_every_version(cut, tmp_path):
    """As noted when this was written. Whoever changes it turns away all devices with an older bundle."""
    for number, (split, name) in enumerate((s, c) for s in ("train", "test") for c in "ab" for _ in "123"):
        path = tmp_path / "ramps" / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), ((np.arange(3072) * (number + 2)) % 251).astype(np.uint8).reshape(32, 32, 3))
    folder = cut("first", "--source", tmp_path / "ramps", "--num_clients", 2)
    assert dataset_id(folder) == "cf8635660ba2f84fff231463d1b72f33"

    def digest(content):
        return hashlib.blake2b(content, digest_size=16)

    def of_table(path, split):
        lines = path.read_bytes().splitlines(keepends=True)[1:]
        files = [folder / split / f"{line.split(b',')[0].decode()}.npy" for line in lines]
        pixels = [digest(b"(32, 32, 3)" + np.load(file).tobytes()).digest() for file in files]
        return digest(b"".join(line + pixel for line, pixel in zip(lines, pixels))).hexdigest()

    shards = [of_table(folder / "clients" / f"client_{cid}.csv", "train") for cid in range(2)]
    what = [["a", "b"], 3, [32, 32], shards, of_table(folder / "test.csv", "test")]
    assert digest(json.dumps(what).encode()).hexdigest() == dataset_id(folder)


def test_what_the_loaders_give_is_what_the_files_hold(cut, pictures):
    folder = cut("first", "--source", pictures, "--num_clients", 2)
    loaders, info = load_shard(folder, 1, "cpu")
    table = pd.read_csv(folder / "clients" / "client_1.csv")
    for phase, loader in loaders.items():
        rows = table[table["phase"] == phase]
        expected = np.stack([np.load(folder / "train" / f"{name}.npy") for name in rows["id"]])
        assert np.array_equal(loader.dataset.images.numpy(), expected.transpose(0, 3, 1, 2))
        assert loader.dataset.labels.tolist() == rows["label"].tolist()
        assert (loader.batch_size, loader.shuffle) == ((32, True) if phase == "fit" else (64, False))
    test, test_info = load_test(folder)
    table = pd.read_csv(folder / "test.csv")
    expected = np.stack([np.load(folder / "test" / f"{name}.npy") for name in table["id"]])
    assert np.array_equal(test.dataset.images.numpy(), expected.transpose(0, 3, 1, 2))
    assert info == test_info == describe_dataset("Tiny", folder)
    assert info["id"] == dataset_id(folder) and info["num_clients"] == 2
    assert info["images"] == {"image_size": [32, 32], "fit": "squash", "levels": None}


def relabel(folder):
    path = folder / "clients" / "client_1.csv"
    first, row, *rest = path.read_text().splitlines()
    name, label, phase = row.split(",")
    path.write_text("\n".join([first, f"{name},{(int(label) + 1) % 10},{phase}", *rest]) + "\n")


def swap_phases(folder):
    path = folder / "clients" / "client_1.csv"
    path.write_text(path.read_text().replace("eval", "x").replace("fit", "eval").replace("x", "fit"))


def drop_row(folder):
    path = folder / "clients" / "client_1.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def change_pixel(folder):
    path = folder / "train" / f"{pd.read_csv(folder / 'clients' / 'client_1.csv')['id'].iloc[-1]}.npy"
    image = np.load(path)
    image[31, 31, 2] ^= 1
    np.save(path, image)


def turn_images(folder):
    for path in (folder / "train").iterdir():
        np.save(path, np.load(path).transpose(1, 0, 2))


def rename_classes(folder):
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace("star", "scar"))


def take_anothers(folder):
    shutil.copy(folder / "clients" / "client_0.csv", folder / "clients" / "client_1.csv")


@pytest.mark.parametrize(
    "change", [relabel, swap_phases, drop_row, change_pixel, turn_images, rename_classes, take_anothers]
)
def test_shard_that_is_not_of_its_cut_is_refused(cut, pictures, change):
    folder = cut("first", "--source", pictures, "--num_clients", 2)
    load_shard(folder, 1, "cpu")
    change(folder)
    with pytest.raises(UserError, match="dataset.json.*cid 1 again"):
        load_shard(folder, 1, "cpu")


def test_test_set_that_is_not_of_its_cut_is_refused(cut, pictures):
    folder = cut("first", "--source", pictures, "--num_clients", 2)
    good = (folder / "test.csv").read_text()
    (folder / "test.csv").write_text(good.replace(",3\n", ",4\n"))
    with pytest.raises(UserError, match="test.csv.*partition.py again"):
        load_test(folder)
    (folder / "test.csv").write_text(good)
    np.save(folder / "test" / "0.npy", np.load(folder / "test" / "1.npy"))
    with pytest.raises(UserError, match="test.csv.*partition.py again"):
        load_test(folder)


@pytest.mark.parametrize("order", [("old", "new"), ("new", "old")], ids=" then ".join)
def test_bundles_of_two_cuts_on_one_device(cut, pictures, tmp_path, order):
    """What was unpacked last is whole and is taken; what lay there before is of another cut."""
    cuts = {"old": (cut("old", "--source", pictures, "--num_clients", 3, "--seed", 1), 2)}
    cuts["new"] = cut("new", "--source", pictures, "--num_clients", 2, "--seed", 2), 1
    for name in order:
        folder = unpack(*cuts[name], tmp_path / "device")
    cids = [cuts[name][1] for name in order]
    with pytest.raises(UserError, match=rf"client_{cids[0]}.csv.*newest bundle"):
        load_shard(folder, cids[0], "cpu")
    assert load_shard(folder, cids[1], "cpu")[1]["id"] == dataset_id(cuts[order[1]][0])


def test_client_and_server_say_so_at_their_start(cut, pictures, suite):
    old = cut("old", "--source", pictures, "--num_clients", 2, "--seed", 1)
    new = cut("new", "--source", pictures, "--num_clients", 2, "--seed", 2)
    folder = Path(shutil.copytree(new, suite.root / "datasets" / "Tiny"))
    shutil.copy(old / "clients" / "client_0.csv", folder / "clients")
    client = suite.client(0, "--dataset", "Tiny", "--max_wait_time", 1)
    assert client.wait() == 2 and client.err.count("\n") == 1, client
    assert "client_0.csv" in client.err and "bundle" in client.err and client.out == ""
    np.save(folder / "test" / "3.npy", np.zeros((32, 32, 3), np.uint8))
    server = suite.server("--dataset", "Tiny", "--num_clients", 2)
    assert server.wait() == 2 and server.err.count("\n") == 1 and "test.csv" in server.err, server


# The same content saved by another program, from the text as partition.py wrote it, which is read all the same.
SAVED = {
    "quotes and CRLF": lambda text: re.sub(r"([^,\n]+)", r'"\1"', text).replace("\n", "\r\n").encode(),
    "CR alone": lambda text: text.replace("\n", "\r").encode(),
    "UTF-8 with a byte order mark": lambda text: text.encode("utf-8-sig"),
    "no end of the last line": lambda text: text.rstrip().encode(),
}
# What is refused, with the reason.
FIRST_LINE = "not as partition.py wrote it: its first line is not id,label,phase"
REFUSED = {
    "UTF-16": (lambda text: text.replace(",", "\t").encode("utf-16"), "not as partition.py wrote it: 'utf-8' codec"),
    "UTF-16, big end first": (
        lambda text: b"\xfe\xff" + text.replace(",", "\t").encode("utf-16-be"),
        "not as partition.py wrote it: 'utf-8' codec",
    ),
    "UTF-16 without a byte order mark": (lambda text: text.encode("utf-16-le"), "not as partition.py wrote it: "),
    "another alphabet": (
        lambda text: text.replace("fit", "f\u00efts").encode("cp1252"),
        "not as partition.py wrote it: 'utf-8' codec",
    ),
    "a spreadsheet's own file": (lambda text: b"PK\x03\x04" + text.encode(), FIRST_LINE),
    "an older spreadsheet's": (lambda text: b"\xd0\xcf\x11\xe0" + text.encode(), "not as partition.py wrote it: "),
    "semicolons": (lambda text: text.replace(",", ";").encode(), FIRST_LINE),
    "semicolons, as its first line says": (lambda text: ("sep=;\n" + text.replace(",", ";")).encode(), FIRST_LINE),
    "commas, as its first line says": (lambda text: ("sep=,\r\n" + text).encode(), FIRST_LINE),
    "tabs": (lambda text: text.replace(",", "\t").encode(), FIRST_LINE),
    "bars": (lambda text: text.replace(",", "|").encode(), FIRST_LINE),
    "spaces after commas": (lambda text: text.replace(",", ", ").encode(), FIRST_LINE),
    "spaces around": (lambda text: text.replace(",", " , ").replace("\n", " \n ").encode(), FIRST_LINE),
    "empty lines before": (lambda text: f"\n\n{text}".encode(), FIRST_LINE),
    "another header": (lambda text: text.replace("id,label,phase", " ID,Label ,PHASE").encode(), FIRST_LINE),
    "an empty column": (lambda text: text.replace("\n", ",\n").encode(), FIRST_LINE),
    "a column more": (lambda text: re.sub(r"(?m)^(.)", r"x,\1", text).encode(), FIRST_LINE),
    "other order of columns": (lambda text: re.sub(r"(?m)^(\w+),(\w+),(\w+)$", r"\3,\1,\2", text).encode(), FIRST_LINE),
    "nothing": (lambda text: b"", FIRST_LINE),
    "fractions": (lambda text: re.sub(r"(?m)^(\d+),(\d+)", r"\1.0,\2.0", text).encode(), "line 2: label .*\\.0 is not"),
    "rounded ids": (lambda text: re.sub(r"(?m)^(\d+),", "1E+05,", text, count=1).encode(), r"1E\+05.npy is missing"),
    "an empty last line": (lambda text: f"{text}\n".encode(), "line 22: 0 cells, not 3"),
    "empty lines with commas": (lambda text: f"{text},,\n".encode(), "line 22: label  is not in 0..9"),
    "a label too large": (lambda text: f"{text}9999,77,fit\n".encode(), "line 22: label 77 is not in 0..9"),
}


def saved(folder, change):
    """Change the table of client 1, and return its path."""
    path = folder / "clients" / "client_1.csv"
    content = path.read_bytes()
    path.write_bytes(change(content.decode()))
    assert path.read_bytes() != content
    return path


@pytest.mark.parametrize("kind", SAVED)
def test_table_that_was_saved_again_is_right(cut, pictures, kind):
    folder = cut("first", "--source", pictures, "--num_clients", 2)
    before = load_shard(folder, 1, "cpu")[0]
    saved(folder, SAVED[kind])
    after = load_shard(folder, 1, "cpu")[0]
    for phase, loader in before.items():
        assert torch.equal(loader.dataset.images, after[phase].dataset.images)
        assert torch.equal(loader.dataset.labels, after[phase].dataset.labels)


def test_table_that_is_not_as_it_was_written_is_refused_in_one_line(cut, pictures):
    folder = cut("first", "--source", pictures, "--num_clients", 2)
    good = (folder / "clients" / "client_1.csv").read_bytes()
    for kind, (change, reason) in REFUSED.items():
        path = saved(folder, change)
        with pytest.raises(UserError, match=reason) as refused:
            load_shard(folder, 1, "cpu")
        assert "\n" not in str(refused.value), kind
        path.write_bytes(good)


def test_dataset_of_an_older_partition_is_read_as_before(cut, pictures):
    folder = cut("first", "--source", pictures, "--num_clients", 2)
    path = folder / "dataset.json"
    info = json.loads(path.read_text())
    for name in ("id", "shards", "test", "fit", "levels"):
        del info[name]
    path.write_text(json.dumps(info))
    relabel(folder)
    assert load_shard(folder, 1, "cpu")[1]["id"] is None and load_test(folder)[1]["id"] is None
    path.unlink()
    assert load_shard(folder, 1, "cpu")[1]["id"] is None and load_test(folder)[1]["num_clients"] is None
