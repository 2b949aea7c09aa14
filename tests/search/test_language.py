"""Spaces as they are written on the command line, and the ways to draw from them."""

import re

import pytest

from fedmeta.errors import FedmetaError
from fedmeta.experiment import LEARNERS, Experiment
from fedmeta.tuning import Choices, Range, usual_space
from fedmeta.tuning.language import space_of
from fedmeta.tuning.page import described
from fedmeta.tuning.samplers import grid

EXPERIMENT = Experiment()


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("learner.inner_lr=0.01:1:log", Range("learner.inner_lr", 0.01, 1.0, log=True)),
        ("learner.inner_lr = 1e-3 : 1", Range("learner.inner_lr", 0.001, 1.0)),
        ("learner.inner_steps=1:10", Range("learner.inner_steps", 1, 10, whole=True)),
        ("evaluation.steps=1:3", Range("evaluation.steps", 1, 3, whole=True)),
        ("server.lr=1:3", Range("server.lr", 1.0, 3.0)),
        ("learner.name=maml,anil", Choices("learner.name", ("maml", "anil"))),
        ("model.hidden=32,[64, 64],128", Choices("model.hidden", ("32", "64,64", "128"))),
        ("evaluation.gate=true,false", Choices("evaluation.gate", (True, False))),
        ("learner.inner_steps=1,3,5", Choices("learner.inner_steps", (1, 3, 5))),
    ],
)
def test_reads_a_dimension_and_writes_it_back(text: str, dimension: Range | Choices) -> None:
    (read,) = space_of([text], EXPERIMENT)
    assert read == dimension
    assert space_of([described(read)], EXPERIMENT) == [dimension]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["learner.inner_lr"], "--over learner.inner_lr: must be written KEY=LOW:HIGH[:log] or KEY=VALUE,VALUE,..."),
        (["learner.inner_lr=1:0.1"], "--over learner.inner_lr=1:0.1: 1 must be below 0.1"),
        (["learner.mu=0:1:log"], "--over learner.mu=0:1:log: a range by factors (:log) must begin above 0"),
        (["learner.mu=0:1:lin"], '--over learner.mu=0:1:lin: "lin" is not known; a range may end with :log'),
        (["learner.inner_steps=0.5:2"], "--over learner.inner_steps=0.5:2: learner.inner_steps takes whole numbers"),
        (["learner.name=maml"], "one value leaves nothing to search; give it with --set learner.name=maml"),
        (["learner.name=maml,"], "a value is missing or given twice"),
        (["learner.name=maml,mamml"], 'did you mean "maml"?'),
        (["learner.inner_lr=-1:1"], "must be a number greater than 0"),
        (["lerner.inner_lr=0.1:1"], 'unknown section lerner; did you mean "learner"?'),
        (["learner.iner_lr=0.1:1"], "inner_lr"),
        (["data.new_sites=1:3"], "must stay as it is, for it changes what is judged and not how well"),
        (["tracking.uri=a,b"], "must stay as it is"),
        (["learner.mu=0:1", "learner.mu=0:2"], "--over learner.mu: given twice"),
    ],
)
def test_says_what_is_wrong_with_a_dimension(texts: list[str], message: str) -> None:
    with pytest.raises(FedmetaError, match=re.escape(message)):
        space_of(texts, EXPERIMENT)


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_usual_space_has_the_experiment_in_its_middle(learner: str) -> None:
    experiment = Experiment().with_overrides([f"learner.name={learner}", "learner.inner_lr=0.05"])
    middle = {each.key: each.at(0.5) for each in usual_space(experiment)}
    assert middle["learner.inner_lr"] == 0.05
    assert middle["server.lr"] in (1.0, 0.003)
    experiment.with_overrides([f"{key}={value}" for key, value in middle.items()])


def test_a_grid_takes_every_choice_and_no_more_than_the_budget() -> None:
    space = space_of(["learner.name=maml,anil,fomaml", "learner.inner_lr=0.01:1:log", "learner.mu=0:1"], EXPERIMENT)
    points = grid(space, 20, 0)
    assert len(points) == 18
    assert len({tuple(point.values()) for point in points}) == 18
    assert {point["learner.name"] for point in points} == {"maml", "anil", "fomaml"}
    assert len({point["learner.inner_lr"] for point in points}) * len({point["learner.mu"] for point in points}) == 6
    assert sorted(map(str, grid(space, 20, 1))) == sorted(map(str, points))
    assert grid(space, 20, 1) != points
    with pytest.raises(FedmetaError, match="the choices alone make 3 points"):
        grid(space, 2, 0)


def test_a_grid_has_no_whole_number_twice() -> None:
    points = grid(space_of(["learner.inner_steps=1:3"], EXPERIMENT), 50, 0)
    assert sorted(point["learner.inner_steps"] for point in points) == [1, 2, 3]
