"""Compare the nets of client and server: their shapes, and what they compute."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random

from plumbing.common.process import UserError, printable
from plumbing.common.state import get_arrays, set_arrays

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

BATCH = 8  # images in a trial
TOLERANCE = 2e-4  # of the largest output: boards and versions of torch differ by far less, nets by far more


@contextlib.contextmanager
def blamed_on(name, what):
    """Turn any exception in this block into a UserError with the reason: users write their own nets."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"net {name} cannot be {what}: {type(error).__name__}: {printable(error)}") from error


def fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits that two nets share if their parameters have the same names, shapes and dtypes."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in model.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@contextlib.contextmanager
def seeded(seed: int):
    """Seed the random numbers of this block, on the CPU; those after it are as if it had not been there."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def fill_with_noise(model: nn.Module) -> None:
    """Fill the parameters and buffers of `model` with values that are the same on every machine."""
    noise = np.random.RandomState(0).normal(size=65521).astype(np.float32)  # the same in every numpy
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
            values = torch.from_numpy(np.resize(np.roll(noise, -index), tuple(tensor.shape)))
            if tensor.dtype == torch.bool:
                values = values > 0
            elif tensor.ndim > 1:
                values = values / (tensor[:1].numel() or 1) ** 0.5  # keeps outputs about as large as inputs
            if name.endswith(("running_var", "input_std")):  # these are positive
                values = values.abs().clamp(0.01)
            tensor.copy_(values * (0.6 + 0.8j) if tensor.is_complex() else values)
        else:  # integers, such as indices: other numbers might not be valid
            tensor.copy_(tensor.flatten().sort().values.view_as(tensor))


def trial(model: nn.Module) -> np.ndarray:
    """Run a copy of `model` on the CPU with fixed images, parameters and random numbers. Return float32 2×n.

    The first row holds a number that identifies the machine's random numbers, the rates of dropout layers, the logits
    in eval mode, those in train mode, and the buffers after that pass; the second row is the same, with nan for what is
    random. same_trial compares two of them: it tells nets with the same fingerprint apart that differ in between, by an
    activation, a pooling, a momentum. Raises UserError, with the reason, if the net cannot be run or trained, or its
    parameters cannot be sent.
    """
    rows, name, shape = [], type(model).__name__, (BATCH, model.in_channels, *model.image_size)
    noise = np.random.RandomState(1).uniform(size=65521).astype(np.float32)
    images, labels = torch.from_numpy(np.resize(noise, shape)), torch.arange(BATCH) % model.num_classes
    rates = [layer.p for layer in model.modules() if isinstance(layer, _DropoutNd)]
    for seed in (0, 1):
        with seeded(seed):
            draws = torch.cat([torch.empty(12).bernoulli_(0.5), (torch.empty(12).exponential_() > 0.7).float()])
            with blamed_on(name, "run"):
                net = copy.deepcopy(model)
                fill_with_noise(net)
                set_arrays(net, get_arrays(net))
                with torch.no_grad():
                    logits = [net.eval()(images.clone())]
            with blamed_on(name, "trained"):
                if any(parameter.is_complex() for parameter in net.parameters()):
                    raise TypeError("our Adam takes no complex parameters (complex buffers are fine)")
                logits.append(net.train()(images.clone()))
                for one in logits:
                    check_logits(one, model)
                nn.functional.cross_entropy(logits[1], labels).backward()
        outputs = [(draws * 2.0 ** torch.arange(24)).sum(), torch.tensor(rates).float(), *logits, *net.buffers()]
        outputs = [torch.view_as_real(output) if output.is_complex() else output for output in outputs]
        rows.append([output.detach().float().flatten() for output in outputs])
    alike = [torch.allclose(one, other, TOLERANCE / 2, TOLERANCE / 2) for one, other in zip(*rows)]
    rows[1] = [one if same else torch.full_like(one, torch.nan) for one, same in zip(rows[0], alike)]
    return torch.stack([torch.cat(row) for row in rows]).numpy()


def check_logits(logits, model):
    """Raise UserError unless `logits`, the output of `model` for BATCH images, is a float tensor of N×num_classes."""
    whole = isinstance(logits, torch.Tensor) and logits.is_floating_point()
    if not whole or logits.shape != (BATCH, model.num_classes):
        found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        wanted = f"for {BATCH} images, not a float tensor of {BATCH}×num_classes, which is {model.num_classes} here"
        raise UserError(f"net {type(model).__name__} cannot be used: it returns {found} {wanted}")


def same_trial(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two results of `trial` are the same, as far as boards and versions of torch compute the same.

    From one seed an Intel CPU draws other numbers than an ARM board, which has no MKL to draw those of dropout. Between
    these, only what does not depend on the seed is compared.
    """
    if one.size != other.size:
        return False
    one, other, steady = one.reshape(other.shape)[0], other[0], other[0] == other[1]
    compared = slice(1, None) if one[0] == other[0] else steady
    one, other = one[compared], other[compared]
    finite = np.abs(other[np.isfinite(other)])
    return np.allclose(one, other, rtol=0, atol=TOLERANCE * max(1, finite.max(initial=0)), equal_nan=True)
