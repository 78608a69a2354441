"""Measure the suite's speed and memory, each figure beside its reference, in one run on the same work.

    make bench
    python benchmarks/bench.py epoch rounds --pairs 11

Without names all benches are run, on CIFAR-10, which is downloaded into datasets/ unless ../shared/cifar10 makes it;
minutes on two quiet cores, with one torch thread. The figures go to benchmarks/results.json, those of benches that are
named in place of their old ones, and from there into the READMEs (report.py). A ratio is ours divided by the reference,
so less is better: the median, least and greatest of alternating pairs.
"""

import argparse
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time

import psutil
import report
import wifi
from common import BUILD_ARCHIVE, HERE, BenchSuite, about_this_run, ask, in_turns, memory_of, parse_names, write_json
from helpers import ROOT, free_port, lines, wait_until

# For the bench "rounds": {number of clients: rounds in each of the alternating blocks}.
BLOCKS = {2: 25, 10: 15, 50: 4, 200: 1}
IMPORTS = """import torch, grpc
from flwr.client import NumPyClient
print("imported", flush=True), input()"""  # what client.py imports of others
DATASET = "CIFAR10"
POLL = 0.005  # seconds between two looks at what a process prints, where that is timed
WHOLE_CLIENTS, WIRE_ROUNDS = 4, 20
# For the benches "wifi" and "wire": {way: (server's arguments, most of the waiting and of the bytes of `before`)}.
BEFORE = "whole models as plain arrays"  # as it was before wire.py
WAYS = {
    BEFORE: ([], None, None),
    "off": ([], 0.7, 505_000),
    "fp16": (["--compress", "fp16"], 0.36, 255_000),
    "int8": (["--compress", "int8"], 0.2, 135_000),
}
WIFI_CLIENTS, SHELF = (4, 10), 20  # and into how many shards the shapes are cut


class Bench:
    """The benches by name; each method measures, and returns its rows of the table."""

    def __init__(self, suite, pairs):
        self.suite, self.pairs, self.notes = suite, pairs, {}
        self.archive = suite.root / "cifar-10-python.tar.gz"

    def row(self, name, unit, ours, reference, against, goal=None, limit=None):
        """A row of the table; `goal` is the most that the median ratio may be, `limit` the most for our own median.

        Raises ValueError unless both have a sample for each of the alternating pairs.
        """
        if not len(ours) == len(reference) == self.pairs:
            raise ValueError(f"{name}: {len(ours)} samples of ours, {len(reference)} of {against}, {self.pairs} pairs")
        ratios = [mine / other for mine, other in zip(ours, reference, strict=True)]
        middle = {"ours": statistics.median(ours), "reference": statistics.median(reference)}
        ratio = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        met = None
        if goal is not None or limit is not None:
            met = (goal is None or ratio["median"] <= goal) and (limit is None or middle["ours"] <= limit)
        about = {"name": name, "unit": unit, "against": against, "n": self.pairs, **middle}
        samples = {"ours": ours, "reference": reference}
        return {**about, "ratio": ratio, "goal": goal, "limit": limit, "met": met, "samples": samples}

    def prepare(self):
        """Make the archive, or download it, and the shards of 10 clients."""
        from plumbing.sources.official import find_official  # found once common has set the path

        if BUILD_ARCHIVE.exists():
            subprocess.run([sys.executable, BUILD_ARCHIVE, self.suite.root], check=True, timeout=300)
        else:
            self.archive = find_official(DATASET, ROOT / "datasets")
        self.partition()

    def partition(self):
        """Run partition.py on the archive: (seconds from its start to its end, MiB at its peak)."""
        folder = self.suite.root / "datasets" / DATASET
        if folder.exists():  # not deleted: creating files soon after a large folder is deleted takes ext4 far longer
            folder.rename(self.suite.root / f"aside_{time.monotonic_ns()}")
        process = self.suite.start("partition.py", "--dataset", DATASET, "--source", self.archive)
        peak = 0.0
        while process.popen.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.005)
        seconds = time.monotonic() - process.started
        if process.wait() != 0:
            raise RuntimeError("partition.py failed")
        return seconds, peak

    def epoch(self):
        seconds = self.suite.measure("epochs", DATASET, self.pairs, timeout=300)
        self.notes["step_profile"] = self.suite.measure("step_profile", DATASET)
        tutorial, whole = "tutorial's way", f"whole fit call, {seconds['num_fit']} + {seconds['num_eval']} images"
        epoch = f"epoch of {seconds['num_fit']} images"
        return [
            self.row(epoch, "s", seconds["ours_epoch"], seconds["bare"], "bare loop", 0.8),
            self.row(epoch, "s", seconds["ours_epoch"], seconds["tutorial_epoch"], tutorial, 1 / 1.7),
            self.row(whole, "s", seconds["ours_fit"], seconds["tutorial_fit"], tutorial, 1 / 1.7),
        ]

    def adam(self):
        """Processes that train two steps with engines.Adam or with torch's: what ours saves, and whether it stays."""
        samples = {name: {"ours": [], "torch": []} for name in ("seconds", "mib")}
        for kind in in_turns(self.pairs, ["ours", "torch"]):
            process = self.suite.start("workers.py", "two_steps", kind)
            samples["seconds"][kind].append(process.wait_for("step", poll=POLL))
            process.wait_for("mib")
            samples["mib"][kind].append(json.loads(lines(process, "mib")[0])["mib"])
        seconds, mib = samples.values()
        return [
            self.row("two steps: start to the first", "s", seconds["ours"], seconds["torch"], "torch.optim.Adam", 0.9),
            self.row("two steps: peak memory", "MiB", mib["ours"], mib["torch"], "torch.optim.Adam", 0.9),
        ]

    def start(self):
        """Client processes one after the other at one server, each beside processes that only import."""
        suite = self.suite
        server = suite.server("--dataset", DATASET, "--num_clients", 1, "--num_rounds", 1000)
        server.wait_for("round 1 to", 120)
        names = "connected imported first_fit bare_fit client_mib empty_mib server_mib".split()
        samples = {name: [] for name in names}

        def run_client():
            process = suite.client(0, "--dataset", DATASET)
            connected = process.wait_for("connected to the server", poll=POLL)
            first_fit = process.wait_for("fit_loss", poll=POLL)
            process.wait_for("fit_loss", count=2)  # so the first evaluate is over too
            samples["client_mib"].append(memory_of(process.pid))
            family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
            samples["server_mib"].append(sum(memory_of(member.pid) for member in family))
            process.kill()
            samples["connected"].append(connected)
            samples["first_fit"].append(first_fit)

        def run_imports():
            process = suite.start("-c", "import client; print('imported')")
            samples["imported"].append(process.wait_for("imported", poll=POLL))
            process.kill()

        def run_bare():
            process = suite.start("workers.py", "bare_client", DATASET)
            samples["bare_fit"].append(process.wait_for("fit", poll=POLL))
            process.kill()

        def run_empty():
            process = suite.start("-c", IMPORTS)
            process.wait_for("imported")
            samples["empty_mib"].append(memory_of(process.pid))
            process.kill()

        for work in in_turns(self.pairs, [run_client, run_imports, run_bare, run_empty]):
            work()
        server.kill()
        self.notes["client_memory"] = suite.measure("client_memory", DATASET)
        empty = "empty process with torch and flwr"
        return [
            self.row("client: start to connected", "s", samples["connected"], samples["imported"], "its imports", 1.3),
            self.row("client: start to first fit", "s", samples["first_fit"], samples["bare_fit"], "bare loop"),
            self.row("client: peak memory", "MiB", samples["client_mib"], samples["empty_mib"], empty, 1.15),
            self.row("server and wandb: peak memory", "MiB", samples["server_mib"], samples["empty_mib"], empty),
        ]

    def rounds(self):
        """Per number of clients, two servers that live side by side and run blocks of rounds in turn."""
        rows, memory = [], {}
        for num_clients, block in BLOCKS.items():
            servers, clients = {}, []
            for kind in ("ours", "plain"):
                port = free_port()
                servers[kind] = self.suite.start("rounds.py", "server", kind, num_clients, port)
                clients += self.suite.start_clients(kind, num_clients, port)
            for server in servers.values():
                ask(server, 1)  # waits until all have joined, and warms up
            wall, cpu = ({kind: [] for kind in servers} for _ in range(2))
            for kind in in_turns(self.pairs, list(servers)):
                time.sleep(0.3)  # our record of the last rounds is kept meanwhile, which is not the other's burden
                answer = ask(servers[kind], block)
                wall[kind].append(answer["seconds"] / block * 1000)
                cpu[kind].append(answer["cpu_seconds"] / block * 1000)
            for kind, server in servers.items():
                server.popen.stdin.close()
                server.wait_for("peak_mib")
                memory.setdefault(num_clients, {})[kind] = json.loads(lines(server, "peak_mib")[0])
            for process in [*servers.values(), *clients]:
                process.kill()
            name = f"round with {num_clients} idle clients"
            rows.append(self.row(name, "ms", wall["ours"], wall["plain"], "Flower's Server, FedAvg", 1.3))
            rows.append(self.row(f"{name}: server's CPU", "ms", cpu["ours"], cpu["plain"], "Flower's Server, FedAvg"))
        self.notes["server_memory"] = memory
        return rows

    def whole(self):
        """Rounds of a server and client processes: the whole round beside its slowest fit."""
        suite, count = self.suite, self.pairs + 1
        server = suite.server("--dataset", DATASET, "--num_clients", WHOLE_CLIENTS, "--num_rounds", count)
        arguments = ["--server_port", suite.port, "--num_threads", 1, "--dataset", DATASET]
        clients = [suite.start("workers.py", "timed_client", *arguments, "--cid", cid) for cid in range(WHOLE_CLIENTS)]
        server.wait(300)
        for client in clients:
            client.wait(30)
        seconds = {"fit": [], "evaluate": []}
        for name, rounds in seconds.items():
            told = [[json.loads(line)[name] for line in lines(client, f'{{"{name}"')] for client in clients]
            rounds.extend(map(max, zip(*told, strict=True)))
        whole = [row["round_seconds"] for row in suite.history(DATASET)]
        fit, evaluate = seconds["fit"][1:], seconds["evaluate"][1:]  # without the first round, which warms up
        both = [sum(pair) for pair in zip(fit, evaluate, strict=True)]
        name = f"whole round, {WHOLE_CLIENTS} client processes"
        return [
            self.row(name, "s", whole[1:], fit, "its slowest fit", 1.05),
            self.row(name, "s", whole[1:], both, "slowest fit + slowest evaluate", 1.05),
        ]

    def images(self):
        samples = {name: [] for name in ("ours", "plain", "read", "ours_mib", "plain_mib")}
        count = 0

        def ours():
            seconds, mib = self.partition()
            samples["ours"].append(seconds)
            samples["ours_mib"].append(mib)

        def plain():
            nonlocal count
            folder = self.suite.root / f"plain_{time.monotonic_ns()}"
            answer = self.suite.measure("save_arrays", self.archive, folder)
            samples["plain"].append(answer["seconds"])
            samples["read"].append(answer["seconds"] + answer["read_seconds"])
            samples["plain_mib"].append(answer["mib"])
            count = answer["images"]

        for work in in_turns(self.pairs, [ours, plain]):
            work()
        self.notes["images_per_second"] = {
            "ours": count / statistics.median(samples["ours"]),
            "np.save": count / statistics.median(samples["plain"]),
        }
        plain, name = "np.save of the same arrays", f"partition.py, {count} images"
        return [
            self.row(name, "s", samples["ours"], samples["plain"], plain, 1.3),
            self.row(name, "s", samples["ours"], samples["read"], "reading the archive, then np.save", 1.3),
            self.row("partition.py: peak memory", "MiB", samples["ours_mib"], samples["plain_mib"], plain, limit=700),
        ]

    def memory(self):
        rows = []
        for num_clients in BLOCKS:
            mib = self.suite.measure("aggregation_memory", num_clients, self.pairs)
            name = f"server: memory of {num_clients} results"
            rows.append(self.row(name, "MiB", mib["ours"], mib["flower"], "Flower's FedAvg", 1.05))
        return rows

    def draw_shelf(self):
        """Shards of 500 images, so that clients do not train for long."""
        self.suite.partition("--dataset", "Shapes10", "--num_clients", SHELF)
        return ["--dataset", "Shapes10", "--num_clients"]

    def wire(self):
        """Bytes that each further round takes between a client and its server, counted by a proxy: TCP payload."""
        suite, shapes, counts = self.suite, self.draw_shelf(), {}

        def carry(source, target, sent, name):
            with contextlib.suppress(OSError):  # one side is gone
                while data := source.recv(1 << 16):
                    sent[name] += len(data)
                    target.sendall(data)
                target.shutdown(socket.SHUT_WR)

        def accept(listener, sent):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", suite.port))
                for source, target, name in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=carry, args=(source, target, sent, name), daemon=True).start()

        def count(way, arguments, num_rounds):
            script = ["workers.py", "plain_server"] if way == BEFORE else ["server.py"]
            about = ["--server_port", suite.port, *shapes, 1, "--num_rounds", num_rounds]
            server = suite.start(*script, *about, *arguments)
            server.wait_for("round 1 to")
            sent = {"down": 0, "up": 0}
            listener = socket.create_server(("127.0.0.1", 0))
            threading.Thread(target=accept, args=(listener, sent), daemon=True).start()
            own = ["--cid", 0, "--num_threads", 1, "--server_port", listener.getsockname()[1]]
            client = suite.start("client.py", *shapes[:2], *own)
            server.wait(120)
            client.wait(30)
            return sent

        for way, (arguments, _, _) in WAYS.items():
            few, many = (count(way, arguments, number) for number in (5, 5 + WIRE_ROUNDS))
            counts[way] = {name: (many[name] - few[name]) / WIRE_ROUNDS for name in many}
            print(f"wire: {way}: a round and client {counts[way]}")
        size = suite.measure("parameter_bytes")["bytes"]
        goals = {way: most for way, (_, _, most) in WAYS.items()}
        self.notes["wire"] = {"parameters": size, "rounds": WIRE_ROUNDS, "ways": counts, "goals": goals}
        return []

    def wifi(self):
        """Rounds of a shelf on one Wi-Fi: what they take longer with a bucket on the server's link than without."""
        if (reason := wifi.why_not()) is not None:
            print(f"wifi: SKIPPED, for {reason}")
            return []
        shapes, rows = self.draw_shelf(), []
        for count in WIFI_CLIENTS:
            waited, whole, free = {}, {}, {}
            for way, (arguments, _, _) in WAYS.items():
                with wifi.Wifi(count) as shelf:
                    whole[way], free[way] = self.shelf_rounds(shelf, way, *shapes, count, *arguments)
                waited[way] = [slow - quick for slow, quick in zip(whole[way], free[way], strict=True)]
            name = f"round with {count} clients on {wifi.RATE[:-4]} Mbit/s"
            for way, (_, goal, _) in WAYS.items():
                if way != BEFORE:
                    rows.append(self.row(f"{name}, {way}: waiting", "s", waited[way], waited[BEFORE], BEFORE, goal))
                    rows.append(self.row(f"{name}, {way}", "s", whole[way], free[way], "without a limit"))
        return rows

    def shelf_rounds(self, shelf, way, *arguments):
        """The seconds of as many rounds with the bucket as there are pairs, and then of as many without it.

        Between them lie the rounds, under way or waiting to be saved, in which the bucket is taken off.
        """
        suite, count, dataset = self.suite, self.pairs, arguments[1]
        shelf.limit()
        about = ["--num_rounds", 2 * count + 4, "--server_address", shelf.address, "--server_port", suite.port]
        within = ["import os, sys; os.execvp('ip', ['ip', 'netns', 'exec', *sys.argv[1:]])"]
        script = [HERE / "workers.py", "plain_server"] if way == BEFORE else [suite.root / "server.py"]
        server = suite.start("-c", *within, shelf.server, sys.executable, *script, *arguments, *about)
        server.wait_for("round 1 to")
        own = ["--dataset", dataset, *about[2:], "--num_threads", 1]
        for cid, name in enumerate(shelf.clients):
            suite.start("-c", *within, name, sys.executable, suite.root / "client.py", *own, "--cid", cid)
        wait_until("rounds", lambda: len(suite.history(dataset)) > count, timeout=180)  # the first warms up
        shelf.unlimit()
        server.wait(120)
        seconds = [row["round_seconds"] for row in suite.history(dataset)]
        shutil.rmtree(suite.ckps(dataset))
        return seconds[1 : count + 1], seconds[-count:]


BENCHES = ["epoch", "adam", "start", "rounds", "whole", "wifi", "images", "memory", "wire"]


def print_table(rows):
    if not rows:
        return
    print(f"{'what':42} {'ours':>9}  {'reference':>9}  {'ratio':>6} {'min … max':>14}   n  goal")
    for line in rows:
        ratio = line["ratio"]
        print(
            f"{line['name']:42} {line['ours']:9.3f}  {line['reference']:9.3f}  {ratio['median']:6.3f}"
            f" {ratio['min']:6.3f} … {ratio['max']:5.3f} {line['n']:3}  {report.goal_of(line)}\n"
            f"    in {line['unit']}, against {line['against']}",
            flush=True,
        )


def merge(old, about, notes, rows):
    """What results.json has to say now: the benches of `rows` from the run `about`, all else as in `old`."""
    run, names = about["date"], {row["bench"] for row in rows}
    rows = [row for row in old.get("rows", []) if row["bench"] not in names] + [{"run": run, **row} for row in rows]
    rows.sort(key=lambda row: BENCHES.index(row["bench"]))
    runs = {**old.get("runs", {}), run: about}
    used = {row["run"] for row in rows}
    return {**old, **notes, "runs": {run: runs[run] for run in runs if run in used}, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="alternating pairs (default: 7); under 5 write no files")
    args = parse_names(parser, "bench", BENCHES)
    about, rows, started = about_this_run(), [], time.monotonic()
    with BenchSuite() as suite:
        bench = Bench(suite, args.pairs)
        if set(args.names or BENCHES) - {"adam", "memory", "rounds", "wifi", "wire"}:
            bench.prepare()
        for name in args.names or BENCHES:
            begun = time.monotonic()
            rows += (measured := [{"bench": name, **row} for row in getattr(bench, name)()])
            print(f"[{name}: {time.monotonic() - begun:.0f} s]")
            print_table(measured)
    about.update(threads=1, pairs=args.pairs, seconds=round(time.monotonic() - started))
    print(f"{about['seconds']} s in all; {about}; {bench.notes}")
    if args.pairs >= 5:
        path = HERE / "results.json"
        old = json.loads(path.read_text(encoding="utf-8")) if args.names else {}
        write_json(path, merge(old, about, bench.notes, rows))
        report.main()


if __name__ == "__main__":
    main()
