"""helpers.py and forks.py: children of the tests heed signals; one that is forked is like one that is started."""

import json
import signal
import subprocess
import sys

import psutil
import pytest
from helpers import ROOT, Process, free_port, script_env


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_child_can_trap_a_signal(name):
    """As deploy/demo.sh does. What is ignored when bash starts, it cannot trap."""
    code = f"trap 'exit 7' {name}; kill -{name} $$; exit 0"
    assert subprocess.run(["bash", "-c", code], timeout=20).returncode == 7


def test_child_can_trap_a_signal_that_pytest_ignores():
    """As under cron, or as a background job of a script."""
    test = f"{__file__}::test_child_can_trap_a_signal"
    command = f"trap '' INT TERM; exec '{sys.executable}' -m pytest -q -p no:cacheprovider '{test}'"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout


ENDS = {
    "import sys; print('done'); sys.exit(300)": 300 & 0xFF,
    "import sys; sys.exit('a reason')": 1,
    "def divide(): return 1 / 0\ndivide()": 1,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "import os; os.kill(os.getpid(), 9)": -signal.SIGKILL,
    "import atexit, threading; atexit.register(print, 'last'); threading.Timer(0.2, print, ['thread']).start()": 0,
}


def test_forked_process_ends_as_a_started_one(suite):
    """Codes, tracebacks and output; a script is read afresh, and nothing of ours is imported before."""
    script = suite.root / "script.py"
    script.write_text("import data, sys; print(__file__, __name__, sys.argv, data.__file__); sys.exit(3)")
    cases = [(("-c", code, "word"), code_of_end) for code, code_of_end in ENDS.items()] + [((script, "word"), 3)]
    for args, code in cases:
        forked, started = suite.start(*args), suite.start(*args, real=True)
        assert started.wait() == forked.wait() == code, (started, forked)
        assert (forked.out, forked.err) == (started.out, started.err)


STATE = """
import gc, json, os, random, signal, sys, threading
import numpy, torch
ours = [name for name in ("libs", "helpers", "forks", "pytest", "data", "server") if name in sys.modules]
handlers = [(number, str(signal.getsignal(number))) for number in signal.Signals]
streams = [(s.name, s.mode, s.encoding, s.errors, s.line_buffering, s.write_through) for s in (sys.stdout, sys.stderr)]
print(json.dumps([ours, sorted(map(str, signal.pthread_sigmask(0, []))), handlers, streams, sys.path[0], sys.argv,
    sys.orig_argv, sorted(os.environ.items()), os.getcwd(), len(os.listdir("/proc/self/fd")), gc.isenabled(),
    len(os.listdir("/proc/self/task")), threading.main_thread() is threading.current_thread(), os.getpgrp(),
    __name__]))
from wandb.sdk.data_types._private import MEDIA_TMP
assert os.listdir(MEDIA_TMP.name) == []
print(json.dumps([random.random(), numpy.random.random(), torch.rand(1).item(), MEDIA_TMP.name]))
"""


def test_forked_process_starts_as_a_started_one(suite):
    started, *forked = (
        suite.start("-c", STATE, "word", env={"WANDB_NAME": "its own"}, real=real) for real in (1, 0, 0)
    )
    assert [process.wait() for process in (started, *forked)] == [0, 0, 0], forked[0]
    state, chance = zip(*(map(json.loads, process.out.splitlines()) for process in (started, *forked)))
    assert state[0] == state[1] == state[2]
    assert len({value for values in chance for value in values}) == 3 * 4


def test_forked_processes_die_with_the_tests(tmp_path):
    """Also when pytest is killed."""
    code = f"import sys, time; sys.path[0] = {str(ROOT / 'tests')!r}; from helpers import *; Process.forking = True\n"
    code += f"child = Process([sys.executable, '-c', 'import time; time.sleep(60)'], {str(tmp_path / 'log')!r}, "
    code += "script_env(), '/'); print(child.pid, flush=True); time.sleep(60)"
    tests = Process([sys.executable, "-c", code], tmp_path / "tests", script_env(), "/", real=True)
    tests.wait_for("\n")
    family = psutil.Process(tests.pid).children(recursive=True)
    assert int(tests.out) in [process.pid for process in family] and len(family) == 2
    tests.kill()
    assert not psutil.wait_procs(family, timeout=10)[1]


def test_no_port_is_given_twice():
    ports = [free_port() for _ in range(200)]
    code = "from helpers import free_port; print(*(free_port() for _ in range(200)))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, timeout=60)
    assert len({*ports, *map(int, other.stdout.split())}) == 400
