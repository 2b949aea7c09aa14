"""Hands entries to a store from a background thread: in order, in batches, losing nothing while the store is away."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Generic, TypeVar

Entry = TypeVar("Entry")

BATCH = 1000
INTERVAL_S = 5.0
PATIENCE_S = 10.0
LONGEST_PAUSE_S = 60.0
SLOW_FAILURE_S = 2.0


def batches(entries: Iterable[Entry], size: int = BATCH) -> Iterator[list[Entry]]:
    """Yields runs of at most `size` consecutive entries of one type."""
    for _, alike in groupby(entries, key=type):
        run = list(alike)
        for start in range(0, len(run), size):
            yield run[start : start + size]


def deliver(entries: Sequence[Entry], send: Callable[[list[Entry]], None]) -> tuple[list[Entry], Exception | None]:
    """Tries to send all entries once.

    Once a batch failed, later ones of its type wait behind it, so that the sent ones of a type are always a prefix.
    Other types are still tried, unless the failure was slow: then nobody listens, and each try costs a time-out.

    Returns:
        What is left, in order, and the last error.
    """
    left: list[Entry] = []
    failed: set[type] = set()
    error: Exception | None = None
    ignore_progress = False
    for batch in batches(entries):
        kind = type(batch[0])
        if ignore_progress or kind in failed:
            left += batch
            continue
        begun = time.monotonic()
        try:
            send(batch)
        except Exception as problem:
            error = problem
            left += batch
            failed.add(kind)
            ignore_progress = time.monotonic() - begun > SLOW_FAILURE_S
    return left, error


class Outbox(Generic[Entry]):
    """A queue whose background thread sends what it holds every few seconds, when a batch is full, or on demand."""

    def __init__(self, send: Callable[[list[Entry]], None], on_failure: Callable[[Exception], None]) -> None:
        """Starts the thread.

        Args:
            send: called from the thread with entries of one type; raises where they did not arrive, and may then get
                the same entries again.
            on_failure: called from the thread with the error when a delivery fails that follows a good one.
        """
        self._send = send
        self._on_failure = on_failure
        self._pending: list[Entry] = []
        self._changed = threading.Condition()
        self._urgent = False
        self._closing = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="fedmeta-outbox", daemon=True)
        self._thread.start()

    def put(self, entries: Iterable[Entry], now: bool = False) -> None:
        """Queues entries, in microseconds; `now` asks for them to be sent at once."""
        with self._changed:
            self._pending.extend(entries)
            self._urgent = self._urgent or now or len(self._pending) >= BATCH
            if self._urgent:
                self._changed.notify()

    def close(self) -> list[Entry]:
        """Sends what is left, for as long as that gets anywhere, and ends the thread.

        Returns:
            What could not be sent within `PATIENCE_S` seconds of failing, in order.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        return self.pending()

    def pending(self) -> list[Entry]:
        """Returns what has not arrived yet, in order."""
        with self._changed:
            return list(self._pending)

    def _run(self) -> None:
        gave_way = time.monotonic()
        while True:
            with self._changed:
                self._wait()
                closing, taken = self._closing, list(self._pending)
                self._urgent = False
            left, error = deliver(taken, self._send)
            with self._changed:
                self._pending[: len(taken)] = left
                done = not self._pending
            if error is None or len(left) < len(taken):
                gave_way = time.monotonic()
            self._note(error)
            if closing and (done or time.monotonic() - gave_way > PATIENCE_S):
                return

    def _wait(self) -> None:
        if self._failures and not self._closing:
            self._changed.wait_for(lambda: self._closing, timeout=min(2.0 ** min(self._failures, 10), LONGEST_PAUSE_S))
        elif self._failures:
            self._changed.wait(timeout=1.0)
        else:
            self._changed.wait_for(lambda: self._urgent or self._closing, timeout=INTERVAL_S)

    def _note(self, error: Exception | None) -> None:
        if error is not None and self._failures == 0:
            self._on_failure(error)
        self._failures = 0 if error is None else self._failures + 1
