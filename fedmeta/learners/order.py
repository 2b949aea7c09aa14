"""A learner of the exact meta-gradient as its first-order approximation: the same start, loss and rates.

First-order MAML (Finn et al. 2017, section 5.2) leaves out how the inner steps change with theta. It costs less, and
cannot reach every accuracy where inner objectives are curved; the exact gradient can (Fallah, Mokhtari and Ozdaglar
2020, arXiv 1908.10400).
"""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from functools import cache, lru_cache

from fedmeta.errors import FedmetaError
from fedmeta.learners.fedmeta_per import FedMetaPer
from fedmeta.learners.learner import Learner
from fedmeta.learners.maml import Fomaml, Maml
from fedmeta.learners.maml_plus_plus import MamlPlusPlus
from fedmeta.learners.meta_sgd import MetaSgd
from fedmeta.learners.protonet import ProtoNet

FIRST, EXACT = "first", "exact"


def in_order(learner: Learner, order: str) -> Learner:
    """Returns a learner as it is ("exact" or ""), or its first-order approximation ("first").

    Raises:
        FedmetaError: It has none.
    """
    return learner if order in (EXACT, "") else _first_order(learner)


def has_first_order(learner: Learner) -> bool:
    """Returns whether a learner of the exact gradient has a first-order approximation of all that it trains."""
    return isinstance(learner, Maml) and not isinstance(
        learner, Fomaml | MetaSgd | MamlPlusPlus | ProtoNet | FedMetaPer
    )


@lru_cache(maxsize=8)
def _first_order(learner: Learner) -> Learner:
    if not has_first_order(learner):
        raise FedmetaError(
            f"[learner] order: {type(learner).__name__} has no first-order approximation of all that it trains: take "
            "maml or anil, or leave order out"
        )
    settings = {field.name: getattr(learner, field.name) for field in fields(learner)}
    return _kind(type(learner))(**settings)


@cache
def _kind(exact: type[Learner]) -> type[Learner]:
    """Returns the class, the same one each time: engines remember what they know of it."""
    return make_dataclass(f"FirstOrder{exact.__name__}", [], bases=(Fomaml, exact), frozen=True)
