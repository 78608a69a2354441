"""make test-interop: 3 rounds with clients on Python 3.8, 3.10, 3.11 and 3.13, each with the Flower that it takes.

They are set up by deploy/setup_device.sh: 3.8 and 3.10 from a wheelhouse that pip fills once (with torch 1.12.1, the
last for x86 without gigabytes of CUDA beside it); 3.13 is Debian trixie's, whose own torch is kept as a Jetson's.
"""

import csv
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT, Process
from roots import CACHE, Root, debian, fetch, need, tell

FLOWER = {"3.8": "1.11.1", "3.10": "1.30.0"}  # the newest for each


def find_python(version):
    for name in (f"python{version}", *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))):
        try:
            done = subprocess.run([name, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            return done.stdout.strip()
    pytest.skip(f"needs a Python {version}: pyenv install {version}, or uv python install {version} on the PATH")


def fill_wheelhouse(python, version):
    wanted = ["pip", "filelock", f"flwr=={FLOWER[version]}", "numpy<2", "torch==1.12.1", "tqdm"]
    download = [python, "-m", "pip", "download", "-qq", "--prefer-binary", "--dest"]
    return fetch(f"wheels/python{version}", lambda part: [*download, part, *wanted])


def lay_suite(folder):
    """The suite as a device has it."""
    (folder / "deploy").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        shutil.copy(path, folder)
    leave_out = shutil.ignore_patterns("laptop", "sources", "__pycache__")
    shutil.copytree(ROOT / "plumbing", folder / "plumbing", ignore=leave_out)
    for script in (ROOT / "deploy").glob("*.sh"):
        shutil.copy(script, folder / "deploy")
    return folder


def set_up(command, env=None):
    started = time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done
    tell(f"{done.stdout.splitlines()[-1]} ({time.monotonic() - started:.0f} s)")
    return done.stdout


@pytest.fixture
def trixie(tmp_path):
    need(debootstrap="debootstrap")
    root = Root(debian("trixie", "amd64", "python3-torch"), CACHE / f"board-{time.time_ns()}", tmp_path)
    yield root
    root.close()


def test_pythons_in_one_run(suite, shapes_zip, trixie, tmp_path):
    suite.partition("--dataset", "Tiny", "--source", shapes_zip, "--num_clients", 4)
    starts = {}
    for version in FLOWER:
        python = find_python(version)
        wheels, folder = fill_wheelhouse(python, version), lay_suite(tmp_path / f"python{version}")
        env = {**suite.env, "PYTHON": python, "WHEELHOUSE": str(wheels)}
        said = set_up(["bash", folder / "deploy" / "setup_device.sh"], env)
        assert f"with Python {version}." in said and f"flwr {FLOWER[version]}," in said
        starts[version] = [folder / ".venv" / "bin" / "python", folder / "client.py"]
    renew_old_pip(tmp_path / "python3.8", {**suite.env, "PYTHON": find_python("3.8")})

    folder = lay_suite(tmp_path / "python3.13")
    said = set_up(trixie.command("bash", "/mnt/python3.13/deploy/setup_device.sh"))
    assert "with Python 3.13." in said and "the system's torch 2.6.0" in said
    own = {path.name.split("-")[0] for path in folder.glob(".venv/lib/python3.13/site-packages/*.dist-info")}
    assert "flwr" in own and not own & {"torch", "numpy"}, own
    starts["3.13"] = trixie.command("/mnt/python3.13/.venv/bin/python", "/mnt/python3.13/client.py", OMP_NUM_THREADS=1)

    server = suite.server("--dataset", "Tiny", "--num_clients", 4, "--num_rounds", 3)
    clients = [suite.client(0, "--dataset", "Tiny")]
    for cid, (version, start) in enumerate(starts.items(), start=1):
        shutil.copytree(suite.root / "datasets", tmp_path / f"python{version}" / "datasets")
        command = [
            *start,
            "--server_port",
            str(suite.port),
            "--num_threads",
            "1",
            "--dataset",
            "Tiny",
            "--cid",
            str(cid),
        ]
        clients.append(Process(command, tmp_path / f"log{version}", suite.env, "/"))
        suite.processes.append(clients[-1])
    for process in (*clients, server):
        assert process.wait(300) == 0, process
    rows = list(csv.DictReader(open(suite.ckps("Tiny") / "history.csv")))
    assert [(int(float(row["clients"])), int(float(row["failures"]))) for row in rows] == [(4, 0)] * 3
    for version, process in zip(("3.11", *starts), clients):
        assert "round 3/3" in process.out and "Traceback" not in process.err, process
        tell(f"Python {version}: {process.out.strip().splitlines()[-2]}")
    for version in starts:  # gigabytes
        shutil.rmtree(tmp_path / f"python{version}")


def renew_old_pip(folder, env):
    """JetPack 5 has pip 20.0.2, which does not see today's wheels: bring .venv up to date with such a one in it."""
    old = fetch("wheels/pip20", lambda part: [env["PYTHON"], "-m", "pip", "download", "-qq", "-d", part, "pip==20.0.2"])
    pip = [folder / ".venv" / "bin" / "python", "-m", "pip"]
    install = [*pip, "install", "-qq", "--no-index", "--find-links", old, "pip==20.0.2"]
    subprocess.run(install, check=True, env={**os.environ, "PIP_CONFIG_FILE": os.devnull})
    assert "pip 20.0.2" in subprocess.run([*pip, "--version"], capture_output=True, text=True).stdout
    with open(folder / ".venv" / "device", "a") as file:
        file.write("something else\n")
    said = set_up(
        ["bash", folder / "deploy" / "setup_device.sh"], {**env, "WHEELHOUSE": str(CACHE / "wheels" / "python3.8")}
    )
    assert "bringing .venv up to date" in said
    assert "pip 20.0.2" not in subprocess.run([*pip, "--version"], capture_output=True, text=True).stdout
