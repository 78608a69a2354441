"""Fixtures that several modules use; the helpers that are no fixtures are in helpers.py."""

import os
import shutil
import sys

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the workers share the cores
pytest.register_assert_rewrite("helpers")

from helpers import ROOT, SHARED, Process, Suite, heed_signals, write_images  # noqa: E402

heed_signals()
Process.forking = hasattr(os, "pidfd_open")  # on Linux
sys.path.insert(0, str(ROOT))

import partition  # noqa: E402 (the suite's own modules lie beside the tests' folder)

# With several workers, each of which takes file after file, the long ones come first.
LONG = "deploy partition process rounds record setup_device readme connection screen wandb_run sources".split()


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem[len("test_") :], len(LONG)))


@pytest.fixture
def suite(tmp_path):
    suite = Suite(tmp_path)
    yield suite
    suite.close()


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
