"""The nets by name, and what can be done with any of them: build, compare, save, load, predict.

To train another net, write its class here, add it to `NETS`, and name it by `--net` on the server; the devices follow.
A net takes `(in_channels, num_classes)`, and images of the size that its attribute `image_size` says (height, width).
What else it may have: the attribute `augment`, which is the server's default for --augment, and the buffers
`input_mean` and `input_std` to normalise its input by (normalise_input).
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import os
import random
import sys
import zipfile
from pathlib import Path

from libs import UserError, atomic_write, decode_image, nn, np, prepare_image, printable, torch

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

TRIED = 8  # images in a trial
TOLERANCE = 2e-4  # of the greatest output: far more than boards and versions of torch differ by, far less than nets do


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


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with batch norm, ReLU and max pooling, for images of 32×32.

    Takes float32 N×in_channels×32×32 and returns logits, float32 N×num_classes.
    """

    image_size = (32, 32)

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.layer1 = nn.Sequential(nn.Conv2d(in_channels, 6, 5), nn.BatchNorm2d(6), nn.ReLU(), MaxPool2d())
        self.layer2 = nn.Sequential(nn.Conv2d(6, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), MaxPool2d())
        self.layer3 = nn.Sequential(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        self.classifier = nn.Linear(84, num_classes)

    def forward(self, images):
        for convolution, norm, relu, pool in (self.layer1, self.layer2):
            images = relu(pool(norm(convolution(images))))  # what pool(relu(…)) gives, for a quarter of ReLU's work
        return self.classifier(self.layer3(images.flatten(1)))


class GroupNet(nn.Module):
    """Two convolutions, two residual ones (He et al. 2015, arXiv 1512.03385), group norm, for images of 32×32.

    Takes float32 N×in_channels×32×32 in 0..1 and returns logits, float32 N×num_classes. With group norm (Wu & He 2018,
    arXiv 1803.08494) nothing in it depends on the other images of a batch, or is a running mean of a device's own.
    """

    image_size = (32, 32)
    augment = True

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.register_buffer("input_mean", torch.full((1, in_channels, 1, 1), 0.5))
        self.register_buffer("input_std", torch.full((1, in_channels, 1, 1), 0.25))
        self.layer1 = nn.Sequential(nn.Conv2d(in_channels, 32, 5, 2, 2, bias=False), nn.GroupNorm(8, 32), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.GroupNorm(8, 64), nn.ReLU())
        self.layer3 = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.GroupNorm(8, 64))
        self.layer4 = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.GroupNorm(8, 64))
        self.pool = nn.AvgPool2d(2)
        self.classifier = nn.Linear(1024, num_classes)

    def forward(self, images):
        images = self.layer2(self.layer1((images - self.input_mean) / self.input_std))
        images = torch.relu(images + self.layer3(images))
        images = torch.relu(images + self.layer4(images))
        return self.classifier(self.pool(images).flatten(1))


NETS = {net.__name__: net for net in (LeNet5, GroupNet)}  # yours goes here


def find_net(name: str) -> type[nn.Module]:
    """The class that NETS has under `name`. Raises UserError where it has none, or what is there can be no net."""
    if name not in NETS:
        raise UserError(f"nets.py has no net {name}; it has {', '.join(NETS)}")
    net = NETS[name]
    if not (isinstance(net, type) and issubclass(net, nn.Module) and net.__name__ == name):
        raise UserError(f"net {name} cannot be used: NETS needs a class of that name, derived from nn.Module")
    size = getattr(net, "image_size", None)
    if not (isinstance(size, tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise UserError(f"net {name} cannot be used: its image_size is {printable(size, 40)}, not (height, width)")
    return net


@contextlib.contextmanager
def blamed_on(name, what):
    """Turn whatever goes wrong in this block into a UserError with the reason: nets are what users write themselves."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"net {name} cannot be {what}: {type(error).__name__}: {printable(error)}") from error


def build_net(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """The net of that name with fresh parameters, on the CPU. Raises UserError where there is none, or it fails."""
    net = find_net(name)
    with blamed_on(name, "built"):
        model = net(in_channels, num_classes)
        model.in_channels, model.num_classes = in_channels, num_classes
        return model


def normalise_input(model: nn.Module, mean: list[float] | None, std: list[float] | None) -> None:
    """Have `model` normalise its input by a data set's `mean` and `std`, a float in 0..1 a channel, where both can.

    They go into its buffers `input_mean` and `input_std` (float32 1×C×1×1), and with these to the devices and into the
    checkpoints. A net without the buffers, and a data set that does not say (None), change nothing.
    """
    for name, values in (("input_mean", mean), ("input_std", std and [max(value, 1 / 255) for value in std])):
        buffer = dict(model.named_buffers()).get(name)
        if buffer is not None and values is not None:
            with blamed_on(type(model).__name__, f"given the data's {name}"):
                buffer.copy_(torch.tensor(values).view_as(buffer))


def batch_norm_names(model: nn.Module) -> list[str]:
    """The names in the state dict of `model` that belong to batch norm, parameters and buffers alike."""
    modules = model.named_modules(remove_duplicate=False)  # as the state dict names one that stands twice
    norms = [(f"{name}." if name else "", module) for name, module in modules if isinstance(module, _BatchNorm)]
    return [prefix + key for prefix, module in norms for key in module.state_dict()]


def get_arrays(model: nn.Module) -> list[np.ndarray]:
    """Copies of the parameters and buffers of `model`: a list of numpy arrays, in the order of its state dict."""
    return [tensor.detach().cpu().numpy().copy() for tensor in model.state_dict().values()]


def set_arrays(model: nn.Module, arrays: list[np.ndarray]) -> None:
    """Put such a list into `model`, in place. Raises ValueError where number or shapes differ."""
    state = model.state_dict()
    if len(arrays) != len(state):
        raise ValueError(f"{len(arrays)} arrays for a net of {len(state)}")
    for (name, tensor), array in zip(state.items(), arrays):
        if tuple(tensor.shape) != np.shape(array):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {np.shape(array)}")
        tensor.copy_(torch.as_tensor(array))


def count_parameters(model: nn.Module) -> int:
    """How many numbers training changes in `model`."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def learned(model: nn.Module) -> list[bool]:
    """Of each array of get_arrays whether it is a float32 parameter, and no buffer, such as the means of batch norm."""
    parameters = {id(parameter) for parameter in model.parameters()}
    state = model.state_dict(keep_vars=True).values()
    return [id(tensor) in parameters and tensor.dtype == torch.float32 for tensor in state]


def fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that two nets share when their parameters have the same names, shapes and dtypes."""
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in model.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@contextlib.contextmanager
def seeded(seed: int):
    """Make what is random in this block, on the CPU, the same each time; what follows is as random as before."""
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


def fill(model: nn.Module) -> None:
    """Give all parameters and buffers of `model` values of their own, the same ones on every machine."""
    noise = np.random.RandomState(0).normal(size=65521).astype(np.float32)  # the same in every numpy
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
            values = torch.from_numpy(np.resize(np.roll(noise, -index), tuple(tensor.shape)))
            if tensor.dtype == torch.bool:
                values = values > 0
            elif tensor.ndim > 1:
                values = values / (tensor[:1].numel() or 1) ** 0.5  # so that outputs stay about as large as inputs
            if name.endswith(("running_var", "input_std")):  # which are never negative or next to nothing
                values = values.abs().clamp(0.01)
            tensor.copy_(values * (0.6 + 0.8j) if tensor.is_complex() else values)
        else:  # integers, such as indices, for which not any number will do
            tensor.copy_(tensor.flatten().sort().values.view_as(tensor))


def trial(model: nn.Module) -> np.ndarray:
    """What a copy of `model` computes on the CPU for fixed images, parameters and random numbers: float32 2×n.

    The first row has a number for the random numbers that this machine draws, the rates of dropout layers, the logits
    in eval mode, those in train mode, and the buffers that this pass leaves; the second row is the same, with nan for
    what is random. By it two nets with the same fingerprint are told apart (same_trial) when what lies between their
    parameters differs: an activation, a pooling, a momentum. Raises UserError, with the reason, for a net that cannot
    be run or trained, or whose parameters cannot be sent.
    """
    rows, name, shape = [], type(model).__name__, (TRIED, model.in_channels, *model.image_size)
    noise = np.random.RandomState(1).uniform(size=65521).astype(np.float32)
    images, labels = torch.from_numpy(np.resize(noise, shape)), torch.arange(TRIED) % model.num_classes
    rates = [layer.p for layer in model.modules() if isinstance(layer, _DropoutNd)]
    for seed in (0, 1):
        with seeded(seed):
            draws = torch.cat([torch.empty(12).bernoulli_(0.5), (torch.empty(12).exponential_() > 0.7).float()])
            with blamed_on(name, "run"):
                net = copy.deepcopy(model)
                fill(net)
                set_arrays(net, get_arrays(net))
                with torch.no_grad():
                    logits = [net.eval()(images.clone())]
            with blamed_on(name, "trained"):
                if any(parameter.is_complex() for parameter in net.parameters()):
                    raise TypeError("engines.Adam takes no complex parameters (complex buffers are fine)")
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
    """Raise UserError unless `logits`, the output of `model` for TRIED images, is a float tensor of N×num_classes."""
    whole = isinstance(logits, torch.Tensor) and logits.is_floating_point()
    if not whole or logits.shape != (TRIED, model.num_classes):
        found = f"{logits.dtype} {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        wanted = f"for {TRIED} images, not a float tensor of {TRIED}×num_classes, which is {model.num_classes} here"
        raise UserError(f"net {type(model).__name__} cannot be used: it returns {found} {wanted}")


def same_trial(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two results of `trial` are the same, as far as boards and versions of torch compute the same.

    From one seed an Intel CPU draws other numbers than an ARM board, which has no MKL to draw those of dropout. Between
    these only what does not depend on the seed is compared.
    """
    if one.size != other.size:
        return False
    one, other, steady = one.reshape(other.shape)[0], other[0], other[0] == other[1]
    compared = slice(1, None) if one[0] == other[0] else steady
    one, other = one[compared], other[compared]
    finite = np.abs(other[np.isfinite(other)])
    return np.allclose(one, other, rtol=0, atol=TOLERANCE * max(1, finite.max(initial=0)), equal_nan=True)


def save_checkpoint(path: Path, model: nn.Module, about: dict | None = None) -> None:
    """Write `model` to `path`, whole or not at all, as a dictionary that describes itself.

    `about` gives what the net does not know: classes, dataset, round, metrics, wandb_run_id, args; None where absent.
    Raises OSError when it cannot be written; the file that was there before is then still there.
    """
    checkpoint = {
        "model": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "net": type(model).__name__,
        "in_channels": model.in_channels,
        "num_classes": model.num_classes,
        **dict.fromkeys(("classes", "dataset", "round", "metrics", "wandb_run_id", "args")),
        **(about or {}),
    }
    with atomic_write(path) as part:
        with open(part, "wb") as file:  # opened here, so that a full disk is an OSError and not torch's own
            torch.save(checkpoint, file)


def read_saved(path: Path | str) -> dict:
    """The dictionary that torch.save wrote to `path`, on the CPU, after a look at the checksums in the file.

    Runs no code from the file. Raises ValueError, with the reason, for a file that is damaged or of another kind, and
    OSError for one that cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # torch itself checks nothing
            if archive.testzip() is not None:
                raise ValueError("its checksum is wrong")
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zipfile and torch make of it
        raise ValueError(f"it is damaged, or not of this suite: {printable(error)}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"it is not of this suite: it holds a {type(saved).__name__}")
    return saved


def load_checkpoint(path: Path | str) -> tuple[nn.Module, dict]:
    """Read a checkpoint: (the net in eval mode, on the CPU; the checkpoint's dictionary).

    Runs no code from the file. Raises ValueError, with the reason, for a file that is damaged or no checkpoint, and for
    one whose net this module has not, or has another of that name; OSError where it cannot be read.
    """
    checkpoint = read_saved(path)
    if checkpoint.get("net", "LeNet5") not in list(NETS):
        raise ValueError(f"its net is {printable(checkpoint['net'], 40)}, which nets.py has not")
    missing = [name for name in ("net", "in_channels", "num_classes", "model") if name not in checkpoint]
    if missing:
        raise ValueError(f"it is no checkpoint of this suite: it has no {', '.join(missing)}")
    try:
        model = build_net(checkpoint["net"], checkpoint["in_channels"], checkpoint["num_classes"])
        model.load_state_dict(checkpoint["model"])
    except Exception as error:
        raise ValueError(f"it does not fit the {checkpoint['net']} of nets.py: {printable(error)}") from error
    return model.eval(), checkpoint


def predict(model: nn.Module, checkpoint: dict, image) -> tuple[str, dict[str, float]]:
    """The class that `model` sees in `image`, and the probability of each: (name, {name: 0..1}).

    `model` and `checkpoint` are what load_checkpoint returns. `image` is the path of an image file, its bytes, a file
    object, a PIL image, or an array of uint8 or uint16, H×W or H×W×C with C 1, 3 (RGB) or 4 (RGB and alpha). It is
    prepared as the images of the training were. Raises UserError where it cannot be, and for anything else.
    """
    size = model.image_size
    images = checkpoint.get("images") or {}  # an older checkpoint has none
    first = images.get("image_size") or size, images.get("fit") or "squash", images.get("levels")
    image = prepare_image(as_pixels(image), *first, channels=model.in_channels)  # as partition.py did it
    image = prepare_image(image, size, channels=model.in_channels)  # as the device did, where the net's size is another
    pixels = torch.from_numpy(image.reshape(1, *size, model.in_channels)).permute(0, 3, 1, 2).float().div(255)
    training, device = model.training, next(model.parameters()).device
    with torch.no_grad():
        probabilities = model.eval()(pixels.to(device)).softmax(1)[0].tolist()
    model.train(training)
    names = checkpoint.get("classes") or [str(label) for label in range(model.num_classes)]
    return names[int(np.argmax(probabilities))], dict(zip(names, probabilities))


PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # of PIL, those that a PNG keeps as they are


def as_pixels(image):
    """The array that decode_image would return for what predict takes as an `image`. Raises UserError."""
    if isinstance(image, np.ndarray):
        if image.dtype.kind != "u" or image.dtype.itemsize > 2:
            raise UserError(f"an array has to be uint8 or uint16, not {image.dtype}: scale it to 0..255 and convert it")
        if not image.size or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
            raise UserError(f"an array has to be H×W, H×W×1, H×W×3 or H×W×4, not {'×'.join(map(str, image.shape))}")
        image = np.ascontiguousarray(image, f"u{image.dtype.itemsize}")
        return image[:, :, 0] if image.shape[2:] == (1,) else image
    shown = printable(image, 100) if isinstance(image, (str, os.PathLike)) else type(image).__name__
    try:
        if "PIL.Image" in sys.modules and isinstance(image, sys.modules["PIL.Image"].Image):
            from PIL import ImageOps

            if image.mode not in PNG_MODES:
                raise UserError(f'a PIL image cannot be of mode {image.mode}: give image.convert("RGB")')
            file = io.BytesIO()
            ImageOps.exif_transpose(image).save(file, "PNG", compress_level=1)
            image = file.getvalue()
        elif isinstance(image, (str, os.PathLike)):
            image = Path(image).read_bytes()
        elif hasattr(image, "read"):
            image = image.read()
        if not isinstance(image, (bytes, bytearray, memoryview)):
            raise UserError(f"no image can be made of a {shown}: give a path, bytes, a PIL image or a numpy array")
        return decode_image(bytes(image))
    except (OSError, ValueError) as error:
        raise UserError(f"image {shown} cannot be read: {error}") from None
