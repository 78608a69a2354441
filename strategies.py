"""FedAvg of our own: checks what devices send, averages it, and keeps the record of every finished round.

server.py runs it with its own loop; it also runs under Flower's plain `Server`. After a round, the record is kept in
one worker thread, in order, while the devices train on: test, checkpoint, best checkpoint, history, curves, picture.
"""

import copy
import io
import math
import queue
import threading
import time
from pathlib import Path

from libs import atomic_write, np, pd

from flwr.common import ndarrays_to_parameters
from flwr.server import strategy

from engines import server_test_fn
from nets import get_arrays, save_checkpoint, set_arrays

FIT_METRICS = ("fit_loss", "fit_accuracy", "eval_loss", "eval_accuracy")
EVALUATE_METRICS = ("global_eval_loss", "global_eval_accuracy")
TEST_METRICS = ("test_loss", "test_accuracy")
MEASURES = FIT_METRICS + EVALUATE_METRICS + TEST_METRICS
COLUMNS = ("round", *MEASURES, "clients", "failures", "round_seconds")
BACKLOG = 16  # finished rounds that may wait for their test, before the next one waits too
SAVE_EVERY = 0.2  # seconds; rounds that are shorter are saved together, so that saving does not slow them down
DRAW_EVERY = 30  # seconds


def metrics_aggregation_fn(results):
    """The means of metrics, weighted by examples.

    `results` is [(num_examples, {name: number}), …]; returns {name: float} for the names that all of them have, {}
    for an empty list. Numbers of examples must be positive.
    """
    if not results:
        return {}
    total = sum(num_examples for num_examples, _ in results)
    names = [name for name in results[0][1] if all(name in metrics for _, metrics in results)]
    return {name: math.fsum(n / total * metrics[name] for n, metrics in results) for name in names}


def average(updates):
    """The mean of lists of arrays, weighted by examples (McMahan et al. 2017, arXiv 1602.05629).

    `updates` is [(num_examples, [array, …]), …], all of the same shapes and dtypes, which the mean keeps. It is
    summed in float64; integers (num_batches_tracked) are rounded and stay within what was sent.
    """
    total = sum(num_examples for num_examples, _ in updates)
    means = []
    for arrays in zip(*(arrays for _, arrays in updates)):
        mean = np.zeros(arrays[0].shape, np.float64)
        for (num_examples, _), array in zip(updates, arrays):
            mean += array * np.float64(num_examples / total)
        if arrays[0].dtype.kind == "f":
            means.append(mean.astype(arrays[0].dtype))
        else:
            low, high = np.minimum.reduce(arrays), np.maximum.reduce(arrays)
            with np.errstate(invalid="ignore"):  # 2**63 - 1 rounds up in float64, and comes back by the clip
                means.append(np.clip(np.rint(mean).astype(arrays[0].dtype), low, high))
    return means


class Rejected(Exception):
    """A result that is not averaged, with the reason."""


def check_metrics(metrics, names):
    """Raise Rejected unless `metrics` holds a finite number under each of `names`, and none of it is an error."""
    if "error" in metrics:
        raise Rejected(printable(metrics["error"]))
    for name in names:
        value = metrics.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Rejected(f"metric {name} is {printable(value)}, not a finite number")


def check_examples(num_examples):
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise Rejected(f"number of examples is {printable(num_examples)}, not a positive integer")


def check_arrays(tensors, expected):
    """The arrays in `tensors`, a list of .npy bytes, if they are like `expected`, and finite.

    `expected` is [(name, array, the bytes before its values in an .npy file), …]. Arrays with those bytes, which all
    devices send, are not copied; any others are parsed, without pickle, to say what is wrong with them.
    """
    if len(tensors) != len(expected):
        raise Rejected(f"{len(tensors)} arrays, not {len(expected)}")
    arrays = []
    for data, (name, like, header) in zip(tensors, expected):
        try:
            if data.startswith(header) and len(data) == len(header) + like.nbytes:
                array = np.frombuffer(data, like.dtype, offset=len(header)).reshape(like.shape)
            else:
                array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
        except Exception as error:
            raise Rejected(f"array {name} cannot be read: {printable(error)}") from None
        if array.shape != like.shape or array.dtype != like.dtype:
            raise Rejected(f"array {name} is {array.dtype} {array.shape}, not {like.dtype} {like.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Rejected(f"array {name} has values that are not finite")
        if name.endswith("running_var") and (array < 0).any():
            raise Rejected(f"array {name} has negative variances")
        arrays.append(array)
    return arrays


def printable(value, limit=200):
    """What a device sent, as one short line that a terminal can show."""
    text = " ".join(str(value).split())
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class History:
    """The rows of history.csv, a dictionary each; the file is rewritten whole whenever some are added."""

    def __init__(self, path, last_round=0):
        """Take over the rows of the rounds 1 to `last_round` from `path`. Raises ValueError when not all are there."""
        self.path, self.rows = Path(path), []
        if last_round:
            try:
                table = pd.read_csv(self.path)[list(COLUMNS)].astype(float)
            except (OSError, ValueError, KeyError) as error:
                raise ValueError(f"{path} is missing or damaged: {error}") from None
            table = table[table["round"] <= last_round]
            if list(table["round"]) != list(range(1, last_round + 1)):
                raise ValueError(f"{path} has not one row for each of the rounds 1 to {last_round}")
            self.rows = table.astype({"round": int, "clients": int, "failures": int}).to_dict("records")

    def extend(self, rows):
        self.rows.extend(rows)
        with atomic_write(self.path) as part:
            pd.DataFrame(self.rows, columns=COLUMNS).to_csv(part, index=False)

    def draw(self, path, title):
        """Draw loss and accuracy over rounds into the picture `path`."""
        from matplotlib.figure import Figure  # half a second that nothing else needs

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        rounds = [row["round"] for row in self.rows]
        for axes, measure in zip(figure.subplots(1, 2), ("loss", "accuracy")):
            for name in MEASURES:
                if name.endswith(measure):
                    axes.plot(rounds, [row[name] for row in self.rows], "." * (len(rounds) < 20) + "-", label=name)
            axes.set(xlabel="round", ylabel=measure)
            axes.grid(alpha=0.3)
            axes.legend()
        figure.suptitle(title)
        with atomic_write(path) as part:
            figure.savefig(part, format="png", dpi=110)


class FedAvg(strategy.FedAvg):
    """Flower's FedAvg that drops what cannot be averaged, and keeps the record of each round beside `save_ckp_path`.

    initial_model: the net that training starts from; round 1's devices get its parameters.
    save_ckp_path: where the newest global model goes; best.ptl, history.csv and metrics.png go beside it.
    last_round: the last round that is finished already; history.csv is continued after it.
    test_loaders: {"test": loader} to test each round's global model on (engines.server_test_fn), or None.
    about: further entries of the checkpoint (nets.save_checkpoint).
    on_row, on_drop: called with each finished row of history.csv, and with (round, cid, reason) for each result
        that is dropped.
    log: called as log(dictionary, step=round), such as the `log` of a wandb run.

    After the last round, `close` waits until all rounds are recorded; it raises what went wrong in the worker, as
    `check` does in between.
    """

    def __init__(
        self,
        initial_model,
        save_ckp_path,
        *args,
        last_round=0,
        test_loaders=None,
        about=None,
        on_row=None,
        on_drop=None,
        log=None,
        **kwargs,
    ):
        arrays = get_arrays(initial_model)
        initial = ndarrays_to_parameters(arrays)
        kwargs.setdefault("initial_parameters", initial)
        kwargs.setdefault("fit_metrics_aggregation_fn", metrics_aggregation_fn)
        kwargs.setdefault("evaluate_metrics_aggregation_fn", metrics_aggregation_fn)
        super().__init__(*args, **kwargs)
        self.save_ckp_path = Path(save_ckp_path)
        self.save_ckp_path.parent.mkdir(parents=True, exist_ok=True)
        self.test_loaders, self.about = test_loaders, about or {}
        self.on_row, self.on_drop, self.log = on_row, on_drop, log
        self.model = copy.deepcopy(initial_model)  # the worker's own, to test and save
        headers = [data[: len(data) - array.nbytes] for data, array in zip(initial.tensors, arrays)]
        self.expected = list(zip(self.model.state_dict(), arrays, headers))
        self.history = History(self.save_ckp_path.with_name("history.csv"), last_round)
        self.best = max((row["test_accuracy"] for row in self.history.rows if row["test_accuracy"] >= 0), default=-1.0)
        self.row = self.arrays = self.devices = self.started = None  # of the round that is under way
        self.failures = 0
        self.error = None
        self.drawn = time.monotonic()
        self.rounds = queue.Queue(BACKLOG)
        self.worker = threading.Thread(target=self._keep_record, daemon=True)
        self.worker.start()

    # -----------------------------------------------------------------------------------------------------------------
    # What Flower calls.

    def configure_fit(self, server_round, parameters, client_manager):
        self.started = time.monotonic()
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(self, server_round, results, failures):
        """Average what passes the checks: (Parameters, metrics), or (None, {}) where nothing does."""
        self.check()
        self._finish_row()
        self._count(server_round, failures)
        kept = []
        for client, res in sorted(results, key=lambda result: str(result[0].cid).zfill(9)):
            try:
                check_metrics(res.metrics, FIT_METRICS)
                check_examples(res.num_examples)
                kept.append((client.cid, res, check_arrays(res.parameters.tensors, self.expected)))
            except Rejected as reason:
                self._drop(server_round, client.cid, reason)
        if not kept or (failures and not self.accept_failures):
            return None, {}
        self.arrays = average([(res.num_examples, arrays) for _, res, arrays in kept])
        metrics = self.fit_metrics_aggregation_fn([(res.num_examples, res.metrics) for _, res, _ in kept])
        self.row = {**dict.fromkeys(COLUMNS, math.nan), "round": server_round, "clients": len(kept)}
        self.row.update({name: metrics[name] for name in FIT_METRICS if name in metrics})
        self.devices = {f"clients/{cid}/{name}": res.metrics[name] for cid, res, _ in kept for name in FIT_METRICS}
        return ndarrays_to_parameters(self.arrays), metrics

    def aggregate_evaluate(self, server_round, results, failures):
        """Average the devices' measures of the global model, and hand the finished round to the worker."""
        self._count(server_round, failures)
        kept = []
        for client, res in results:
            try:
                check_metrics({**res.metrics, "loss": res.loss}, ("loss", *EVALUATE_METRICS))
                check_examples(res.num_examples)
                kept.append((client.cid, res))
            except Rejected as reason:
                self._drop(server_round, client.cid, reason)
        metrics = self.evaluate_metrics_aggregation_fn([(res.num_examples, res.metrics) for _, res in kept])
        if self.row is not None:
            self.row.update({name: metrics[name] for name in EVALUATE_METRICS if name in metrics})
            for cid, res in kept:
                self.devices.update({f"clients/{cid}/{name}": res.metrics[name] for name in EVALUATE_METRICS})
            self._finish_row()
        return metrics.get("global_eval_loss"), metrics

    def _count(self, server_round, failures):
        for failure in failures:
            if isinstance(failure, tuple):  # Flower's form for an answer with a status that is not OK
                client, res = failure
                self._drop(server_round, client.cid, printable(res.status.message))
            else:
                self._drop(server_round, getattr(failure, "cid", None), failure)

    def _drop(self, server_round, cid, reason):
        self.failures += 1
        if self.on_drop is not None:
            self.on_drop(server_round, cid, reason)

    # -----------------------------------------------------------------------------------------------------------------
    # The record.

    def check(self):
        """Raise what went wrong in the worker, if anything did."""
        if self.error is not None:
            raise self.error

    def close(self):
        """Record the rounds that are finished and still wait, draw the picture, and end the worker."""
        self._finish_row()
        self._put(None)
        self.worker.join()
        self.check()
        if self.history.rows:
            self._draw()

    def _finish_row(self):
        if self.row is None:
            return
        row, self.row = self.row, None
        row["failures"], self.failures = self.failures, 0
        row["round_seconds"] = time.monotonic() - self.started if self.started is not None else math.nan
        self._put((row, self.arrays, self.devices))

    def _put(self, finished):
        while self.worker.is_alive():
            try:
                return self.rounds.put(finished, timeout=0.5)
            except queue.Full:
                continue

    def _keep_record(self):
        """The worker: test each finished round and save it, at once or with those that end within SAVE_EVERY."""
        tested, due, closing = [], 0.0, False
        try:
            while not closing:
                try:
                    finished = self.rounds.get(timeout=max(0.0, due - time.monotonic()) if tested else None)
                    closing = finished is None
                    if not closing:
                        tested.append(self._test(*finished))
                except queue.Empty:
                    pass
                if tested and (closing or time.monotonic() >= due):
                    self._save(tested)
                    tested, due = [], time.monotonic() + SAVE_EVERY
        except BaseException as error:
            self.error = error

    def _test(self, row, arrays, devices):
        if self.test_loaders is not None:
            set_arrays(self.model, arrays)
            row.update(server_test_fn(self.test_loaders, self.model))
        return row, arrays, devices

    def _save(self, tested):
        """Save tested rounds. The checkpoint comes last: a killed run goes on from it and drops later rows."""
        self.history.extend(row for row, _, _ in tested)
        for row, arrays, _ in tested:
            if row["test_accuracy"] > self.best:
                self.best = row["test_accuracy"]
                self._save_checkpoint("best.ptl", row, arrays)
        self._save_checkpoint(self.save_ckp_path.name, *tested[-1][:2])
        for row, _, devices in tested:
            if self.log is not None:
                measured = {name: row[name] for name in COLUMNS[1:] if row[name] == row[name]}
                self.log({**measured, **devices}, step=row["round"])
            if self.on_row is not None:
                self.on_row(row)
        if time.monotonic() - self.drawn > DRAW_EVERY:
            self._draw()

    def _save_checkpoint(self, name, row, arrays):
        set_arrays(self.model, arrays)
        measured = {name: row[name] for name in COLUMNS if row[name] == row[name]}  # nan: could not be measured
        about = {**self.about, "round": row["round"], "metrics": {**dict.fromkeys(COLUMNS), **measured}}
        save_checkpoint(self.save_ckp_path.with_name(name), self.model, about)

    def _draw(self):
        self.history.draw(self.save_ckp_path.with_name("metrics.png"), self.about.get("dataset") or "")
        self.drawn = time.monotonic()
