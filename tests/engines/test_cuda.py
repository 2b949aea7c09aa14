"""The engines on a GPU, where there is one, against the reference loop on the processor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fedmeta
from clients.app import memory_budget
from fedmeta import engines, models
from fedmeta.engines import lowrank
from fedmeta.engines.lowrank.capture import WARMUP_CALLS
from fedmeta.engines.selection import ENGINES
from fedmeta.experiment import Experiment
from fedmeta.learners import build
from tests.engines.cases import CLASSES, Transformer, distance, state, tasks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

RAGGED = [(4, 5), (1, 3), (6, 2), (3, 3)]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.build("mlp", (20,), CLASSES, hidden=(32, 16), activation="tanh"),
    "norms": lambda: models.build("mlp", (20,), CLASSES, hidden=(32,), norm="group", activation="tanh"),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 5)), models.build("cnn", (4, 5), CLASSES, channels=(4, 4), dense=8)
    ),
    "transformer": lambda: Transformer("parameter"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "maml++", "meta-sgd", "fedavg", "reptile", "local"])
@pytest.mark.parametrize("model", MODELS)
def test_sums_and_scores_are_those_of_the_processor(model: str, name: str, engine: str) -> None:
    learner = build(name, MODELS[model](), inner_steps=2)
    batch = tasks(RAGGED, () if model == "transformer" else (20,), tokens=model == "transformer")
    own, weights = state(learner), [1.0, 2.0, 0.5, 1.0]
    expected = engines.meta_gradients(learner, own, batch, "loop", weights=weights)
    scores = engines.evaluate(learner, own, batch, "loop")
    there = {key: value.cuda() for key, value in own.items()}
    if engine == "lowrank" and lowrank.fits(learner, batch.to("cuda"), there):
        pytest.skip("the low-rank form does not fit")
    for _ in range(WARMUP_CALLS + 1 if engine == "lowrank" else 1):
        gradient, weight, figures = engines.meta_gradients(learner, there, batch.to("cuda"), engine, weights=weights)
    assert all(value.is_cuda for value in gradient.values())
    assert distance({key: value.cpu() for key, value in gradient.items()}, expected[0]) < 1e-10
    assert weight == expected[1]
    assert distance({key: value.cpu() for key, value in figures.items()}, expected[2]) < 1e-10
    for name, one in engines.evaluate(learner, there, batch.to("cuda"), engine).items():
        other = scores[name]
        torch.testing.assert_close(one.cpu().double(), other.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_clipped_sums_and_sites_that_are_not_finite(engine: str) -> None:
    learner, batch = build("maml", MODELS["mlp"](), inner_steps=2), tasks(RAGGED, (20,))
    batch.query[0][1, 0, 0] = torch.nan
    own = state(learner)
    expected = engines.meta_gradients(learner, own, batch, "loop", clip_norm=0.1)
    there = {key: value.cuda() for key, value in own.items()}
    found = engines.meta_gradients(learner, there, batch.to("cuda"), engine, clip_norm=0.1)
    assert found[2]["finite"].tolist() == [1, 0, 1, 1]
    assert distance({key: value.cpu() for key, value in found[0].items()}, expected[0]) < 1e-8


@pytest.mark.parametrize("name", ["fedavg-ft", "meta-sgd", "fedrep"])
def test_a_run_ends_where_it_does_on_the_processor(name: str, tmp_path: Path) -> None:
    def run(device: str) -> dict[str, Tensor]:
        text = f"""
            [data]
            source = "digits"
            [learner]
            name = "{name}"
            [server]
            rounds = 12
            sites_per_round = 8
            [evaluation]
            every = 0
            gate = true
            schedule = "auto"
            [tracking]
            uri = "none"
            folder = "{tmp_path / device}"
            [runtime]
            device = "{device}"
        """
        return fedmeta.run(Experiment.from_toml(text, origin="test")).meta_state

    assert distance(run("cuda"), run("cpu")) < 1e-5


def test_a_cohort_may_take_a_share_of_the_gpu() -> None:
    assert memory_budget(0, "cuda") >= torch.cuda.mem_get_info()[0] // 32
    assert memory_budget(2, "cuda") == 2 << 30
