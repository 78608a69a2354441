"""How fast this device trains, and --slowdown: a rehearsal of a slower one."""

from __future__ import annotations

import time

import torch


class Paced:
    """The batches of `loader`; counts them and the time until the last one is done.

    slowdown: how many times slower the processor is to be: after each batch this sleeps accordingly.
    """

    def __init__(self, loader, slowdown=1):
        self.loader, self.slowdown = loader, slowdown
        self.steps, self.images, self.seconds = 0, 0, 0.0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        started = marked = time.monotonic()
        for images, labels in self.loader:
            yield images, labels
            self.steps, self.images = self.steps + 1, self.images + len(labels)
            if self.slowdown > 1:
                wait_for(images)
                time.sleep((self.slowdown - 1) * (time.monotonic() - marked))
                marked = time.monotonic()
        wait_for(images)
        self.seconds += time.monotonic() - started

    def telemetry(self):
        """Return what there was to train on, and how fast it was."""
        told = {"steps": self.steps, "images": self.images, "images_per_second": self.images / max(self.seconds, 1e-9)}
        return {**told, "slowdown": self.slowdown} if self.slowdown > 1 else told


def wait_for(images):
    """Wait until a GPU has done what it was told; the processor has by now."""
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
