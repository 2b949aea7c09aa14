"""Freed memory stays with the process, where glibc is its allocator."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import numpy as np
from fedmeta.allocation import tune_glibc_malloc

print(tune_glibc_malloc(), end=" ")
for round_number in range(10):
    if round_number == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [np.ones(1 << 20) for _ in range(8)]
    del held
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[str, int]:
    """Returns whether memory is kept, and how many pages eight rounds of 64 MiB fault in."""
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    kept, _, count = done.stdout.partition(" ")
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")
def test_freed_memory_is_used_again_unless_the_user_decides() -> None:
    kept, few = faults()
    left, many = faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert (kept, left) == ("True", "False")
    assert few < many / 4
