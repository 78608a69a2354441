"""Train under a hail of faults, and once more without, and compare.

    make soak
    python benchmarks/soak.py --rounds 20 --seed 1

A client is killed every two seconds and started again, another is frozen and thawed, and the server is killed three
times and resumed, until the rounds are done. Writes benchmarks/soak.json, and ends with exit code 1 if a row of the
history is missing or double, the accuracy is off by more than two points, or a process is left. Takes some minutes.
"""

import argparse
import contextlib
import random
import signal
import sys
import threading
import time

import psutil
import report
from common import HERE, BenchSuite, about_this_run, write_json
from helpers import lines

DATASET, NUM_CLIENTS = "Shapes10", 10
KILL_EVERY = 2.0  # seconds
FREEZE_EVERY, SHORT_FREEZE, LONG_FREEZE = 5.0, (0.5, 3.0), (9.0, 12.0)  # seconds; a long one outlasts a round's timeout
ROUND_TIMEOUT, MIN_CLIENTS = 6, 3
SERVER_KILLS, SERVER_PAUSE = 3, 1.0
TIME_LIMIT = 420  # seconds for each of the two trainings
CALM = 10  # rounds at the end without faults, in which all clients are to come back
CLOSE_ENOUGH = 0.02  # accuracy
END_WITHIN = 10  # seconds that wandb's process has to end after the server


class Training:
    """One training of NUM_CLIENTS clients: its processes, and the faults that befall them."""

    def __init__(self, suite, num_rounds, seed):
        self.suite, self.num_rounds, self.random = suite, num_rounds, random.Random(seed)
        self.faults = []  # (kind, cid or None, rows of the history at that time, the process that has to go on)
        self.again = 0  # finished rounds that a killed server had not saved yet
        self.freezes = 0
        self.server = self.start_server()
        self.clients = [self.start_client(cid) for cid in range(NUM_CLIENTS)]
        self.thaws = {}  # cid: when to thaw it

    def start_server(self, *args):
        return self.suite.server(
            *("--dataset", DATASET, "--num_clients", NUM_CLIENTS, "--num_rounds", self.num_rounds),
            *("--round_timeout", ROUND_TIMEOUT, "--min_clients", MIN_CLIENTS, *args),
        )

    def start_client(self, cid):
        return self.suite.client(cid, "--dataset", DATASET, "--max_wait_time", 120)

    def rows(self):
        return [int(row["round"]) for row in self.suite.history(DATASET)]

    def running(self):
        """cids of the clients that run and are not frozen."""
        return [cid for cid, client in enumerate(self.clients) if client.popen.poll() is None and cid not in self.thaws]

    def kill_client(self):
        cid = self.random.choice(self.running())
        self.clients[cid].kill()
        self.clients[cid] = self.start_client(cid)
        self.faults.append(("client killed, restarted", cid, len(self.rows()), self.clients[cid]))

    def freeze_client(self):
        cid = self.random.choice(self.running())
        self.freezes += 1
        long = self.freezes % 4 == 0
        self.clients[cid].send(signal.SIGSTOP)
        self.thaws[cid] = time.monotonic() + self.random.uniform(*(LONG_FREEZE if long else SHORT_FREEZE))
        kind = "client frozen past the timeout, thawed" if long else "client frozen, thawed"
        self.faults.append((kind, cid, len(self.rows()), self.clients[cid]))

    def thaw(self, until=float("inf")):
        for cid in [cid for cid, when in self.thaws.items() if when <= until]:
            self.clients[cid].send(signal.SIGCONT)
            del self.thaws[cid]

    def kill_server(self):
        self.server.kill()
        rows = self.rows()
        time.sleep(SERVER_PAUSE)
        self.server = self.start_server("--resume")
        self.server.wait_for(f" to {self.num_rounds} with ")
        first = int(lines(self.server, f" to {self.num_rounds} with ")[0].split()[1])
        self.again += max(0, len(rows) + 1 - first)
        self.faults.append(("server killed, resumed", None, len(rows), self.server))

    def run(self, with_faults):
        """Train to the end, or until the time is up. Returns the seconds that it took."""
        started = time.monotonic()
        kill_at = freeze_at = None
        server_kills = [(self.num_rounds - CALM) * (turn + 1) // (SERVER_KILLS + 1) for turn in range(SERVER_KILLS)]
        while self.server.popen.poll() is None:
            now, rows = time.monotonic(), len(self.rows())
            if now - started > TIME_LIMIT:
                break
            if with_faults and rows and kill_at is None:
                kill_at, freeze_at = now, now + KILL_EVERY / 2
            calm = rows >= self.num_rounds - CALM
            self.thaw(float("inf") if calm else now)
            if kill_at is not None and not calm:
                if server_kills and rows >= server_kills[0]:
                    del server_kills[0]
                    self.kill_server()
                if now >= kill_at and self.running():
                    self.kill_client()
                    kill_at = now + KILL_EVERY
                if now >= freeze_at and self.running():
                    self.freeze_client()
                    freeze_at = now + FREEZE_EVERY
            time.sleep(0.1)
        self.thaw()
        return time.monotonic() - started

    def codes(self):
        """Exit codes of the server and the clients that run at the end; None where one does not end."""
        codes = []
        for process in [self.server, *self.clients]:
            try:
                codes.append(process.wait(30))
            except Exception:
                codes.append(None)
        return codes

    def survived(self, fault):
        """Whether a round was finished after the fault, and its process (or a later one in its place) ended well."""
        _, cid, rows, _ = fault
        last = self.server if cid is None else self.clients[cid]
        return len(self.rows()) > rows and last.popen.poll() == 0


def train(num_rounds, seed, with_faults):
    """Train in a suite of its own. Returns what came of it, a dictionary, and shows how far it is."""
    with BenchSuite() as suite:
        suite.partition("--dataset", DATASET, "--num_clients", NUM_CLIENTS)
        training = Training(suite, num_rounds, seed)
        watch = threading.Event()
        threading.Thread(target=show_progress, args=(training, watch), daemon=True).start()
        seconds = training.run(with_faults)
        codes = training.codes()
        watch.set()
        rounds = training.rows()
        history = suite.history(DATASET)
        kinds = sorted({kind for kind, *_ in training.faults})
        faults = {
            kind: {
                "injected": sum(fault[0] == kind for fault in training.faults),
                "survived": sum(fault[0] == kind and training.survived(fault) for fault in training.faults),
            }
            for kind in kinds
        }
        return {
            "seconds": round(seconds, 1),
            "rounds": num_rounds,
            "rows_lost": num_rounds - len(set(rounds)),
            "rows_double": len(rounds) - len(set(rounds)),
            "in_order": rounds == sorted(rounds),
            "rounds_trained_again": training.again,
            "mean_clients_a_round": sum(int(row["clients"]) for row in history) / max(1, len(history)),
            "failures": sum(int(row["failures"]) for row in history),
            "faults": faults,
            "exit_codes": codes,
            "processes_left": wait_for_the_last(suite),
            "test_accuracy": float(history[-1]["test_accuracy"]) if history else None,
        }


def wait_for_the_last(suite):
    """The number of processes that are still there END_WITHIN seconds after the server's end; names them."""
    until = time.monotonic() + END_WITHIN
    while (left := suite.left_over()) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        with contextlib.suppress(psutil.Error):
            print(f"left: {' '.join(psutil.Process(pid).cmdline())}")
    return len(left)


def show_progress(training, watch):
    while not watch.wait(10):
        print(f"  {len(training.rows())} of {training.num_rounds} rounds, {len(training.faults)} faults", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="rounds to train (default: 60, and write soak.json)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults (default: 0)")
    args = parser.parse_args()
    about = about_this_run()
    print(f"{args.rounds} rounds under faults")
    faulty = train(args.rounds, args.seed, with_faults=True)
    print(f"{args.rounds} rounds without")
    clean = train(args.rounds, args.seed, with_faults=False)

    print(f"{'fault':40} injected  survived")
    for kind, counts in faulty["faults"].items():
        print(f"{kind:40} {counts['injected']:8}  {counts['survived']:8}")
    print(f"rows lost: {faulty['rows_lost']} of {args.rounds}; double: {faulty['rows_double']}")
    print(f"finished rounds that a killed server had not saved and ran again: {faulty['rounds_trained_again']}")
    for name, result in (("with faults", faulty), ("without", clean)):
        print(
            f"{name}: test accuracy {result['test_accuracy']}, {result['seconds']} s, "
            f"{result['mean_clients_a_round']:.1f} clients a round, {result['failures']} failures, "
            f"{result['processes_left']} processes left, exit codes {result['exit_codes']}"
        )
    good = all(
        result["rows_lost"] == result["rows_double"] == result["processes_left"] == 0
        and result["in_order"]
        and not any(result["exit_codes"])
        and None not in result["exit_codes"]
        for result in (faulty, clean)
    )
    good = good and all(counts["injected"] == counts["survived"] for counts in faulty["faults"].values())
    good = good and abs(faulty["test_accuracy"] - clean["test_accuracy"]) <= CLOSE_ENOUGH
    print("survived" if good else "NOT survived")
    if args.rounds == 60:
        write_json(HERE / "soak.json", {**about, "seed": args.seed, "good": good, "faulty": faulty, "clean": clean})
        report.main()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
