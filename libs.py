"""What all modules import from one place: numpy, torch and tqdm, the three folders, and the basics of plumbing/.

    np, torch, nn, tqdm           third-party packages; torch is imported when it is first asked for
    ROOT, DATASETS, CKPS          the suite's folder, what partition.py writes, what training writes
    UserError, say, run_script    a user's mistake, a line on the terminal, how a script starts and ends
    decode_image, prepare_image   how an image is read, and brought to a net's size

Import it before any other package: plumbing sets the variables that these read. What only some modules need (cv2,
pandas, wandb, matplotlib) they import themselves.
"""

import gc
from pathlib import Path

from plumbing.common.images import decode_image, prepare_image
from plumbing.common.process import UserError, run_script, say

import numpy as np
from tqdm import tqdm


def __getattr__(name):
    """Import `torch` and `nn` when they are first asked for: partition.py needs neither, and would wait a second."""
    if name not in ("torch", "nn"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    collecting = gc.isenabled()
    gc.disable()  # none of its thousand modules is garbage, and to search them takes almost a third of a script's start
    try:
        import torch
    finally:
        gc.freeze()
        if collecting:
            gc.enable()
    globals().update(torch=torch, nn=torch.nn)
    return globals()[name]


ROOT = Path(__file__).resolve().parent
DATASETS = ROOT / "datasets"
CKPS = ROOT / "ckps"
