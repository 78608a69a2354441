"""Who is missing, how long to wait, when to stop trying: all of the rounds but the loop, which is in server.py.

The main thread runs the rounds. Each stream has a thread of gRPC's pool, "stream …" (laptop/door), and in its handshake
one more, "client" (laptop/registry); each question has one that waits for the answer, "fit 3" (laptop/asking). "record"
tests and saves the rounds (laptop/record), "signals" notes signals (common/process), "curves" waits for wandb's server
(laptop/curves). Registry._cv guards who is there; RemoteClient.lock is held while the client has a question to answer.
"""

import collections
import re
import time

from plumbing.common.process import say
from plumbing.laptop.asking import Questions
from plumbing.laptop.ending import Hopeless
from plumbing.laptop.registry import POLL
from plumbing.laptop.stream import LOST

import flwr.server
from flwr.common import ndarrays_to_parameters

MAX_RETRY_DELAY = 30  # seconds until a round in which nobody trained is run again
HOPELESS = 5  # times in a row that a round may fail on all clients for the same reason
LASTING = 3  # rounds in a row that --target_accuracy has to be reached


class Target:
    """--target_accuracy: the run ends once test_accuracy was `accuracy` or more in LASTING rounds in a row.

    accuracy: None: the run never ends for it.
    first: the first round that counts: those before had another test set.
    """

    def __init__(self, accuracy=None, first=1):
        self.accuracy, self.first = accuracy, first

    def is_possible(self, rows, current):
        """Return whether the round `current` may reach it: no test in `rows`, of history.csv, says otherwise."""
        if self.accuracy is None or current - self.first + 1 < LASTING:
            return False
        return all(row["test_accuracy"] >= self.accuracy for row in rows[-LASTING:] if row["round"] > current - LASTING)

    def is_reached(self, rows, current):
        """Return whether the round `current` has reached it, and `rows` has its test."""
        return self.is_possible(rows, current) and rows[-1:] != [] and rows[-1]["round"] >= current

    def describe(self, current):
        rounds = f"rounds {current - LASTING + 1} to {current}"
        return f"test_accuracy was {self.accuracy:g} or more in the {rounds}: the run is over"

    def why_over(self, rows, num_rounds):
        """Return why a run with the history `rows` has no round left, to go behind its checkpoint's name, or None."""
        if len(rows) >= num_rounds:
            return f"has finished round {len(rows)} already; --num_rounds {num_rounds} adds none"
        if self.is_reached(rows, len(rows)):
            return f"says that {self.describe(len(rows))} already"
        return None


class Rounds(flwr.server.Server):
    """A server of Flower with its own loop, `run_rounds`, which a subclass has: what that loop needs.

    run: an ending.Run, whose registry says who takes part; its `check` is called wherever this waits.
    min_clients: a round starts without the others after a while (Registry.wait_for_round).
    round_timeout: see asking.Questions.
    target: a Target.
    absences: asking.Absences.
    budget: a budget.Budget; None: all train num_epochs.
    """

    def __init__(self, run, min_clients, round_timeout, target, absences, budget=None):
        super().__init__(client_manager=run.registry, strategy=run.strategy)
        self.run, self.registry, self.min_clients = run, run.registry, min_clients
        self.questions = Questions(round_timeout, run.check)
        self.target, self.absences, self.budget = target, absences, budget
        self.trained = False  # whether any round has succeeded
        self.failed = []  # the lasting reasons for which the current round failed: a set per try
        self.diverged = collections.Counter()  # how often each round has

    def fit(self, num_rounds, timeout):
        """Be called by start_server and start_grid: run the rounds up to `num_rounds`."""
        started = time.monotonic()
        self.run_rounds(num_rounds)
        return flwr.server.History(), time.monotonic() - started

    def disconnect_all_clients(self, timeout):
        """Be called after the last round: tell all clients that training is over."""
        self.registry.close({"why": "over"})

    def wait_for_clients(self, current):
        """Wait until enough clients are there for the round `current`."""

        def check():
            self.run.check()
            self.absences.wait(current, self.registry.clients)

        self.absences.mark()
        self.registry.wait_for_round(self.min_clients, check)
        self.absences.mark()

    def try_again(self, current, num_asked):
        """Pause before the round `current` is run again, in which nobody trained. Raise Hopeless if that is no use."""
        self.failed.append(lasting_reasons(self.strategy.checks.reasons, num_asked, self.trained))
        if len(self.failed) >= HOPELESS and set.intersection(*self.failed[-HOPELESS:]):
            self.wait_for_tests()
            self.strategy.close()  # raises if what is said to be saved is not
            reasons = sorted(set(self.strategy.checks.reasons.values()))
            shown = "; ".join(reasons[:3]) + "; …" * (len(reasons) > 3)
            raise Hopeless(
                f"round {current} failed on all clients {HOPELESS} times in a row: {shown} "
                f"({describe_saved(current - 1)})"
            )
        delay = min(2 ** (len(self.failed) - 1), MAX_RETRY_DELAY)
        say(f"round {current}: nobody trained; it is run again in {delay} s")
        for _ in range(int(delay / POLL)):
            self.run.check()
            time.sleep(POLL)

    def go_back(self, diverged):
        """Take back the model with which the round that diverged began. Return the number of that round.

        Raises Hopeless if it has diverged too often.
        """
        last, arrays = self.strategy.go_back()
        self.parameters, self.failed = ndarrays_to_parameters(arrays), []
        self.diverged[diverged.round] += 1
        if self.diverged[diverged.round] >= HOPELESS:
            self.strategy.close()
            raise Hopeless(f"{diverged}, {HOPELESS} times ({describe_saved(last)})")
        say(f"{diverged}; the round is run again")
        return diverged.round

    def finish(self, current, spared):
        """Note that the round `current` is finished; the cids `spared` were not asked to train."""
        self.trained, self.failed = True, []
        self.absences.finish(current, spared, self.strategy.clients)
        if self.budget is not None:
            self.budget.note(current, self.strategy.clients)

    def is_over(self, current, num_rounds):
        """Return whether the run ends with the round `current`, by tests that this waits for. Raises Diverged."""
        rows = self.strategy.record.history.rows  # to which the record adds each round that it has tested
        while self.target.is_possible(rows, current):
            if self.target.is_reached(rows, current):
                self.strategy.close()
                say(self.target.describe(current))
                return True
            self.run.check()
            self.strategy.record.check_tests()
            time.sleep(0.02)
        if current >= num_rounds:
            self.wait_for_tests()
        return current >= num_rounds

    def wait_for_tests(self):
        """Wait until all rounds are tested. Raise Diverged if one of them did not pass."""
        while not self.strategy.record.check_tests():
            self.run.check()
            time.sleep(0.02)


def lasting_reasons(reasons, num_asked, trained):
    """Return why a try failed on all that were asked, without the numbers; empty if that may pass.

    A lost connection passes: Wi-Fi heals, devices come back, and the run is to survive the night. So does a timeout
    that has been met before (`trained`): it is long enough, and the devices are cut off or busy for a while.

    reasons: {cid: text}.
    """
    texts = set(reasons.values())
    may_pass = LOST in texts or (trained and any("no answer within" in text for text in texts))
    if may_pass or len(reasons) < num_asked:
        return set()
    return {re.sub(r"nan|inf|[\d.]+(e[+-]?\d+)?", "#", text) for text in texts}


def describe_saved(last):
    return f"rounds 1 to {last} are saved" if last else "no round was finished, nothing is saved"
