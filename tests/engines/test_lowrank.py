"""The low-rank form against the reference loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmeta import models
from fedmeta.engines import loop, lowrank
from fedmeta.learners import MetaState, build
from fedmeta.learners.maml import Maml
from tests.engines.cases import CLASSES, Transformer, disagreement, distance, state, tasks

LEARNERS = ["maml", "fomaml", "anil", "maml++", "reptile", "fedavg", "fedavg-ft", "local"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BOTH = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])
RAGGED = [(4, 5), (1, 3), (6, 2)]


@pytest.mark.quick("maml-*")
@BOTH
@pytest.mark.parametrize("norm", ["none", "layer", "group"])
@pytest.mark.parametrize("name", LEARNERS)
def test_mlp(name: str, norm: str, dtype: torch.dtype) -> None:
    learner = build(name, models.build("mlp", (20,), CLASSES, hidden=(32, 16), norm=norm), inner_steps=3)
    batch = tasks(RAGGED, (20,), dtype)
    assert lowrank.fits(learner, batch) is None
    assert disagreement(learner, "lowrank", batch, dtype) < TOLERANCE[dtype]


@pytest.mark.quick("maml-*")
@BOTH
@pytest.mark.parametrize("positions", ["parameter", "embedding"])
@pytest.mark.parametrize("name", LEARNERS)
def test_transformer(name: str, positions: str, dtype: torch.dtype) -> None:
    learner = build(name, Transformer(positions), inner_steps=2)
    batch = tasks(RAGGED, (), dtype, tokens=True)
    assert lowrank.fits(learner, batch) is None
    assert disagreement(learner, "lowrank", batch, dtype) < TOLERANCE[dtype]


@pytest.mark.quick("maml-*", "anil-float64")
@BOTH
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "reptile"])
def test_cnn(name: str, dtype: torch.dtype) -> None:
    model = models.build("cnn", (12, 12), CLASSES, channels=(4, 6), dense=64, norm="group")
    learner = build(name, model, inner_steps=2)
    batch = tasks(RAGGED, (12, 12), dtype)
    forms = lowrank.plan_of(learner, batch, state(learner))
    assert ("10.weight" in forms.lowrank) == (name != "anil")
    assert disagreement(learner, "lowrank", batch, dtype) < TOLERANCE[dtype]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4),
    hidden=st.lists(st.integers(1, 12), max_size=3).map(tuple),
    width=st.integers(1, 9),
    steps=st.integers(0, 4),
    lr=st.floats(0.01, 0.5),
    name=st.sampled_from(["maml", "fomaml", "anil", "reptile"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    regression=st.booleans(),
)
def test_any_shape(
    sizes: list[tuple[int, int]],
    hidden: tuple[int, ...],
    width: int,
    steps: int,
    lr: float,
    name: str,
    dtype: torch.dtype,
    regression: bool,
) -> None:
    model = models.build("mlp", (width,), 1 if regression else CLASSES, hidden=hidden, activation="tanh")
    learner = build(name, model, inner_steps=steps, inner_lr=lr)
    batch = tasks(sizes, (width,), dtype, regression=regression)
    # A long way at a high rate can lose digits in float32 by any engine.
    lost = disagreement(learner, "loop", batch, dtype) if dtype == torch.float32 else 0.0
    assert disagreement(learner, "lowrank", batch, dtype) < max(TOLERANCE[dtype], 10 * lost)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    rates=st.lists(st.floats(-0.2, 0.4), min_size=8, max_size=8),
    adapting=st.sets(st.integers(0, 3), min_size=1),
    shared=st.booleans(),
    by_step=st.booleans(),
)
def test_any_learned_rates(rates: list[float], adapting: set[int], shared: bool, by_step: bool) -> None:
    learner = Rated(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, CLASSES)), 3, 0.1, 0.25, adapting, by_step)
    own = {**state(learner), "alpha": torch.tensor(rates[:1] * 8 if shared else rates, dtype=torch.float64)}
    batch, weights = tasks(RAGGED, (6,)), torch.ones(3, dtype=torch.float64)
    assert lowrank.fits(learner, batch, own) is None
    actual = lowrank.meta_gradients(learner, own, batch, weights).total
    expected = loop.meta_gradients(learner, own, batch, weights).total
    assert distance(actual, expected) < 1e-10
    assert distance({"alpha": actual["alpha"]}, {"alpha": expected["alpha"]}) < 1e-8


@dataclass(frozen=True)
class Rated(Maml):
    """A rate for each parameter and, it may be, step, all learned; only some parameters adapt."""

    adapting: set[int] = field(default_factory=set)
    by_step: bool = False

    def init(self, seed: int) -> dict[str, Tensor]:
        return {**super().init(seed), "alpha": torch.full((8,), 0.1)}

    def rates(self, meta_state: MetaState, step: int) -> Mapping[str, Tensor | float]:
        offset = 4 * (step % 2) if self.by_step else 0
        return {
            name: meta_state["alpha"][offset + i] for i, name in enumerate(self.network.names) if i in self.adapting
        }


@pytest.mark.parametrize("name", ["maml", "fomaml"])
def test_global_weight(name: str) -> None:
    model = models.build("mlp", (20,), CLASSES, hidden=(16,))
    learner = build(name, model, inner_steps=2, global_weight=0.3)
    assert disagreement(learner, "lowrank", tasks(RAGGED, (20,)), torch.float64) < 1e-10


def test_query_loss_after_every_step() -> None:
    learner = build("maml++", models.build("mlp", (20,), CLASSES, hidden=(16,)), inner_steps=3).for_round(1, 10)
    assert disagreement(learner, "lowrank", tasks(RAGGED, (20,)), torch.float64) < 1e-10


def test_rows_of_unseen_classes() -> None:
    learner = build("maml", models.build("mlp", (20,), CLASSES, hidden=(16,)), inner_steps=2)
    batch = tasks(RAGGED, (20,))
    batch.support[1][0, :2] = -1
    batch.query[1][2] = -1
    assert disagreement(learner, "lowrank", batch) < 1e-10


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(20, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)),
        nn.Sequential(nn.Linear(20, 20), *[nn.Tanh(), nn.Linear(20, 20)] * 1, nn.RMSNorm(20), nn.Linear(20, CLASSES)),
        nn.Sequential(nn.Unflatten(1, (2, 10)), nn.Conv1d(2, 4, 3, groups=2), nn.Flatten(), nn.Linear(32, CLASSES)),
    ],
    ids=["in place", "rms norm", "grouped convolution"],
)
def test_modules(module: nn.Module) -> None:
    learner = build("maml", module, inner_steps=3)
    batch = tasks(RAGGED, (20,))
    assert lowrank.fits(learner, batch) is None
    assert disagreement(learner, "lowrank", batch) < 1e-10


class Tied(nn.Module):
    """One layer used twice, and a bias used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(20, 20)
        self.other = nn.Linear(20, 20)
        self.other.bias = self.body.bias
        self.head = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(self.body(self.body(x).tanh()).tanh()))


@pytest.mark.parametrize("name", ["maml", "reptile"])
@pytest.mark.parametrize("rows", [2, 40], ids=["low-rank form", "a weight per site"])
def test_shared_parameters(rows: int, name: str) -> None:
    learner = build(name, Tied(), inner_steps=2)
    batch = tasks([(rows, 3), (rows, 4)], (20,))
    assert ("body.weight" in lowrank.plan_of(learner, batch, state(learner)).lowrank) == (rows == 2)
    assert disagreement(learner, "lowrank", batch) < 1e-10
