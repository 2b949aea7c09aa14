"""The span form against the reference loop."""

from __future__ import annotations

import pytest
import torch

from fedmeta import models
from fedmeta.cohort import span
from fedmeta.learners import build
from tests.cohort.cases import CLASSES, Transformer, disagreement, state, tasks

LEARNERS = ["maml", "fomaml", "anil", "maml++", "reptile", "fedavg", "fedavg-ft", "local"]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
BOTH = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "float64"])
RAGGED = [(4, 5), (1, 3), (6, 2)]


@BOTH
@pytest.mark.parametrize("norm", ["none", "layer", "group"])
@pytest.mark.parametrize("name", LEARNERS)
def test_mlp(name: str, norm: str, dtype: torch.dtype) -> None:
    learner = build(name, models.build("mlp", (20,), CLASSES, hidden=(32, 16), norm=norm), inner_steps=3)
    batch = tasks(RAGGED, (20,), dtype)
    assert span.fits(learner, batch) is None
    assert disagreement(learner, "span", batch, dtype) < TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize("positions", ["parameter", "embedding"])
@pytest.mark.parametrize("name", LEARNERS)
def test_transformer(name: str, positions: str, dtype: torch.dtype) -> None:
    learner = build(name, Transformer(positions), inner_steps=2)
    batch = tasks(RAGGED, (), dtype, tokens=True)
    assert span.fits(learner, batch) is None
    assert disagreement(learner, "span", batch, dtype) < TOLERANCE[dtype]


@BOTH
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "reptile"])
def test_cnn(name: str, dtype: torch.dtype) -> None:
    model = models.build("cnn", (12, 12), CLASSES, channels=(4, 6), dense=64, norm="group")
    learner = build(name, model, inner_steps=2)
    batch = tasks(RAGGED, (12, 12), dtype)
    forms = span.forms_of(learner, batch, state(learner))
    assert ("10.weight" in forms.spans) == (name != "anil")
    assert disagreement(learner, "span", batch, dtype) < TOLERANCE[dtype]
