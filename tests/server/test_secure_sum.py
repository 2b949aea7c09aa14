"""Secure sums over nodes: the plain run's state to the quantum, drop-outs at every step, noise, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message

from clients.app import app
from fedmeta import run
from fedmeta.errors import FedmetaError
from fedmeta.experiment import LEARNERS, Experiment
from fedmeta.messages import MASKED_TRAIN, QUERY_KEYS, QUERY_SHARES, QUERY_UNMASK
from fedmeta.progress import Progress, ignore_progress
from server import training_loop
from server.accountant import Accountant
from tests.server.digits import digits
from tests.server.hospitals import hospital, hospitals
from tests.several_nodes import NODE_IDS, SeveralNodes

PLAIN = ("evaluation.every=0", "evaluation.local_baseline=none", "runtime.engine=loop", "server.norm_cap=0")
SECURE = "privacy.secure_aggregation=true"
STEPS = (QUERY_KEYS, QUERY_SHARES, MASKED_TRAIN, QUERY_UNMASK)
TOLERANCE = 1e-7
"""Some rounds of float32 states whose gradients differ by 2^-32."""


def sends(learner: str) -> bool:
    return learner not in ("local", "average")


@pytest.mark.quick("maml")
@pytest.mark.parametrize("learner", [name for name in LEARNERS if sends(name)])
def test_a_secure_run_is_the_plain_one_to_the_quantum(tmp_path: Path, learner: str) -> None:
    own = (f"learner.name={learner}", "server.rounds=1", "server.optimizer=sgd", "server.lr=1.0")
    plain, secure = (run(digits(tmp_path, *PLAIN, *own, *more)) for more in ((), (SECURE,)))
    for name, value in plain.meta_state.items():
        assert torch.allclose(value, secure.meta_state[name], rtol=0, atol=TOLERANCE), name
    assert len(secure.sites) == 0  # no row of one site
    for group in ("new_sites", "training_sites"):
        own, other = plain.summary[group], secure.summary[group]
        assert (own["n"], own["diverged"]) == (other["n"], other["diverged"])
        for state in ("global", "personalized"):
            for key in ("mean", "std", "loss"):
                assert other[state][key] == pytest.approx(own[state][key], abs=1e-3), (group, state, key)
        assert other["helped"] == pytest.approx(own["helped"], abs=0.05)
        assert other["local_only"]["mean"] is None


@pytest.mark.slow
def test_sums_of_features_and_weights_by_rows_are_inside(tmp_path: Path) -> None:
    configs = [hospital(tmp_path, name, rows) for name, rows in (("a", 12), ("b", 20), ("c", 40), ("d", 14))]
    states = []
    for more in ((), (SECURE,)):
        experiment = hospitals(tmp_path, *PLAIN, "server.weighting=examples", "server.rounds=2", *more)
        grid = SeveralNodes(app, experiment, node_configs=configs)
        outcome = training_loop.run(grid, experiment, ignore_progress)
        states.append(outcome.meta_state)
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-6, atol=TOLERANCE), name


@pytest.mark.quick("train.masked")
@pytest.mark.parametrize("step", STEPS)
def test_who_drops_out_is_named_and_the_others_are_summed(tmp_path: Path, step: str) -> None:
    experiment = digits(tmp_path, *PLAIN, SECURE, "server.rounds=2", "server.sites_per_round=0")
    grid = SeveralNodes(app, experiment, 5)

    def silent(message: Message, reply: Message) -> Message | None:
        kind, context = message.metadata.message_type, str(message.content)
        return None if kind == step and "train" in context else reply

    grid.faults = {NODE_IDS[1]: silent}
    reported: list[Progress] = []
    outcome = training_loop.run(grid, experiment, reported.append)
    notes = [progress.note for progress in reported if progress.note.startswith("round 1")]
    assert outcome.summary["rounds"] == 2
    if step == QUERY_UNMASK:  # its numbers are in the sum, and enough others hold its shares
        assert not notes
    else:
        assert f"dropped out at {step}: no reply" in notes[0]
    # The plain run of the sites that were left has the same state.
    lost = grid.contexts[NODE_IDS[1]]
    plain = SeveralNodes(app, digits(tmp_path, *PLAIN, "server.rounds=2", "server.sites_per_round=0"), 5)
    if step != QUERY_UNMASK:
        plain.faults = {NODE_IDS[1]: lambda message, reply: None if message.metadata.message_type == "train" else reply}
    same = training_loop.run(plain, plain.experiment, ignore_progress)
    assert lost is not None
    for name, value in same.meta_state.items():
        assert torch.allclose(value, outcome.meta_state[name], rtol=0, atol=1e-5), name


@pytest.mark.slow
def test_below_the_fewest_the_round_is_skipped_by_name(tmp_path: Path) -> None:
    own = ("server.rounds=1", "server.sites_per_round=0", "privacy.survivors=0.9")
    experiment = digits(tmp_path, *PLAIN, SECURE, *own)
    grid = SeveralNodes(app, experiment, 3)
    grid.faults = {NODE_IDS[0]: lambda message, reply: None if message.metadata.message_type == MASKED_TRAIN else reply}
    with pytest.raises(FedmetaError, match=r"secure aggregation: \d+ of 32 sites were left after the masked numbers"):
        training_loop.run(grid, experiment, ignore_progress)


def numbers_in(message: Message) -> list[np.ndarray[Any, Any]]:
    records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
    return [array.numpy().ravel() for record in records for array in record.values()]


def test_no_number_of_a_site_is_in_what_the_server_is_sent_in_a_round(tmp_path: Path) -> None:
    experiment = digits(tmp_path, *PLAIN, SECURE, "server.rounds=1", "runtime.nodes=3")
    seen: dict[str, list[Message]] = {}

    def watch(message: Message, reply: Message) -> Message:
        seen.setdefault(message.metadata.message_type, []).append(reply)
        return reply

    grid = SeveralNodes(app, experiment, 3)
    grid.faults = dict.fromkeys(NODE_IDS, watch)
    training_loop.run(grid, experiment, ignore_progress)
    assert set(seen) == {"query.sites", *STEPS, "query.masked_sums", "evaluate.masked"}
    for reply in seen["query.sites"]:
        sizes = reply.content["sizes"]
        assert set(sizes["train_rows"]) | set(sizes["test_rows"]) | set(sizes["weights"]) == {1}  # type: ignore[arg-type]
    for kind in (MASKED_TRAIN, "query.masked_sums", "evaluate.masked"):
        bits = np.unpackbits(np.concatenate([n for reply in seen[kind] for n in numbers_in(reply)]).view(np.uint8))
        assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))
    for kind in (QUERY_KEYS, QUERY_SHARES, QUERY_UNMASK):
        assert not [numbers for reply in seen[kind] for numbers in numbers_in(reply)]


@pytest.mark.slow
def test_noise_is_added_at_the_sites_and_counted_without_amplification(tmp_path: Path) -> None:
    own = ("privacy.clip_norm=1.0", "privacy.noise_multiplier=2.0", "privacy.delta=0.001", "server.optimizer=sgd")
    settings = (*PLAIN, SECURE, "server.rounds=1", "server.lr=1.0", "server.sites_per_round=0", *own)
    quiet = (*PLAIN, "server.rounds=1", "server.lr=1.0", "server.sites_per_round=0", own[0], own[-1])
    noisy, plain = run(digits(tmp_path, *settings)), run(digits(tmp_path, *quiet, "server.weighting=uniform"))
    # 16 of 32 sites must be left, so that all 32 add twice the variance that is promised.
    wanted = 2.0 * 2**0.5 / 32
    differences = torch.cat(
        [(noisy.meta_state[name] - plain.meta_state[name]).flatten() for name in plain.meta_state if "theta" in name]
    )
    assert abs(float(differences.std()) / wanted - 1) < 5 / (2 * len(differences)) ** 0.5
    assert noisy.summary["privacy"]["epsilon"] == pytest.approx(Accountant(32, 32, 2.0, 0.001).epsilon(1))


REFUSED = {
    "an aggregator": (("server.aggregator=median",), "must be \"mean\" with privacy.secure_aggregation"),
    "weights by loss": (("server.sampling=optimal", "server.sites_per_round=8"), "they need each site's own update"),
    "a cohort of two": (("server.sites_per_round=2",), "a round has 2 sites, and must have 3"),
    "all may collude": (
        ("privacy.colluding=8", "privacy.noise_multiplier=1.0", "privacy.clip_norm=1.0", "privacy.delta=0.001"),
        "colluding = 8: must be below",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_with_it_is_refused(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(FedmetaError, match=message):
        run(digits(tmp_path, *PLAIN, SECURE, *settings))


@pytest.mark.slow
def test_what_is_off_is_reported(tmp_path: Path) -> None:
    notes: list[str] = []
    own = ("evaluation.every=0", "evaluation.local_baseline=none", "server.rounds=1", SECURE)
    run(digits(tmp_path, *own), report=lambda progress: notes.append(progress.note))
    found = [note for note in notes if note.startswith("secure aggregation")]
    assert [
        word in " ".join(found) for word in ("norm_cap = 30 is off", "clip_norm is 0", "outliers", "evaluations")
    ] == [True] * 4


@pytest.mark.slow
def test_a_number_that_does_not_fit_is_refused_at_the_site(tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r"beyond-range: .*raise privacy.quantum"):
        run(digits(tmp_path, *PLAIN, SECURE, "privacy.quantum=1e-19", "server.rounds=1"))


def test_colluding_sites_without_noise_are_no_setting() -> None:
    with pytest.raises(FedmetaError, match="colluding"):
        Experiment().with_overrides(["privacy.colluding=1"])
