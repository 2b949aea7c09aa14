"""Steps that Ctrl-C does not cut in two."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

HELD = (signal.SIGINT, signal.SIGTERM)
"""What is held back: Ctrl-C, and the request to end that Flower and containers send."""


@contextmanager
def defer_keyboard_interrupt() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the end of the block, so that a checkpoint never sees half a step.

    Where they are ignored, or end the process at once, as in a job that `nohup` or a CI system started, it stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in HELD}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    held: list[int] = []
    for number in before:
        signal.signal(number, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if held:
        signal.raise_signal(held[0])
