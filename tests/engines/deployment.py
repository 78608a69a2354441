"""Flower's deployment engine by the steps of docs/engines.md, with TLS and registered keys, on loopback."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import NUM_CLIENTS, NUM_ROUNDS, compare, train_by_scripts
from helpers import Process, Suite, commands_in, free_port, history, lines

TOOLS = Path(sys.executable).parent


def commands():
    """The commands of the page's section, in order."""
    section = "Devices on Flower's deployment engine"
    return commands_in("docs/engines.md", section, "deploy/", "ssh-keygen", "flower-", "flwr ")


class Shelf:
    """A suite whose laptop and devices are processes on this machine."""

    def __init__(self, suite):
        self.suite, self.port = suite, free_port()
        suite.env.update(FLWR_HOME=str(suite.root / "flower"), PATH=f"{TOOLS}:{suite.env['PATH']}")
        suite.env.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")

    def words(self, command, number=0, cid=None, folder=None):
        """A command of the page as it is for this shelf: for the device with the key `number`, its cid and folder."""
        fits = {
            "0.0.0.0": "127.0.0.1",
            "LAPTOP_IP": "127.0.0.1",
            ":8000": f":{self.port}",
            "$PWD": str(self.suite.root),
            "CIFAR10": "Tiny",
            "num_clients=10": f"num_clients={NUM_CLIENTS} seed=1",
            "device_3": f"device_{number}",
            "cid=3": f"cid={number if cid is None else cid}",
            "/home/pi/FL-IoT": str(folder or self.suite.root),
        }
        for text, fit in fits.items():
            command = command.replace(text, fit)
        return shlex.split(command)

    def start(self, command, *more, **device):
        log = self.suite.root / f"process_{len(self.suite.processes)}"
        process = Process([*self.words(command, **device), *more], log, self.suite.env, self.suite.root)
        self.suite.processes.append(process)
        return process

    def write_config(self):
        """Flower's file in which the page's `laptop` is this machine."""
        (self.suite.root / "flower").mkdir()
        config = f'[superlink.laptop]\naddress = "127.0.0.1:{self.port}"\n'
        config += f'root-certificates = "{self.suite.root}/certificates/ca.pem"\n'
        (self.suite.root / "flower" / "config.toml").write_text(config)

    def run(self, command, **device):
        process = self.start(command, **device)
        assert process.wait(60) == 0, process
        return process.out

    def train(self, command, num_rounds):
        process = self.start(command.replace("num_rounds=100", f"num_rounds={num_rounds}"))
        process.wait_for(f"round {num_rounds}/{num_rounds}  fit_loss", 480, poll=0.5)
        process.wait_for("model: ", 60)
        return process

    def close(self):
        """End what still runs; what Flower starts for each message ends when its parent has."""
        for process in reversed(self.suite.processes):
            process.popen.terminate()
            try:
                process.popen.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture
def shelf(app):
    if shutil.which("ssh-keygen") is None:
        pytest.skip("there is no ssh-keygen (openssh-client)")
    shelf = Shelf(app)
    yield shelf
    shelf.close()


@pytest.fixture
def other_cut(tmp_path, shapes_zip):
    """The folder of a device that has not got the newest bundle."""
    (tmp_path / "other_cut").mkdir()
    suite = Suite(tmp_path / "other_cut")
    suite.partition("--dataset", "Tiny", "--source", shapes_zip, "--num_clients", NUM_CLIENTS, "--seed", 7)
    return suite.root


def test_the_same_run_by_the_readme_and_on_from_it(shelf, app, by_scripts, datasets, other_cut):
    certificates, superlink, keygen, register, supernode, run = commands()
    shelf.run(certificates)
    shelf.write_config()
    laptop = shelf.start(superlink, "--port", str(shelf.port))
    laptop.wait_for("Uvicorn running", 60)

    def start_device(number, registered=True, **device):
        shelf.run(keygen, number=number)
        if registered:
            assert "registered successfully" in shelf.run(register, number=number)
        return shelf.start(supernode, "--port", str(free_port()), number=number, **device)

    for cid in range(NUM_CLIENTS):
        start_device(cid)
    assert start_device(NUM_CLIENTS, registered=False).wait(60) != 0

    training = shelf.train(run, NUM_ROUNDS)
    by_deployment = history(app)
    compare(by_scripts, by_deployment, "deployment")
    assert [len(lines(training, f"cid {cid} joined")) for cid in range(NUM_CLIENTS)] == [1] * NUM_CLIENTS
    assert all((app.ckps("Tiny") / f"client_{cid}.ptl").exists() for cid in range(NUM_CLIENTS))

    train_by_scripts(app, NUM_ROUNDS + 1, "--resume")
    twin = app.root / "twin"
    shutil.copytree(datasets, twin / "datasets")
    start_device(NUM_CLIENTS + 1, cid=0, folder=twin)
    start_device(NUM_CLIENTS + 2, cid=1, folder=other_cut)
    training = shelf.train(run.replace("num_clients", "resume=true num_clients"), NUM_ROUNDS + 2)
    rows = history(app)
    assert list(rows["round"]) == list(range(1, NUM_ROUNDS + 3)) and set(rows["clients"]) == {NUM_CLIENTS}
    pd.testing.assert_frame_equal(rows[:NUM_ROUNDS], by_deployment)
    for words in ("cid 0: cid 0 is in use by another device", "cid 1: its shard is not of the server's split of Tiny"):
        assert len(lines(training, f"turned away {words}")) == 1, training

    wrong = shelf.start(run.replace("num_rounds=100", "num_rounds=0"))
    wrong.wait_for("--num_rounds", 60)
    wrong.wait(60)
    assert len(lines(wrong, "server.py: ")) == 1 and "Traceback" not in wrong.out + wrong.err, wrong
