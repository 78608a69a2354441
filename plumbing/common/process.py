"""How a script starts, prints, handles signals and ends."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend: the script ends with this as one line on stderr, and exit code 2."""


class SafeStream:
    """A text stream that never raises: not for a full disk, a closed pipe, or a terminal that is gone.

    What cannot be written is lost, or written later.
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


def make_printing_safe():
    """Make sure that printing never ends the process, and never writes into another file."""
    while True:  # the next file or connection would get the number of a stream that the caller has closed: take it
        number = os.open(os.devnull, os.O_RDWR)
        if number > 2:
            os.close(number)
            break
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for a terminal that lacks our letters
        if not isinstance(stream, SafeStream):
            setattr(sys, name, SafeStream(stream))


def on_signal(act: Callable[[int], None]) -> None:
    """Call `act(signum)`, in a thread of its own, for each SIGINT and SIGTERM from now on.

    The handlers themselves do nothing: an exception that a handler raises inside gRPC deadlocks the process for good
    (grpc 19973, 20026), and a handler waits until the main thread leaves C code. Python writes the number of a signal
    to a socket at once, whatever the main thread does, and it is read here. From now on the process ends by os._exit
    (run_script): gRPC's threads, which wait for clients that are cut off or frozen, may never end.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch():
        while True:
            reader.recv(1, socket.MSG_PEEK)
            time.sleep(0.0002)  # for the others that wait: the kernel delivers the greatest number first
            for signum in sorted(reader.recv(64)):
                act(signum)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: None)
    on_signal.writer = writer  # kept open; run_script looks whether it is there


def run_script(main: Callable[[], int]) -> None:
    """Run a script's `main` and end the process with its exit code: 2 for a UserError, 130 or 143 for a signal."""

    def leave(signum, frame):
        for other in (signal.SIGINT, signal.SIGTERM):  # the first one decides, and the end is not interrupted
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    make_printing_safe()
    try:
        code = main()
    except UserError as error:
        say(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", sys.stderr)
        code = 2
    sys.stdout.flush()
    if hasattr(on_signal, "writer"):
        os._exit(code)
    sys.exit(code)


def say(text: str, file=None) -> None:
    """Print a line at once, above any progress bars; on a terminal, folded if it is too long."""
    file = file or sys.stdout
    columns = shutil.get_terminal_size((0, 0)).columns if file.isatty() else 0
    lines = text.split("\n")
    tqdm.write("\n".join(fold(line, columns) if 0 < columns < len(line) else line for line in lines), file=file)
    file.flush()


def fold(line: str, columns: int) -> str:
    """Break a line between words, but not before a number or a unit, so that no part of it is longer than `columns`.

    A command to copy, at its end, stays one: it begins a line of its own, and is continued after backslashes.
    """
    text, command = re.fullmatch(r"(.*?)((?<=: )(?:'[^']*/|\S*/)?(?:python|wandb|cp)'? .*)?", line, re.DOTALL).groups()
    folded = "\n".join(fill(text.rstrip(), columns))
    return folded if command is None else f"{folded}\n    " + " \\\n".join(fill(command, columns - 6))


def fill(text, columns):
    """Return lines of whole words; all but the first are indented."""
    lines = [""]
    for word in re.findall(r"\s*(?:(?<!\w)'[^']*'|\S)+(?: (?=[\d.]|s\b|°C)\S+)*", text):
        if lines[-1] and len(lines[-1] + word) > columns:
            lines.append("    " + word.lstrip())
        else:
            lines[-1] += word
    return lines


def quiet_flower():
    """Keep the logs of Flower and gRPC off the terminal: our own messages say what went wrong."""
    for name in ("flwr", "grpc"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def printable(value, limit: int = 200) -> str:
    """Return a value that somebody else sent as one short line that a terminal can show."""
    if isinstance(value, (str, bytes)):
        value = value[: 4 * limit]
    try:
        text = " ".join(str(value).split())
    except ValueError:  # Python spells out no integer of more than 4300 digits
        text = f"a huge {type(value).__name__}"
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"
