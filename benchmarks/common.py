"""What the benchmarks share, beside tests/helpers.py: a suite in a temporary folder, and what made a result."""

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent / "tests"), str(HERE.parent)]

from helpers import SHARED, Suite, heed_signals, history, lines  # noqa: E402

BUILD_ARCHIVE = SHARED / "cifar10" / "build_archive"  # makes the real CIFAR-10 in its own layout
THREADS = 25  # of rounds.py's clients, in one process; many more would mostly wait for each other, as devices do not
PACKAGES = ("flwr", "grpcio", "torch", "numpy", "opencv-python-headless", "pandas", "wandb")


def leave_on_signals():
    """Turn SIGTERM into SystemExit, as Ctrl-C is an exception already, so that all processes are cleaned up."""

    def leave(signum, frame):
        raise SystemExit(128 + signum)

    heed_signals()
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


def parse_names(parser, kind, known):
    """The command line, with `names` among `known`, none for all; `kind` is what one of them is called."""
    parser.add_argument("names", nargs="*", metavar=kind.upper(), help=f"of {', '.join(known)} (default: all)")
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"no {kind} {', '.join(unknown)}; there are {', '.join(known)}")
    return args


def memory_of(pid, field="VmHWM"):
    """MiB of resident memory of a process: its peak (VmHWM) or what it has now (VmRSS); 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            sizes = [int(line.split()[1]) for line in file if line.startswith(field)]
    except OSError:
        sizes = []
    return sizes[0] / 1024 if sizes else 0.0


def in_turns(pairs, works):
    """Yield each of the list `works`, `pairs` times, every other time in reverse order."""
    for turn in range(pairs):
        yield from works if turn % 2 else reversed(works)


def ask(server, rounds):
    """Have a server of rounds.py run that many rounds: what it answers."""
    count = len(lines(server, "cpu_seconds"))
    server.popen.stdin.write(f"{rounds}\n")
    server.popen.stdin.flush()
    server.wait_for('"cpu_seconds"', timeout=300, count=count + 1)
    return json.loads(lines(server, "cpu_seconds")[count])


class BenchSuite(Suite):
    """A copy of the suite in a temporary folder, which starts the scripts of benchmarks/ too.

    A context manager: at its end, also by Ctrl-C, all processes are killed, by PID, and the folder is gone.
    """

    def __init__(self):
        super().__init__(Path(tempfile.mkdtemp(prefix="suite-")))
        self.mark = f"SUITE_UNDER_TEST={self.root}"
        self.env.update(
            [self.mark.split("=")], PYTHONPATH=str(self.root), TMPDIR=str(self.root), WANDB_DIR=str(self.root)
        )

    def __enter__(self):
        leave_on_signals()
        return self

    def __exit__(self, kind, *_):
        self.close()
        for pid in self.left_over():
            os.kill(pid, signal.SIGKILL)
        if kind not in (None, KeyboardInterrupt, SystemExit):
            print("".join(process.err for process in self.processes)[-3000:], file=sys.stderr)
        shutil.rmtree(self.root, ignore_errors=True)

    def left_over(self, name=""):
        """PIDs of all processes that descend from those started here, wandb's included: their environment tells.

        Or of those alone with `name` in their command.
        """
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = self.mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                if ours and name.encode() in (folder / "cmdline").read_bytes():
                    pids.append(int(folder.name))
            except OSError:
                continue  # it ended meanwhile, or is not ours to read
        return pids

    def start(self, script, *args, **kwargs):
        """Start a script of the suite or of benchmarks/, or `-c` with code, that can be written to."""
        own = HERE / script
        return super().start(own if own.exists() else script, *args, stdin=subprocess.PIPE, **kwargs)

    def start_clients(self, kind, num_clients, port):
        """Start clients of rounds.py; return their processes."""
        groups = [(first, min(THREADS, num_clients - first)) for first in range(0, num_clients, THREADS)]
        return [self.start("rounds.py", "clients", kind, *group, port) for group in groups]

    def measure(self, *args, timeout=120):
        """Run workers.py to its end: the JSON in its last line."""
        process = self.run("workers.py", *args, timeout=timeout)
        if process.popen.returncode != 0:
            raise RuntimeError(str(process))
        return json.loads(process.out.splitlines()[-1])

    def history(self, dataset):
        """The rows of history.csv as dictionaries; none where there is no file yet."""
        try:
            return history(self, dataset).to_dict("records")
        except FileNotFoundError:
            return []
