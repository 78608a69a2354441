"""The server's decision on a client, without a network: each thing that may be wrong, and the reason that is given."""

import copy
import random
from types import SimpleNamespace

from plumbing import VERSION
from plumbing.common import compare
from plumbing.laptop import handshake, registry

import numpy as np
import pytest
import torch
from torch import nn

from nets import LeNet5

TASK = {
    "dataset": "Tiny",
    "dataset_id": "a1",
    "channels": 3,
    "num_classes": 10,
    "sizes": {1: (8, 2)},
    "net": "LeNet5",
    "fingerprint": "f1",
    "trial": np.array([[7, 1, -2, 3], [np.nan, 1, -2, 3]], np.float32),
}
WHO = {"cid": 1, "dataset": "Tiny", "device_id": "d", "version": VERSION}
READY = {
    "channels": 3,
    "num_classes": 10,
    "dataset_id": "a1",
    "num_fit": 8,
    "num_eval": 2,
    "fingerprint": "f1",
    "trial": TASK["trial"].tobytes(),
}


def decide(who, ready, task=TASK):
    handshake.check_client({**who, **ready}, 4, task)


def test_client_that_fits_is_admitted():
    decide(WHO, READY)


def test_outputs_may_differ_as_much_as_boards_do():
    near = TASK["trial"] * np.float32([1, *[1 + 1e-6] * 3])
    decide(WHO, {**READY, "trial": near.tobytes()})


def test_server_without_an_id_takes_any_split():
    decide(WHO, {**READY, "dataset_id": "b2"}, {**TASK, "dataset_id": None})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"cid": 4}, "cid 4 is not in 0..3"),
        ({"cid": -1}, "cid -1 is not in 0..3"),
        ({"cid": True}, "not this suite's client.py"),
        ({"cid": "1"}, "not this suite's client.py"),
        ({"device_id": 7}, "not this suite's client.py"),
        ({"dataset": "Other"}, "its dataset is Other, the server's is Tiny"),
        ({"num_classes": 11}, "its dataset has 11 classes, the server's has 10"),
        ({"channels": 1}, "its dataset has 1 colour channels, the server's has 3"),
        ({"dataset_id": "b2"}, "not of the server's split of Tiny"),
        ({"dataset_id": ""}, "not of the server's split of Tiny"),
        ({"error": "its nets.py has no net LeNet5"}, "its nets.py has no net LeNet5"),
        ({"fingerprint": "f2"}, "its fingerprint is f2, the server's is f1"),
        ({"trial": b""}, "computes something else"),
        ({"trial": b"123"}, "computes something else"),
        ({"trial": "text"}, "computes something else"),
        ({"trial": None}, "computes something else"),
        ({"trial": np.array([7, 1, -2, 3.1] * 2, "<f4").tobytes()}, "computes something else"),
        ({"trial": np.array([7, 1, -2, np.nan] * 2, "<f4").tobytes()}, "computes something else"),
        ({"trial": np.array([5, 1, -2, 3.1] * 2, "<f4").tobytes()}, "computes something else"),
        ({"num_fit": 0}, "its num_fit is 0"),
        ({"num_eval": 2.0}, "its num_eval is 2.0"),
        ({"num_fit": None}, "its num_fit is None"),
        ({"num_fit": 9}, r"it has 9 fit \+ 2 eval images, but its shard has 8 \+ 2"),
        ({"num_eval": 1}, r"it has 8 fit \+ 1 eval images"),
    ],
)
def test_client_that_does_not_fit_is_turned_away(change, reason):
    who = {name: change.get(name, value) for name, value in WHO.items()}
    ready = {**READY, **{name: value for name, value in change.items() if name not in WHO}}
    with pytest.raises(handshake.TurnedAway, match=reason) as turned_away:
        decide(who, ready)
    assert turned_away.value.cid == str(who["cid"]) and "FL-IoT" not in str(turned_away.value)


def test_client_of_another_version_is_told_both_versions():
    other = {**WHO, "version": "9.9\x1b"}
    decide(other, READY)
    with pytest.raises(handshake.TurnedAway, match=rf" \(this device runs FL-IoT 9\.9\?, the laptop {VERSION}: make"):
        decide(other, {**READY, "trial": b""})


def test_lines_that_strangers_cause_are_said_once_a_minute_for_each_reason(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(registry, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(registry, "say", said.append)
    seldom = registry.Seldom()
    for second in range(150):
        clock[0] = float(second)
        seldom.say("a", f"a at {second}")
        seldom.say("b", f"b at {second}") if second in (0, 100) else None
    more = "(59 more for this reason since it was last said)"
    assert said == ["a at 0", "b at 0", f"a at 60 {more}", "b at 100", f"a at 120 {more}"]
    for number in range(10_000):
        seldom.say(f"a reason of its own: {number}", "")
    assert len(seldom.said) == registry.REASONS and len(said) < 60
    clock[0] += 60
    assert seldom.say("a new one", "said")


@pytest.mark.parametrize("layer", ["ReLU", "MaxPool2d", "BatchNorm2d"])
def test_trial_tells_nets_of_the_same_shapes_apart(layer):
    """What lies between the parameters is another: activation, pooling, momentum."""

    def other():
        net, new = LeNet5(3, 10), {"ReLU": nn.LeakyReLU(), "MaxPool2d": nn.AvgPool2d(2)}
        for part in (net.layer1, net.layer2, net.layer3):
            for index, module in enumerate(part):
                if type(module).__name__ == layer:
                    if layer == "BatchNorm2d":
                        module.momentum = 0.2
                    else:
                        part[index] = new[layer]
        return net

    assert compare.fingerprint(other()) == compare.fingerprint(LeNet5(3, 10))
    assert_apart(LeNet5(3, 10), other(), again=LeNet5(3, 10))


class Net(nn.Module):
    """A net of whatever `parts` it is given, one after the other."""

    image_size, in_channels, num_classes = (4, 4), 1, 3

    def __init__(self, *parts, **buffers):
        super().__init__()
        self.parts = nn.Sequential(nn.Flatten(), *parts)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, images):
        return self.parts(images)


def assert_apart(net, other, again):
    """Check that `trial` tells `net` from `other` and not from `again`, and changes neither it nor later draws."""
    before, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    one, two, three = map(compare.trial, (net, other, again))
    assert compare.same_trial(three.ravel(), one) and not compare.same_trial(two.ravel(), one)
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())
    assert torch.get_rng_state().equal(random_state) and net.training


def dropping(layer, momentum=0.1):
    return Net(nn.Linear(16, 64), nn.BatchNorm1d(64, momentum=momentum), layer, nn.Linear(64, 3))


class Always(nn.Module):
    """Dropout that is on in evaluation too, by whichever generator."""

    def __init__(self, rate, draw=torch.rand):
        super().__init__()
        self.rate, self.draw = rate, draw

    def forward(self, images):
        return images * (torch.as_tensor(self.draw(images.shape[1])) > self.rate)


@pytest.mark.parametrize(
    "net, other",
    [
        (lambda: dropping(nn.Dropout(0.1)), lambda: dropping(nn.Dropout(0.9))),
        (lambda: dropping(nn.Dropout(0.1)), lambda: dropping(nn.Dropout(0.1), momentum=0.9)),
        (lambda: dropping(nn.RReLU(0.1, 0.3)), lambda: dropping(nn.RReLU(0.1, 0.9))),
        (lambda: dropping(Always(0.1)), lambda: dropping(Always(0.4))),
        (lambda: dropping(Always(0.1, np.random.rand)), lambda: dropping(Always(0.4, np.random.rand))),
        (
            lambda: dropping(Always(0.1, lambda size: [random.random() for _ in range(size)])),
            lambda: dropping(Always(0.4, lambda size: [random.random() for _ in range(size)])),
        ),
    ],
    ids=["dropout", "momentum", "rrelu", "in eval", "numpy", "python"],
)
def test_trial_of_a_net_that_is_random(net, other, monkeypatch):
    assert_apart(net(), other(), again=net())
    here, seeded = compare.trial(net()), compare.seeded
    monkeypatch.setattr(compare, "seeded", lambda seed: seeded(seed + 7))  # as a board that draws other numbers
    assert compare.same_trial(compare.trial(net()).ravel(), here)
    assert not compare.same_trial(compare.trial(dropping(nn.Dropout(0.1), momentum=0.9)).ravel(), here)


class Using(Net):
    """Puts its buffer to use, which is random from net to net."""

    def __init__(self, buffer, use):
        super().__init__(nn.Linear(16, 3), buffer=buffer)
        self.use, self.empty = use, nn.Parameter(torch.empty(0, 3))

    def forward(self, images):
        return super().forward(self.use(images.flatten(1), self.buffer))


@pytest.mark.parametrize(
    "draw, use",
    [
        (lambda: torch.randperm(16), lambda images, buffer: images[:, buffer]),
        (lambda: torch.rand(16) > 0.5, lambda images, buffer: images * buffer),
        (lambda: torch.randn(16, dtype=torch.complex64), lambda images, buffer: (images * buffer).imag),
        (lambda: torch.randn(16), lambda images, buffer: images + buffer),
    ],
    ids=["order", "mask", "complex", "float"],
)
def test_trial_of_a_net_with_random_buffers(draw, use):
    def other(images, buffer):
        return use(images, buffer) * 1.1

    assert_apart(Using(draw(), use), Using(draw(), other), again=Using(draw(), use))


def test_trial_tells_tied_parameters_from_others():
    def net(tied):
        made = Net(nn.Linear(16, 3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        made.parts[4].weight = made.parts[2].weight if tied else made.parts[4].weight
        return made

    assert_apart(net(True), net(False), again=net(True))
