"""Third-party names that the modules share, and the helpers that the scripts share.

All other modules import from here, by name, and before anything that is not Python's own: this module sets what other
packages read when they are imported. What only some need (cv2, pandas, wandb, matplotlib) they import themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import shlex
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before flwr, grpc and cv2 are imported: nothing phones home, and C code keeps its riddles to itself.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("GRPC_DNS_RESOLVER", "native")  # the system's, which knows the names that end in .local

if sys.version_info < (3, 8):  # noqa: UP036 (that is what it is to find out)
    sys.stderr.write("FL-IoT needs Python 3.8 or newer; this is Python {}.{}\n".format(*sys.version_info[:2]))
    raise SystemExit(2)


PACKAGES = {"cv2": "opencv-python-headless", "grpc": "grpcio"}
PACKAGES.update((name, name) for name in "filelock flwr matplotlib numpy pandas torch tqdm wandb".split())


def missing(error):
    """What to do about a package that is not here, for which a ModuleNotFoundError stands; None for one of our own."""
    if error.name not in PACKAGES:
        return None
    pip = f"{sys.executable} -m pip install {PACKAGES[error.name]}"
    return f"{error.name} is missing here: start this with .venv/bin/python, or {pip}"


def say_in_one_line(kind, error, trace):
    """Ctrl-C is no error, nor is a package that a device lacks: one line, also while modules are imported."""
    name = Path(sys.argv[0]).name
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write(f"{name}: interrupted\n")
    elif issubclass(kind, ModuleNotFoundError) and missing(error):
        sys.stderr.write(f"{name}: {missing(error)}\n")
        sys.stderr.flush()
        os._exit(2)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say_in_one_line

collecting = gc.isenabled()
gc.disable()  # of a thousand modules nothing is garbage; to look for it, again and again, took a third of the start
import numpy as np
from tqdm import tqdm

if Path(sys.argv[0]).name != "partition.py":  # which needs no torch, and would wait a second for it
    import torch
    from torch import nn
gc.freeze()  # and later searches pass over them
if collecting:
    gc.enable()

ROOT = Path(__file__).resolve().parent
DATASETS = ROOT / "datasets"
CKPS = ROOT / "ckps"
HAS_MODE_BITS = os.name == "posix"  # on Windows those of others are always set
KEEPALIVE = 30  # seconds until a connection whose other side has vanished is ended


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


def plain_args(args: argparse.Namespace) -> dict:
    """The arguments of a script as a checkpoint can hold them: a dictionary of plain types."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def find_folder(config: dict) -> Path:
    """The suite's own folder, of which a Flower App knows by its `config` alone. Raises UserError where it does not."""
    folder = config.get("folder", "")
    if not (isinstance(folder, str) and Path(folder).is_absolute() and Path(folder).is_dir()):
        raise UserError(f"folder is {folder!r} in the config: it has to be the suite's folder here, from / on")
    return Path(folder)


def read_secret(path: Path | None) -> bytes | None:
    """The secret in the file `path` (bytes, without surrounding white space), or None where `path` is None."""
    if path is None:
        return None
    try:
        if HAS_MODE_BITS and path.stat().st_mode & 0o077:
            raise UserError(f"secret file {path} can be read by others: chmod 600 {shlex.quote(str(path))}")
        secret = path.read_bytes().strip()
    except OSError as error:
        raise UserError(f"secret file {path} cannot be read: {error.strerror}") from None
    if not secret:
        raise UserError(f"secret file {path} is empty")
    return secret


def prove(secret: bytes, nonce: str, cid: int) -> str:
    """The answer to the server's challenge: HMAC-SHA-256 over nonce and cid, as hex digits."""
    return hmac.new(secret, f"{nonce} {cid}".encode(), hashlib.sha256).hexdigest()


def printable(value, limit: int = 200) -> str:
    """What somebody else sent, as one short line that a terminal can show."""
    if isinstance(value, (str, bytes)):
        value = value[: 4 * limit]
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python spells out no integer of more than 4300 digits
        text = f"a huge {type(value).__name__}"
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def split_address(text: str, port: int | None = None, default: int = 8080) -> tuple[str, int]:
    """What the user gave as an address, taken apart: (host, port), the host without brackets, IPv6 zones kept.

    Takes "host", "host:port", "[::1]:port", "fe80::1%eth0", and all these as pasted from a browser. `port` is what was
    given as a port of its own, or None. Raises UserError for what can never be reached, rather than try for minutes.
    """
    rest = re.sub(r"^\w+://", "", text.strip()).rstrip("/")
    host, colon, tail = rest, "", ""
    if rest.startswith("["):
        host, bracket, tail = rest[1:].partition("]")
        colon, tail = tail[:1], tail[1:]
        if not bracket or ":" not in host or colon not in ("", ":"):
            raise UserError(f"--server_address {text} is neither a name nor an IP address")
    elif rest.count(":") == 1:
        host, colon, tail = rest.partition(":")
    address, percent, zone = host.partition("%")
    try:
        ip = ipaddress.ip_address(address)
        if percent and not (zone and ip.version == 6):
            raise ValueError
        if ip.version == 6 and ip.is_link_local and not zone:
            raise UserError(f"--server_address {text} needs the network card, as in {address}%eth0")
    except ValueError:
        name = r"(\w([\w-]{0,61}\w)?\.)*(?!\d+$)\w([\w-]{0,61}\w)?\.?"  # the last part is no number: that's a bad IP
        if len(host) > 253 or re.fullmatch(name, host) is None:
            raise UserError(f"--server_address {text} is neither a name nor an IP address") from None
    if not colon:
        return host, default if port is None else port
    if not re.fullmatch(r"[0-9]{1,5}", tail) or not 0 < int(tail) < 65536:
        raise UserError(f"--server_address {text} has {tail or 'nothing'!r} for a port, not a number from 1 to 65535")
    if port not in (None, int(tail)):
        raise UserError(f"--server_address {text} and --server_port {port} name two ports")
    return host, int(tail)


def join_address(host: str, port: int) -> str:
    """The two as one word: "host:port", "[::1]:port"."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def keep_alive(sock: socket.socket) -> None:
    """Have the kernel ask the other side's kernel whether it is still there, and end the connection where it is not.

    So one that vanishes is noticed within KEEPALIVE seconds, while one that is merely busy, for however long, answers.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE // 2),
        ("TCP_KEEPALIVE", KEEPALIVE // 2),  # macOS's name for it
        ("TCP_KEEPINTVL", KEEPALIVE // 6),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * KEEPALIVE),  # the same for what is sent and not acknowledged
    ):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def tcp_sockets(port: int, far: bool = False) -> Iterator[socket.socket]:
    """This process's TCP connections from the local port `port`, or with `far` those to the port `port`, one at a time.

    Each is a copy of the socket, closed when the next is asked for. Where the system has no /dev/fd (Windows), nothing.
    """
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else []:
        with contextlib.suppress(OSError):  # closed in the meantime, or not connected
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as sock:
                    near, peer = sock.getsockname(), sock.getpeername()
                    if sock.family in (socket.AF_INET, socket.AF_INET6) and (peer if far else near)[1] == port:
                        yield sock


# ---------------------------------------------------------------------------------------------------------------------
# The process: what it prints, its signals, its end, its files.


class Steady:
    """A text stream to print to, whatever becomes of it: a full disk, a closed pipe, a terminal that is gone.

    What cannot be written is lost, or written later; no one who prints is told.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def steady_streams():
    """Make printing safe for the rest of the process: nothing that is said may end what is done."""
    while True:  # a stream that was closed by the caller leaves its number to the next file or connection, so hold it
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for a terminal that lacks our letters
        if not isinstance(stream, Steady):
            setattr(sys, name, Steady(stream))


def on_signal(act: Callable[[int], None]) -> None:
    """Call `act(signum)`, in a thread of its own, for each SIGINT and SIGTERM from now on.

    The handlers themselves do nothing. An exception that a handler raises inside gRPC deadlocks the process for good
    (grpc 19973, 20026), and a handler waits for the main thread to leave C code. The number of a signal is written to a
    socket at once, whatever the main thread does, and read here. From now on the process ends by os._exit (run_script),
    for the ends of gRPC's threads cannot be trusted either.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch():
        while True:
            reader.recv(1, socket.MSG_PEEK)
            time.sleep(
                0.0002
            )  # of signals that wait together, the kernel hands over the one with the greater number first
            for signum in sorted(reader.recv(64)):
                act(signum)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    mute_handlers()
    on_signal.writer = writer  # kept open; also says that signals are watched


def mute_handlers() -> None:
    """Give SIGINT and SIGTERM handlers that do nothing (on_signal has their numbers), in place of any others."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: None)


def run_script(main: Callable[[], int]) -> None:
    """Run a script's `main` and end the process with its exit code: 2 for a UserError, 130 or 143 for a signal."""

    def leave(signum, frame):
        for other in (signal.SIGINT, signal.SIGTERM):  # the first one decides; what ends is not interrupted
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    steady_streams()
    try:
        code = main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except ModuleNotFoundError as error:
        if missing(error) is None:
            raise
        print(f"{Path(sys.argv[0]).name}: {missing(error)}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    if hasattr(on_signal, "writer"):
        os._exit(code)
    sys.exit(code)


def say(text: str, file=None) -> None:
    """Print a line at once, above the progress bars if any are shown."""
    tqdm.write(text, file=file or sys.stdout)
    (file or sys.stdout).flush()


def quiet_flower():
    """Keep the logs of Flower and gRPC off the terminal: what went wrong is said in our own words."""
    for name in ("flwr", "grpc"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def lock_file(path: Path):
    """Lock the file `path` for this process, until it ends: the lock, to be kept, or None where another process has it.

    The file holds nothing: on some systems locking empties it. Raises OSError where it cannot be made.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    return lock


def sync_file(path: Path | str) -> None:
    """Wait until the disk has what was written to the file `path`. Raises OSError where it cannot be written there."""
    with open(path, "rb+") as file:  # "+": Windows syncs only what may be written
        os.fsync(file.fileno())


def sync_folder(path: Path | str) -> None:
    """Wait until the disk has the names in the folder `path`: new files, and those that were renamed or removed.

    Windows and some network drives cannot do that: there it does nothing, like SQLite.
    """
    with contextlib.suppress(OSError):
        folder = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Give a path to write to; what was written gets the name `path` when the block ends well, and else vanishes.

    The disk has the file before it is renamed, and its name before this returns: a power cut leaves the old file or
    the new one, and the new one wherever anything that was written later is left.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        sync_file(part)
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it has its name, or what went wrong is raised already
            part.unlink()


# ---------------------------------------------------------------------------------------------------------------------
# Images and their digests: what partition.py, the devices and nets.predict have to do alike. Here and not in data.py,
# which imports torch, that partition.py needs not wait for; cv2 is imported where it is used, since most devices can
# spare its 15 MB.


def tiff_tags(block):
    """The tags of a TIFF file, or of an EXIF block, which has its form: {tag: number}, those of 16 bits alone."""
    order, tags = "<" if block[:2] == b"II" else ">", {}
    with contextlib.suppress(struct.error):  # it ends early
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", block, entry)
            if kind == 3:
                tags[tag] = value
    return tags


def decode_image(encoded: bytes) -> np.ndarray:
    """An image file's bytes as a viewer shows them: uint8 or uint16 of H×W, H×W×3 (RGB) or H×W×4 (RGB and alpha).

    Upright, as its EXIF says; of an animation the first frame. Raises ValueError, with the reason, for what is damaged
    or has no counterpart here.
    """
    import cv2

    def decode(flags):
        try:
            return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        except cv2.error:
            return None

    png, tiff = encoded.startswith(b"\x89PNG"), encoded[:4] in (b"II*\0", b"MM\0*")
    upright = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_ANYDEPTH  # turned as its EXIF says, and without alpha; the other neither
    image = decode(upright if encoded.startswith(b"\xff\xd8") else cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("damaged, or of a format that OpenCV does not read")
    if image.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"its values are {image.dtype}, not whole numbers of 8 or 16 bits")
    if tiff and tiff_tags(encoded).get(277) == 2:  # SamplesPerPixel
        raise ValueError("a TIFF of grey and alpha, which OpenCV reads without the alpha")
    if png and image.ndim == 2:
        header = encoded[: encoded.find(b"IDAT")]
        at = header.find(b"tRNS")  # one grey value that is transparent, which OpenCV knows in coloured PNGs alone
        if at >= 0:
            depth, value = header[24], int.from_bytes(header[at + 4 : at + 6], "big")
            value = value * 255 // (2**depth - 1) if depth < 8 else value
            opaque = np.where(image == value, 0, np.iinfo(image.dtype).max).astype(image.dtype)
            image = np.dstack([image] * 3 + [opaque])
    alpha = image.ndim == 3 and image.shape[2] == 4
    if image.dtype == np.uint16 and encoded[4:8] == b"ftyp":  # AVIF of 10 or 12 bits, which OpenCV does not shift
        if alpha:
            raise ValueError("an AVIF of more than 8 bits with alpha")
        image = decode(cv2.IMREAD_COLOR)
    at = encoded.find(b"eXIf" if png else b"EXIF") if png or encoded[8:12] == b"WEBP" else -1
    if not alpha:
        image = decode(upright) if at >= 0 else image
        return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    exif = encoded[at + (4 if png else 8) :] if at >= 0 else b""
    turn = tiff_tags(exif[6:] if exif.startswith(b"Exif\0\0") else exif).get(274, 1)  # Orientation
    if turn in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    image = image[:: -1 if turn in (3, 4, 7, 8) else 1, :: -1 if turn in (2, 3, 6, 7) else 1]
    image = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGRA2RGBA)
    if tiff and image.dtype == np.uint8:  # libtiff has multiplied the colours by alpha
        alpha = np.maximum(image[:, :, 3:], 1).astype(np.uint16)
        image[:, :, :3] = np.minimum((image[:, :, :3] * np.uint16(255) + alpha // 2) // alpha, 255)
    return image


def prepare_image(image: np.ndarray, image_size, fit="squash", levels=None, channels=None) -> np.ndarray:
    """What a net sees of a decoded image: uint8 H×W if grey, H×W×3 (RGB) if coloured, of `image_size` (height, width).

    Of 16 bits a value of `levels` (low, high) becomes 0..255, or without them its upper byte is taken; alpha is put on
    white. `fit` "squash" scales both sides, whatever they were; "crop" first takes the middle in the right proportion.
    `channels` 1 makes any image grey, 3 any coloured; None leaves it to the image: one of grey pixels alone is grey.
    """
    import cv2

    if image.dtype == np.uint16:
        colours = image[:, :, :3] if image.ndim == 3 else image
        if levels is None:
            eight = (colours >> 8).astype(np.uint8)
        else:
            low, high = levels
            scaled = (colours.astype(np.float32) - low) * np.float32(255 / max(high - low, 1))
            eight = np.clip(scaled + 0.5, 0, 255).astype(np.uint8)
        alpha = image.ndim == 3 and image.shape[2] == 4
        image = np.dstack([eight, (image[:, :, 3] >> 8).astype(np.uint8)]) if alpha else eight
    if image.ndim == 3 and image.shape[2] == 4:
        alpha = image[:, :, 3:].astype(np.uint16)
        image = ((image[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    (height, width), (old_height, old_width) = image_size, image.shape[:2]
    if fit == "crop":
        new_height = max(1, min(old_height, round(old_width * height / width)))
        new_width = max(1, min(old_width, round(old_height * width / height)))
        top, left = (old_height - new_height) // 2, (old_width - new_width) // 2
        image = image[top : top + new_height, left : left + new_width]
    if image.shape[:2] != (height, width):
        image = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA)
    if channels == 3 and image.ndim == 2:
        return np.dstack([image] * 3)
    if channels == 1 and image.ndim == 3:
        return cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY)
    if channels is None and image.ndim == 3 and (image == image[:, :, :1]).all():
        return image[:, :, 0]
    return image


def image_digest(image: np.ndarray) -> bytes:
    """16 bytes that two uint8 arrays share when their shapes and pixels are the same."""
    digest = hashlib.blake2b(str(image.shape).encode(), digest_size=16)
    digest.update(image.tobytes())  # row by row, whatever the order in memory
    return digest.digest()


def table_digest(rows, image_digests) -> str:
    """32 hex digits over the rows of a CSV, each a sequence of str, and over the images that they name, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for row, image in zip(rows, image_digests):
        digest.update(",".join(row).encode() + b"\n" + image)
    return digest.hexdigest()


def cut_id(info: dict) -> str:
    """The id of a cut, 32 hex digits over what dataset.json says of it: two cuts share it when they are the same."""
    what = [info[name] for name in ("classes", "channels", "image_size", "shards", "test")]
    return hashlib.blake2b(json.dumps(what).encode(), digest_size=16).hexdigest()
