"""How a net's parameters travel between server and device.

Parameters.tensor_type   "<compress> <name of the model>" to a device; back it says nothing
Parameters.tensors       empty if the device holds that model; else an .npy, its values or a difference per array
values                   mark "same" (4 bytes), and an .npy without the header, which the receiver's last model has
difference               mark (4 bytes), ndim (uint8), shape (uint32 each), scale (float32), values (mark's type)
                         little-endian; array = base + scale · values

A device that holds a model, such as the averaged one that it has just evaluated, is sent its name alone. --compress
sends the float32 parameters, not the buffers, as differences of 16 bits (fp16) or 8 bits (int8): a device's to the
model that it was sent, the server's to its model before. The rounding error is added to the next difference.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
from collections.abc import Callable

import numpy as np
from flwr.common import Parameters

COMPRESS = ("off", "fp16", "int8")
SAME = b"same"
SHRUNK = {"fp16": ("<f2", 2**15), "int8": ("i1", 127)}  # mark: its type, and what the largest difference becomes


def write_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return file.getvalue()


def read_npy(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def header_of(data: bytes) -> bytes:
    """Return the header of an .npy (version 1): it tells the dtype and the shape."""
    return data[: 10 + int.from_bytes(data[8:10], "little")]


def to_values(data: bytes, base: bytes) -> bytes:
    """Return an .npy without its header, if that is the one of `base`; as it is otherwise."""
    header = header_of(base)
    return SAME + data[len(header) :] if data.startswith(header) else data


def to_difference(data: bytes, base: bytes, mark: str) -> bytes:
    """Return a float32 .npy as its difference to `base`; as it is if the difference is not finite."""
    dtype, greatest = SHRUNK[mark]
    with np.errstate(over="ignore", invalid="ignore"):
        change = read_npy(data) - read_npy(base)
        scale = np.abs(change).max(initial=0) / np.float32(greatest)
    if not np.isfinite(scale):
        return data
    steps = (change / scale if scale > 0 else change).clip(-greatest, greatest)
    steps = np.rint(steps) if mark == "int8" else steps
    head = struct.pack(f"<B{change.ndim}If", change.ndim, *change.shape, scale)
    return mark.encode() + head + steps.astype(dtype).tobytes()


def restore(data: bytes, base: bytes | None = None) -> bytes:
    """Return the .npy that a tensor stands for. Raises ValueError for nonsense.

    base: the .npy at the same place of the last model: what a difference is to, and whose header values have.
    """
    mark = data[:4].decode("latin-1")
    if data[:4] == SAME and base is not None:
        return header_of(base) + data[4:]
    if mark not in SHRUNK:
        return data
    try:
        (ndim,) = struct.unpack_from("<B", data, 4)
        *shape, scale = struct.unpack_from(f"<{ndim}If", data, 5)
    except struct.error:
        raise ValueError(f"an array of {len(data)} bytes is cut off") from None
    if base is None:
        raise ValueError("a difference to nothing that was sent")
    steps = np.frombuffer(data, SHRUNK[mark][0], offset=9 + 4 * ndim).reshape(shape).astype(np.float32)
    like = read_npy(base)
    if steps.shape != like.shape or like.dtype != np.float32:
        raise ValueError(f"a difference of shape {steps.shape} to {like.dtype} {like.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        return write_npy(like + steps * np.float32(scale))


def restore_all(tensors, bases):
    """Restore all tensors of a message; `bases` has the `base` of each, in the same order, or is None."""
    bases = (bases or []) + [None] * len(tensors)
    return [restore(data, base) for data, base in zip(tensors, bases)]


class Model:
    """A model as devices get it: `tensors` is what they hold then (.npy)."""

    def __init__(self, tensors, before=None, differences=None):
        self.tensors = tensors
        self.values = [to_values(data, data) for data in tensors]  # these are sent to devices that hold any other
        self.before, self.differences = before, differences  # and these to devices that hold the Model `before`
        self.name = hashlib.sha256(b"".join(tensors)).hexdigest()[:16]


class Sender:
    """The server's end, for all devices.

    compress: one of COMPRESS.
    weights: for each array whether it is compressed (state.float32_weights).
    """

    def __init__(self, compress: str = "off", weights: list[bool] | None = None):
        self.compress, self.weights = compress, weights
        self.lock = threading.Lock()  # the questions to all devices begin at the same time
        self.parameters, self.model = None, None  # the newest

    def model_of(self, parameters: Parameters) -> Model:
        """Return the Model for `parameters`, made once for all devices."""
        with self.lock:
            if self.model is None or parameters.tensors != self.parameters.tensors:
                self.parameters, self.model = parameters, self._make(parameters.tensors, self.model)
            return self.model

    def _make(self, tensors, before):
        if self.compress == "off" or before is None:
            return Model(tensors)
        triples = zip(tensors, before.tensors, self.weights)
        differences = [
            to_difference(data, base, self.compress) if weight else to_values(data, base)
            for data, base, weight in triples
        ]
        before.before = None  # or all models would be kept
        return Model(restore_all(differences, before.tensors), before, differences)

    def pack(self, model: Model, held: Model | None) -> Parameters:
        """Return what to send of `model` to a device that holds the Model `held` (None: none)."""
        tensors = model.tensors
        if held is not None and held.name == model.name:
            tensors = []
        elif held is not None:
            tensors = model.differences if held is model.before else model.values
        return Parameters(tensors, f"{self.compress} {model.name}")


class Holder:
    """A device's end of one connection: holds the model that it was sent last, and the rounding errors.

    weights: returns state.float32_weights of the net that is trained.
    """

    def __init__(self, weights: Callable[[], list[bool]]):
        self.weights = weights
        self.compress, self.name, self.tensors, self.rests = "off", None, None, None

    def unpack(self, parameters: Parameters) -> Parameters:
        """Return what the server sent as Flower's plain arrays. Raises ValueError for nonsense."""
        self.compress, _, name = parameters.tensor_type.partition(" ")
        if parameters.tensors:
            self.name, self.tensors = name, restore_all(parameters.tensors, self.tensors)
        elif name != self.name:
            raise ValueError(f"the server takes this device to hold the model {name}, not {self.name}")
        return Parameters(self.tensors, "numpy.ndarray")

    def pack(self, parameters: Parameters) -> Parameters:
        """Return what to send back for `parameters`, which are Flower's plain arrays."""
        if len(parameters.tensors) != len(self.tensors):
            return parameters
        weights = self.weights() if self.compress in SHRUNK else [False] * len(self.tensors)
        triples = enumerate(zip(parameters.tensors, self.tensors, weights))
        shrunk = [self._difference(i, data) if weight else to_values(data, base) for i, (data, base, weight) in triples]
        return Parameters(shrunk, "")

    def _difference(self, index, data):
        """Return the array, plus the rounding errors of the last rounds, as a difference."""
        self.rests = self.rests or [np.float32(0)] * len(self.tensors)
        whole, base = read_npy(data) + self.rests[index], self.tensors[index]
        sent = to_difference(write_npy(whole), base, self.compress)
        with np.errstate(invalid="ignore"):
            self.rests[index] = np.nan_to_num(whole - read_npy(restore(sent, base)), posinf=0, neginf=0)
        return sent
