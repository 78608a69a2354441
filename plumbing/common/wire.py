"""What stands for a net's parameters on the wire; for both of its ends, laptop/registry and device/connection.

A device that holds a model already, as the averaged one that it has just evaluated, is sent its name alone when it is
to train from it. And --compress shrinks the float32 parameters, not the buffers, to differences of 16 bits (fp16) or 8
bits (int8): a device's to the model that it was sent, the server's to the model before. What a difference is too coarse
for goes with the next one.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
from collections.abc import Callable

import numpy as np
from flwr.common import Parameters

WIRE = 2  # what a client says in the handshake that can do what is described here; others get Flower's plain arrays
# To it tensor_type is "<compress> <name of the model>", and there are no tensors where it holds that model. A tensor is
# an .npy or, where it was shrunk, a mark, the number of dimensions (uint8), these (uint32), a scale (float32), and the
# difference divided by the scale, in the mark's type. All numbers are little-endian.
COMPRESS = ("off", "fp16", "int8")
SHRUNK = {"fp16": ("<f2", 2**15), "int8": ("i1", 127)}  # by mark: the type, and what the greatest difference becomes


def write_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return file.getvalue()


def read_npy(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def to_difference(data: bytes, base: bytes, mark: str) -> bytes:
    """A float32 .npy as its difference to `base`, shrunk by `mark`; as it is where there is no finite difference."""
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
    """The .npy that a tensor stands for; `base` is the one that a difference is to. Raises ValueError for nonsense."""
    mark = data[:4].decode("latin-1")
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
    """All tensors of a message; `bases` has the arrays that differences are to, in the same order, or is None."""
    bases = (bases or []) + [None] * len(tensors)
    return [restore(data, base) for data, base in zip(tensors, bases)]


class Model:
    """A model as devices get it: `tensors` is what they then hold (.npy)."""

    def __init__(self, tensors, before=None, differences=None):
        self.tensors = tensors
        self.before, self.differences = before, differences  # what stands for it to those that hold the Model `before`
        digest = hashlib.sha256()
        for data in tensors:
            digest.update(data)
        self.name = digest.hexdigest()[:16]


class Sender:
    """The server's end, one for all devices: what each is sent for the parameters that all are to get.

    `learned` says of each array whether `compress` is for it (state.float32_weights).
    """

    def __init__(self, compress: str = "off", learned: list[bool] | None = None):
        self.compress, self.learned = compress, learned
        self.lock = threading.Lock()  # the questions to all devices begin at the same time
        self.parameters, self.model = None, None  # the newest

    def model_of(self, parameters: Parameters) -> Model:
        """The Model that stands for `parameters`, made once for all devices."""
        with self.lock:
            if self.model is None or parameters.tensors != self.parameters.tensors:
                self.parameters, self.model = parameters, self._make(parameters.tensors, self.model)
            return self.model

    def _make(self, tensors, before):
        if self.compress == "off" or before is None:
            return Model(tensors)
        triples = zip(tensors, before.tensors, self.learned)
        differences = [to_difference(data, base, self.compress) if learned else data for data, base, learned in triples]
        before.before = None  # or no model would ever be forgotten
        return Model(restore_all(differences, before.tensors), before, differences)

    def pack(self, model: Model, held: Model | None) -> Parameters:
        """What to send of `model` to a device that holds the Model `held`, or None."""
        tensors = model.tensors
        if held is not None and held.name == model.name:
            tensors = []
        elif held is not None and held is model.before:
            tensors = model.differences
        return Parameters(tensors, f"{self.compress} {model.name}")


class Holder:
    """A device's end of one connection: the model that it was sent last, and what differences were too coarse for.

    `learned` is called for state.float32_weights of the net that is trained.
    """

    def __init__(self, learned: Callable[[], list[bool]]):
        self.learned = learned
        self.compress, self.name, self.tensors, self.rests = "off", None, None, None

    def unpack(self, parameters: Parameters) -> Parameters:
        """What the server sent, as Flower's plain arrays. Raises ValueError for nonsense."""
        self.compress, _, name = parameters.tensor_type.partition(" ")
        if not name:  # from a server that knows nothing of this module
            return parameters
        if parameters.tensors:
            self.name, self.tensors = name, restore_all(parameters.tensors, self.tensors)
        elif name != self.name:
            raise ValueError(f"the server takes this device to hold the model {name}, not {self.name}")
        return Parameters(self.tensors, "numpy.ndarray")

    def pack(self, parameters: Parameters) -> Parameters:
        """What to send back for `parameters`, Flower's plain arrays."""
        tensors = parameters.tensors
        if self.compress not in SHRUNK or len(tensors) != len(self.tensors):
            return parameters
        pairs = enumerate(zip(tensors, self.learned()))
        shrunk = [self._difference(index, data) if learned else data for index, (data, learned) in pairs]
        return Parameters(shrunk, self.compress)

    def _difference(self, index, data):
        """The array as a difference, together with what the last rounds' differences were too coarse for."""
        self.rests = self.rests or [np.float32(0)] * len(self.tensors)
        whole, base = read_npy(data) + self.rests[index], self.tensors[index]
        sent = to_difference(write_npy(whole), base, self.compress)
        with np.errstate(invalid="ignore"):
            self.rests[index] = np.nan_to_num(whole - read_npy(restore(sent, base)), posinf=0, neginf=0)
        return sent
