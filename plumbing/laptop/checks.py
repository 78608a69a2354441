"""What cannot be averaged: which of the clients' results are dropped, and why."""

import dataclasses
import io
import math
import statistics
from collections.abc import Mapping

from plumbing.common.process import printable, say
from plumbing.common.state import batch_norm_names, float32_weights, get_arrays
from plumbing.laptop.history import EVALUATE_METRICS, FIT_METRICS, TELEMETRY, cid_order

import numpy as np
from flwr.common import EvaluateRes, FitRes, ndarrays_to_parameters

FAR = 100  # times the change that the other clients made is far outside


class Rejected(Exception):
    """A result that is not averaged, with the reason."""


def is_number(value):
    """Return whether `value` is a finite number: an int or float, but no bool, and none too large for a float."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_metrics(metrics: dict, names: tuple[str, ...]) -> dict[str, float]:
    """Return the numbers under `names`, and the telemetry that can be true, as floats.

    Raises Rejected if the device reports an error, a number is missing or not finite, a loss is negative, or an
    accuracy is not in 0..1.
    """
    if not isinstance(metrics, Mapping):
        raise Rejected(f"its metrics are {printable(metrics)}, not a dictionary")
    if "error" in metrics:
        raise Rejected(printable(metrics["error"]))
    for name in names:
        value, most = metrics.get(name), 1 if name.endswith("accuracy") else math.inf
        if not is_number(value):
            raise Rejected(f"metric {name} is {printable(value)}, not a finite number")
        if not 0 <= value <= most:
            raise Rejected(f"metric {name} is {printable(value)}, not in 0..{most}")
    telemetry = [name for name in TELEMETRY if name in metrics and is_possible(name, metrics[name])]
    return {name: float(metrics[name]) for name in (*names, *telemetry)}


def is_possible(name, value):
    low, high = TELEMETRY[name]
    return is_number(value) and low <= value <= high


def size_of(client, name):
    """Return num_fit or num_eval as the client sent it when it joined; None under a server that does not ask."""
    return (getattr(client, "properties", None) or {}).get(name)


def check_examples(num_examples, joined_with):
    """Raise Rejected unless this is a positive integer, and what the client `joined_with` if that is known."""
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or not 1 <= num_examples < 2**63:
        raise Rejected(f"number of examples is {printable(num_examples)}, not a positive integer")
    if joined_with not in (None, num_examples):
        raise Rejected(f"number of examples is {num_examples}, and it joined with {joined_with}")


def check_array(data: bytes, name: str, like: np.ndarray, header: bytes) -> np.ndarray:
    """Return the array in `data`, an .npy. Raises Rejected, with the `name`, if it is unlike `like`, or not finite.

    Data with the expected `header` is not copied; any other is parsed, without pickle, to say what is wrong with it.
    """
    try:
        if data.startswith(header) and len(data) == len(header) + like.nbytes:
            array = np.frombuffer(data, like.dtype, offset=len(header)).reshape(like.shape)
        else:
            array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        raise Rejected(f"array {name} cannot be read: {printable(error)}") from None
    if array.shape != like.shape or array.dtype != like.dtype:
        raise Rejected(f"array {name} is {array.dtype} {array.shape}, not {like.dtype} {like.shape}")
    if array.dtype.kind in "fc" and not np.isfinite(array).all():
        raise Rejected(f"array {name} has values that are not finite")
    if name.endswith("running_var") and (array < 0).any():
        raise Rejected(f"array {name} has negative variances")
    return array


def largest(array):
    """Return the largest absolute value in an array, as a float; 0.0 if it is empty."""
    return float(np.abs(array.astype(np.float64, copy=False)).max(initial=0))


def reaches(sent: list[np.ndarray], weights: list[bool], steps: int, lr: float | None) -> list[float]:
    """Return how much an honest client can change a value of each array in a round.

    `sent` is the model that all train from, `weights` says which of its arrays are trained, `steps` is the number of
    steps of the largest shard, `lr` the learning rate.

    A step of Adam moves a weight by less than 10 times the learning rate, whatever the images are: with its betas,
    |mean| / sqrt(square) is at most 7.3 (by Cauchy and Schwarz). --compress rounds by less than a hundredth of the
    largest weight. The other floats belong to batch norm: means grow with the weights and variances with their squares,
    and 1000 times that is allowed. Integers count batches. Without a learning rate a weight may move by 1000.
    """
    reach, batches = 1000.0, math.inf
    if lr is not None:
        most_weight = max((largest(array) for array, weight in zip(sent, weights) if weight), default=0.0)
        reach, batches = 10 * lr * steps + most_weight / 100, 1000.0 * steps
    floats = [array.dtype.kind == "f" for array in sent]
    norms = [largest(array) for array, weight, is_float in zip(sent, weights, floats) if is_float and not weight]
    norm = 1000 * max([1.0, *norms]) * max(1, reach) * max(1, reach)  # ** 2 would raise OverflowError
    return [reach if weight else norm if is_float else batches for weight, is_float in zip(weights, floats)]


class Checks:
    """Drop the results that cannot be averaged, and count them.

    model: the net that is trained.
    batch_size: of a device's training, by which its steps are counted.
    least: the number of results that can be aggregated.
    on_drop: called as on_drop(round, cid, reason) for each result that is dropped.

    `reasons` is why clients failed in the last `fit`, {cid: text}; `failures` is for the caller to set back to 0.
    """

    def __init__(self, model, batch_size, least=1, on_drop=None):
        self.batch_size, self.least, self.on_drop = batch_size, least, on_drop or (lambda *drop: None)
        arrays = get_arrays(model)
        files = zip(ndarrays_to_parameters(arrays).tensors, arrays)
        headers = [data[: len(data) - array.nbytes] for data, array in files]
        self.expected = list(zip(model.state_dict(), arrays, headers))
        self.weights, self.norms = float32_weights(model), set(batch_norm_names(model))
        self.odd = set()  # (cid, name) of the odd telemetry that was reported
        self.reasons, self.failures = {}, 0

    def fit(self, server_round, results, failures, sent, config):
        """Return the results to average, by cid: [(client, FitRes with a list of arrays and known metrics), …].

        [] if they are fewer than `least`. `sent` is the model that all trained from, [array, …], and `config` what came
        with it.
        """
        self.reasons = {}
        kept = self._keep(server_round, results, failures, self.check_fit)
        outliers = self._outliers(kept, sent, config)
        for index, reason in outliers.items():
            self._drop(server_round, kept[index][0].cid, reason)
        kept = [result for index, result in enumerate(kept) if index not in outliers]
        if len(kept) >= self.least:
            return kept
        for client, _ in kept:  # they are good, so they have no reason
            self._report(server_round, client.cid, f"{len(kept)} results are too few, {self.least} are needed")
        return []

    def evaluate(self, server_round, results, failures):
        """Return the results to average, by cid: [(client, EvaluateRes with known metrics), …]."""
        return self._keep(server_round, results, failures, self.check_evaluate)

    def check_fit(self, client, res: FitRes) -> FitRes:
        """Return `res` with its arrays read and its known metrics alone. Raises Rejected."""
        metrics = check_metrics(res.metrics, FIT_METRICS)
        check_examples(res.num_examples, size_of(client, "num_fit"))
        return dataclasses.replace(res, parameters=self.check_arrays(res.parameters.tensors), metrics=metrics)

    def check_evaluate(self, client, res: EvaluateRes) -> EvaluateRes:
        """Return `res` with its known metrics alone. Raises Rejected."""
        metrics = check_metrics(res.metrics, EVALUATE_METRICS)
        check_metrics({"loss": res.loss}, ("loss",))
        check_examples(res.num_examples, size_of(client, "num_eval"))
        return dataclasses.replace(res, metrics=metrics)

    def check_arrays(self, tensors: list[bytes]) -> list[np.ndarray]:
        """Return the arrays in `tensors`, a list of .npy bytes. Raises Rejected if they are unlike the net's."""
        if len(tensors) != len(self.expected):
            raise Rejected(f"{len(tensors)} arrays, not {len(self.expected)}")
        return [check_array(data, *expected) for data, expected in zip(tensors, self.expected)]

    def _keep(self, server_round, results, failures, check):
        for failure in failures:
            if isinstance(failure, tuple):  # Flower's form for an answer with a status that is not OK
                client, res = failure
                self._drop(server_round, client.cid, printable(res.status.message))
            else:
                self._drop(server_round, getattr(failure, "cid", None), failure)
        kept = []
        for client, res in sorted(results, key=client_order):
            try:
                kept.append((client, check(client, res)))
            except Rejected as reason:
                self._drop(server_round, client.cid, reason)
                continue
            for name, (low, high) in TELEMETRY.items():
                value = res.metrics.get(name, low)
                if not is_possible(name, value) and (client.cid, name) not in self.odd:
                    self.odd.add((client.cid, name))
                    say(f"cid {client.cid}: its {name} is left out: {printable(value)} is not in {low:g}..{high:g}")
        return kept

    def _outliers(self, kept, sent, config):
        """Return {index in `kept`: reason} of the results with an array far outside what this round can do.

        That is a change of more than its reach, and than FAR times the others' median. Of an even number of others the
        lower middle counts: of three clients, one liar does not cover another.
        """
        private = self.norms if config.get("fedbn") else ()  # stays on the device, and may be far from the mean
        names = [name for name, _, _ in self.expected]
        weights = [weight and name not in private for name, weight in zip(names, self.weights)]
        most_images = max((res.num_examples for _, res in kept), default=1)
        steps = config.get("num_epochs", 1) * math.ceil(most_images / self.batch_size)
        pairs = [zip(res.parameters, sent) for _, res in kept]
        changes = [[largest(np.subtract(now, before, dtype=np.float64)) for now, before in pair] for pair in pairs]
        bounds, outliers = reaches(sent, weights, steps, config.get("lr")), {}
        for index, own in enumerate(changes):
            for place, (name, change, bound) in enumerate(zip(names, own, bounds)):
                if change <= bound:
                    continue
                others = [changed[place] for changed in changes[:index] + changes[index + 1 :]]
                bound = max(bound, FAR * statistics.median_low(others or [0]))
                if change > bound:
                    text = "array {} has changed by {:.2g}, far outside the {:.2g} of this round"
                    outliers[index] = text.format(name, change, bound)
                    break
        return outliers

    def _drop(self, server_round, cid, reason):
        self.reasons[cid] = str(reason)
        self._report(server_round, cid, reason)

    def _report(self, server_round, cid, reason):
        self.failures += 1
        self.on_drop(server_round, cid, reason)


def client_order(result):
    """Sort key for results and instructions, which are pairs that begin with a client."""
    return cid_order(str(result[0].cid))
