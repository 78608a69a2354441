"""The suite's client.py, whose training waits for an order of the test and then does what it says.

    python tests/ordered_client.py SUITE [--max_delay S] [--keepalive S] [--ckps DIR]
        [arguments of client.py]

SUITE is the folder of a copy of the suite. The order for a cid and a round is the file SUITE/orders/<cid>_<round>
(helpers.play) with one of these words, or none: then the client trains as usual, as it does without an order once there
is the file SUITE/orders/free. A line before and after each training has a digest of the parameters.

    raise        training raises an error
    forget       one metric is not sent
    nan metric   one metric is not a number
    nan          some parameters are not numbers
    shape        one array has another shape
    zero         the number of images is 0
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
parser.add_argument("suite", type=Path)
parser.add_argument("--max_delay", type=int)
parser.add_argument("--keepalive", type=int)
parser.add_argument("--ckps", type=Path)
args, rest = parser.parse_known_args()
sys.path[0], sys.argv = str(args.suite), ["client.py", *rest]

from libs import np, run_script  # noqa: E402
from plumbing.common import frames  # noqa: E402 (of the suite that the path above names)
from plumbing.device import connection  # noqa: E402

import client  # noqa: E402

real_train, real_fit, order = client.client_fit_fn, client.Client.fit, ""
connection.MAX_DELAY = args.max_delay or connection.MAX_DELAY
client.CKPS = args.ckps or client.CKPS
if args.keepalive:
    frames.KEEPALIVE = frames.PING_TIMEOUT = args.keepalive


def digest(model):
    return hashlib.sha256(b"".join(array.tobytes() for array in client.get_arrays(model))).hexdigest()[:12]


def train(loaders, model, *args_of_fit, about, **kwargs):
    global order
    path = args.suite / "orders" / f"{about['args']['cid']}_{about['round']}"
    print(f"fit of round {about['round']} from {digest(model)}", flush=True)
    while not path.exists() and not path.with_name("free").exists():
        time.sleep(0.02)
    order = path.read_text() if path.exists() else ""
    path.unlink(missing_ok=True)
    if order == "raise":
        raise RuntimeError("the camera is unplugged")
    metrics = real_train(loaders, model, *args_of_fit, about=about, **kwargs)
    print(f"trained round {about['round']} to {digest(model)}", flush=True)
    if order == "forget":
        del metrics["eval_loss"]
    if order == "nan metric":
        metrics["fit_loss"] = float("nan")
    return metrics


def fit(self, parameters, config):
    arrays, num_examples, metrics = real_fit(self, parameters, config)
    if order == "nan":
        arrays[0][0] = np.nan
    if order == "shape":
        arrays[0] = arrays[0][:5]
    if order == "zero":
        num_examples = 0
    return arrays, num_examples, metrics


client.client_fit_fn, client.Client.fit = train, fit
run_script(client.main)
