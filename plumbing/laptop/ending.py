"""How a run ends: the clients are told, finished rounds are saved, the curves completed; and the exit code."""

from __future__ import annotations

import dataclasses
import signal
import sys
import traceback

from plumbing.common.process import UserError, printable, say
from plumbing.laptop.curves import Curves
from plumbing.laptop.record import Diverged
from plumbing.laptop.rounds import Hopeless, Rounds, Stopped
from plumbing.laptop.screen import Progress, show_end

from flwr.server import ServerConfig


@dataclasses.dataclass
class Run:
    """The parts of a run, to be kept until its end."""

    server: Rounds
    config: ServerConfig
    curves: Curves
    progress: Progress
    lock: object

    @property
    def next_round(self):
        return len(self.server.strategy.record.history.rows) + 1

    def stop(self, signum):
        """Be called with each signal (process.on_signal): take the bar away, and have the server stop."""
        self.progress.close()
        self.server.stop(signum)

    def train(self, start):
        """Call `start`, which runs the rounds, then complete what belongs to them. Return the exit code."""
        code = run_server(self.server, start)
        self.progress.close()
        record, server = self.server.strategy.record, self.server
        if code:
            why = server.error or (server.signum and signal.Signals(server.signum).name) or f"exit code {code}"
            text = f"{record.about['dataset']}, after round {len(record.history.rows)}: {printable(why)}"
            self.curves.alert("the run ended early", text)
        show_results(record, self.curves)
        if code and record.exist():
            say(f"stopped after round {len(record.history.rows)}; continue with --resume")
        return code


def show_results(record, curves):
    """Send and print the results of a closed record."""
    curves.finish(record.models(), record.mistakes, record.about["classes"])
    show_end(record)


def run_server(server, start):
    """Call `start`, which runs the rounds up to the last or what ends them early; save them. Return the exit code."""
    code = 0
    try:
        start()
    except Stopped:
        say(f"stopping ({signal.Signals(server.signum).name}; Ctrl-C again exits at once)")
    except SystemExit as end:  # Flower's own way out, on its engines
        code = 1 if isinstance(end.code, str) else end.code or 128 + signal.SIGTERM
        if isinstance(end.code, str):
            say(f"server.py: {end.code}", sys.stderr)
    except BaseException as error:
        server.error, code = error, fail(error)
    server.registry.close({"why": "stopped", "text": "the server stopped before the last round"})
    try:
        server.strategy.close()
    except BaseException as error:
        server.error, code = server.error or error, code or fail(error)
    return code if server.signum is None else 128 + server.signum


def fail(error):
    """Print why the server ends, with a traceback only if the fault is ours. Return the exit code."""
    if isinstance(error, (Hopeless, Diverged, UserError)):
        say(f"server.py: {error}", sys.stderr)
    elif isinstance(error, OSError):
        say(f"server.py: cannot go on: {error}", sys.stderr)
    else:
        traceback.print_exception(error)
        say(f"server.py: cannot go on: {type(error).__name__}: {error}", sys.stderr)
    return 2 if isinstance(error, UserError) else 1
