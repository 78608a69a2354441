"""What the server makes of its devices' results: checks, a mean, and other strategies behind the same checks.

Checked is what they share: it drops what cannot be averaged, has the next class aggregate the rest, and hands every
finished round to the record (record.py). server.py runs them with its own loop; they also run under Flower's `Server`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import math
import secrets
import time
from collections.abc import Mapping

from libs import np, printable
from plumbing.common.state import get_arrays

from flwr.common import EvaluateRes, FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import strategy

from record import EVALUATE_METRICS, FIT_METRICS, TELEMETRY, Record, cid_order

INTEGER_SCALE = 2.0**-200  # a power of two, so that nothing is rounded
RECORD_OPTIONS = ("last_round", "test_loaders", "about", "on_row", "log")


def is_number(value):
    """Whether `value` is a finite number: an int or float, but no bool, and none that a float cannot hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def metrics_aggregation_fn(results: list[tuple[int, dict]]) -> dict[str, float]:
    """The means of metrics, weighted by examples.

    `results` is [(num_examples, {name: value}), …]; returns {name: float} for the names under which all of them have a
    finite number, {} for an empty list. Numbers of examples must be positive.
    """
    if not results:
        return {}
    total = sum(num_examples for num_examples, _ in results)
    names = [name for name in results[0][1] if all(is_number(metrics.get(name)) for _, metrics in results)]
    return {name: math.fsum(n / total * metrics[name] for n, metrics in results) for name in names}


def average(updates: list[tuple[int, list[np.ndarray]]]) -> list[np.ndarray]:
    """The mean of lists of arrays, weighted by examples (McMahan et al. 2017, arXiv 1602.05629).

    `updates` is [(num_examples, [array, …]), …], all of the same shapes and dtypes, which the mean keeps. It is
    summed in float64; integers (num_batches_tracked) are rounded and stay within what was sent.
    """
    total = sum(num_examples for num_examples, _ in updates)
    means = []
    for arrays in zip(*(arrays for _, arrays in updates)):
        mean = np.zeros(arrays[0].shape, np.result_type(arrays[0], np.float64))  # complex128 where they are complex
        for (num_examples, _), array in zip(updates, arrays):
            mean += array * np.float64(num_examples / total)
        means.append(as_sent(mean, arrays))
    return means


def as_sent(mean, arrays):
    """`mean`, a float64 array of something between the `arrays`, in their dtype; integers are rounded."""
    dtype = arrays[0].dtype
    if dtype.kind in "fc":
        return mean.astype(dtype)
    low, high = np.minimum.reduce(arrays), np.maximum.reduce(arrays)
    with np.errstate(invalid="ignore"):  # 2**63 - 1 rounds up in float64, and comes back by the clip
        return np.clip(np.rint(mean).astype(dtype), low, high)


class Rejected(Exception):
    """A result that is not averaged, with the reason."""


def check_metrics(metrics: dict, names: tuple[str, ...]) -> dict[str, float]:
    """The finite numbers under `names`, as floats. Raises Rejected where one is missing, or an error stands there.

    Of the names in TELEMETRY it takes those that are there. Whatever else a device sends is left out: nothing is known
    of it.
    """
    if not isinstance(metrics, Mapping):
        raise Rejected(f"its metrics are {printable(metrics)}, not a dictionary")
    if "error" in metrics:
        raise Rejected(printable(metrics["error"]))
    for name in names:
        if not is_number(metrics.get(name)):
            raise Rejected(f"metric {name} is {printable(metrics.get(name))}, not a finite number")
    told = [name for name in TELEMETRY if is_number(metrics.get(name))]
    return {name: float(metrics[name]) for name in (*names, *told)}


def check_examples(num_examples):
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or not 1 <= num_examples < 2**63:
        raise Rejected(f"number of examples is {printable(num_examples)}, not a positive integer")


def check_arrays(tensors: list[bytes], expected) -> list[np.ndarray]:
    """The arrays in `tensors`, a list of .npy bytes, if they are like `expected`, and finite.

    `expected` is [(name, array, the bytes before its values in an .npy file), …]. Arrays with those bytes, which all
    devices send, are not copied; any others are parsed, without pickle, to say what is wrong with them.
    """
    if len(tensors) != len(expected):
        raise Rejected(f"{len(tensors)} arrays, not {len(expected)}")
    arrays = []
    for data, (name, like, header) in zip(tensors, expected):
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
        arrays.append(array)
    return arrays


def check_fit(res: FitRes, expected) -> FitRes:
    """The FitRes `res` with its arrays read and its known metrics alone. Raises Rejected."""
    metrics = check_metrics(res.metrics, FIT_METRICS)
    check_examples(res.num_examples)
    return dataclasses.replace(res, parameters=Arrays(check_arrays(res.parameters.tensors, expected)), metrics=metrics)


def check_evaluate(res: EvaluateRes) -> EvaluateRes:
    """The EvaluateRes `res` with its known metrics alone. Raises Rejected."""
    metrics = check_metrics(res.metrics, EVALUATE_METRICS)
    check_metrics({"loss": res.loss}, ("loss",))
    check_examples(res.num_examples)
    return dataclasses.replace(res, metrics=metrics)


def add_figures(figures, metrics):
    """Put what a client told with its evaluate to what it told with its fit; the times that it waited add up."""
    waited = figures.get("wait_seconds", 0.0)
    figures.update(metrics)
    if "wait_seconds" in metrics:
        figures["wait_seconds"] += waited


def by_cid(result):
    """Sorts results and instructions, pairs that begin with a client, by its cid."""
    return cid_order(str(result[0].cid))


class Arrays(Parameters):
    """Parameters as the list `arrays`. Flower's strategies read `tensors`, which are made of them when asked for.

    Those are float64, in which a mean of two large values does not overflow. Integers, which count batches
    (num_batches_tracked), are scaled down to nothing: in Krum's distances they would drown what was learned.
    """

    def __init__(self, arrays):
        self.arrays, self.tensor_type = arrays, "numpy.ndarray"

    @property
    def tensors(self):
        scales = [1.0 if array.dtype.kind == "f" else INTEGER_SCALE for array in self.arrays]
        return ndarrays_to_parameters([array * np.float64(s) for array, s in zip(self.arrays, scales)]).tensors

    @classmethod
    def of_flower(cls, parameters, sent):
        """What a strategy made of `sent`, [Arrays, …], in the dtypes that were sent."""
        made = []
        for array, *arrays in zip(parameters_to_ndarrays(parameters), *(one.arrays for one in sent)):
            made.append(as_sent(array if arrays[0].dtype.kind == "f" else array / INTEGER_SCALE, arrays))
        return cls(made)


class Checked:
    """Stands before one of Flower's strategies: drops what cannot be averaged, and hands each round to its record.

    initial_model: the net that training starts from; round 1's devices get its parameters.
    save_ckp_path: where the newest global model goes; the rest of the record goes beside it (record.Record).
    on_drop: called with (round, cid, reason) for each result that is dropped.
    record: a record.Record to take; without one it makes its own from RECORD_OPTIONS.
    num_fit: how many of the clients train in a round, drawn anew each time; None: all. The others still evaluate.
    seed: makes the draw the same for the same round, whoever else is there and from whichever round on.

    The results go on to the strategy by cid, with their known metrics alone. `reasons` has why clients failed in the
    last aggregate_fit, {cid: text}. `close` waits until all rounds are recorded, and raises what failed there, as
    `check` does.
    """

    least = 1  # results that the strategy needs

    def __init__(
        self, initial_model, save_ckp_path=None, *args, on_drop=None, record=None, num_fit=None, seed=None, **kwargs
    ):
        options = {name: kwargs.pop(name) for name in RECORD_OPTIONS if name in kwargs}
        arrays = get_arrays(initial_model)
        initial = ndarrays_to_parameters(arrays)
        self.given = set(kwargs)
        kwargs.setdefault("initial_parameters", initial)
        kwargs.setdefault("fit_metrics_aggregation_fn", metrics_aggregation_fn)
        kwargs.setdefault("evaluate_metrics_aggregation_fn", metrics_aggregation_fn)
        super().__init__(*args, **kwargs)
        self.model, self.on_drop = initial_model, on_drop
        self.num_fit, self.seed = num_fit, secrets.token_hex(8) if seed is None else seed
        self.tries = collections.Counter()  # of each round: one in which nobody trained is run again, with others
        self.record = record or Record(initial_model, save_ckp_path, **options)
        self.save_ckp_path = self.record.path
        headers = [data[: len(data) - array.nbytes] for data, array in zip(initial.tensors, arrays)]
        self.expected = list(zip(initial_model.state_dict(), arrays, headers))
        self.reasons = {}
        self.failures = 0  # since the last finished round
        self.started = None  # when the round under way was
        self.row = None  # of the round under way, once somebody trained in it
        self.arrays, self.clients = None, {}  # and what belongs to it

    def check(self):
        """Raise what went wrong with the record, if anything did."""
        self.record.check()

    def close(self):
        """Hand over the round that is under way, if somebody trained in it, and wait for the record."""
        self._finish_row()
        self.record.close()

    def adapt(self, num_results):
        """Set what depends on the number of results to aggregate."""

    def configure_fit(self, server_round, parameters, client_manager):
        self.started = time.monotonic()
        instructions = super().configure_fit(server_round, parameters, client_manager)
        self.tries[server_round] += 1

        def lot(instruction):
            text = f"{self.seed} {server_round} {self.tries[server_round]} {instruction[0].cid}"
            return hashlib.blake2b(text.encode()).digest()

        return sorted(sorted(instructions, key=lot)[: self.num_fit], key=by_cid)

    def aggregate_fit(self, server_round, results, failures):
        """Aggregate what passes the checks: (Parameters, metrics), or (None, {}) where too little does."""
        self.check()
        self._finish_row()
        self.reasons = {}
        self._count(server_round, failures)
        kept = self._keep(server_round, results, lambda res: check_fit(res, self.expected))
        if len(kept) < self.least:
            failed = dict(self.reasons)  # to which those that are dropped now do not belong: they are good
            for client, _ in kept:
                self._drop(server_round, client.cid, f"{len(kept)} results are too few, {self.least} are needed")
            self.reasons = failed
            return None, {}
        self.adapt(len(kept))
        parameters, metrics = super().aggregate_fit(server_round, kept, failures)
        if parameters is None:
            return None, {}
        if not isinstance(parameters, Arrays):
            parameters = Arrays.of_flower(parameters, [res.parameters for _, res in kept])
        self.arrays = parameters.arrays
        self.row = {"round": server_round, "clients": len(kept)}
        self.row.update({name: metrics[name] for name in FIT_METRICS if name in metrics})
        self.clients = {client.cid: {"examples": res.num_examples, **res.metrics} for client, res in kept}
        return ndarrays_to_parameters(self.arrays), metrics

    def aggregate_evaluate(self, server_round, results, failures):
        """Average the devices' measures of the global model, and hand the finished round to the record."""
        self._count(server_round, failures)
        kept = self._keep(server_round, results, check_evaluate)
        loss, metrics = super().aggregate_evaluate(server_round, kept, failures)
        if self.row is not None:
            self.row.update({name: metrics[name] for name in EVALUATE_METRICS if name in metrics})
            for client, res in kept:
                add_figures(self.clients.setdefault(client.cid, {}), res.metrics)
            self._finish_row()
        return loss, metrics

    def _keep(self, server_round, results, check):
        """The results as `check` gives them back, by cid; those that it rejects are dropped."""
        kept = []
        for client, res in sorted(results, key=by_cid):
            try:
                kept.append((client, check(res)))
            except Rejected as reason:
                self._drop(server_round, client.cid, reason)
        return kept

    def _count(self, server_round, failures):
        for failure in failures:
            if isinstance(failure, tuple):  # Flower's form for an answer with a status that is not OK
                client, res = failure
                self._drop(server_round, client.cid, printable(res.status.message))
            else:
                self._drop(server_round, getattr(failure, "cid", None), failure)

    def _drop(self, server_round, cid, reason):
        self.failures += 1
        self.reasons[cid] = str(reason)
        if self.on_drop is not None:
            self.on_drop(server_round, cid, reason)

    def _finish_row(self):
        if self.row is None:
            return
        row, self.row = self.row, None
        row["failures"], self.failures = self.failures, 0
        if self.started is not None:
            row["round_seconds"] = time.monotonic() - self.started
        self.record.add(row, self.arrays, {cid: self.clients[cid] for cid in sorted(self.clients, key=cid_order)})


class Mean(strategy.FedAvg):
    """Flower's FedAvg with the mean of `average`: Flower's own sums in float32 and turns integers into 0."""

    def aggregate_fit(self, server_round, results, failures):
        if not results or (failures and not self.accept_failures):
            return None, {}
        metrics = self.fit_metrics_aggregation_fn([(res.num_examples, res.metrics) for _, res in results])
        return Arrays(average([(res.num_examples, res.parameters.arrays) for _, res in results])), metrics


class FedAvg(Checked, Mean):
    """The mean, weighted by examples (McMahan et al. 2017, arXiv 1602.05629)."""


class FedMedian(Checked, strategy.FedMedian):
    """The median of each value (Yin et al. 2018, arXiv 1803.01498). Of two it is their mean."""


class FedTrimmedAvg(Checked, strategy.FedTrimmedAvg):
    """The mean of each value without its extremes: a fifth at each end, and one of three or four (arXiv 1803.01498)."""

    def adapt(self, num_results):
        if "beta" not in self.given:
            self.beta = max(0.2, 1 / num_results) if num_results > 2 else 0.0


class Krum(Checked, strategy.Krum):
    """The mean without the models that lie farthest from the others (Multi-Krum, Blanchard et al. 2017, 1703.02757).

    Of n models (n - 3) / 2 are left out, and at least one.
    """

    least = 3

    def adapt(self, num_results):
        if "num_malicious_clients" not in self.given:
            self.num_malicious_clients = max(1, (num_results - 3) // 2)
        if "num_clients_to_keep" not in self.given:
            self.num_clients_to_keep = num_results - self.num_malicious_clients


STRATEGIES = {cls.__name__: cls for cls in (FedAvg, FedMedian, FedTrimmedAvg, Krum)}
