"""Draw terminal.png: what the laptop's terminal shows of a real run, on CIFAR-10 with ten clients.

    python benchmarks/screenshot.py

The server runs on a terminal of its own, of COLUMNS columns; what it writes there is drawn, and nothing else.
"""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from common import BUILD_ARCHIVE, HERE, Suite, leave_on_signals

COLUMNS, NUM_CLIENTS, NUM_ROUNDS = 80, 10, 4


def read_all(terminal):
    """All that is written to a terminal, until its last writer is gone."""
    written = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other end is closed
            return written.decode()
        if not data:
            return written.decode()
        written += data


def as_seen(written, columns):
    """The lines that a terminal shows in the end: \\r goes back to the start of the line, long lines are broken."""
    shown = []
    for written_line in written.replace("\r\n", "\n").rstrip("\n").split("\n"):
        line = ""
        for text in written_line.split("\r"):
            line = text + line[len(text) :]
        line = line.rstrip()
        shown += [line[start : start + columns] for start in range(0, max(len(line), 1), columns)]
    return shown


def draw(lines, path):
    """The lines in a fixed-width face, light on dark, into the PNG `path`."""
    from matplotlib.figure import Figure

    size = 9  # points; a letter of DejaVu Sans Mono is 0.602 as wide
    width, height = (COLUMNS + 4) * 0.602 * size / 72, (len(lines) + 1) * 1.25 * size / 72
    figure = Figure(figsize=(width, height), facecolor="#1e1e1e")
    for number, line in enumerate(lines):
        place = 1 - (number + 1.1) / (len(lines) + 1)
        look = {
            "family": "DejaVu Sans Mono",
            "fontsize": size,
            "color": "#7ec699" if line.startswith("$") else "#e6e6e6",
        }
        figure.text(2 / (COLUMNS + 4), place, line.replace("$", r"\$"), va="baseline", **look)
    figure.savefig(path, dpi=170, facecolor=figure.get_facecolor())
    print(f"written: {path}")


def main():
    leave_on_signals()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "FL-IoT"
        root.mkdir()
        suite = Suite(root)
        (root / ".venv").symlink_to(sys.prefix)
        try:
            subprocess.run([sys.executable, BUILD_ARCHIVE, folder], check=True)
            suite.partition("--source", f"{folder}/cifar-10-python.tar.gz", "--num_clients", NUM_CLIENTS, timeout=600)
            ours, theirs = pty.openpty()
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 50, COLUMNS, 0, 0))
            command = ["server.py", "--server_port", str(suite.port), "--num_rounds", str(NUM_ROUNDS)]
            env = {**suite.env, "TERM": "xterm", "COLUMNS": str(COLUMNS)}
            place = {"cwd": suite.root, "env": env, "stdin": subprocess.DEVNULL, "stdout": theirs, "stderr": theirs}
            server = subprocess.Popen([root / ".venv/bin/python", *command], **place)
            os.close(theirs)
            for cid in range(NUM_CLIENTS):
                suite.client(cid)
            written = read_all(ours)
            assert server.wait(60) == 0, written
        finally:
            suite.close()
        draw([f"$ .venv/bin/python {' '.join(command)}", *as_seen(written, COLUMNS)], HERE / "terminal.png")


if __name__ == "__main__":
    main()
