"""Strangers at the server's door: how many are let in for how long, and that none of them stops a run."""

import contextlib
import queue
import time

from plumbing.common import frames
from plumbing.common.proof import make_pass, make_ticket
from plumbing.laptop import door
from plumbing.laptop.registry import Registry

import grpc
import numpy as np
import psutil
import pytest
from helpers import HERE, free_port, history, lines, wait_until

SECRET = b"tell nobody, not even me"
TASK = {"dataset": "Tiny", "dataset_id": None, "channels": 3, "num_classes": 10, "net": "LeNet5", "fingerprint": "f1"}
TASK["trial"] = np.zeros((2, 4), np.float32)


class Visitor:
    """A bare gRPC client, which says what it is told to."""

    def __init__(self, port, given=None):
        own = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each
        self.channel, self.said = grpc.insecure_channel(f"127.0.0.1:{port}", own), queue.SimpleQueue()
        metadata = (("pass", given),) if given else ()
        self.stream = self.channel.stream_stream(frames.METHOD)(iter(self.said.get, None), metadata=metadata)

    def hear(self):
        """Return the next frame's header, or the name of the status with which the stream has ended."""
        try:
            return frames.decode(next(self.stream))[0]
        except StopIteration:
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

    def leave(self):
        self.said.put(None)
        self.channel.close()


@pytest.fixture
def house(capsys):
    """A registry behind a door, and a function that makes visitors."""
    registry, port = Registry(3, TASK, secret=SECRET), free_port()
    server = door.listen(registry, f"127.0.0.1:{port}")
    with contextlib.ExitStack() as visitors:

        def visit(given=None):
            visitor = Visitor(port, given)
            visitors.callback(visitor.leave)
            return visitor

        yield registry, visit
    server.stop(0).wait()


def test_strangers_have_few_places_and_those_with_a_pass_need_none(house):
    registry, visit = house
    strangers = [visit() for _ in range(door.PER_ADDRESS)]
    assert [stranger.hear()["kind"] for stranger in strangers] == ["hello"] * len(strangers)
    assert visit().hear() == "RESOURCE_EXHAUSTED"
    ticket = make_ticket(registry.ticket_key, "device")
    passes = [f"n1  {make_pass(SECRET, 'n1')}", f"n2 device {make_pass(ticket.encode(), 'n2')}"]
    assert [visit(given).hear()["kind"] for given in passes] == ["hello"] * 2
    wrong = [*passes, f"n3  {make_pass(b'another', 'n3')}", f"n4 other {make_pass(ticket.encode(), 'n4')}", "n5"]
    assert [visit(given).hear() for given in wrong] == ["RESOURCE_EXHAUSTED"] * len(wrong)
    strangers[0].leave()
    wait_until("a place is free", lambda: visit().hear() != "RESOURCE_EXHAUSTED", 10)


def test_stranger_is_sent_away_when_its_time_is_over_whatever_it_does(house, monkeypatch):
    from plumbing.laptop import handshake

    monkeypatch.setattr(handshake, "PATIENCE", 1)
    _, visit = house
    silent, slow = visit(), visit()
    started = time.monotonic()
    assert silent.hear()["kind"] == slow.hear()["kind"] == "hello"
    slow.said.put(frames.LENGTHS.pack(60_000, 9))  # and nothing else
    assert silent.hear() == "CANCELLED" and 0.9 < time.monotonic() - started < 5


@pytest.mark.parametrize("answer, reason", [
    (frames.encode("hello", {"about": {}}, [bytes(frames.FIRST)]), "bytes, where 65536 are the most"),
    (bytes(2 * frames.CHUNK), None), (b"nonsense", "what it sends is no frame"),
    (frames.encode("ping"), "it answers no hello"),
])  # fmt: skip
def test_stranger_that_sends_nonsense_is_sent_away(house, capsys, answer, reason):
    registry, visit = house
    visitor = visit()
    visitor.hear()
    visitor.said.put(answer)
    assert visitor.hear() in ("OK", "CANCELLED", "RESOURCE_EXHAUSTED")
    if reason:
        out = []
        wait_until("it is said", lambda: out.append(capsys.readouterr().out) or reason in "".join(out), 5)


def test_old_client_is_named(house, capsys):
    _, visit = house
    visitor = visit()
    with pytest.raises(grpc.RpcError):
        next(visitor.channel.stream_stream(door.OLD_METHOD)(iter([])))
    assert "it runs FL-IoT before 1.2.0 (make deploy), or is not this suite's client.py" in capsys.readouterr().out


def test_address_of_a_stranger():
    names = {
        "ipv4:10.0.0.7:5678": "10.0.0.7",
        "ipv6:%5B::ffff:10.0.0.7%5D:5678": "10.0.0.7",
        "ipv6:%5B2001:db8::1%5D:5678": "2001:db8::/64",
        "ipv6:[fe80::1%25eth0]:5678": "fe80::/64",
        "unix:": "unix:",
    }
    assert {name: door.address_of(name) for name in names} == names


def test_files_that_a_server_may_open_are_raised_to_the_most(monkeypatch):
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        assert door.raise_file_limit() == resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(before[1], 2**16)
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (512, 512))  # as many as it may already
        monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: None)
        assert door.raise_file_limit() == 512
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


ROUNDS = 20


@pytest.mark.parametrize("kinds", [["idle", "silent", "deaf", "big", "cancel", "noise"]], ids=" ".join)
def test_strangers_at_work_stop_no_run(tiny, kinds):
    """Each of them alone has ended a run, or shut out all devices, before there was this door (tests/strangers.py)."""
    secret = tiny.root / "secret"
    secret.write_bytes(SECRET)
    secret.chmod(0o600)
    about = ("--dataset", "Tiny", "--secret_file", secret)
    server = tiny.server(*about, "--num_clients", 3, "--num_rounds", ROUNDS)
    server.wait_for("waiting for 3 of 3 clients")
    process = psutil.Process(server.pid)
    before, threads = process.memory_info().rss, 0
    tiny.start(HERE / "strangers.py", tiny.port, *kinds)
    time.sleep(4)
    grown = process.memory_info().rss - before
    devices = [tiny.client(cid, *about) for cid in range(3)]
    for device in devices:
        device.wait_for(" on cpu")
    ready = time.monotonic()
    server.wait_for("joined", count=3)
    joined = time.monotonic() - ready
    while server.popen.poll() is None:
        with contextlib.suppress(psutil.Error):
            threads = max(threads, process.num_threads())
        time.sleep(0.05)
    assert [server.wait(), *(device.wait(30) for device in devices)] == [0] * 4, server
    assert list(history(tiny)["clients"]) == [3] * ROUNDS and (history(tiny)["failures"] == 0).all()
    assert joined < 15 and grown < 64 * 2**20 and threads < 200
    assert "Traceback" not in server.err and len(lines(server, "turned away")) < 60
