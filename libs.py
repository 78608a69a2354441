"""Third-party names that the modules share, and what all scripts use from plumbing/.

All other modules import from here, by name, and before anything that is not Python's own: plumbing sets what other
packages read when they are imported. What only some need (cv2, pandas, wandb, matplotlib) they import themselves.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import hmac
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

from plumbing import UNNAMED, VERSION
from plumbing.common.arguments import (
    find_folder,
    given_flags,
    join_address,
    list_datasets,
    new_parser,
    nonempty_path,
    number,
    plain_args,
    read_secret,
    refuse_readable,
    split_address,
)
from plumbing.common.files import atomic_write, lock_file
from plumbing.common.images import decode_image, prepare_image
from plumbing.common.process import UserError, mute_handlers, on_signal, printable, quiet_flower, run_script, say
from plumbing.common.sockets import KEEPALIVE, keep_alive, tcp_sockets


@contextlib.contextmanager
def quick_imports():
    """Import in this block without garbage collection, and leave what was imported out of later collections.

    Of a thousand modules nothing is garbage, and searching them took a third of the start.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collecting:
            gc.enable()


with quick_imports():
    import numpy as np
    from tqdm import tqdm


def __getattr__(name):
    """Import `torch` and `nn` when they are first asked for: partition.py needs neither, and would wait a second."""
    if name not in ("torch", "nn"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quick_imports():
        import torch
    globals().update(torch=torch, nn=torch.nn)
    return globals()[name]


ROOT = Path(__file__).resolve().parent
DATASETS = ROOT / "datasets"
CKPS = ROOT / "ckps"
