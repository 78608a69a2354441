"""What tests and benchmarks share: copies of the suite, its scripts as real processes, small datasets, a network.

Only the standard library is imported at the top: a process that is measured (benchmarks/workers.py) needs this too.
"""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import forks

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHARED = ROOT.parent / "shared"


HELD = []


def free_port():
    """A free TCP port that no other call gives, in any process, as long as this one lives.

    It is below those that a system gives to outgoing connections, and its number is taken by holding the same UDP port.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            held.bind(("127.0.0.1", port))
            with socket.socket() as sock:
                sock.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        HELD.append(held)
        return port
    raise OSError("no port is free")


def heed_signals():
    """Have children start with the default handlers of SIGINT and SIGTERM, where this process has to ignore them.

    So it is under cron, or as a background job of a script. A child, too, ignores what is ignored here, and bash cannot
    even trap it; a handler is not passed on.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) == signal.SIG_IGN:
            signal.signal(signum, lambda signum, frame: None)


# ---------------------------------------------------------------------------------------------------------------------
# The suite and its processes.


def script_env():
    """The environment of the suite's processes."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return {**env, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONUNBUFFERED": "1"}


class Process:
    """A running script: its output as it grows, its signals, and its end, all bounded in time.

    In tests (conftest.py sets `forking`), Python is forked from a process that has imported the packages (forks.py),
    unless its environment or its stdin is a special one, or the start is to be `real`.
    """

    forking = False

    def __init__(self, command, log, env, cwd, stdin=subprocess.DEVNULL, real=False):
        self.log, self.errors = Path(f"{log}.out"), Path(f"{log}.err")
        real = real or not self.forking or command[0] != sys.executable or stdin != subprocess.DEVNULL
        real = real or forks.at_import(env) != forks.at_import(script_env())
        with open(self.log, "w") as out, open(self.errors, "w") as err, open(os.devnull) as null:
            self.started = time.monotonic()
            if real:
                self.popen = subprocess.Popen(command, stdin=stdin, stdout=out, stderr=err, env=env, cwd=cwd, text=True)
            else:
                self.popen = forks.Forked(command, (null, out, err), env, cwd)
        self.pid = self.popen.pid

    @property
    def out(self):
        return self.log.read_text()

    @property
    def err(self):
        return self.errors.read_text()

    def __str__(self):
        return f"{self.popen.args}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    def wait_for(self, text, timeout=90, count=1, poll=0.05):
        """Wait until `text` stands in the output `count` times: the seconds since the process was started.

        Fails when the process ends or time runs out before.
        """
        until = time.monotonic() + timeout
        while (self.out + self.err).count(text) < count:
            ended = self.popen.poll() is not None and (self.out + self.err).count(text) < count
            assert not ended, f"ended with {self.popen.returncode} without {text!r}: {self}"
            assert time.monotonic() < until, f"no {text!r} within {timeout} s: {self}"
            time.sleep(poll)
        return time.monotonic() - self.started

    def wait(self, timeout=90):
        """The exit code; fails when there is none in time."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self}") from None

    def send(self, signum):
        self.popen.send_signal(signum)

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
        for folder in ("plumbing", "deploy"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        self.env = script_env()

    def start(self, script, *args, env=None, **kwargs):
        """Start a script of the suite, or another one by its whole path, or `-c` with code; `kwargs` are Process's."""
        log = self.root / f"process_{len(self.processes)}"
        command = [sys.executable, script if script == "-c" else self.root / script, *map(str, args)]
        process = Process(command, log, {**self.env, **(env or {})}, "/", **kwargs)
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


def lines(process, text):
    """The lines with `text` in what a process has printed."""
    return [line for line in (process.out + process.err).splitlines() if text in line]


def commands_in(page, section, *starts):
    """The commands of a section of a `page` that start so (all, if none is given), in order, each in one line."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", "")
    text = re.split(r"\n#+ ", text.split(f"# {section}\n")[1])[0]
    starts = tuple(f"    {start}" for start in starts or [""])
    return [line[4:] for line in text.splitlines() if line.startswith(starts)]


def history(suite, dataset="Tiny"):
    """The table history.csv."""
    import pandas as pd

    return pd.read_csv(suite.ckps(dataset) / "history.csv")


def wait_until(what, condition, timeout=90):
    """Wait until `condition()` is true; the seconds that it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout, f"{what}: not within {timeout} s"
        time.sleep(0.05)
    return time.monotonic() - started


# ---------------------------------------------------------------------------------------------------------------------
# Scripts of the suite that do something else than usual at one point.


def new_suite(root, datasets):
    """A suite in the folder `root`, with the folder `datasets` in place, and one for orders."""
    suite = Suite(root)
    (root / "datasets").symlink_to(datasets)
    (root / "orders").mkdir()
    return suite


def patched(suite, name, patch):
    """The arguments that start a script of the suite after the code `patch`, in which its module is `script`."""
    code = f"import sys; sys.path[0] = {str(suite.root)!r}; sys.argv[0] = '{name}.py'\nimport {name} as script\n"
    code += f"{patch}\nscript.run_script(script.main)"
    return "-c", code, "--server_port", suite.port, "--dataset", "Tiny"


def start_patched(suite, name, patch, *args):
    return suite.start(*patched(suite, name, patch), *args)


def ordered(suite, cid, *args):
    """The arguments that start ordered_client.py for a cid; `args` are its own or those of client.py."""
    client = ("--server_port", suite.port, "--dataset", "Tiny", "--num_threads", 1, "--cid", cid)
    return HERE / "ordered_client.py", suite.root, *client, *args


def ordered_client(suite, cid, *args):
    return suite.start(*ordered(suite, cid, *args))


def play(suite, current, orders):
    """Give the ordered clients {cid: order} for the round `current`; "" is to train as usual."""
    for cid, order in orders.items():
        draft = suite.root / "orders" / f"draft_{cid}"
        draft.write_text(order)
        draft.rename(suite.root / "orders" / f"{cid}_{current}")


def starts(client, current):
    """The digests of the parameters from which an ordered client began to train in the round `current`, one a try."""
    return re.findall(f"fit of round {current} from (.*)", client.out)


def ends(client, current):
    """The digests of the parameters to which it has trained."""
    return re.findall(f"trained round {current} to (.*)", client.out)


# ---------------------------------------------------------------------------------------------------------------------
# What wandb has kept offline.


def wandb_folders(suite):
    return sorted((suite.root / "wandb").glob("offline-run-*"))


def wandb_id(folder):
    return folder.name.rsplit("-", 1)[1]


def wandb_records(folder):
    """The records of an offline run, read by wandb itself: [{"type": …, …}, …]."""
    command = [sys.executable, Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", folder]
    with tempfile.TemporaryDirectory() as logs:
        process = Process(command, f"{logs}/inspect", script_env(), "/")
        assert process.wait() == 0, process
        return [json.loads(line) for line in process.out.splitlines()]


def wandb_history(folder):
    """The steps of an offline run with their figures: [{"_step": …, …}, …]."""
    return [record["history"]["item"] for record in wandb_records(folder) if record["type"] == "history"]


def as_logged(rows):
    """A table like history.csv under the names that wandb has: `clients` is num_clients, and it has its own times."""
    return rows.rename(columns={"clients": "num_clients"}).drop(columns="finished_at")


def wandb_steps(folder):
    return [item["_step"] for item in wandb_history(folder)]


# ---------------------------------------------------------------------------------------------------------------------
# Datasets.


def write_images(path, num_train, num_test):
    """A zip of drawn shapes as PNG files, in the layout that --source takes."""
    from plumbing.sources.shapes import draw_shapes

    import cv2

    with zipfile.ZipFile(path, "w") as archive:
        source = draw_shapes(num_train, num_test)
        for split, _, drawn in source.splits:
            for index, (image, label) in enumerate(drawn):
                png = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
                archive.writestr(f"{split}/{source.classes[label]}/{index:04}.png", png)
    return path


def tree(folder):
    """What lies under `folder`, hidden or not: {relative path: bytes, or None for a folder}."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def shards(folder):
    """The tables of all clients, by cid."""
    import pandas as pd

    count = len(list((folder / "clients").iterdir()))
    return [pd.read_csv(folder / "clients" / f"client_{cid}.csv") for cid in range(count)]


def images(folder, split):
    """All images of a split and their labels from the CSVs: [(label, array)]."""
    import numpy as np
    import pandas as pd

    table = pd.concat(shards(folder)) if split == "train" else pd.read_csv(folder / "test.csv")
    assert len(table) == len(list((folder / split).iterdir()))
    return [(row.label, np.load(folder / split / f"{row.id}.npy")) for row in table.itertuples()]


# ---------------------------------------------------------------------------------------------------------------------
# A network that can be cut.


class Network:
    """Two network namespaces, `server` and `clients`, with a cable between them. No address outside is used."""

    address = "10.254.0.1"

    def __init__(self):
        self.server, self.clients = f"fl-server-{os.getpid()}", f"fl-clients-{os.getpid()}"

    def open(self):
        for namespace in (self.server, self.clients):
            self.ip("netns", "add", namespace)
            self.ip("-n", namespace, "link", "set", "lo", "up")
        self.ip("-n", self.server, "link", "add", "cable", "type", "veth", "peer", "cable", "netns", self.clients)
        for namespace, address in ((self.server, self.address), (self.clients, "10.254.0.2")):
            self.ip("-n", namespace, "address", "add", f"{address}/30", "dev", "cable")
            self.ip("-n", namespace, "link", "set", "cable", "up")

    def close(self):
        for namespace in (self.server, self.clients):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)

    def ip(self, *args):
        subprocess.run(["ip", *args], check=True, capture_output=True, timeout=20)

    def cut(self):
        self.ip("-n", self.server, "link", "set", "cable", "down")

    def mend(self):
        self.ip("-n", self.server, "link", "set", "cable", "up")
        return time.monotonic()

    def slow_down(self, rate):
        """Let what clients send take its time."""
        subprocess.run(
            ["ip", "netns", "exec", self.clients, "tc", "qdisc", "add", "dev", "cable", "root"]
            + ["tbf", "rate", rate, "burst", "16kb", "latency", "30s"],
            check=True,
            capture_output=True,
        )

    def speed_up(self):
        command = ["ip", "netns", "exec", self.clients, "tc", "qdisc", "delete", "dev", "cable", "root"]
        subprocess.run(command, check=True)

    def sent(self, counter="tx_bytes"):
        """Bytes that clients have put on the cable; with "rx_bytes", those that have come to them."""
        command = ["ip", "netns", "exec", self.clients, "cat", f"/sys/class/net/cable/statistics/{counter}"]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
