"""Train on one shard, on one device, for the server.

    python client.py --server_address 192.168.1.10 --dataset CIFAR10 --cid 3

Reads the shard that partition.py wrote, waits for the server (--max_wait_time) and trains in each of its rounds. Sends
back parameters and metrics, never an image. Reconnects by itself; ends with exit code 0 when the server says that
training is over.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
import traceback
from pathlib import Path

from libs import CKPS, DATASETS, UserError, np, run_script, say, torch
from plumbing import VERSION
from plumbing.common.arguments import (
    find_folder,
    join_address,
    new_parser,
    nonempty_path,
    number,
    plain_args,
    read_secret,
    split_address,
)
from plumbing.common.process import on_signal, quiet_flower
from plumbing.common.state import get_arrays, set_arrays
from plumbing.device.connection import start_client  # Flower's is deprecated, and 1.43 takes it away (docs/flower.md)
from plumbing.device.machine import choose_device, describe_machine, device_id, lock_cid, sensors
from plumbing.device.own_batch_norm import OwnBatchNorm
from plumbing.device.pace import Paced
from plumbing.device.task import Task, count_images

from flwr.client import ClientApp, NumPyClient

from data import Steps, describe_in_checkpoint, load_shard
from engines import HYPER_PARAMETERS, client_fit_fn, run_epoch
from nets import NETS, build_net


def parse_args():
    parser = new_parser(__doc__)
    parser.add_argument("--server_address", default="127.0.0.1", help="name or IP address of the server")
    parser.add_argument("--server_port", type=number(int, 1, 65535), help="its port (default: 8080)")
    parser.add_argument("--cid", type=number(int, 0), required=True, help="which shard: clients/client_<cid>.csv")
    parser.add_argument("--device", default="auto", help="where to train: cpu, cuda, …; auto: CUDA if available")
    parser.add_argument("--num_threads", type=number(int, 1), help="CPU threads to train with (default: all)")
    parser.add_argument(
        "--max_wait_time", type=number(float, 0), default=600, help="seconds without a server until giving up; 0: never"
    )
    parser.add_argument(
        "--slowdown", type=number(float, 1, 1000), default=1, help="rehearse a board that is this many times slower"
    )
    parser.add_argument("--secret_file", type=nonempty_path, help="file with the secret that the server knows, too")
    parser.add_argument("--root_certificate", type=nonempty_path, help="the server's ca.pem; makes the connection TLS")
    parser.add_argument("--verbose", action="store_true", help="show Flower's log, too")
    args = parser.parse_args()
    args.server_address, args.server_port = split_address(args.server_address, args.server_port)
    return args


class Client(NumPyClient):
    """Flower's client for one shard: trains and evaluates the net of its task.

    task: the net and the shard (plumbing/device/task.py).
    device: a torch device.
    save_ckp_path: where the local model is saved after each fit, None for nowhere.
    properties: what the server is told of this device, {name: value}.
    secret: bytes, None if there is none.
    """

    def __init__(self, task, device="cpu", save_ckp_path=None, properties=None, secret=None):
        self.task, self.device, self.save_ckp_path = task, device, save_ckp_path
        self.properties, self.secret = properties or {}, secret
        self.own_batch_norm = OwnBatchNorm(save_ckp_path and Path(save_ckp_path).with_suffix(".bn"))
        self.answered = None  # when the last fit or evaluate was answered on this connection
        self.waited = 0.0  # seconds that this device waited since it last printed a round

    def get_properties(self, config):
        """Say who this is and, of the net that the server names, what it compares with its own."""
        if "net" in config:
            ready = self.task.make_ready(config["net"], config.get("dataset_id"), self.device)
            return {**self.properties, **ready}
        return self.properties

    def get_parameters(self, config):
        """Return copies of the local model's parameters and buffers: [array, …], in the order of its state dict."""
        return get_arrays(self.task.model)

    def set_parameters(self, parameters):
        """Put such a list into the local model. Raises ValueError if its length or shapes differ."""
        set_arrays(self.task.model, parameters)

    def fit(self, parameters, config):
        """Train the global model `parameters` on the fit images, with the hyper-parameters in `config`.

        Returns (parameters, number of fit images, metrics of engines.client_fit_fn and telemetry), or
        ([], 0, {"error": reason}).
        """
        try:
            # 1. The round, and how long this device has waited for it.
            started, telemetry, current = time.monotonic(), self.measure_wait(), config.get("round")
            self.task.follow(config, self.device)
            task = self.task

            # 2. The model to start from: the global one, with --fedbn under the device's own batch norm.
            self.set_parameters(parameters)
            runs = task.run_names(config)
            if runs and not self.own_batch_norm.put_into(task.model, runs) and current != 1:
                say("batch norm begins with the server's: this device has none of this run")

            # 3. Train, and measure the trained model on the eval images.
            hyper_parameters = {name: config[name] for name in HYPER_PARAMETERS if name in config}
            if "seed" in config:  # a different one in each round and on each device
                sequence = np.random.SeedSequence([config["seed"], current, self.properties["cid"]])
                hyper_parameters["seed"] = int(sequence.generate_state(1)[0])
            about = {**task.about, "round": current}
            loaders = pace_loaders(task, self.properties, config)
            metrics = client_fit_fn(
                loaders,
                task.model,
                device=self.device,
                save_ckp_path=self.save_ckp_path,
                about=about,
                **hyper_parameters,
            )
            if runs:
                self.own_batch_norm.keep(task.model, runs[0])

            # 4. Reply: parameters and figures, never an image.
            telemetry["fit_seconds"] = time.monotonic() - started
            figures = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("fit_loss", "eval_accuracy"))
            title = f"round {config.get('round', '?')}/{config.get('num_rounds', '?')}  waited {self.waited:.1f} s"
            say(f"{title}  {figures}  {telemetry['fit_seconds']:.1f} s")
            self.waited = 0.0
            telemetry.update(sensors(), **loaders["fit"].telemetry())
            return self.get_parameters({}), len(task.loaders["fit"].dataset), {**metrics, **telemetry}
        except Exception as error:
            traceback.print_exc()
            return [], 0, {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.answered = time.monotonic()

    def evaluate(self, parameters, config):
        """Measure the global model `parameters` on the eval images, with --fedbn under the device's own batch norm.

        Returns (loss, number of eval images, {"global_eval_loss", "global_eval_accuracy", and telemetry}), or
        (0.0, 0, {"error": reason}).
        """
        try:
            started, telemetry = time.monotonic(), self.measure_wait()
            self.task.follow(config, self.device)
            self.set_parameters(parameters)
            self.own_batch_norm.put_into(self.task.model, self.task.run_names(config))
            loaders = pace_loaders(self.task, self.properties, config)
            loss, accuracy = run_epoch(loaders["eval"], self.task.model, self.device)
            metrics = {"global_eval_loss": loss, "global_eval_accuracy": accuracy}
            telemetry["eval_seconds"] = time.monotonic() - started
            return loss, len(self.task.loaders["eval"].dataset), {**metrics, **telemetry}
        except Exception as error:
            traceback.print_exc()
            return 0.0, 0, {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.answered = time.monotonic()

    def measure_wait(self):
        """Return {"wait_seconds": since the last answer}: the time of the network and the others.

        {} before the first answer on a connection. Also adds it to `waited`.
        """
        if self.answered is None:
            return {}
        seconds = time.monotonic() - self.answered
        self.waited += seconds
        return {"wait_seconds": seconds}


def pace_loaders(task, properties, config):
    """Return the task's loaders, timed. `config` is that of a fit: with --time_budget it names the steps to train."""
    loaders, slowdown = dict(task.loaders), properties.get("slowdown", 1)
    if "num_steps" in config:
        order = config.get("seed", 0), properties["cid"]
        loaders["fit"] = Steps(loaders["fit"], config["first_step"], config["num_steps"], order)
    return {phase: Paced(loader, slowdown) for phase, loader in loaders.items()}


def describe_client(cid, dataset, device_id):
    """Return what the server is told of this client, besides its machine (plumbing/laptop/handshake.py)."""
    return {"cid": cid, "dataset": dataset, "device_id": device_id, "version": VERSION}


def main():
    args = parse_args()
    if not args.verbose:
        quiet_flower()
    try:
        ssl.create_default_context(cafile=args.root_certificate)
    except OSError as error:
        raise UserError(f"no certificate can be read from {args.root_certificate}: {error.strerror or error}") from None
    secret = read_secret(args.secret_file)
    device = choose_device(args.device)
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)

    def load(image_size=(32, 32)):
        loaders, info = load_shard(DATASETS / args.dataset, args.cid, device, image_size)
        return loaders, describe_in_checkpoint(info)

    loaders, data = load()
    folder = CKPS / args.dataset
    lock = lock_cid(args.cid, folder)  # noqa: F841 (held until the process ends)
    about = {"dataset": args.dataset, "args": plain_args(args), **data}
    task = Task(None, loaders, about, load, NETS, build_net)  # the server names the net
    machine = describe_machine()
    who = describe_client(args.cid, args.dataset, device_id(folder / f"client_{args.cid}.id"))
    slowdown = {"slowdown": args.slowdown} if args.slowdown > 1 else {}
    client = Client(task, device, folder / f"client_{args.cid}.ptl", {**who, **machine, **slowdown}, secret)
    say(f"client {args.cid} of {args.dataset}: {count_images(loaders)} images on {device}")
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    free = f", {machine['free_mb']} MB free" if "free_mb" in machine else ""
    say("on {board}: {0}, torch {torch}, flwr {flwr}, Python {python}{1}".format(threads, free, **machine))
    on_signal(lambda signum: os._exit(128 + signum))  # there is nothing to finish first
    return start_client(
        server_address=join_address(args.server_address, args.server_port),
        client=client,
        root_certificates=args.root_certificate and str(args.root_certificate),
        max_wait_time=args.max_wait_time,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The same client as a Flower App, for Flower's engines: the simulation and the deployment.

SHARDS = {}  # what this process has read: {(folder, cid): (loaders, what is known of the data)}


def client_fn(context):
    """Return the client for one message to a SuperNode, whose node config has its cid and the suite's folder.

    In a simulation the cid is the SuperNode's number, and the folder is the server's.
    """
    simulated = "partition-id" in context.node_config
    config = {**context.node_config, **context.run_config} if simulated else context.node_config
    cid, root = config.get("partition-id" if simulated else "cid"), find_folder(config)
    if type(cid) is not int or cid < 0:
        raise UserError(f"cid is {cid!r} in the SuperNode's --node-config, not the number of a shard")
    dataset, device = context.run_config["dataset"], choose_device("auto")
    folder, ckps = root / "datasets" / dataset, root / "ckps" / dataset

    def load(image_size):
        loaders, info = load_shard(folder, cid, device, image_size)
        SHARDS[folder, cid] = loaders, describe_in_checkpoint(info)
        return SHARDS[folder, cid]

    with contextlib.suppress(OSError):  # a full card: training continues without
        ckps.mkdir(parents=True, exist_ok=True)
    loaders, data = SHARDS.get((folder, cid), (None, {}))
    task = Task(None, loaders, {"dataset": dataset, "args": dict(config), **data}, load, NETS, build_net)
    id_ = f"simulated {cid}" if simulated else device_id(ckps / f"client_{cid}.id")
    machine = {"board": "simulated"} if simulated else describe_machine()
    client = Client(task, device, ckps / f"client_{cid}.ptl", {**describe_client(cid, dataset, id_), **machine})
    if simulated:
        client.save_ckp_path = None  # of its files only the batch norm of --fedbn is needed again
    return client.to_client()


app = ClientApp(client_fn)


if __name__ == "__main__":
    run_script(main)
