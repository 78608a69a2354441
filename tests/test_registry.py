"""Two devices under one cid: the copy of an SD card, a board that has died, and one that only seems to have."""

import signal

import pytest
from helpers import history, lines, new_suite, ordered_client, play, start_patched

QUICK = "from plumbing.laptop import remote; remote.BUSY, remote.IDLE = 1, 2"  # seconds


@pytest.fixture
def boards(tmp_path, three_shards):
    """A server for two clients, and two devices whose cards are copies of each other."""
    suites = []
    for name in ("laptop", "one", "two"):
        (tmp_path / name).mkdir()
        suites.append(new_suite(tmp_path / name, three_shards))
    laptop, one, two = suites
    one.port = two.port = laptop.port
    for device in (one, two):
        device.ckps("Tiny").mkdir(parents=True)
        (device.ckps("Tiny") / "client_0.id").write_text("0123456789abcdef" * 2)
    yield suites
    for suite in suites:
        suite.close()


def start_server(laptop, *args):
    return start_patched(laptop, "server", QUICK, "--num_clients", 1, "--num_rounds", 3, *args)


@pytest.mark.parametrize("state", ["waiting", "training"])
def test_newer_of_two_live_devices_is_refused_in_words(boards, state):
    laptop, one, two = boards
    server = start_server(laptop) if state == "training" else start_server(laptop, "--num_clients", 2)
    first = ordered_client(one, 0)
    first.wait_for("fit of round 1" if state == "training" else "connected", timeout=120)
    second = ordered_client(two, 0)
    assert second.wait(120) == 2
    (line,) = second.err.splitlines()
    assert "cid 0 is in use by another device, with the same id: one card is a copy of the other's" in line
    assert lines(server, "in use by another device")
    if state == "training":
        for current in (1, 2, 3):
            play(one, current, {0: ""})
        assert (server.wait(), first.wait()) == (0, 0)
        assert (history(laptop)["failures"] == 0).all() and not lines(server, "is back")


def test_frozen_device_is_replaced(boards):
    """It has gone away without a word: the server asks it, waits for its answer, and takes the next."""
    laptop, one, two = boards
    server = start_server(laptop, "--num_clients", 2)
    first = one.client(0, "--dataset", "Tiny")
    server.wait_for("cid 0 joined", timeout=120)
    first.send(signal.SIGSTOP)
    second = two.client(0, "--dataset", "Tiny")
    server.wait_for("(1 of 2 clients)", count=2)
    second.wait_for("connected")
    assert second.popen.poll() is None and not lines(server, "in use")
