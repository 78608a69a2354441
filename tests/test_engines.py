"""engines.Adam, step by step beside torch.optim.Adam."""

import pytest
import torch

from engines import Adam

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
