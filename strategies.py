"""What the server makes of its devices' results: checks, a mean, and other strategies behind the same checks.

Checked is what they share: it drops what cannot be averaged, has the next class aggregate the rest, and hands every
finished round to the record (laptop/record). server.py runs them with its own loop; they also run under Flower's
`Server`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import math
import secrets
import statistics
import time
from collections.abc import Mapping

from libs import np, printable, say
from plumbing.common.state import batch_norm_names, float32_weights, get_arrays
from plumbing.laptop.history import EVALUATE_METRICS, FIT_METRICS, TELEMETRY, cid_order
from plumbing.laptop.record import Record

from flwr.common import EvaluateRes, FitRes, Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import strategy

from data import BATCH_SIZES

INTEGER_SCALE = 2.0**-200  # a power of two, so that nothing is rounded
FAR = 100  # times as much as others did is far outside
RECORD_OPTIONS = ("last_round", "test", "count", "about", "on_row", "log")


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
    """The numbers under `names`, as floats. Raises Rejected where an accuracy is not in 0..1, a loss is negative or not
    finite, one is missing, or an error stands there.

    Of the names in TELEMETRY it takes those that are there and can be true (odd_telemetry). Whatever else a device
    sends is left out: nothing is known of it.
    """
    if not isinstance(metrics, Mapping):
        raise Rejected(f"its metrics are {printable(metrics)}, not a dictionary")
    if "error" in metrics:
        raise Rejected(printable(metrics["error"]))
    for name in names:
        if not is_number(metrics.get(name)):
            raise Rejected(f"metric {name} is {printable(metrics.get(name))}, not a finite number")
        if metrics[name] < 0 or (name.endswith("accuracy") and metrics[name] > 1):
            most = "1" if name.endswith("accuracy") else "inf"
            raise Rejected(f"metric {name} is {printable(metrics[name])}, not in 0..{most}")
    odd = odd_telemetry(metrics)
    told = [name for name in TELEMETRY if name in metrics and name not in odd]
    return {name: float(metrics[name]) for name in (*names, *told)}


def odd_telemetry(metrics: dict) -> dict:
    """Those of the names in TELEMETRY under which `metrics` has no number that can be true, with what is there."""
    told = {name: metrics[name] for name in TELEMETRY if name in metrics}
    return {
        name: value
        for name, value in told.items()
        if not is_number(value) or not TELEMETRY[name][0] <= value <= TELEMETRY[name][1]
    }


def check_examples(num_examples, told):
    """Raise Rejected unless this is a positive integer, and as many as the client `told` when it joined, if known."""
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or not 1 <= num_examples < 2**63:
        raise Rejected(f"number of examples is {printable(num_examples)}, not a positive integer")
    if told not in (None, num_examples):
        raise Rejected(f"number of examples is {num_examples}, and it joined with {told}")


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


def size_of(client, name):
    """What a client said when it joined under `name`, num_fit or num_eval; None under a server that does not ask."""
    return (getattr(client, "properties", None) or {}).get(name)


def check_fit(client, res: FitRes, expected) -> FitRes:
    """The FitRes `res` of `client` with its arrays read and its known metrics alone. Raises Rejected."""
    metrics = check_metrics(res.metrics, FIT_METRICS)
    check_examples(res.num_examples, size_of(client, "num_fit"))
    return dataclasses.replace(res, parameters=Arrays(check_arrays(res.parameters.tensors, expected)), metrics=metrics)


def check_evaluate(client, res: EvaluateRes) -> EvaluateRes:
    """The EvaluateRes `res` of `client` with its known metrics alone. Raises Rejected."""
    metrics = check_metrics(res.metrics, EVALUATE_METRICS)
    check_metrics({"loss": res.loss}, ("loss",))
    check_examples(res.num_examples, size_of(client, "num_eval"))
    return dataclasses.replace(res, metrics=metrics)


def largest(array):
    """The largest absolute value in an array, as a float; 0.0 where it is empty."""
    return float(np.abs(array.astype(np.float64, copy=False)).max(initial=0))


def reaches(sent: list[np.ndarray], weights: list[bool], most_images: int, config: dict) -> list[float]:
    """How much an honest client can change a value of each array in a round.

    `sent` is the model that all train from, `weights` says which of its arrays are trained, `most_images` is the size
    of the largest shard, `config` what the clients were told.

    A step of Adam moves a weight by less than 10 times the learning rate, whatever the images are: with its betas,
    |mean| / sqrt(square) is at most 7.3 (by Cauchy and Schwarz). A hundredth of the largest weight is more than
    --compress rounds. Other floats belong to batch norm: means grow with the weights and variances with their squares,
    and 1000 times that is let pass. Integers count batches. Where no learning rate is told, a weight may move by 1000.
    """
    reach, batches = 1000.0, math.inf
    if "lr" in config:
        steps = config.get("num_epochs", 1) * math.ceil(most_images / BATCH_SIZES["fit"])
        most_weight = max((largest(array) for array, weight in zip(sent, weights) if weight), default=0.0)
        reach, batches = 10 * config["lr"] * steps + most_weight / 100, 1000.0 * steps
    floats = [array.dtype.kind == "f" for array in sent]
    norms = [largest(array) for array, weight, is_float in zip(sent, weights, floats) if is_float and not weight]
    norm = 1000 * max([1.0, *norms]) * max(1, reach) * max(1, reach)  # ** 2 would raise OverflowError
    return [reach if weight else norm if is_float else batches for weight, is_float in zip(weights, floats)]


def find_outliers(changes: list[list[float]], reaches: list[float]) -> dict[int, tuple[int, float, float]]:
    """Which clients changed an array by more than its reach, and by more than FAR times what half of the others did.

    `changes` has a list a client: how much it changed a value of each array at most. Returns {index of the client:
    (index of the array, its change, the most that is let pass)}. Of an even number of others the lower middle counts:
    of three clients, one liar does not cover another.
    """
    found = {}
    for index, own in enumerate(changes):
        for place, (change, bound) in enumerate(zip(own, reaches)):
            others = [changed[place] for changed in changes[:index] + changes[index + 1 :]] if change > bound else []
            if others:
                bound = max(bound, FAR * statistics.median_low(others))
            if change > bound:
                found[index] = place, change, bound
                break
    return found


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
    save_ckp_path: where the newest global model goes; the rest of the record goes beside it (Record).
    on_drop: called with (round, cid, reason) for each result that is dropped.
    record: a Record to take; without one it makes its own from RECORD_OPTIONS.
    num_fit: how many of the clients train in a round, drawn anew each time; None: all. The others still evaluate.
    seed: makes the draw the same for the same round, whoever else is there and from whichever round on.

    The results go on to the strategy by cid, with their known metrics alone. `reasons` has why clients failed in the
    last aggregate_fit, {cid: text}. `close` waits until all rounds are recorded, and raises what failed there, as
    `check` does. aggregate_fit and `close` raise Diverged where a round's test_loss is not finite; `go_back`
    then has the model to go on from.
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
        self.learned, self.norms = float32_weights(initial_model), set(batch_norm_names(initial_model))
        self.sent = initial  # the parameters from which the clients of the round train
        self.config = {}  # what these are told
        self.odd = set()  # (cid, name) of the telemetry that was said to be odd
        self.reasons = {}
        self.failures = 0  # since the last finished round
        self.started = None  # when the round under way was
        self.row = None  # of the round under way, once somebody trained in it
        self.arrays, self.clients = None, {}  # and what belongs to it

    def check(self):
        """Raise what went wrong with the record, if anything did."""
        self.record.check()

    def go_back(self):
        """Forget the rounds from the one that diverged on: the number of the round before, and the arrays of its model.

        Record.check_tests says that there is one.
        """
        self.row = None
        return self.record.go_back()

    def close(self):
        """Hand over the round that is under way, if somebody trained in it, and wait for the record."""
        self._finish_row()
        self.record.close()

    def adapt(self, num_results):
        """Set what depends on the number of results to aggregate."""

    def configure_fit(self, server_round, parameters, client_manager):
        self.started = time.monotonic()
        instructions = super().configure_fit(server_round, parameters, client_manager)
        self.sent, self.config = parameters, instructions[0][1].config if instructions else {}
        self.tries[server_round] += 1

        def lot(instruction):
            text = f"{self.seed} {server_round} {self.tries[server_round]} {instruction[0].cid}"
            return hashlib.blake2b(text.encode()).digest()

        return sorted(sorted(instructions, key=lot)[: self.num_fit], key=by_cid)

    def aggregate_fit(self, server_round, results, failures):
        """Aggregate what passes the checks: (Parameters, metrics), or (None, {}) where too little does."""
        self.check()
        self.record.check_tests()  # or the results are of a model that is not kept
        self._finish_row()
        self.reasons = {}
        self._count(server_round, failures)
        kept = self._keep(server_round, results, lambda client, res: check_fit(client, res, self.expected))
        kept = self._without_outliers(server_round, kept)
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
        metrics = {**metrics, **self._eval_figures(kept)}
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
                kept.append((client, check(client, res)))
            except Rejected as reason:
                self._drop(server_round, client.cid, reason)
                continue
            for name, value in odd_telemetry(res.metrics).items():
                if (client.cid, name) not in self.odd:
                    self.odd.add((client.cid, name))
                    low, high = TELEMETRY[name]
                    say(f"cid {client.cid}: its {name} is left out: {printable(value)} is not in {low:g}..{high:g}")
        return kept

    def _without_outliers(self, server_round, kept):
        """The results without those of which a value is far outside what this round can do; these are dropped."""
        own = self.norms if self.config.get("fedbn") else ()  # stays on the device, and may be far from the mean
        names = [name for name, _, _ in self.expected]
        weights = [learned and name not in own for name, learned in zip(names, self.learned)]
        sent = parameters_to_ndarrays(self.sent)
        most = reaches(sent, weights, max((res.num_examples for _, res in kept), default=1), self.config)
        pairs = [zip(res.parameters.arrays, sent) for _, res in kept]
        changes = [[largest(np.subtract(now, before, dtype=np.float64)) for now, before in pair] for pair in pairs]
        outliers = find_outliers(changes, most)
        for index, (place, change, bound) in outliers.items():
            reason = f"array {names[place]} has changed by {change:.2g}, far outside the {bound:.2g} of this round"
            self._drop(server_round, kept[index][0].cid, reason)
        return [result for index, result in enumerate(kept) if index not in outliers]

    def _eval_figures(self, kept):
        """The means of eval_*, weighted by the images that they were measured on, where these are known."""
        sizes = [size_of(client, "num_eval") for client, _ in kept]
        if None in sizes:
            return {}
        names = [name for name in FIT_METRICS if name.startswith("eval_")]
        figures = [{name: res.metrics[name] for name in names} for _, res in kept]
        return self.fit_metrics_aggregation_fn(list(zip(sizes, figures)))

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
