"""A model of 200 MB over a real SuperLink with two SuperNodes: three rounds, one line of which breaks on the way."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch

import fedmeta
from fedmeta.runtime import process_guard
from tests.deployment.processes import write_sites
from tests.deployment.test_faults import experiment_of, faulty_federation, rounds_of, store_of
from tests.deployment.watching import Ends, relayed, shut

HIDDEN = 7080
"""Of a model with two layers of this width: 50 million parameters, 200 MB in float32."""
BREAK_AFTER = 60_000_000
"""After so many bytes up the connection of one site breaks that carries the next ones."""


@contextmanager
def breaking_line(to: int) -> Iterator[tuple[int, list[int]]]:
    """Gives a port that leads to another, and how many bytes went up; one connection breaks in the middle of a piece.

    The piece has not arrived then, and Flower sends it again. Broken between a piece's arrival and its answer, Flower
    sends it again as well, is told that the piece is not wanted, and gives the reply up.
    """
    went_up, broken = [0], threading.Event()

    def up(piece: bytes, ends: Ends) -> None:
        went_up[0] += len(piece)
        if went_up[0] > BREAK_AFTER and not broken.is_set():
            broken.set()
            shut(ends)

    with relayed(to, up) as port:
        yield port, went_up
        assert broken.is_set(), "the line never broke"


def peak_mb(pid: int) -> float:
    """Returns the largest resident memory that a process had (MB)."""
    with suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1e3
    return 0.0


@pytest.mark.slow
def test_three_rounds_of_200_mb_over_a_line_that_breaks(tmp_path: Path) -> None:
    files = write_sites(tmp_path / "data", sites=2)
    with faulty_federation(tmp_path) as federation, ExitStack() as stack:
        way, went_up = stack.enter_context(breaking_line(federation.port))
        apps = {
            site: federation.start_node_and_app(site, file, way if site == "site-0" else 0)
            for site, file in files.items()
        }
        own = ["data.new_sites=0", f"model.hidden={HIDDEN},{HIDDEN}", "learner.name=fomaml", "learner.inner_steps=1"]
        own += ["server.optimizer=sgd", "evaluation.local_baseline=none", "runtime.memory=2.0", "runtime.engine=loop"]
        own += ["runtime.checkpoint_every=0", "runtime.check=off"]
        experiment = experiment_of(
            tmp_path, [*files], learner="fomaml", rounds=3, store=store_of(tmp_path), timeout=1500.0
        ).with_overrides(own)
        peaks: dict[str, float] = {}
        over = threading.Event()

        def watch() -> None:
            roots = {"superlink and server": federation.link, "a node": federation.nodes["site-1"]}
            roots["its client app"] = apps["site-1"]
            while not over.wait(1.0):
                for name, root in roots.items():
                    every = [peak_mb(pid) for pid in process_guard.descendants(root.pid)]
                    peaks[name] = max(peaks.get(name, 0.0), *every, 0.0)

        threading.Thread(target=watch, daemon=True).start()
        started = time.monotonic()
        try:
            result = fedmeta.run(experiment, runtime="deployment")
        finally:
            over.set()
        seconds = time.monotonic() - started
    size = sum(value.numel() for value in result.meta_state.values())
    times = rounds_of(store_of(tmp_path), result.summary["run_id"], "time/round_s")
    up = rounds_of(store_of(tmp_path), result.summary["run_id"], "traffic/bytes_up")
    print(f"{size * 4 / 1e6:.0f} MB, rounds of {times} s, {seconds:.0f} s in all, largest processes {peaks} MB")
    assert size * 4 > 200e6
    assert result.summary["rounds"] == 3
    assert result.summary["failures"] == 0, "the line that broke cost no reply"
    assert all(value > 2 * 200e6 for value in up.values())
    assert went_up[0] > 3 * 200e6
    assert all(bool(torch.isfinite(value).all()) for value in result.meta_state.values())
