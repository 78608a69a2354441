"""Aggregate the clients' results: the mean, and three strategies that withstand some wrong results.

Checked is what they share: it drops what cannot be averaged (plumbing/laptop/checks.py), lets the strategy aggregate
the rest, and hands each finished round to the record. server.py runs them in its own loop; they also run under Flower's
`Server`.
"""

import collections
import dataclasses
import hashlib
import math
import secrets
import time

from libs import np
from plumbing.common.state import get_arrays
from plumbing.laptop.checks import Checks, client_order, is_number, size_of
from plumbing.laptop.history import EVALUATE_METRICS, FIT_METRICS, TRAFFIC, cid_order
from plumbing.laptop.record import Record

from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import strategy

from data import BATCH_SIZES


def metrics_aggregation_fn(results: list[tuple[int, dict]]) -> dict[str, float]:
    """Return the means of metrics, weighted by examples.

    `results` is [(num_examples, {name: value}), …]; returns {name: float} for the names under which all of them have a
    finite number, {} for an empty list. Numbers of examples must be positive.
    """
    if not results:
        return {}
    total = sum(num_examples for num_examples, _ in results)
    names = [name for name in results[0][1] if all(is_number(metrics.get(name)) for _, metrics in results)]
    return {name: math.fsum(n / total * metrics[name] for n, metrics in results) for name in names}


def average(updates: list[tuple[int, list[np.ndarray]]]) -> list[np.ndarray]:
    """Return the mean of lists of arrays, weighted by examples (McMahan et al. 2017, arXiv 1602.05629).

    `updates` is [(num_examples, [array, …]), …], all of the same shapes and dtypes, which the mean keeps. It is
    summed in float64; integers (num_batches_tracked) are rounded and stay within what was sent.
    """
    total = sum(num_examples for num_examples, _ in updates)
    means = []
    for arrays in zip(*(arrays for _, arrays in updates)):
        mean = np.zeros(arrays[0].shape, np.result_type(arrays[0], np.float64))  # complex128 where they are complex
        for (num_examples, _), array in zip(updates, arrays):
            mean += array * np.float64(num_examples / total)
        if arrays[0].dtype.kind not in "fc":
            with np.errstate(invalid="ignore"):  # 2**63 - 1 rounds up in float64; the clip brings it back
                mean = np.rint(mean).astype(arrays[0].dtype)
            mean = np.clip(mean, np.minimum.reduce(arrays), np.maximum.reduce(arrays))
        means.append(mean.astype(arrays[0].dtype, copy=False))
    return means


class Checked:
    """Put before one of Flower's strategies: drops what cannot be averaged, and records each round.

    initial_model: the net that training starts from; round 1's clients get its parameters.
    save_ckp_path: where the newest global model goes; the rest of the record goes beside it (Record).
    on_drop: called as on_drop(round, cid, reason) for each result that is dropped.
    record: a Record; without one it makes its own.
    num_drawn: how many of the clients train in a round, drawn by lot each time; None: all. The others still evaluate.
    seed: makes the draw the same for the same round, whoever else is there and whichever round the run starts with.

    Further arguments are the Flower strategy's. aggregate_fit and `close` raise Diverged if a round's test_loss is not
    finite; `go_back` then has the model to go on from.
    """

    least = 1  # results that the strategy needs

    def __init__(
        self, initial_model, save_ckp_path=None, *args, on_drop=None, record=None, num_drawn=None, seed=None, **kwargs
    ):
        self.given = set(kwargs)
        kwargs.setdefault("initial_parameters", ndarrays_to_parameters(get_arrays(initial_model)))
        kwargs.setdefault("fit_metrics_aggregation_fn", metrics_aggregation_fn)
        kwargs.setdefault("evaluate_metrics_aggregation_fn", metrics_aggregation_fn)
        super().__init__(*args, **kwargs)
        self.model, self.num_drawn, self.seed = (
            initial_model,
            num_drawn,
            secrets.token_hex(8) if seed is None else seed,
        )
        self.checks = Checks(initial_model, BATCH_SIZES["fit"], self.least, on_drop)
        self.record = record or Record(initial_model, save_ckp_path)
        self.tries = collections.Counter()  # of each round: one in which nobody trained is run again, by others
        self.sent, self.config = kwargs["initial_parameters"], {}  # what the clients of the round train with
        self.started, self.row = math.nan, None  # of the current round; `row` once somebody trained in it, and also:
        self.arrays, self.clients = None, {}

    def go_back(self):
        """Forget the rounds from the one that diverged on. Return (the number of the last good round, its arrays)."""
        self.row = None
        return self.record.go_back()

    def close(self):
        """Hand over the current round if somebody trained in it, and wait for the record. Raises what failed there."""
        self._finish_row()
        self.record.close()

    def configure_fit(self, server_round, parameters, client_manager):
        """Draw by lot who trains: [(client, FitIns), …], by cid.

        A hash of the client's own cid draws its lot. From one Random(seed) a client's lot would depend on who else is
        connected, and on the rounds that were drawn before: a run that resumes would draw others.
        """
        self.started = time.monotonic()
        instructions = super().configure_fit(server_round, parameters, client_manager)
        self.sent, self.config = parameters, instructions[0][1].config if instructions else {}
        self.tries[server_round] += 1
        text = f"{self.seed} {server_round} {self.tries[server_round]}"
        instructions.sort(key=lambda pair: hashlib.blake2b(f"{text} {pair[0].cid}".encode()).digest())
        return sorted(instructions[: self.num_drawn], key=client_order)

    def aggregate_fit(self, server_round, results, failures):
        """Aggregate the results that pass the checks: (Parameters, metrics), or (None, {}) if they are too few."""
        self.record.check()
        self.record.check_tests()  # or the results are of a model that is not kept
        self._finish_row()
        results = self.checks.fit(server_round, results, failures, parameters_to_ndarrays(self.sent), self.config)
        if not results or (failures and not self.accept_failures):
            return None, {}
        self.arrays = self.combine(server_round, results)
        metrics = self.fit_metrics_aggregation_fn([(res.num_examples, res.metrics) for _, res in results])
        metrics.update(average_eval(results, self.fit_metrics_aggregation_fn))
        self.row = {"round": server_round, "clients": len(results)}
        self.row.update({name: metrics[name] for name in FIT_METRICS if name in metrics})
        self.clients = {client.cid: {"examples": res.num_examples, **res.metrics} for client, res in results}
        return ndarrays_to_parameters(self.arrays), metrics

    def combine(self, server_round, results):
        """Aggregate the arrays of the clients: floats by Flower's strategy, all others, which count batches, by mean.

        Flower's strategies get float64, in which a mean of two large values does not overflow, and no integers: in
        Krum's distances these would drown the weights. For strategies that keep nothing from round to round.
        """
        self.adapt(len(results))
        mean = average([(res.num_examples, res.parameters) for _, res in results])
        places = [place for place, array in enumerate(mean) if array.dtype.kind == "f"]
        floats = []
        for client, res in results:
            arrays = [res.parameters[place].astype(np.float64) for place in places]
            floats.append((client, dataclasses.replace(res, parameters=ndarrays_to_parameters(arrays))))
        parameters, _ = super().aggregate_fit(server_round, floats, [])
        for place, array in zip(places, parameters_to_ndarrays(parameters)):
            mean[place] = array.astype(mean[place].dtype)
        return mean

    def adapt(self, num_results):
        """Set what depends on the number of results."""

    def aggregate_evaluate(self, server_round, results, failures):
        """Average the clients' measures of the global model, and hand the finished round to the record."""
        results = self.checks.evaluate(server_round, results, failures)
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        if self.row is not None:
            self.row.update({name: metrics[name] for name in EVALUATE_METRICS if name in metrics})
            add_figures(self.clients, results)
            self._finish_row()
        return loss, metrics

    def _finish_row(self):
        if self.row is None:
            return
        row, self.row = self.row, None
        row["failures"], self.checks.failures = self.checks.failures, 0
        row["round_seconds"] = time.monotonic() - self.started
        row["finished_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.record.add(row, self.arrays, {cid: self.clients[cid] for cid in sorted(self.clients, key=cid_order)})


def average_eval(results, average_fn):
    """Return the means of eval_*, weighted by the images that they were measured on; {} if a client did not say."""
    sizes = [size_of(client, "num_eval") for client, _ in results]
    if None in sizes:
        return {}
    names = [name for name in FIT_METRICS if name.startswith("eval_")]
    return average_fn([(size, {name: res.metrics[name] for name in names}) for size, (_, res) in zip(sizes, results)])


def add_figures(clients, results):
    """Add the figures of evaluate to those of fit, {cid: {name: value}}. What a client waited and moved adds up."""
    for client, res in results:
        figures = clients.setdefault(client.cid, {})
        before = {name: figures.get(name, 0.0) for name in ("wait_seconds", *TRAFFIC)}
        figures.update(res.metrics)
        figures.update({name: before[name] + res.metrics[name] for name in before if name in res.metrics})


class FedAvg(Checked, strategy.FedAvg):
    """The mean, weighted by examples (McMahan et al. 2017, arXiv 1602.05629).

    Not by Flower's own aggregate_fit, which sums in float32 and turns integers into 0.
    """

    def combine(self, server_round, results):
        return average([(res.num_examples, res.parameters) for _, res in results])


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
