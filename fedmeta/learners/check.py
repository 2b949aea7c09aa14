"""Whether a problem, a model and a learner are what an exact meta-gradient needs them to be, on a few real tasks.

Checked in float64, once at the start of a run with own code and by `fedmeta check`:

- the same outputs when asked twice, before and after a derivative, and of a row alone and among other rows;
- a meta-gradient with the keys and shapes of the trained meta-state, finite, of at least one site not zero;
- for learners that send a gradient, its directional derivative against a central finite difference of the objective
after
  adaptation: an independent figure, where engines that agree with each other may all be wrong.

What fails is an error that names the reason; what was not verified is listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner, trained
from fedmeta.problems.problem import has_payload
from fedmeta.problems.solvers import BLACK_BOX
from fedmeta.problems.source import as_dtype
from fedmeta.problems.supervised import Supervised
from fedmeta.task import Task

TOLERANCE = 1e-6
"""How far the derivative may be from the finite difference, relatively."""

STEP = 1e-5
"""The finite difference's step, relative to the size of the parameters."""

MOST_PARAMETERS = 2_000_000
"""Beyond so many parameters the start of a run skips the check, which a note says; `fedmeta check` never does."""


@dataclass
class Checked:
    """What was verified and what was not.

    Attributes:
        passed: What holds, a line each.
        skipped: What was not verified and why.
    """

    passed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


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
        FedmetaError: Something does not hold; says what.
    """
    found = Checked()
    state = _double(learner.init(seed))
    again = _double(learner.init(seed))
    _same(state, again, "init(seed) returns other parameters when it is called twice with the same seed")
    tasks = [as_dtype(task, torch.float64) for task in tasks]
    with sdpa_kernel(SDPBackend.MATH):
        _repeatable(learner, state, tasks[0])
        found.passed.append("init, objectives and metrics are the same when asked twice")
        if isinstance(learner.problem, Supervised):
            _row_by_row(learner, state, tasks[0])
            found.passed.append("a row's outputs do not depend on other rows")
        sent, task = _first_useful(learner, state, tasks)
        template = learner.message_template(state)
        _keys(learner, sent, template)
        found.passed.append(
            f"what sites send has the keys and shapes of the meta-state ({len(template)} tensors), finite"
        )
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
        raise FedmetaError(
            f"check: {what} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _repeatable(learner: Learner, state: dict[str, Tensor], task: Task) -> None:
    theta = learner.theta(state)

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
    names = {metric.name for metric in learner.problem.metrics}
    missing = sorted(names - first.keys())
    if missing and not isinstance(learner.problem, Supervised):
        raise FedmetaError(f"check: evaluate returns no {', '.join(missing)}, which metrics names")


def _row_by_row(learner: Learner, state: dict[str, Tensor], task: Task) -> None:
    theta = learner.theta(state)
    x = task.query[0][:4]
    if not len(x):
        return
    with torch.no_grad():
        together = _call("the model", learner.predict, theta, x)
        alone = torch.cat([_call("the model", learner.predict, theta, x[k : k + 1]) for k in range(len(x))])
    if together.shape != alone.shape or not torch.allclose(together, alone, rtol=1e-9, atol=1e-9):
        raise FedmetaError(
            "check: the model's outputs for a row depend on the other rows of the batch, which would leak test rows; "
            "normalize by GroupNorm or LayerNorm, and let no row look at another"
        )


def _first_useful(learner: Learner, state: dict[str, Tensor], tasks: Sequence[Task]) -> tuple[dict[str, Tensor], Task]:
    """Returns what the first site sends whose message is neither zero nor infinite; else the last one's."""
    result: Any = None
    for task in tasks:
        result = _call(f"the learner {type(learner).__name__}", learner.message, state, task)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Mapping):
            raise FedmetaError(
                f"check: meta_gradient of {type(learner).__name__} must return (gradient, figures): a dictionary by "
                f'the meta-state\'s keys, and one with "query_loss"; it returned {type(result).__name__}'
            )
        values = list(result[0].values())
        if values and all(bool(v.isfinite().all()) for v in values) and any(bool(v.any()) for v in values):
            break
    if "query_loss" not in result[1]:
        raise FedmetaError(f'check: the figures of {type(learner).__name__} hold no "query_loss"')
    return dict(result[0]), task


def _keys(learner: Learner, sent: Mapping[str, Tensor], template: Mapping[str, Tensor]) -> None:
    name = type(learner).__name__
    if sent.keys() != template.keys():
        lacking, extra = sorted(template.keys() - sent.keys()), sorted(sent.keys() - template.keys())
        parts = [f"lacks {', '.join(lacking[:3])}"] * bool(lacking) + [f"has {', '.join(extra[:3])} besides"] * bool(
            extra
        )
        raise FedmetaError(f"check: what {name} sends {' and '.join(parts)}: its keys must be the trained meta-state's")
    for key, value in sent.items():
        if value.shape != template[key].shape:
            raise FedmetaError(
                f"check: {name} sends {key} of shape {tuple(value.shape)}, and not {tuple(template[key].shape)}"
            )
        if not bool(value.isfinite().all()):
            raise FedmetaError(f"check: {name} sends {key} that is not finite at the start: lower learner.inner_lr")
    if learner.update == "gradient" and not any(bool(value.any()) for value in sent.values()):
        raise FedmetaError(
            f"check: {name} sends zeros at every site that was tried, and learns nothing; does the outer objective "
            "depend on the parameters, and is every label known?"
        )


def _derivative(
    learner: Learner,
    state: dict[str, Tensor],
    task: Task,
    sent: Mapping[str, Tensor],
    seed: int,
    straight_through: bool,
    found: Checked,
) -> None:
    """Compares a directional derivative with a central finite difference, where the message is a gradient."""
    if has_payload(learner.problem):
        found.skipped.append("derivative: the problem sends its own statistics")
        return
    if straight_through:
        found.skipped.append('derivative: runtime.check = "straight-through" lets it differ')
        return
    if learner.problem.solver.kind == BLACK_BOX:
        found.skipped.append("derivative: the solver is a black box")
        return
    exact = learner.estimator == "exact" or (learner.estimator == "custom" and _claims_exact(learner))
    generator = torch.Generator().manual_seed(seed + 1)
    if exact:
        own = trained(state)
        constant = {name: value for name, value in state.items() if name not in own}

        def objective(values: dict[str, Tensor]) -> Tensor:
            whole = {**values, **constant}
            path = learner.adaptation_path(whole, task.support, learner.inner_steps)
            weights = learner.query_weights(whole)
            counted = [(k, w) for k, w in enumerate(weights) if isinstance(w, Tensor) or w]
            return torch.stack([w * learner.outer(path[k], task.query) for k, w in counted]).sum()

        error, size = _difference(objective, own, sent, generator)
        what = "the meta-gradient"
    else:
        theta = learner.theta(state)
        own = {name: theta[name] for name in learner.problem.moved}
        rest = {name: value for name, value in theta.items() if name not in own}

        def inner(values: dict[str, Tensor]) -> Tensor:
            return learner.inner({**rest, **values}, task.support)

        gradient = torch.func.grad(inner)(own)
        error, size = _difference(inner, own, gradient, generator)
        what = "the inner objective's gradient"
        found.skipped.append(
            f"{type(learner).__name__} sends no exact gradient: only the inner objective's was verified"
        )
    if not error <= TOLERANCE * max(size, 1e-6) * 10:
        raise FedmetaError(
            f"check: {what} differs from a finite difference by {error / max(size, 1e-300):.1e} of it: a derivative in "
            "the model, problem or learner is wrong (weight_norm and once_differentiable functions have no second "
            'one), or the objective has a kink here; runtime.check = "straight-through" lets it through'
        )
    found.passed.append(f"{what} agrees with a finite difference to {error / max(size, 1e-300):.0e}")


def _claims_exact(learner: Learner) -> bool:
    from fedmeta.learners import Maml
    from fedmeta.learners.maml import Fomaml

    return isinstance(learner, Maml) and not isinstance(learner, Fomaml)


def _difference(
    objective: Any, values: Mapping[str, Tensor], gradient: Mapping[str, Tensor], generator: torch.Generator
) -> tuple[float, float]:
    """Returns how far the derivative along a direction is from finite differences, and its size.

    Of three steps, and of both sides of a kink in each, the nearest agreement counts: piecewise functions such as
    ReLU have
    no derivative on a set that small steps leave.
    """
    direction = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in values.items()}
    norm = float(torch.stack([d.square().sum() for d in direction.values()]).sum().sqrt())
    along = float(sum((gradient[n].double() * d).sum() for n, d in direction.items())) / norm
    reach = float(torch.stack([v.double().square().sum() for v in values.values()]).sum().sqrt()) or 1.0
    best = float("inf")
    for step in (STEP * reach, 0.1 * STEP * reach, 0.01 * STEP * reach):
        with torch.no_grad():
            ahead, behind = (
                float(objective({n: v + side * step / norm * direction[n] for n, v in values.items()}))
                for side in (1, -1)
            )
        best = min(best, abs((ahead - behind) / (2 * step) - along))
    return best, max(abs(along), 1e-8)
