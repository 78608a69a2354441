"""What this board is, and what it tells of itself."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import sys
from pathlib import Path

from plumbing.common.files import atomic_write, lock_file
from plumbing.common.process import UserError, say

import flwr
import torch


def choose_device(name: str) -> torch.device:
    """Return the torch device for `--device`. Raises UserError if this machine has none of that name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0][:200]}") from None
    return device


def describe_machine(root: Path = Path("/")) -> dict:
    """What this client runs on, for the server and for people: board, versions, threads, free memory in MB.

    `root` is where /proc lies.
    """
    facts = {"board": platform.machine(), "torch": torch.__version__, "flwr": flwr.__version__}
    facts.update(python=platform.python_version(), threads=torch.get_num_threads())
    with contextlib.suppress(OSError):
        facts["board"] = (root / "proc/device-tree/model").read_text(encoding="utf-8", errors="replace").strip("\0 \n")
    with contextlib.suppress(OSError, AttributeError):
        found = re.search(r"^MemAvailable: +(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
        facts["free_mb"] = int(found[1]) // 1024
    return facts


def sensors(root: Path = Path("/")) -> dict[str, float]:
    """What the board tells of itself now; what it has no sensor for is absent. `root` is where /sys lies.

    peak_memory_mb: of this process. cpu_temp_c: °C. load: processes that want a core, mean of a minute. throttled: a
    Raspberry Pi's bits (vcgencmd get_throttled): 0 undervoltage, 1 capped, 2 throttled, 3 soft limit now; 16 to 19 the
    same since the boot.
    """
    found = {}
    with contextlib.suppress(ImportError):
        import resource  # not on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["peak_memory_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)
    with contextlib.suppress(OSError, ValueError):
        found["cpu_temp_c"] = int((root / "sys/class/thermal/thermal_zone0/temp").read_text()) / 1000
    with contextlib.suppress(OSError, ValueError):
        path = root / "sys/devices/platform/soc/soc:firmware/get_throttled"
        found["throttled"] = int(path.read_text(), 16)
    with contextlib.suppress(OSError, AttributeError):
        found["load"] = os.getloadavg()[0]
    return found


def board_id():
    """What the board, or else the system on it, calls itself (bytes), or b"" where neither says.

    So that the copy of an SD card in another board is another device. (Copies share /etc/machine-id where it was not
    emptied first; the server tells these apart by their both being alive.)
    """
    for path in ("/proc/device-tree/serial-number", "/etc/machine-id"):
        with contextlib.suppress(OSError):
            name = Path(path).read_bytes().strip(b"\0 \n")
            if name.strip(b"0"):
                return name
    return b""


def device_id(path: Path) -> str:
    """The id by which the server knows this device again after a cut or a reboot (32 hex digits).

    Made of a random one in the file `path`, which is written where it is missing or damaged, and of the board's own.
    Where it cannot be written, as on a full card, it is made of the board's alone.
    """
    stored = b""
    with contextlib.suppress(OSError):
        stored = path.read_bytes().strip()
    if re.fullmatch(rb"[0-9a-f]{32}", stored) is None:
        stored = secrets.token_hex(16).encode()
        try:
            with atomic_write(path) as part:
                part.write_bytes(stored)
        except OSError as error:
            say(f"cannot write {path} ({error.strerror}); training does without")
            stored = b""
    return hashlib.sha256(stored + board_id()).hexdigest()[:32]


def lock_cid(cid, folder):
    """Make this the only process for `cid` on this device. Return the lock, to be kept, or None if the disk is full."""
    try:
        lock = lock_file(folder / f"client_{cid}.lock")
    except PermissionError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None
    except OSError as error:  # a full card, or one that has turned read-only
        say(f"cannot write to {folder} ({error.strerror}); training continues without")
        return None
    if lock is None:
        raise UserError(f"a client with --cid {cid} is already running on this device")
    return lock
