"""Bad input: one clear line on stderr that names the culprit, exit code 2, and nothing lost.

Each script is started as a process a few times; for the many other cases it runs in this process, in the same way.
"""

import contextlib
import datetime
import gzip
import io
import json
import pickle
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tarfile
import threading
import zipfile

import libs
from plumbing.common.state import save_checkpoint
from plumbing.device import connection
from plumbing.laptop import start

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from helpers import ROOT, write_images

import client
import partition
import server
from nets import LeNet5

SCRIPTS = {"partition.py": partition, "client.py": client, "server.py": server}


def tree(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".id", ".lock")]
    return {path: path.read_bytes() for path in files}


def check(code, err, script, *culprits):
    """What a user sees of bad input."""
    assert code == 2, err
    assert "Traceback" not in err
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith(f"{script}: ")
    for culprit in culprits:
        assert str(culprit) in err


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """60 training images and 10 test images of ten shapes."""
    return write_images(tmp_path_factory.mktemp("source") / "small.zip", 60, 10)


@pytest.fixture(scope="module")
def small(tmp_path_factory, source):
    """A datasets/ folder with the dataset Small: 3 clients of 16 fit and 4 eval images each."""
    folder = tmp_path_factory.mktemp("small") / "datasets"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "DATASETS", folder)
        patch.setattr(sys, "argv", f"partition.py --dataset Small --source {source} --num_clients 3".split())
        partition.main()
    return folder


@pytest.fixture
def refuse(tmp_path, small, monkeypatch, capfd):
    """Runs a script in this process, in a folder with the dataset Small, and checks that it refuses its input.

    `refuse.datasets` and `refuse.ckps` are its folders; what lies in them must be the same afterwards.
    """
    shutil.copytree(small, tmp_path / "datasets")
    (tmp_path / "ckps" / "Small").mkdir(parents=True)
    for name in ("server.ptl", "best.ptl", "history.csv", "client_0.ptl"):
        (tmp_path / "ckps" / "Small" / name).write_bytes(b"of an earlier run")
    for module in SCRIPTS.values():
        for name in ("DATASETS", "CKPS"):
            monkeypatch.setattr(module, name, tmp_path / name.lower(), raising=False)

    def not_refused(*args, **kwargs):
        raise AssertionError("the input was taken")

    monkeypatch.setattr(start, "start_wandb", not_refused)
    monkeypatch.setattr(server, "start_server", not_refused)
    monkeypatch.setattr(socket, "create_connection", not_refused)  # how a client knocks at the server's door
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}

    def refuse(script, args, *culprits):
        given = [str(arg) for arg in args]
        if "--dataset" not in given:
            given = ["--dataset", "Small", *given]
        monkeypatch.setattr(sys, "argv", [script, *given])
        before = tree(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            libs.run_script(SCRIPTS[script].main)
        check(end.value.code, capfd.readouterr().err, script, *culprits)
        assert tree(tmp_path) == before

    refuse.datasets, refuse.ckps = tmp_path / "datasets", tmp_path / "ckps"
    yield refuse
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------------------------------------
# As processes.


@pytest.fixture
def refuse_process(suite, small):
    """The same with a real process, in a copy of the suite."""
    shutil.copytree(small, suite.root / "datasets")

    def refuse(script, args, *culprits):
        before = tree(suite.root / "datasets")
        process = suite.run(script, "--dataset", "Small", *args, timeout=150)
        check(process.popen.returncode, process.err, script, *culprits)
        assert tree(suite.root / "datasets") == before

    refuse.suite, refuse.folder = suite, suite.root / "datasets" / "Small"
    return refuse


def test_partition_as_a_process(refuse_process, source):
    refuse_process("partition.py", ["--num_clients", 0], "--num_clients")
    broken = shutil.copy(source, refuse_process.suite.root / "broken.zip")
    png = cv2.imencode(".png", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    with zipfile.ZipFile(broken, "a") as packed:
        packed.writestr("train/bar/zz.png", png[: len(png) // 2])  # OpenCV itself has something to say about this one
    refuse_process("partition.py", ["--source", broken], broken, "train/bar/zz.png")


def test_client_as_a_process(refuse_process):
    refuse_process("client.py", ["--cid", 7], "client_7.csv", "0, 1, 2")
    path = refuse_process.folder / "clients" / "client_1.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    refuse_process("client.py", ["--cid", 1], path, "line 22")


def test_server_as_a_process(refuse_process):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        refuse_process("server.py", ["--server_port", port], port, "in use")


# ---------------------------------------------------------------------------------------------------------------------
# Flags.


def each_value(flags):
    return pytest.mark.parametrize("flag, value", [(flag, value) for flag, values in flags for value in values])


@each_value([
    ("--num_clients", ["0", "-1", "31", "61", "ten", "2.5", ""]),  # 60 images, and a client needs two
    ("--eval_fraction", ["0", "1", "1.5", "-0.1", "nan", "half"]),
    ("--alpha", ["0", "-1", "nan", "inf", "x"]),
    ("--seed", ["-1", "4294967296", "x"]),
    ("--source", [""]),
    ("--partition", ["random"]),
    ("--colour", ["red"]),
])  # fmt: skip
def test_flags_of_partition(refuse, source, flag, value):
    refuse("partition.py", ["--source", source, flag, value], flag)


@each_value([
    ("--cid", ["-1", "x", ""]),
    ("--server_port", ["0", "70000", "-1", "http"]),
    ("--num_threads", ["0", "x"]),
    ("--max_wait_time", ["-1", "nan"]),
    ("--device", ["toaster", "", "cuda:99", "xla", "hpu", "meta"]),
    ("--secret_file", [""]),
    ("--root_certificate", [""]),
])  # fmt: skip
def test_flags_of_client(refuse, flag, value):
    refuse("client.py", ["--cid", 0, flag, value], flag)


@each_value([
    ("--server_port", ["0", "70000", "-1", "http"]),
    ("--num_clients", ["0", "x", "4"]),  # of 3 shards
    ("--num_rounds", ["0", "-5"]),
    ("--num_epochs", ["0"]),
    ("--lr", ["0", "-1", "nan", "inf"]),
    ("--min_clients", ["0", "4"]),  # of 3
    ("--round_timeout", ["0", "-1"]),
    ("--secret_file", [""]),
    ("--certificates", [""]),
    ("--resume", [""]),
])  # fmt: skip
def test_flags_of_server(refuse, flag, value):
    refuse("server.py", [flag, value], flag)


@pytest.mark.parametrize(
    "script, args, reason",
    [
        ("partition.py", ["--alpha", 0.5], "--alpha has no effect on --partition iid"),
        ("partition.py", ["--partition", "shards", "--alpha=2"], "--alpha has no effect on --partition shards"),
        ("partition.py", ["--partition", "shards", "--sizes", "lognormal"], "--sizes lognormal goes with"),
        ("partition.py", ["--show", "--num_clients", 10], "--show writes nothing: leave out --num_clients"),
        ("server.py", ["--allow_new_data"], "--allow_new_data goes with --resume"),
    ],
)
def test_flags_that_would_have_no_effect(refuse, source, script, args, reason):
    """Also those that have their default's value, which nobody could see afterwards."""
    refuse(script, args, reason)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["../Small", "a/b", "/tmp", "..", "", "a\nb"])
def test_dataset_names_that_are_paths(refuse, script, name):
    refuse(script, ["--dataset", name, "--cid", 0] if script == "client.py" else ["--dataset", name], "--dataset")


def test_cid_is_required(refuse):
    refuse("client.py", [], "--cid")


def test_device_that_is_not_there(refuse):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    refuse("client.py", ["--cid", 0, "--device", "cuda"], "--device cuda")


# ---------------------------------------------------------------------------------------------------------------------
# Sources of partition.py.


def tar_gz(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, payload in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    return file.getvalue()


def archive(meta=None, last=None):
    """The bytes of a small archive in CIFAR-10's layout, `meta` and `last` in place of two of its members."""
    good = {b"data": np.arange(4 * 3072).reshape(4, 3072).astype(np.uint8), b"labels": [0, 1, 0, 1]}
    members = dict.fromkeys([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], pickle.dumps(good, protocol=2))
    members["batches.meta"] = pickle.dumps({b"label_names": [b"cat", b"dog"]} if meta is None else meta, protocol=2)
    if last is not None:
        members["test_batch"] = last if isinstance(last, bytes) else pickle.dumps({**good, **last}, protocol=2)
    return tar_gz(members)


def test_the_archive_that_the_next_tests_break_is_taken_as_it_is(refuse, monkeypatch):
    (refuse.datasets / "good.tar.gz").write_bytes(archive())
    monkeypatch.setattr(sys, "argv", ["partition.py", "--source", str(refuse.datasets / "good.tar.gz")])
    partition.main()


@pytest.mark.parametrize("cut", [0.0, 0.01, 0.5, 0.9])
def test_truncated_archives(refuse, cut):
    path = refuse.datasets / "cut.tar.gz"
    path.write_bytes(archive()[: int(len(archive()) * cut)])
    refuse("partition.py", ["--source", path, "--num_clients", 2], path)
    path.write_bytes(gzip.decompress(archive())[: int(80000 * cut)])  # a plain tar, cut in the same way
    refuse("partition.py", ["--source", path, "--num_clients", 2], path)


@pytest.mark.parametrize(
    "content",
    [
        b"no archive at all",
        tar_gz({"readme": b"x"}),
        archive(meta={}),
        archive(meta=[1]),
        archive(meta={b"label_names": 3}),
        archive(last=b"\x80"),
        archive(last=b"P0\n."),
        archive(last={b"labels": [0, 1]}),
        archive(last={b"labels": [0, 1, 0, 2]}),
        archive(last={b"labels": [0, 1, 0, -1]}),
        archive(last={b"labels": ["cat"] * 4}),
        archive(last={b"labels": [], b"data": np.zeros((0, 3072), np.uint8)}),
        archive(last={b"data": np.zeros((4, 3072))}),
        archive(last={b"data": np.zeros((4, 1024), np.uint8)}),
        archive(last={b"data": [1, 2]}),
        archive(last={b"data": np.array([None] * 4)}),
    ],
    ids=range(16),
)
def test_archives_of_another_content(refuse, content):
    path = refuse.datasets / "other.tar.gz"
    path.write_bytes(content)
    refuse("partition.py", ["--source", path, "--num_clients", 2], path)


def test_official_archive_that_is_broken(refuse):
    path = refuse.datasets / "cifar-10-python.tar.gz"
    path.write_bytes(archive()[:-100])
    refuse("partition.py", ["--dataset", "CIFAR10"], path)


def test_dataset_without_a_source(refuse):
    refuse("partition.py", ["--dataset", "Flowers"], "Flowers", "--source")
    refuse("partition.py", ["--source", "/nowhere/flowers.zip"], "/nowhere/flowers.zip")


PNG = cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
LAYOUT = {f"{split}/{name}/{index}.png": PNG for split in ("train", "test") for name in "ab" for index in "123"}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize(
    "changes, culprit",
    [
        ({"train/a/notes.png": b"to do"}, "train/a/notes.png"),
        ({"test/b/9.png": b""}, "test/b/9.png"),
        ({"test/c/1.png": PNG}, "class c"),
        ({name: None for name in LAYOUT if name.startswith("train")}, "train/<class>/*"),
        ({name: None for name in LAYOUT}, "train/<class>/*"),
    ],
    ids=["text", "empty", "class", "no train", "nothing"],
)
def test_folders_and_zips_of_other_things_than_images(refuse, tmp_path, changes, culprit, packed):
    source = tmp_path / "source"
    source.mkdir()
    for name, content in {**LAYOUT, **changes}.items():
        if content is not None:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(content)
    if packed:
        source = shutil.make_archive(str(tmp_path / "packed"), "zip", source)
    refuse("partition.py", ["--source", source, "--num_clients", 2], source, culprit)


def test_damaged_zips(refuse, tmp_path):
    path = tmp_path / "flowers.zip"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in LAYOUT.items():
            packed.writestr(name, content)
    good = file.getvalue()
    central = good.index(b"PK\x01\x02")
    damaged = {
        "cut": good[: len(good) // 2],
        "checksum": good[:60] + bytes([good[60] ^ 255]) + good[61:],
        "version": good[: central + 6] + b"\xff" + good[central + 7 :],  # a zip of a later version than Python knows
        "encrypted": good[:6] + b"\x01" + good[7 : central + 8] + b"\x01" + good[central + 9 :],
    }
    for content in damaged.values():
        path.write_bytes(content)
        refuse("partition.py", ["--source", path, "--num_clients", 2], path)


# ---------------------------------------------------------------------------------------------------------------------
# The dataset, as client and server read it.


@pytest.mark.parametrize(
    "script, args, remedy",
    [
        ("client.py", ["--cid", 0], "unpack the device's bundle: tar xf client_0.tar -C {root}\n"),
        ("server.py", [], "run partition.py --dataset small\n"),
    ],
)
def test_no_dataset(refuse, script, args, remedy):
    """The remedy is that of the script's own machine, and what is there is listed, for one who misspelt it."""
    remedy = remedy.format(root=refuse.datasets.parent)
    missing = refuse.datasets / "small"
    refuse(script, ["--dataset", "small", *args], f"no dataset in {missing} (--dataset can be Small): {remedy}")
    missing.mkdir()
    refuse(script, ["--dataset", "small", *args], f"there is no {missing}", remedy)
    missing.rmdir()
    shutil.rmtree(refuse.datasets / "Small")
    refuse(script, ["--dataset", "small", *args], f"no dataset in {missing}: {remedy}")


@pytest.mark.parametrize("script, args", [("client.py", ["--cid", 0]), ("server.py", [])])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff\xfe", b'{"channels": 2}', b'{"classes": 10}'])
def test_damaged_dataset_json(refuse, script, args, content):
    (refuse.datasets / "Small" / "dataset.json").write_bytes(content)
    refuse(script, args, refuse.datasets / "Small" / "dataset.json")


def test_cid_that_does_not_exist(refuse):
    refuse("client.py", ["--cid", 3], "client_3.csv", "0, 1, 2")
    shutil.copy(refuse.datasets / "Small/clients/client_0.csv", refuse.datasets / "Small/clients/client_0 (copy).csv")
    refuse("client.py", ["--cid", 10], "client_10.csv", "0, 1, 2")
    shutil.rmtree(refuse.datasets / "Small" / "clients")
    refuse("client.py", ["--cid", 0], "client_0.csv", f"tar xf client_0.tar -C {refuse.datasets.parent}")


# A change to a good CSV of three rows, and what the message must name besides the file.
TABLES = {
    "no id": (lambda text: text.replace("id", "name", 1), "id"),
    "no label": (lambda text: text.replace("label", "class", 1), "label"),
    "no header": (lambda text: text.split("\n", 1)[1], "id"),
    "semicolons": (lambda text: text.replace(",", ";"), "id"),
    "duplicate id": (lambda text: text + text.splitlines()[1] + "\n", "line 5"),
    "unknown id": (lambda text: text + "99999,3,eval\n", "99999.npy"),
    "no id in a row": (lambda text: text + ",3,eval\n", ".npy"),
    "label too large": (lambda text: text + "99999,10,eval\n", "line 5"),
    "label below 0": (lambda text: text + "99999,-1,eval\n", "line 5"),
    "label with a fraction": (lambda text: text + "99999,1.5,eval\n", "line 5"),
    "label in words": (lambda text: text + "99999,cat,eval\n", "line 5"),
    "label of two lines": (lambda text: text + '99999,"1\n2",eval\n', "line 5"),
    "label missing": (lambda text: text + "99999,,eval\n", "line 5"),
    "label nan": (lambda text: text + "99999,nan,eval\n", "line 5"),
    "too many cells": (lambda text: text + "99999,1,eval,7,8\n", "line 5"),
    "open quote": (lambda text: text + '99999,"1,eval\n', ""),
    "no rows": (lambda text: text.splitlines()[0], ""),
    "empty": (lambda text: "", ""),
    "binary": (lambda text: "\x00\udcff\udcfe", ""),
}
PHASES = {
    "no phase": (lambda text: text.replace("phase", "part", 1), "phase"),
    "unknown phase": (lambda text: text + "99999,3,test\n", "line 5"),
    "phase missing": (lambda text: text + "99999,3,\n", "line 5"),
    "nothing to fit": (lambda text: text.replace("fit", "eval"), "fit"),
    "nothing to evaluate": (lambda text: text.replace("eval", "fit"), "eval"),
}


def break_table(path, change):
    text = path.read_text()
    lines = text.splitlines()
    path.write_text(change("\n".join(lines[:3] + lines[-1:]) + "\n"), errors="surrogateescape")


@pytest.mark.parametrize("kind", [*TABLES, *PHASES])
def test_csv_of_a_client(refuse, kind):
    change, culprit = {**TABLES, **PHASES}[kind]
    path = refuse.datasets / "Small" / "clients" / "client_1.csv"
    break_table(path, change)
    refuse("client.py", ["--cid", 1], "client_1.csv" if culprit[-4:] != ".npy" else "train", culprit)


@pytest.mark.parametrize("kind", TABLES)
def test_csv_of_the_test_set(refuse, kind):
    change, culprit = TABLES[kind]
    path = refuse.datasets / "Small" / "test.csv"
    break_table(path, lambda text: change(text).replace(",eval", ""))
    refuse("server.py", [], "test.csv" if culprit[-4:] != ".npy" else "test", culprit)


def npy(array, **changes):
    """The bytes of a .npy file, with replacements of the same length in its header."""
    file = io.BytesIO()
    np.save(file, array)
    content = file.getvalue()
    for old, new in changes.values():
        assert old in content and len(old) == len(new)
        content = content.replace(old, new)
    return content


def npz(array):
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


IMAGE = np.zeros((32, 32, 3), np.uint8)
IMAGES = {
    "missing": None,
    "empty": b"",
    "text": b"no image",
    "a png": PNG,
    "cut in the header": npy(IMAGE)[:50],
    "cut in the pixels": npy(IMAGE)[:-1],
    "unbalanced header": npy(IMAGE, header=(b"}", b" ")),
    "keys that cannot be sorted": npy(IMAGE, header=(b" 'shape'", b"B'shape'")),
    "more pixels than memory": npy(IMAGE, header=(b"(32, 32, 3), }      ", b"(3200000, 32000000)}")),
    "an npz": npz(IMAGE),
    "a cut npz": npz(IMAGE)[:100],
    "a pickle": npy(np.array([None, 1])),
    "floats": npy(IMAGE / 255),
    "int8": npy(IMAGE.astype(np.int8)),
    "channels first": npy(IMAGE.transpose(2, 0, 1).copy()),
    "four channels": npy(np.zeros((32, 32, 4), np.uint8)),
    "a row": npy(IMAGE[0, 0]),
    "no pixels": npy(IMAGE[:0]),
    "grey among coloured": npy(IMAGE[:, :, 0].copy()),
}


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("script", ["client.py", "server.py"])
def test_images(refuse, script, kind):
    folder = refuse.datasets / "Small"
    if script == "client.py":
        table = pd.read_csv(folder / "clients" / "client_0.csv")
        path = folder / "train" / f"{table['id'].iloc[-1]}.npy"
    else:
        path = folder / "test" / "5.npy"
    path.unlink()
    if IMAGES[kind] is not None:
        path.write_bytes(IMAGES[kind])
    refuse(script, ["--cid", 0] if script == "client.py" else [], path)


def test_images_with_other_channels_than_the_dataset(refuse):
    path = refuse.datasets / "Small" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "channels": 1}))
    refuse("client.py", ["--cid", 0], "client_0.csv", "channels")
    refuse("server.py", [], refuse.datasets / "Small" / "test", "channels")


# ---------------------------------------------------------------------------------------------------------------------
# Secrets, certificates, addresses, checkpoints.


@pytest.mark.parametrize("script, args", [("client.py", ["--cid", 0]), ("server.py", [])])
def test_secret_files(refuse, tmp_path, script, args):
    path = tmp_path / "secret"
    refuse(script, [*args, "--secret_file", path], path)
    for short in (" \n", "open sesame, please"):
        path.write_text(short)
        path.chmod(0o600)
        refuse(script, [*args, "--secret_file", path], path, "head -c 32 /dev/urandom | base64 >")
    path.write_text("open sesame, pretty please")
    for mode in (0o604, 0o640):
        path.chmod(mode)
        refuse(script, [*args, "--secret_file", path], path, "chmod 600")
    refuse(script, [*args, "--secret_file", tmp_path], tmp_path)


def test_root_certificate(refuse, tmp_path):
    path = tmp_path / "ca.pem"
    refuse("client.py", ["--cid", 0, "--root_certificate", path], path)
    refuse("client.py", ["--cid", 0, "--root_certificate", tmp_path], tmp_path)
    for content in ("", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        path.write_text(content)
        refuse("client.py", ["--cid", 0, "--root_certificate", path, "--max_wait_time", 0.1], path)


def test_certificates(refuse, tmp_path):
    folder = tmp_path / "certificates"
    refuse("server.py", ["--certificates", folder], folder)
    folder.mkdir()
    refuse("server.py", ["--certificates", folder], folder)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")  # it writes beside its own folder
    subprocess.run(["bash", tmp_path / "deploy" / "make_certificates.sh", "127.0.0.1"], check=True, timeout=60)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("ca.pem", "server.pem", "server.key"):
        (folder / name).write_text("no certificate")
        refuse("server.py", ["--certificates", folder], folder)
        (folder / name).write_bytes(good[name])
    (folder / "server.key").chmod(0o640)
    refuse("server.py", ["--certificates", folder], f"chmod 600 {folder / 'server.key'}")


@pytest.mark.parametrize("days, words", [((-9, -2), "has expired"), ((2, 9), "is not valid yet")])
def test_certificates_out_of_date_are_said_on_both_sides(refuse, tmp_path, monkeypatch, days, words):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    certificate = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    now = datetime.datetime.now(datetime.UTC)
    certificate = certificate.not_valid_before(now + datetime.timedelta(days[0]))
    certificate = certificate.not_valid_after(now + datetime.timedelta(days[1]))
    for extension in (x509.SubjectAlternativeName([x509.DNSName("localhost")]), x509.BasicConstraints(True, None)):
        certificate = certificate.add_extension(extension, critical=False)
    certificate = certificate.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    for path in ("ca.pem", "server.pem"):
        (tmp_path / path).write_bytes(certificate)
    (tmp_path / "server.key").touch(0o600)
    (tmp_path / "server.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    refuse("server.py", ["--certificates", tmp_path], f"certificate {tmp_path / 'ca.pem'} {words}")
    monkeypatch.undo()  # what keeps scripts from the network
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")

    def answer():
        with contextlib.suppress(OSError):
            context.wrap_socket(listening.accept()[0], server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(20)
        server_side = threading.Thread(target=answer)
        server_side.start()
        try:
            said = connection.probe("localhost", listening.getsockname()[1], tmp_path / "ca.pem")
        except libs.UserError as error:
            said = str(error)
        server_side.join()
    assert "the certificate of the server at localhost:" in said and words in said, said


def test_addresses_that_cannot_be_listened_on(refuse):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        refuse("server.py", ["--server_port", port], port, "in use")
    for address in ("192.0.2.1", "2001:db8::1"):  # for documentation, nobody's
        refuse("server.py", ["--server_address", address], address, "not an address of this machine; use 0.0.0.0\n")
    refuse("server.py", ["--server_address", "no such host"], "no such host")


@pytest.mark.parametrize("kind", ["garbage", "empty", "cut", "foreign", "classes", "dataset"])
def test_checkpoints_that_cannot_be_resumed_from(refuse, kind):
    path = refuse.ckps / "Small" / "server.ptl"
    dataset = "Cars" if kind == "dataset" else "Small"
    save_checkpoint(path, LeNet5(3, 7 if kind == "classes" else 10), {"dataset": dataset})
    if kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind in ("garbage", "empty", "cut"):
        path.write_bytes({"garbage": b"no checkpoint", "empty": b"", "cut": path.read_bytes()[:-1000]}[kind])
    refuse("server.py", ["--resume"], path)
