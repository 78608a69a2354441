"""What the tests share: copies of the suite in folders of their own, its scripts as real processes, small datasets."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))

import partition  # noqa: E402 (the suite's own modules lie beside the tests' folder)


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Process:
    """A running script: its output as it grows, its signals, and its end, all bounded in time."""

    def __init__(self, command, log, env, cwd):
        self.log, self.errors = Path(f"{log}.out"), Path(f"{log}.err")
        with open(self.log, "w") as out, open(self.errors, "w") as err:
            self.popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=cwd)
        self.pid = self.popen.pid

    @property
    def out(self):
        return self.log.read_text()

    @property
    def err(self):
        return self.errors.read_text()

    def __str__(self):
        return f"{self.popen.args}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    def wait_for(self, text, timeout=90, count=1):
        """Wait until `text` stands in the output `count` times; fail when the process ends or time runs out before."""
        until = time.monotonic() + timeout
        while (self.out + self.err).count(text) < count:
            ended = self.popen.poll() is not None and (self.out + self.err).count(text) < count
            assert not ended, f"ended with {self.popen.returncode} without {text!r}: {self}"
            assert time.monotonic() < until, f"no {text!r} within {timeout} s: {self}"
            time.sleep(0.05)

    def wait(self, timeout=90):
        """The exit code; fails when there is none in time."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s: {self}")

    def send(self, signum):
        os.kill(self.pid, signum)

    def kill(self):
        if self.popen.poll() is None:
            self.send(signal.SIGKILL)
            self.popen.wait()


class Suite:
    """A copy of the suite's scripts in a folder of its own, where they find and leave their files."""

    def __init__(self, root):
        self.root, self.port, self.processes = root, free_port(), []
        for script in ROOT.glob("*.py"):
            shutil.copy(script, root)
        shutil.copytree(ROOT / "deploy", root / "deploy")
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        self.env.update(OMP_NUM_THREADS="1", WANDB_MODE="offline", PYTHONUNBUFFERED="1")

    def start(self, script, *args, env=None):
        """Start a script of the suite, or `-c` with code."""
        log = self.root / f"process_{len(self.processes)}"
        command = [sys.executable, script if script == "-c" else self.root / script, *map(str, args)]
        process = Process(command, log, {**self.env, **(env or {})}, "/")
        self.processes.append(process)
        return process

    def server(self, *args, **kwargs):
        return self.start("server.py", "--server_port", self.port, *args, **kwargs)

    def client(self, cid, *args, **kwargs):
        return self.start("client.py", "--server_port", self.port, "--num_threads", 1, "--cid", cid, *args, **kwargs)

    def run(self, script, *args, timeout=90, env=None):
        """Run a script to its end; the Process, whose `popen.returncode` is there."""
        process = self.start(script, *args, env=env)
        process.wait(timeout)
        return process

    def partition(self, *args, **kwargs):
        process = self.run("partition.py", *args, **kwargs)
        assert process.popen.returncode == 0, process
        return process

    def ckps(self, dataset):
        return self.root / "ckps" / dataset

    def close(self):
        for process in self.processes:
            process.kill()


@pytest.fixture
def suite(tmp_path):
    suite = Suite(tmp_path)
    yield suite
    suite.close()


def write_images(path, num_train, num_test):
    """A zip of drawn shapes as PNG files, in the layout that --source takes."""
    with zipfile.ZipFile(path, "w") as archive:
        classes, _, splits = partition.draw_shapes(num_train, num_test)
        for split, _, images in splits:
            for index, (image, label) in enumerate(images):
                png = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
                archive.writestr(f"{split}/{classes[label]}/{index:04}.png", png)
    return path


@pytest.fixture(scope="session")
def shapes_zip(tmp_path_factory):
    """600 training images and 100 test images of ten shapes."""
    return write_images(tmp_path_factory.mktemp("shapes") / "shapes.zip", 600, 100)


@pytest.fixture(scope="session")
def three_shards(tmp_path_factory, shapes_zip):
    """A datasets/ folder with the dataset Tiny: 3 clients of 160 fit and 40 eval images each, 100 test images."""
    root = tmp_path_factory.mktemp("three_shards")
    suite = Suite(root)
    suite.partition("--dataset", "Tiny", "--source", shapes_zip, "--num_clients", 3)
    return root / "datasets"


@pytest.fixture
def tiny(suite, three_shards):
    """A suite with the dataset Tiny in place."""
    shutil.copytree(three_shards, suite.root / "datasets")
    return suite


@pytest.fixture(scope="session")
def cifar10():
    """The folder ../shared/cifar10, which holds the real images."""
    folder = SHARED / "cifar10"
    if not (folder / "cifar10-images.zip").exists():
        pytest.skip("the real CIFAR-10 images are not in ../shared/cifar10")
    return folder


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Runs partition.py in this process, with a datasets/ folder of the test's own; gives the dataset's folder."""
    monkeypatch.setattr(partition, "DATASETS", tmp_path / "datasets")

    def make(dataset, *args):
        monkeypatch.setattr(sys, "argv", ["partition.py", "--dataset", dataset, *map(str, args)])
        partition.main()
        return tmp_path / "datasets" / dataset

    return make


def tree(folder):
    """What lies under `folder`, hidden or not: {relative path: bytes, or None for a folder}."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def shards(folder):
    """The tables of all clients, by cid."""
    count = len(list((folder / "clients").iterdir()))
    return [pd.read_csv(folder / "clients" / f"client_{cid}.csv") for cid in range(count)]


def images(folder, split):
    """All images of a split and their labels from the CSVs: [(label, array)]."""
    table = pd.concat(shards(folder)) if split == "train" else pd.read_csv(folder / "test.csv")
    assert len(table) == len(list((folder / split).iterdir()))
    return [(row.label, np.load(folder / split / f"{row.id}.npy")) for row in table.itertuples()]
