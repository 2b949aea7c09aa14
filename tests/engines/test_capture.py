"""Recordings: the same bits as the computation itself, or none at all."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from fedmeta import engines, models
from fedmeta.engines import lowrank, selection
from fedmeta.engines.lowrank import capture
from fedmeta.engines.lowrank.capture import CACHE_SIZE, WARMUP_CALLS, UnrecordableError, capture_graph, run_captured
from fedmeta.engines.lowrank.flat_batch import adjacent, concatenate
from fedmeta.learners import build
from fedmeta.models import FunctionalModel
from fedmeta.task import Batch
from tests.engines.cases import CLASSES, Transformer, state, tasks

RAGGED = [(4, 5), (1, 3), (6, 2)]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.build("mlp", (20,), CLASSES, hidden=(32, 16)),
    "norms": lambda: models.build("mlp", (20,), CLASSES, hidden=(32,), norm="group"),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 5)), models.build("cnn", (4, 5), CLASSES, channels=(4, 4), dense=16)
    ),
    "in place": lambda: nn.Sequential(nn.Linear(20, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES)),
    "transformer": Transformer,
}


def known(network: FunctionalModel) -> list[object]:
    return list(capture._known[network].values())


@pytest.mark.quick("mlp-maml-*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "maml++", "local"])
@pytest.mark.parametrize("model", MODELS)
def test_a_replay_gives_the_same_bits_on_other_numbers(model: str, name: str, dtype: torch.dtype) -> None:
    learner = build(name, MODELS[model](), inner_steps=2)
    own = state(learner, dtype)

    def batch(seed: int) -> Batch:
        return tasks(RAGGED, () if model == "transformer" else (20,), dtype, seed, tokens=model == "transformer")

    for _ in range(WARMUP_CALLS):
        engines.meta_gradients(learner, own, batch(0), "lowrank")
    assert all(callable(found) for found in known(learner.network))
    own = {name: value * 1.5 for name, value in own.items()}
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    expected, losses = lowrank.engine._weighted_sum(learner, own, batch(1), weights)
    gradient, _, figures = engines.meta_gradients(learner, own, batch(1), "lowrank", weights=weights)
    assert all(torch.equal(gradient[name], expected[name]) for name in own)
    assert torch.equal(figures["query_loss"], losses.double())


@pytest.mark.slow
def test_what_a_learner_is_set_to_belongs_to_its_recordings() -> None:
    network = FunctionalModel(MODELS["mlp"])
    batch = tasks(RAGGED, (20,))
    for lr in (0.1, 0.2):
        learner = build("maml", network, inner_steps=2, inner_lr=lr)
        expected = engines.meta_gradients(learner, state(learner), batch, "loop")[0]
        for _ in range(WARMUP_CALLS + 1):
            gradient = engines.meta_gradients(learner, state(learner), batch, "lowrank")[0]
        for name, value in expected.items():
            torch.testing.assert_close(gradient[name], value)
    assert len(known(network)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("sites", [[0], [1], [0, 2]])
def test_sites_that_are_not_finite_are_found_in_replays_too(sites: list[int]) -> None:
    learner = build("maml", MODELS["mlp"](), inner_steps=2)
    own, batch = state(learner), tasks(RAGGED, (20,))
    for _ in range(WARMUP_CALLS):
        engines.meta_gradients(learner, own, batch, "lowrank")
    batch.support[0][sites, 0, 0] = torch.nan
    expected = engines.meta_gradients(learner, own, batch, "loop")
    gradient, weight, figures = engines.meta_gradients(learner, own, batch, "lowrank")
    assert weight == expected[1] == 3 - len(sites)
    assert figures["finite"].tolist() == [site not in sites for site in range(3)]
    for name, value in expected[0].items():
        torch.testing.assert_close(gradient[name], value)


@pytest.mark.quick("maml")
@pytest.mark.parametrize("name", ["fedavg", "reptile", "maml", "fomaml", "anil"])
def test_rows_that_lie_beside_each_other_change_nothing(name: str) -> None:
    stacked = tasks(RAGGED, (20,))
    assert adjacent(*stacked)
    apart = Batch(*(tuple(each.clone(memory_format=torch.contiguous_format) for each in rows) for rows in stacked))
    assert not adjacent(*apart)
    first, end = apart.support[2].shape[1], apart.support[2].shape[1] + apart.query[2].shape[1]
    whole = [torch.cat([own, query, query], 1) for own, query in zip(*apart, strict=True)]
    joined = Batch(tuple(each[:, :first] for each in whole), tuple(each[:, first:end] for each in whole))
    assert adjacent(*joined)
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(concatenate(*joined), whole, strict=True))
    # Laid out alike, but with other rows between: a recording for the joined rows must not serve it.
    between = [torch.cat([own, query * 0, query], 1) for own, query in zip(*apart, strict=True)]
    parted = Batch(tuple(each[:, :first] for each in between), tuple(each[:, end:] for each in between))
    assert not adjacent(*parted)
    assert [each.stride() for each in parted.query] == [each.stride() for each in joined.query]
    learner = build(name, MODELS["mlp"](), inner_steps=2)
    own = state(learner, torch.float32)
    for _ in range(WARMUP_CALLS + 1):
        found = [engines.meta_gradients(learner, own, batch, "lowrank") for batch in (apart, parted, joined)]
    for gradient, _, figures in found[1:]:
        assert all(torch.equal(gradient[key], found[0][0][key]) for key in own)
        assert torch.equal(figures["query_loss"], found[0][2]["query_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_replays_run_without_python_and_give_the_same_bits_with_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build("maml", MODELS[model](), inner_steps=2)
    batch = tasks(RAGGED, () if model == "transformer" else (20,), torch.float32, tokens=model == "transformer")
    own, made, without_python = state(learner, torch.float32), [], capture._without_python

    def seen(lines: fx.GraphModule, inputs: Any) -> Any:
        made.append(lines)
        return without_python(lines, inputs)

    def replay() -> list[Tensor]:
        for _ in range(WARMUP_CALLS + 1):
            gradient = engines.meta_gradients(learner, own, batch, "lowrank")[0]
        return list(gradient.values())

    monkeypatch.setattr(capture, "_without_python", seen)
    replay()
    monkeypatch.setattr(made[0], "forward", None)
    found = replay()
    capture._known[learner.network].clear()
    monkeypatch.setattr(torch.jit, "trace", None)
    expected = replay()
    assert len(made) == 2
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.slow
def test_a_trial_times_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, batch = build("maml", Transformer(), inner_steps=1), tasks([(3, 2)] * 2, (4,), tokens=True)
    own, replays = state(learner, torch.float32), []
    monkeypatch.setattr(selection, "SMALL", 0)
    assert selection.needs_autotuning(learner, batch, own)
    faithful = capture._verified

    def counted(*arguments: Any) -> Any:
        replay = faithful(*arguments)
        assert replay is not None
        return lambda *inputs: (replays.append(1), replay(*inputs))[1]

    monkeypatch.setattr(capture, "_verified", counted)
    _, figures = engines.trial(learner, own, batch)
    assert "lowrank" in figures
    assert replays


def test_old_recordings_make_room() -> None:
    network = FunctionalModel(nn.Linear(2, 2))
    for key in range(CACHE_SIZE + 5):
        for _ in range(WARMUP_CALLS):
            run_captured(network, key, lambda x: [x.exp() + x.exp()], [torch.ones(3)])
    assert len(known(network)) == CACHE_SIZE
    assert all(callable(found) for found in known(network))


def test_what_cannot_be_a_key_is_computed() -> None:
    network = FunctionalModel(nn.Linear(2, 2))
    for _ in range(WARMUP_CALLS + 1):
        assert run_captured(network, [], lambda x: [x + 1], [torch.ones(3)])[0].tolist() == [2, 2, 2]


def test_what_differs_from_time_to_time_is_computed_each_time() -> None:
    network, times = FunctionalModel(nn.Linear(2, 2)), []

    def compute(x: Tensor) -> list[Tensor]:
        times.append(1)
        return [x * len(times)]

    for number in range(1, WARMUP_CALLS + 1):
        assert float(run_captured(network, "", compute, [torch.ones(())])[0]) == number
    assert known(network) == [None]
    run_captured(network, "", compute, [torch.ones(())])
    assert float(run_captured(network, "", compute, [torch.ones(())])[0]) == len(times)


def test_a_buffer_is_read_anew_in_each_replay() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("offset", torch.ones(2))
    replay = capture_graph(lambda x: [x + module.offset], [torch.ones(2)], module.buffers())
    module.offset.fill_(5)
    assert replay(torch.ones(2))[0].tolist() == [6, 6]


def test_what_is_written_in_place_is_so_in_a_replay() -> None:
    def compute(x: Tensor) -> list[Tensor]:
        y = x.exp()
        first = y.sum()
        y.mul_(2)
        return [first, y.sum(), y]

    x = torch.tensor([0.5, 1.5])
    replay = capture_graph(compute, [torch.zeros(2)])
    assert all(torch.equal(one, other) for one, other in zip(replay(x), compute(x), strict=True))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: [x + torch.rand(2)],
        lambda x: [x if bool(x.sum() > 0) else -x],
        lambda x: [x * x.sum().item()],
        lambda x: [x + torch.tensor([1.0, 2.0])],
        lambda x: [x.add_(1)],
        lambda x: [x.exp() + x.exp().mul_(2)],
    ],
    ids=["random numbers", "a branch", "a value", "a tensor from elsewhere", "an input", "one line for two"],
)
def test_what_depends_on_more_than_its_inputs_is_not_recorded(compute: Callable[[Tensor], list[Tensor]]) -> None:
    with pytest.raises(UnrecordableError):
        capture_graph(compute, [torch.ones(2)])


@pytest.mark.slow
def test_a_computation_without_end_is_not_recorded() -> None:
    def compute(x: Tensor) -> list[Tensor]:
        for number in range(capture.MAX_OPS + 2):
            x = x + number
        return [x]

    with pytest.raises(UnrecordableError, match="so long"):
        capture_graph(compute, [torch.ones(2)])


DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "convolution": lambda x, weight: nn.functional.conv2d(x, weight.view(2, 3, 2, 2), stride=2, padding=1),
    "layer norm": lambda x, weight: nn.functional.layer_norm(x, (4, 4), weight[:16].view(4, 4)),
    "group norm": lambda x, weight: nn.functional.group_norm(x, 3, weight[:3], weight[3:6]),
}


@pytest.mark.quick("convolution-*")
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_with_truth_values_run_as_torchscript(
    name: str, wanted: tuple[bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    def compute(x: Tensor, weight: Tensor) -> list[Tensor]:
        leaves = [value.detach().requires_grad_(wants) for value, wants in zip((x, weight), wanted, strict=True)]
        learned = [leaf for leaf in leaves if leaf.requires_grad]
        return list(torch.autograd.grad(DERIVATIVES[name](*leaves).sin().sum(), learned))

    generator = torch.Generator().manual_seed(0)
    first, second = (
        (torch.randn(5, 3, 4, 4, generator=generator), torch.randn(24, generator=generator)) for _ in range(2)
    )
    with caplog.at_level("INFO", "fedmeta.engines"):
        replay = capture_graph(compute, first)
    assert "run as TorchScript" in caplog.text
    # A trace refers to the functions that it calls; once they are gone it would read what lies there instead.
    gc.collect()
    others = [torch.jit.CompilationUnit(f"def f(a: Tensor):\n    return a * {k}\n").f for k in range(3)]
    assert len(others) == 3
    assert all(torch.equal(one, other) for one, other in zip(replay(*second), compute(*second), strict=True))


def test_what_torchscript_refuses_runs_as_a_list_and_the_log_has_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.jit, "trace", None)
    with caplog.at_level("INFO", "fedmeta.engines"):
        replay = capture_graph(lambda x: [x.exp()], [torch.zeros(2)])
    assert "run as a list in Python: TorchScript refuses: TypeError: 'NoneType' object is not callable" in caplog.text
    assert replay(torch.zeros(2))[0].tolist() == [1, 1]
