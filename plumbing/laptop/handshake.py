"""Who may take part in the training, and why not."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Generator

from plumbing import UNNAMED, VERSION
from plumbing.common.compare import prove, same_trial
from plumbing.common.process import printable

import numpy as np


class TurnedAway(Exception):
    """A client that may not take part: the text says why, to it and to the user; `cid` is what it called itself."""

    def __init__(self, reason, cid="unknown"):
        super().__init__(reason)
        self.cid = cid


def handshake(num_clients: int, task: dict, secret: bytes | None = None) -> Generator[dict, dict, dict]:
    """Decide on a client, without knowing how it is reached.

    A generator that yields questions, each a dictionary, is sent the answers, and returns what the client said of
    itself; it raises TurnedAway with the reason. `task` is what the client must have like the server: dataset,
    channels, num_classes, dataset_id (None: any), net, fingerprint, trial, and sizes (those of
    data.describe_dataset; None: any). With a `secret` (bytes) it must first prove that it knows it, and learns nothing
    before.
    """
    nonce, ready = secrets.token_hex(16), {}
    client = yield {"nonce": nonce, "version": VERSION}
    cid = client.get("cid")
    reason = why_not_client(client, nonce, num_clients, task["dataset"], secret)
    if reason is None:
        ready = yield question_of(task["net"], task["dataset_id"])
        reason = why_not_ready(ready, cid, task)
    if reason is not None:
        version = printable(client.get("version", UNNAMED), 20)
        if cid is not None and version != VERSION:
            reason += f" (it runs FL-IoT {version}, the server {VERSION}: update the older one)"
        raise TurnedAway(reason, printable("unknown" if cid is None else cid, 20))
    return {**client, **ready}


def question_of(net, dataset_id):
    """What a client is told of its task, to make ready for it: the net, and the cut of the data where it has an id."""
    return {"net": net} if dataset_id is None else {"net": net, "dataset_id": dataset_id}


def why_not_client(client, nonce, num_clients, dataset, secret):
    """The reason not to admit a client for what it says of itself, or None."""
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
    """The reason not to admit a client for the data and the net that it has made ready, or None."""
    shown = {name: printable(value, 40) for name, value in ready.items()}
    for name, what in (("num_classes", "classes"), ("channels", "colour channels")):
        if ready.get(name) != task[name]:
            return f"its dataset has {shown.get(name)} {what}, the server's has {task[name]}"
    if task["dataset_id"] not in (None, ready.get("dataset_id")):
        return (
            f"its shard is not of the server's cut of {task['dataset']}: partition.py has run in the meantime; "
            f"bring the device the newest bundles/client_{cid}.tar"
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
    told, due = (ready["num_fit"], ready["num_eval"]), (task.get("sizes") or {}).get(cid)
    if due not in (None, told):
        return f"it has {told[0]} fit + {told[1]} eval images, and by dataset.json its shard has {due[0]} + {due[1]}"
    return None
