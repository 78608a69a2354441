"""How a round and the server's memory grow with the number of clients; writes growth.json.

    .venv-simulation/bin/python benchmarks/growth.py simulation 10 100 1000
    .venv-simulation/bin/python benchmarks/growth.py scripts 10 50 100 200 500
    .venv-simulation/bin/python benchmarks/growth.py aggregation 62050 25000000

`simulation`: deploy/simulate.py, one epoch over 50 images a client (40 to fit, 10 to eval; Shapes10's drawings).
`scripts`: our own server, with clients that answer at once (rounds.py), so that a round is what it costs.
`aggregation`: the mean of nets of so many parameters. What is measured is put to what growth.json has of others.
"""

import json
import statistics
import sys
import time

import numpy as np
from common import HERE, BenchSuite, about_this_run, ask, memory_of, write_json
from helpers import ROOT, free_port, lines, write_images

from strategies import average

ROUNDS = 6  # the first of them warms up: each process reads its shards
RESULTS = 10  # of clients, that are averaged
BLOCK = 3  # rounds that are timed together, of the scripts


def simulation(num_clients):
    with BenchSuite() as suite:
        (suite.root / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
        source = write_images(suite.root / "shapes.zip", 50 * num_clients, 100)
        suite.partition("--dataset", "Growth", "--source", source, "--num_clients", num_clients, timeout=300)
        flags = ("--dataset", "Growth", "--num_clients", num_clients, "--num_rounds", ROUNDS, "--seed", 1)
        run = suite.start("deploy/simulate.py", *flags)
        server, workers = 0.0, 0.0
        while run.popen.poll() is None:
            server = max([server, *map(memory_of, suite.left_over("flwr-simulation"))])
            workers = max([workers, *map(memory_of, suite.left_over("ray::ClientAppActor"))])
            time.sleep(1)
        assert run.popen.returncode == 0, run
        rows = suite.history("Growth")
        assert [row["clients"] for row in rows] == [num_clients] * ROUNDS, rows
        seconds = [row["round_seconds"] for row in rows[1:]]
    return {"round_seconds": statistics.median(seconds), "n": len(seconds), "server_mib": server, "worker_mib": workers}


def scripts(num_clients):
    with BenchSuite() as suite:
        port = free_port()
        server = suite.start("rounds.py", "server", "ours", num_clients, port)
        suite.start_clients("ours", num_clients, port)
        seconds = [ask(server, BLOCK)["seconds"] / BLOCK for _ in range(4)]  # the first: all join, and warm up
        server.popen.stdin.close()
        server.wait_for("peak_mib")
        peak = json.loads(lines(server, "peak_mib")[0])["peak_mib"]
    return {"round_seconds": statistics.median(seconds[1:]), "n": len(seconds) - 1, "server_mib": peak}


def aggregation(num_parameters):
    rng, seconds = np.random.default_rng(0), []
    results = [(10, np.array_split(rng.random(num_parameters, np.float32), 10)) for _ in range(RESULTS)]
    for _ in range(5):
        started = time.perf_counter()
        average(results)
        seconds.append((time.perf_counter() - started) / RESULTS)
    return {"seconds_a_result": statistics.median(seconds), "n": len(seconds)}


def main():
    path = HERE / "growth.json"
    kind = sys.argv[1]
    for number in map(int, sys.argv[2:]):
        measured = {"simulation": simulation, "scripts": scripts, "aggregation": aggregation}[kind](number)
        print(kind, number, measured, flush=True)
        growth = json.loads(path.read_text()) if path.exists() else {}
        growth.setdefault(kind, {})[str(number)] = measured
        growth.setdefault("about", {})[kind] = about_this_run()
        write_json(path, growth)


if __name__ == "__main__":
    main()
