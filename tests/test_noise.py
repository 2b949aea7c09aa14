"""Noise by keys: the same wherever and whenever a row is trained on, and none where a model predicts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fedmeta
from fedmeta import Task, engines, noise
from fedmeta.errors import FedmetaError
from fedmeta.learners import LEARNERS, build
from fedmeta.learners.check import check
from fedmeta.task import stack
from tests.engines.cases import distance


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        key = fedmeta.noise_key()
        if key is not None:
            x = x + 0.1 * noise.normal(key, 4, dtype=x.dtype)
        return self.head(noise.dropout(self.body(x).tanh(), 0.3))


def tasks(
    dtype: torch.dtype = torch.float32, sizes: tuple[tuple[int, int], ...] = ((6, 4), (5, 4), (3, 2))
) -> list[Task]:
    random = torch.Generator().manual_seed(0)

    def rows(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 4, generator=random).to(dtype), torch.randint(0, 3, (n,), generator=random)

    return [Task(rows(support), rows(query)) for support, query in ((6, 4), (5, 4), (3, 2))]


def keyed(round_number: int, given: list[Task]):
    return stack(given).with_noise(noise.noise_keys(0, round_number, [f"site-{k}" for k in range(len(given))]))


@pytest.mark.quick("maml", "fedavg")
@pytest.mark.parametrize("name", LEARNERS)
def test_all_engines_draw_the_same_noise(name: str) -> None:
    batch = keyed(3, tasks(torch.float64))
    sums = []
    for engine in ("loop", "vmap", "lowrank", "auto"):
        learner = build(name, Noisy, inner_steps=2, **({"solve_steps": 3} if name == "average" else {}))
        own = {key: value.double() for key, value in learner.init(0).items()}
        sums.append(engines.meta_gradients(learner, own, batch, engine))
    for gradient, weight, figures in sums[1:]:
        assert weight == sums[0][1]
        assert distance(gradient, sums[0][0]) < 1e-9
        assert torch.allclose(figures["query_loss"], sums[0][2]["query_loss"])


def test_noise_is_keyed_by_site_round_and_step_and_by_nothing_else() -> None:
    learner = build("maml", Noisy, inner_steps=2)
    own, given = learner.init(0), tasks()

    def gradient(batch, **how):
        return engines.meta_gradients(learner, own, batch, "loop", **how)[0]

    first = gradient(keyed(1, given))
    assert distance(gradient(keyed(1, given)), first) == 0
    assert distance(gradient(keyed(1, given), chunk=1), first) < 1e-6
    assert distance(gradient(keyed(2, given)), first) > 1e-3
    turned = stack(given[::-1]).with_noise(noise.noise_keys(0, 1, ["site-2", "site-1", "site-0"]))
    assert distance(gradient(turned), first) < 1e-6
    alone = keyed(1, [given[0], given[0]])
    one, two = (
        engines.meta_gradients(learner, own, alone, "loop", per_site=True)[0]["theta.head.bias"][k] for k in (0, 1)
    )
    assert not torch.equal(one, two)


def test_steps_and_calls_draw_different_noise() -> None:
    x = torch.randn(5, 4)

    def keys(*steps: int) -> list[Tensor]:
        with noise.in_objective("inner"), noise.of_rows(x):
            if not steps:
                return [noise.noise_key(), noise.noise_key()]
            with noise.at_step(steps[0]):
                return [noise.noise_key()]

    every = [*keys(), *keys(0), *keys(1)]
    assert len({tuple(key.tolist()) for key in every}) == 4
    assert all(torch.equal(one, other) for one, other in zip(every, [*keys(), *keys(0), *keys(1)], strict=True))


def test_a_row_has_the_same_noise_beside_any_rows_and_at_any_place() -> None:
    x = torch.randn(5, 4)

    def drawn(rows: Tensor) -> Tensor:
        with noise.in_objective("inner"), noise.of_rows(rows):
            return noise.dropout(torch.ones(len(rows), 50), 0.5)

    whole = drawn(x)
    assert torch.equal(drawn(x.flip(0)).flip(0), whole)
    assert torch.equal(torch.cat([drawn(x[k : k + 1]) for k in range(5)]), whole)
    assert not torch.equal(whole[0], whole[1])


def test_where_a_model_predicts_there_is_no_noise() -> None:
    learner = build("maml", Noisy, inner_steps=2)
    own, (task, *_) = learner.init(0), tasks()
    assert fedmeta.noise_key() is None
    theta = learner.theta(own)
    plain = learner.predict(theta, task.query[0])
    expected = (task.query[0] @ theta["body.weight"].T + theta["body.bias"]).tanh() @ theta["head.weight"].T
    assert torch.allclose(plain, expected + theta["head.bias"], atol=1e-6)
    loss = learner.evaluate(theta, task.query)["loss"]
    assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(plain, task.query[1])), abs=1e-6)
    assert float(loss) != float(learner.outer(theta, task.query))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_their_distribution(dtype: torch.dtype) -> None:
    key = noise.noise_keys(0, 1, [f"site-{k}" for k in range(40)])
    uniform, normal = noise.uniform(key, 500, dtype=dtype), noise.normal(key, 500, dtype=dtype)
    assert uniform.dtype == normal.dtype == dtype
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(normal.mean()) == pytest.approx(0, abs=0.03)
    assert float(normal.std()) == pytest.approx(1, abs=0.02)
    assert float(torch.corrcoef(uniform)[0, 1:].abs().max()) < 0.2


def test_an_exact_meta_gradient_of_a_noisy_model_agrees_with_a_finite_difference() -> None:
    found = check(build("maml", Noisy, inner_steps=3), tasks())
    assert any("the meta-gradient agrees with a finite difference" in line for line in found.passed)
    assert found.skipped == []


def test_noise_that_rows_share_is_refused() -> None:
    class SharesNoise(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            key = fedmeta.noise_key()
            z = self.head(self.body(x))
            return z if key is None else z + noise.uniform(key[0], 3, dtype=z.dtype)

    learner = build("maml", SharesNoise)
    with pytest.raises(FedmetaError, match="depend on the other rows"):
        engines.meta_gradients(learner, learner.init(0), tasks())


def test_an_own_problem_draws_noise_by_site_round_and_step() -> None:
    class Jittered(fedmeta.Problem):
        def init(self, seed):
            return {"place": torch.zeros(3)}

        def inner(self, parameters, data):
            key = fedmeta.noise_key()
            shift = 0 if key is None else noise.normal(key, 3, dtype=data.dtype)
            return (parameters["place"] - data + 0.1 * shift).square().mean()

    given = [Task(torch.randn(3), torch.randn(3)) for _ in range(3)]
    learner = build("maml", Jittered(), inner_steps=2)
    own = learner.init(0)
    batch = engines.stack_tasks(learner, given).with_noise(noise.noise_keys(0, 1, ["a", "b", "c"]))
    sums = [engines.meta_gradients(learner, own, batch, engine)[0] for engine in ("loop", "vmap")]
    assert distance(sums[1], sums[0]) < 1e-6
    other = batch.with_noise(noise.noise_keys(0, 2, ["a", "b", "c"]))
    assert distance(engines.meta_gradients(learner, own, other, "loop")[0], sums[0]) > 1e-3


def test_torchs_own_dropout_is_off_and_named() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    found = check(build("maml", model), tasks())
    assert [line for line in found.skipped if "1 (Dropout)" in line and "fedmeta.noise.dropout" in line]


def test_a_share_that_cannot_be_and_rows_in_another_place_are_refused() -> None:
    with pytest.raises(FedmetaError, match="at least 0 and below 1"):
        noise.dropout(torch.ones(2), 1.0)
    with noise.in_objective("inner"), noise.of_rows(torch.randn(5, 4)), pytest.raises(FedmetaError, match="5 rows"):
        noise.dropout(torch.ones(4, 5), 0.5)
