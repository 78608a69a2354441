"""What devices tell of themselves, read from a /sys and /proc of the test's making, and limits that follow from it."""

import json
import os
import resource

from plumbing.device import machine
from plumbing.laptop import asking

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import lines, start_patched, wandb_folders, wandb_records


def board(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


THERMAL = "sys/class/thermal/thermal_zone0/temp"
THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"


def test_sensors_of_a_raspberry_pi(tmp_path):
    found = machine.sensors(board(tmp_path, {THERMAL: b"61835\n", THROTTLED: b"50005\n"}))
    assert found["cpu_temp_c"] == 61.835
    assert found["throttled"] == 0x50005  # undervoltage and throttled, now and since the boot
    assert found["load"] == pytest.approx(os.getloadavg()[0], abs=2)
    assert found["peak_memory_mb"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.1)


@pytest.mark.parametrize("files", [{}, {THERMAL: b"", THROTTLED: b"none\n"}, {THERMAL: b"hot\n", THROTTLED: b"\xff"}])
def test_sensor_that_is_not_there_or_makes_no_sense_is_absent(tmp_path, files):
    assert set(machine.sensors(board(tmp_path, files))) == {"peak_memory_mb", "load"}


def test_machine_is_described(tmp_path):
    files = {
        "proc/device-tree/model": b"Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/meminfo": b"MemTotal:        3884344 kB\nMemFree:          101000 kB\nMemAvailable:    2097152 kB\n",
    }
    facts = machine.describe_machine(board(tmp_path, files))
    assert facts["board"] == "Raspberry Pi 4 Model B Rev 1.4" and facts["free_mb"] == 2048
    assert set(facts) == {"board", "free_mb", "torch", "flwr", "python", "threads"}
    elsewhere = machine.describe_machine(tmp_path / "empty")
    assert elsewhere["board"] == os.uname().machine and "free_mb" not in elsewhere


def test_client_says_what_it_runs_on(tiny):
    device = tiny.run("client.py", "--dataset", "Tiny", "--cid", 0, "--max_wait_time", 1, "--num_threads", 1)
    (line,) = [line for line in device.out.splitlines() if line.startswith("on ")]
    for word in ("1 thread,", "torch 2", "flwr 1", "Python 3", "MB free"):
        assert word in line


@pytest.mark.parametrize(
    "seconds, limit",
    [
        ([], None),
        ([5.0, 5.0], None),  # not yet shown by three rounds
        ([1.0, 1.0, 1.0], 30),
        ([20.0, 400.0, 30.0], 90),
        ([400.0] * 5 + [20.0] * 9, 60),  # its last ones
    ],
)
def test_automatic_limit_is_three_times_what_is_usual_for_the_client(seconds, limit):
    questions = asking.Questions("auto", None)
    questions.seconds["fit", "3"] = list(seconds)
    questions.seconds["fit", "4"] = [1000.0] * 9  # another client
    questions.seconds["evaluate", "3"] = [1000.0] * 9  # another question
    assert questions.limit("fit", "3") == limit
    assert asking.Questions(7.0, None).limit("fit", "3") == 7.0


def clients_csv(suite):
    return pd.read_csv(suite.ckps("Tiny") / "clients.csv")


FAKE_SENSORS = """
real = script.sensors
script.sensors = lambda: {**real(), "cpu_temp_c": 61.5 + {cid}, "throttled": {bits}}
"""


def test_clients_csv_and_wandb_have_what_each_client_told(tiny):
    server = tiny.server("--dataset", "Tiny", "--num_clients", 3, "--num_rounds", 2)
    bits = {0: 0, 1: 0x50005, 2: 0x4}  # all well; undervoltage, and throttled by it; throttled for heat
    clients = []
    for cid in bits:
        patch = FAKE_SENSORS.replace("{cid}", str(cid)).replace("{bits}", str(bits[cid]))
        clients.append(start_patched(tiny, "client", patch, "--num_threads", 1, "--cid", cid))
    assert [process.wait() for process in (server, *clients)] == [0, 0, 0, 0]
    table, history = clients_csv(tiny), pd.read_csv(tiny.ckps("Tiny") / "history.csv")
    assert list(zip(table["round"], table["cid"])) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]
    for current in (1, 2):
        rows = table[table["round"] == current]
        for name in ("fit_loss", "eval_accuracy"):
            mean = np.average(rows[name], weights=rows["examples"])
            assert mean == pytest.approx(history[name][current - 1], rel=1e-5), name  # of six digits
    for cid, process in enumerate(clients):
        rows = table[table["cid"] == cid]
        assert list(rows["examples"]) == [160, 160]
        assert list(rows["cpu_temp_c"]) == [61.5 + cid] * 2 and list(rows["throttled"]) == [bits[cid]] * 2
        said = [float(line.split()[-2]) for line in lines(process, "fit_loss")]  # "round 1/2  fit_loss …  0.3 s"
        assert list(rows["fit_seconds"].round(1)) == said
        assert rows["wait_seconds"].notna().all() and (rows["eval_seconds"] > 0).all()
        assert (rows["peak_memory_mb"] > 100).all() and (rows["load"] >= 0).all()
    said = lines(server, "of 2 rounds, fit")
    assert [line[:20] for line in said] == [f"cid {cid}: 2 of 2 rounds"[:20] for cid in bits]
    assert "62 °C at most" in said[0] and "too weak" not in said[0] and "throttled" not in said[0]
    assert said[1].endswith("power supply too weak, 2 of 2 rounds")
    assert said[2].endswith("throttled for heat, 2 of 2 rounds")
    (folder,) = (tiny.root / "wandb").glob("offline-run-*")
    records = wandb_records(folder)
    steps = [record["history"]["item"] for record in records if record["type"] == "history"]
    for cid in bits:
        assert [step[f"clients/{cid}/throttled"] for step in steps] == [bits[cid]] * 2
    config = json.dumps([record for record in records if record["type"] == "config"])
    assert "clients/0" in config and "board" in config and os.uname().machine in config


def test_what_the_clients_told_before_is_kept_at_a_resume(tiny):
    """And the flags are, but for what is given."""
    for last, flags in ((2, ["--num_clients", 1, "--num_epochs", 2, "--fraction_fit", 0.5]), (3, ["--lr", 0.01])):
        server = tiny.server("--dataset", "Tiny", "--num_rounds", last, "--resume", *flags)
        client = tiny.client(0, "--dataset", "Tiny")
        assert (server.wait(), client.wait()) == (0, 0)
        assert list(clients_csv(tiny)["round"]) == list(range(1, last + 1))
    args = torch.load(tiny.ckps("Tiny") / "server.ptl", weights_only=True)["args"]
    assert (args["num_epochs"], args["lr"], args["num_clients"]) == (2, 0.01, 1)
    assert "lr: 0.001 → 0.01" in server.out and "num_epochs 2" in server.out
    (run,) = [one["run"] for one in wandb_records(wandb_folders(tiny)[-1]) if one["type"] == "run"]
    assert (run["config"]["update"]["num_epochs"], run["config"]["update"]["lr"]) == (2, 0.01)
    examples = [line.split(",")[2] for line in (tiny.ckps("Tiny") / "clients.csv").read_text().splitlines()]
    assert examples == ["examples", "160", "160", "160"]
