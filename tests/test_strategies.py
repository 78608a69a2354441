"""What the server makes of the clients' results: means, checks, and the record, against means computed by hand."""

import functools
import math
import threading
import time

from plumbing.common.fast import Adam
from plumbing.common.state import get_arrays, set_arrays
from plumbing.laptop.checks import reaches
from plumbing.laptop.curves import as_curves
from plumbing.laptop.earlier import Earlier
from plumbing.laptop.history import FIT_METRICS, read_history
from plumbing.laptop.record import GlobalTest, Record

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data import BatchLoader
from engines import client_fit_fn, server_test_fn
from nets import LeNet5
from strategies import STRATEGIES, FedAvg, FedMedian, FedTrimmedAvg, Krum, metrics_aggregation_fn

OK = Status(Code.OK, "")
METRICS = {"fit_loss": 1.5, "fit_accuracy": 0.4, "eval_loss": 1.6, "eval_accuracy": 0.3}
GLOBAL_METRICS = {"global_eval_loss": 1.0, "global_eval_accuracy": 0.5}


class Proxy:
    """Stands for a connected client, of which the strategy knows the cid and what it said when it joined, if asked."""

    def __init__(self, cid, **properties):
        self.cid = str(cid)
        if properties:
            self.properties = properties


def fit_result(cid, arrays, num_examples=10, metrics=METRICS, **properties):
    return Proxy(cid, **properties), FitRes(OK, ndarrays_to_parameters(arrays), num_examples, metrics)


def evaluate_result(cid, num_examples=10, metrics=GLOBAL_METRICS, **properties):
    return Proxy(cid, **properties), EvaluateRes(OK, 1.0, num_examples, metrics)


@pytest.fixture
def drops():
    return []


@pytest.fixture
def fedavg(tmp_path, drops):
    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl", on_drop=lambda *drop: drops.append(drop))
    yield strategy
    strategy.close()


def arrays_like(model, value, num_batches=3):
    return [
        np.full(array.shape, value, array.dtype) if array.dtype.kind == "f" else np.array(num_batches, array.dtype)
        for array in get_arrays(model)
    ]


def test_metrics_are_means_weighted_by_examples():
    results = [(1, {"loss": 4.0, "accuracy": 0.0}), (3, {"loss": 0.0, "accuracy": 1.0})]
    assert metrics_aggregation_fn(results) == {"loss": 1.0, "accuracy": 0.75}
    assert metrics_aggregation_fn([]) == {}
    assert metrics_aggregation_fn([(1, {"a": 1.0}), (1, {"a": 3.0, "b": 1.0})]) == {"a": 2.0}
    assert math.isfinite(metrics_aggregation_fn([(10, {"loss": 1e308})] * 3)["loss"])


def test_parameters_are_means_weighted_by_examples(fedavg):
    results = [
        fit_result(0, arrays_like(fedavg.model, 1.0, num_batches=100), 10),
        fit_result(1, arrays_like(fedavg.model, 5.0, num_batches=201), 30),
    ]
    parameters, metrics = fedavg.aggregate_fit(1, results, [])
    for array, like in zip(parameters_to_ndarrays(parameters), get_arrays(fedavg.model), strict=True):
        assert array.dtype == like.dtype and array.shape == like.shape
        expected = (1.0 * 10 + 5.0 * 30) / 40 if array.dtype.kind == "f" else round((100 * 10 + 201 * 30) / 40)
        assert (array == expected).all()
    assert metrics == METRICS


def test_mean_of_random_parameters_is_numpys(fedavg):
    rng = np.random.default_rng(0)
    updates = []
    for _ in range(5):
        arrays = arrays_like(fedavg.model, 0.0)
        updates.append([np.abs(rng.normal(size=a.shape)).astype(a.dtype) if a.dtype.kind == "f" else a for a in arrays])
    weights = [3, 1, 4, 1, 5]
    parameters, _ = fedavg.aggregate_fit(1, [fit_result(i, a, weights[i]) for i, a in enumerate(updates)], [])
    for mean, arrays in zip(parameters_to_ndarrays(parameters), zip(*updates, strict=True), strict=True):
        expected = np.average(np.stack(arrays).astype(np.float64), axis=0, weights=weights)
        np.testing.assert_allclose(mean, expected, rtol=1e-6)


def test_a_mean_of_huge_values_stays_finite(fedavg):
    huge = arrays_like(fedavg.model, np.finfo(np.float32).max, num_batches=2**63 - 1)
    parameters, _ = fedavg.aggregate_fit(1, [fit_result(cid, huge, 2**62) for cid in range(3)], [])
    for array, sent in zip(parameters_to_ndarrays(parameters), huge, strict=True):
        assert (array == sent).all()


def broken(change):
    """The arrays of a result with one of them changed by `change(arrays)`."""
    return lambda model: change(arrays_like(model, 1.0))


def with_first(value):
    def change(arrays):
        arrays[0] = value(arrays[0])
        return arrays

    return broken(change)


def with_nan(array):
    array[0, 0, 0, 0] = np.nan
    return array


def with_negative_variance(arrays):
    arrays[5] = -arrays[5]  # layer1.1.running_var
    return arrays


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (broken(lambda arrays: arrays[:-1]), "19 arrays, not 20"),
        (broken(lambda arrays: []), "0 arrays, not 20"),
        (with_first(lambda a: a[:1]), "layer1.0.weight is float32 (1, 1, 5, 5), not float32 (6, 1, 5, 5)"),
        (with_first(lambda a: a.astype(np.float64)), "layer1.0.weight is float64"),
        (with_first(with_nan), "layer1.0.weight has values that are not finite"),
        (with_first(lambda a: a * np.float32(np.inf)), "layer1.0.weight has values that are not finite"),
        (broken(with_negative_variance), "layer1.1.running_var has negative variances"),
    ],
)
def test_parameters_that_do_not_fit_are_dropped_with_cid_and_reason(fedavg, drops, arrays, reason):
    good = fit_result(0, arrays_like(fedavg.model, 2.0))
    parameters, _ = fedavg.aggregate_fit(4, [fit_result(7, arrays(fedavg.model)), good], [])
    assert (parameters_to_ndarrays(parameters)[0] == 2.0).all()
    ((current, cid, why),) = drops
    assert (current, cid) == (4, "7") and reason in str(why)


@pytest.mark.parametrize("num_examples", [0, -5, 2.0, True, float("nan")])
def test_numbers_of_examples_that_make_no_weight_are_dropped(fedavg, drops, num_examples):
    assert fedavg.aggregate_fit(1, [fit_result(0, arrays_like(fedavg.model, 1.0), num_examples)], []) == (None, {})
    assert "number of examples" in str(drops[0][2])


def test_a_device_has_the_numbers_of_images_that_it_joined_with(fedavg, drops):
    arrays, said = arrays_like(fedavg.model, 1.0), {"num_fit": 32, "num_eval": 8}
    results = [fit_result(0, arrays, 32, **said), fit_result(1, arrays_like(fedavg.model, 0.0), 2**62, **said)]
    parameters, _ = fedavg.aggregate_fit(1, results, [])
    assert (parameters_to_ndarrays(parameters)[0] == 1.0).all()
    results = [evaluate_result(0, 8, **said), evaluate_result(1, 32, {**GLOBAL_METRICS, "global_eval_loss": 9}, **said)]
    assert fedavg.aggregate_evaluate(1, results, []) == (1.0, GLOBAL_METRICS)
    assert [str(why) for _, _, why in drops] == [
        "number of examples is 4611686018427387904, and it joined with 32",
        "number of examples is 32, and it joined with 8",
    ]


def test_each_figure_is_weighted_by_the_images_that_it_was_measured_on(fedavg, tmp_path):
    """Of 10 + 30 fit images 5 + 27 were right, of 8 + 2 eval images 2 + 2."""
    metrics = [
        {"fit_loss": 1.0, "fit_accuracy": 5 / 10, "eval_loss": 4.0, "eval_accuracy": 2 / 8},
        {"fit_loss": 2.0, "fit_accuracy": 27 / 30, "eval_loss": 1.0, "eval_accuracy": 2 / 2},
    ]
    sizes, arrays = [(10, 8), (30, 2)], arrays_like(fedavg.model, 1.0)
    results = [fit_result(c, arrays, n, metrics[c], num_fit=n, num_eval=k) for c, (n, k) in enumerate(sizes)]
    _, means = fedavg.aggregate_fit(1, results, [])
    expected = {"fit_loss": 1.75, "fit_accuracy": 32 / 40, "eval_loss": 3.4, "eval_accuracy": 4 / 10}
    assert means == pytest.approx(expected)
    fedavg.close()
    row = pd.read_csv(tmp_path / "history.csv").iloc[0]
    assert {name: row[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("value", [-1e-9, -1e300, 1.001, 7.5])
def test_accuracies_lie_in_0_to_1_and_losses_are_not_negative(fedavg, drops, value):
    expected = []
    for name in (*FIT_METRICS, *GLOBAL_METRICS):
        if name in FIT_METRICS:
            metrics = {**METRICS, name: value}
            fedavg.aggregate_fit(1, [fit_result(0, arrays_like(fedavg.model, 1.0), metrics=metrics)], [])
        else:
            fedavg.aggregate_evaluate(1, [evaluate_result(0, metrics={**GLOBAL_METRICS, name: value})], [])
        if name.endswith("accuracy") or value < 0:
            most = "inf" if name.endswith("loss") else "1"
            expected.append(f"metric {name} is {value}, not in 0..{most}")
    assert [str(why) for _, _, why in drops] == expected


def test_telemetry_that_cannot_be_true_is_left_out_with_its_name_once(fedavg, drops, capsys):
    logged = []
    fedavg.record.on_saved = [lambda row, clients: logged.append(as_curves(row, clients))]
    good = {"fit_seconds": 2.5, "wait_seconds": 0, "throttled": 0x50005, "load": 1.5, "peak_memory_mb": 300.0}
    odd = {"fit_seconds": -1, "wait_seconds": 1e300, "cpu_temp_c": 1e6, "throttled": 2**40, "load": math.nan}
    for current in (1, 2):
        arrays = arrays_like(fedavg.model, 1.0)
        results = [fit_result(cid, arrays, metrics={**METRICS, **told}) for cid, told in ((0, good), (1, odd))]
        fedavg.aggregate_fit(current, results, [])
    fedavg.close()
    assert drops == []
    for figures in logged:
        told = {name: figures[f"clients/0/{name}"] for name in good}
        assert told == good and not any(f"clients/1/{name}" in figures for name in odd)
    out = capsys.readouterr().out
    assert all(out.count(f"cid 1: its {name} is left out") == 1 for name in odd)
    assert "cid 1: its cpu_temp_c is left out: 1000000.0 is not in -100..200" in out and "cid 0" not in out


@pytest.mark.parametrize("name", FIT_METRICS)
@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "0.5", True, b"1"])
def test_metrics_that_are_missing_or_no_numbers_are_dropped(fedavg, drops, name, value):
    metrics = {key: other for key, other in METRICS.items() if key != name}
    if value is not None:
        metrics[name] = value
    assert fedavg.aggregate_fit(1, [fit_result(0, arrays_like(fedavg.model, 1.0), 1, metrics)], []) == (None, {})
    assert f"metric {name}" in str(drops[0][2])


def test_bytes_that_are_no_array_or_a_pickle_are_dropped_unread(fedavg, drops, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    import io

    file = io.BytesIO()
    np.save(file, np.array([Evil()], dtype=object), allow_pickle=True)
    good = ndarrays_to_parameters(arrays_like(fedavg.model, 1.0)).tensors
    for data in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f4'}", file.getvalue(), good[0][:-8]):
        res = FitRes(OK, Parameters([data, *good[1:]], "numpy.ndarray"), 10, METRICS)
        assert fedavg.aggregate_fit(1, [(Proxy(3), res)], []) == (None, {})
    assert len(drops) == 5 and all("layer1.0.weight cannot be read" in str(why) for _, _, why in drops)
    assert not (tmp_path / "pwned").exists()


def test_what_a_device_sends_is_said_in_one_short_line(fedavg, drops):
    fedavg.aggregate_fit(1, [fit_result(0, [], 1, {"error": "a\nb\x1b[31m" + "x" * 1000})], [])
    assert "\n" not in str(drops[0][2]) and "\x1b" not in str(drops[0][2]) and len(str(drops[0][2])) <= 200


anything = st.one_of(
    st.floats(), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.text(max_size=5), st.binary(max_size=5)
)
extras = st.dictionaries(st.sampled_from(["host", "temperature", "loss", "fit_los", "round", ""]), anything)
any_array = hnp.arrays(
    dtype=st.sampled_from([np.float32, np.float64, np.float16, np.int64, np.int8, np.bool_, np.complex64, "U3"]),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, max_side=6),
)


@st.composite
def any_tensors(draw):
    """The tensors of a result: the right ones, with some replaced by random arrays, bytes, or values out of range."""
    arrays = arrays_like(
        LeNet5(1, 2), draw(st.floats(-(2.0**126), 2.0**126, width=32)), draw(st.integers(-(2**63), 2**63 - 1))
    )
    arrays = [np.abs(array) if array.ndim == 1 else array for array in arrays]
    if draw(st.booleans()):
        floats = [array for array in arrays if array.dtype.kind == "f"]
        draw(st.sampled_from(floats)).flat[0] = draw(st.floats(width=32))
    tensors = ndarrays_to_parameters(arrays).tensors
    for index in draw(st.lists(st.integers(0, 19), max_size=2)):
        if draw(st.booleans()):
            tensors[index] = ndarrays_to_parameters([draw(any_array)]).tensors[0]
        else:
            tensors[index] = draw(st.binary(max_size=300))
    return tensors[: draw(st.sampled_from([20, 20, 20, 19, 0]))]


any_metrics = st.fixed_dictionaries(
    {}, optional={name: st.one_of(st.floats(0, 10), anything) for name in [*FIT_METRICS, "error", "extra"]}
)
any_result = st.tuples(any_tensors(), st.one_of(st.integers(-1, 2**63 - 1), anything), any_metrics)
good_metrics = st.builds(
    lambda extra, good: {**extra, **good},
    extras,
    st.fixed_dictionaries({n: st.floats(0, 1 if n.endswith("accuracy") else 1e308) for n in FIT_METRICS}),
)
likely_result = st.tuples(any_tensors(), st.integers(1, 2**63 - 1), good_metrics)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(results=st.lists(st.one_of(any_result, likely_result), min_size=1, max_size=4))
@pytest.mark.parametrize("cls", STRATEGIES.values())
def test_whatever_clients_send_the_global_model_stays_finite(tmp_path_factory, cls, results):
    strategy = cls(LeNet5(1, 2), tmp_path_factory.mktemp("fuzz") / "server.ptl")
    sent = [
        (Proxy(cid), FitRes(OK, Parameters(tensors, "numpy.ndarray"), num_examples, metrics))
        for cid, (tensors, num_examples, metrics) in enumerate(results)
    ]
    parameters, metrics = strategy.aggregate_fit(1, sent, [])
    strategy.aggregate_evaluate(1, [(Proxy(0), EvaluateRes(OK, results[0][2].get("extra", 0), 1, results[0][2]))], [])
    strategy.close()
    if parameters is None:
        assert not strategy.record.path.exists()
        return
    for array, like in zip(parameters_to_ndarrays(parameters), get_arrays(LeNet5(1, 2)), strict=True):
        assert array.shape == like.shape and array.dtype == like.dtype and np.isfinite(array).all()
    assert all(math.isfinite(value) for value in metrics.values())
    saved = torch.load(strategy.record.path, weights_only=True)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


NONSENSE = {
    "text": "pi3",
    "bytes": b"pi3",
    "bool": True,
    "inf": math.inf,
    "nan": math.nan,
    "numpy": np.float32(1.5),
    "array": np.ones(3),
    "large": 2**63 - 1,
    "huge": 10**400,
    "endless": 10**5000,
    "list": [1, [2, {"three": None}]],
    "nothing": None,
}


@pytest.mark.parametrize("kind", [*NONSENSE, "inf and -inf", "many"])
def test_further_metrics_of_any_kind_end_nothing_and_are_in_no_mean(fedavg, drops, kind, tmp_path):
    logged = []
    fedavg.record.on_saved = [lambda row, clients: logged.append(as_curves(row, clients))]
    extras = [{"extra": NONSENSE.get(kind)}] * 2
    if kind == "inf and -inf":
        extras = [{"extra": math.inf}, {"extra": -math.inf}]
    if kind == "many":
        extras = [{f"extra {n}": n for n in range(20_000)}] * 2
    arrays = arrays_like(fedavg.model, 1.0)
    fit = [fit_result(cid, arrays, metrics={**extra, **METRICS}) for cid, extra in enumerate(extras)]
    evaluate = [evaluate_result(cid, metrics={**extra, **GLOBAL_METRICS}) for cid, extra in enumerate(extras)]
    parameters, metrics = fedavg.aggregate_fit(1, fit, [])
    assert metrics == METRICS and (parameters_to_ndarrays(parameters)[0] == 1.0).all()
    assert fedavg.aggregate_evaluate(1, evaluate, []) == (1.0, GLOBAL_METRICS)
    fedavg.close()
    assert drops == []
    names = {f"clients/{cid}/{name}" for cid in (0, 1) for name in {**METRICS, **GLOBAL_METRICS}}
    (figures,) = logged
    means = {*METRICS, *GLOBAL_METRICS}
    sections = {"/".join(name.rsplit("_", 1)) for name in means} | {"system/num_clients", "system/failures"}
    assert set(figures) == names | means | sections | {"round", "num_clients", "failures"}
    row = pd.read_csv(tmp_path / "history.csv").iloc[0]
    assert row["fit_loss"] == 1.5 and row["clients"] == 2


def test_only_finite_numbers_that_all_have_are_in_a_mean():
    values = {"number": 1, "none": None, "missing": 2.0, **NONSENSE}
    means = metrics_aggregation_fn([(1, values), (3, {n: v for n, v in values.items() if n != "missing"})])
    assert means == {"number": 1.0, "large": 2.0**63}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_known_metric_of_any_other_kind_is_dropped(fedavg, drops, kind):
    if kind == "large":
        return  # it is a number
    arrays = arrays_like(fedavg.model, 1.0)
    assert fedavg.aggregate_fit(1, [fit_result(0, arrays, metrics={**METRICS, "fit_loss": NONSENSE[kind]})], []) == (
        None,
        {},
    )
    fedavg.aggregate_evaluate(
        1, [evaluate_result(0, metrics={**GLOBAL_METRICS, "global_eval_loss": NONSENSE[kind]})], []
    )
    assert fedavg.aggregate_fit(1, [fit_result(0, arrays, metrics=NONSENSE[kind])], []) == (None, {})
    assert fedavg.aggregate_fit(1, [fit_result(0, arrays, NONSENSE[kind])], []) == (None, {})
    assert fedavg.aggregate_fit(1, [fit_result(0, arrays, metrics={"error": NONSENSE[kind]})], []) == (None, {})
    assert [len(str(why)) < 300 for _, _, why in drops] == [True] * 5


# ---------------------------------------------------------------------------------------------------------------------
# The other strategies.


def make(cls, tmp_path, **kwargs):
    strategy = cls(LeNet5(1, 2), tmp_path / "server.ptl", **kwargs)
    strategy.close()  # these tests need no record
    strategy.record.add = lambda *finished: None
    return strategy


def random_updates(model, num_clients, seed=0):
    rng, updates = np.random.default_rng(seed), []
    for _ in range(num_clients):
        arrays = [np.abs(rng.normal(size=array.shape)).astype(array.dtype) for array in get_arrays(model)]
        updates.append([rng.integers(0, 1000, a.shape) if a.dtype.kind == "i" else a for a in arrays])
    return updates


def aggregate(strategy, updates):
    results = [fit_result(cid, arrays, 10 + cid) for cid, arrays in enumerate(updates)]
    return parameters_to_ndarrays(strategy.aggregate_fit(1, results, [])[0])


def assert_close(arrays, expected, updates):
    """`expected` is of the floats; integers are the mean, weighted by examples, under each strategy."""
    for array, value, *sent in zip(arrays, expected, *updates, strict=True):
        assert array.dtype == sent[0].dtype and array.shape == sent[0].shape
        if array.dtype.kind == "i":
            value = np.rint(np.average(np.stack(sent), axis=0, weights=range(10, 10 + len(sent))))
        np.testing.assert_allclose(array, value, rtol=1e-6)


def stacks(updates):
    return [np.stack(arrays).astype(np.float64) for arrays in zip(*updates, strict=True)]


@pytest.mark.parametrize("num_clients", [1, 2, 3, 4, 9])
def test_median_is_numpys(tmp_path, num_clients):
    strategy = make(FedMedian, tmp_path)
    updates = random_updates(strategy.model, num_clients)
    assert_close(aggregate(strategy, updates), [np.median(stack, axis=0) for stack in stacks(updates)], updates)


@pytest.mark.parametrize("num_clients, cut", [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (9, 1), (10, 2), (20, 4)])
def test_trimmed_mean_leaves_out_the_extremes(tmp_path, num_clients, cut):
    strategy = make(FedTrimmedAvg, tmp_path)
    updates = random_updates(strategy.model, num_clients)
    means = [np.sort(stack, axis=0)[cut : num_clients - cut].mean(0) for stack in stacks(updates)]
    assert_close(aggregate(strategy, updates), means, updates)


@pytest.mark.parametrize("num_clients, num_liars", [(3, 1), (4, 1), (5, 1), (7, 2), (10, 3)])
def test_krum_is_the_mean_of_the_models_that_are_close_to_each_other(tmp_path, num_clients, num_liars):
    strategy = make(Krum, tmp_path)
    updates = random_updates(strategy.model, num_clients)
    liars, honest = updates[:num_liars], updates[num_liars:]
    for liar, arrays in enumerate(liars):
        for array in arrays:
            array *= 1 if array.dtype.kind == "i" else 10 + liar
    expected = [np.average(stack, axis=0, weights=range(10 + num_liars, 10 + num_clients)) for stack in stacks(honest)]
    assert_close(aggregate(strategy, updates), expected, updates)


def test_a_count_of_batches_does_not_make_a_device_an_outlier_for_krum(tmp_path):
    strategy = make(Krum, tmp_path, num_clients_to_keep=1)
    sent = [(1, 1), (1.1, 9**9), (1.2, 1), (5, 1), (6, 1)]
    updates = [arrays_like(strategy.model, value, num_batches) for value, num_batches in sent]
    arrays = aggregate(strategy, updates)
    assert (arrays[0] == np.float32(1.1)).all()  # the middle of those that are close


def test_options_that_are_given_are_taken(tmp_path):
    updates = random_updates(LeNet5(1, 2), 5)
    (tmp_path / "trimmed").mkdir()
    trimmed = aggregate(make(FedTrimmedAvg, tmp_path / "trimmed", beta=0.4), updates)
    assert_close(trimmed, [np.median(stack, axis=0) for stack in stacks(updates)], updates)
    krum = aggregate(make(Krum, tmp_path, num_malicious_clients=1, num_clients_to_keep=1), updates)
    floats = [place for place, array in enumerate(krum) if array.dtype.kind == "f"]
    assert any(all((krum[place] == update[place]).all() for place in floats) for update in updates)


def test_krum_takes_no_part_of_too_few_results(tmp_path, drops):
    strategy = make(Krum, tmp_path, on_drop=lambda *drop: drops.append(drop))
    updates = random_updates(strategy.model, 2)
    results = [fit_result(cid, arrays) for cid, arrays in enumerate(updates)]
    assert strategy.aggregate_fit(1, results, []) == (None, {})
    assert [(cid, str(why)) for _, cid, why in drops] == [(c, "2 results are too few, 3 are needed") for c in "01"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_huge_values_stay_within_what_was_sent(tmp_path, name):
    strategy = make(STRATEGIES[name], tmp_path)
    huge = arrays_like(strategy.model, np.finfo(np.float32).max, num_batches=2**63 - 1)
    for array, sent in zip(aggregate(strategy, [huge] * 4), huge, strict=True):
        assert (array == sent).all()


@pytest.fixture(scope="module")
def five_devices():
    """The loaders of five devices with 160 fit and 40 eval images of ten noisy patterns each, and a test set of 400."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(40, 215, (10, 3, 8, 8)).repeat(4, 2).repeat(4, 3)

    def draw(count, batch_size, shuffle=False):
        labels = np.arange(count) % 10
        images = np.clip(patterns[labels] + rng.normal(0, 90, (count, 3, 32, 32)), 0, 255).astype(np.uint8)
        return BatchLoader(Images(torch.from_numpy(images), torch.from_numpy(labels)), batch_size, shuffle)

    return [{"fit": draw(160, 32, shuffle=True), "eval": draw(40, 64)} for _ in range(5)], {"test": draw(400, 200)}


class Images:
    """Images and labels in memory, as BatchLoader takes them."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)


def accuracy_after(cls, tmp_path, five_devices, liar, num_rounds=10):
    """The mean test accuracy of the last 3 rounds; where `liar` is set, device 2 sends its parameters times 1e6."""
    torch.manual_seed(0)
    loaders, test = five_devices
    model, accuracies = LeNet5(3, 10), []
    strategy = cls(model, tmp_path / "server.ptl")
    current = get_arrays(model)
    for current_round in range(1, num_rounds + 1):
        results = []
        for cid, shard in enumerate(loaders):
            set_arrays(model, current)
            metrics = client_fit_fn(shard, model, training_verbose=False, lr=1e-3)
            arrays = get_arrays(model)
            if cid == 2 and liar:
                arrays = [(array * 1e6).astype(array.dtype) for array in arrays]
                metrics = METRICS
            results.append(fit_result(cid, arrays, 160, metrics))
        parameters, _ = strategy.aggregate_fit(current_round, results, [])
        if parameters is not None:
            current = parameters_to_ndarrays(parameters)
        set_arrays(model, current)
        accuracies.append(server_test_fn(test, model)["test_accuracy"])
    strategy.close()
    return np.mean(accuracies[-3:])


@pytest.mark.parametrize("name", STRATEGIES)
def test_one_of_five_devices_that_sends_nonsense(tmp_path_factory, five_devices, name):
    accuracies = [
        accuracy_after(STRATEGIES[name], tmp_path_factory.mktemp("attack"), five_devices, liar)
        for liar in (False, True)
    ]
    assert accuracies[0] > 0.9
    assert accuracies[1] > accuracies[0] - 0.02


# ---------------------------------------------------------------------------------------------------------------------
# Results that are far outside.


class Manager:
    """Clients by cid, as Flower's strategies ask for them."""

    def __init__(self, num_clients):
        self.clients = [Proxy(cid) for cid in range(num_clients)]

    def num_available(self):
        return len(self.clients)

    def sample(self, num_clients, min_num_clients=None, criterion=None):
        return self.clients


class Devices:
    """Devices with these shards, which train for a strategy as client.py does."""

    def __init__(self, folder, shards, **config):
        self.drops, self.shards, self.model = [], shards, LeNet5(3, 10)
        self.strategy = FedAvg(
            LeNet5(3, 10),
            folder / "server.ptl",
            on_drop=lambda *drop: self.drops.append(drop),
            on_fit_config_fn=lambda current: config,
            min_available_clients=1,
        )
        self.strategy.close()  # these tests need no record
        self.strategy.record.add = lambda *finished: None
        self.parameters = self.strategy.initialize_parameters(None)

    def train(self, current):
        """The arrays that each device sends in the round `current`."""
        sent, instructions = [], self.strategy.configure_fit(current, self.parameters, Manager(len(self.shards)))
        for (_, ins), shard in zip(instructions, self.shards, strict=True):
            set_arrays(self.model, parameters_to_ndarrays(ins.parameters))
            client_fit_fn(shard, self.model, training_verbose=False, **ins.config)
            sent.append(get_arrays(self.model))
        return sent

    def aggregate(self, current, sent):
        sizes = [len(shard["fit"].dataset) for shard in self.shards]
        results = [fit_result(cid, arrays, sizes[cid]) for cid, arrays in enumerate(sent)]
        self.parameters = self.strategy.aggregate_fit(current, results, [])[0] or self.parameters


@pytest.fixture(scope="module")
def shards():
    """Shards by name: usual ones, one of two images, one of one class, and a black one with one label."""
    rng = np.random.default_rng(0)

    def loaders(num_images, classes=10, level=255):
        labels = torch.from_numpy(rng.integers(0, classes, num_images))
        images = torch.from_numpy(rng.integers(0, level, (num_images, 3, 32, 32), np.uint8)) // 2
        images += 12 * labels.view(-1, 1, 1, 1).to(torch.uint8)
        few = BatchLoader(Images(images[:2], labels[:2]), 64)
        return {"fit": BatchLoader(Images(images, labels), 32, shuffle=True), "eval": few}

    kinds = {"usual": (128,), "other": (96,), "tiny": (2,), "one class": (64, 1), "black": (64, 1, 1)}
    return {name: loaders(*kind) for name, kind in kinds.items()}


FEDPROX = {"lr": 0.1, "num_epochs": 3, "proximal_mu": 10.0}


@pytest.mark.parametrize("config", [{"lr": 1e-5}, {"lr": 1e-3}, {"lr": 0.1}, FEDPROX], ids=str)
def test_no_honest_result_is_far_outside(tmp_path, shards, config):
    torch.manual_seed(0)
    for names in (["usual"], ["tiny", "usual"], ["tiny", "black", "usual"], ["one class", "black"], ["tiny", "tiny"]):
        devices = Devices(tmp_path, [shards[name] for name in names], **config)
        for current in (1, 2):
            devices.aggregate(current, devices.train(current))
        assert devices.drops == [], names


def test_no_step_of_adam_is_longer_than_is_let_pass():
    """The longest is where late gradients are each 0.999 / 0.9 of the one before: 7.3 learning rates, by a proof."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer, longest = Adam([parameter], lr=0.1), 0.0
    for step in range(-3000, 150):
        before = parameter.item()
        parameter.grad = torch.full((1,), 1e-7 * (0.999 / 0.9) ** step if step >= 0 else 0.0)
        optimizer.step()
        longest = max(longest, abs(parameter.item() - before) / 0.1)
    assert 6 < longest < 7.3
    assert reaches([np.zeros(1, np.float32)], [True], 6, 0.1)[0] == pytest.approx(10 * 0.1 * 6)


def flip(arrays, name, bit):
    """The arrays with one bit of the exponent of one value flipped, 0 its lowest."""
    index = list(LeNet5(3, 10).state_dict()).index(name)
    arrays[index] = arrays[index].copy()
    arrays[index].reshape(-1).view(np.uint32)[:1] ^= np.uint32(1 << (23 + bit))
    return arrays


LIES = {
    "3e38": lambda arrays: [np.full_like(a, 3e38) if a.dtype.kind == "f" else a for a in arrays],
    "bit of a weight": lambda arrays: flip(arrays, "layer1.0.weight", 7),
    "bit of a bias": lambda arrays: flip(arrays, "classifier.bias", 7),
    "bit of a variance": lambda arrays: flip(arrays, "layer2.1.running_var", 7),
    "bit of a mean": lambda arrays: flip(arrays, "layer1.1.running_mean", 7),
    "count": lambda arrays: [a if a.dtype.kind == "f" else np.full_like(a, 2**63 - 1) for a in arrays],
    "a million": lambda arrays: [(a * 1e6).astype(a.dtype) for a in arrays],
}


@pytest.mark.parametrize("num_clients, liars", [(1, [0]), (2, [1]), (3, [0, 2]), (4, [2])])
def test_a_result_that_is_far_outside_is_dropped_and_the_others_are_not(tmp_path, shards, num_clients, liars):
    torch.manual_seed(0)
    devices = Devices(tmp_path, [shards["usual"], shards["other"], shards["tiny"], shards["one class"]], lr=1e-3)
    del devices.shards[num_clients:]
    devices.aggregate(1, devices.train(1))
    sent = devices.train(2)
    for name, lie in LIES.items():
        devices.drops.clear()
        devices.aggregate(2, [lie(list(arrays)) if cid in liars else arrays for cid, arrays in enumerate(sent)])
        assert [int(cid) for _, cid, _ in devices.drops] == liars, name
        assert all("far outside" in str(why) for _, _, why in devices.drops)


def test_where_all_move_far_none_is_far_outside(fedavg, drops):
    """As with another optimizer than ours."""
    fedavg.config = {"lr": 1e-3}
    far = [fit_result(cid, arrays_like(fedavg.model, value)) for cid, value in ((0, 500.0), (1, 900.0), (2, 9e5))]
    parameters, _ = fedavg.aggregate_fit(1, far, [])
    assert (parameters_to_ndarrays(parameters)[0] == 700.0).all() and [cid for _, cid, _ in drops] == ["2"]


# ---------------------------------------------------------------------------------------------------------------------
# The record.


def earlier_run(folder, last_round):
    return Earlier(folder, read_history(folder, last_round))


def recorded(path, **options):
    """FedAvg with a record of its own options."""
    model = LeNet5(1, 2)
    return FedAvg(model, record=Record(model, path, **options))


def run_round(strategy, current, value=1.0):
    strategy.started = time.monotonic()
    strategy.aggregate_fit(current, [fit_result(cid, arrays_like(strategy.model, value)) for cid in (0, 1)], [])
    strategy.aggregate_evaluate(current, [evaluate_result(0), evaluate_result(1)], [])


def test_a_round_is_recorded_with_its_failures(tmp_path):
    rows = []
    strategy = recorded(tmp_path / "server.ptl", on_saved=[lambda row, clients: rows.append(row)])
    failures = [RuntimeError("gone"), (Proxy(5), FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "no"), None, 0, {}))]
    strategy.aggregate_fit(1, [fit_result(0, arrays_like(strategy.model, 1.0)), fit_result(1, [])], failures)
    strategy.aggregate_evaluate(1, [evaluate_result(0, 10), evaluate_result(1, 0)], [])
    strategy.close()
    row = pd.read_csv(tmp_path / "history.csv").iloc[0]
    assert row["clients"] == 1 and row["failures"] == 4  # two that failed, two that were dropped
    assert row["fit_loss"] == 1.5 and row["global_eval_loss"] == 1.0 and np.isnan(row["test_loss"])
    assert len(rows) == 1 and rows[0]["round"] == 1


def test_rounds_keep_their_order_and_each_checkpoint_its_round(tmp_path):
    strategy = recorded(tmp_path / "server.ptl", about={"dataset": "D"})
    for current in range(1, 31):
        run_round(strategy, current, value=float(current))
    strategy.close()
    assert list(pd.read_csv(tmp_path / "history.csv")["round"]) == list(range(1, 31))
    checkpoint = torch.load(tmp_path / "server.ptl", weights_only=True)
    assert checkpoint["round"] == 30 and checkpoint["dataset"] == "D"
    assert (checkpoint["model"]["layer1.0.weight"] == 30).all()
    assert checkpoint["metrics"]["fit_loss"] == 1.5 and checkpoint["metrics"]["test_loss"] is None


def test_the_next_round_does_not_wait_for_the_test_of_the_last(tmp_path):
    release = threading.Event()

    def slow_images():
        release.wait(10)
        yield torch.zeros(2, 1, 32, 32), torch.tensor([0, 1])

    class Loader:
        def __iter__(self):
            return slow_images()

        def __len__(self):
            return 1

    strategy = recorded(tmp_path / "server.ptl", test=GlobalTest(functools.partial(server_test_fn, {"test": Loader()})))
    started = time.monotonic()
    run_round(strategy, 1)
    run_round(strategy, 2)
    assert time.monotonic() - started < 5 and not (tmp_path / "history.csv").exists()
    release.set()
    strategy.close()
    history = pd.read_csv(tmp_path / "history.csv")
    assert list(history["round"]) == [1, 2] and history["test_loss"].notna().all()
    assert torch.load(tmp_path / "best.ptl", weights_only=True)["round"] == 1  # the same model twice: the first is best


def test_going_on_drops_rows_after_the_checkpoint_and_keeps_the_best(tmp_path):
    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl")
    for current in (1, 2, 3):
        run_round(strategy, current)
    strategy.close()
    strategy = recorded(tmp_path / "server.ptl", earlier=earlier_run(tmp_path, 2))  # killed before round 3's checkpoint
    run_round(strategy, 3)
    strategy.close()
    assert list(pd.read_csv(tmp_path / "history.csv")["round"]) == [1, 2, 3]


def test_what_fails_in_the_worker_reaches_the_server(tmp_path):
    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl")
    run_round(strategy, 1)
    strategy.close()
    strategy = recorded(tmp_path / "server.ptl", earlier=earlier_run(tmp_path, 1))
    (tmp_path / ".history.csv.part").mkdir()  # nothing can be written under that name now
    run_round(strategy, 2)
    with pytest.raises(OSError):
        strategy.close()
    assert torch.load(tmp_path / "server.ptl", weights_only=True)["round"] == 1


def test_it_runs_under_flowers_own_server_too(tmp_path):
    from flwr.server import Server, SimpleClientManager
    from flwr.server.client_proxy import ClientProxy

    class Trainer(ClientProxy):
        def fit(self, ins, timeout, group_id):
            return fit_result(self.cid, [a + 1 for a in parameters_to_ndarrays(ins.parameters)])[1]

        def evaluate(self, ins, timeout, group_id):
            return evaluate_result(self.cid)[1]

        get_properties = get_parameters = reconnect = None

    manager = SimpleClientManager()
    for cid in ("0", "1"):
        manager.register(Trainer(cid))
    model = LeNet5(1, 2)
    strategy = FedAvg(model, tmp_path / "server.ptl")
    Server(client_manager=manager, strategy=strategy).fit(2, None)
    strategy.close()
    checkpoint = torch.load(tmp_path / "server.ptl", weights_only=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(checkpoint["model"][name], tensor + 2)
    assert list(pd.read_csv(tmp_path / "history.csv")["round"]) == [1, 2]


def test_a_model_whose_test_loss_is_not_finite_is_not_kept_and_its_round_is_run_again(tmp_path, capsys, monkeypatch):
    """Each round's devices make of the model n the model n + 1; some of their tests fail."""
    from plumbing.laptop.asking import Absences
    from plumbing.laptop.ending import Hopeless, Run
    from plumbing.laptop.rounds import Target

    from flwr.server import SimpleClientManager

    from server import Server

    started = []
    monkeypatch.setattr(Record, "draw", lambda self: None)  # half of the time

    class Trainer(Proxy):
        def ask(self, method, ins, timeout):
            if method == "evaluate":
                return evaluate_result(self.cid)[1]
            arrays = parameters_to_ndarrays(ins.parameters)
            started.append(int(arrays[6]))  # layer1.1.num_batches_tracked
            return fit_result(self.cid, [array + 1 for array in arrays])[1]

    class Clients(SimpleClientManager):
        def wait_for_round(self, min_clients, check):
            check()

    class Loader:
        def __init__(self, bad):
            self.bad, self.count = bad, 0

        def __iter__(self):
            self.count += 1
            time.sleep(0.1)  # the next rounds have begun by then
            yield torch.full((2, 1, 32, 32), math.nan if self.count in self.bad else 0.5), torch.tensor([0, 1])

        def __len__(self):
            return 1

    def run(name, bad, target=None):
        started.clear()
        manager, rows = Clients(), []
        manager.register(Trainer("0"))
        path = tmp_path / name / "server.ptl"
        enough = dict.fromkeys(("min_fit_clients", "min_evaluate_clients", "min_available_clients"), 1)
        model = LeNet5(1, 2)
        test = GlobalTest(functools.partial(server_test_fn, {"test": Loader(bad)}))
        kept = Record(model, path, test=test, on_saved=[lambda row, clients: rows.append(row)])
        strategy = FedAvg(model, record=kept, **enough)
        try:
            parts = Run(manager, strategy, None, None, None)
            Server(parts, 1, None, Target(target), Absences((), lambda *told: None)).fit(5, None)
        finally:
            strategy.close()
        return [row["round"] for row in rows], torch.load(path, weights_only=True)

    rounds, checkpoint = run("some", [3, 6])  # the third test, of round 3, and the sixth, of round 5: the last
    assert rounds == [1, 2, 3, 4, 5] == list(pd.read_csv(tmp_path / "some/history.csv")["round"])
    assert checkpoint["round"] == 5 and checkpoint["model"]["layer1.1.num_batches_tracked"] == 5
    assert started[:3] == [0, 1, 2] and started[-2:] == [4, 4] and started.count(2) == 2
    out = capsys.readouterr().out
    for current in (3, 5):
        line = f"the test_loss of round {current} is nan: its model is not kept; the round is run again\n"
        assert out.count(line) == 1
    assert run("target", [2, 4], target=0.0)[0] == [1, 2, 3]
    with pytest.raises(Hopeless, match="round 3 is nan.* 5 times .*rounds 1 to 2 are saved"):
        run("always", range(3, 100))
    assert torch.load(tmp_path / "always/server.ptl", weights_only=True)["round"] == 2
