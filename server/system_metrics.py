"""What the server's process takes of its machine: in the local runtime, all of the run."""

from __future__ import annotations

import os
import resource
import sys
import time

PEAK_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of `ru_maxrss`."""


class ProcessMonitor:
    """Measures from one call to the next."""

    def __init__(self) -> None:
        self._processors = os.cpu_count() or 1
        self._clock, self._processor = time.perf_counter(), time.process_time()

    def metrics(self) -> dict[str, float]:
        """Returns the share of all processors since the last call (per cent) and the largest memory so far (MB).

        MLflow shows metrics of such names under "System metrics".
        """
        clock, processor = time.perf_counter(), time.process_time()
        seconds, used = clock - self._clock, processor - self._processor
        self._clock, self._processor = clock, processor
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT / 1e6
        return {
            "system/process_cpu_percentage": 100 * used / (max(seconds, 1e-9) * self._processors),
            "system/process_peak_memory_megabytes": peak,
        }
