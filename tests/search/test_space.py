"""Spaces as they are written on the command line, and the experiment's default one."""

import re

import pytest

from fedmeta.errors import FedmetaError
from fedmeta.experiment import LEARNERS, Experiment
from fedmeta.search.space import Choices, Range, default_space, parse

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
def test_a_dimension_is_read_and_written_back(text: str, dimension: Range | Choices) -> None:
    (read,) = parse([text], EXPERIMENT)
    assert read == dimension
    assert parse([str(read)], EXPERIMENT) == (dimension,)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["learner.inner_lr"], "--over learner.inner_lr: must be written KEY=LOW:HIGH[:log] or KEY=VALUE,VALUE,..."),
        (["learner.inner_lr=1:0.1"], "--over learner.inner_lr=1:0.1: 1 must be below 0.1"),
        (["learner.mu=0:1:log"], "--over learner.mu=0:1:log: a range on a log scale must begin above 0"),
        (["learner.mu=0:1:lin"], '--over learner.mu=0:1:lin: "lin" is not known; a range may end with :log'),
        (["learner.inner_steps=0.5:2"], "inner_steps = 0.5: must be a whole number"),
        (["learner.name=maml"], "one value leaves nothing to search; set it with --set learner.name=maml"),
        (["learner.name=maml,"], "a value is missing or given twice"),
        (["learner.name=maml,mamml"], 'did you mean "maml"?'),
        (["learner.inner_lr=-1:1"], "must be a number greater than 0"),
        (["lerner.inner_lr=0.1:1"], 'unknown section lerner; did you mean "learner"?'),
        (["learner.iner_lr=0.1:1"], "inner_lr"),
        (["data.new_sites=1:3"], "cannot be tuned, since it defines the evaluation"),
        (["tracking.uri=a,b"], "cannot be tuned"),
        (["learner.mu=0:1", "learner.mu=0:2"], "--over learner.mu: given twice"),
    ],
)
def test_a_wrong_dimension_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(FedmetaError, match=re.escape(message)):
        parse(texts, EXPERIMENT)


@pytest.mark.parametrize("learner", LEARNERS)
def test_the_default_space_has_the_experiment_in_its_middle(learner: str) -> None:
    experiment = Experiment().with_overrides([f"learner.name={learner}", "learner.inner_lr=0.05"])
    middle = {each.key: each.at(0.5) for each in default_space(experiment)}
    assert middle["learner.inner_lr"] == 0.05
    assert middle["server.lr"] in (1.0, 0.003)
    assert middle["server.rounds"] == experiment.server.rounds
    assert {middle[key] for key in middle if key.endswith("epochs")} <= {experiment.learner.local_epochs}
    assert {middle[key] for key in middle if key.endswith("batch_size")} <= {experiment.learner.batch_size}
    experiment.with_overrides([f"{key}={value}" for key, value in middle.items()])


def test_epochs_and_batches_are_tuned_where_a_learner_has_them_and_rounds_for_all() -> None:
    for learner, own in (("fedavg", {"local_epochs", "batch_size"}), ("pfedme", {"batch_size"}), ("maml", set())):
        keys = {each.key for each in default_space(Experiment().with_overrides([f"learner.name={learner}"]))}
        assert {key.partition(".")[2] for key in keys} & {"local_epochs", "batch_size"} == own
        assert {"server.rounds", "learner.inner_lr", "server.lr"} <= keys
