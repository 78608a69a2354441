"""Faults of server and devices, with real processes and real signals: what is lost, what goes on, what a user sees.

Most clients here are ordered_client.py: the suite's client.py, whose training waits for an order of the test and then
does what it says, so that every fault falls into the round it is meant for.
"""

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import psutil
import pytest
import torch
from helpers import (
    ends,
    history,
    lines,
    new_suite,
    ordered_client,
    play,
    start_patched,
    starts,
    wandb_folders,
    wandb_id,
    wandb_steps,
)


@pytest.fixture(scope="module")
def open_suite(tmp_path_factory, three_shards):
    """A function that gives a suite of its own, with the dataset Tiny; its processes end with the module."""
    with contextlib.ExitStack() as stack:

        def open_one(name):
            suite = new_suite(tmp_path_factory.mktemp(name), three_shards)
            stack.callback(suite.close)
            return suite

        yield open_one


def load(path):
    return torch.load(path, weights_only=True)


def digest(path):
    tensors = load(path)["model"].values()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()[:12]


def port_is_free(port):
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Devices that fail.


@pytest.fixture(scope="module")
def faulty(open_suite):
    """Six rounds of three clients, in which devices fail in every way but slowness."""
    suite = open_suite("faulty")
    first, second = ordered_client(suite, 0), ordered_client(suite, 1)
    first.wait_for("no server at", timeout=120)
    second.wait_for("no server at", timeout=120)
    server = suite.server("--dataset", "Tiny", "--num_clients", 3, "--num_rounds", 6)
    server.wait_for("waiting for 1 of 3 clients: cid 2\n", timeout=120)
    third = ordered_client(suite, 2)
    play(suite, 1, {0: "", 1: "", 2: "nan"})
    play(suite, 2, {0: "shape", 1: "zero", 2: ""})
    play(suite, 3, {0: "forget", 1: "raise", 2: ""})
    play(suite, 4, {0: "nan", 1: "nan metric", 2: "shape"})
    for client in (first, second, third):
        client.wait_for("fit of round 4", count=2)
    server.wait_for("round 3/6")
    suite.rows_before_round_4 = len(history(suite))
    play(suite, 4, {0: "", 1: "", 2: ""})
    second.wait_for("fit of round 5")
    second.kill()
    server.wait_for("cid 1 left")
    play(suite, 5, {0: "", 2: ""})
    server.wait_for("waiting for 1 of 3 clients: cid 1\n")
    suite.again = ordered_client(suite, 1)
    play(suite, 6, {0: "", 1: "", 2: ""})
    suite.code, suite.exits = server.wait(), [client.wait() for client in (first, suite.again, third)]
    suite.faulty, suite.clients = server, (first, second, third)
    return suite


def test_client_that_starts_before_the_server_waits_for_it(faulty):
    out = faulty.clients[0].out
    assert out.index("no server at 127.0.0.1") < out.index("connected to the server") < out.index("fit of round 1")


def test_training_ends_well_whatever_the_devices_did(faulty):
    assert faulty.code == 0 and faulty.exits == [0, 0, 0]
    assert faulty.faulty.err == ""
    rows = history(faulty)
    assert list(rows["round"]) == [1, 2, 3, 4, 5, 6]
    assert list(rows["clients"]) == [2, 1, 1, 3, 2, 3]
    assert list(rows["failures"]) == [1, 2, 2, 3, 1, 0]
    assert all(tensor.isfinite().all() for tensor in load(faulty.ckps("Tiny") / "server.ptl")["model"].values())


def test_each_dropped_result_has_one_line_with_cid_and_reason(faulty):
    said = [line.split(": dropped cid ") for line in lines(faulty.faulty, "dropped")]
    reasons = {(current, reason[0]): reason[3:] for current, reason in said}
    assert len(reasons) == len(said) == 9
    assert reasons["round 1", "2"] == "array layer1.0.weight has values that are not finite"
    assert reasons["round 2", "0"] == "array layer1.0.weight is float32 (5, 3, 5, 5), not float32 (6, 3, 5, 5)"
    assert reasons["round 2", "1"] == "number of examples is 0, not a positive integer"
    assert reasons["round 3", "0"] == "metric eval_loss is None, not a finite number"
    assert reasons["round 3", "1"] == "RuntimeError: the camera is unplugged"
    assert reasons["round 4", "1"] == "metric fit_loss is nan, not a finite number"
    assert reasons["round 5", "1"] == "connection lost"


@pytest.mark.parametrize("current", [2, 3])
def test_dropped_results_leave_no_trace_in_the_model(faulty, current):
    first, second, third = faulty.clients
    (good,) = ends(third, current)  # the only good result, so the mean is this very model
    assert starts(first, current + 1)[0] == starts(second, current + 1)[0] == starts(third, current + 1)[0] == good


def test_round_in_which_nobody_trained_is_run_again_from_the_old_model(faulty):
    for client in faulty.clients:
        before, after = starts(client, 4)
        assert before == after
    assert faulty.rows_before_round_4 == 3
    assert len(lines(faulty.faulty, "round 4: nobody trained; it is run again")) == 1


def test_fit_that_raises_is_shown_on_the_device_which_stays_in(faulty):
    second = faulty.clients[1]
    assert "Traceback" in second.err and "RuntimeError: the camera is unplugged" in second.err
    assert len(lines(second, "connected to the server")) == 1 and len(ends(second, 4)) == 2


def test_killed_client_is_taken_in_again(faulty):
    assert len(lines(faulty.faulty, "cid 1 joined")) == 2
    assert starts(faulty.again, 6) == starts(faulty.clients[0], 6)


def test_missing_clients_are_named_at_decreasing_frequency(monkeypatch):
    from plumbing.laptop import registry

    class Enough(Exception):
        pass

    def check():
        if clock[0] > 2000:
            raise Enough

    clock, said = [0.0], []
    monkeypatch.setattr(registry, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(registry, "say", lambda text: said.append((clock[0], text)))
    clients = registry.Registry(30, {})
    clients._cv = MagicMock(wait=lambda seconds: clock.append(clock.pop() + seconds))
    with pytest.raises(Enough):
        clients.wait_for_round(30, check)
    times = [when for when, _ in said]
    gaps = [later - sooner for sooner, later in zip(times, times[1:])]
    assert times[0] < 5 and 5 < len(times) < 15
    assert gaps == sorted(gaps) and gaps[0] < 10 and gaps[-1] > 300
    assert said[0][1] == f"waiting for 30 of 30 clients: cid {', '.join(map(str, range(20)))}, …"
    said.clear()
    for missing in ({3, 7}, {3, 7}, {7}, set(), {7}):
        clients.clients = {str(cid): None for cid in range(30) if cid not in missing}
        clients.wait_for_round(28, lambda: None)
    assert [text for _, text in said] == [
        f"continuing without cid {cids} (--min_clients 28)" for cids in ("3, 7", "7", "7")
    ]


TIMEOUT = 8  # seconds: time enough for the other client, also on a busy machine


@pytest.fixture(scope="module")
def frozen(open_suite):
    """Three rounds with two of three clients, one of which freezes: under training, and while it waits for work."""
    suite = open_suite("frozen")
    rounds = ("--num_clients", 3, "--min_clients", 2, "--round_timeout", TIMEOUT, "--num_rounds", 3)
    server = start_patched(suite, "server", "from plumbing.laptop import registry; registry.SETTLE = 1", *rounds)
    clients = [ordered_client(suite, cid, "--max_delay", 1) for cid in (0, 1)]
    clients[1].wait_for("fit of round 1", timeout=120)
    clients[1].send(signal.SIGSTOP)
    play(suite, 1, {0: ""})
    server.wait_for("round 1/3")
    server.wait_for("waiting for 2 of 3 clients: cid 1, 2\n")
    play(suite, 1, {1: ""})
    clients[1].send(signal.SIGCONT)
    server.wait_for("cid 1 joined", count=2)

    clients[0].wait_for("fit of round 2")
    play(suite, 2, {1: ""})
    clients[1].wait_for("round 2/3")
    time.sleep(0.5)  # its result has left
    clients[1].send(signal.SIGSTOP)
    play(suite, 2, {0: ""})
    server.wait_for("round 2/3")
    clients[1].send(signal.SIGCONT)
    server.wait_for("cid 1 joined", count=3)
    play(suite, 3, {0: "", 1: ""})
    suite.exits = [process.wait() for process in (server, *clients)]
    suite.server, suite.clients = server, clients
    return suite


def test_frozen_client_costs_its_round_and_no_longer_than_the_timeout(frozen):
    assert lines(frozen.server, "dropped cid") == [
        f"round {current}: dropped cid 1: no answer within {TIMEOUT} s" for current in (1, 2)
    ]
    rows = history(frozen)
    assert list(rows["clients"]) == [1, 2, 2] and list(rows["failures"]) == [1, 1, 0]
    assert (rows["round_seconds"][:2] >= TIMEOUT).all() and (rows["round_seconds"][:2] < TIMEOUT + 11).all()


def test_frozen_client_rejoins_when_it_thaws(frozen):
    assert frozen.exits == [0, 0, 0]
    assert "the server did not wait for us any longer; trying again" in frozen.clients[1].out
    assert frozen.clients[1].err == ""


def test_client_gives_up_after_its_waiting_time(suite, three_shards):
    (suite.root / "datasets").symlink_to(three_shards)
    client = suite.client(0, "--dataset", "Tiny", "--max_wait_time", 2)
    client.wait_for("trying again")
    started = time.monotonic()
    assert client.wait() == 1
    assert 0.5 < time.monotonic() - started < 10
    assert client.out.splitlines()[-1].endswith("giving up after 2 s (--max_wait_time)") and client.err == ""


# ---------------------------------------------------------------------------------------------------------------------
# A server that ends.


@pytest.fixture(scope="module")
def killed(open_suite):
    """Two clients through a server that is killed in round 4, stopped in rounds 5 and 6, then killed at random."""
    suite = open_suite("killed")
    folder, both = suite.ckps("Tiny"), {0: "", 1: ""}
    clients = [ordered_client(suite, cid, "--max_delay", 1) for cid in both]
    suite.states = {}

    def start(*args):
        return start_patched(suite, "server", "import os; os.setpgrp()", "--num_clients", 2, "--resume", *args)

    def reach(current, count=1):
        for client in clients:
            client.wait_for(f"fit of round {current} ", count=count, timeout=120)

    def keep(name, server):
        checkpoint = load(folder / "server.ptl")
        suite.states[name] = {
            "code": server.wait(),
            "rows": list(history(suite)["round"]),
            "round": checkpoint["round"],
            "run_id": checkpoint["wandb_run_id"],
            "digest": digest(folder / "server.ptl"),
            "picture": (folder / "metrics.png").exists() and (folder / "metrics.png").stat().st_mtime_ns,
            "folders": wandb_folders(suite),
            "server": server,
        }

    server = start("--num_rounds", 9)
    for current in (1, 2, 3):
        play(suite, current, both)
    reach(4)
    server.wait_for("round 3/9")
    server.kill()
    keep("killed", server)
    play(suite, 4, both)

    server = start("--num_rounds", 9)
    reach(4, count=2)
    play(suite, 4, both)
    reach(5)
    server.wait_for("round 4/9")
    play(suite, 5, {0: ""})
    clients[0].wait_for("trained round 5")
    clients[0].wait_for("round 5/9")
    server.send(signal.SIGTERM)
    server.wait()
    suite.told = [client.out for client in clients]
    keep("SIGTERM", server)
    play(suite, 5, {1: ""})

    server = start("--num_rounds", 9)
    reach(5, count=2)
    play(suite, 5, both)
    reach(6)
    server.wait_for("round 5/9")
    os.killpg(server.pid, signal.SIGINT)  # as a terminal does it: to wandb's helper too
    server.wait()
    keep("SIGINT", server)

    (suite.root / "orders" / "free").touch()
    for name in ("random 1", "random 2"):
        server = start("--num_rounds", 10_000)
        server.wait_for("/10000", timeout=120)
        time.sleep(random.uniform(0, 1))
        server.kill()
        keep(name, server)
    last = suite.states[name]["round"] + 4
    server = start("--num_rounds", last)
    suite.exits = [process.wait() for process in (server, *clients)]
    keep("end", server)
    suite.last, suite.clients = last, clients
    return suite


def test_server_resumes_with_the_weights_of_the_checkpoint(killed):
    state = killed.states["killed"]
    assert state["rows"] == [1, 2, 3] and state["round"] == 3
    assert "clients that are still running come back by themselves" not in state["server"].out
    assert "clients that are still running come back by themselves" in killed.states["SIGTERM"]["server"].out
    for client in killed.clients:
        assert starts(client, 4) == [state["digest"]] * 2
        assert ends(client, 3)[0] != state["digest"]  # it is the mean, not a client's own


def test_clients_come_back_by_themselves_and_end_well(killed):
    assert killed.exits == [0, 0, 0]
    for client in killed.clients:
        assert len(lines(client, "connected to the server")) == 6
        assert client.out.splitlines()[-1] == "training is over" and client.err == ""


def test_history_has_every_round_once(killed):
    assert list(history(killed)["round"]) == list(range(1, killed.last + 1))
    assert (history(killed)["clients"] == 2).all()


@pytest.mark.parametrize("name, code, last", [("SIGTERM", 143, 4), ("SIGINT", 130, 5)])
def test_stopped_server_leaves_all_up_to_the_last_finished_round(killed, name, code, last):
    state = killed.states[name]
    assert state["code"] == code
    assert state["rows"] == list(range(1, last + 1)) and state["round"] == last
    steps = [step for folder in state["folders"] for step in wandb_steps(folder)]
    assert state["picture"] and sorted(steps) == list(range(1, last + 1)) and last in wandb_steps(state["folders"][-1])
    assert f"stopping ({name};" in state["server"].out and state["server"].err == ""
    assert str(killed.ckps("Tiny") / "server.ptl") in state["server"].out
    assert state["server"].out.endswith(f"\nstopped after round {last}; continue with --resume\n")


def test_picture_is_drawn_anew_at_each_stop(killed):
    pictures = [killed.states[name]["picture"] for name in ("SIGTERM", "SIGINT", "end")]
    assert pictures == sorted(set(pictures))


def test_waiting_client_is_told_that_the_server_stops(killed):
    assert "the server stopped before the last round; trying again" in killed.told[0]
    for client in killed.clients:
        assert "trying again" in client.out and "turned" not in client.out


def test_runs_of_wandb_share_one_id_and_no_step(killed):
    folders = wandb_folders(killed)
    assert len(folders) == 6 and {wandb_id(folder) for folder in folders} == {killed.states["end"]["run_id"]}
    steps = [wandb_steps(folder) for folder in folders]
    assert sorted(step for part in steps for step in part) == list(range(1, killed.last + 1))
    assert all(part == sorted(part) for part in steps) and steps[-1][-4:] == list(
        range(killed.last - 3, killed.last + 1)
    )


@pytest.mark.parametrize("name", ["random 1", "random 2"])
def test_server_killed_at_any_moment_leaves_whole_files(killed, name):
    state = killed.states[name]
    assert state["code"] == -signal.SIGKILL
    assert state["rows"] == list(range(1, len(state["rows"]) + 1))
    assert 6 <= state["round"] <= len(state["rows"])
    assert [path for path in killed.ckps("Tiny").iterdir() if path.name.endswith(".part")] == []


def test_earlier_files_are_moved_aside_without_resume(open_suite):
    suite = open_suite("aside")
    folder = suite.ckps("Tiny")
    folder.mkdir(parents=True)
    files = {"server.ptl": b"model", "best.ptl": b"best", "history.csv": b"rows", "metrics.png": b"picture"}
    for name, content in {**files, "client_0.ptl": b"the device's own"}.items():
        (folder / name).write_bytes(content)
    server = suite.server("--dataset", "Tiny", "--num_clients", 1)
    server.wait_for("waiting for 1 of 1 clients: cid 0", timeout=120)
    server.send(signal.SIGTERM)
    assert server.wait() == 143, server
    assert {name: (folder / name).read_bytes() for name in files} == files  # no round of the new run is saved
    assert list((suite.root / "ckps").iterdir()) == [folder]

    (suite.root / "orders" / "free").touch()
    client = ordered_client(suite, 0, "--ckps", suite.root / "ckps" / "device")
    server = suite.server("--dataset", "Tiny", "--num_clients", 1, "--num_rounds", 1)
    assert server.wait() == 0 and client.wait() == 0, server
    (aside,) = (suite.root / "ckps").glob("Tiny.*")
    assert re.fullmatch(r"Tiny\.\d{4}-\d\d-\d\d_\d{6}", aside.name) and str(aside) in server.out
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == files
    assert (folder / "client_0.ptl").read_bytes() == b"the device's own" and load(folder / "server.ptl")["round"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# A run that cannot succeed.

FAILING = {
    "raise": """raise RuntimeError(f"out of memory, {time.monotonic_ns()} bytes are free")""",
    "nan": """arrays, images, _ = real_fit(self, parameters, config)
        return [np.full_like(array, np.nan) for array in arrays], images, FIGURES""",
    "shape": """arrays, images, _ = real_fit(self, parameters, config); return arrays[:-1], images, FIGURES""",
    "slow": """time.sleep(3); return real_fit(self, parameters, config)""",
}
FAIL_FROM = """
from libs import np
from plumbing.device import connection
import time
real_fit = script.Client.fit
FIGURES = dict.fromkeys(("fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy"), 0.5)

def fit(self, parameters, config):
    if config["round"] < FIRST:
        return real_fit(self, parameters, config)
    try:
        DO
    except RuntimeError as error:
        return [], 0, {"error": str(error)}

script.Client.fit, connection.MAX_DELAY = fit, 1
"""

IMPATIENT = "from plumbing.laptop import rounds; rounds.MAX_RETRY_DELAY = 0.2"


@pytest.mark.parametrize(
    "kind, first, reason",
    [
        ("raise", 2, r"out of memory, \d+ bytes are free"),
        ("nan", 1, "array layer1.0.weight has values that are not finite"),
        ("shape", 1, "19 arrays, not 20"),
        ("slow", 1, "no answer within 1 s"),
        ("--lr 1e20", 1, "metric fit_loss is (nan|inf), not a finite number"),
    ],
)
def test_a_run_that_cannot_succeed_ends_with_its_reason(tiny, kind, first, reason):
    flags = kind.split() if kind in ("--lr 1e20",) else ["--round_timeout", 1] * (kind == "slow")
    patch = FAIL_FROM.replace("FIRST", str(first)).replace("DO", FAILING[kind]) if kind in FAILING else ""
    clients = [start_patched(tiny, "client", patch, "--num_threads", 1, "--cid", cid) for cid in range(2)]
    server = start_patched(tiny, "server", IMPATIENT, "--num_clients", 2, "--num_rounds", 4, *flags)
    assert server.wait(150) == 1, server
    (line,) = server.err.splitlines()
    saved = "rounds 1 to 1 are saved" if first == 2 else "nothing is saved"
    assert re.match(f"server.py: round {first} failed on all clients 5 times in a row: .*{reason}.*{saved}", line), line
    assert len(lines(server, f"round {first}: nobody trained; it is run again")) == 4
    folder = tiny.ckps("Tiny")
    assert (folder / "server.ptl").exists() == (first == 2)
    if first == 2:
        assert list(history(tiny)["round"]) == [1] and load(folder / "server.ptl")["round"] == 1
    for client in clients:
        assert client.popen.poll() is None
    if kind != "slow":  # those are busy when the server ends
        for client in clients:
            client.wait_for("the server stopped before the last round; trying again")


def test_lost_connections_are_no_reason_to_end(tiny):
    patch = """
import os
script.Client.fit = lambda *args: os._exit(7)  # as a device that restarts
"""
    server = start_patched(tiny, "server", IMPATIENT, "--num_clients", 1, "--num_rounds", 1)
    for _ in range(6):
        assert start_patched(tiny, "client", patch, "--num_threads", 1, "--cid", 0).wait() == 7, server
    client = tiny.client(0, "--dataset", "Tiny")
    assert server.wait(150) == 0 and client.wait(20) == 0, server
    assert len(lines(server, "round 1: dropped cid 0: connection lost")) == 6


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint that does not fit.


@pytest.fixture(scope="module")
def refused(open_suite):
    """Servers that are told to resume from what they cannot, all at the same time: {what: (process, its folder)}."""
    from nets import LeNet5

    def checkpoint(path, num_classes=10, **about):
        save = {"model": LeNet5(3, num_classes).state_dict(), "net": "LeNet5", "in_channels": 3, "dataset": "Tiny"}
        save.update(num_classes=num_classes, classes=None, round=2, metrics={"test_accuracy": 0.5}, args={})
        torch.save({**save, "wandb_run_id": "abcd1234", **about}, path)

    def rows(path, text):
        header = "round,fit_loss,fit_accuracy,eval_loss,eval_accuracy,global_eval_loss,global_eval_accuracy,"
        path.write_text(header + "test_loss,test_accuracy,clients,failures,round_seconds\n" + text)

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {folders['malicious'] / 'executed'}",)

    names = ("dataset", "classes", "net", "damaged", "malicious", "history", "best", "weights")
    suites = {name: open_suite(name) for name in names}
    folders = {name: suite.ckps("Tiny") for name, suite in suites.items()}
    for folder in folders.values():
        folder.mkdir(parents=True)
        checkpoint(folder / "server.ptl")
    checkpoint(folders["dataset"] / "server.ptl", dataset="Other")
    checkpoint(folders["classes"] / "server.ptl", num_classes=4)
    checkpoint(folders["net"] / "server.ptl", net="OtherNet")
    checkpoint(folders["weights"] / "server.ptl", model=torch.nn.Linear(2, 2).state_dict())
    whole = (folders["damaged"] / "server.ptl").read_bytes()
    (folders["damaged"] / "server.ptl").write_bytes(whole[: len(whole) // 2])
    checkpoint(folders["malicious"] / "server.ptl", args=Malicious())
    rows(folders["history"] / "history.csv", "1,0.5,0.5\n2,zwei\n")
    rows(folders["best"] / "history.csv", "1,1,0.1,1,0.1,1,0.1,1,0.1,2,0,1\n2,1,0.1,1,0.1,1,0.1,1,0.1,2,0,1\n")
    (folders["best"] / "best.ptl").write_bytes(whole[: len(whole) // 2])
    before = {name: sorted(path.read_bytes() for path in folder.iterdir()) for name, folder in folders.items()}
    servers = {name: suite.server("--dataset", "Tiny", "--resume") for name, suite in suites.items()}
    return servers, folders, before


@pytest.mark.parametrize(
    "name, reason",
    [
        ("dataset", "server.ptl: its dataset is Other, not Tiny"),
        ("classes", "server.ptl: its num_classes is 4, not 10"),
        ("net", "server.ptl: .*net.*OtherNet"),
        ("damaged", "cannot resume from .*server.ptl"),
        ("malicious", "cannot resume from .*server.ptl"),
        ("weights", "cannot resume from .*server.ptl"),
        ("history", "cannot resume from .*history.csv"),
    ],
)
def test_resume_from_what_does_not_fit_is_refused_with_its_reason(refused, name, reason):
    servers, folders, before = refused
    assert servers[name].wait() == 2, servers[name]
    assert len(servers[name].err.splitlines()) == 1 and re.search(reason, servers[name].err), servers[name]
    after = sorted(path.read_bytes() for path in folders[name].iterdir() if path.name != "server.lock")
    assert after == before[name]  # nothing is taken along, and nothing in it was executed


def test_damaged_best_checkpoint_is_passed_over(refused):
    server = refused[0]["best"]
    server.wait_for("round 3 to 100", timeout=60)
    server.send(signal.SIGTERM)
    assert server.wait() == 143, server
    assert "Traceback" not in server.err


# ---------------------------------------------------------------------------------------------------------------------
# A disk that is full, a folder that cannot be written, an error of our own.


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 2 MB at `folder`, which has to be mounted; skips where that cannot be done."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_full_disk_read_only_folder_and_error_of_our_own(open_suite):
    suite = open_suite("disk")
    folder = suite.ckps("Tiny")
    arguments = ("--num_clients", 1, "--num_rounds", 5)
    with small_disk(folder):
        client = ordered_client(suite, 0, "--max_delay", 1, "--ckps", suite.root / "ckps" / "device")

        # Full in round 2: what round 1 left stays.
        server = start_patched(suite, "server", "", *arguments)
        play(suite, 1, {0: ""})
        server.wait_for("round 1/5")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with contextlib.suppress(OSError):
            (folder / "filler").write_bytes(bytes(2 << 20))
        client.wait_for("fit of round 2")
        play(suite, 2, {0: ""})
        assert server.wait() == 1, server
        play(suite, 3, {0: ""})
        client.wait_for("lost the server")
        (line,) = server.err.splitlines()
        assert line.startswith("server.py: cannot go on:") and "No space left on device" in line
        (folder / "filler").unlink()
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "metrics.png"}
        assert after["server.ptl"] == before["server.ptl"] and load(folder / "server.ptl")["round"] == 1
        assert list(history(suite)["round"])[:1] == [1] and set(after) <= set(before)

        # Not writable at the start: nothing begins.
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        server = suite.run("server.py", "--server_port", suite.port, "--dataset", "Tiny", *arguments)
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        assert server.popen.returncode == 2
        assert server.err == f"server.py: cannot write to {folder}: Read-only file system\n"

        # An error of our own in a round: its reason, a free port, no process that stays.
        patch = """
def aggregate_fit(self, current, results, failures):
    raise RuntimeError("a bug of ours")
script.FedAvg.aggregate_fit = aggregate_fit
"""
        server = start_patched(suite, "server", patch, *arguments, "--resume")
        server.wait_for("cid 0 joined", timeout=120)
        client.wait_for("fit of round 2", count=2)
        children = psutil.Process(server.pid).children(recursive=True)
        play(suite, 2, {0: ""})
        assert server.wait() == 1, server
        assert "Traceback" in server.err
        assert server.err.splitlines()[-1] == "server.py: cannot go on: RuntimeError: a bug of ours"
        assert port_is_free(suite.port) and not psutil.wait_procs(children, timeout=10)[1]
        assert load(folder / "server.ptl")["round"] == 1 and client.popen.poll() is None

        # After all that, the training can be ended.
        (suite.root / "orders" / "free").touch()
        server = start_patched(suite, "server", "", *arguments, "--resume")
        assert server.wait() == 0 and client.wait() == 0
        assert list(history(suite)["round"]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_first_round_counts_too(open_suite, signum):
    suite = open_suite("early")
    patch = f"""
import os
real = script.Server.fit
def fit(self, **kwargs):
    os.kill(os.getpid(), {signum:d})
    return real(self, **kwargs)
script.Server.fit = fit
"""
    server = start_patched(suite, "server", patch, "--num_clients", 1)
    assert server.wait() == 128 + signum, server
