"""Convert a net's state to arrays and to a file that describes itself, and back."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from plumbing.common.files import atomic_write
from plumbing.common.process import printable

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def get_arrays(model: nn.Module) -> list[np.ndarray]:
    """Return copies of the parameters and buffers of `model`: a list of arrays, in the order of its state dict."""
    return [tensor.detach().cpu().numpy().copy() for tensor in model.state_dict().values()]


def set_arrays(model: nn.Module, arrays: list[np.ndarray]) -> None:
    """Put such a list into `model`, in place. Raises ValueError if its length or shapes differ."""
    state = model.state_dict()
    if len(arrays) != len(state):
        raise ValueError(f"{len(arrays)} arrays for a net of {len(state)}")
    for (name, tensor), array in zip(state.items(), arrays):
        if tuple(tensor.shape) != np.shape(array):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {np.shape(array)}")
        tensor.copy_(torch.as_tensor(array))


def float32_weights(model: nn.Module) -> list[bool]:
    """Return for each array of get_arrays whether it is a float32 parameter, rather than a buffer of batch norm."""
    parameters = {id(parameter) for parameter in model.parameters()}
    state = model.state_dict(keep_vars=True).values()
    return [id(tensor) in parameters and tensor.dtype == torch.float32 for tensor in state]


def batch_norm_names(model: nn.Module) -> list[str]:
    """Return the names in the state dict of `model` that belong to batch norm, both parameters and buffers."""
    modules = model.named_modules(remove_duplicate=False)  # the state dict, too, has a shared module twice
    norms = [(f"{name}." if name else "", module) for name, module in modules if isinstance(module, _BatchNorm)]
    return [prefix + key for prefix, module in norms for key in module.state_dict()]


def save_checkpoint(path: Path, model: nn.Module, about: dict | None = None) -> None:
    """Write `model` to `path`, whole or not at all, as a dictionary that describes itself.

    `about` has what the net does not know: classes, dataset, round, metrics, wandb_run_id, args; None if absent.
    Raises OSError if it cannot be written; the file that was there before is then still there.
    """
    checkpoint = {
        "model": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "net": type(model).__name__,
        "in_channels": model.in_channels,
        "num_classes": model.num_classes,
        **dict.fromkeys(("classes", "dataset", "round", "metrics", "wandb_run_id", "args")),
        **(about or {}),
    }
    write_tensors(path, checkpoint)


def write_tensors(path: Path, value) -> None:
    """Write `value` to `path` by torch.save, whole or not at all. Raises OSError if it cannot be written.

    By way of memory: on a full disk torch's own writer raises a RuntimeError, for some sizes only when it is closed.
    """
    whole = io.BytesIO()
    torch.save(value, whole)
    with atomic_write(path) as part:
        part.write_bytes(whole.getbuffer())


def read_saved(path: Path | str) -> dict:
    """Read the dictionary that torch.save wrote to `path`, onto the CPU, after a check of the file's checksums.

    Runs no code from the file. Raises ValueError, with the reason, if the file is damaged or of another kind, and
    OSError if it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch itself checks nothing
            if archive.testzip() is not None:
                raise ValueError("its checksum is wrong")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise anything
        raise ValueError(f"it is damaged, or not of this suite: {printable(error)}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"it is not of this suite: it holds a {type(saved).__name__}")
    return saved
