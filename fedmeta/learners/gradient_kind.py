"""What a learner's `meta_gradient` computes, as a mark beside its implementation.

An engine that computes a cohort's meta-gradients in another way than by calling `meta_gradient` must know what it
computes. The mark declares it, and it holds for as long as nothing that `meta_gradient` builds on is overridden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Method = TypeVar("Method", bound=Callable[..., object])

CUSTOM = "custom"

SAFE_OVERRIDES = frozenset({"init", "rates", "query_weights", "for_round", "personal", "train", "minibatches", "pull"})
"""What a learner may override without changing what its `meta_gradient` computes."""


def gradient_kind(kind: str) -> Callable[[Method], Method]:
    """Marks a `meta_gradient` with what it computes.

    Args:
        kind: "exact": d/d meta-state of sum_t v_t L_Q(phi_t), with v = `query_weights` and phi = `adaptation_path`;
            "first-order": the same with d phi_t / d theta = 1; "delta": theta - theta_i after descent
            over `minibatches` of all the task's rows, with a `pull` to theta; "nothing": zeros. Each has the metric
            "query_loss", L_Q(phi_K).
    """

    def mark(method: Method) -> Method:
        method.__dict__["estimator"] = kind
        return method

    return mark


def estimator(kind: type, base: type) -> str:
    """Returns what the `meta_gradient` of a learner's class computes, or "custom" where only the method itself shows.

    That is where it carries no mark, where any class overrides one of the base's methods other than `SAFE_OVERRIDES`,
    and where one that inherits the marked method overrides anything else.

    Args:
        kind: The learner's class.
        base: The class that all learners share.
    """
    classes = kind.__mro__[: kind.__mro__.index(base)]
    inherits = True
    for each in classes:
        names = {name for name, value in vars(each).items() if callable(value) or isinstance(value, property)}
        changed = {name for name in names - SAFE_OVERRIDES - {"meta_gradient"} if not name.startswith("__")}
        inherits = inherits and "meta_gradient" not in names
        if changed if inherits else changed & vars(base).keys():
            return CUSTOM
    return str(getattr(getattr(kind, "meta_gradient", None), "estimator", CUSTOM))
