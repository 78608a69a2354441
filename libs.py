"""Third-party names that the modules share, and the few helpers that every script needs.

All other modules import from here, by name; wandb and matplotlib are not here, since devices have neither.
"""

import argparse
import contextlib
import importlib
import logging
import os
import re
import signal
import sys
from pathlib import Path

# Before flwr, grpc and cv2 are imported: nothing phones home, and C code keeps its riddles to itself.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")

from tqdm import tqdm

LATER = {"cv2": "cv2", "nn": "torch.nn", "np": "numpy", "pd": "pandas", "torch": "torch"}


def __getattr__(name):
    """Import what not every script needs when it is asked for: torch takes a second and 200 MB, pandas 33 MB."""
    if name not in LATER:
        raise AttributeError(f"libs has no {name}")
    try:
        return importlib.import_module(LATER[name])
    except ModuleNotFoundError as error:
        package = {"cv2": "opencv-python-headless"}.get(error.name, error.name)
        raise UserError(f"{error.name} is missing here: {sys.executable} -m pip install {package}") from None


ROOT = Path(__file__).resolve().parent
DATASETS = ROOT / "datasets"
CKPS = ROOT / "ckps"


class UserError(Exception):
    """Something that the user can mend: a script ends with this as its one line on stderr and exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage before it."""

    def error(self, message):
        raise UserError(f"{message} (see --help)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows every default, and keeps the lines of the description as they are."""

    def _get_help_string(self, action):
        if action.required or action.dest == "help" or "(default" in action.help:
            return action.help
        default = {None: "none", False: "off"}.get(action.default, action.default)
        return f"{action.help} (default: {default})"


def new_parser(description):
    """The parser of a script, `description` being its docstring, with the flag that all scripts share."""

    def name(text):
        if not re.fullmatch(r"\w[\w.-]*", text):
            raise argparse.ArgumentTypeError(f"{text!r} is not a plain name of letters, digits, dots, dashes")
        return text

    parser = Parser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--dataset", type=name, default="CIFAR10", help="name of the folder in datasets/")
    return parser


def number(kind, low, high=float("inf"), inside=False):
    """An argparse type: a number of `kind` (int or float) in low..high; with `inside`, neither low nor high itself."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not (low < value < high if inside else low <= value <= high):
            what = "a whole number" if kind is int else "a number"
            where = f"above {low} and below {high}" if inside else f"from {low} to {high}"
            where = where.replace(" and below inf", "").replace(" to inf", " up")
            raise argparse.ArgumentTypeError(f"{text} is not {what} {where}")
        return value

    return parse


def run_script(main):
    """Run a script's `main` and end the process with its exit code: 2 for a UserError, 130 or 143 for a signal."""

    def leave(signum, frame):
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def say(text, file=None):
    """Print a line at once, above the progress bars if any are shown."""
    tqdm.write(text, file=file or sys.stdout)
    (file or sys.stdout).flush()


def quiet_flower():
    """Keep the logs of Flower and gRPC off the terminal: what went wrong is said in our own words."""
    for name in ("flwr", "grpc"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def claim(path):
    """Hold the file `path` for this process, until it ends: the open file, or None where another process holds it."""
    import fcntl  # Unix only

    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+", encoding="ascii")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def written_whole(path):
    """Give a path to write to; what was written gets the name `path` when the block ends well, and else vanishes.

    The file is on the disk before it is renamed, so that a power cut leaves the old file or the new one.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if part.exists():
            part.unlink()
