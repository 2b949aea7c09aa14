"""Rounds that close before every site has answered, on a simulated clock: time, weights, resumes, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clients.app import app
from fedmeta import checkpoint, run
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress
from fedmeta.runtime.delayed import DelayedGrid, delays
from fedmeta.runtime.local import LocalGrid
from server.lateness import Lateness, check
from tests.server.digits import digits

QUIET = ("evaluation.every=0", "evaluation.local_baseline=none", "server.round_timeout=600", "server.rounds=6")
SLOW, SLOWLY = "site-00", 30.0
ONE_SLOW = "runtime.delay=tests.server.test_lateness:one_slow"


def one_slow(names: Sequence[str], round_number: int, random: np.random.Generator) -> list[float]:
    """One site takes 30 s, and the others 1 to 2 s."""
    return [SLOWLY if name == SLOW else 1.0 + random.random() for name in names]


def late(folder: Path, *overrides: str) -> Experiment:
    return digits(folder, *QUIET, "runtime.checkpoint_every=1", "server.sites_per_round=5", *overrides)


def five(folder: Path, *overrides: str) -> Experiment:
    """Five training sites, one of them slow, all of them asked in every round."""
    new = [f"site-{number:02d}" for number in range(5, 40)]
    return late(folder, ONE_SLOW, f"data.new_sites={new}".replace("'", '"'), *overrides)


def simulated(folder: Path) -> float:
    return float(checkpoint.newest(folder)[0].lateness["clock"])


@pytest.mark.quick("buffer")
@pytest.mark.parametrize("more", [(), ("server.late=buffer",)], ids=["drop", "buffer"])
def test_one_slow_site_of_five_does_not_hold_up_the_others(tmp_path: Path, more: tuple[str, ...]) -> None:
    result = run(five(tmp_path, "server.quorum=0.8", *more))
    assert simulated(result.folder) <= 1.3 * 6 * 2.0  # the others take up to 2 s in each of 6 rounds
    state, _ = checkpoint.newest(result.folder)
    took_part = dict(zip(state.names, state.took_part, strict=True))
    assert [took_part[f"site-{number:02d}"] for number in range(1, 5)] == [6] * 4
    assert took_part[SLOW] == 0


@pytest.mark.slow
def test_without_a_quorum_it_is_waited_for(tmp_path: Path) -> None:
    result = run(five(tmp_path, "server.quorum=5", "server.rounds=2"))
    assert simulated(result.folder) == 2 * SLOWLY


@pytest.mark.slow
def test_a_site_is_given_up_after_a_multiple_of_its_own_usual_time(tmp_path: Path) -> None:
    result = run(five(tmp_path, "server.deadline=2.0", "server.rounds=3"))
    # Nothing is known of anybody in the first round; then each has its own time, the slow one too.
    assert SLOWLY <= simulated(result.folder) <= 3 * SLOWLY + 1


@pytest.mark.quick("k")
@pytest.mark.parametrize("more", [("server.quorum=0.5",), ("server.quorum=3", "server.late=buffer")], ids=["drop", "k"])
def test_a_run_that_was_stopped_resumes_to_the_same_bits(tmp_path: Path, more: tuple[str, ...]) -> None:
    own = ("runtime.delay=5.0", *more)
    whole = run(late(tmp_path / "whole", *own))

    def stop(progress: Progress) -> None:
        if progress.round_number == 3 and not progress.note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(late(tmp_path / "cut", *own), report=stop)
    resumed = run(late(tmp_path / "cut", *own), resume="auto")
    one, other = (checkpoint.newest(result.folder)[0] for result in (whole, resumed))
    assert all(torch.equal(value, resumed.meta_state[name]) for name, value in whole.meta_state.items())
    assert (one.took_part, one.lateness["clock"]) == (other.took_part, other.lateness["clock"])
    assert one.late or more[0] == "server.quorum=0.5"


@pytest.mark.slow
def test_no_reply_counts_twice_and_every_one_is_used_dropped_or_outstanding(tmp_path: Path) -> None:
    sent: list[tuple[int, str]] = []
    used: list[tuple[int, str]] = []
    experiment = late(tmp_path, "runtime.delay=5.0", "server.quorum=2", "server.late=buffer", "server.staleness=2")

    class Watched(DelayedGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            sent.extend((int(m.metadata.group_id), name) for m in messages for name in m.content["sites"]["names"])
            return super().push_messages(messages)

    grid = Watched(app, experiment)
    from server import round_kinds, training_loop

    before = round_kinds.step_by_quorum

    def watch(state: Any, number: int, received: Any, lateness: Any) -> Any:
        pairs = [*received.on_time, *received.late]
        used.extend((each.round_number, name) for each, _ in pairs for name in each.names)
        assert all(number - each.round_number <= 2 for each, _ in received.late)
        return before(state, number, received, lateness)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(round_kinds, "step_by_quorum", watch)
        training_loop.run(grid, experiment, lambda progress: None)
    assert len(sent) == len(set(sent))
    assert len(used) == len(set(used))
    assert set(used) <= set(sent)
    busy: set[str] = set()
    for number in sorted({number for number, _ in sent}):
        asked = {name for own, name in sent if own == number}
        assert not asked & busy or all((own, name) in used or number - own > 0 for own, name in sent)


def test_a_late_reply_weighs_less(tmp_path: Path) -> None:
    own = Lateness(Experiment(), {}, {})
    from server.lateness import Outstanding, scaled

    each = Outstanding(1, ("a",), 3, 0.0)
    assert own.staleness(each, 3) == 1.0
    assert own.staleness(each, 6) == 0.5
    from fedmeta.messages import TrainReply

    reply = TrainReply({"x": torch.ones(2)}, 4.0, ("a",), np.zeros(1), np.ones(1, dtype=bool))
    half = scaled(reply, 0.5)
    assert (half.weight, half.gradient["x"].tolist()) == (2.0, [0.5, 0.5])


def test_delays_are_drawn_by_name_and_round(tmp_path: Path) -> None:
    experiment = digits(tmp_path, "runtime.delay=3.0")
    both = delays(experiment, ["a", "b"], 1)
    assert delays(experiment, ["b"], 1) == both[1:]
    assert delays(experiment, ["b"], 2) != both[1:]
    many = [delays(experiment, [f"s{number}"], 1)[0] for number in range(4000)]
    assert abs(np.log(many).std() - (1 + np.pi**2 / 6) ** 0.5) < 0.1


def bad(names: Sequence[str], round_number: int, random: np.random.Generator) -> list[float]:
    return [-1.0 for _ in names]


REFUSED = {
    "secure sums": (("privacy.secure_aggregation=true", "server.quorum=0.5"), "a secure sum has its own"),
    "robust rules": (("server.late=buffer", "server.aggregator=median"), "robust rules compare gradients"),
    "noise": (
        ("server.late=buffer", "privacy.noise_multiplier=1.0", "privacy.clip_norm=1.0"),
        "the accountant counts a site once",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_with_it_is_refused(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    experiment = digits(tmp_path, *settings)
    with pytest.raises(FedmetaError, match=message):
        check(experiment, LocalGrid(app, experiment))


def test_a_quorum_without_effect_is_reported(tmp_path: Path) -> None:
    experiment = digits(tmp_path, "server.quorum=0.5")
    assert "no effect" in check(experiment, LocalGrid(app, experiment))[0]
    assert check(experiment, DelayedGrid(app, experiment)) == []
    with pytest.raises(FedmetaError, match="must return a finite number of at least 0"):
        delays(digits(tmp_path, "runtime.delay=tests.server.test_lateness:bad"), ["a"], 1)
