"""Each site's gradient is shortened to the clip norm before it is added up, whichever engine computes it."""

import pytest
import torch
from torch import Tensor, nn

from fedmeta import engines
from fedmeta.engines.lowrank import ghost_clipping
from fedmeta.engines.personal_state import stack_personal, train_personal
from fedmeta.engines.weighted_sum import WeightedSum, norms_of
from fedmeta.learners import Learner, build
from fedmeta.models import FunctionalModel
from fedmeta.task import Batch
from tests.engines.cases import CLASSES, state, tasks

SIZES = [(6, 5), (4, 7), (6, 6), (3, 2), (1, 4)]
ENGINES = ("loop", "vmap", "lowrank", "auto")
CLIP = 0.4


def learner_of(name: str) -> Learner:
    return build(name, FunctionalModel(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))), inner_lr=0.2)


def by_hand(learner: Learner, meta_state: dict[str, Tensor], batch: Batch) -> list[dict[str, Tensor]]:
    return [learner.meta_gradient(meta_state, batch.task(site))[0] for site in range(batch.sites)]


def norm(gradient: dict[str, Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in gradient.values()]).norm())


@pytest.mark.quick("maml-*")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["maml", "fomaml", "meta-sgd", "fedavg"])
def test_clipped_sums_and_norms_are_the_same_in_every_engine(name: str, engine: str) -> None:
    learner, batch = learner_of(name), tasks(SIZES, (4,))
    meta_state = state(learner)
    own = by_hand(learner, meta_state, batch)
    norms = torch.tensor([norm(gradient) for gradient in own], dtype=torch.float64)
    bound = float(norms.median())
    assert (norms > bound).any()
    weights = torch.linspace(0.5, 2.0, batch.sites, dtype=torch.float64)
    factors = (bound / norms).clamp(max=1.0)
    found, weight, figures = engines.meta_gradients(
        learner, meta_state, batch, engine, weights=weights, clip_norm=bound, chunk=2
    )
    assert weight == float(weights.sum())
    for key, value in found.items():
        expected = sum(w * f * gradient[key] for w, f, gradient in zip(weights, factors, own, strict=True))
        assert torch.allclose(value, expected, rtol=1e-6, atol=1e-9)
    each, _, same = engines.meta_gradients(
        learner, meta_state, batch, engine, weights=weights, clip_norm=bound, per_site=True, chunk=2
    )
    assert torch.allclose(same["query_loss"], figures["query_loss"])
    for site, gradient in enumerate(own):
        mine = {key: value[site] for key, value in each.items()}
        assert norm(mine) == pytest.approx(min(norm(gradient), bound))
        assert all(torch.allclose(mine[key], factors[site] * value, atol=1e-9) for key, value in gradient.items())


@pytest.mark.parametrize("engine", ENGINES)
def test_each_sites_own_gradients_add_up_to_the_sum(engine: str) -> None:
    learner, batch = learner_of("maml"), tasks(SIZES, (4,))
    meta_state = state(learner)
    weights = torch.linspace(0.5, 2.0, batch.sites, dtype=torch.float64)
    total, _, _ = engines.meta_gradients(learner, meta_state, batch, engine, weights=weights)
    each, _, _ = engines.meta_gradients(learner, meta_state, batch, engine, weights=weights, per_site=True)
    for key, value in total.items():
        assert each[key].shape == (batch.sites, *value.shape)
        assert torch.allclose(torch.tensordot(weights, each[key], dims=1), value, atol=1e-9)


def norm_net() -> nn.Module:
    body = (nn.Linear(12, 16), nn.GroupNorm(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh())
    return nn.Sequential(*body, nn.Linear(16, CLASSES))


@pytest.mark.quick("fomaml-*")
@pytest.mark.parametrize(
    ("name", "wide"),
    [(name, wide) for name in ("maml", "fomaml", "fedavg", "maml-global") for wide in (True, False)] + [("anil", True)],
)
def test_the_lowrank_form_clips_without_any_sites_gradient(name: str, wide: bool) -> None:
    settings = {"inner_lr": 0.3, "inner_steps": 3} | ({"global_weight": 0.5} if name == "maml-global" else {})
    module = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, CLASSES)) if wide else norm_net()
    learner, batch = build(name.partition("-")[0], FunctionalModel(module), **settings), tasks(SIZES, (12,))
    meta_state = state(learner)
    assert ghost_clipping.fits(learner, batch, meta_state)
    forms = engines.lowrank.plan_of(learner, batch, meta_state)
    assert forms.lowrank or not wide
    own = by_hand(learner, meta_state, batch)
    norms = torch.tensor([norm(gradient) for gradient in own], dtype=torch.float64)
    bound = float(norms.median())
    found, _, _ = engines.meta_gradients(learner, meta_state, batch, "lowrank", clip_norm=bound)
    factors = (bound / norms).clamp(max=1.0)
    for key, value in found.items():
        expected = sum(factor * gradient[key] for factor, gradient in zip(factors, own, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_learned_rates_and_unseen_uses_are_clipped_by_another_engine() -> None:
    batch = tasks(SIZES, (4,))
    learner = learner_of("maml++")
    assert not ghost_clipping.fits(learner, batch, state(learner))

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            # A second use of a weight that the head-only learner leaves as it is.
            return self.head(torch.tanh(self.body(x)) * self.body.weight.square().sum())

    odd = build("anil", FunctionalModel(Odd()), inner_lr=0.2)
    assert engines.fits(odd, batch, state(odd)) is None
    assert not ghost_clipping.fits(odd, batch, state(odd))
    expected, _, _ = engines.meta_gradients(odd, state(odd), batch, "loop", clip_norm=CLIP)
    found, _, _ = engines.meta_gradients(odd, state(odd), batch, "lowrank", clip_norm=CLIP)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ["loop", "vmap", "lowrank"])
def test_a_site_that_is_not_finite_adds_nothing_and_is_reported(engine: str) -> None:
    learner, batch = learner_of("maml"), tasks(SIZES, (4,))
    batch.support[0][2, 0, 0] = torch.inf
    each, weight, figures = engines.meta_gradients(
        learner, state(learner), batch, engine, clip_norm=CLIP, per_site=True
    )
    assert figures["finite"].tolist() == [1, 1, 0, 1, 1]
    assert weight == 4
    assert all(not value[2].any() and value.isfinite().all() for value in each.values())
    total, _, _ = engines.meta_gradients(learner, state(learner), batch, engine, clip_norm=CLIP)
    assert all(torch.allclose(value, each[key].sum(0), atol=1e-9) for key, value in total.items())
    _, weight, figures = engines.meta_gradients(learner, state(learner), batch, engine, clip_norm=CLIP)
    assert (weight, figures["finite"].tolist()) == (4, [1, 1, 0, 1, 1])


def test_the_sum_of_clipped_gradients_is_exact_in_float32() -> None:
    gradients = {
        "theta": torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]),
        "alpha": torch.tensor([[12.0], [0.0], [0.0]]),
    }
    factors = 1.0 / norms_of(gradients).clamp(min=1.0)
    assert torch.equal(factors, torch.tensor([1 / 13, 1.0, 1.0], dtype=torch.float64))
    total = WeightedSum.empty({name: value[0] for name, value in gradients.items()}, clip_norm=1.0)
    total.add(gradients, torch.ones(3), {"query_loss": torch.zeros(3)})
    assert total.total["theta"].tolist() == pytest.approx([3 / 13 + 0.3, 4 / 13 + 0.4])
    assert float(total.total["alpha"]) == pytest.approx(12 / 13)


def test_personal_learners_clip_what_they_send_and_not_what_they_keep() -> None:
    learner, batch = learner_of("ditto"), tasks(SIZES, (4,))
    meta_state = state(learner)
    start, ones = stack_personal(learner, meta_state, [None] * batch.sites), torch.ones(batch.sites)
    whole, _, _, kept = train_personal(learner, meta_state, batch, ones, start, per_site=True)
    sizes = torch.stack([value.flatten(1).square().sum(1) for value in whole.values()]).sum(0).sqrt()
    bound = float(sizes.median())
    total, _, _, again = train_personal(learner, meta_state, batch, ones, start, clip_norm=bound)
    assert all(torch.equal(value, again[key]) for key, value in kept.items())
    factors = (bound / sizes).clamp(max=1.0)
    assert all(torch.allclose(value, torch.tensordot(factors, whole[key], dims=1)) for key, value in total.items())


def test_shortening_a_cohort_of_nobody_is_nothing() -> None:
    total = WeightedSum.empty({"theta": torch.zeros(2, 3)}, per_site=True)
    assert total.stacked()["theta"].shape == (0, 2, 3)
