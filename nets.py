"""The nets, and what works with any of them: build it by name, load its checkpoint, predict.

To train another net, write its class here, add it to `NETS`, and name it by `--net` on the server; the devices follow.
A net takes `(in_channels, num_classes)`, and has the attribute `image_size` (height, width). Optional are the attribute
`augment`, the server's default for --augment, and the buffers `input_mean` and `input_std` (normalise_input).
"""

from __future__ import annotations

from pathlib import Path

from libs import UserError, nn, np, prepare_image, torch
from plumbing.common.compare import blamed_on
from plumbing.common.fast import MaxPool2d
from plumbing.common.images import as_pixels
from plumbing.common.process import printable
from plumbing.common.state import get_arrays, read_saved, save_checkpoint, set_arrays  # noqa: F401 (for those who import them from here)


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
    """Return the class that NETS has under `name`. Raises UserError if it has none, or what it has cannot be a net."""
    if name not in NETS:
        raise UserError(f"nets.py has no net {name}; it has {', '.join(NETS)}")
    net = NETS[name]
    if not (isinstance(net, type) and issubclass(net, nn.Module) and net.__name__ == name):
        raise UserError(f"net {name} cannot be used: NETS needs a class of that name, derived from nn.Module")
    size = getattr(net, "image_size", None)
    if not (isinstance(size, tuple) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise UserError(f"net {name} cannot be used: its image_size is {printable(size, 40)}, not (height, width)")
    return net


def build_net(name: str, in_channels: int, num_classes: int) -> nn.Module:
    """Return the net of that name with fresh parameters, on the CPU. Raises UserError if there is none, or it fails."""
    net = find_net(name)
    with blamed_on(name, "built"):
        model = net(in_channels, num_classes)
        model.in_channels, model.num_classes = in_channels, num_classes
        return model


def normalise_input(model: nn.Module, mean: list[float] | None, std: list[float] | None) -> None:
    """Make `model` normalise its input by a dataset's `mean` and `std`, a float in 0..1 per channel.

    They go into its buffers `input_mean` and `input_std` (float32 1×C×1×1), and with these to the devices and into the
    checkpoints. Does nothing if the net has no such buffers, or the dataset does not say (None).
    """
    for name, values in (("input_mean", mean), ("input_std", std and [max(value, 1 / 255) for value in std])):
        buffer = dict(model.named_buffers()).get(name)
        if buffer is not None and values is not None:
            with blamed_on(type(model).__name__, f"given the data's {name}"):
                buffer.copy_(torch.tensor(values).view_as(buffer))


def load_checkpoint(path: Path | str) -> tuple[nn.Module, dict]:
    """Read a checkpoint: (the net in eval mode, on the CPU; the checkpoint's dictionary).

    Runs no code from the file. Raises ValueError, with the reason, if the file is damaged or no checkpoint, or its net
    is not in this module or a different one here; OSError if it cannot be read.
    """
    checkpoint = read_saved(path)
    if checkpoint.get("net", "LeNet5") not in list(NETS):
        raise ValueError(f"its net is {printable(checkpoint['net'], 40)}, which nets.py does not have")
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
    """Classify an image: (the most probable class, {class: its probability in 0..1}).

    `model` and `checkpoint` are what load_checkpoint returns. `image` is the path of an image file, its bytes, a file
    object, a PIL image, or an array of uint8 or uint16, H×W or H×W×C with C 1, 3 (RGB) or 4 (RGB and alpha). It is
    prepared as the training images were. Raises UserError if it cannot be.
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
