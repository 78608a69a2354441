"""What stands for a net's parameters on the wire; for both of its ends, registry.py and client.py.

A device that holds a model already, as the averaged one that it has just evaluated, is sent its name alone when it is
to train from it. And --compress shrinks the float32 parameters, not the buffers: fp16 makes float16 of them, int8 8-bit
differences: a device's to the model that it was sent, the server's to the model before.
"""

from __future__ import annotations

import hashlib
import io
import struct
import threading
from collections.abc import Callable

from libs import np

from flwr.common import Parameters

COMPRESS = ("off", "fp16", "int8")
WIRE = 1  # what a client says in the handshake that can do what is described here; others get Flower's plain arrays
# To it tensor_type is "<compress> <name of the model>", and there are no tensors where it holds that model. A tensor is
# an .npy or, where it was shrunk, a mark, the number of dimensions (uint8), these (uint32), and float16 values, or a
# scale (float32) and int8 values. All numbers are little-endian.
HALF, DIFFERENCE = b"fp16", b"int8"
LEAST = 2.0**-14  # float16's smallest number with all of its digits


def write_npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
    return file.getvalue()


def read_npy(data: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)


def write_shrunk(mark, array, before=b""):
    return mark + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape) + before + array.tobytes()


def to_half(data: bytes) -> bytes:
    """A float32 .npy as a tensor of float16; as it is where that cannot be: infinite, or too small for its digits."""
    array = read_npy(data)
    with np.errstate(over="ignore"):
        half = array.astype("<f2")
    if not np.isfinite(half).all() or 0 < np.abs(array).max(initial=0) < LEAST:
        return data
    return write_shrunk(HALF, half)


def to_difference(data: bytes, base: bytes) -> bytes:
    """A float32 .npy as a tensor of 8-bit differences to `base`; as it is where there is no finite difference."""
    with np.errstate(over="ignore", invalid="ignore"):
        change = read_npy(data) - read_npy(base)
        scale = np.abs(change).max(initial=0) / np.float32(127)
    if not np.isfinite(scale):
        return data
    steps = np.rint(change / scale) if scale > 0 else change
    return write_shrunk(DIFFERENCE, steps.clip(-127, 127).astype(np.int8), scale.astype("<f4").tobytes())


def restore(data: bytes, base: bytes | None = None) -> bytes:
    """The .npy that a tensor stands for; `base` is the one that a difference is to. Raises ValueError for nonsense."""
    mark = data[:4]
    if mark not in (HALF, DIFFERENCE):
        return data
    try:
        (ndim,) = struct.unpack_from("<B", data, 4)
        shape, values = struct.unpack_from(f"<{ndim}I", data, 5), data[5 + 4 * ndim :]
        if mark == HALF:
            return write_npy(np.frombuffer(values, "<f2").reshape(shape).astype(np.float32))
        if base is None:
            raise ValueError("a difference to nothing that was sent")
        (scale,), like = struct.unpack_from("<f", values), read_npy(base)
        steps = np.frombuffer(values, np.int8, offset=4).reshape(shape).astype(np.float32)
        if steps.shape != like.shape or like.dtype != np.float32:
            raise ValueError(f"a difference of shape {shape} to {like.dtype} {like.shape}")
        with np.errstate(over="ignore", invalid="ignore"):
            return write_npy(like + steps * np.float32(scale))
    except struct.error:
        raise ValueError(f"an array of {len(data)} bytes is cut off") from None


def restore_all(tensors, bases):
    """All tensors of a message; `bases` has the arrays that differences are to, in the same order, or is None."""
    bases = (bases or []) + [None] * len(tensors)
    return [restore(data, base) for data, base in zip(tensors, bases)]


class Model:
    """A model as devices get it: `tensors` is what they then hold (.npy), the others stand for it on the wire."""

    def __init__(self, tensors, whole, before=None, differences=None):
        self.tensors, self.whole = tensors, whole
        self.before, self.differences = before, differences  # to those that hold the Model `before`
        digest = hashlib.sha256()
        for data in tensors:
            digest.update(data)
        self.name = digest.hexdigest()[:16]


class Sender:
    """The server's end, one for all devices: what each is sent for the parameters that all are to get.

    `learned` says of each array whether `compress` is for it (nets.learned).
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
        if self.compress == "fp16":
            whole = [to_half(data) if learned else data for data, learned in zip(tensors, self.learned)]
            return Model(restore_all(whole, None), whole)
        if self.compress == "int8" and before is not None:
            triples = zip(tensors, before.tensors, self.learned)
            differences = [to_difference(data, base) if learned else data for data, base, learned in triples]
            tensors = restore_all(differences, before.tensors)
            before.before = None  # or no model would ever be forgotten
            return Model(tensors, tensors, before, differences)
        return Model(tensors, tensors)

    def pack(self, model: Model, held: Model | None) -> Parameters:
        """What to send of `model` to a device that holds the Model `held`, or None."""
        tensors = model.whole
        if held is not None and held.name == model.name:
            tensors = []
        elif held is not None and held is model.before:
            tensors = model.differences
        return Parameters(tensors, f"{self.compress} {model.name}")


class Holder:
    """A device's end of one connection: the model that it was sent last, and what int8 has kept back.

    `learned` is called for nets.learned of the net that is trained.
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
        if self.compress not in ("fp16", "int8") or len(tensors) != len(self.tensors):
            return parameters
        shrink = (lambda index, data: to_half(data)) if self.compress == "fp16" else self._difference
        pairs = enumerate(zip(tensors, self.learned()))
        return Parameters([shrink(index, data) if learned else data for index, (data, learned) in pairs], self.compress)

    def _difference(self, index, data):
        """The array as a difference, together with what the last rounds' differences were too coarse for."""
        self.rests = self.rests or [np.float32(0)] * len(self.tensors)
        whole, base = read_npy(data) + self.rests[index], self.tensors[index]
        sent = to_difference(write_npy(whole), base)
        with np.errstate(invalid="ignore"):
            self.rests[index] = np.nan_to_num(whole - read_npy(restore(sent, base)), posinf=0, neginf=0)
        return sent
