"""A thread that does what it is given, in order, and gives its error back."""

from __future__ import annotations

import queue
import threading
import time

STALLED = 3600  # seconds without progress until the worker is given up, as on a network drive that hangs
END = object()  # the end of the worker's queue


class Worker:
    """A thread that does what it is given, in order. `check`, `put` and `close` raise what fails in it, and ends it.

    `one` is called with each item as it comes, `some` with a list of those that came since, at most every `pause`
    seconds, and `last` with nothing, at the end.
    """

    def __init__(self, name, one, some, last, backlog, pause):
        self.one, self.some, self.last, self.pause = one, some, last, pause
        self.items = queue.Queue(backlog)
        self.error = None
        self.closed = False
        self.steps = 0  # calls that are over: the sign of life
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def put(self, item):
        """Give it an item; waits where `backlog` of them wait already."""
        if self.closed:
            raise RuntimeError(f"{self.thread.name} is closed")
        self._put(item)

    def close(self) -> None:
        """End the thread. Afterwards all that was put is done, or this raises what prevented it.

        Waits as long as it goes on; raises TimeoutError when nothing is done for STALLED seconds. May be called again.
        """
        if not self.closed:
            self.closed = True
            self._put(END)
        while self.thread.is_alive():
            before = self.steps
            self.thread.join(STALLED)
            if self.thread.is_alive() and self.steps == before:
                raise TimeoutError(f"the {self.thread.name} hangs: nothing was done for {STALLED} s")
        self.check()

    def _put(self, item):
        while self.thread.is_alive():
            try:
                self.items.put(item, timeout=0.5)
                return
            except queue.Full:
                continue
        self.check()

    def _run(self):
        waiting, due, ended = [], 0.0, False
        try:
            while not ended:
                item = self._next(due if waiting else None)
                if item is END:
                    ended = True
                elif item is not None:
                    self.one(item)
                    waiting.append(item)
                if waiting and (ended or time.monotonic() >= due):
                    self.some(waiting)
                    waiting, due = [], time.monotonic() + self.pause
                self.steps += 1
            self.last()
        except BaseException as error:
            self.error = error

    def _next(self, until):
        """The next item, or None where none comes until then; `until` None waits for ever."""
        timeout = None if until is None else max(0.0, until - time.monotonic())
        try:
            return self.items.get(timeout=timeout)
        except queue.Empty:
            return None
