"""An engine's check proves what it claims: only what passed is remembered, and only sites that prove anything count."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from fedmeta import Task, engines
from fedmeta.engines import gradcheck, lowrank, vmap
from fedmeta.engines.lowrank import engine as lowrank_engine
from fedmeta.errors import FedmetaError
from fedmeta.learners import LEARNERS, build
from fedmeta.learners.learner import MetaState, Metrics
from fedmeta.learners.maml import Maml
from fedmeta.task import stack
from tests.engines.cases import distance


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def tasks(count: int = 3) -> list[Task]:
    random = torch.Generator().manual_seed(0)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 4, generator=random), torch.randint(0, 3, (n,), generator=random)

    return [Task(rows(6), rows(4)) for _ in range(count)]


EDGES = {
    "no query rows": lambda t: Task(t.support, (torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))),
    "labels unseen": lambda t: Task(*((x, torch.full_like(y, -1)) for x, y in t)),
    "not finite": lambda t: Task((t.support[0] * torch.inf, t.support[1]), t.query),
    "constant rows": lambda t: Task((t.support[0] * 0, t.support[1]), t.query),
}


@pytest.mark.quick("reptile-*", "per-fedavg-not finite")
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", LEARNERS)
def test_first_and_last_site_that_prove_nothing_change_no_sum(name: str, edge: str) -> None:
    every = tasks()
    odd = EDGES[edge](every[0])
    given = [odd, *every, odd]
    learners = [build(name, net, inner_steps=2) for _ in range(2)]
    own = learners[0].init(0)
    expected, weight, _ = engines.meta_gradients(learners[0], own, given, "loop")
    found, same, _ = engines.meta_gradients(learners[1], own, given, "auto")
    assert same == weight
    assert distance(found, expected) < 1e-5
    if name != "local":
        assert max(float(value.abs().max()) for value in found.values()) > 0


@pytest.mark.parametrize("name", [name for name, kind in LEARNERS.items() if build(name, net).estimator == "custom"])
def test_kinds_that_the_low_rank_form_does_not_know_are_refused_outright(name: str) -> None:
    learner = build(name, net)
    reason = lowrank.fits(learner, stack(tasks()), learner.init(0))
    assert reason == f"what {LEARNERS[name].__name__} sends is its own"


@dataclass(frozen=True)
class FailsAtFirst(Maml):
    """Raises the first time that it is asked."""

    asked = 0

    def meta_gradient(self, meta_state: MetaState, task: Task) -> tuple[dict[str, Tensor], Metrics]:
        type(self).asked += 1
        if type(self).asked == 1:
            raise ValueError("my own mistake")
        return super().meta_gradient(meta_state, task)


@pytest.mark.parametrize("engine", ["auto", "loop", "vmap", "lowrank"])
def test_a_check_that_raised_is_not_remembered_as_passed(engine: str) -> None:
    FailsAtFirst.asked = 0
    learner = FailsAtFirst(net, inner_steps=2)
    own, given = learner.init(0), tasks()
    with pytest.raises(FedmetaError, match="FailsAtFirst: meta_gradient failed: ValueError: my own mistake"):
        engines.meta_gradients(learner, own, given, engine)
    expected, _, _ = engines.meta_gradients(build("maml", net, inner_steps=2), own, given, "loop")
    assert distance(engines.meta_gradients(learner, own, given, engine)[0], expected) < 1e-5


@pytest.mark.parametrize("module", [vmap, lowrank_engine], ids=["vmap", "lowrank"])
def test_where_no_site_proves_anything_the_loop_computes_and_another_cohort_may(module: object) -> None:
    learner = build("maml", net, inner_steps=2)
    own, given = learner.init(0), tasks()
    silent = stack([EDGES["labels unseen"](task) for task in given])
    assert "no site's gradient could show" in str(module.fits(learner, silent, own))
    assert engines.choose_engine(learner, silent, own) == "loop"
    assert module.fits(learner, stack(given), own) is None


@pytest.mark.parametrize("wrong", [1.0 + 1e-6, 0.0, float("nan")])
def test_a_planted_error_of_a_way_is_found(wrong: float) -> None:
    learner = build("maml", net, inner_steps=2)
    own, batch = learner.init(0), stack(tasks())

    def planted(*arguments):
        found = vmap.meta_gradients(*arguments)
        found.total["theta.0.bias"] = found.total["theta.0.bias"] * wrong
        return found

    gradcheck.check(learner, own, batch, vmap.meta_gradients, vmap.evaluate)
    with pytest.raises(gradcheck.UnsupportedModelError, match="its gradient is another"):
        gradcheck.check(learner, own, batch, planted)


def test_an_engine_that_scores_otherwise_is_found() -> None:
    learner = build("maml", net, inner_steps=2)

    def planted(*arguments):
        return {name: value * 1.001 for name, value in vmap.evaluate(*arguments).items()}

    with pytest.raises(gradcheck.UnsupportedModelError, match="scored otherwise"):
        gradcheck.check(learner, learner.init(0), stack(tasks()), vmap.meta_gradients, planted)


class Padded(nn.Module):
    """Torch's own encoder with a padding mask, which its fast path for inference computes otherwise."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.embed, self.encoder, self.head = nn.Linear(4, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.unflatten(1, (-1, 4)))
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        mask[:, -2:] = True
        return self.head(self.encoder(tokens, src_key_padding_mask=mask).mean(1))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "loop", "vmap", "lowrank"])
def test_what_is_trained_is_what_is_evaluated(engine: str) -> None:
    random = torch.Generator().manual_seed(0)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 20, generator=random), torch.randint(0, 3, (n,), generator=random)

    given = [Task(rows(6), rows(4)) for _ in range(3)]
    learner = build("maml", Padded, inner_steps=2)
    own = learner.init(0)
    _, _, figures = engines.meta_gradients(learner, own, given, engine)
    scored = engines.evaluate(learner, own, given, engine)["loss"][:, -1]
    assert torch.allclose(figures["query_loss"].float(), scored.float(), atol=1e-6)
    adapted = learner.adapt(own, given[0].support)
    with torch.no_grad():
        predicted = learner.predict(adapted, given[0].query[0])
    loss = nn.functional.cross_entropy(predicted, given[0].query[1])
    assert float(loss) == pytest.approx(float(scored[0]), abs=1e-6)
    assert torch.backends.mha.get_fastpath_enabled()
