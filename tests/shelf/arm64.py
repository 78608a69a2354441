"""make test-arm64: the README's steps for a board, as they are written there, on emulated Cortex-A53 and A72 cores.

A Debian for arm64 is made once. An instruction that a core lacks ends the process on an emulated core as on a real one;
its speed says nothing.
"""

import csv
import re
import subprocess
import time

import pytest
from helpers import ROOT, Process, commands_in
from roots import CACHE, Root, debian, emulate_arm64, need, tell

GIT = '#!/bin/sh\ncp -r /mnt/laptop/FL-IoT "$3" # git clone URL FOLDER\n'
SCP = '#!/bin/sh\ncp "/mnt/laptop/FL-IoT/$1" "/mnt/${2#*:}" # scp FILE pi@BOARD:FOLDER, from the laptop\n'


def readme_steps(cid, port):
    """The lines that the README gives for one board by hand, for this test's dataset, cid and port."""
    steps = "\n".join(commands_in("README.md", "2. Set up three boards by hand"))
    fits = {"<this repository>": "laptop", "LAPTOP_IP": "127.0.0.1", "CIFAR10": "Tiny", "client_2": f"client_{cid}"}
    for written, here in {**fits, "--cid 2": f"--cid {cid} --server_port {port}"}.items():
        assert written in steps
        steps = steps.replace(written, here)
    return steps.splitlines()


@pytest.fixture
def board(tmp_path):
    need(debootstrap="debootstrap", qemu_aarch64_static="qemu-user-static")
    emulate_arm64()
    base = debian("bookworm", "arm64")
    folder = CACHE / f"board-{time.time_ns()}"
    root = Root(base, folder, tmp_path)
    yield root
    root.close()


def test_the_readmes_steps_on_two_cores(board, suite, shapes_zip):
    suite.partition("--dataset", "Tiny", "--source", shapes_zip, "--num_clients", 3, "--bundles")
    laptop = suite.root / "laptop" / "FL-IoT"
    laptop.mkdir(parents=True)
    (suite.root / "bin").mkdir()
    for name, script in (("git", GIT), ("scp", SCP)):
        (suite.root / "bin" / name).write_text(script)
        (suite.root / "bin" / name).chmod(0o755)
    tracked = subprocess.run(["git", "ls-files", "-z", "--", "*.py", "*.txt", "deploy"], cwd=ROOT, capture_output=True)
    archive = subprocess.run(["tar", "c", "--null", "-T", "-"], cwd=ROOT, input=tracked.stdout, capture_output=True)
    subprocess.run(["tar", "x", "-C", laptop], input=archive.stdout, check=True)
    (laptop / "datasets").mkdir(exist_ok=True)
    subprocess.run(["cp", "-r", suite.root / "datasets" / "Tiny", laptop / "datasets"], check=True)

    clients = []
    for cid, core in enumerate(("cortex-a53", "cortex-a72")):
        clone, setup, copy, unpack, start = readme_steps(cid, suite.port)
        if cid:
            clone = "cd FL-IoT"  # the same board with another core: what was installed has to run there too
        script = f"set -eux; cd /mnt; {clone}; {setup}; {copy}; {unpack}; exec {start}"
        clients.append(Process(board.command("bash", "-c", script, QEMU_CPU=core), suite.root / core, suite.env, "/"))
        started = time.monotonic()
        tell(f"{core}: {setup}")
        clients[-1].wait_for("images on cpu", 1500)
        seconds = time.monotonic() - started
        said = [line for line in clients[-1].out.splitlines() if line.startswith("setup_device.sh: ")]
        tell(f"{core}: {said[-1]} ({seconds:.0f} s until the client was up)")
    suite.processes.extend(clients)
    assert "nothing to do" in clients[1].out
    torch = re.search(r"ready: torch (\d+)\.(\d+)", clients[0].out)
    assert (int(torch[1]), int(torch[2])) < (2, 10)
    venv = suite.root / "FL-IoT" / ".venv"
    assert not list(venv.glob("lib/python3*/site-packages/nvidia*"))
    size = sum(path.lstat().st_size for path in venv.rglob("*")) >> 20
    sizes = re.findall(r"Downloading \S+ \(([\d.]+) ([kM])B\)", clients[0].out)
    loaded = sum(float(number) * {"k": 0.001, "M": 1}[unit] for number, unit in sizes)
    tell(f"{len(sizes)} packages, {loaded:.0f} MB to download, {size} MiB in .venv")

    clients.append(suite.client(2, "--dataset", "Tiny"))
    server = suite.server("--dataset", "Tiny", "--num_clients", 3, "--num_rounds", 2)
    for process in (*clients, server):
        assert process.wait(900) == 0, process
    rows = list(csv.DictReader(open(suite.ckps("Tiny") / "history.csv")))
    assert [(int(float(row["clients"])), int(float(row["failures"]))) for row in rows] == [(3, 0)] * 2
    for process in clients:
        assert "round 2/2" in process.out and "training is over" in process.out, process
        tell(process.out.strip().splitlines()[-2])
