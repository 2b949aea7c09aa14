"""anil, meta-sgd and maml++ send exact gradients of theta and of every learned rate."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner, build
from fedmeta.models import build as build_model
from fedmeta.task import Task

from .reference import (
    Rates,
    State,
    central_differences,
    descend,
    loss,
    make_state,
    make_task,
    padded,
    relative_error,
    theta_of,
)

LR, STEPS, TOLERANCE = 0.3, 3, 1e-6


def small_mlp() -> nn.Module:
    return build_model("mlp", (4,), 3, hidden=(5,), activation="tanh")


def small_cnn() -> nn.Module:
    return build_model("cnn", (4, 4), 3, channels=(2,), kernel=3, dense=3, activation="tanh", norm="group")


MODELS = {"mlp": (small_mlp, (4,)), "cnn": (small_cnn, (4, 4))}


def rates_of(name: str, state: State) -> Rates:
    """The rates as the papers have them: a function of a parameter's name and a step."""
    if name == "meta-sgd":
        return lambda parameter, _: state[f"alpha.{parameter}"]
    if name == "maml++":
        return lambda parameter, step: state[f"alpha.{parameter.rsplit('.', 1)[0]}"][step]
    return lambda *_: LR


def expected(name: str, module: nn.Module, state: State, task: Task, weights: list[float]) -> State:
    """The derivative of sum_k weights[k] L_Q(phi_k) by finite differences."""
    head = [own for own, _ in module.named_parameters()][-2:] if name == "anil" else None

    def objective(meta: State) -> Tensor:
        rates, theta = rates_of(name, meta), theta_of(meta)
        total = torch.zeros((), dtype=torch.float64)
        for steps, weight in enumerate(weights):
            if weight:
                own = descend(lambda p: loss(module, p, task.support), theta, rates, steps, head)
                total = total + weight * loss(module, own, task.query)
        return total

    return central_differences(objective, state)


@pytest.mark.quick("0.0-*-mlp")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", ["anil", "meta-sgd", "maml++"])
@pytest.mark.parametrize("global_weight", [0.0, 0.3])
def test_exact_gradients_against_finite_differences(name: str, model: str, global_weight: float) -> None:
    make, shape = MODELS[model]
    module = make()
    learner = build(name, module, inner_steps=STEPS, inner_lr=LR, global_weight=global_weight)
    state, plain = make_state(learner), make_task(1, shape, 3, support=5, query=4)
    task = Task(padded(plain.support, 2), padded(plain.query, 1))
    weights = [global_weight, 0.0, 0.0, 1 - global_weight]
    theirs = expected(name, module, state, plain, weights)
    for prefix in ("theta.", "alpha."):
        ours = {k: v for k, v in learner.meta_gradient(state, task)[0].items() if k.startswith(prefix)}
        if ours or prefix == "theta.":
            assert relative_error(ours, {k: v for k, v in theirs.items() if k.startswith(prefix)}) < TOLERANCE
    assert any(key.startswith("alpha.") for key in state) == (name != "anil")


@pytest.mark.parametrize("round_number", [1, 10, 30])
def test_the_weighted_query_loss_of_mamlpp_against_finite_differences(round_number: int) -> None:
    module = small_mlp()
    learner = build("maml++", module, inner_steps=STEPS, inner_lr=LR, annealing=0.2, global_weight=0.1)
    state, task = make_state(learner), make_task(2, (4,), 3)
    share = 1 - min(1.0, (round_number - 1) / 20)
    weights = [0.1, *(0.9 * w for w in (share / 3, share / 3, 1 - 2 * share / 3))]
    gradient, metrics = learner.for_round(round_number, 100).meta_gradient(state, task)
    assert relative_error(gradient, expected("maml++", module, state, task, weights)) < TOLERANCE
    own = descend(lambda p: loss(module, p, task.support), theta_of(state), rates_of("maml++", state), STEPS)
    assert float(metrics["query_loss"]) == pytest.approx(float(loss(module, own, task.query)), rel=1e-12)


def step_weights(learner: Learner) -> tuple[float, ...]:
    weights: tuple[float, ...] = learner.step_weights
    return weights


def test_the_annealing_goes_from_all_steps_to_the_last() -> None:
    learner = build("maml++", small_mlp(), inner_steps=4, annealing=0.5)
    path = [step_weights(learner.for_round(number, 10)) for number in range(1, 11)]
    assert path[0] == pytest.approx((0.25,) * 4)
    assert path[5] == path[9] == (0, 0, 0, 1)
    assert all(sum(weights) == pytest.approx(1) for weights in path)
    assert all(later[3] >= sooner[3] for sooner, later in itertools.pairwise(path))
    assert step_weights(build("maml++", small_mlp(), annealing=0.0).for_round(1, 10))[-1] == 1
    assert step_weights(learner.for_round(1, 0))[-1] == 1
    with pytest.raises(FedmetaError, match="2 weights for 5 inner steps"):
        dataclasses.replace(build("maml++", small_mlp()), step_weights=(0.5, 0.5))
    with pytest.raises(FedmetaError, match='no key "step_weights"'):
        build("maml++", small_mlp(), step_weights=(0.5, 0.5))


@pytest.mark.parametrize("name", ["maml", "fedavg", "ditto"])
def test_other_learners_are_the_same_in_every_round(name: str) -> None:
    learner = build(name, small_mlp())
    assert learner.for_round(7, 10) is learner


def test_learned_rates_start_at_inner_lr_in_the_papers_shapes() -> None:
    sgd, plus = (build(name, small_mlp(), inner_steps=4, inner_lr=0.2) for name in ("meta-sgd", "maml++"))
    alphas = {name: value for name, value in sgd.init(0).items() if name.startswith("alpha.")}
    assert {n.removeprefix("alpha."): v.shape for n, v in alphas.items()} == {
        n: v.shape for n, v in sgd.theta(sgd.init(0)).items()
    }
    layers = {name: value for name, value in plus.init(0).items() if name.startswith("alpha.")}
    assert {name: value.tolist() for name, value in layers.items()} == {
        name: pytest.approx([0.2] * 4) for name in ("alpha.1", "alpha.3")
    }
    assert build("maml++", nn.Linear(2, 2)).init(0).keys() == {
        "theta.weight",
        "theta.bias",
        "alpha.weight",
        "alpha.bias",
    }


@pytest.mark.parametrize("name", ["meta-sgd", "maml++"])
def test_rates_at_their_start_are_mamls_and_may_be_negative(name: str) -> None:
    module, task = small_mlp(), make_task(3, (4,), 3)
    learner, maml = (build(each, module, inner_steps=STEPS, inner_lr=LR) for each in (name, "maml"))
    state = {key: value.double() for key, value in learner.init(0).items()}
    ours, theirs = learner.meta_gradient(state, task)[0], maml.meta_gradient(state, task)[0]
    assert relative_error(maml.theta(ours), maml.theta(theirs)) < 1e-6, "alpha is held in float32 at first"
    negative = {key: -value if key.startswith("alpha.") else value for key, value in state.items()}
    uphill = learner.inner(learner.adapt(negative, task.support), task.support)
    assert float(uphill) > float(learner.inner(learner.theta(state), task.support))


def test_mamlpp_continues_at_the_last_rate() -> None:
    module, task = small_mlp(), make_task(4, (4,), 3)
    learner = build("maml++", module, inner_steps=2, inner_lr=LR)
    state = make_state(learner)
    theirs = descend(
        lambda p: loss(module, p, task.support),
        theta_of(state),
        lambda name, step: state[f"alpha.{name.rsplit('.', 1)[0]}"][min(step, 1)],
        5,
    )
    assert relative_error(learner.adapt(state, task.support, 5), theirs) < 1e-12
    assert len(learner.adaptation_path(state, task.support, 1)) == 2


def test_anil_moves_the_head_alone() -> None:
    learner, task = build("anil", small_mlp(), inner_lr=LR), make_task(5, (4,), 3)
    state = make_state(learner)
    theta, own = learner.theta(state), learner.adapt(state, task.support)
    assert {name for name in own if not torch.equal(own[name], theta[name])} == {"3.weight", "3.bias"}
    first = build("anil", small_mlp(), inner_lr=LR, head="1").adapt(state, task.support)
    assert {name for name in own if not torch.equal(first[name], theta[name])} == {"1.weight", "1.bias"}
    with pytest.raises(FedmetaError, match=r'no layer "4" with parameters.*it has: 1, 3'):
        build("anil", small_mlp(), head="4")


def test_anil_on_a_model_that_is_all_head_is_maml() -> None:
    task = make_task(6, (4,), 3)
    for module in (build_model("logistic", (4,), 3), nn.Linear(4, 3)):
        anil, maml = (build(name, module, inner_steps=2, inner_lr=LR) for name in ("anil", "maml"))
        state = make_state(maml)
        assert relative_error(anil.meta_gradient(state, task)[0], maml.meta_gradient(state, task)[0]) == 0
