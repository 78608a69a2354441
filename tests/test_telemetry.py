"""What devices tell of themselves, read from a /sys and /proc of the test's making, and limits that follow from it."""

import os
import resource

import pytest

import client
import server


def board(tmp_path, files):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


THERMAL = "sys/class/thermal/thermal_zone0/temp"
THROTTLED = "sys/devices/platform/soc/soc:firmware/get_throttled"


def test_sensors_of_a_raspberry_pi(tmp_path):
    found = client.sensors(board(tmp_path, {THERMAL: b"61835\n", THROTTLED: b"50005\n"}))
    assert found["cpu_temp_c"] == 61.835
    assert found["throttled"] == 0x50005  # undervoltage and throttled, now and since the boot
    assert found["load"] == pytest.approx(os.getloadavg()[0], abs=2)
    assert found["peak_memory_mb"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, rel=0.1)


@pytest.mark.parametrize("files", [{}, {THERMAL: b"", THROTTLED: b"none\n"}, {THERMAL: b"hot\n", THROTTLED: b"\xff"}])
def test_sensor_that_is_not_there_or_makes_no_sense_is_absent(tmp_path, files):
    assert set(client.sensors(board(tmp_path, files))) == {"peak_memory_mb", "load"}


def test_machine_is_described(tmp_path):
    files = {
        "proc/device-tree/model": b"Raspberry Pi 4 Model B Rev 1.4\0",
        "proc/meminfo": b"MemTotal:        3884344 kB\nMemFree:          101000 kB\nMemAvailable:    2097152 kB\n",
    }
    facts = client.describe_machine(board(tmp_path, files))
    assert facts["board"] == "Raspberry Pi 4 Model B Rev 1.4" and facts["free_mb"] == 2048
    assert set(facts) == {"board", "free_mb", "torch", "flwr", "python", "threads"}
    elsewhere = client.describe_machine(tmp_path / "empty")
    assert elsewhere["board"] == os.uname().machine and "free_mb" not in elsewhere


def test_client_says_what_it_runs_on(tiny):
    device = tiny.run("client.py", "--dataset", "Tiny", "--cid", 0, "--max_wait_time", 1, "--num_threads", 1)
    (line,) = [line for line in device.out.splitlines() if line.startswith("on ")]
    for word in ("1 threads", "torch 2", "flwr 1", "Python 3", "MB free"):
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
    laptop = server.Server(None, None, auto_timeout=True)
    laptop.seconds["fit", "3"] = list(seconds)
    laptop.seconds["fit", "4"] = [1000.0] * 9  # another client
    laptop.seconds["evaluate", "3"] = [1000.0] * 9  # another question
    assert laptop.limit("fit", "3", None) == limit
    assert server.Server(None, None).limit("fit", "3", 7.0) == 7.0
