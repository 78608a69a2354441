"""Who may take part in the training, and why not: the same for the scripts and for Flower's engines."""

from plumbing import VERSION
from plumbing.common.compare import same_trial
from plumbing.common.frames import FIRST, FRAMES, OtherVersion, describe_versions
from plumbing.common.process import printable
from plumbing.common.proof import is_same, new_nonce, prove_client, prove_server
from plumbing.laptop.stream import PATIENCE

import numpy as np

READY_TIMEOUT = 120  # seconds for a client to build the net, and to read its shard again if it has to


class TurnedAway(Exception):
    """A client may not take part. The text says why, to it and to the user; `cid` is what it called itself."""

    def __init__(self, reason, cid="unknown"):
        super().__init__(reason)
        self.cid = cid


def meet(stream, num_clients: int, task: dict, secret: bytes | None = None) -> dict:
    """Ask a stranger who it is, within PATIENCE seconds. Return what it says of itself, {name: value}.

    task: see check_client. secret: the device first has to prove that it knows it, and learns nothing before.
    Raises TurnedAway, Gone or Malformed.
    """
    nonce = new_nonce()
    try:
        hello, _ = stream.ask("hello", {"version": VERSION, "frames": FRAMES, "nonce": nonce}, timeout=PATIENCE)
    except OtherVersion as other:
        raise TurnedAway(describe_versions(printable(other.version, 20), VERSION)) from None
    about, nonces = hello["about"], (nonce, hello["nonce"])
    cid = printable(about.get("cid", "unknown"), 20)
    if secret is not None:
        if "proof" not in hello:
            raise TurnedAway("the server asks for a secret: start the client with --secret_file", cid)
        if not is_same(hello["proof"], prove_client(secret, stream.channel, nonces, about)):
            raise TurnedAway("its secret is not the server's, or its --root_certificate", cid)
        stream.proof = {"proof": prove_server(secret, stream.channel, nonces)}
    check(why_not_client(about, num_clients, task["dataset"]), about)
    return about


def make_ready(stream, about: dict, task: dict, ticket: str) -> dict:
    """Have a device that was met build its net. Return all that it says of itself. Raises as `meet` does."""
    question = {**stream.proof, "ticket": ticket, **name_task(task["net"], task["dataset_id"])}
    ready, arrays = stream.ask("task", question, (), FIRST + task["trial"].nbytes, READY_TIMEOUT)
    client = {**ready["about"], **about, "trial": b"".join(arrays)}
    check(why_not_ready(client, about["cid"], task), client)
    return client


def check_client(client: dict, num_clients: int, task: dict) -> None:
    """Raise TurnedAway if a client that has said all of itself at once may not take part.

    task: what the client must have like the server: dataset, channels, num_classes, net, fingerprint, trial,
        dataset_id (None: any), and sizes, {cid: (num_fit, num_eval)} or None.
    """
    check(why_not_client(client, num_clients, task["dataset"]), client)
    check(why_not_ready(client, client["cid"], task), client)


def check(reason, client):
    """Raise TurnedAway if there is a reason; name both versions if they differ."""
    if reason is not None:
        version = printable(client.get("version", "of no version"), 20)
        if "cid" in client and version != VERSION:
            reason += f" ({describe_versions(version, VERSION)})"
        raise TurnedAway(reason, printable(client.get("cid", "unknown"), 20))


def name_task(net, dataset_id):
    """Return what a client is told of its task: the net, and the split of the data if it has an id."""
    return {"net": net} if dataset_id is None else {"net": net, "dataset_id": dataset_id}


def why_not_client(client, num_clients, dataset):
    """Return the reason not to admit a client for who it is (device/connection.WHO), or None."""
    cid = client.get("cid")
    if type(cid) is not int or not isinstance(client.get("device_id"), str):
        return "it is not this suite's client.py, or one of another version"
    if not 0 <= cid < num_clients:
        return f"cid {cid} is not in 0..{num_clients - 1} (server's --num_clients {num_clients})"
    if client.get("dataset") != dataset:
        return f"its dataset is {printable(client.get('dataset'), 40)}, the server's is {dataset}"
    return None


def why_not_ready(ready, cid, task):
    """Return the reason not to admit a client for its data, its net, or what else it says of itself, or None."""
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
