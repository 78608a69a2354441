"""How a run ends, from Ctrl-C to the exit code.

1. common/process.on_signal calls Run.stop in a thread of its own, which notes the signal.
2. The main thread calls Run.check at least every registry.POLL seconds while it waits for clients or for the tests of
   the last rounds; that raises Stopped. So it ends in Run.train, as it does after the last round and after any error.
3. Run.train tells the clients that are idle (busy ones see their stream end), saves finished rounds, draws the
   pictures, and completes the curves.
4. server.main returns train's exit code to run_script (common/process), which ends the process at once.
"""

import dataclasses
import os
import signal
import sys
import time
import traceback

from plumbing.common.process import UserError, printable, say
from plumbing.laptop.curves import Curves
from plumbing.laptop.record import Diverged
from plumbing.laptop.registry import Clients
from plumbing.laptop.screen import Progress, show_end


class Stopped(Exception):
    """A signal asked the server to stop."""


class Hopeless(Exception):
    """A round fails again and again, for reasons that do not pass by themselves."""


@dataclasses.dataclass
class Run:
    """The parts of a run that are needed at its end. `lock` is kept until then."""

    registry: Clients
    strategy: object  # of strategies.py
    curves: Curves
    progress: Progress
    lock: object
    signum: int | None = None  # of the signal that asked the server to stop
    stopped: float = 0.0  # when it came
    error: BaseException | None = None  # what else ended the run early

    @property
    def next_round(self):
        return len(self.strategy.record.history.rows) + 1

    def stop(self, signum):
        """Note a signal, and take the bar away. A second Ctrl-C, more than a second later, ends the process at once."""
        self.progress.close()
        if self.signum is None:
            self.signum, self.stopped = signum, time.monotonic()
        elif signum == signal.SIGINT and time.monotonic() - self.stopped > 1:
            os._exit(128 + signum)

    def check(self):
        """Raise what should end the training early: a signal, or a failure of the record."""
        if self.signum is not None:
            raise Stopped
        self.strategy.record.check()

    def train(self, start):
        """Call `start`, which runs the rounds, then complete what belongs to them. Return the exit code."""
        code = 0
        try:
            start()
        except Stopped:
            say(f"stopping ({signal.Signals(self.signum).name}; Ctrl-C again exits at once)")
        except SystemExit as end:  # Flower's own way out, on its engines
            code = end.code or 128 + signal.SIGTERM
        except BaseException as error:
            self.error, code = error, fail(error)
        self.registry.close({"why": "stopped", "text": "the server stopped before the last round"})
        try:
            self.strategy.close()
        except BaseException as error:
            self.error, code = self.error or error, code or fail(error)
        if self.signum is not None:
            code = 128 + self.signum
        self.progress.close()
        record = self.strategy.record
        if code:
            why = self.error or (self.signum and signal.Signals(self.signum).name) or f"exit code {code}"
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
