"""What both engines are compared with: the same run by the scripts."""

import shutil

import pytest
from helpers import ROOT, Suite, history

NUM_CLIENTS, NUM_ROUNDS = 4, 5
SAME = ("--num_clients", NUM_CLIENTS, "--seed", 1)


def new_app(root, datasets):
    """A copy of the suite that is a Flower App, with the folder `datasets`."""
    suite = Suite(root)
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(datasets, root / "datasets")
    suite.env["FLWR_HOME"] = str(root / "flower")
    return suite


def train_by_scripts(suite, num_rounds, *args):
    server = suite.server("--dataset", "Tiny", *SAME, "--num_rounds", num_rounds, *args)
    clients = [suite.client(cid, "--dataset", "Tiny") for cid in range(NUM_CLIENTS)]
    assert [process.wait(120) for process in [server, *clients]] == [0] * (1 + NUM_CLIENTS), server


@pytest.fixture(scope="session")
def datasets(tmp_path_factory, shapes_zip):
    suite = Suite(tmp_path_factory.mktemp("datasets"))
    suite.partition("--dataset", "Tiny", "--source", shapes_zip, "--num_clients", NUM_CLIENTS)
    return suite.root / "datasets"


@pytest.fixture(scope="session")
def by_scripts(tmp_path_factory, datasets):
    """The history of the run by server.py and client.py."""
    suite = new_app(tmp_path_factory.mktemp("scripts"), datasets)
    train_by_scripts(suite, NUM_ROUNDS)
    return history(suite)


@pytest.fixture
def app(tmp_path, datasets):
    suite = new_app(tmp_path, datasets)
    yield suite
    suite.close()


def compare(one, other, name):
    """Assert that two histories are the same within the noise of summation; says how near."""
    measures = [column for column in one.columns if column.endswith(("_loss", "_accuracy"))]
    assert len(measures) == 8 and list(one["round"]) == list(other["round"]) == list(range(1, NUM_ROUNDS + 1))
    gap = (one[measures] - other[measures]).abs().max().max()
    print(f"{name}: no figure of the {NUM_ROUNDS} rounds differs by more than {gap:.1e} from the scripts'")
    assert gap < 1e-3
