"""What bench.py and soak.py share: a copy of the suite in a folder of its own, and its scripts as real processes."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD_ARCHIVE = ROOT.parent / "shared" / "cifar10" / "build_archive"  # makes the real CIFAR-10 in its own layout
PACKAGES = ("flwr", "grpcio", "torch", "numpy", "opencv-python-headless", "pandas", "wandb")


def leave_on_signals():
    """Turn SIGTERM into SystemExit, as Ctrl-C is an exception already, so that all processes are cleaned up."""

    def leave(signum, frame):
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, leave)


def about_this_run():
    """Machine, versions and date, for the files with results."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def write_json(path, what):
    path.write_text(json.dumps(what, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def memory_of(pid, field="VmHWM"):
    """MiB of resident memory of a process: its peak (VmHWM) or what it has now (VmRSS); 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            sizes = [int(line.split()[1]) for line in file if line.startswith(field)]
    except OSError:
        sizes = []
    return sizes[0] / 1024 if sizes else 0.0


class Process:
    """A running process whose lines of output are kept with the time at which they came."""

    def __init__(self, command, env, errors):
        self.started = time.monotonic()
        self.popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=env, cwd="/", text=True
        )
        self.pid = self.popen.pid
        self.lines, self.ended, self.came = [], False, threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.popen.stdout:
            with self.came:
                self.lines.append((time.monotonic(), line.rstrip("\n")))
                self.came.notify_all()
        with self.came:
            self.ended = True
            self.came.notify_all()

    def wait_for(self, text, timeout=120, after=0, count=1):
        """The `count`th line with `text`, from line number `after` on: (seconds since the process started, line)."""

        def found():
            return next(iter([entry for entry in self.lines[after:] if text in entry[1]][count - 1 :]), None)

        with self.came:
            self.came.wait_for(lambda: found() or self.ended, timeout)
            if found() is None:
                tail = "\n".join(line for _, line in self.lines[-10:])
                raise RuntimeError(f"no {text!r} within {timeout} s from {self.popen.args}:\n{tail}")
            when, line = found()
            return when - self.started, line

    def ask(self, line, timeout=300):
        """Send a line to its input and read the JSON that it answers."""
        after = len(self.lines)
        self.popen.stdin.write(f"{line}\n")
        self.popen.stdin.flush()
        return json.loads(self.wait_for("{", timeout, after)[1])

    def wait(self, timeout=120):
        return self.popen.wait(timeout)

    def send(self, signum):
        if self.popen.poll() is None:
            os.kill(self.pid, signum)

    def kill(self):
        self.send(signal.SIGKILL)
        self.popen.wait()


class Suite:
    """A copy of the suite's scripts in a temporary folder, where they find and leave their files.

    A context manager: at its end, also by Ctrl-C, all processes are killed, by PID, and the folder is gone.
    """

    def __init__(self):
        self.root = Path(tempfile.mkdtemp(prefix="suite-"))
        for script in ROOT.glob("*.py"):
            shutil.copy(script, self.root)
        self.port, self.processes = free_port(), []
        self.mark = f"SUITE_UNDER_TEST={self.root}"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        self.env.update(
            [self.mark.split("=")],
            OMP_NUM_THREADS="1",
            PYTHONPATH=str(self.root),
            PYTHONUNBUFFERED="1",
            TMPDIR=str(self.root),
            WANDB_DIR=str(self.root),
            WANDB_MODE="offline",
        )
        self.errors = open(self.root / "errors.log", "a")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for process in self.processes:
            process.kill()
        for pid in self.left_over():
            os.kill(pid, signal.SIGKILL)
        self.errors.close()
        if kind not in (None, KeyboardInterrupt, SystemExit):
            print((self.root / "errors.log").read_text()[-3000:], file=sys.stderr)
        shutil.rmtree(self.root, ignore_errors=True)

    def left_over(self):
        """PIDs of all processes that descend from those started here, wandb's included: their environment tells."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    pids.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile, or is not ours to read
        return pids

    def start(self, *command, **env):
        """Start `command`: a script of the suite or of benchmarks/, or `-c` with code; then its arguments."""
        script = next(
            (folder / command[0] for folder in (self.root, HERE) if (folder / command[0]).exists()), command[0]
        )
        process = Process([sys.executable, *map(str, [script, *command[1:]])], {**self.env, **env}, self.errors)
        self.processes.append(process)
        return process

    def run(self, *command, timeout=120):
        """Run such a command to its end: the JSON in its last line, or None; raises where it fails."""
        process = self.start(*command)
        if process.wait(timeout) != 0:
            raise RuntimeError(f"{process.popen.args} ended with {process.popen.returncode}")
        with process.came:
            process.came.wait_for(lambda: process.ended, 10)
        return json.loads(process.lines[-1][1]) if process.lines and process.lines[-1][1][:1] in "[{" else None

    def server(self, *args):
        return self.start("server.py", "--server_port", self.port, *args)

    def client(self, cid, *args, port=None):
        return self.start("client.py", "--server_port", port or self.port, "--num_threads", 1, "--cid", cid, *args)

    def history(self, dataset):
        """The rows of history.csv, dictionaries of strings; none where there is no file yet."""
        try:
            header, *lines = (self.root / "ckps" / dataset / "history.csv").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
