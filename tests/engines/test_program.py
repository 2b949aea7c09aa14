"""The program engine: the loop's sums for drawn networks, any rates, any number of workers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmeta import engines, models, noise
from fedmeta.engines import loop, program, selection
from fedmeta.engines.lowrank import capture_immediately
from fedmeta.engines.program.chain import chain_of
from fedmeta.engines.program.layers import Convolution, GroupNorm, Layer
from fedmeta.engines.program.pooled import FirstPool, NormReluPool, ReluPool
from fedmeta.engines.program.site import site_gradient
from fedmeta.engines.program.workers import deal, one_thread
from fedmeta.engines.weighted_sum import WeightedSum
from fedmeta.learners import Learner, build
from fedmeta.models import FunctionalModel
from fedmeta.problems import supervised
from fedmeta.task import Batch
from tests.engines.cases import CLASSES, Transformer, distance, figures, state, tasks

RAGGED = [(4, 5), (1, 3), (6, 2)]
WEIGHTS = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def images(*layers: nn.Module, shape: tuple[int, int, int] = (1, 10, 11)) -> nn.Module:
    """Returns layers on images with a head behind them."""
    with torch.no_grad():
        width = nn.Sequential(*layers, nn.Flatten())(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(nn.Unflatten(1, shape), *layers, nn.Flatten(), nn.Linear(width, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.build("mlp", (110,), CLASSES, hidden=(16, 8)),
    "norm": lambda: models.build("mlp", (110,), CLASSES, hidden=(16,), norm="group", activation="tanh"),
    "pools": lambda: images(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.MaxPool2d(2), nn.ReLU()
    ),
    "norms": lambda: images(
        nn.Conv2d(2, 4, (2, 3), padding=(1, 2), bias=False),
        *(nn.GroupNorm(2, 4, eps=1e-3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(), nn.MaxPool2d(2)),
        shape=(2, 5, 11),
    ),
    "strides": lambda: images(
        nn.Conv2d(1, 4, 3, 2, 1, bias=False),
        *(nn.Tanh(), nn.Conv2d(4, 6, 2, 1, 1, groups=2), nn.GroupNorm(1, 6), nn.MaxPool2d(3, 2, 1), nn.ReLU()),
    ),
    "transformer": Transformer,
}


def batch_for(model: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Batch:
    return tasks(RAGGED, () if model == "transformer" else (110,), dtype, seed, tokens=model == "transformer")


def apart(learner: Learner, batch: Batch, own: dict[str, Tensor] | None = None) -> tuple[float, WeightedSum]:
    """Returns how far the engine is from the loop, in gradient and losses, and what it computed."""
    own = state(learner) if own is None else own
    expected = loop.meta_gradients(learner, own, batch, WEIGHTS[: batch.sites])
    found = program.meta_gradients(learner, own, batch, WEIGHTS[: batch.sites])
    assert found.weight == expected.weight
    return max(distance(found.total, expected.total), distance(figures(found), figures(expected))), found


@pytest.mark.quick("mlp-maml", "mlp-meta-sgd", "pools-maml")
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "maml++", "meta-sgd"])
@pytest.mark.parametrize("model", MODELS)
def test_sums_are_the_loops_and_recordings_have_the_same_bits(model: str, name: str) -> None:
    learner = build(name, MODELS[model](), inner_steps=2, inner_lr=0.1)
    assert (chain_of(learner.network) is None) == (model == "transformer")
    generator, own = torch.Generator().manual_seed(0), state(learner)
    if name == "meta-sgd":
        own = {key: value * (1 + 0.3 * torch.randn(value.shape, generator=generator)) for key, value in own.items()}
    off, computed = apart(learner, batch_for(model), own)
    assert off < 1e-10
    with capture_immediately():
        program.meta_gradients(learner, own, batch_for(model, seed=1), WEIGHTS)
    replayed = program.meta_gradients(learner, own, batch_for(model), WEIGHTS)
    assert all(torch.equal(value, computed.total[key]) for key, value in replayed.total.items())


def test_norms_relu_and_pools_are_one_layer() -> None:
    def kinds(model: str) -> list[type[Layer]]:
        chain = chain_of(FunctionalModel(MODELS[model]))
        assert chain is not None
        return [type(layer) for layer in chain.layers]

    assert kinds("norms")[:2] == [FirstPool, Convolution]
    assert kinds("norms")[2] is NormReluPool
    assert kinds("pools")[:3] == [FirstPool, Convolution, ReluPool]
    assert GroupNorm in kinds("strides")


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Draws a convolutional network on images of up to two channels."""
    shape = draw(st.sampled_from([(1, 10, 11), (2, 5, 11), (1, 11, 10), (2, 11, 5)]))
    layers: list[nn.Module] = []
    channels, size = shape[0], shape[1:]
    for _ in range(draw(st.integers(1, 3))):
        kernel, padding = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(0, 2)] * 2))
        padding = (min(padding[0], kernel[0]), min(padding[1], kernel[1]))
        stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)]))
        groups = draw(st.sampled_from([1, channels]))
        after = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, padding, kernel, stride, strict=True)]
        if min(after) < 2:
            break
        outputs = groups * draw(st.integers(1, 3))
        bias = draw(st.booleans())
        layers.append(nn.Conv2d(channels, outputs, kernel, stride, padding, groups=groups, bias=bias))
        channels, size = outputs, (after[0], after[1])
        if draw(st.booleans()):
            layers.append(nn.GroupNorm(draw(st.sampled_from([1, channels])), channels, eps=1e-2))
        own = [draw(st.sampled_from([nn.ReLU(), nn.ReLU(), nn.Tanh()]))]
        if draw(st.booleans()):
            pool = draw(st.sampled_from([nn.MaxPool2d(2), nn.MaxPool2d(2, 1), nn.MaxPool2d(2, 2, 1, ceil_mode=True)]))
            own = draw(st.sampled_from([[*own, pool], [pool, *own]]))
            with torch.no_grad():
                size = tuple(pool(torch.zeros(1, 1, *size)).shape[2:])
        layers += own
    return images(*layers, shape=shape)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(model=networks(), name=st.sampled_from(["maml", "meta-sgd"]), steps=st.integers(1, 3), blank=st.booleans())
def test_drawn_convolutional_networks(model: nn.Module, name: str, steps: int, blank: bool) -> None:
    learner, batch = build(name, model, inner_steps=steps, inner_lr=0.2), batch_for("drawn")
    assert chain_of(learner.network) is not None
    if blank:  # backgrounds and strokes of one gray: many numbers under a pool are the same
        batch = batch.map(lambda rows: ((rows[0] > 1).double(), *rows[1:]))
    assert apart(learner, batch)[0] < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pools", "norms"])
def test_single_precision(model: str) -> None:
    learner = build("maml", MODELS[model](), inner_steps=2, inner_lr=0.1)
    own, batch = state(learner, torch.float32), batch_for(model, torch.float32)
    found = program.meta_gradients(learner, own, batch, WEIGHTS)
    double = {key: value.double() for key, value in own.items()}
    exact = loop.meta_gradients(learner, double, batch.map(lambda rows: (rows[0].double(), *rows[1:])), WEIGHTS)
    assert distance(found.total, exact.total) < 1e-5


@pytest.mark.slow
def test_conv4_has_the_derivative_of_a_finite_difference() -> None:
    learner = build("maml", models.build("conv4", (28, 28), CLASSES, filters=8), inner_steps=2, inner_lr=0.05)
    assert chain_of(learner.network) is not None
    own, batch = state(learner), tasks([(5, 10)], (28, 28))
    gradient = program.meta_gradients(learner, own, batch, WEIGHTS[:1]).total
    generator = torch.Generator().manual_seed(0)
    along = {key: torch.randn(value.shape, generator=generator, dtype=value.dtype) for key, value in own.items()}

    def loss(size: float) -> float:
        moved = {key: value + size * along[key] for key, value in own.items()}
        return float(program.meta_gradients(learner, moved, batch, WEIGHTS[:1]).metrics["query_loss"][0])

    slope = sum(float((gradient[key] * along[key]).sum()) for key in own)
    assert (loss(1e-6) - loss(-1e-6)) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.quick("maml-mlp")
@pytest.mark.parametrize("model", ["mlp", "norms", "transformer"])
@pytest.mark.parametrize("name", ["maml", "maml++", "meta-sgd"])
def test_steps_that_are_computed_again_change_nothing(name: str, model: str) -> None:
    learner, batch = build(name, MODELS[model](), inner_steps=4), batch_for(model)
    model_ = program.engine._model(learner.network)
    support, query = (tuple(tensor[0] for tensor in rows) for rows in batch)
    whole, again = (
        site_gradient(learner, model_, state(learner), support, query, recompute) for recompute in (False, True)
    )
    assert distance(again[0], whole[0]) < 1e-12
    assert torch.equal(again[1], whole[1])


@pytest.mark.slow
def test_many_steps_are_those_of_the_loop() -> None:
    learner = build("meta-sgd", MODELS["mlp"](), inner_steps=program.engine.KEPT_STEPS + 1)
    assert apart(learner, batch_for("mlp"))[0] < 1e-10


MEMORY = """
import resource
import torch
from fedmeta import models
from fedmeta.engines import program
from fedmeta.learners import build
from tests.engines.cases import tasks
torch.set_num_threads(1)
learner = build("maml", models.build("conv4", (28, 28), 5), inner_steps=100, inner_lr=0.01)
state, batch = learner.init(0), tasks([(5, 75)], (28, 28), torch.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = program.meta_gradients(learner, state, batch, torch.ones(1, dtype=torch.float64))
assert found.weight == 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_hundred_steps_on_conv4_take_less_than_a_gibibyte() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) < 1 << 20  # KiB


@pytest.mark.parametrize("target", ["numbers", "unseen classes"])
def test_other_labels(target: str) -> None:
    learner = build("maml", models.build("mlp", (20,), 1 if target == "numbers" else CLASSES, hidden=(8,)))
    batch = tasks(RAGGED, (20,), regression=target == "numbers")
    if target == "unseen classes":
        batch.support[1][:, 0], batch.query[1][:, 1] = -1, -1
    assert apart(learner, batch)[0] < 1e-10


@pytest.mark.quick("mlp")
@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_the_number_of_workers_changes_no_bit(model: str) -> None:
    sizes = [(4, 5), (1, 3), (6, 2)] * 12
    batch = tasks(sizes, () if model == "transformer" else (110,), torch.float32, tokens=model == "transformer")
    found = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        learner = build("maml", MODELS[model](), inner_steps=1)
        torch.set_num_threads(threads)
        try:
            for _ in range(2):  # computed, then replayed
                gradient, _, metrics = engines.meta_gradients(learner, state(learner, torch.float32), batch, "program")
                found.append({**gradient, **metrics})
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(value, found[0][key]) for each in found[1:] for key, value in each.items())


def test_what_workers_return_is_in_order_and_what_they_raise_arrives() -> None:
    torch.set_num_threads(2)
    try:
        with one_thread() as workers:
            assert workers == 2
            assert deal(lambda item: (item, torch.get_num_threads()), range(20), workers) == [(k, 1) for k in range(20)]
            with pytest.raises(ZeroDivisionError):
                deal(lambda item: 1 // item, [1, 0], workers)
    finally:
        torch.set_num_threads(1)


class Noisy(nn.Sequential):
    """A layer behind noise."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(noise.dropout(x, 0.1))


class Doubled(supervised.Supervised):
    """Another loss."""

    def inner(self, parameters: dict[str, Tensor], data: object) -> Tensor:
        return 2 * super().inner(parameters, data)


def test_what_it_does_not_compute_it_leaves_to_others() -> None:
    batch = tasks(RAGGED, (20,))
    mlp = models.build("mlp", (20,), CLASSES, hidden=(8,))
    own = build("maml", Doubled(mlp))
    assert program.fits(own, batch) == "its objectives are not those of supervised learning"
    assert program.fits(build("reptile", mlp), batch) == "what Reptile sends is no derivative of a query loss"
    noisy = build("maml", Noisy(nn.Linear(20, CLASSES)))
    assert program.fits(noisy, batch) == "the model draws noise"
    assert program.fits(build("maml", mlp), replace(batch, support=tuple(each.to("meta") for each in batch.support)))
    for learner in (own, build("reptile", mlp), noisy):
        expected = engines.meta_gradients(learner, state(learner), batch, "loop")[0]
        assert distance(engines.meta_gradients(learner, state(learner), batch, "program")[0], expected) < 1e-10


@pytest.mark.parametrize("name", ["meta-sgd", "maml"])
def test_auto_takes_it_for_rates_per_element(name: str) -> None:
    learner, batch = build(name, models.build("mlp", (20,), CLASSES, hidden=(8,))), tasks(RAGGED, (20,))
    assert engines.choose_engine(learner, batch) == {"meta-sgd": "program", "maml": "lowrank"}[name]


@pytest.mark.parametrize("model", ["attention", "mlp"])
def test_attention_is_timed_and_linear_layers_are_not(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "SMALL", 0)
    own = Transformer("none", width=32) if model == "attention" else MODELS["mlp"]()
    learner = build("maml", own, inner_steps=1)
    batch = tasks(RAGGED, () if model == "attention" else (110,), tokens=model == "attention")
    assert selection.needs_autotuning(learner, batch, state(learner)) == (model == "attention")


class Recurrent(nn.Module):
    """A recurrent layer, whose derivative torch does not take back in a recording."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 3, batch_first=True), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 4, 5))[0][:, -1])


def test_a_recording_that_does_not_run_is_none() -> None:
    learner, batch = build("fomaml", Recurrent(), inner_steps=1), tasks(RAGGED, (20,), torch.float32)
    own = state(learner, torch.float32)
    expected = engines.meta_gradients(learner, own, batch, "loop")[0]
    with capture_immediately():
        for _ in range(2):
            found = program.meta_gradients(learner, own, batch, torch.ones(3, dtype=torch.float64))
    assert distance(found.total, expected) < 1e-5
