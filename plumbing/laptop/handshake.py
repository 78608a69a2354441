"""Who may take part in the training, and why not: the same for the scripts and for Flower's engines."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable

from plumbing import UNNAMED, VERSION
from plumbing.common.compare import prove, same_trial
from plumbing.common.process import printable

import numpy as np


class TurnedAway(Exception):
    """A client may not take part. The text says why, to it and to the user; `cid` is what it called itself."""

    def __init__(self, reason, cid="unknown"):
        super().__init__(reason)
        self.cid = cid


def handshake(
    ask: Callable[[dict], dict], num_clients: int, task: dict, secret: bytes | None = None, unknown: str = "unknown"
) -> dict:
    """Return what a client says of itself, {name: value}; raise TurnedAway if it may not take part.

    ask: puts a question to the client, {name: value}, and returns its answer.
    task: what the client must have like the server: dataset, channels, num_classes, net, fingerprint, trial,
        dataset_id (None: any), and sizes, {cid: (num_fit, num_eval)} or None.
    secret: the client first has to prove that it knows it, and learns nothing before.
    unknown: what a client without a cid is called.
    """
    nonce, ready = secrets.token_hex(16), {}
    client = ask({"nonce": nonce, "version": VERSION})
    cid = client.get("cid")
    reason = why_not_client(client, nonce, num_clients, task["dataset"], secret)
    if reason is None:
        ready = ask(name_task(task["net"], task["dataset_id"]))
        reason = why_not_ready(ready, cid, task)
    if reason is not None:
        version = printable(client.get("version", UNNAMED), 20)
        if cid is not None and version != VERSION:
            reason += f" (it runs FL-IoT {version}, the server {VERSION}: update the older one)"
        raise TurnedAway(reason, unknown if cid is None else printable(cid, 20))
    return {**client, **ready}


def name_task(net, dataset_id):
    """Return what a client is told of its task: the net, and the split of the data if it has an id."""
    return {"net": net} if dataset_id is None else {"net": net, "dataset_id": dataset_id}


def why_not_client(client, nonce, num_clients, dataset, secret):
    """Return the reason not to admit a client for what it says of itself, or None."""
    cid = client.get("cid")
    if secret is not None:
        proof = client.get("proof")
        if proof is None:
            return "the server asks for a secret: start the client with --secret_file"
        if not hmac.compare_digest(str(proof).encode(), prove(secret, nonce, cid).encode()):
            return "its secret is not the server's"
    if type(cid) is not int or not all(isinstance(client.get(name), str) for name in ("device_id", "process")):
        return "it is not this suite's client.py, or one of another version"
    if not 0 <= cid < num_clients:
        return f"cid {cid} is not in 0..{num_clients - 1} (server's --num_clients {num_clients})"
    if client.get("dataset") != dataset:
        return f"its dataset is {printable(client.get('dataset'), 40)}, the server's is {dataset}"
    return None


def why_not_ready(ready, cid, task):
    """Return the reason not to admit a client for the data and the net that it has made ready, or None."""
    shown = {name: printable(value, 40) for name, value in ready.items()}
    if "error" in ready and "channels" not in ready:  # it could not read its shard
        return printable(ready["error"])
    for name, what in (("num_classes", "classes"), ("channels", "colour channels")):
        if ready.get(name) != task[name]:
            return f"its dataset has {shown.get(name)} {what}, the server's has {task[name]}"
    if task["dataset_id"] not in (None, ready.get("dataset_id")):
        return (
            f"its shard is not of the server's split of {task['dataset']}: partition.py has run since; "
            f"copy the newest bundles/client_{cid}.tar to the device"
        )
    if "error" in ready:
        return printable(ready["error"])
    if ready.get("fingerprint") != task["fingerprint"]:
        return f"its fingerprint is {shown.get('fingerprint')}, the server's is {task['fingerprint']}: nets.py differs"
    outputs = ready.get("trial")
    whole = isinstance(outputs, bytes) and len(outputs) % 4 == 0
    if not whole or not same_trial(np.frombuffer(outputs, "<f4"), task["trial"]):
        return f"its {task['net']} computes something else than the server's: nets.py differs"
    for name in ("num_fit", "num_eval"):
        if type(ready.get(name)) is not int or ready[name] < 1:
            return f"its {name} is {shown.get(name)}, not a positive number of images"
    sizes, expected = (ready["num_fit"], ready["num_eval"]), (task.get("sizes") or {}).get(cid)
    if expected not in (None, sizes):
        return (
            f"it has {sizes[0]} fit + {sizes[1]} eval images, but its shard has {expected[0]} + {expected[1]} in the "
            "server's dataset.json"
        )
    return None
