"""The batch norm that a device keeps to itself with --fedbn."""

from __future__ import annotations

from plumbing.common.process import say
from plumbing.common.state import batch_norm_names, read_saved, write_tensors

import torch

KEPT_RUNS = 8  # runs whose batch norm is kept


class OwnBatchNorm:
    """The batch norm of a device (FedBN, Li et al. 2021, arXiv 2102.07623), for the last KEPT_RUNS runs.

    path: a file with {name of the run: {name: tensor}}, written after each fit, so that a restarted device continues
        with its own batch norm.
    """

    def __init__(self, path):
        self.path, self.kept = path, None  # the file is read when it is first needed

    def put_into(self, model, runs):
        """Copy what was kept for the first known run of `runs` into `model`; return whether there was any."""
        if runs and self.kept is None:
            self.kept = self._read()
        for run in runs:
            if run in self.kept:
                self.kept[run] = self.kept.pop(run)  # now the newest, and the last to be dropped
                state = model.state_dict()
                for name, tensor in self.kept[run].items():
                    state[name].copy_(tensor)
                return True
        return False

    def keep(self, model, run):
        """Keep the batch norm of `model`, unless it has diverged: the server drops such a model, too."""
        state = model.state_dict()
        own = {name: state[name].detach().cpu().clone() for name in batch_norm_names(model)}
        if not all(torch.isfinite(tensor).all() for tensor in own.values()):
            return
        self.kept.pop(run, None)
        self.kept[run] = own
        for old in list(self.kept)[:-KEPT_RUNS]:
            del self.kept[old]
        try:
            write_tensors(self.path, self.kept)
        except OSError as error:
            say(f"cannot write {self.path} ({error.strerror}): batch norm is lost when this process ends")

    def _read(self):
        if not self.path.exists():
            return {}
        try:
            return read_saved(self.path)
        except (OSError, ValueError) as error:
            say(f"{self.path} cannot be read ({error}): batch norm begins with the server's")
            return {}
