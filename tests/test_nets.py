"""Nets: one of the user's own, as docs/strategies.md shows it, and GroupNet."""

import re
import shutil

from libs import UserError
from plumbing.common import compare

import numpy as np
import pytest
import torch
from helpers import ROOT, history, write_images
from torch import nn

import nets

SNIPPET = re.search(r"```python\n(class Small.*?)```", (ROOT / "docs/strategies.md").read_text(), re.DOTALL)[1]


def test_net_of_the_docs_trains_where_a_batch_of_one_would_be_left_over(suite, tmp_path):
    nets = (suite.root / "nets.py").read_text()
    before, line, after = re.split(r"(?m)^(NETS = .*)$", nets)
    (suite.root / "nets.py").write_text(before + SNIPPET + "\n\n" + line.replace("LeNet5,", "LeNet5, Small,") + after)
    source = write_images(tmp_path / "odd.zip", 82, 10)  # 41 a client, 33 of them to fit
    suite.partition("--dataset", "Tiny", "--source", source, "--num_clients", 2)
    server = suite.server("--dataset", "Tiny", "--net", "Small", "--num_rounds", 3)
    clients = [suite.client(cid, "--dataset", "Tiny") for cid in range(2)]
    assert [process.wait() for process in (server, *clients)] == [0, 0, 0], server
    rows = history(suite)
    assert list(rows["clients"]) == [2, 2, 2] and list(rows["failures"]) == [0, 0, 0]
    assert np.isfinite(rows["test_loss"]).all()


def test_net_that_is_not_there_is_named_before_anything_is_touched(tiny):
    server = tiny.server("--dataset", "Tiny", "--net", "ResNet50")
    assert server.wait() == 2 and server.err == "server.py: nets.py has no net ResNet50; it has LeNet5, GroupNet\n"
    assert not tiny.ckps("Tiny").exists()


def test_checkpoint_of_a_net_that_is_gone_is_named(suite, three_shards):
    shutil.copytree(three_shards, suite.root / "datasets")
    suite.ckps("Tiny").mkdir(parents=True)
    torch.save({"net": "Gone", "model": {}}, suite.ckps("Tiny") / "server.ptl")
    server = suite.server("--dataset", "Tiny", "--resume")
    assert server.wait() == 2
    (line,) = server.err.splitlines()
    assert "its net is Gone, not LeNet5" in line


WIDE = """
class Wide(nn.Module):
    image_size = (32, 32)

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.classifier = nn.Linear(in_channels * 1024, 100)

    def forward(self, images):
        return self.classifier(images.flatten(1))


NETS["Wide"] = Wide
"""


def test_net_that_cannot_be_used_ends_in_one_line_before_anything_is_touched(tiny):
    with open(tiny.root / "nets.py", "a") as file:
        file.write(WIDE)
    server = tiny.server("--dataset", "Tiny", "--net", "Wide")
    assert server.wait() == 2
    assert re.fullmatch(
        r"server.py: net Wide cannot be used: it returns torch.float32 \(8, 100\) .* which is 10 here\n", server.err
    )
    assert not tiny.ckps("Tiny").exists()


class Own(nn.Module):
    image_size = (8, 8)

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.classifier = nn.Linear(in_channels * 64, num_classes)

    def forward(self, images):
        return self.classifier(images.flatten(1))


def own(init=None, forward=Own.forward, image_size=(8, 8)):
    """A class called Own, changed so."""

    def __init__(self, in_channels, num_classes):
        Own.__init__(self, in_channels, num_classes)
        if init is not None:
            init(self)

    return type("Own", (Own,), {"__init__": __init__, "forward": forward, "image_size": image_size})


def in_place(self, images):
    logits = Own.forward(self, images).sigmoid()
    product = logits * logits
    logits += 1
    return product


def test_buffer_that_cannot_take_the_mean_of_the_data_is_named():
    net = Own(3, 5)
    net.register_buffer("input_mean", torch.zeros(2))
    with pytest.raises(UserError, match="^net Own cannot be given the data's input_mean: RuntimeError: "):
        nets.normalise_input(net, [0.5] * 3, [0.25] * 3)


@pytest.mark.parametrize(
    "net, reason",
    [
        (lambda channels, classes: Own(channels, classes), "needs a class of that name, derived from nn.Module"),
        (object, "needs a class of that name"),
        (nn.Linear, "needs a class of that name"),
        (own(image_size=None), r"its image_size is None, not \(height, width\)"),
        (own(image_size=[8, 8]), r"its image_size is \[8, 8\]"),
        (own(image_size=(16, 8)), "cannot be run: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (own(lambda self: self.nothing), "cannot be built: AttributeError: 'Own' object has no attribute 'nothing'"),
        (
            own(lambda self: setattr(self, "classifier", nn.LazyLinear(3))),
            "cannot be run: RuntimeError: .*uninitialized",
        ),
        (own(lambda self: self.bfloat16()), "cannot be run: TypeError: .*BFloat16"),
        (own(forward=lambda self, images: (Own.forward(self, images), images)), "cannot be used: it returns tuple"),
        (own(forward=lambda self, images: Own.forward(self, images).argmax(1)), r"it returns torch.int64 \(8,\)"),
        (own(forward=in_place), "cannot be trained: RuntimeError: .*modified by an inplace operation"),
        (own(lambda self: self.requires_grad_(False)), "cannot be trained: RuntimeError: .*does not require grad"),
        (own(lambda self: self.register_parameter("w", nn.Parameter(torch.zeros(1) * 1j))), "no complex parameters"),
    ],
)
def test_net_that_cannot_be_used_is_refused_with_the_reason(net, reason, monkeypatch):
    monkeypatch.setitem(nets.NETS, "Own", net)
    with pytest.raises(UserError, match=f"^net Own .*{reason}"):
        compare.trial(nets.build_net("Own", 3, 5))


@pytest.mark.parametrize("channels, num_classes", [(3, 10), (1, 10), (3, 100)])
def test_group_net_is_small_without_batch_norm_and_each_image_for_itself(channels, num_classes):
    torch.manual_seed(0)
    net = nets.GroupNet(channels, num_classes)
    assert sum(parameter.numel() for parameter in nets.GroupNet(3, 10).parameters()) <= 300_000
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in net.modules())
    images = torch.rand(5, channels, 32, 32)
    together = net.train()(images)
    assert together.shape == (5, num_classes)
    alone = torch.cat([net.eval()(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_group_net_is_told_from_its_like_by_the_handshake(channels):
    def other():
        net = nets.GroupNet(channels, 10)
        next(module for module in net.modules() if isinstance(module, torch.nn.GroupNorm)).num_groups //= 2
        return net

    assert (
        compare.fingerprint(nets.GroupNet(channels, 10))
        == compare.fingerprint(other())
        != compare.fingerprint(nets.LeNet5(channels, 10))
    )
    assert np.isfinite(compare.trial(nets.GroupNet(channels, 10))[:, 1:]).all()  # nor is anything in it random
    one = compare.trial(nets.GroupNet(channels, 10))
    assert compare.same_trial(one, compare.trial(nets.GroupNet(channels, 10)))
    assert not compare.same_trial(one, compare.trial(other()))


@pytest.mark.parametrize("channels", [1, 3])
def test_input_is_normalised_by_what_the_data_set_says(channels):
    images, mean, std = torch.rand(7, channels, 32, 32), [0.5, 0.25, 0.0][:channels], [0.25, 0.5, 0.0][:channels]
    net = nets.GroupNet(channels, 10)
    usual = net(images)
    nets.normalise_input(net, None, None)  # an old data set
    assert net(images).equal(usual)
    nets.normalise_input(net, mean, std)
    found = dict(net.named_buffers())
    assert found["input_mean"].shape == found["input_std"].shape == (1, channels, 1, 1)
    assert found["input_mean"].dtype == found["input_std"].dtype == torch.float32
    assert found["input_mean"].flatten().tolist() == mean
    assert net(images).isfinite().all()  # also where all images are of one colour
    nets.normalise_input(nets.LeNet5(channels, 10), mean, std)  # which has no such buffers
