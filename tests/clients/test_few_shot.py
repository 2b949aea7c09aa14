"""Sites that are scored on several tasks, and what nodes that share few-shot or text sites report of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from clients.app import app
from clients.evaluation import Evaluator, evaluate_sites
from clients.node import RowNode, learner_for
from fedmeta import engines
from fedmeta.data import Standardisation, load, split
from fedmeta.experiment import Data, Evaluation, Experiment, Learner, Model
from fedmeta.messages import QUERY_SITES, RoundRequest, SitesReply
from tests.several_nodes import NODE_IDS, SeveralNodes

AS_IS = Standardisation(np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32))


def drawings(folder: Path) -> str:
    """Five alphabets of four to eight characters, ten drawings each of 6 x 6 pixels."""
    draw = np.random.default_rng(0)
    counts = [4, 5, 6, 7, 8]
    shapes = draw.normal(size=(sum(counts), 1, 6, 6)).repeat(10, axis=1)
    x = (shapes + draw.normal(size=shapes.shape)).reshape(-1, 6, 6).astype(np.float32)
    characters = np.repeat(np.arange(sum(counts)), 10)
    alphabets = np.repeat(np.arange(5), [10 * count for count in counts])
    np.savez(folder / "drawings.npz", x=x, y=characters, alphabet=alphabets, site=alphabets)
    return str(folder / "drawings.npz")


def experiment(folder: Path, learner: str = "maml", **keys: Any) -> Experiment:
    return Experiment(
        data=Data(**{"source": "omniglot", "path": drawings(folder), "ways": 3, "shots": 2, "rotations": True, **keys}),
        model=Model(hidden="8"),
        learner=Learner(name=learner, inner_steps=2),
        evaluation=Evaluation(tasks=4),
    )


def node_of(run: Experiment) -> RowNode:
    there = load(run.data)
    return RowNode(run, there, split(there, run.data, 0), there.all_sites)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["maml", "fedrep"])
@pytest.mark.parametrize("gate", [False, True])
def test_a_site_is_judged_by_the_mean_of_its_tasks(tmp_path: Path, learner: str, gate: bool) -> None:
    node = node_of(experiment(tmp_path, learner))
    classes = node.classes()
    assert classes == ("way 0", "way 1", "way 2")
    learned = learner_for(node, classes)
    state = learned.init(0)
    names = tuple(node.population.names[site] for site in (3, 0, 4))
    request = RoundRequest(state, 1, classes, names, "run", steps=2, gate=gate, engine="loop")
    own = learned.personal(state)
    evaluator = Evaluator.of(learned, state, request)
    reply = evaluate_sites(node, node.find(names), request, evaluator, AS_IS, [own, None, own] if own else None)
    assert reply.figures["accuracy"].shape == (3, 3)
    assert ((reply.chosen >= 0) & (reply.chosen <= 2)).all()
    if own:
        return
    for place, site in enumerate((3, 0, 4)):
        (_, batch), *_ = node.evaluation_batches(np.array([site]), AS_IS, classes)
        assert batch.sites == 4
        each = [engines.evaluate(learned, state, [batch.task(task)], "loop", steps=2) for task in range(4)]
        for figures in ("accuracy", "loss"):
            found = reply.figures[figures]
            expected = torch.cat([scores[figures] for scores in each]).double().mean(0)
            np.testing.assert_allclose(found[place], expected.numpy(), rtol=1e-6)
        assert len({tuple(scores["accuracy"].flatten().tolist()) for scores in each}) > 1


@pytest.mark.slow
@pytest.mark.parametrize(("learner", "inner_lr"), [("maml", 5.0), ("fedrep", 1.0)])
def test_the_select_steps_do_not_hang_on_how_many_sites_choose_together(
    tmp_path: Path, learner: str, inner_lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_of(experiment(tmp_path, learner, shots=4))
    classes = node.classes()
    learned = replace(learner_for(node, classes), inner_lr=inner_lr)
    state = learned.init(0)
    evaluator = Evaluator.of(learned, state, RoundRequest(state, 1, classes, (), "run", steps=2, engine="loop"))
    (_, batch), *_ = node.evaluation_batches(node.hosted, AS_IS, classes)
    own = None
    if learned.personal(state):
        draw = torch.Generator().manual_seed(0)
        kept = learned.personal(state)
        own = {name: torch.randn(batch.sites, *value.shape, generator=draw) for name, value in kept.items()}
    together = evaluator.select_steps(batch, own)
    monkeypatch.setattr("clients.evaluation.GROUP_ROWS", 1)
    assert torch.equal(evaluator.select_steps(batch, own), together)
    assert len(together.unique()) > 1


def test_rounds_bring_new_tasks(tmp_path: Path) -> None:
    node = node_of(experiment(tmp_path))
    batches = [node.training_batch(node.hosted, number, AS_IS, node.classes()) for number in (1, 1, 2)]
    assert [batch.support[0].shape for batch in batches] == [(5, 6, 6, 6)] * 3
    assert torch.equal(batches[0].support[0], batches[1].support[0])
    assert not torch.equal(batches[0].support[0], batches[2].support[0])


def test_nodes_that_share_roles_say_all_symbols(tmp_path: Path) -> None:
    """A node whose roles never use a symbol as a label may read it, and the model has to embed it."""
    text = np.repeat(np.arange(6), 100).astype(np.uint8)
    np.savez(
        tmp_path / "plays.npz",
        x=text,
        offset=np.arange(0, 601, 100),
        site_names=np.array([f"role {number}" for number in range(6)]),
        vocab=np.array(list("abcdef")),
    )
    data = Data(source="shakespeare", path=str(tmp_path / "plays.npz"), split="blocks")
    grid = SeveralNodes(app, Experiment(data=data), 3)
    for node in NODE_IDS[:3]:
        (reply,) = grid.send_and_receive([grid.create_message(RecordDict(), QUERY_SITES, node, "1")])
        found = SitesReply.unpack(reply.content)
        assert (len(found.names), found.classes, found.tokens) == (2, tuple("abcdef"), True)
