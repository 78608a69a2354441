"""How a script starts, prints, handles signals and ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from plumbing import explain_missing

from tqdm import tqdm


class UserError(Exception):
    """Something that the user can mend: a script ends with this as its one line on stderr and exit code 2."""


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
        if explain_missing(error) is None:
            raise
        print(f"{Path(sys.argv[0]).name}: {explain_missing(error)}", file=sys.stderr)
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
