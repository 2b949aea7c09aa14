"""What a run takes of its machine."""

import time
from pathlib import Path

import pytest

from fedmeta import checkpoint
from fedmeta.experiment import Experiment
from fedmeta.runtime import run
from server.system_metrics import ProcessMonitor


def test_a_busy_process_is_distinguished_from_an_idle_one() -> None:
    machine = ProcessMonitor()
    time.sleep(0.2)
    idle = machine.metrics()
    until = time.process_time() + 0.2
    while time.process_time() < until:
        sum(range(1000))
    busy = machine.metrics()
    assert 0 <= idle["system/process_cpu_percentage"] < busy["system/process_cpu_percentage"] < 150
    assert 10 < busy["system/process_peak_memory_megabytes"] < 1e6


@pytest.mark.slow
def test_every_round_has_its_figures(tmp_path: Path) -> None:
    keys = ["server.rounds=2", "evaluation.every=0", "tracking.uri=none", f"tracking.folder={tmp_path}"]
    result = run(Experiment().with_overrides([*keys, "runtime.engine=vmap", "model.hidden=8"]))
    metrics = checkpoint.newest(result.folder)[0].metrics
    for number in (1, 2):
        assert {"system/process_cpu_percentage", "system/process_peak_memory_megabytes"} <= metrics[number].keys()
