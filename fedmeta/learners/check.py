"""Whether a problem, a model and a learner are what an exact meta-gradient needs them to be, on a few real tasks.

Checked in float64, once at the start of a run with own code and by `fedmeta check`:

- the same outputs when asked twice, before and after a derivative, and of a row alone and among other rows;
- a meta-gradient with the keys and shapes of the trained meta-state, finite, of at least one site not zero (or, where
  all that a learner trains stays at the site, a personal part that a round changes);
- for learners that send a gradient, its directional derivative against a central finite difference of the objective
  after adaptation: an independent figure, where engines that agree with each other may all be wrong.

What fails is an error that names the reason; what was not verified is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from fedmeta.errors import FedmetaError
from fedmeta.learners.gradient_kind import CUSTOM
from fedmeta.learners.learner import FROZEN, Learner, trained
from fedmeta.learners.message import message
from fedmeta.models.attention import exact_attention
from fedmeta.models.functional import silent_dropout
from fedmeta.problems.function_of_rows import check_model
from fedmeta.problems.problem import has_payload
from fedmeta.problems.solvers import BLACK_BOX
from fedmeta.problems.source import as_dtype
from fedmeta.problems.supervised import Supervised
from fedmeta.task import Task

TOLERANCE = 1e-5
"""How far the derivative may be from the finite difference, relatively."""

SHARE = 3
"""How many rows of each site's support and query the model is tried on."""

DIRECTIONS = 3
"""Along how many directions the derivative is tried: one that is wrong is so in all, a kink lies in few."""

STEP = 1e-5
"""The finite difference's step, relative to the size of the parameters."""

MOST_PARAMETERS = 2_000_000
"""Beyond so many parameters the start of a run skips the check, which a note reports; `fedmeta check` never does."""


Function = Callable[[Mapping[str, Tensor]], Tensor]
"""A scalar function of tensors by name."""

Comparison = tuple[str, Function, Mapping[str, Tensor], Mapping[str, Tensor]]
"""What is compared with a finite difference: its name, the function, where, and its gradient there."""

AGREES, DIFFERS, UNSTABLE = "agrees", "differs", "unstable"


@dataclass
class Checked:
    """What was verified and what was not.

    Attributes:
        passed: What holds, a line each.
        skipped: What was not verified and why.
    """

    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


KEPT = "escaped?"
"""What torch's derivatives raise, as an internal error, for a tensor that outlives the call it was made in."""

_KEPT = (
    "a tensor that depends on the parameters is kept from one call for another, as a cache does: compute it in each "
    "call, or keep what depends on the data alone"
)


def check(learner: Learner, tasks: Sequence[Task], seed: int = 0, straight_through: bool = False) -> Checked:
    """Checks a learner and its problem on a few sites' tasks.

    Args:
        learner: The learner, as the run has it.
        tasks: Tasks of some sites; of the first two whose meta-gradient is neither zero nor infinite it is verified.
        seed: Key of the start and of the direction.
        straight_through: Whether derivatives may differ from finite differences on purpose (straight-through).

    Returns:
        What was verified and what was not.

    Raises:
        FedmetaError: Something does not hold; the message names it.
    """
    found = Checked()
    state = _double(learner.init(seed))
    again = _double(learner.init(seed))
    _same(state, again, "init(seed) returns other parameters when it is called twice with the same seed")
    tasks = [as_dtype(task, torch.float64) for task in tasks]
    with exact_attention():
        if isinstance(learner.problem, Supervised):
            rows = [rows[0][:SHARE] for task in tasks for rows in task if len(rows[0])]
            if rows:
                check_model(learner.problem, learner.theta(state), torch.cat(rows[:SHARE]))
                found.passed.append("a row's outputs depend on that row alone, and are the same whenever asked")
            if layers := silent_dropout(learner.problem.network.module):
                found.skipped.append(
                    f"dropout: off in {', '.join(layers[:3])}, also in training; fedmeta.noise.dropout draws by keys"
                )
        _repeatable(learner, state, tasks[0])
        found.passed.append("init, objectives and metrics are the same when asked twice")
        sent, task = _first_useful(learner, state, tasks, found)
        found.passed.append(f"what sites send has the keys and shapes of the meta-state ({len(sent)} tensors), finite")
        _derivative(learner, state, task, sent, seed, straight_through, found)
        _repeatable(learner, state, tasks[0])
    return found


def _double(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double() if value.is_floating_point() else value for name, value in state.items()}


def _same(one: Any, other: Any, problem: str) -> None:
    first, second = tree_flatten(one)[0], tree_flatten(other)[0]
    if len(first) != len(second) or not all(
        torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(first, second, strict=True)
    ):
        raise FedmetaError(f"check: {problem}: draw everything under the seed that init is given, and change no buffer")


def _call(what: str, function: Any, *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except FedmetaError:
        raise
    except Exception as error:  # whatever a user's own code raises
        text = str(error).splitlines()[0] if str(error) else ""
        raise FedmetaError(
            f"check: {what} failed: {type(error).__name__}: {_KEPT if KEPT in text else text}"
        ) from error


def _repeatable(learner: Learner, state: dict[str, Tensor], task: Task) -> None:
    theta = learner.theta(state)
    kept, random = {name: value.clone() for name, value in theta.items()}, torch.get_rng_state()

    def figures() -> dict[str, Tensor]:
        with torch.no_grad():
            inner = _call("the inner objective", learner.inner, theta, task.support)
            outer = _call("the outer objective", learner.outer, theta, task.query)
            for name, value in (("inner", inner), ("outer", outer)):
                if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
                    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise FedmetaError(
                        f"check: the {name} objective must return one real number as a tensor, not {shape}"
                    )
            return {"inner": inner, "outer": outer, **_call("evaluate", learner.evaluate, theta, task.query)}

    first = figures()
    _same(
        first,
        figures(),
        "an objective or a metric has another value when it is asked twice (noise, dropout or a changed buffer)",
    )
    _same(kept, theta, "an objective or a metric changes parameters that it is given")
    moved = {name: value * 1.01 + 0.001 if value.is_floating_point() else value for name, value in theta.items()}
    with torch.no_grad():
        _same(
            _call("the inner objective", learner.inner, moved, task.support),
            _call("the inner objective", learner.inner, moved, tree_map_only(Tensor, Tensor.clone, task.support)),
            "the inner objective has another value for a copy of the same data (it keeps what depends on parameters)",
        )
    if not torch.equal(random, torch.get_rng_state()):
        raise FedmetaError(
            "check: an objective or a metric draws from torch's random generator, which differs between processes and "
            "engines: draw by fedmeta.noise_key"
        )
    names = {metric.name for metric in learner.problem.metrics}
    missing = sorted(names - first.keys())
    if missing and not isinstance(learner.problem, Supervised):
        raise FedmetaError(f"check: evaluate returns no {', '.join(missing)}, which metrics names")


def _first_useful(
    learner: Learner, state: dict[str, Tensor], tasks: Sequence[Task], found: Checked
) -> tuple[dict[str, Tensor], Task]:
    """Returns what the first site sends whose message is neither zero nor infinite; else the last one's."""
    sent: dict[str, Tensor] = {}
    for task in tasks:
        sent, _ = _call("what a site sends", message, learner, state, task)
        values = list(sent.values())
        if all(bool(v.isfinite().all()) for v in values) and any(bool(v.any()) for v in values):
            break
    name = type(learner).__name__
    for key, value in sent.items():
        if not bool(value.isfinite().all()):
            raise FedmetaError(f"check: {name} sends {key} that is not finite at the start: lower learner.inner_lr")
    if learner.update != "nothing" and not any(bool(value.any()) for value in sent.values()):
        if not _learns_what_stays(learner, state, task):
            raise FedmetaError(
                f"check: {name} sends zeros at every site that was tried, and learns nothing; does the outer objective "
                "depend on the parameters, and is every label known?"
            )
        found.skipped.append(f"what sites send: {name} keeps all that it trains at the site here, and sends zeros")
    return sent, task


def _learns_what_stays(learner: Learner, state: dict[str, Tensor], task: Task) -> bool:
    """Returns whether a round changes a site's personal part, as of a model that is a head alone."""
    own = learner.personal(state)
    kept = _call("a site's round", learner.train, state, task, own)[2] if own else {}
    return any(not torch.equal(value, own[name]) for name, value in kept.items())


def _derivative(
    learner: Learner,
    state: dict[str, Tensor],
    task: Task,
    sent: Mapping[str, Tensor],
    seed: int,
    straight_through: bool,
    found: Checked,
) -> None:
    """Compares directional derivatives with central finite differences."""
    name = type(learner).__name__
    if has_payload(learner.problem):
        found.skipped.append("derivative: the problem sends its own statistics")
        return
    if straight_through:
        found.skipped.append('derivative: runtime.check = "straight-through" lets it differ')
        return
    if learner.problem.solver.kind == BLACK_BOX:
        found.skipped.append("derivative: the solver is a black box")
        return
    exact, own_gradient = _sends_exact(learner)
    comparisons: list[Comparison] = []
    if exact:
        comparisons.append(("the meta-gradient", _meta_objective(learner, state, task), trained(state), sent))
    else:
        found.skipped.append(f"{name} sends no exact gradient: only the inner objective's derivatives were verified")
    if not exact or own_gradient:
        comparisons += _inner_comparisons(learner, state, task, seed)
    for what, objective, values, gradient in comparisons:
        verdict, error = _call(what, _compare, objective, values, gradient, seed)
        if verdict == AGREES:
            found.passed.append(f"{what} agrees with a finite difference to {error:.0e}")
        elif verdict == UNSTABLE:
            found.skipped.append(f"{what}: finite differences of several steps disagree with one another here")
        elif own_gradient and what == "the meta-gradient":
            found.skipped.append(f"{name} sends something else than the gradient of its query loss: unverified")
        else:
            raise FedmetaError(
                f"check: {what} differs from a finite difference by {error:.1e} of it: a derivative in the model, "
                "problem or learner is wrong (weight_norm and once_differentiable functions have no second one); "
                'runtime.check = "straight-through" lets through what differs on purpose'
            )
    learner.problem.known[_verified(learner)] = True


def _sends_exact(learner: Learner) -> tuple[bool, bool]:
    """Returns whether a learner sends the exact meta-gradient, and whether by its own method, which may differ."""
    from fedmeta.learners import Maml
    from fedmeta.learners.maml import Fomaml

    if learner.estimator == "exact":
        return True, False
    derived = learner.estimator == CUSTOM and isinstance(learner, Maml) and not isinstance(learner, Fomaml)
    return derived, derived and type(learner).meta_gradient is not Maml.meta_gradient


def _meta_objective(learner: Learner, state: Mapping[str, Tensor], task: Task) -> Function:
    """Returns the meta-objective as a function of the trained meta-state."""
    constant = {name: value for name, value in state.items() if name.startswith(FROZEN)}

    def objective(values: Mapping[str, Tensor]) -> Tensor:
        whole = {**values, **constant}
        path = learner.adaptation_path(whole, task.support, learner.inner_steps)
        weights = learner.query_weights(whole)
        counted = [(k, w) for k, w in enumerate(weights) if isinstance(w, Tensor) or w]
        return torch.stack([w * learner.outer(path[k], task.query) for k, w in counted]).sum()

    return objective


def _inner_comparisons(learner: Learner, state: Mapping[str, Tensor], task: Task, seed: int) -> list[Comparison]:
    """Returns the inner objective with its gradient and, of learners that may use it, a second derivative."""
    theta = learner.theta(state)
    own = {name: theta[name] for name in learner.problem.moved}
    rest = {name: value for name, value in theta.items() if name not in own}

    def inner(values: Mapping[str, Tensor]) -> Tensor:
        return learner.inner({**rest, **values}, task.support)

    first = _call("the inner objective's gradient", torch.func.grad(inner), own)
    found: list[Comparison] = [("the inner objective's gradient", inner, own, first)]
    if learner.estimator == CUSTOM and learner.differentiates:
        direction = _direction(own, torch.Generator().manual_seed(seed + 2))

        def along(values: Mapping[str, Tensor]) -> Tensor:
            slope = torch.func.grad(inner)(dict(values))
            return torch.stack([(slope[name] * value).sum() for name, value in direction.items()]).sum()

        second = _call("the inner objective's second derivative", torch.func.grad(along), own)
        found.append(("the inner objective's second derivative", along, own, second))
    return found


def _direction(values: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    drawn = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.device) for n, v in values.items()}
    norm = torch.stack([value.square().sum() for value in drawn.values()]).sum().sqrt()
    return {name: value / norm for name, value in drawn.items()}


def _compare(
    objective: Function, values: Mapping[str, Tensor], gradient: Mapping[str, Tensor], seed: int
) -> tuple[str, float]:
    """Returns whether derivatives along some directions agree with finite differences, and to how much of them.

    Of three steps the nearest agreement counts, and of several directions the best: piecewise functions such as ReLU
    have no derivative on a set that small steps and other directions leave.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    reach = float(torch.stack([v.double().square().sum() for v in values.values()]).sum().sqrt()) or 1.0
    verdict, smallest = UNSTABLE, float("inf")
    for _ in range(DIRECTIONS):
        direction = _direction(values, generator)
        along = float(sum((gradient[n].double() * d).sum() for n, d in direction.items()))
        size, estimates = max(abs(along), 1e-6), []
        for step in (STEP * reach, 0.1 * STEP * reach, 0.01 * STEP * reach):
            with torch.no_grad():
                ahead, behind = (
                    float(objective({n: v + side * step * direction[n] for n, v in values.items()})) for side in (1, -1)
                )
            estimates.append((ahead - behind) / (2 * step))
        error = min(abs(each - along) for each in estimates) / size
        smallest = min(smallest, error)
        if error <= TOLERANCE:
            return AGREES, error
        spread = min(abs(one - other) for one, other in pairwise(estimates)) / size
        if spread <= 0.1 * error:
            verdict = DIFFERS
    return verdict, smallest


def needs_verification(learner: Learner) -> bool:
    """Whether a learner's and its problem's derivatives were verified neither here nor by fedmeta's own tests."""
    problem = learner.problem
    built_in = type(learner).__module__.startswith("fedmeta.") and type(problem) is Supervised
    tested = built_in and getattr(learner.network.module, "built_in", False)
    return not tested and _verified(learner) not in problem.known


def verify_derivative(learner: Learner, state: Mapping[str, Tensor], tasks: Sequence[Task]) -> None:
    """Verifies derivatives once on the first task that has one, for a caller that takes no notes.

    Raises:
        FedmetaError: A derivative is wrong, or the learner draws random numbers.
    """
    state = _double(state)
    with exact_attention():
        for task in (as_dtype(task, torch.float64) for task in tasks):
            random = torch.get_rng_state()
            sent, _ = message(learner, state, task)
            if not torch.equal(random, torch.get_rng_state()):
                torch.set_rng_state(random)
                raise FedmetaError(
                    f"learner {type(learner).__name__} draws from torch's random generator, which differs between "
                    "processes and engines: make it a function of meta-state and task"
                )
            values = list(sent.values())
            if all(bool(v.isfinite().all()) for v in values) and any(bool(v.any()) for v in values):
                _derivative(learner, state, task, sent, 0, False, Checked())
                return


def _verified(learner: Learner) -> tuple[str, type[Learner]]:
    return ("derivative", type(learner))
