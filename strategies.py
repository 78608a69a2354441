"""FedAvg of our own: checks what devices send, averages it, and hands every finished round to the record (record.py).

server.py runs it with its own loop; it also runs under Flower's plain `Server`.
"""

import io
import math
import time

from libs import np, printable

from flwr.common import ndarrays_to_parameters
from flwr.server import strategy

from nets import get_arrays
from record import EVALUATE_METRICS, FIT_METRICS, Record

RECORD_OPTIONS = ("last_round", "test_loaders", "about", "on_row", "log")


def metrics_aggregation_fn(results):
    """The means of metrics, weighted by examples.

    `results` is [(num_examples, {name: number}), …]; returns {name: float} for the names that all of them have, {}
    for an empty list. Numbers of examples must be positive.
    """
    if not results:
        return {}
    total = sum(num_examples for num_examples, _ in results)
    names = [name for name in results[0][1] if all(name in metrics for _, metrics in results)]
    return {name: math.fsum(n / total * metrics[name] for n, metrics in results) for name in names}


def average(updates):
    """The mean of lists of arrays, weighted by examples (McMahan et al. 2017, arXiv 1602.05629).

    `updates` is [(num_examples, [array, …]), …], all of the same shapes and dtypes, which the mean keeps. It is
    summed in float64; integers (num_batches_tracked) are rounded and stay within what was sent.
    """
    total = sum(num_examples for num_examples, _ in updates)
    means = []
    for arrays in zip(*(arrays for _, arrays in updates)):
        mean = np.zeros(arrays[0].shape, np.float64)
        for (num_examples, _), array in zip(updates, arrays):
            mean += array * np.float64(num_examples / total)
        if arrays[0].dtype.kind == "f":
            means.append(mean.astype(arrays[0].dtype))
        else:
            low, high = np.minimum.reduce(arrays), np.maximum.reduce(arrays)
            with np.errstate(invalid="ignore"):  # 2**63 - 1 rounds up in float64, and comes back by the clip
                means.append(np.clip(np.rint(mean).astype(arrays[0].dtype), low, high))
    return means


class Rejected(Exception):
    """A result that is not averaged, with the reason."""


def check_metrics(metrics, names):
    """Raise Rejected unless `metrics` holds a finite number under each of `names`, and none of it is an error."""
    if "error" in metrics:
        raise Rejected(printable(metrics["error"]))
    for name in names:
        value = metrics.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Rejected(f"metric {name} is {printable(value)}, not a finite number")


def check_examples(num_examples):
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise Rejected(f"number of examples is {printable(num_examples)}, not a positive integer")


def check_arrays(tensors, expected):
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
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Rejected(f"array {name} has values that are not finite")
        if name.endswith("running_var") and (array < 0).any():
            raise Rejected(f"array {name} has negative variances")
        arrays.append(array)
    return arrays


def by_cid(result):
    """Sorts results by cid: as numbers where they are numbers, as text after those where they are Flower's own."""
    cid = str(result[0].cid)
    return (int(cid), cid) if cid.isdecimal() else (math.inf, cid)


class FedAvg(strategy.FedAvg):
    """Flower's FedAvg that drops what cannot be averaged, and hands each finished round to its record.

    initial_model: the net that training starts from; round 1's devices get its parameters.
    save_ckp_path: where the newest global model goes; the rest of the record goes beside it (record.Record).
    on_drop: called with (round, cid, reason) for each result that is dropped.
    record: a record.Record to take; without one it makes its own from the options last_round, test_loaders, about,
        on_row and log.

    After the last round, `close` waits until all rounds are recorded; it raises what went wrong there, as `check`
    does in between.
    """

    def __init__(self, initial_model, save_ckp_path=None, *args, on_drop=None, record=None, **kwargs):
        options = {name: kwargs.pop(name) for name in RECORD_OPTIONS if name in kwargs}
        arrays = get_arrays(initial_model)
        initial = ndarrays_to_parameters(arrays)
        kwargs.setdefault("initial_parameters", initial)
        kwargs.setdefault("fit_metrics_aggregation_fn", metrics_aggregation_fn)
        kwargs.setdefault("evaluate_metrics_aggregation_fn", metrics_aggregation_fn)
        super().__init__(*args, **kwargs)
        self.model, self.on_drop = initial_model, on_drop
        self.record = record or Record(initial_model, save_ckp_path, **options)
        self.save_ckp_path = self.record.path
        headers = [data[: len(data) - array.nbytes] for data, array in zip(initial.tensors, arrays)]
        self.expected = list(zip(initial_model.state_dict(), arrays, headers))
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

    def configure_fit(self, server_round, parameters, client_manager):
        self.started = time.monotonic()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round, results, failures):
        """Average what passes the checks: (Parameters, metrics), or (None, {}) where nothing does."""
        self.check()
        self._finish_row()
        self._count(server_round, failures)
        kept = []
        for client, res in sorted(results, key=by_cid):
            try:
                check_metrics(res.metrics, FIT_METRICS)
                check_examples(res.num_examples)
                kept.append((client.cid, res, check_arrays(res.parameters.tensors, self.expected)))
            except Rejected as reason:
                self._drop(server_round, client.cid, reason)
        if not kept or (failures and not self.accept_failures):
            return None, {}
        self.arrays = average([(res.num_examples, arrays) for _, res, arrays in kept])
        metrics = self.fit_metrics_aggregation_fn([(res.num_examples, res.metrics) for _, res, _ in kept])
        self.row = {"round": server_round, "clients": len(kept)}
        self.row.update({name: metrics[name] for name in FIT_METRICS if name in metrics})
        self.clients = {f"clients/{cid}/{name}": res.metrics[name] for cid, res, _ in kept for name in FIT_METRICS}
        return ndarrays_to_parameters(self.arrays), metrics

    def aggregate_evaluate(self, server_round, results, failures):
        """Average the devices' measures of the global model, and hand the finished round to the record."""
        self._count(server_round, failures)
        kept = []
        for client, res in results:
            try:
                check_metrics({**res.metrics, "loss": res.loss}, ("loss", *EVALUATE_METRICS))
                check_examples(res.num_examples)
                kept.append((client.cid, res))
            except Rejected as reason:
                self._drop(server_round, client.cid, reason)
        metrics = self.evaluate_metrics_aggregation_fn([(res.num_examples, res.metrics) for _, res in kept])
        if self.row is not None:
            self.row.update({name: metrics[name] for name in EVALUATE_METRICS if name in metrics})
            for cid, res in kept:
                self.clients.update({f"clients/{cid}/{name}": res.metrics[name] for name in EVALUATE_METRICS})
            self._finish_row()
        return metrics.get("global_eval_loss"), metrics

    def _count(self, server_round, failures):
        for failure in failures:
            if isinstance(failure, tuple):  # Flower's form for an answer with a status that is not OK
                client, res = failure
                self._drop(server_round, client.cid, printable(res.status.message))
            else:
                self._drop(server_round, getattr(failure, "cid", None), failure)

    def _drop(self, server_round, cid, reason):
        self.failures += 1
        if self.on_drop is not None:
            self.on_drop(server_round, cid, reason)

    def _finish_row(self):
        if self.row is None:
            return
        row, self.row = self.row, None
        row["failures"], self.failures = self.failures, 0
        if self.started is not None:
            row["round_seconds"] = time.monotonic() - self.started
        self.record.add(row, self.arrays, self.clients)
