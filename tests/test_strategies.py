"""What the server makes of the clients' results: means, checks, and the record, against means computed by hand."""

import math
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.common import Code, EvaluateRes, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nets import LeNet5, get_arrays
from strategies import FIT_METRICS, FedAvg, metrics_aggregation_fn

OK = Status(Code.OK, "")
METRICS = {"fit_loss": 1.5, "fit_accuracy": 0.4, "eval_loss": 1.6, "eval_accuracy": 0.3}
GLOBAL_METRICS = {"global_eval_loss": 1.0, "global_eval_accuracy": 0.5}


class Proxy:
    """Stands for a connected client, of which the strategy knows only the cid."""

    def __init__(self, cid):
        self.cid = str(cid)


def fit_result(cid, arrays, num_examples=10, metrics=METRICS):
    return Proxy(cid), FitRes(OK, ndarrays_to_parameters(arrays), num_examples, metrics)


def evaluate_result(cid, num_examples=10, metrics=GLOBAL_METRICS):
    return Proxy(cid), EvaluateRes(OK, 1.0, num_examples, metrics)


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
good_metrics = st.fixed_dictionaries({name: st.floats(0, 1e308) for name in FIT_METRICS})
likely_result = st.tuples(any_tensors(), st.integers(1, 2**63 - 1), good_metrics)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(results=st.lists(st.one_of(any_result, likely_result), min_size=1, max_size=4))
def test_whatever_clients_send_the_global_model_stays_finite(tmp_path_factory, results):
    strategy = FedAvg(LeNet5(1, 2), tmp_path_factory.mktemp("fuzz") / "server.ptl")
    sent = [
        (Proxy(cid), FitRes(OK, Parameters(tensors, "numpy.ndarray"), num_examples, metrics))
        for cid, (tensors, num_examples, metrics) in enumerate(results)
    ]
    parameters, metrics = strategy.aggregate_fit(1, sent, [])
    strategy.aggregate_evaluate(1, [(Proxy(0), EvaluateRes(OK, results[0][2].get("extra", 0), 1, results[0][2]))], [])
    strategy.close()
    if parameters is None:
        assert not (strategy.save_ckp_path).exists()
        return
    for array, like in zip(parameters_to_ndarrays(parameters), get_arrays(LeNet5(1, 2)), strict=True):
        assert array.shape == like.shape and array.dtype == like.dtype and np.isfinite(array).all()
    assert all(math.isfinite(value) for value in metrics.values())
    saved = torch.load(strategy.save_ckp_path, weights_only=True)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


# ---------------------------------------------------------------------------------------------------------------------
# The record.


def run_round(strategy, current, value=1.0):
    strategy.started = time.monotonic()
    strategy.aggregate_fit(current, [fit_result(cid, arrays_like(strategy.model, value)) for cid in (0, 1)], [])
    strategy.aggregate_evaluate(current, [evaluate_result(0), evaluate_result(1)], [])


def test_a_round_is_recorded_with_its_failures(tmp_path):
    rows = []
    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl", on_row=rows.append)
    failures = [RuntimeError("gone"), (Proxy(5), FitRes(Status(Code.FIT_NOT_IMPLEMENTED, "no"), None, 0, {}))]
    strategy.aggregate_fit(1, [fit_result(0, arrays_like(strategy.model, 1.0)), fit_result(1, [])], failures)
    strategy.aggregate_evaluate(1, [evaluate_result(0, 10), evaluate_result(1, 0)], [])
    strategy.close()
    row = pd.read_csv(tmp_path / "history.csv").iloc[0]
    assert row["clients"] == 1 and row["failures"] == 4  # two that failed, two that were dropped
    assert row["fit_loss"] == 1.5 and row["global_eval_loss"] == 1.0 and np.isnan(row["test_loss"])
    assert len(rows) == 1 and rows[0]["round"] == 1


def test_rounds_keep_their_order_and_each_checkpoint_its_round(tmp_path):
    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl", about={"dataset": "D"})
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

    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl", test_loaders={"test": Loader()})
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
    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl", last_round=2)  # killed before round 3's checkpoint
    run_round(strategy, 3)
    strategy.close()
    assert list(pd.read_csv(tmp_path / "history.csv")["round"]) == [1, 2, 3]


def test_what_fails_in_the_worker_reaches_the_server(tmp_path):
    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl")
    run_round(strategy, 1)
    strategy.close()
    strategy = FedAvg(LeNet5(1, 2), tmp_path / "server.ptl", last_round=1)
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
