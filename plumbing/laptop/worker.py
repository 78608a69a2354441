"""A thread that handles items in order, and hands its error back to whoever gave it work."""

from __future__ import annotations

import errno
import queue
import threading
import time

PATIENCE = 60  # seconds in which a shortage of files or memory may pass, which others on this machine can cause
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
STALLED = 3600  # seconds without progress until `close` gives up, as on a network drive that hangs
END = object()  # the end of the worker's queue


def patiently(act, *args):
    """Call `act(*args)`, again for PATIENCE seconds while the system is short of files or memory."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            return act(*args)
        except OSError as error:
            if error.errno not in SHORTAGES or time.monotonic() > until:
                raise
        time.sleep(0.2)


class Worker:
    """A thread that handles items in order. An error ends it; `check`, `put` and `close` raise that error.

    name: of the thread.
    on_item: called with each item as it arrives.
    on_batch: called with the list of items that arrived since its last call, at most every `pause` seconds.
    on_end: called without arguments after the last item.
    backlog: number of items that may wait before `put` waits, too.
    pause: seconds.
    """

    def __init__(self, name, on_item, on_batch, on_end, backlog, pause):
        self.on_item, self.on_batch, self.on_end, self.pause = on_item, on_batch, on_end, pause
        self.items = queue.Queue(backlog)
        self.error = None
        self.closed = False
        self.steps = 0  # finished turns of the loop: the sign of life
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def put(self, item):
        """Hand over an item; wait while `backlog` items are waiting already."""
        if self.closed:
            raise RuntimeError(f"{self.thread.name} is closed")
        self._put(item)

    def is_idle(self) -> bool:
        """Return whether `on_item` has been called with all items."""
        return self.items.unfinished_tasks == 0

    def close(self) -> None:
        """End the thread once all items are handled, or raise the error that ended it. May be called again.

        Raises TimeoutError when the thread makes no progress for STALLED seconds.
        """
        if not self.closed:
            self.closed = True
            self._put(END)
        while self.thread.is_alive():
            before = self.steps
            self.thread.join(STALLED)
            if self.thread.is_alive() and self.steps == before:
                raise TimeoutError(f"the {self.thread.name} hangs: no progress for {STALLED} s")
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
                    self.on_item(item)
                    self.items.task_done()
                    waiting.append(item)
                if waiting and (ended or time.monotonic() >= due):
                    self.on_batch(waiting)
                    waiting, due = [], time.monotonic() + self.pause
                self.steps += 1
            self.on_end()
        except BaseException as error:
            self.error = error

    def _next(self, until):
        """Return the next item, or None if none arrives until then; `until` None waits forever."""
        timeout = None if until is None else max(0.0, until - time.monotonic())
        try:
            return self.items.get(timeout=timeout)
        except queue.Empty:
            return None
