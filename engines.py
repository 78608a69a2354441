"""Train and test any net: the loop over the batches, and what clients and server run with it.

A loader is anything with a length that yields (float32 B×C×H×W, int64 B): data.BatchLoader or torch's DataLoader.
"""

from __future__ import annotations

import sys

from libs import nn, np, say, torch, tqdm
from plumbing.common.fast import Adam
from plumbing.common.state import save_checkpoint

# The server's flags that client_fit_fn has parameters for: they travel to the devices with each round.
HYPER_PARAMETERS = ("num_epochs", "lr", "seed", "proximal_mu", "augment")
SHIFT = 2  # pixels by which --augment shifts an image at most: with the usual 4, 100 rounds are too few


def run_epoch(loader, model: nn.Module, device, optimizer=None, title=None, augment=False) -> tuple[float, float]:
    """Train `model` for one pass over `loader`, or only measure it if `optimizer` is None.

    title: of a progress bar, None for no bar. augment: change each image at random (shift_and_mirror).

    Returns (mean cross entropy in nats, accuracy in 0..1), both over all images; a training pass measures each batch
    before the step on it. Nothing in the loop waits for a GPU: the results are read back once, at the end.
    """
    training = optimizer is not None
    model.train(training)
    loss_fn = nn.CrossEntropyLoss()
    sizes, losses, answers, truths = [], [], [], []
    with torch.set_grad_enabled(training):
        for images, labels in tqdm(loader, title, leave=False, disable=title is None):
            images, labels = images.to(device), labels.to(device)  # copies nothing that is there already
            if augment:
                images = shift_and_mirror(images)
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


def shift_and_mirror(images: torch.Tensor) -> torch.Tensor:
    """Return the `images` (B×C×H×W), each shifted by up to SHIFT pixels either way, with black at the new edge.

    That is a random crop of the image with a border. Coloured images (C = 3) are also mirrored left to right half of
    the time; grey ones are not, since they may be digits or letters. Uses torch's random numbers.
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
    """An optimizer that adds FedProx's term (Li et al. 2020, arXiv 1812.06127) to each step of `optimizer`.

    The term, mu/2·‖w − w₀‖², pulls the trained parameters w towards the global model w₀, which is what they are when
    this is created.
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

    Returns {"fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy"}, floats. fit_* are measured in the last training
    pass, each batch before the step on it; eval_* with the trained model.

    save_ckp_path: where a checkpoint is saved, None for nowhere. An OSError there is only printed.
    training_verbose: show a progress bar per epoch, on a terminal.
    seed: makes the order of the images, and what is random in the net, reproducible.
    about: describes the checkpoint (common/state.save_checkpoint).
    proximal_mu: FedProx's (Proximal); its term is not part of the losses.
    augment: shift and mirror the fit images at random, in the fit figures too, but not the eval images.

    The server sends those of HYPER_PARAMETERS.
    """
    if seed is not None:
        torch.manual_seed(seed)
    model.to(device)
    optimizer = Adam(model.parameters(), lr)
    if proximal_mu:
        optimizer = Proximal(optimizer, model.parameters(), proximal_mu)
    show = training_verbose and sys.stderr.isatty()
    for epoch in range(1, num_epochs + 1):
        title = f"epoch {epoch}/{num_epochs}" if show else None
        fit_loss, fit_accuracy = run_epoch(loaders["fit"], model, device, optimizer, title, augment)
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


def count_answers(loader, model: nn.Module) -> np.ndarray:
    """Count how often `model` takes an image of class i for class j: int64 [i, j], over the images of `loader`."""
    model.eval()
    with torch.no_grad():
        pairs = [(labels, model(images)) for images, labels in loader]
    num_classes = pairs[0][1].shape[1]
    truths, answers = torch.cat([labels for labels, _ in pairs]), torch.cat([out.argmax(1) for _, out in pairs])
    return torch.bincount(truths * num_classes + answers, minlength=num_classes**2).reshape(num_classes, -1).numpy()
