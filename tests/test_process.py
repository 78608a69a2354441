"""How scripts end, and what does not end them: signals, lost connections, a full disk, a damaged id, a closed pipe."""

import concurrent.futures
import gc
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time

from plumbing import VERSION
from plumbing.common import arguments, frames
from plumbing.common.process import fold
from plumbing.device import machine
from plumbing.device.connection import Connection
from plumbing.device.task import Task

import grpc
import pandas as pd
import psutil
import pytest

import client
from nets import LeNet5

INT, TERM = signal.SIGINT, signal.SIGTERM


# ---------------------------------------------------------------------------------------------------------------------
# The terminal.

LONG = (  # what is printed, and as it is folded into 60 columns
    (
        "curves are kept offline; send them later with: '/a b/bin/wandb' sync '/a b/FL-IoT/wandb/offline-run-2026'",
        "curves are kept offline; send them later with:\n"
        "    '/a b/bin/wandb' sync \\\n    '/a b/FL-IoT/wandb/offline-run-2026'",
    ),
    (
        "the device's rounds and the clients': 40 of 40, fit 1234.5 s (median), evaluate 0.1 s, 62 °C",
        "the device's rounds and the clients': 40 of 40, fit 1234.5 s\n    (median), evaluate 0.1 s, 62 °C",
    ),
    (
        "model: /home/pi/FL-IoT/ckps/D/server.ptl; and /a/path/that/is/longer/than/the/sixty/columns/that/there/are",
        "model: /home/pi/FL-IoT/ckps/D/server.ptl; and\n"
        "    /a/path/that/is/longer/than/the/sixty/columns/that/there/are",
    ),
)


@pytest.mark.parametrize("line, folded", LONG)
def test_long_lines_are_folded_between_words_and_commands_can_still_be_copied(line, folded):
    assert fold(line, 60) == folded
    command = re.search(r"\n    ('.*)", folded, re.DOTALL)
    assert command is None or shlex.split(command[1].replace("\\\n", "")) == shlex.split(line.split("with: ")[1])


# ---------------------------------------------------------------------------------------------------------------------
# Signals.


@pytest.mark.parametrize("state", ["training", "waiting", "looking for the server"])
def test_any_two_signals_end_the_client_with_the_code_of_the_first(tiny, shapes_zip, state):
    """Three clients at once, each with another pair of signals, some milliseconds apart."""
    if state == "waiting":
        tiny.partition("--dataset", "Tiny", "--source", shapes_zip, "--num_clients", 4)
    if state != "looking for the server":
        rounds = ("--num_clients", 3) if state == "training" else ("--num_clients", 4)
        server = tiny.server("--dataset", "Tiny", *rounds, "--num_rounds", 10**6)
    clients = [tiny.client(cid, "--dataset", "Tiny") for cid in range(3)]
    for process in clients:
        process.wait_for({"training": "round 2/", "waiting": "connected"}.get(state, "no server at"), timeout=120)
    for process, (first, second) in zip(clients, [(INT, TERM), (TERM, TERM), (TERM, INT)]):
        process.send(first)
        # (A busy machine may hand over a signal some milliseconds late: then those of two kinds are one moment.)
        time.sleep(random.choice([0, 0.001, 0.01, 0.1]) if first == second else random.choice([0.03, 0.1]))
        if process.popen.poll() is None:
            process.send(second)
        assert process.wait(3) == 128 + first, process
        assert process.err == ""
    if state != "looking for the server":
        server.send(INT)
        time.sleep(0.03)
        server.send(TERM)
        assert server.wait(60) == 130 and server.err == ""


def test_ctrl_c_while_the_shard_is_read_is_no_traceback(tiny):
    slow = "import client, time\nclient.load_shard = lambda *args: print('reading', flush=True) or time.sleep(60)\n"
    slow = (
        f"import sys; sys.path[0] = {str(tiny.root)!r}; sys.argv[0] = 'client.py'\n{slow}client.run_script(client.main)"
    )
    process = tiny.start("-c", slow, "--dataset", "Tiny", "--cid", 0)
    process.wait_for("reading")
    process.send(INT)
    time.sleep(0.03)
    process.send(TERM)
    assert process.wait(5) == 130 and process.err == ""


# ---------------------------------------------------------------------------------------------------------------------
# Connections that are lost, again and again.


class HangsUp(grpc.GenericRpcHandler):
    """A server that asks one question on each connection and then ends it, in one way or another."""

    count = 0

    def service(self, handler_call_details):
        return grpc.stream_stream_rpc_method_handler(self.join)

    def join(self, answers, context):
        self.count += 1
        yield frames.encode("hello", {"version": VERSION, "frames": frames.FRAMES, "nonce": "0" * 32})
        if self.count % 2:
            next(answers)
        if self.count % 3 == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the Wi-Fi is gone")


@pytest.mark.parametrize("said", [
    b"nonsense", frames.encode("ping"), frames.encode("hello", {"version": 7}), bytes(frames.CHUNK + 1),
    frames.encode("goodbye", {"why": "\x1b[2J"}), frames.encode("fit", {"config": {"round": "1"}, "tensor_type": "x"}),
])  # fmt: skip
def test_malformed_frame_of_a_server_ends_the_connection_and_not_the_client(said, capsys):
    class Rogue(HangsUp):
        def join(self, answers, context):
            yield said
            next(answers, None)

    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1), handlers=[Rogue()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    trainer = client.Client(Task(LeNet5(1, 2), {"fit": [], "eval": []}), properties={"cid": 0})
    problem = Connection(trainer, "127.0.0.1", port).serve()
    server.stop(0).wait()
    assert re.match("what the server at .* says is not understood: |the server at .* has no place", problem), problem
    assert problem.isprintable() and capsys.readouterr() == ("", "")


def test_lost_connections_leave_no_threads_files_or_memory_behind():
    workers, service = concurrent.futures.ThreadPoolExecutor(4), HangsUp()
    together = threading.Barrier(4)
    for _ in range(4):  # a pool starts its threads one by one, as it needs them: have all four now
        workers.submit(together.wait)
    server = grpc.server(workers, handlers=[service])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    trainer = client.Client(Task(LeNet5(1, 2), {"fit": [], "eval": []}), properties={"cid": 0})
    connection = Connection(trainer, "127.0.0.1", port)
    process = psutil.Process()

    def connect(times):
        for _ in range(times):
            assert connection.serve().startswith("lost the server")
        until = time.monotonic() + 5
        while threading.active_count() > most_threads and time.monotonic() < until:
            time.sleep(0.05)  # what ends, ends a moment later
        gc.collect()
        return process.num_fds(), process.memory_info().rss

    most_threads = 10**9
    files, memory = connect(50)
    most_threads = threading.active_count()
    files_later, memory_later = connect(200)
    assert service.count == 250
    assert threading.active_count() <= most_threads
    assert files_later <= files + 2
    assert memory_later < memory + 8 * 2**20
    server.stop(0)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing that is said may end what is done.


def popen(suite, script, *args, **kwargs):
    command = [sys.executable, suite.root / script, "--dataset", "Tiny", "--server_port", suite.port, *args]
    process = subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, env=suite.env, **kwargs)
    suite.pids.append(process)
    return process


@pytest.fixture
def loud(tiny):
    tiny.pids = []
    yield tiny
    for process in tiny.pids:
        process.kill()
        process.wait()


def full(suite):
    with open("/dev/full", "w") as disk:
        return [
            popen(suite, script, *args, stdout=disk, stderr=disk)
            for script, args in (
                ("server.py", ["--num_clients", 1, "--num_rounds", 3]),
                ("client.py", ["--cid", 0, "--num_threads", 1]),
            )
        ]


def closed_pipe(suite):
    processes = [
        popen(
            suite, "server.py", "--num_clients", 1, "--num_rounds", 3, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ),
        popen(suite, "client.py", "--cid", 0, "--num_threads", 1, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
    ]
    for process in processes:  # as of `client.py | head -1`
        process.stdout.close()
        process.stderr.close()
    return processes


def closed_streams(suite):
    commands = ("server.py --num_clients 1 --num_rounds 3", "client.py --cid 0 --num_threads 1")
    processes = []
    for command in commands:
        line = f"exec {sys.executable} {suite.root}/{command} --dataset Tiny --server_port {suite.port} <&- >&- 2>&-"
        processes.append(subprocess.Popen(["bash", "-c", line], env=suite.env))
    suite.pids += processes
    return processes


def poor_letters(suite):
    env = {**suite.env, "PYTHONIOENCODING": "ascii"}
    suite.env = env
    return full(suite)


@pytest.mark.parametrize("printing", [full, closed_pipe, closed_streams, poor_letters])
def test_training_goes_on_where_nothing_can_be_printed(loud, printing):
    assert [process.wait(120) for process in printing(loud)] == [0, 0]
    history = pd.read_csv(loud.ckps("Tiny") / "history.csv")
    assert list(history["round"]) == [1, 2, 3] and (history["failures"] == 0).all()


def test_partition_ends_well_where_nothing_can_be_printed(suite):
    with open("/dev/full", "w") as disk:
        command = [sys.executable, suite.root / "partition.py", "--dataset", "Shapes10", "--num_clients", "2"]
        assert subprocess.run(command, stdout=disk, stderr=disk, env=suite.env, timeout=120).returncode == 0
    assert (suite.root / "datasets" / "Shapes10" / "dataset.json").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The device's id.


@pytest.mark.parametrize("damaged", [b"\xff\xfe\x80", b"", b"0" * 31, bytes(100_000), "a folder"])
def test_damaged_id_is_made_anew(tmp_path, damaged):
    path = tmp_path / "client_0.id"
    if damaged == "a folder":
        path.mkdir()
    else:
        path.write_bytes(damaged)
    first, second = machine.device_id(path), machine.device_id(path)
    assert first == second and len(first) == 32 and int(first, 16)


def test_id_is_bound_to_the_board(tmp_path, monkeypatch):
    path = tmp_path / "client_0.id"
    monkeypatch.setattr(machine, "board_id", lambda: b"10000000abcdef01")
    first = machine.device_id(path)
    assert machine.device_id(path) == first
    monkeypatch.setattr(machine, "board_id", lambda: b"10000000abcdef02")  # the same card in another board
    assert machine.device_id(path) != first


def test_full_card_at_the_first_start_does_not_keep_the_client_from_training(tiny):
    """A limit of no bytes a file stands for the full card."""
    command = [
        sys.executable,
        tiny.root / "client.py",
        "--dataset",
        "Tiny",
        "--server_port",
        str(tiny.port),
        "--cid",
        "0",
    ]
    server = tiny.server("--dataset", "Tiny", "--num_clients", 1, "--num_rounds", 2)
    process = subprocess.Popen(
        [*command, "--cid", "0", "--num_threads", "1"],
        env={**tiny.env, "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
    )
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in out
    assert "client_0.id" in out and "training does without" in out and "training is over" in out
    assert server.wait() == 0


def test_mistyped_cid_leaves_nothing(tiny):
    process = tiny.run("client.py", "--dataset", "Tiny", "--cid", 33)
    assert process.popen.returncode == 2 and "--cid can be 0, 1, 2" in process.err
    assert not tiny.ckps("Tiny").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Systems that are not Linux: without what they lack.


def test_server_and_partition_run_without_fcntl_proc_and_mode_bits(tiny):
    (tiny.root / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fcntl':\n"
        "            raise ModuleNotFoundError('No module named fcntl', name=name)\n"
        "sys.meta_path.insert(0, No())\n"
        "listdir, isdir, fsync = os.listdir, os.path.isdir, os.fsync\n"
        "def gone(path): return str(path).startswith(('/proc', '/dev/fd'))\n"
        "def no_listdir(path='.'):\n"
        "    if gone(path): raise FileNotFoundError(2, 'No such file or directory', path)\n"
        "    return listdir(path)\n"
        "os.listdir, os.path.isdir = no_listdir, lambda path: not gone(path) and isdir(path)\n"
        "def no_fsync(fd):\n"
        "    import fcntl_of_linux as f\n"
        "    if f.fcntl(fd, f.F_GETFL) & 3 == 0: raise OSError(9, 'Bad file descriptor')\n"
        "    fsync(fd)\n"
        "os.fsync = no_fsync\n"
    )
    # The same module under another name, which only the sync above may use.
    (tiny.root / "fcntl_of_linux.py").write_text(
        "import importlib.machinery, importlib.util, sys, sysconfig, glob, os\n"
        "try:\n"
        "    spec = importlib.machinery.BuiltinImporter.find_spec('fcntl') or next(\n"
        "        importlib.util.spec_from_file_location('fcntl', path)\n"
        "        for path in glob.glob(os.path.join(sysconfig.get_path('platstdlib'), 'lib-dynload', 'fcntl.*')))\n"
        "    module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "    fcntl, F_GETFL = module.fcntl, module.F_GETFL\n"
        "except StopIteration:\n"
        "    fcntl, F_GETFL = lambda fd, what: 2, 3\n"
    )
    env = {"PYTHONPATH": str(tiny.root)}
    tiny.run("partition.py", "--dataset", "Shapes10", "--num_clients", 2, env=env)
    assert tiny.processes[-1].popen.returncode == 0, tiny.processes[-1]
    server = tiny.server("--dataset", "Tiny", "--num_clients", 1, "--num_rounds", 2, env=env)
    device = tiny.client(0, "--dataset", "Tiny", env=env)
    assert (server.wait(), device.wait()) == (0, 0), (server, device)
    assert len(pd.read_csv(tiny.ckps("Tiny") / "history.csv")) == 2


def test_secret_is_not_judged_by_mode_bits_where_there_are_none(tmp_path, monkeypatch):
    path = tmp_path / "secret"
    path.write_text("tell nobody, not even me\n")
    path.chmod(0o666)
    monkeypatch.setattr(arguments, "HAS_MODE_BITS", False)
    assert arguments.read_secret(path) == b"tell nobody, not even me"


def test_python_that_is_too_old_is_one_line(tiny):
    code = "import sys; sys.version_info = (3, 7, 9); sys.path[0] = {root!r}; import client"
    process = tiny.start("-c", code.format(root=str(tiny.root)))
    assert process.wait() == 2
    (line,) = process.err.splitlines()
    assert "needs Python 3.8 or newer" in line and "3.7" in line
