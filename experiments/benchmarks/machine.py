"""What the benchmarks ran on, and how their results are shown."""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch


def describe(threads: int) -> dict[str, str | int | float]:
    """Returns what a figure depends on besides the code: processor, cores, threads, versions, matrix-product peak."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": processor(),
        "cores": cores,
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "flwr": version("flwr"),
        "matmul_gflops": round(matmul_peak(threads) / 1e9),
        "load": round(os.getloadavg()[0], 1),
    }


def processor() -> str:
    """Returns the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def matmul_peak(threads: int, size: int = 1536, runs: int = 7) -> float:
    """Returns the machine's matrix-product rate in float32, in operations per second."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    one, other = torch.rand(size, size), torch.rand(size, size)
    rate = 2 * size**3 / min(seconds(lambda: one @ other) for _ in range(runs))
    torch.set_num_threads(before)
    return rate


def seconds(function: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def resident() -> float:
    """Returns the memory that this process holds now, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def most_resident() -> float:
    """Returns the most memory that this process has held, in MiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table."""
    lines = [list(map(str, row)) for row in (head, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
