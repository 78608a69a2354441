"""torch's MaxPool2d and Adam, faster and smaller on a board."""

from __future__ import annotations

import math

import torch
from torch import nn


class PoolFunction(torch.autograd.Function):
    """MaxPool2d's passes. Of equal values the first, row by row, gets the gradient, as in torch's own."""

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
    """nn.MaxPool2d(2), for an even height and width, in a third of its time on a CPU: as maxima of whole slices."""

    def __init__(self):
        super().__init__(2)

    def forward(self, images):
        if images.device.type != "cpu" or images.shape[-2] % 2 or images.shape[-1] % 2:
            return super().forward(images)
        return PoolFunction.apply(images)


class Adam:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980), step by step what torch.optim.Adam computes.

    Parameters of one dtype and device are stepped together, as one vector: for a small net the calls cost more than the
    numbers. torch.optim itself loads torch's compiler at its first use, and a device may not have that memory and time:
    how much it is, `benchmarks/bench.py adam` measures.
    """

    def __init__(self, parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        self.lr, self.betas, self.eps = lr, betas, eps
        groups = {}
        for parameter in parameters:  # frozen ones apart, for they would keep others from stepping together
            groups.setdefault((parameter.dtype, parameter.device, parameter.requires_grad), []).append(parameter)
        self.vectors = [Vector(group) for group in groups.values()]

    def zero_grad(self):
        for vector in self.vectors:
            for parameter in vector.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self):
        for vector in self.vectors:
            for parameters, steps, state in vector.parts():
                self.step_together(parameters, steps + 1, *state)

    def step_together(self, parameters, step, mean, square, change, changes):
        beta1, beta2 = self.betas
        size, correction = self.lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
        gradient = torch.cat([parameter.grad.reshape(-1) for parameter in parameters])
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = torch.sqrt(square, out=gradient).div_(correction).add_(self.eps)
        torch.mul(mean, -size, out=change).div_(scale)
        for parameter, part in zip(parameters, changes):
            parameter.add_(part)


class Vector:
    """What Adam keeps of parameters that fit into one vector: mean, mean square and change of each value."""

    def __init__(self, parameters):
        self.parameters, sizes = parameters, [parameter.numel() for parameter in parameters]
        self.steps = [0] * len(parameters)  # each counts its own: without a gradient it takes no step
        self.whole = [torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device) for _ in range(3)]
        self.single = [*zip(*(vector.split(sizes) for vector in self.whole))]
        self.changes = [change.view(parameter.shape) for parameter, (_, _, change) in zip(parameters, self.single)]

    def parts(self):
        """What steps now: [([parameter, …], steps before, (mean, square, change, [change of each parameter]))]."""
        trained = [index for index, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if len(trained) == len(self.parameters) and len(set(self.steps)) == 1:
            parts = [(self.parameters, self.steps[0], (*self.whole, self.changes))]
        else:
            parts = [
                ([self.parameters[index]], self.steps[index], (*self.single[index], [self.changes[index]]))
                for index in trained
            ]
        for index in trained:
            self.steps[index] += 1
        return parts
