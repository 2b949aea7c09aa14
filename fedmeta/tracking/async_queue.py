"""Sends events to a store from a background thread: in order, in batches, losing nothing while the store is away."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Generic, TypeVar

Event = TypeVar("Event")

BATCH = 1000
INTERVAL_S = 5.0
PATIENCE_S = 10.0
LONGEST_PAUSE_S = 60.0
SLOW_FAILURE_S = 2.0


def batches(events: Iterable[Event], size: int = BATCH) -> Iterator[list[Event]]:
    """Yields runs of at most `size` consecutive events of one type."""
    for _, alike in groupby(events, key=type):
        run = list(alike)
        for start in range(0, len(run), size):
            yield run[start : start + size]


def deliver(events: Sequence[Event], send: Callable[[list[Event]], None]) -> tuple[list[Event], Exception | None]:
    """Tries to send all events once.

    After a batch failed, later ones of its type wait behind it, so that what was sent of a type is always a prefix.
    Other types are still tried, unless the failure was slow: then nothing listens, and each try costs a timeout.

    Returns:
        What is left, in order, and the last error.
    """
    left: list[Event] = []
    failed: set[type] = set()
    error: Exception | None = None
    unreachable = False
    for batch in batches(events):
        kind = type(batch[0])
        if unreachable or kind in failed:
            left += batch
            continue
        begun = time.monotonic()
        try:
            send(batch)
        except Exception as problem:
            error = problem
            left += batch
            failed.add(kind)
            unreachable = time.monotonic() - begun > SLOW_FAILURE_S
    return left, error


class AsyncQueue(Generic[Event]):
    """A queue whose thread sends what it holds every few seconds, when a batch is full, or on demand.

    Args:
        send: Called from the thread with events of one type; raises where they did not arrive, and may then get the
            same events again.
        on_failure: Called from the thread with the error when a delivery fails that follows a good one.
    """

    def __init__(self, send: Callable[[list[Event]], None], on_failure: Callable[[Exception], None]) -> None:
        self._send = send
        self._on_failure = on_failure
        self._pending: list[Event] = []
        self._changed = threading.Condition()
        self._urgent = False
        self._closing = False
        self._failures = 0
        self._thread = threading.Thread(target=self._run, name="fedmeta-tracking", daemon=True)
        self._thread.start()

    def put(self, events: Iterable[Event], now: bool = False) -> None:
        """Queues events, in microseconds; `now` asks for them to be sent at once."""
        with self._changed:
            self._pending.extend(events)
            self._urgent = self._urgent or now or len(self._pending) >= BATCH
            if self._urgent:
                self._changed.notify()

    def close(self) -> list[Event]:
        """Sends what is left while the store takes some of it, and ends the thread.

        Returns:
            What could not be sent within `PATIENCE_S` seconds of failing, in order.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        return self.pending()

    def pending(self) -> list[Event]:
        """Returns what has not arrived yet, in order."""
        with self._changed:
            return list(self._pending)

    def _run(self) -> None:
        last_success = time.monotonic()
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
                last_success = time.monotonic()
            if error is not None and self._failures == 0:
                self._on_failure(error)
            self._failures = 0 if error is None else self._failures + 1
            if closing and (done or time.monotonic() - last_success > PATIENCE_S):
                return

    def _wait(self) -> None:
        if self._failures and not self._closing:
            self._changed.wait_for(lambda: self._closing, timeout=min(2.0 ** min(self._failures, 10), LONGEST_PAUSE_S))
        elif self._failures:
            self._changed.wait(timeout=1.0)
        else:
            self._changed.wait_for(lambda: self._urgent or self._closing, timeout=INTERVAL_S)
