"""One pass of training or of testing over batches, for any net; used by the clients and by the server's test.

A loader is anything with a length that yields (float32 B×C×H×W, int64 B): data.BatchLoader or torch's DataLoader.
"""

from __future__ import annotations

import sys

from libs import nn, np, say, torch, tqdm
from plumbing.common.fast import Adam
from plumbing.common.state import save_checkpoint

# The server's arguments that travel to the devices with each round, as client_fit_fn's parameters of the same names.
HYPER_PARAMETERS = ("num_epochs", "lr", "seed", "proximal_mu", "augment")
# Pixels by which --augment shifts an image at most: with the usual 4 a net learns slower than 100 rounds allow.
SHIFT = 2


def run_epoch(loader, model: nn.Module, device, optimizer=None, title: str | None = None) -> tuple[float, float]:
    """Train `model` for one pass over `loader`, or only measure it where `optimizer` is None.

    Returns (mean cross entropy in nats, accuracy in 0..1), both over all images; a training pass measures each batch
    before the step on it. Nothing in the loop waits for the device: the two sums are read back once, at the end.
    """
    training = optimizer is not None
    model.train(training)
    loss_fn = nn.CrossEntropyLoss()
    sizes, losses, answers, truths = [], [], [], []
    with torch.set_grad_enabled(training):
        for images, labels in tqdm(loader, title, leave=False, disable=title is None):
            images, labels = images.to(device), labels.to(device)  # no copies where they are there already
            logits = model(images)
            loss = loss_fn(logits, labels)
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            sizes.append(len(labels))
            losses.append(loss.detach())
            answers.append(logits.detach().argmax(1))
            truths.append(labels)
    weights = torch.tensor(sizes, dtype=torch.float64)
    loss = torch.stack(losses).cpu().double() @ weights / weights.sum()
    return loss.item(), (torch.cat(answers) == torch.cat(truths)).sum().item() / sum(sizes)


class Augmented:
    """A loader whose batches are those of `loader`, with each image changed at random (shift_and_mirror)."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels in self.loader:
            yield shift_and_mirror(images), labels


def shift_and_mirror(images: torch.Tensor) -> torch.Tensor:
    """Each of the `images` (B×C×H×W) shifted by up to SHIFT pixels either way, with black at the edge that comes in.

    That is a random crop of the image with a border. Coloured ones (C = 3) are also mirrored left to right half of the
    time; grey ones are not, for they may be digits or letters. Drawn from torch's generator.
    """
    size, channels, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device) + torch.randint(2 * SHIFT + 1, (size, 1), device=device)
    columns = torch.arange(width, device=device) + torch.randint(2 * SHIFT + 1, (size, 1), device=device)
    if channels == 3:
        columns = torch.where(torch.rand(size, 1, device=device) < 0.5, columns.flip(1), columns)
    pixels = (rows[:, :, None] * (width + 2 * SHIFT) + columns[:, None]).flatten(1)  # B×(H·W), for all channels alike
    bordered = nn.functional.pad(images, [SHIFT] * 4).flatten(2)
    return bordered.gather(2, pixels[:, None].expand(-1, channels, -1)).view(images.shape)


class Proximal:
    """An optimizer with FedProx's term (Li et al. 2020, arXiv 1812.06127) in each step of `optimizer`.

    The term, mu/2·‖w − w₀‖² over what is trained, pulls it towards the global model w₀, which the parameters are when
    this is made.
    """

    def __init__(self, optimizer, parameters, mu):
        self.optimizer, self.mu = optimizer, mu
        self.pairs = [(parameter, parameter.detach().clone()) for parameter in parameters if parameter.requires_grad]

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        for parameter, start in self.pairs:
            pull = (parameter - start).mul_(self.mu)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
        self.optimizer.step()


def client_fit_fn(
    loaders: dict,
    model: nn.Module,
    num_epochs: int = 1,
    device="cpu",
    save_ckp_path=None,
    training_verbose: bool = True,
    lr: float = 1e-3,
    seed: int | None = None,
    about: dict | None = None,
    proximal_mu: float = 0.0,
    augment: bool = False,
) -> dict[str, float]:
    """Train `model` with Adam for `num_epochs` passes over loaders["fit"], then measure it on loaders["eval"].

    Returns {"fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy"}, floats. fit_* are of the last pass over the fit
    images, in training mode, each batch before the step on it; eval_* are of the trained model. `proximal_mu` is
    FedProx's (Proximal), no part of the losses; `augment` changes the fit images, and the fit figures with them
    (shift_and_mirror), but not the others. With a `seed` the order of the images, and what is random in the net, is the
    same each time. Saves a checkpoint, which `about` describes (state.save_checkpoint), to `save_ckp_path` if given;
    an error there is only printed. `training_verbose` shows a progress bar per epoch, on a terminal.

    Those of HYPER_PARAMETERS come from the server.
    """
    if seed is not None:
        torch.manual_seed(seed)
    model.to(device)
    optimizer = Adam(model.parameters(), lr)
    if proximal_mu:
        optimizer = Proximal(optimizer, model.parameters(), proximal_mu)
    fit_loader = Augmented(loaders["fit"]) if augment else loaders["fit"]
    show = training_verbose and sys.stderr.isatty()
    for epoch in range(1, num_epochs + 1):
        title = f"epoch {epoch}/{num_epochs}" if show else None
        fit_loss, fit_accuracy = run_epoch(fit_loader, model, device, optimizer, title)
    eval_loss, eval_accuracy = run_epoch(loaders["eval"], model, device, title="eval" if show else None)
    metrics = {
        "fit_loss": fit_loss,
        "fit_accuracy": fit_accuracy,
        "eval_loss": eval_loss,
        "eval_accuracy": eval_accuracy,
    }
    if save_ckp_path is not None:
        try:
            save_checkpoint(save_ckp_path, model, {**(about or {}), "metrics": metrics})
        except OSError as error:
            say(f"cannot save {save_ckp_path}: {error.strerror}")
    return metrics


def server_test_fn(test_loaders: dict, server_model: nn.Module, device="cpu") -> dict[str, float]:
    """Measure `server_model` on test_loaders["test"]; returns {"test_loss", "test_accuracy"}, floats."""
    test_loss, test_accuracy = run_epoch(test_loaders["test"], server_model.to(device), device)
    return {"test_loss": test_loss, "test_accuracy": test_accuracy}


def count_answers(loader, model: nn.Module, device="cpu") -> np.ndarray:
    """How often `model` takes an image of class i for class j: int64 [i, j], over the images of `loader`."""
    model.to(device).eval()
    with torch.no_grad():
        pairs = [(labels, model(images.to(device)).cpu()) for images, labels in loader]
    num_classes = pairs[0][1].shape[1]
    truths, answers = torch.cat([labels.cpu() for labels, _ in pairs]), torch.cat([out.argmax(1) for _, out in pairs])
    return torch.bincount(truths * num_classes + answers, minlength=num_classes**2).reshape(num_classes, -1).numpy()
