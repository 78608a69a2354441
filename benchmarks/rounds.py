"""The bench "rounds" of bench.py: servers whose rounds cost nothing but themselves, and the clients for them; run as

    python benchmarks/rounds.py server ours NUM_CLIENTS PORT
    python benchmarks/rounds.py clients ours FIRST_CID NUM_CLIENTS PORT

Beside `ours`, `plain` is Flower's Server, FedAvg and gRPC as they come, which have few clients at work at a time. A
server reads a number from its input, runs that many rounds of fit and evaluate, and prints the seconds that they took;
at the end of its input it prints its memory. Clients are threads that answer at once.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time

from libs import CKPS, torch
from plumbing.common.compare import fingerprint, trial
from plumbing.common.process import quiet_flower
from plumbing.common.state import get_arrays
from plumbing.device.connection import Connection
from plumbing.device.task import Task

from common import memory_of
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerConfig
from flwr.server import strategy as flower

import client
from nets import build_net

MANY = 10**6  # rounds, more than are ever asked for
NET = ("LeNet5", 3, 10)  # name, channels, classes


def make_task():
    """What server and clients must have in common (plumbing/laptop/handshake)."""
    task = {"dataset": "bench", "dataset_id": None, "net": NET[0], "channels": NET[1], "num_classes": NET[2]}
    return {**task, "fingerprint": fingerprint(build_net(*NET)), "trial": trial(build_net(*NET))}


def tell(**what):
    """Print a line of JSON at once, and not into a line that another thread has begun."""
    sys.stdout.write(f"\n{json.dumps(what)}\n")
    sys.stdout.flush()


class Gate:
    """Mixed into a strategy: rounds run only as they are asked for, and are timed."""

    gate_left = 0

    def configure_fit(self, server_round, parameters, client_manager):
        if self.gate_left == 0:
            line = sys.stdin.readline()
            if not line:
                tell(peak_mib=memory_of("self"), before_mib=self.gate_before)
                os._exit(0)
            self.gate_left = int(line)
            self.gate_opened, self.gate_cpu = time.perf_counter(), time.process_time()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_evaluate(self, server_round, results, failures):
        assert not failures, failures
        result = super().aggregate_evaluate(server_round, results, failures)
        self.gate_left -= 1
        if self.gate_left == 0:
            seconds, cpu = time.perf_counter() - self.gate_opened, time.process_time() - self.gate_cpu
            tell(seconds=seconds, cpu_seconds=cpu)
        return result


def serve(kind, num_clients, port):
    torch.manual_seed(0)
    model = build_net(*NET)
    numbers = dict.fromkeys(("min_fit_clients", "min_evaluate_clients", "min_available_clients"), num_clients)
    parts = {}
    if kind != "ours":
        from flwr.server import start_server

        initial = ndarrays_to_parameters(get_arrays(model))
        parts["strategy"] = type("Plain", (Gate, flower.FedAvg), {})(initial_parameters=initial, **numbers)
    else:
        from plumbing.laptop.asking import Absences
        from plumbing.laptop.door import start_server
        from plumbing.laptop.ending import Run
        from plumbing.laptop.record import Record
        from plumbing.laptop.registry import Registry
        from plumbing.laptop.rounds import Target
        from plumbing.laptop.wandb_run import start_wandb

        import server
        import strategies

        task = make_task()
        curves, _ = start_wandb(task["dataset"], None, {})
        ours = type("Ours", (Gate, strategies.FedAvg), {})
        path = CKPS / task["dataset"] / "server.ptl"
        about = {"dataset": task["dataset"], "wandb_run_id": curves.run.id}
        record = Record(model, path, about=about, on_saved=[curves.log_round])
        strategy = ours(model, record=record, **numbers)
        clients = Registry(num_clients, task)
        absences = Absences(map(str, range(num_clients)), curves.watch)
        run = Run(clients, strategy, curves, None, None)
        parts["server"] = server.Server(run, num_clients, None, Target(), absences)
    (parts["strategy"] if kind != "ours" else parts["server"].strategy).gate_before = memory_of("self", "VmRSS")
    start_server(server_address=f"127.0.0.1:{port}", config=ServerConfig(num_rounds=MANY), **parts)


class Echo(client.Client):
    """A client that says what plumbing/laptop/handshake asks for, and gives back the parameters that it gets."""

    def __init__(self, cid, task):
        who = {"cid": cid, "device_id": f"{cid:032x}", "num_fit": 4000, "num_eval": 1000}
        super().__init__(Task(build_net(*NET)), properties={**task, **who, "dataset_id": ""})
        self.trial = {"trial": self.properties.pop("trial").tobytes()}

    def get_properties(self, config):
        return {**self.properties, **(self.trial if "net" in config else {})}

    def fit(self, parameters, config):
        return parameters, 4000, {"fit_loss": 1.0, "fit_accuracy": 0.5, "eval_loss": 1.0, "eval_accuracy": 0.5}

    def evaluate(self, parameters, config):
        return 1.0, 1000, {"global_eval_loss": 1.0, "global_eval_accuracy": 0.5}


def serve_plain(flower_client, port):
    """Answer Flower's server until the connection ends, as its start_client does, but in any thread."""
    import grpc
    from flwr.common import serde
    from flwr.proto.transport_pb2 import ClientMessage
    from flwr.proto.transport_pb2_grpc import FlowerServiceStub

    answers = queue.SimpleQueue()
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        for message in FlowerServiceStub(channel).Join(iter(answers.get, None)):
            name = message.WhichOneof("msg")[: -len("_ins")]
            ins = getattr(serde, f"{name}_ins_from_proto")(getattr(message, f"{name}_ins"))
            res = getattr(serde, f"{name}_res_to_proto")(getattr(flower_client, name)(ins))
            answers.put(ClientMessage(**{f"{name}_res": res}))


def be_clients(kind, first_cid, num_clients, port):
    task = make_task()

    def stay(cid):
        echo = Echo(cid, task)
        connection = Connection(echo, "127.0.0.1", port)
        while True:
            with contextlib.suppress(Exception):  # the server is not up yet
                serve_plain(echo.to_client(), port) if kind == "plain" else connection.serve()
            time.sleep(0.2)

    for cid in range(first_cid, first_cid + num_clients):
        threading.Thread(target=stay, args=(cid,), daemon=True).start()
    sys.stdin.read()  # to its end, which is that of bench.py
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet_flower()
    if sys.argv[1] == "server":
        serve(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        be_clients(sys.argv[2], *map(int, sys.argv[3:]))
