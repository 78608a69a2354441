"""What keeps the scripts running: files, processes, connections. Imports no script; see each module's first line.

    common/     on the devices and on the laptop; Python 3.8
    device/     on the devices; Python 3.8
    laptop/     on the laptop
    sources/    partition.py's readers, one per file

This file is imported before any other package. It sets the variables that flwr, grpc and cv2 read when they are
imported, and ends a script that misses a package in one line.
"""

import os
import sys
from pathlib import Path

if sys.version_info < (3, 8):  # noqa: UP036 (this is the check)
    sys.stderr.write("FL-IoT needs Python 3.8 or newer; this is Python {}.{}\n".format(*sys.version_info[:2]))
    raise SystemExit(2)

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")  # the system's resolver, which knows names that end in .local
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

VERSION = "1.3.0"  # of the suite, as in pyproject.toml; client and server tell each other theirs
PACKAGES = {"PIL": "pillow", "cv2": "opencv-python-headless", "grpc": "grpcio"}
PACKAGES.update((name, name) for name in "filelock flwr matplotlib numpy pandas torch tqdm wandb".split())


def print_in_one_line(kind, error, trace):
    """Be sys.excepthook: one line for Ctrl-C and for a missing package, also while modules are imported."""
    name = Path(sys.argv[0]).name
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write(f"{name}: interrupted\n")
    elif issubclass(kind, ModuleNotFoundError) and error.name in PACKAGES:
        pip = f"{sys.executable} -m pip install {PACKAGES[error.name]}"
        text = f"{error.name} is not installed: start this script with .venv/bin/python, or run {pip}"
        sys.stderr.write(f"{name}: {text}\n")
        sys.stderr.flush()
        os._exit(2)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = print_in_one_line
