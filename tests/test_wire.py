"""What crosses the wire: a model once, shrunk where --compress says so; nonsense is dropped, nothing else changes."""

import re

from plumbing.common import wire
from plumbing.common.state import float32_weights, get_arrays

import numpy as np
import pytest
import torch
from flwr.common import Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from helpers import history, lines, start_patched, wait_until

from nets import LeNet5

# A client that prints the bytes of every message with parameters, and a digest of those that it then has.
TELLING = """
import hashlib
from plumbing.common.frames import decode
from plumbing.common.wire import Holder
from plumbing.device.connection import Session
real_answer, real_unpack = Session.answer, Holder.unpack
def answer(self, frame):
    reply = real_answer(self, frame)
    kind = decode(frame)[0]["kind"]
    if kind in ("fit", "evaluate"):
        print("wire", kind, len(frame), len(reply), flush=True)
    return reply
def unpack(self, parameters):
    plain = real_unpack(self, parameters)
    print("has", hashlib.sha256(b"".join(plain.tensors)).hexdigest()[:12], flush=True)
    return plain
Session.answer, Holder.unpack = answer, unpack
"""
SIZE = 248392  # of LeNet5's arrays


def sizes(client):
    """[(question, bytes down, bytes up), …] of all messages with parameters."""
    told = [line.split()[1:] for line in lines(client, "wire ")]
    return [(kind, int(down), int(up)) for kind, down, up in told]


def train(suite, patches, *args, num_rounds=3):
    """A run with a client for each of the `patches`: (server, clients)."""
    about = ("--num_clients", len(patches), "--num_rounds", num_rounds, "--dataset", "Tiny", "--seed", 7)
    server = suite.server(*about, *args)
    clients = [
        start_patched(suite, "client", TELLING + patch, "--cid", cid, "--num_threads", 1)
        for cid, patch in enumerate(patches)
    ]
    for process in (*clients, server):
        assert process.wait() == 0, process
    return server, clients


def final_model(suite):
    return torch.load(suite.ckps("Tiny") / "server.ptl", weights_only=True)["model"]


def test_model_goes_down_once_and_compressed_runs_learn_as_well(tiny):
    runs = {}
    for name, *args in (("once",), ("fp16", "--compress", "fp16"), ("int8", "--compress", "int8")):
        _, clients = train(tiny, ["", ""], *args)
        has = [re.findall("has (.*)", client.out) for client in clients]
        runs[name] = (
            final_model(tiny),
            history(tiny).drop(columns=["round_seconds", "finished_at"]),
            has,
            sizes(clients[0]),
        )
    _, rows, (has, other_has), once = runs["once"]
    assert has == other_has and has[1] == has[2]  # a model that is held is the one that would be sent
    assert [kind for kind, _, _ in once] == ["fit", "evaluate"] * 3
    assert [down > SIZE for _, down, _ in once] == [True, True, False, True, False, True]
    assert max(down for _, down, _ in once[2::2]) < 500
    for name, share in (("fp16", 0.5), ("int8", 0.25)):
        model, compressed, _, told = runs[name]
        assert list(compressed["clients"]) == [2] * 3 and list(compressed["failures"]) == [0] * 3
        for figure in ("fit_loss", "global_eval_loss", "test_loss"):
            np.testing.assert_allclose(compressed[figure], rows[figure], rtol=0.02)
        assert max(up for kind, _, up in told if kind == "fit") < share * SIZE + 2500
        assert all(down < share * SIZE + 2500 for _, down, _ in told[1:])  # the first model goes whole
        assert {tensor.dtype for tensor in model.values()} == {torch.float32, torch.int64}
        weights = model["layer3.0.weight"]
        assert not torch.equal(weights.half().float(), weights)  # the server's own mean is not rounded


def test_one_that_is_back_gets_the_model_whole(tiny):
    server = tiny.server("--num_clients", 1, "--num_rounds", 200, "--dataset", "Tiny", "--compress", "int8")
    first = start_patched(tiny, "client", TELLING, "--cid", 0, "--num_threads", 1)
    wait_until("rounds", lambda: len(sizes(first)) >= 4)
    first.kill()
    second = start_patched(tiny, "client", TELLING, "--cid", 0, "--num_threads", 1)
    wait_until("rounds", lambda: len(sizes(second)) >= 4)
    assert [down > SIZE for _, down, _ in sizes(second)[:4]] == [True, False, False, False]
    assert sizes(second)[2][1] < 500
    server.kill()
    assert not lines(server, "malformed")


BREAKS = [  # what is wrong with the tensors that a device sends, or with its net; and the reason that the server gives
    ("tensors[0] = tensors[0][:7]", "malformed answer: an array of 7 bytes is cut off"),
    ("tensors[0] = tensors[0][:31]", "malformed answer: "),
    ("tensors[0] = tensors[0][:4] + b'\\xff' + tensors[0][5:]", "malformed answer: "),
    ("tensors[0] = b'int8' + tensors[0]", "malformed answer: "),
    ("tensors[0] = tensors[1]", r"malformed answer: a difference of shape \(6,\) to float32 \(6, 3, 5, 5\)"),
    ("tensors.append(tensors[0])", "malformed answer: a difference to nothing that was sent"),
    ("del tensors[-1]", "19 arrays, not 20"),
    ("tensors[1] = tensors[1][:9] + b'\\0\\0\\xc0\\x7f' + tensors[1][13:]", "not finite"),
    ("value = float('nan')", "array classifier.bias has values that are not finite"),
    ("value = float('-inf')", "array classifier.bias has values that are not finite"),
]
BREAKING = """
import torch
from plumbing.common.wire import Holder
real_pack, real_fit, turn, value = Holder.pack, script.client_fit_fn, 0, None
def fit(loaders, model, **kwargs):
    global turn, value
    turn, value = turn + 1, None
    metrics = real_fit(loaders, model, **kwargs)
    if breaks[turn - 1].startswith("value"):
        exec(breaks[turn - 1], globals())
        with torch.no_grad():
            model.classifier.bias[0] = value
    return metrics
def pack(self, parameters):
    tensors = list(real_pack(self, parameters).tensors)
    exec(breaks[turn - 1])
    return type(parameters)(tensors, "fp16")
Holder.pack, script.client_fit_fn = pack, fit
"""


@pytest.mark.parametrize("compress", ["fp16", "int8"])
def test_malformed_payloads_are_dropped_with_their_reasons(tiny, compress):
    breaks, reasons = zip(*BREAKS)
    patch = f"breaks = {list(breaks)!r}{BREAKING}"
    server, _ = train(tiny, ["", patch], "--compress", compress, num_rounds=len(breaks))
    for current, reason in enumerate(reasons, start=1):
        assert re.search(f"round {current}: dropped cid 1: .*{reason}", server.out), (current, server)
    rows = history(tiny)
    assert list(rows["failures"]) == list(rows["clients"]) == [1] * len(breaks)
    assert np.isfinite(rows["test_loss"]).all()


def test_compress_that_could_do_nothing_is_refused(tiny):
    nets = tiny.root / "nets.py"
    before, after = nets.read_text().split("NETS = ")
    double = "class Double(LeNet5):\n    def __init__(self, *args):\n        super().__init__(*args), self.double()\n"
    nets.write_text(f"{before}{double}NETS = {after}".replace("(LeNet5, GroupNet)", "(LeNet5, GroupNet, Double)"))
    server = tiny.server("--dataset", "Tiny", "--net", "Double", "--compress", "fp16")
    assert server.wait() == 2
    assert server.err == "server.py: --compress fp16 is for float32 parameters, and Double has none\n"


# ---------------------------------------------------------------------------------------------------------------------
# The arrays themselves, beside numpy's own float16 and sums by hand.


KINDS = pytest.mark.parametrize("compress", ["fp16", "int8"])


def through(array, base, compress):
    """How many bytes the array is on the wire, and what arrives."""
    base = wire.write_npy(base)
    sent = wire.to_difference(wire.write_npy(array), base, compress)
    return len(sent), wire.read_npy(wire.restore(sent, base))


@KINDS
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (4, 3, 2)])
def test_difference_is_within_half_a_step(shape, compress):
    rng = np.random.RandomState(0)
    base, array = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    size, back = through(array, base, compress)
    assert back.dtype == np.float32 and back.shape == shape
    assert size == 9 + 4 * len(shape) + array.size * (2 if compress == "fp16" else 1)
    change = np.abs(array - base)
    half = change * 2.0**-11 if compress == "fp16" else change.max(initial=0) / 254  # of a step
    assert (np.abs(back - array) <= 1.02 * half + 1e-7).all()
    assert np.array_equal(through(base, base, compress)[1], base)


@pytest.mark.parametrize("array, base", [([np.nan, 1], [0, 0]), ([3e38, 0], [-3e38, 0]), ([np.inf, 1], [0, 0])])
@KINDS
def test_difference_that_is_not_finite_crosses_as_it_is(array, base, compress):
    array, base = np.float32(array), np.float32(base)
    np.testing.assert_array_equal(through(array, base, compress)[1], array)


@KINDS
@pytest.mark.parametrize("value", [1e6, -1e30])
def test_values_beyond_float16_arrive(value, compress):
    array = np.float32([value, 1, 0])
    assert through(array, np.zeros_like(array), compress)[1][0] == pytest.approx(value, rel=1e-6)


@KINDS
@pytest.mark.parametrize("lr", [1e-4, 1e-5])
def test_weights_near_one_move_as_without_compression(compress, lr):
    """Batch norm's begin at 1, where a float16 has steps of 0.001: two devices, 20 rounds of a few steps of Adam."""
    rng = np.random.RandomState(2)
    start = np.append(np.float32([1, 1, 1, 1]), rng.normal(1, 0.1, 60)).astype(np.float32)
    moves = rng.choice([-3, -1, 1, 2, 3], (20, 2, 64)) * np.float32(lr) * rng.uniform(0.5, 1, (20, 2, 64))
    ends = {}
    for how in ("off", compress):
        holders, sender = [wire.Holder(lambda: [True]) for _ in range(2)], wire.Sender(how, [True])
        mean, held = start, None
        for round_moves in moves:
            model, locals_ = sender.model_of(ndarrays_to_parameters([mean])), []
            for holder, move in zip(holders, round_moves):
                (array,) = parameters_to_ndarrays(holder.unpack(sender.pack(model, held)))
                sent = holder.pack(ndarrays_to_parameters([(array + move).astype(np.float32)]))
                locals_.append(wire.read_npy(wire.restore_all(sent.tensors, model.tensors)[0]))
            mean, held = np.mean(locals_, axis=0, dtype=np.float64).astype(np.float32), model
        ends[how] = mean
    np.testing.assert_allclose(ends["off"], start + moves.mean(1).sum(0), atol=3e-6)  # float32's own rounding
    np.testing.assert_allclose(ends[compress], ends["off"], atol=lr / 10)


def test_what_a_difference_was_too_coarse_for_is_sent_with_the_next_ones():
    """A device that moves one value far and the other little: after 50 rounds the sum of what arrived is whole."""
    base = ndarrays_to_parameters([np.zeros(2, np.float32)])
    holder, sender = wire.Holder(lambda: [True]), wire.Sender("int8", [True])
    model, arrived = sender.model_of(base), np.zeros(2)
    for turn in range(50):
        holder.unpack(sender.pack(model, model if turn else None))
        sent = holder.pack(ndarrays_to_parameters([np.float32([1, 0.001])]))
        arrived += wire.read_npy(wire.restore_all(sent.tensors, model.tensors)[0])
    np.testing.assert_allclose(arrived, [50, 0.05], atol=1 / 127)


def test_arrays_cross_without_the_header_that_both_ends_have():
    arrays = [*get_arrays(LeNet5(3, 10)), np.array(3), np.zeros((0, 2), np.float16)]
    sender, holder = wire.Sender(), wire.Holder(lambda: [])
    first = sender.model_of(ndarrays_to_parameters(arrays))
    holder.unpack(sender.pack(first, None))
    second = sender.model_of(ndarrays_to_parameters([array + 1 for array in arrays]))
    down = sender.pack(second, first)
    up = holder.pack(holder.unpack(down))
    for sent in (down, up):
        assert [len(data) for data in sent.tensors] == [4 + array.nbytes for array in arrays]
        for restored, array in zip(wire.restore_all(sent.tensors, first.tensors), arrays, strict=True):
            np.testing.assert_array_equal(wire.read_npy(restored), array + 1, strict=True)
    others = [array.reshape(-1, 1).astype(np.float64) for array in arrays]  # which the checks of the server are to see
    sent = holder.pack(ndarrays_to_parameters(others)).tensors
    for restored, array in zip(wire.restore_all(sent, second.tensors), others, strict=True):
        np.testing.assert_array_equal(wire.read_npy(restored), array, strict=True)


def test_buffers_and_integers_are_not_shrunk_and_tied_parameters_are():
    model = LeNet5(3, 10)
    names = [name for name, is_learned in zip(model.state_dict(), float32_weights(model)) if not is_learned]
    assert names == [f"layer{k}.1.{n}" for k in (1, 2) for n in ("running_mean", "running_var", "num_batches_tracked")]
    tied = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double())
    tied.append(tied[0])
    assert float32_weights(tied) == [True, True, False, False, True, True]


def test_chain_of_differences_stays_where_both_ends_are():
    """Twenty models, each sent as the difference to the one before: the device has what the server takes it to have."""
    rng = np.random.RandomState(1)
    arrays = get_arrays(LeNet5(3, 10))
    marks = float32_weights(LeNet5(3, 10))
    sender, holder, held = wire.Sender("int8", marks), wire.Holder(lambda: marks), None
    for turn in range(20):
        arrays = [a + rng.normal(size=a.shape).astype(a.dtype) * a.dtype.type(0.01) for a in arrays]
        model = sender.model_of(ndarrays_to_parameters(arrays))
        packed = sender.pack(model, held)
        assert (sum(map(len, packed.tensors)) < 0.3 * SIZE) is (turn > 0)
        plain, held = holder.unpack(packed), model
        assert plain.tensors == model.tensors
        assert sender.model_of(ndarrays_to_parameters(arrays)) is model  # asked for again, it is the same
    for mine, theirs in zip(parameters_to_ndarrays(plain), arrays):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, atol=0.001)


def test_name_of_a_model_that_is_not_held_is_an_error():
    with pytest.raises(ValueError, match="takes this device to hold the model 12, not None"):
        wire.Holder(lambda: []).unpack(Parameters([], "off 12"))
