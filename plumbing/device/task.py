"""What the server asks a device to train: a net, on one split of the data."""

from __future__ import annotations

from plumbing.common.compare import fingerprint, seeded, trial
from plumbing.common.process import UserError, say


class Task:
    """The net that the server names, and this device's shard.

    model: the net, None until the server has named one.
    loaders: {"fit": BatchLoader, "eval": BatchLoader}, None until the shard is read.
    about: describes the checkpoints (common/state.save_checkpoint).
    load: called as load(image_size), reads the shard from disk: (loaders, what `about` says of the data).
    nets: {name: net class}.
    build_net: called as build_net(name, in_channels, num_classes).
    """

    def __init__(self, model=None, loaders=None, about=None, load=None, nets=None, build_net=None):
        self.model, self.loaders, self.about = model, loaders, about or {}
        self.load, self.nets, self.build_net = load, nets, build_net

    @property
    def in_channels(self):
        return self.loaders["fit"].dataset.images.shape[1]

    def build(self, net, dataset_id):
        """Build the net named `net`; read the shard first if its image size or split (`dataset_id`) is another one.

        Raises UserError if the net or the shard cannot be used.
        """
        if net not in self.nets:
            raise UserError(f"its nets.py has no net {net}")
        image_size = self.nets[net].image_size
        has_size = self.loaders is not None and tuple(self.loaders["fit"].dataset.images.shape[2:]) == image_size
        if not has_size or dataset_id not in (None, self.about["dataset_id"]):
            again = " again" if self.loaders else ""
            self.loaders, data = self.load(image_size)
            self.about.update(data)
            say(f"the shard was read{again}: {count_images(self.loaders)} images")
        with seeded(0):  # as the server does for its trial
            self.model = self.build_net(net, self.in_channels, len(self.about["classes"]))

    def make_ready(self, net, dataset_id, device):
        """Build the net, and return what the server compares with its own (laptop/handshake)."""
        try:
            self.build(net, dataset_id)
            answer = {"trial": trial(self.model).tobytes(), "fingerprint": fingerprint(self.model)}
            self.model.to(device)  # the parameters to start from come with the first fit
        except Exception as error:
            answer = {"error": str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"}
            if self.loaders is None:
                return answer
        return {
            **answer,
            "channels": self.in_channels,
            "num_classes": len(self.about["classes"]),
            "dataset_id": self.about["dataset_id"] or "",
            "num_fit": len(self.loaders["fit"].dataset),
            "num_eval": len(self.loaders["eval"].dataset),
        }

    def follow(self, config, device):
        """Build the net that the `config` of a fit or an evaluate names, which it does on Flower's engines.

        There, another process may have answered the question before. Raises UserError if the server's split differs.
        """
        if "net" in config:
            self.build(config["net"], config.get("dataset_id"))
            if config.get("dataset_id") not in (None, self.about["dataset_id"]):
                raise UserError("its shard is no longer of the server's split of the data")
            self.model.to(device)

    def run_names(self, config):
        """Return the names under which batch norm may be kept for the server's run, newest first; [] without --fedbn.

        Another split of the data, or another net, is another run.
        """
        names = config.get("fedbn", "").split()
        return [f"{name} {self.about.get('dataset_id')} {fingerprint(self.model)}" for name in names]


def count_images(loaders):
    """Return the number of images of each phase, as text."""
    return " + ".join(f"{len(loaders[phase].dataset)} {phase}" for phase in loaders)
