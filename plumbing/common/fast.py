"""torch's MaxPool2d and Adam, faster and smaller on a board."""

from __future__ import annotations

import math

import torch
from torch import nn

HAS_FUSED_ADAM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 4)  # on the CPU too


class PoolFunction(torch.autograd.Function):
    """MaxPool2d's passes. Of equal values the first, row by row, gets the gradient, as in torch."""

    @staticmethod
    def forward(ctx, images):
        left, right = images[..., 0::2], images[..., 1::2]
        columns = torch.maximum(left, right)
        upper, lower = columns[..., 0::2, :], columns[..., 1::2, :]
        ctx.save_for_backward(right > left, lower > upper)
        return torch.maximum(upper, lower)

    @staticmethod
    def backward(ctx, gradient):
        is_right, is_lower = ctx.saved_tensors
        columns = gradient.new_empty(is_right.shape)
        lower = torch.mul(gradient, is_lower, out=columns[..., 1::2, :])
        torch.sub(gradient, lower, out=columns[..., 0::2, :])
        images = columns.new_empty((*columns.shape[:-1], 2 * columns.shape[-1]))
        right = torch.mul(columns, is_right, out=images[..., 1::2])
        torch.sub(columns, right, out=images[..., 0::2])
        return images


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d(2) in a third of its time on a CPU, by maxima of whole slices, if height and width are even."""

    def __init__(self):
        super().__init__(2)

    def forward(self, images):
        if images.device.type != "cpu" or images.shape[-2] % 2 or images.shape[-1] % 2:
            return super().forward(images)
        return PoolFunction.apply(images)


class Adam:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), step by step what torch.optim.Adam computes.

    One fused call steps all parameters that have a gradient. (torch.optim itself loads torch's compiler at its first
    use, for which a board may have neither the memory nor the time: `benchmarks/bench.py adam` measures how much.)
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.options = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps}
        self.options.update(weight_decay=0.0, amsgrad=False, maximize=False)
        self.groups = {}  # the fused call takes parameters of one dtype and device, each with its mean, square, steps
        for parameter in parameters:
            state = parameter, torch.zeros_like(parameter), torch.zeros_like(parameter)
            steps = torch.zeros((), device=parameter.device)  # each has its own: without a gradient it takes no step
            self.groups.setdefault((parameter.dtype, parameter.device), []).append((*state, steps))

    def zero_grad(self):
        for parameter, *_ in sum(self.groups.values(), []):
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        for group in self.groups.values():
            group = [state for state in group if state[0].grad is not None]
            if not group:
                continue
            parameters, means, squares, steps = map(list, zip(*group))
            torch._foreach_add_(steps, 1)
            gradients = [parameter.grad for parameter in parameters]
            step_all = torch._fused_adam_ if HAS_FUSED_ADAM else plain_adam
            step_all(parameters, gradients, means, squares, [], steps, **self.options)


def plain_adam(parameters, gradients, means, squares, _, steps, **options):
    """Compute what torch._fused_adam_ computes, for a torch that lacks it, or lacks it on the CPU (before 2.4)."""
    lr, beta1, beta2, eps = (options[name] for name in ("lr", "beta1", "beta2", "eps"))
    for parameter, gradient, mean, square, step in zip(parameters, gradients, means, squares, steps):
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = square.sqrt().div_(math.sqrt(1 - beta2 ** step.item())).add_(eps)
        parameter.addcdiv_(mean, scale, value=-lr / (1 - beta1 ** step.item()))
