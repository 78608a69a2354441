"""The nets by name, and what can be done with any of them: build, compare, save, load, predict.

To train another net, write its class here, add it to `NETS`, and name it by `--net` on the server; the devices follow.
A net takes `(in_channels, num_classes)`, and images of the size that its attribute `image_size` says (height, width).
What else it may have: the attribute `augment`, which is the server's default for --augment, and the buffers
`input_mean` and `input_std` to normalise its input by (normalise_input).
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from libs import UserError, atomic_write, decode_image, nn, np, prepare_image, torch

from torch.nn.modules.batchnorm import _BatchNorm

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
    """The class that NETS has under `name`. Raises UserError where it has none of that name."""
    if name not in NETS:
        raise UserError(f"nets.py has no net {name}; it has {', '.join(NETS)}")
    return NETS[name]


def build_net(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """The net of that name with fresh parameters, on the CPU. Raises UserError where there is none."""
    model = find_net(name)(in_channels, num_classes)
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


def trial(model: nn.Module) -> np.ndarray:
    """What `model` computes: a float32 vector of its outputs for fixed images and parameters, which replace its own.

    First the logits in eval mode, then those in train mode and the buffers that this pass leaves. A net that is random
    in training has a single nan for these. By it two nets with the same fingerprint are told apart (same_trial) when
    what lies between their parameters differs: an activation, a pooling, a momentum.
    """
    noise = np.random.RandomState(0).normal(size=65521).astype(np.float32)  # the same in every numpy
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = torch.from_numpy(np.resize(noise, tuple(tensor.shape)))
            if tensor.ndim > 1:
                values = values / tensor[0].numel() ** 0.5  # so that the outputs stay about as large as the inputs
            if name.endswith(("running_var", "input_std")):  # which are never negative or next to nothing
                values = values.abs().clamp(0.01)
            tensor.copy_(values)
    model_device = next(iter(model.state_dict().values())).device
    shape = (4, model.in_channels, *model.image_size)
    images = torch.from_numpy(np.resize(noise, shape)).sigmoid().to(model_device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = [model.eval()(images)]
        trained = model.train()(images)
        buffers = [buffer.clone() for buffer in model.buffers()]
        outputs += [trained, *buffers] if torch.equal(trained, model(images)) else [torch.tensor(torch.nan)]
    return np.concatenate([output.float().cpu().numpy().ravel() for output in outputs])


def same_trial(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two vectors of `trial` are the same, as far as boards and versions of torch compute the same."""
    if one.shape != other.shape:
        return False
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
    write_tensors(path, checkpoint)


def write_tensors(path: Path, value) -> None:
    """Write what torch.save makes of `value` to `path`, whole or not at all. Raises OSError when it cannot be written.

    It is made in memory: on a full disk torch's own writer raises a RuntimeError, for some sizes at its very end.
    """
    whole = io.BytesIO()
    torch.save(value, whole)
    with atomic_write(path) as part:
        part.write_bytes(whole.getbuffer())


def load_checkpoint(path: Path | str) -> tuple[nn.Module, dict]:
    """Read a checkpoint: (the net in eval mode, on the CPU; the checkpoint's dictionary).

    Runs no code from the file. Raises ValueError for a net that is not in this module.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if checkpoint["net"] not in NETS:
        raise ValueError(f"its net is {checkpoint['net']}, which nets.py has not")
    model = build_net(checkpoint["net"], checkpoint["in_channels"], checkpoint["num_classes"])
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint


def predict(model: nn.Module, checkpoint: dict, image: Path | str | np.ndarray) -> tuple[str, dict[str, float]]:
    """The class that `model` sees in `image`, and the probability of each: (name, {name: 0..1}).

    `model` and `checkpoint` are what load_checkpoint returns; `image` is the path of a file, or an array as
    decode_image returns it. It is prepared as the images of the training were. Raises UserError where it cannot be.
    """
    if not isinstance(image, np.ndarray):
        try:
            image = decode_image(Path(image).read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"image {image} cannot be read: {error}") from None
    size = model.image_size
    images = checkpoint.get("images") or {}  # an older checkpoint has none
    first = images.get("image_size") or size, images.get("fit") or "squash", images.get("levels")
    image = prepare_image(image, *first, channels=model.in_channels)  # as partition.py did it
    image = prepare_image(image, size, channels=model.in_channels)  # as the device did, where the net's size is another
    pixels = torch.from_numpy(image.reshape(1, *size, model.in_channels)).permute(0, 3, 1, 2).float().div(255)
    training, device = model.training, next(model.parameters()).device
    with torch.no_grad():
        probabilities = model.eval()(pixels.to(device)).softmax(1)[0].tolist()
    model.train(training)
    names = checkpoint.get("classes") or [str(label) for label in range(model.num_classes)]
    return names[int(np.argmax(probabilities))], dict(zip(names, probabilities))
