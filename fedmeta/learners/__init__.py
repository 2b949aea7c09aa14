"""The mathematics: learners as pure functions on dictionaries of tensors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from fedmeta.errors import FedmetaError, nearest
from fedmeta.importing import load_object
from fedmeta.learners.anil import Anil
from fedmeta.learners.apfl import Apfl
from fedmeta.learners.average import Average
from fedmeta.learners.fedavg import FedAvg, FedAvgFinetuned, FedProx, Local, Reptile
from fedmeta.learners.fedbabu import FedBabu
from fedmeta.learners.fedmeta_per import FedMetaPer
from fedmeta.learners.imaml import Imaml
from fedmeta.learners.learner import ALPHA, FROZEN, SET_BY_ROUND, THETA, Learner, MetaState, Metrics, trained
from fedmeta.learners.maml import Fomaml, Maml
from fedmeta.learners.maml_plus_plus import MamlPlusPlus
from fedmeta.learners.meta_sgd import MetaSgd
from fedmeta.learners.per_fedavg import PerFedAvg
from fedmeta.learners.personal import Ditto, FedPer, FedRep
from fedmeta.learners.pfedme import PFedMe
from fedmeta.learners.protonet import ProtoNet
from fedmeta.learners.scaffold import Scaffold

__all__ = [
    "ALPHA",
    "FROZEN",
    "LEARNERS",
    "THETA",
    "Fomaml",
    "Learner",
    "Maml",
    "MetaSgd",
    "MetaState",
    "Metrics",
    "build",
    "learner_class",
    "settings_of",
    "trained",
]

LEARNERS: dict[str, type[Learner]] = {
    "local": Local,
    "fedavg": FedAvg,
    "fedavg-ft": FedAvgFinetuned,
    "fedprox": FedProx,
    "reptile": Reptile,
    "fomaml": Fomaml,
    "maml": Maml,
    "anil": Anil,
    "meta-sgd": MetaSgd,
    "maml++": MamlPlusPlus,
    "per-fedavg": PerFedAvg,
    "imaml": Imaml,
    "pfedme": PFedMe,
    "ditto": Ditto,
    "fedrep": FedRep,
    "fedper": FedPer,
    "fedbabu": FedBabu,
    "scaffold": Scaffold,
    "protonet": ProtoNet,
    "fedmeta-per": FedMetaPer,
    "apfl": Apfl,
    "average": Average,
}
"""Every learner by its name in an experiment."""


def build(name: str, model_or_problem: Any, **settings: Any) -> Learner:
    """Builds a learner.

    Args:
        name: A key of `LEARNERS`, or `package.module:Class`, a subclass of `Learner`.
        model_or_problem: A `fedmeta.Problem`; or a torch module, or a function that makes it (called again under the
            seed by `init`), for supervised learning on rows.
        **settings: The learner's own keys, such as `inner_steps` and `inner_lr`.

    Raises:
        FedmetaError: No such learner, or it has no such key.
    """
    kind = learner_class(name)
    known = settings_of(kind)
    for key in settings:
        if key not in known:
            raise FedmetaError(f'learner "{name}" has no key "{key}"{nearest(key, known)} (it has: {", ".join(known)})')
    if missing := getattr(kind, "__abstractmethods__", None):
        raise FedmetaError(f'[learner] name = "{name}" defines no {", ".join(sorted(missing))}, which a learner needs')
    return kind(model_or_problem, **settings)


def learner_class(name: str) -> type[Learner]:
    """Returns the class of a learner by name or import path.

    Raises:
        FedmetaError: There is none.
    """
    if name in LEARNERS:
        return LEARNERS[name]
    if ":" not in name:
        raise FedmetaError(f'no learner "{name}"{nearest(name, LEARNERS)} (known: {", ".join(LEARNERS)})')
    kind = load_object(name, "[learner] name")
    if not (isinstance(kind, type) and issubclass(kind, Learner)):
        raise FedmetaError(f'[learner] name = "{name}" is not a subclass of fedmeta.learners.Learner')
    return kind


def settings_of(kind: type[Learner]) -> tuple[str, ...]:
    """Returns the names of a learner's own keys."""
    return tuple(field.name for field in fields(kind) if field.name != "problem" and SET_BY_ROUND not in field.metadata)
