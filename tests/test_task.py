"""The data is cut anew while devices wait or sleep: nobody trains on a shard of another cut without a word of it."""

import json
import shutil
import signal

import pandas as pd
import pytest
from helpers import Suite, lines, patched

CUT = ("--dataset", "Tiny", "--num_clients", 2)


@pytest.fixture(scope="module")
def waited(tmp_path_factory, shapes_zip):
    """Clients wait for a server that starts again after partition.py has run again; one has the new cut, one not."""
    laptop, device = (Suite(tmp_path_factory.mktemp(name)) for name in ("laptop", "device"))
    device.port = laptop.port
    try:
        laptop.partition(*CUT, "--source", shapes_zip, "--bundles")
        shutil.unpack_archive(laptop.root / "datasets/Tiny/bundles/client_1.tar", device.root)
        near = laptop.client(0, "--dataset", "Tiny", "--max_wait_time", 0)
        far = device.client(1, "--dataset", "Tiny", "--max_wait_time", 0)
        first = laptop.server("--dataset", "Tiny", "--num_rounds", 10**6)
        first.wait_for("round 2/")
        first.send(signal.SIGINT)
        first.wait()
        laptop.ids = [dataset_id(laptop)]
        laptop.partition(*CUT, "--source", shapes_zip, "--partition", "dirichlet", "--eval_fraction", 0.5)
        laptop.ids.append(dataset_id(laptop))
        second = laptop.server("--dataset", "Tiny", "--min_clients", 1, "--num_rounds", 2)
        codes = [process.wait(120) for process in (second, near, far)]
        yield laptop, near, far, second, codes
    finally:
        laptop.close()
        device.close()


def dataset_id(suite):
    return json.loads((suite.root / "datasets/Tiny/dataset.json").read_text())["id"]


def test_waiting_client_reads_the_new_shard(waited):
    laptop, near, _, second, codes = waited
    assert codes[:2] == [0, 0], second
    table = pd.read_csv(laptop.root / "datasets/Tiny/clients/client_0.csv")["phase"].value_counts()
    assert lines(near, "was read again") == [
        f"the shard was read again: {table['fit']} fit + {table['eval']} eval images"
    ]
    assert "cid 0 joined" in second.out and laptop.ids[0] != laptop.ids[1]


def test_client_with_an_old_bundle_is_turned_away_with_that_reason(waited):
    _, _, far, second, codes = waited
    assert codes[2] == 2
    (line,) = far.err.splitlines()
    assert "its shard is not of the server's split of Tiny" in line and "bundles/client_1.tar" in line
    assert lines(second, "turned away cid 1: its shard is not of the server's split")


def test_bundle_of_another_cut_over_a_shard_is_found_at_the_start(suite, shapes_zip):
    """dataset.json is of the newest bundle, client_0.csv of the one before."""
    suite.partition(*CUT, "--source", shapes_zip, "--bundles")
    device = suite.root / "board"
    shutil.copytree(suite.root, device, ignore=shutil.ignore_patterns("board", "datasets"))
    shutil.unpack_archive(suite.root / "datasets/Tiny/bundles/client_0.tar", device)
    suite.partition(*CUT, "--source", shapes_zip, "--bundles", "--seed", 1)
    shutil.unpack_archive(suite.root / "datasets/Tiny/bundles/client_1.tar", device)
    process = suite.run(device / "client.py", "--dataset", "Tiny", "--cid", 0, "--max_wait_time", 1)
    assert process.popen.returncode == 2
    (line,) = process.err.splitlines()
    assert "client_0.csv" in line


def test_server_takes_the_number_of_clients_from_the_cut(tiny):
    server = tiny.server("--dataset", "Tiny")
    server.wait_for("waiting for 3 of 3 clients: cid 0, 1, 2")
    server.kill()
    fewer = tiny.server("--dataset", "Tiny", "--num_clients", 2)
    fewer.wait_for("waiting for 2 of 2 clients")
    assert "note: Tiny is split into 3 shards, and --num_clients is 2\n" in fewer.out
    fewer.kill()
    more = tiny.server("--dataset", "Tiny", "--num_clients", 5)  # it would wait for cids without a shard
    assert more.wait() == 2
    assert more.err == "server.py: --num_clients 5: Tiny is split into 3 shards only\n"


ANOTHER_CLASS = """
import data
real = data.describe_dataset
def describe(dataset, folder):
    info = real(dataset, folder)
    return {**info, "id": None, "classes": [*info["classes"], "extra"]}
data.describe_dataset = describe
"""


def test_other_number_of_classes_is_said_as_such(tiny):
    server = tiny.server("--dataset", "Tiny", "--num_clients", 1)
    server.wait_for("waiting for 1 of 1")
    device = tiny.start(*patched(tiny, "client", ANOTHER_CLASS), "--cid", 0)
    assert device.wait() == 2
    assert device.err.endswith("its dataset has 11 classes, the server's has 10\n"), device
