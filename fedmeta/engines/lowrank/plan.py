"""Which form each adapting parameter takes: the low-rank form, or one value per site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from fedmeta.engines.lowrank.trace import ModuleTrace, OpCall
from fedmeta.engines.misfit import UnsupportedModelError

Rates = Mapping[str, Tensor | float]


@dataclass(frozen=True)
class ParameterPlan:
    """The form of each parameter.

    Attributes:
        calls: The model's calls, in order.
        in_place: Whether it changes tensors in place.
        lowrank: The weights in low-rank form.
        absorbed: The biases that move with a weight in low-rank form, at the same rates.
        dense: The other adapting parameters: one value per site.
    """

    calls: tuple[OpCall, ...]
    in_place: bool
    lowrank: frozenset[str]
    absorbed: frozenset[str]
    dense: tuple[str, ...]


RateGroups = tuple[tuple[tuple[str, int], ...], ...]
"""For each step the parameters that adapt, each with a number that those of the same rate share."""


def rate_groups(rates: Sequence[Rates]) -> RateGroups:
    """Returns which parameters adapt in each step, and which of them share one rate.

    Raises:
        UnsupportedModelError: A rate is not a scalar.
    """
    return tuple(_groups(step) for step in rates)


def _groups(rates: Rates) -> tuple[tuple[str, int], ...]:
    seen: dict[object, int] = {}
    for name, rate in rates.items():
        if isinstance(rate, Tensor) and rate.dim() > 0:
            raise UnsupportedModelError(f"parameter {name} has an inner rate for each of its elements")
    return tuple((name, seen.setdefault(_key(rate), len(seen))) for name, rate in rates.items())


def _key(rate: Tensor | float) -> object:
    return (Tensor, id(rate)) if isinstance(rate, Tensor) else float(rate)


@lru_cache(maxsize=256)
def make_plan(found: ModuleTrace, steps: RateGroups, rows: int, whole: int = 0) -> ParameterPlan:
    """Returns the cheaper form of each adapting parameter.

    Args:
        found: What the model does with its parameters.
        steps: Which parameters adapt in each step.
        rows: Rows of a step per site.
        whole: Where steps take mini-batches: all rows per site.
    """
    adapting = dict.fromkeys(name for step in steps for name, _ in step)
    by_name = {name: [call for call in found.calls if name in call.names] for name in adapting}
    lowrank = {
        name
        for name, calls in by_name.items()
        if all(call.kind == "linear" and call.weight == name for call in calls)
        and _saved(calls, rows, len(steps), whole) > 0
    }
    absorbed = {name for name, calls in by_name.items() if _bias_follows_weight(name, calls, by_name, lowrank, steps)}
    dense = tuple(name for name in adapting if name not in lowrank and name not in absorbed)
    return ParameterPlan(found.calls, found.in_place, frozenset(lowrank), frozenset(absorbed), dense)


def _saved(calls: Sequence[OpCall], rows: int, steps: int, whole: int) -> float:
    """Returns about how many operations per site the low-rank form of a linear layer saves over one weight per site.

    Weight by site: in each step rows * width * outputs more to form it, and passes over memory worth 30 operations an
    element. Low-rank: products of a step's rows with all rows of earlier steps, or once where the input is fixed. The
    rows of all calls of one weight, as in a recurrence, count together: each call's meet every other's. Mini-batches:
    where the input is fixed, a step's rows meet all rows of the site, whose products are formed once.

    Args:
        calls: The calls of one weight.
        rows: Rows of a step per site.
        steps: Inner steps.
        whole: All rows per site, of which a step takes a mini-batch; 0 where each step takes the same rows.
    """
    width, outputs = calls[0].width, calls[0].outputs
    own = sum(call.rows for call in calls) * rows
    weights = steps * (own + 30) * width * outputs
    pairs = own * own * steps
    fixed = all(call.fixed for call in calls)
    if fixed and whole:
        every = sum(call.rows for call in calls) * whole
        return weights - (steps * own * every * outputs + every * every * width)
    return weights - (pairs * outputs + own * own * width if fixed else pairs * steps / 2 * (width + outputs))


def _bias_follows_weight(
    name: str, calls: list[OpCall], by_name: Mapping[str, list[OpCall]], lowrank: set[str], steps: RateGroups
) -> bool:
    """Whether this is the bias of one weight in low-rank form that always moves at the same rate."""
    weight = calls[0].weight
    return (
        weight in lowrank
        and all(call.bias == name and call.weight == weight for call in calls)
        and len(by_name[weight]) == len(calls)
        and all(dict(step).get(name) == dict(step).get(weight) for step in steps)
    )
