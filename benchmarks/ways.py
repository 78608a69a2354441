"""What Flower's engines cost beside the scripts, and what a kill costs on each; writes ways.json.

    .venv-simulation/bin/python benchmarks/ways.py [WAY …]

The same run in each WAY: 2 clients with 240 fit and 60 eval images of Shapes10 and LeNet5, processes of this machine.
Then a device is killed by SIGKILL in the midst of a round and started again, and so is the server, or the SuperLink,
whose run goes on by --resume. The deployment is that of the README, with TLS and registered keys.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time

import pandas as pd
import psutil
from common import HERE, BenchSuite, about_this_run, parse_names, write_json
from helpers import ROOT, free_port, history, wait_until, write_images

sys.path[:0] = [str(HERE.parent / "tests" / "engines"), str(ROOT)]

from deployment import Shelf, commands  # noqa: E402

NUM_CLIENTS, ROUNDS = 2, 10  # the rounds before anything is killed
MANY = 10000  # rounds, more than are run
SAME = ("--dataset", "Tiny", "--num_clients", NUM_CLIENTS, "--num_rounds", MANY, "--seed", 1)


def saved(suite):
    """How many rounds are in history.csv."""
    return len(suite.history("Tiny"))


def await_rounds(suite, number, timeout=300):
    """Wait for `number` more rounds than are saved."""
    goal = saved(suite) + number
    wait_until(f"round {goal}", lambda: saved(suite) >= goal, timeout)


def usual_round(suite):
    """Of the rounds after the first: the median seconds of one, and of what is not its slowest fit and evaluate."""
    clients = pd.read_csv(suite.ckps("Tiny") / "clients.csv")
    work = clients.groupby("round")[["fit_seconds", "eval_seconds"]].max().sum(axis=1)
    seconds = history(suite).set_index("round")["round_seconds"][1:ROUNDS]
    beside = seconds - work[seconds.index]
    return {"round_seconds": float(seconds.median()), "beside_seconds": float(beside.median()), "n": len(seconds)}


def memory_of_tree(process):
    """MiB of resident memory that a process and its children have now."""
    sizes = []
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            sizes.append(member.memory_info().rss)
    return sum(sizes) / 2**20


def watch_memory(process, rounds_over, timeout=300):
    """The peak of memory_of_tree until `rounds_over()`."""
    most, until = 0.0, time.monotonic() + timeout
    while not rounds_over():
        assert time.monotonic() < until, "the rounds do not come"
        most = max(most, memory_of_tree(process))
        time.sleep(0.05)
    return most


def new_suite(suite):
    (suite.root / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    source = write_images(suite.root / "shapes.zip", 300 * NUM_CLIENTS, 100)
    suite.partition("--dataset", "Tiny", "--source", source, "--num_clients", NUM_CLIENTS)


def measure_kills(suite, stop_device, start_device, output, stop_server, resume):
    """What is measured of a run under way, by what stops and starts its parts; `output()` is what its server says."""
    before = saved(suite)
    stop_device()
    await_rounds(suite, 2)
    rows = suite.history("Tiny")[before:]
    killed = next(row for row in rows if row["failures"])  # it finishes without the one that is gone
    started = time.monotonic()
    start_device()
    wait_until("it is back", lambda: output().count("cid 1 joined") + output().count("cid 1 is back") > 1, 120)
    back = time.monotonic() - started
    await_rounds(suite, 2)
    stop_server()
    finished, started = saved(suite), time.monotonic()
    resume()
    wait_until("a round after the resume", lambda: saved(suite) > finished, 300)
    return {
        "device_killed_seconds": killed["round_seconds"],
        "device_back_seconds": back,
        "server_killed_seconds": time.monotonic() - started,
    }


def scripts(suite):
    new_suite(suite)
    server = [suite.server(*SAME, "--min_clients", 1)]
    clients = [suite.client(cid, "--dataset", "Tiny") for cid in range(NUM_CLIENTS)]
    memory = watch_memory(psutil.Process(clients[0].pid), lambda: saved(suite) >= ROUNDS)
    kills = measure_kills(
        suite,
        clients[1].kill,
        lambda: suite.client(1, "--dataset", "Tiny"),
        lambda: server[0].out,
        server[0].kill,
        lambda: server.append(suite.server(*SAME, "--min_clients", 1, "--resume")),
    )
    return {**usual_round(suite), "device_mib": memory, **kills}


def simulation(suite):
    new_suite(suite)
    run = suite.start("deploy/simulate.py", *SAME)
    wait_until("the first round", lambda: saved(suite) >= 1, 120)
    worker = psutil.Process(suite.left_over("ray::ClientAppActor")[0])
    memory = watch_memory(worker, lambda: saved(suite) >= ROUNDS)
    run.popen.terminate()
    run.wait(60)
    return {**usual_round(suite), "device_mib": memory}


def deployment(suite):
    new_suite(suite)
    shelf = Shelf(suite)
    certificates, superlink, keygen, register, supernode, train = commands()
    train = train.replace("num_clients=10", f"num_clients={NUM_CLIENTS} min_clients=1 seed=1")
    train = train.replace("num_rounds=100", f"num_rounds={MANY}")
    shelf.run(certificates)
    shelf.write_config()

    def start_superlink():
        shelf.superlink = shelf.start(superlink, "--port", str(shelf.port))
        shelf.superlink.wait_for("Uvicorn running", 60)

    def start_supernode(number):
        return shelf.start(supernode, "--port", str(free_port()), number=number)

    def resume():
        """As the README has it: start the SuperLink, and when it has given up the old run, start one that goes on."""
        start_superlink()
        wait_until("the old run has failed", lambda: status(shelf) == "finished:failed", 200)
        shelf.start(train.replace("num_clients", "resume=true num_clients"))

    start_superlink()
    nodes = []
    for number in range(NUM_CLIENTS):
        shelf.run(keygen, number=number)
        shelf.run(register, number=number)
        nodes.append(start_supernode(number))
    run = shelf.start(train)
    memory = watch_memory(psutil.Process(nodes[0].pid), lambda: saved(suite) >= ROUNDS, 600)
    kills = measure_kills(
        suite,
        nodes[1].kill,
        lambda: nodes.append(start_supernode(1)),
        lambda: run.out,
        lambda: shelf.superlink.kill(),
        resume,
    )
    result = {**usual_round(suite), "device_mib": memory, **kills}
    shelf.close()
    return result


def status(shelf):
    """The status of the newest run on the SuperLink."""
    command = shelf.words("flwr list laptop --format json")
    out = subprocess.run(command, env=shelf.suite.env, cwd=shelf.suite.root, capture_output=True, text=True).stdout
    return json.loads(out[out.index("{") :])["runs"][-1]["status"]


WAYS = {"scripts": scripts, "simulation": simulation, "deployment": deployment}


def main():
    args = parse_names(argparse.ArgumentParser(description=__doc__), "way", WAYS)
    path = HERE / "ways.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    for name in args.names or WAYS:
        with BenchSuite() as suite:
            measured[name] = WAYS[name](suite)
        print(name, measured[name], flush=True)
    measured["about"] = about_this_run()
    write_json(path, measured)


if __name__ == "__main__":
    main()
