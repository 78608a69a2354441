"""The step: engines.Adam beside torch.optim.Adam, and LeNet5's gradients beside those of plain layers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engines import Adam, client_fit_fn
from nets import LeNet5, MaxPool2d

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
    nets = [torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    optimizers = [Adam(nets[0].parameters(), lr, betas, eps), torch.optim.Adam(nets[1].parameters(), lr, betas, eps)]
    images, labels = torch.randn(40, 5), torch.randint(3, (40,))
    for _ in range(30):
        for net, optimizer in zip(nets, optimizers):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        for name, parameter in nets[0].named_parameters():
            torch.testing.assert_close(parameter, nets[1].get_parameter(name), rtol=1e-5, atol=1e-6)


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
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))


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
    images = torch.randint(0, 3, (320, 3, 32, 32)).float() / 2
    images[::5] = 0
    labels = torch.randint(10, (320,))
    mine, plain = LeNet5(3, 10), PlainLeNet5()
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
