"""How many batches each device trains in a round, so that nobody waits for the slowest (--time_budget)."""

import collections
import dataclasses
import math
import statistics
from typing import NamedTuple

LAST_FITS = 3  # of a device, whose median says how fast it is; few: a board that gets hot is slower at once


class Fit(NamedTuple):
    """A finished fit of a device, from its telemetry in clients.csv."""

    steps: int
    images: int
    fit_seconds: float
    images_per_second: float  # while it trained
    round: int
    next_step: int  # the steps of this fit and all before


FIGURES = Fit._fields[:4]


def pace_of(fits):
    """Return the seconds of a device's step, and those that a fit takes beside its steps: medians of its last `fits`.

    Beside the steps a device puts the parameters into its net, and measures the trained one on its eval images.
    """
    pairs = []
    for fit in fits[-LAST_FITS:]:
        training = min(fit.images / fit.images_per_second, fit.fit_seconds)
        pairs.append((training / fit.steps, fit.fit_seconds - training))
    return tuple(statistics.median(values) for values in zip(*pairs))


def plan_steps(seconds, num_epochs, fits, batches):
    """Return the steps that each device trains in a round: {cid: (first_step, num_steps)}.

    seconds: that a fit may take, or "auto": what the median device takes for `num_epochs` passes.
    num_epochs: passes that a device trains at most. One that has no fits yet trains one pass.
    fits: of the rounds before, {cid: [Fit, …]}.
    batches: of one pass, for all devices that are there, {cid: number}.

    Of an even number of devices the faster of the two in the middle is the median one: of two, the slower one trains
    less.
    """
    paces = {cid: pace_of(fits[cid]) for cid in batches if fits.get(cid)}
    if seconds == "auto" and paces:
        seconds = statistics.median_low(rest + step * num_epochs * batches[cid] for cid, (step, rest) in paces.items())
    plan = {}
    for cid, one_pass in batches.items():
        first_step, num_steps = 0, one_pass
        if cid in paces:
            first_step, (step, rest) = fits[cid][-1].next_step, paces[cid]
            fitting = (seconds - rest) / step + 1e-6 if step else math.inf  # the median device trains all its steps
            num_steps = int(min(max(fitting, 1), num_epochs * one_pass))
        plan[cid] = first_step, num_steps
    return plan


class Budget:
    """--time_budget in a run: what plan_steps needs of the rounds before.

    seconds, num_epochs: plan_steps's.
    count_batches: called as count_batches(number of fit images), returns that of the batches of a pass.
    rows: those of clients.csv of the run that is resumed.
    """

    def __init__(self, seconds, num_epochs, count_batches, rows=()):
        self.seconds, self.num_epochs, self.count_batches = seconds, num_epochs, count_batches
        self.fits = collections.defaultdict(list)
        for row in rows:
            self.note(row["round"], {row["cid"]: row})

    def note(self, current, clients):
        """Note the fits of the round `current`: {cid: its figures in clients.csv}."""
        for cid, figures in clients.items():
            told = [figures.get(name, math.nan) for name in FIGURES]
            if all(map(math.isfinite, told)) and min(told) > 0:
                before = self.fits[cid][-1].next_step if self.fits[cid] else 0
                self.fits[cid].append(Fit(*told, current, before + int(told[0])))

    def divide(self, current, instructions, clients):
        """Tell each client which steps it trains in the round `current`: [(client, FitIns), …].

        instructions: such pairs for those that train, with one config for all of them.
        clients: all that are there, {cid: client}.

        Forgets this round and those after it, which the run has gone back behind.
        """
        for fits in self.fits.values():
            while fits and fits[-1].round >= current:
                fits.pop()
        everyone = {**clients, **{client.cid: client for client, _ in instructions}}  # even who has just left
        batches = {cid: self.count_batches(client.properties["num_fit"]) for cid, client in everyone.items()}
        plan, divided = plan_steps(self.seconds, self.num_epochs, self.fits, batches), []
        for client, ins in instructions:
            first_step, num_steps = plan[client.cid]
            own = {"first_step": first_step, "num_steps": num_steps, "num_epochs": 1}  # once over these steps
            divided.append((client, dataclasses.replace(ins, config={**ins.config, **own})))
        return divided
