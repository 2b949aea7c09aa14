"""Frozen layers once for all sites: where a model is cut, and that every engine gives what the loop gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedmeta import engines, noise
from fedmeta.engines import ENGINES, stack_tasks
from fedmeta.engines.frozen_layers import after_frozen_layers
from fedmeta.engines.personal_state import evaluate_personal, stack_personal, train_personal
from fedmeta.learners import LEARNERS, Learner, build, settings_of
from fedmeta.learners.local_steps import with_order
from fedmeta.problems import Supervised
from fedmeta.task import Task
from tests.learners.reference import flat, make_state, make_task

FEATURES, CLASSES = 8, 3


def fix(*layers: nn.Module) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            parameter.requires_grad_(False)


class Skipping(nn.Module):
    """A frozen encoder whose result the trained part takes twice; the head stands before it in the module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, CLASSES)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, FEATURES))
        fix(self.encoder)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return self.head(torch.relu(self.norm(h) + h))


class Adapter(nn.Module):
    """A frozen layer with a trained change of low rank beside it (LoRA: Hu et al. 2022)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.down = nn.Linear(inputs, 2, bias=False)
        self.up = nn.Linear(2, outputs, bias=False)
        fix(self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def adapted() -> nn.Module:
    body = nn.Linear(6, FEATURES)
    fix(body)
    return nn.Sequential(nn.Flatten(), body, nn.Tanh(), Adapter(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def convolutional() -> nn.Module:
    body = nn.Sequential(nn.Unflatten(1, (1, 2)), nn.Conv2d(1, 4, 2), nn.ReLU(), nn.Flatten())
    fix(body)
    return nn.Sequential(body, nn.Linear(8, CLASSES))


def frozen_norm_behind() -> nn.Module:
    first, last = nn.Linear(6, FEATURES), nn.LayerNorm(FEATURES)
    fix(first, last)
    return nn.Sequential(nn.Flatten(), first, nn.Linear(FEATURES, FEATURES), last, nn.Linear(FEATURES, CLASSES))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "skipping": (Skipping, (FEATURES,)),
    "adapter": (adapted, (FEATURES,)),
    "convolutional": (convolutional, (8,)),
    "frozen norm behind": (frozen_norm_behind, (FEATURES,)),
}


def tasks() -> list[Task]:
    return [make_task(seed, (2, 3), CLASSES, support=3 + seed, query=6 - seed) for seed in range(4)]


def learner_of(model: nn.Module, name: str = "maml") -> Learner:
    return build(name, Supervised(model), inner_steps=3)


@pytest.mark.quick("skipping-vmap", "adapter-program", "convolutional-vmap", "frozen norm behind-auto")
@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_cut_behind_its_frozen_layers_and_gives_what_the_loop_gives(model: str, engine: str) -> None:
    make, shape = MODELS[model]
    learner = learner_of(make())
    state = make_state(learner)
    state |= {name: value + 0.1 for name, value in state.items() if name.startswith("frozen.")}  # as it came, not drawn
    reduced, rest, batch = after_frozen_layers(learner, state, stack_tasks(learner, tasks()))
    assert batch.support[0].shape[2:] == shape
    assert reduced.problem.trained == learner.problem.trained
    assert rest.keys() < state.keys()
    expected, *_ = engines.meta_gradients(learner, state, tasks(), "loop", weights=[1, 2, 3, 4])
    found, *_ = engines.meta_gradients(learner, state, tasks(), engine, weights=[1, 2, 3, 4])
    assert found.keys() == expected.keys()
    assert float((flat(found) - flat(expected)).norm()) <= 1e-10 * float(flat(expected).norm())
    scores, theirs = (engines.evaluate(learner, state, tasks(), each) for each in (engine, "loop"))
    assert all(torch.allclose(scores[name].double(), theirs[name].double(), rtol=1e-10) for name in scores)


@pytest.mark.quick("anil", "fedavg")
@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "average"])
def test_every_learner_sends_the_same_behind_frozen_layers(name: str) -> None:
    """Also in mini-batches, whose order of rows is that of the rows themselves."""
    batches = {"batch_size": 3} if "batch_size" in settings_of(LEARNERS[name]) else {}
    learner = build(name, Supervised(Skipping()), **batches)
    state = make_state(learner)
    expected, *_ = engines.meta_gradients(learner, state, tasks(), "loop")
    found, *_ = engines.meta_gradients(learner, state, tasks(), "vmap")
    assert float((flat(found) - flat(expected)).norm()) <= 1e-10 * float(flat(expected).norm())


def test_the_encoder_runs_once_for_all_sites_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(Skipping())
    state = make_state(learner)
    engines.meta_gradients(learner, state, tasks(), "vmap")
    seen: list[int] = []
    real = nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.extend([len(x)] * (weight.shape == (12, 6)))
        return real(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    engines.meta_gradients(learner, state, tasks(), "vmap")
    batch = stack_tasks(learner, tasks())
    assert seen == [4 * batch.support[0].shape[1], 4 * batch.query[0].shape[1]]


class Twice(nn.Module):
    """The trained part takes the rows themselves too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        fix(self.body)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1))) * x.flatten(1).mean(1, keepdim=True)


class Noisy(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(noise.dropout(self.body(x.flatten(1)), 0.5))


class Branching(Twice):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        return self.head(h if len(x) else h + 1)


class OnWeights(nn.Module):
    """Frozen numbers that no row goes through."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)) + self.shift.sum()


@pytest.mark.parametrize("model", [Twice, Noisy, Branching, OnWeights])
def test_a_model_of_another_form_stays_whole(model: Callable[[], nn.Module]) -> None:
    learner = learner_of(model())
    state, batch = make_state(learner), stack_tasks(learner, tasks())
    reduced, _, same = after_frozen_layers(learner, state, batch)
    assert reduced is learner
    assert same is batch


def test_a_problem_with_its_own_objective_sees_the_rows_themselves() -> None:
    class Own(Supervised):
        def inner(self, parameters: dict[str, Tensor], data: tuple[Tensor, ...]) -> Tensor:
            return super().inner(parameters, data) + data[0].mean()

    learner = build("maml", Own(Skipping()))
    state, batch = make_state(learner), stack_tasks(learner, tasks())
    assert after_frozen_layers(learner, state, batch)[0] is learner


@pytest.mark.parametrize("name", ["fedrep", "scaffold"])
def test_what_sites_keep_is_the_same_behind_frozen_layers(name: str) -> None:
    learner = build(name, Supervised(Skipping()), batch_size=3)
    state, plain = make_state(learner), stack_tasks(learner, tasks())
    batch = with_order(learner, plain)
    own = stack_personal(learner, state, [None] * batch.sites)
    own = {key: value + 0.1 for key, value in own.items()}
    total, *_, kept = train_personal(learner, state, batch, torch.ones(4), own)
    for site in range(4):
        one = {key: value[site] for key, value in own.items()}
        sent, _, after = learner.train(state, batch.task(site), one)
        total = {key: value - sent[key] for key, value in total.items()}
        assert all(torch.allclose(kept[key][site], value, rtol=1e-10, atol=1e-12) for key, value in after.items())
    assert float(flat(total).abs().max()) < 1e-12
    scores = evaluate_personal(learner, state, plain, 2, own)
    path = learner.adaptation_path(state, batch.task(1).support, 2, {key: value[1] for key, value in own.items()})
    losses = torch.stack([learner.outer(each, batch.task(1).query) for each in path])
    assert torch.allclose(scores["loss"][1], losses, rtol=1e-10)
