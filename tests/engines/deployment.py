"""The README's steps for Flower's deployment engine, as they stand there, with TLS and registered keys, on loopback."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NUM_CLIENTS, NUM_ROUNDS, compare
from helpers import ROOT, Process, free_port, history, lines

TOOLS = Path(sys.executable).parent


def commands():
    """The commands of the README's section, in order."""
    section = (ROOT / "README.md").read_text().split("### Devices on Flower's deployment engine")[1].split("\n#")[0]
    return re.findall(r"^    ((?:deploy/|ssh-keygen|\.venv/).*)$", section.replace("\\\n", ""), re.MULTILINE)


class Shelf:
    """A suite whose laptop and devices are processes on this machine."""

    def __init__(self, suite):
        self.suite, self.port = suite, free_port()
        suite.env.update(FLWR_HOME=str(suite.root / "flower"), PATH=f"{TOOLS}:{suite.env['PATH']}")
        suite.env.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1")

    def words(self, command, cid=0):
        """A command of the README as it is for this shelf."""
        fits = {"0.0.0.0": "127.0.0.1", "LAPTOP_IP": "127.0.0.1", ":8000": f":{self.port}", "CIFAR10": "Tiny"}
        fits.update(
            {"num_clients=10": f"num_clients={NUM_CLIENTS} seed=1", "num_rounds=100": f"num_rounds={NUM_ROUNDS}"}
        )
        fits.update({"cid=3": f"cid={cid}", "device_3": f"device_{cid}", "/home/pi/FL-IoT": str(self.suite.root)})
        fits.update({"$PWD": str(self.suite.root), ".venv/bin": str(TOOLS)})
        for text, fit in fits.items():
            command = command.replace(text, fit)
        return shlex.split(command)

    def start(self, command, cid=0, *more):
        log = self.suite.root / f"process_{len(self.suite.processes)}"
        process = Process([*self.words(command, cid), *more], log, self.suite.env, self.suite.root)
        self.suite.processes.append(process)
        return process

    def run(self, command, cid=0):
        process = self.start(command, cid)
        assert process.wait(60) == 0, process
        return process.out

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
    shelf = Shelf(app)
    yield shelf
    shelf.close()


def test_the_same_run_by_the_readme(shelf, app, by_scripts):
    certificates, superlink, keygen, register, supernode, run = commands()
    shelf.run(certificates)
    (app.root / "flower").mkdir()
    config = f'[superlink.laptop]\naddress = "127.0.0.1:{shelf.port}"\n'
    config += f'root-certificates = "{app.root}/certificates/ca.pem"\n'
    (app.root / "flower" / "config.toml").write_text(config)
    laptop = shelf.start(superlink, 0, "--port", str(shelf.port))
    laptop.wait_for("Uvicorn running", 60)
    nodes = []
    for cid in range(NUM_CLIENTS + 1):  # the last of them is a stranger
        shelf.run(keygen, cid)
        if cid < NUM_CLIENTS:
            assert "registered successfully" in shelf.run(register, cid)
        nodes.append(shelf.start(supernode, cid, "--port", str(free_port())))
    assert nodes[-1].wait(60) != 0
    training = shelf.start(run)
    training.wait_for(f"round {NUM_ROUNDS}/{NUM_ROUNDS}  fit_loss", 480, poll=0.5)
    training.wait_for("history: ", 60)
    compare(by_scripts, history(app), "deployment")
    assert [len(lines(training, f"cid {cid} joined")) for cid in range(NUM_CLIENTS)] == [1] * NUM_CLIENTS
    assert all((app.ckps("Tiny") / f"client_{cid}.ptl").exists() for cid in range(NUM_CLIENTS))
