"""The server's decision on a client, without a network: each thing that may be wrong, and the reason that is given."""

from types import SimpleNamespace

import numpy as np
import pytest

import registry

TASK = {
    "dataset": "Tiny",
    "dataset_id": "a1",
    "channels": 3,
    "num_classes": 10,
    "sizes": {1: (8, 2)},
    "net": "LeNet5",
    "fingerprint": "f1",
    "trial": np.array([1, -2, 3], np.float32),
}
WHO = {"cid": 1, "dataset": "Tiny", "device_id": "d", "process": "p"}
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
    """What the handshake returns for a client that answers so, and the questions that it was asked."""
    questions, rules = [], registry.handshake(4, task)
    try:
        questions.append(next(rules))
        questions.append(rules.send(who))
        rules.send(ready)
    except StopIteration as end:
        return end.value, questions


def test_client_that_fits_is_admitted_with_all_that_it_said():
    client, questions = decide(WHO, READY)
    assert client == {**WHO, **READY}
    assert [set(question) for question in questions] == [{"nonce"}, {"net", "dataset_id"}]


def test_outputs_may_differ_as_much_as_boards_do():
    near = (TASK["trial"] * np.float32(1 + 1e-6)).tobytes()
    assert decide(WHO, {**READY, "trial": near})


def test_server_without_an_id_takes_any_cut():
    assert decide(WHO, {**READY, "dataset_id": "b2"}, {**TASK, "dataset_id": None})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"cid": 4}, "cid 4 is not in 0..3"),
        ({"cid": -1}, "cid -1 is not in 0..3"),
        ({"cid": True}, "not this suite's client.py"),
        ({"cid": "1"}, "not this suite's client.py"),
        ({"process": None}, "not this suite's client.py"),
        ({"device_id": 7}, "not this suite's client.py"),
        ({"dataset": "Other"}, "its dataset is Other, the server's is Tiny"),
        ({"num_classes": 11}, "its dataset has 11 classes, the server's has 10"),
        ({"channels": 1}, "its dataset has 1 colour channels, the server's has 3"),
        ({"dataset_id": "b2"}, "not of the server's cut of Tiny"),
        ({"dataset_id": ""}, "not of the server's cut of Tiny"),
        ({"error": "its nets.py has no net LeNet5"}, "its nets.py has no net LeNet5"),
        ({"fingerprint": "f2"}, "its fingerprint is f2, the server's is f1"),
        ({"trial": b""}, "computes something else"),
        ({"trial": b"123"}, "computes something else"),
        ({"trial": "text"}, "computes something else"),
        ({"trial": None}, "computes something else"),
        ({"trial": np.array([1, -2, 3.1], "<f4").tobytes()}, "computes something else"),
        ({"trial": np.array([1, -2, np.nan], "<f4").tobytes()}, "computes something else"),
        ({"num_fit": 0}, "its num_fit is 0"),
        ({"num_eval": 2.0}, "its num_eval is 2.0"),
        ({"num_fit": None}, "its num_fit is None"),
        ({"num_fit": 9}, r"it has 9 fit \+ 2 eval images, and by dataset.json its shard has 8 \+ 2"),
        ({"num_eval": 1}, r"it has 8 fit \+ 1 eval images"),
    ],
)
def test_client_that_does_not_fit_is_turned_away(change, reason):
    who = {name: change.get(name, value) for name, value in WHO.items()}
    ready = {**READY, **{name: value for name, value in change.items() if name not in WHO}}
    with pytest.raises(registry.TurnedAway, match=reason) as turned_away:
        decide(who, ready)
    assert turned_away.value.cid == str(who["cid"])


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
    from torch import nn

    from nets import LeNet5, fingerprint, same_trial, trial

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

    assert fingerprint(other()) == fingerprint(LeNet5(3, 10))
    assert same_trial(trial(LeNet5(3, 10)), trial(LeNet5(3, 10)))
    assert not same_trial(trial(other()), trial(LeNet5(3, 10)))


def test_trial_of_a_net_that_is_random_in_training():
    import torch

    from nets import LeNet5, same_trial, trial

    class Drops(LeNet5):
        def forward(self, images):
            return torch.nn.functional.dropout(super().forward(images), 0.5, self.training)

    assert same_trial(trial(Drops(1, 2)), trial(Drops(1, 2)))
    assert not same_trial(trial(Drops(1, 2)), trial(LeNet5(1, 2)))
