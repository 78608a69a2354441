"""The step beside plain torch: Adam, LeNet5's gradients, FedProx; and how the images to train on are changed."""

import copy
import inspect

from plumbing.common import fast
from plumbing.common.fast import Adam, MaxPool2d

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import server
from engines import HYPER_PARAMETERS, client_fit_fn, shift_and_mirror
from nets import LeNet5

SHAPES = [(6, 3, 5, 5), (16,), (84, 120), (), (10,), (7,)]
LATE, NEVER, SOMETIMES = 3, 4, 5  # which of them gets its first gradient at step 5, which none, which now and then one


def test_every_step_is_that_of_torch_for_whatever_gradients():
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for shape in SHAPES]
    torchs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    mine, reference = Adam(iter(ours), lr=3e-3), torch.optim.Adam(torchs, lr=3e-3)
    without = 0
    for step in range(1, 31):
        mine.zero_grad()
        reference.zero_grad()
        for index, (parameter, other) in enumerate(zip(ours, torchs)):
            if index == NEVER or (index == LATE and step < 5) or (index == SOMETIMES and torch.rand(()) < 0.5):
                without += 1
                continue
            scale = 10.0 ** torch.randint(-6, 4, ())  # from far under eps's reach to far over it
            parameter.grad = torch.randn(SHAPES[index]) * scale if step % 7 else torch.zeros(SHAPES[index])
            other.grad = parameter.grad.clone()
        mine.step()
        reference.step()
        for index, (parameter, other) in enumerate(zip(ours, torchs)):
            torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-8, msg=f"parameter {index}, step {step}")
    assert without > 30 + 4 and ours[NEVER].equal(torchs[NEVER])


@pytest.mark.parametrize("lr, betas, eps", [(1e-3, (0.9, 0.999), 1e-8), (0.1, (0.5, 0.9), 1e-3)])
def test_training_is_that_of_torch(lr, betas, eps):
    """Thirty steps on a loss of the parameters themselves, so that an error in one step tells in all that follow."""
    torch.manual_seed(1)
    nets = [torch.nn.Linear(5, 3).double(), torch.nn.Linear(5, 3).double()]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [Adam(nets[0].parameters(), lr, betas, eps), torch.optim.Adam(nets[1].parameters(), lr, betas, eps)]
    images, labels = torch.randn(40, 5, dtype=torch.double), torch.randint(3, (40,))
    for _ in range(30):
        for net, optimizer in zip(nets, optimizers):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        for name, parameter in nets[0].named_parameters():
            torch.testing.assert_close(parameter, nets[1].get_parameter(name), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# FedProx, beside plain torch with the term in the loss.


class Net(torch.nn.Module):
    """Has a parameter that is not trained, and one that takes part in every other loss alone."""

    def __init__(self):
        super().__init__()
        self.hidden, self.classifier = torch.nn.Linear(12, 8), torch.nn.Linear(8, 3)
        self.fixed = torch.nn.Parameter(torch.ones(8), requires_grad=False)
        self.sometimes = torch.nn.Parameter(torch.ones(8))
        self.passes = 0

    def forward(self, images):
        self.passes += 1
        hidden = self.hidden(images.flatten(1)).tanh() * self.fixed
        return self.classifier(hidden * self.sometimes if self.passes % 2 else hidden)


@pytest.mark.parametrize("mu", [0.0, 0.1, 3.0])
def test_fedprox_is_plain_torch_with_the_term_in_the_loss(mu):
    torch.manual_seed(0)
    net, reference = Net().double(), Net().double()
    reference.load_state_dict(net.state_dict())
    batches = [(torch.rand(8, 3, 2, 2).double(), torch.randint(3, (8,))) for _ in range(10)]
    metrics = client_fit_fn({"fit": batches, "eval": batches}, net, num_epochs=3, lr=0.01, proximal_mu=mu)

    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    start = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    for _ in range(3):
        entropies = []
        for images, labels in batches:
            entropy = torch.nn.functional.cross_entropy(reference(images), labels)
            term = sum((now - then).pow(2).sum() for now, then in zip(trained, start))
            optimizer.zero_grad()
            (entropy + mu / 2 * term if mu else entropy).backward()
            optimizer.step()
            entropies.append(entropy.item())
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=0, atol=1e-6, msg=name)
    assert metrics["fit_loss"] == pytest.approx(sum(entropies) / 10, abs=1e-6)  # without the term


def test_the_greater_mu_the_nearer_to_the_global_model():
    torch.manual_seed(0)
    batches = [(torch.rand(8, 3, 2, 2), torch.randint(3, (8,))) for _ in range(20)]
    start, ways = Net(), []
    for mu in (0.0, 0.1, 1.0, 10.0):
        net = Net()
        net.load_state_dict(start.state_dict())
        client_fit_fn({"fit": batches, "eval": batches}, net, num_epochs=5, lr=0.01, proximal_mu=mu)
        ways.append(sum((a - b).norm() for a, b in zip(net.parameters(), start.parameters())).item())
    assert ways == sorted(ways, reverse=True) and ways[-1] < ways[0] / 2


# ---------------------------------------------------------------------------------------------------------------------
# Shifted and mirrored images.


@pytest.mark.parametrize("channels, height, width", [(3, 32, 32), (1, 28, 28), (3, 20, 37), (1, 5, 3), (3, 1, 1)])
def test_images_are_random_crops_with_a_border_of_two_and_coloured_ones_mirrored(channels, height, width):
    images = torch.rand(400, channels, height, width) + 0.1
    bordered = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    crops = {
        (top, left, mirrored): bordered[:, :, top : top + height, left : left + width][..., :: -1 if mirrored else 1]
        for top in range(5)
        for left in range(5)
        for mirrored in (False, True)
    }
    torch.manual_seed(5)
    changed = shift_and_mirror(images)
    assert changed.shape == images.shape and changed.dtype == images.dtype and changed.is_contiguous()
    seen = [
        [how for how, crop in crops.items() if np.array_equal(crop[index], image)]
        for index, image in enumerate(changed.numpy())
    ]
    assert all(seen)  # each is one of them
    if min(height, width) > 2:
        (hows,) = zip(*seen)
        for axis in (0, 1):
            counts = np.bincount([how[axis] for how in hows], minlength=5)
            assert counts.min() > 45 and counts.max() < 120  # of 400 in 5: 80 each
        assert (150 < sum(how[2] for how in hows) < 250) if channels == 3 else not any(how[2] for how in hows)
    torch.manual_seed(5)
    assert shift_and_mirror(images).equal(changed)
    assert not shift_and_mirror(images).equal(changed)


class Watched(torch.nn.Linear):
    """Keeps what it sees, in training and in evaluation."""

    def __init__(self):
        super().__init__(3 * 6 * 6, 2)
        self.seen = {True: [], False: []}

    def forward(self, images):
        self.seen[self.training].append(images)
        return super().forward(images.flatten(1))


def test_only_the_images_to_train_on_are_changed_and_alike_with_one_seed():
    batches = [(torch.rand(16, 3, 6, 6) + 0.1, torch.randint(2, (16,))) for _ in range(4)]
    loaders, nets, start = {"fit": batches, "eval": batches}, [], Watched().state_dict()
    for seed, augment in ((1, True), (1, True), (2, True), (1, False)):
        nets.append(Watched())
        nets[-1].load_state_dict(start)
        client_fit_fn(loaders, nets[-1], num_epochs=2, seed=seed, augment=augment)
        assert all(image.equal(batch[0]) for image, batch in zip(nets[-1].seen[False], batches, strict=True))
    one, again, other, plain = (torch.cat(net.seen[True]) for net in nets)
    assert one.equal(again) and nets[0].weight.equal(nets[1].weight)
    assert not one.equal(other) and not one[: 4 * 16].equal(one[4 * 16 :])  # nor alike in each epoch
    assert plain.equal(torch.cat([images for images, _ in batches * 2]))


class Odd(nn.Module):
    """What nets of one's own may have: tied, frozen, unused, scalar and channels-last parameters."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.there = nn.Linear(8, 8, bias=False)
        self.back = nn.Linear(8, 8, bias=False)
        self.back.weight = self.there.weight
        self.unused = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.late = nn.Linear(8, 8)
        self.turns = 0

    def forward(self, images):
        self.turns += 1
        hidden = self.frozen(self.conv(images)).relu().mean((2, 3))
        hidden = self.back(self.there(hidden).tanh()) * self.scale
        return self.late(hidden) if self.turns > 4 else hidden


def normed():
    """In float64: a bias in front of batch norm has no gradient, and in float32 Adam follows what rounding leaves."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)).double()


@pytest.mark.parametrize("net", [Odd, normed, lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8)).double()])
def test_any_net_trains_as_with_torch(net):
    torch.manual_seed(2)
    mine = net()
    plain = copy.deepcopy(mine)
    optimizers = [Adam(mine.parameters(), 0.01), torch.optim.Adam(plain.parameters(), 0.01)]
    kind = next(mine.parameters()).dtype
    for _ in range(12):
        images, labels = torch.rand(16, 3, 8, 8, dtype=kind), torch.randint(8, (16,))
        for model, optimizer in zip((mine, plain), optimizers):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        for (name, parameter), other in zip(mine.named_parameters(), plain.parameters()):
            torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-7, msg=name)


def test_trained_parameters_are_ordinary_ones(tmp_path):
    model = LeNet5(3, 10)
    batch = [(torch.rand(8, 3, 32, 32), torch.arange(8))]
    client_fit_fn({"fit": batch, "eval": batch}, model)
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous() and parameter.untyped_storage().nbytes() == 4 * parameter.numel(), name
    torch.save(model.classifier.state_dict(), tmp_path / "part.ptl")
    assert (tmp_path / "part.ptl").stat().st_size < 3 * 4 * 850
    other = copy.deepcopy(model)
    other.load_state_dict(LeNet5(3, 10).state_dict())
    assert not torch.equal(other.classifier.weight, model.classifier.weight)


class PlainLeNet5(nn.Module):
    """LeNet5 as its paper's readers write it: of torch's own layers, ReLU before pooling."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.layer2 = nn.Sequential(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.layer3 = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        self.classifier = nn.Linear(84, 10)

    def forward(self, images):
        return self.classifier(self.layer3(self.layer2(self.layer1(images)).flatten(1)))


def test_two_epochs_have_the_gradients_of_the_plain_net():
    """Images of few values, so that pools have many equal ones, and darkness, in which all are."""
    torch.manual_seed(3)
    images = torch.randint(0, 3, (320, 3, 32, 32)).double() / 2
    images[::5] = 0
    labels = torch.randint(10, (320,))
    mine, plain = LeNet5(3, 10).double(), PlainLeNet5().double()  # see normed
    plain.load_state_dict(mine.state_dict())
    optimizers = [Adam(mine.parameters()), torch.optim.Adam(plain.parameters())]
    for _ in range(2):
        for part in torch.randperm(320).split(32):
            for model, optimizer in zip((mine, plain), optimizers):
                optimizer.zero_grad()
                F.cross_entropy(model(images[part]), labels[part]).backward()
            for (name, parameter), other in zip(mine.named_parameters(), plain.parameters()):
                torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-6, atol=1e-6, msg=name)
            for optimizer in optimizers:
                optimizer.step()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("shape", [(2, 3, 8, 6), (3, 4, 4), (2, 1, 7, 5), (1, 2, 2, 2)])
@pytest.mark.parametrize("last", [False, True])
def test_pooling_is_that_of_torch(shape, last):
    torch.manual_seed(4)
    images = torch.randint(-2, 2, shape).float()
    if last and len(shape) == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    images[..., 0, :2] = torch.tensor([-torch.inf, torch.inf])
    mine, plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    pooled, expected = MaxPool2d()(mine), F.max_pool2d(plain, 2)
    assert torch.equal(pooled, expected)
    weights = torch.randn(expected.shape)
    (pooled * weights).sum().backward()
    (expected * weights).sum().backward()
    assert torch.equal(mine.grad, plain.grad)
    images[..., 1, 0] = torch.nan
    assert torch.equal(MaxPool2d()(images).isnan(), F.max_pool2d(images, 2).isnan())


def test_adam_without_the_fused_call(monkeypatch):
    """As on a board with a torch before 2.4."""
    monkeypatch.setattr(fast, "HAS_FUSED_ADAM", False)
    test_every_step_is_that_of_torch_for_whatever_gradients()


def test_what_travels_to_the_devices_is_written_out():
    """Each is a flag of the server and a parameter of client_fit_fn; no other flag travels for its name."""
    assert set(HYPER_PARAMETERS) <= set(vars(server.parse_args({}))) & set(inspect.signature(client_fit_fn).parameters)
