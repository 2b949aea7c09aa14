"""How this process's allocator treats freed memory."""

from __future__ import annotations

import ctypes
import os
from functools import cache

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Numbers of the parameters, from glibc's malloc.h."""

_LARGEST = 1 << 25
"""The largest piece (bytes) that glibc takes from its heap: the most that it allows for this parameter."""

_KEPT = 1 << 29
"""How much freed memory (bytes) at the end of the heap stays with the process: what one cohort takes at most."""

_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def tune_glibc_malloc() -> bool:
    """Has glibc keep freed memory for the next allocation; returns whether it will.

    An engine allocates and frees arrays of megabytes in every step. By default glibc maps a large array anew and gives
    it back when it is freed, and each of its pages is faulted in and zeroed again: in a round of a thousand sites more
    than ten thousand faults, and a tenth to a fifth of its time. With another C library, or where the environment sets
    these parameters, nothing is changed.
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; no such library; not a POSIX system
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
