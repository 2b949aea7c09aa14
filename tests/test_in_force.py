"""The keys in force: what a run obeys is listed, what nothing reads is not, and every rule names a key that exists."""

import pytest

from fedmeta.experiment import Experiment
from fedmeta.in_force import CONDITIONS, params_in_force
from fedmeta.learners import LEARNERS, learner_class, settings_of


def in_force(*overrides: str) -> dict[str, object]:
    return dict(params_in_force(Experiment().with_overrides(list(overrides))))


def test_a_plain_run_lists_what_it_obeys_and_nothing_else() -> None:
    found = in_force("learner.name=maml", "model.name=mlp")
    assert {"learner.inner_steps", "learner.order", "server.rounds", "data.support", "runtime.seed"} < set(found)
    assert {key for key in found if key.startswith("model.")} == {
        "model.name", "model.hidden", "model.activation", "model.norm", "model.dtype",
    }  # fmt: skip
    assert not [key for key in found if key.startswith(("privacy.", "tracking."))]
    assert len(found) < 50, sorted(found)


@pytest.mark.parametrize("name", LEARNERS)
def test_of_a_learner_its_own_keys_are_listed(name: str) -> None:
    found = {key.partition(".")[2] for key in in_force(f"learner.name={name}") if key.startswith("learner.")}
    own = set(settings_of(learner_class(name)))
    assert found - {"name", "order"} <= own
    assert ("order" in found) == (name in ("maml", "anil"))
    usual = Experiment().learner.model_dump()
    assert {key for key in own & set(usual) if usual[key] not in ("", 0, False)} <= found


def test_every_rule_is_about_a_key() -> None:
    assert set(CONDITIONS) <= set(Experiment().params())


@pytest.mark.parametrize(
    ("overrides", "listed"),
    [
        (["server.objective=cvar"], ["server.cvar_share"]),
        (["server.objective=q"], ["server.q"]),
        (["server.objective=worst"], ["server.worst_lr"]),
        (["server.optimizer=momentum"], ["server.momentum"]),
        (["server.compression=top-k"], ["server.compression_keep"]),
        (["server.late=buffer"], ["server.staleness"]),
        (["server.aggregator=norm-bound"], ["server.norm_bound"]),
        (["server.aggregator=krum"], ["server.byzantine"]),
        (["learner.order=auto"], ["server.climb_below", "evaluation.validation_sites"]),
        (["privacy.clip_norm=1", "privacy.noise_multiplier=1"], ["privacy.clip_norm", "privacy.delta"]),
        (["privacy.secure_aggregation=true"], ["privacy.survivors", "privacy.quantum"]),
        (["data.source=synthetic"], ["data.sites", "data.heterogeneity"]),
        (["data.source=tables", "data.path=x"], ["data.label", "data.missing", "data.path"]),
        (["data.ways=5"], ["data.shots", "evaluation.tasks"]),
        (["evaluation.gate=true"], ["evaluation.gate"]),
        (["evaluation.patience=3"], ["evaluation.patience", "evaluation.validation_sites"]),
    ],
)
def test_a_key_is_listed_where_another_makes_it_count(overrides: list[str], listed: list[str]) -> None:
    assert set(listed) <= set(in_force(*overrides))
    assert not set(listed) & set(in_force())


def test_an_own_problem_has_no_rows_and_no_network() -> None:
    found = in_force("problem.name=package.module:Problem", "problem.depth=3", "data.new_sites=4")
    assert found["problem.depth"] == 3
    assert {key for key in found if key.startswith(("data.", "model."))} == {"data.new_sites", "model.dtype"}
    rows = in_force("data.source=package.module:rows", "data.depth=3")
    assert {"data.source", "data.depth", "data.support", "model.hidden"} <= set(rows)
