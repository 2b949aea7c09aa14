"""Work dealt to Python threads of one torch thread each.

Torch's own threads share each operation and wait for one another after it: for small operations, and where other
processes are at work, that takes longer than one thread alone. Here each worker has whole sites. What an item comes to
does not depend on how many workers there are, nor does the order in which results are returned.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}

# A process that is forked from this one has none of its threads.
os.register_at_fork(after_in_child=_pools.clear)


@contextmanager
def one_thread() -> Iterator[int]:
    """Within it torch's operations take one thread each; yields how many they had."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield threads
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def deal(compute: Callable[[Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
    """Returns compute(item) of every item, in order; within `one_thread`.

    Args:
        compute: A function that may run in several threads at once.
        items: What it is called with.
        workers: How many threads there are.
    """
    if workers == 1 or len(items) < 2:
        return [compute(item) for item in items]
    if workers not in _pools:
        _pools[workers] = ThreadPoolExecutor(workers, "fedmeta-worker", lambda: torch.set_num_threads(1))
    contexts = [copy_context() for _ in items]
    return list(_pools[workers].map(lambda context, item: context.run(compute, item), contexts, items))
