"""deploy/demo.sh, which `make demo` runs, from its first line to its end, and to its end by Ctrl-C."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest
from helpers import ROOT, tree


@pytest.fixture
def demo(suite):
    """Starts the demo in the suite, as a process group of its own; kills what is left of it in the end."""
    (suite.root / ".venv").symlink_to(sys.prefix)
    started = []

    def start(**env):
        log = open(suite.root / "demo.log", "w")
        process = subprocess.Popen(
            ["bash", suite.root / "deploy" / "demo.sh"],
            env={**suite.env, "NUM_CLIENTS": "2", **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def test_demo_falls_back_to_drawn_shapes_and_leaves_everything(suite, demo):
    # Where nobody listens: no way to CIFAR-10. And the second board is slower, with a budget from the second round on.
    mixed = {"SLOWDOWN": "1 3", "ARGS": "--time_budget 0.001"}
    process = demo(NUM_ROUNDS="2", https_proxy="http://127.0.0.1:1", **mixed)
    assert process.wait(120) == 0, (suite.root / "demo.log").read_text()
    output = (suite.root / "demo.log").read_text()
    assert output.count("CIFAR-10 cannot be downloaded: training on Shapes10 instead") == 1
    assert "or read images that you have (--source FILE), or train on drawn ones (--dataset Shapes10)" in output
    assert output.index("the demo starts the clients itself") < output.index("run on each device (N = 0…1)")
    assert "Traceback" not in output and "round 2/2" in output
    shown = re.search(
        r"Near its end it prints:\n\n```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for line in shown[1].splitlines():  # the same but for its numbers
        assert re.search("^" + re.sub(r"\d+", r"\\d+", re.escape(line)) + "$", output, re.MULTILINE), line
    assert output.endswith("\nto see the curves, open ckps/demo-Shapes10/metrics.png\n")
    folder = suite.ckps("demo-Shapes10")
    assert list(pd.read_csv(folder / "history.csv")["clients"]) == [2, 2]
    assert (folder / "metrics.png").exists() and (folder / "server.ptl").exists()
    clients = pd.read_csv(folder / "clients.csv")
    assert list(clients["slowdown"].fillna(1)) == [1, 3, 1, 3] and list(clients["steps"])[2:] == [1, 1]
    assert all("training is over" in (folder / f"client_{cid}.log").read_text() for cid in range(2))


@pytest.mark.parametrize(
    "args, words",
    [
        (["NUM_CLIENTS=5"], "Shapes10 is split into 4 shards, and devices may have its bundles"),
        (["ARGS=--round_timeout 9"], "--round_timeout has no effect in a simulation"),
    ],
)
def test_make_simulate_refuses_before_it_installs(suite, args, words):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, suite.root)
    (suite.root / "datasets" / "Shapes10" / "bundles").mkdir(parents=True)
    (suite.root / "datasets" / "Shapes10" / "dataset.json").write_text('{"num_clients": 4}')
    command = ["make", "simulate", "DATASET=Shapes10", *args]
    done = subprocess.run(command, cwd=suite.root, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and done.stderr.startswith(f"simulate.py: {words}"), done
    assert not (suite.root / ".venv-simulation").exists()


@pytest.mark.parametrize("args", [[], ["help"]])
def test_make_says_what_it_can_do_and_how_long_that_takes(args):
    done = subprocess.run(["make", "-C", ROOT, *args], capture_output=True, text=True, check=True, timeout=20)
    targets = re.search(r"^\.PHONY: help (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert set(re.findall(r"^make (\S+)", done.stdout, re.MULTILINE)) == set(targets)
    assert re.search(r"^make test .*about \d+ minutes", done.stdout, re.MULTILINE)
    dry = subprocess.run(["make", "-n", "-C", ROOT, "test"], capture_output=True, text=True, timeout=20).stdout
    assert re.search(r"^all tests take about \d+ minutes", dry, re.MULTILINE)


def test_help_of_the_simulation_shows_no_flag_that_it_refuses():
    command = [sys.executable, ROOT / "deploy" / "simulate.py", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    flags = set(re.findall(r"--((?:no-)?[a-z]\w+)", shown))
    assert {"num_rounds", "fedbn"} < flags
    sys.path.insert(0, str(ROOT / "deploy"))
    from check_simulation import why_not

    assert [flag for flag in flags if why_not(["--dataset", "Nowhere", f"--{flag}"])] == []


def test_source_is_noted_so_that_it_is_found_from_any_folder(make, shapes_zip, monkeypatch):
    monkeypatch.chdir(shapes_zip.parent)
    info = json.loads((make("Tiny", "--source", shapes_zip.name, "--num_clients", 2) / "dataset.json").read_text())
    assert info["source"] == str(shapes_zip)


def test_ctrl_c_ends_all_processes_of_the_demo_which_leaves_the_split_alone(suite, demo):
    made = suite.partition("--dataset", "Shapes10", "--num_clients", 3, "--bundles")
    assert f"a bundle for each client: {suite.root}/datasets/Shapes10/bundles\n" in made.out
    before = tree(suite.root / "datasets" / "Shapes10")
    process = demo(DATASET="Shapes10", NUM_ROUNDS="1000")
    history = suite.ckps("demo-Shapes10") / "history.csv"
    until = time.monotonic() + 90
    while not history.exists():
        assert time.monotonic() < until and process.poll() is None, (suite.root / "demo.log").read_text()
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    assert process.wait(60) == 130
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert (suite.ckps("demo-Shapes10") / "metrics.png").exists()
    assert tree(suite.root / "datasets" / "Shapes10") == before
