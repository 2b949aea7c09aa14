"""Which keys of an experiment are in force: those that its run obeys, and so what MLflow lists as its params.

A key is left out where another key decides that nothing reads it (a width of a network that is not built, a share of an
objective that is not set), or where it is at its default and that switches nothing on (an empty text, 0, false).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from fedmeta.experiment import Experiment, Scalar
from fedmeta.learners import learner_class, settings_of
from fedmeta.models import MODELS

Condition = Callable[[Experiment], bool]

ALWAYS = ("runtime.seed", "evaluation.steps", "evaluation.every")
ORDERED = ("maml", "anil")
"""The learners whose gradient the server may ask for exactly or to first order."""
NOTHING = ("", "[]", "none", 0, 0.0, False)


def _source(*names: str) -> Condition:
    return lambda experiment: experiment.data.source in names


def _chosen_by_validation(experiment: Experiment) -> bool:
    """Whether training sites are split off, to choose or to score by."""
    own = experiment.evaluation
    return own.judge == "validation_sites" or own.schedule == "auto" or experiment.steered


CONDITIONS: dict[str, Condition] = {
    **dict.fromkeys(("data.label", "data.columns"), _source("tables", "huggingface")),
    **dict.fromkeys(("data.categorical", "data.category_rows", "data.dates", "data.missing"), _source("tables")),
    "data.site_column": _source("tables"),
    "data.ignore": _source("tables"),
    "data.site_key": _source("npz", "huggingface"),
    "data.features": _source("tables", "synthetic"),
    "data.stride": _source("shakespeare"),
    **dict.fromkeys(("data.subset", "data.part", "data.dirichlet"), _source("huggingface")),
    "data.sites": lambda e: e.data.source == "synthetic" or e.data.dirichlet is not None,
    **dict.fromkeys(("data.rows", "data.classes", "data.heterogeneity"), _source("synthetic")),
    "data.support": lambda e: e.data.ways is None,
    **dict.fromkeys(("data.shots", "data.rotations", "evaluation.tasks"), lambda e: e.data.ways is not None),
    "server.momentum": lambda e: e.server.optimizer == "momentum",
    "server.eps": lambda e: e.server.optimizer in ("auto", "adam", "adamw"),
    "server.worst_lr": lambda e: e.server.objective == "worst",
    "server.cvar_share": lambda e: e.server.objective == "cvar",
    "server.q": lambda e: e.server.objective == "q",
    **dict.fromkeys(
        [
            f"server.{key}"
            for key in ("probe_every", "climb_below", "descend_above", "climb_patience", "descend_probes")
        ],
        lambda e: e.learner.order == "auto" and e.learner.name in ORDERED,
    ),
    **dict.fromkeys(("server.byzantine", "server.mixing"), lambda e: e.server.aggregator != "mean"),
    "server.norm_bound": lambda e: e.server.aggregator == "norm-bound",
    "server.norm_cap": lambda e: e.server.aggregator == "mean",
    "server.max_weight": lambda e: e.server.weighting != "uniform",
    "server.staleness": lambda e: e.server.late == "buffer",
    "server.compression_keep": lambda e: "top-k" in (e.server.compression, e.server.compression_down),
    "evaluation.validation_sites": _chosen_by_validation,
    "evaluation.validate_every": lambda e: e.steered,
    "privacy.delta": lambda e: e.privacy.noise_multiplier > 0,
    **dict.fromkeys(
        ("privacy.survivors", "privacy.colluding", "privacy.quantum"), lambda e: e.privacy.secure_aggregation
    ),
    "runtime.nodes": lambda e: False,  # of one runtime, which is no key
    "tracking.site_curves": lambda e: False,
    "tracking.folder": lambda e: False,
    "tracking.uri": lambda e: False,
    "tracking.experiment": lambda e: False,
}
"""When a key is obeyed at all; a key that is not listed always is."""

OF_ANY_DATA = ("data.source", "data.path", "data.new_sites", "data.without")
OF_ANY_MODEL = ("model.dtype",)


def params_in_force(experiment: Experiment) -> dict[str, Scalar]:
    """Returns the keys that a run of this experiment obeys, flat as `Experiment.params` has them."""
    usual = type(experiment)().params()
    return {
        key: value
        for key, value in experiment.params().items()
        if key in ALWAYS or (_obeyed(key, experiment, key in usual) and not _off(value, usual.get(key)))
    }


def _obeyed(key: str, experiment: Experiment, known: bool) -> bool:
    section, _, name = key.partition(".")
    if not known:  # a key of own code
        return True
    if key == "learner.order":
        return experiment.learner.name in ORDERED
    if section == "learner" and name != "name":
        return name in settings_of(learner_class(experiment.learner.name))
    if section == "data" and not experiment.on_rows and key not in OF_ANY_DATA:
        # An own source may return rows, which are split; an own problem has none.
        return ":" not in experiment.problem.name and _condition_holds(key, experiment)
    if section == "data" and ":" in experiment.problem.name and name in ("source", "path"):
        return bool(experiment.data.path) if name == "path" else ":" in experiment.data.source
    if section == "model" and key not in OF_ANY_MODEL:
        if ":" in experiment.problem.name:
            return False
        built = MODELS.get(experiment.model.name)
        read = ("name", "freeze", "weights") if built is None else ("name", "freeze", "weights", *_keys(built))
        return name in read
    return _condition_holds(key, experiment)


def _condition_holds(key: str, experiment: Experiment) -> bool:
    condition = CONDITIONS.get(key)
    return condition is None or condition(experiment)


def _keys(built: Callable[..., object]) -> tuple[str, ...]:
    return tuple(inspect.signature(built).parameters)


def _off(value: Scalar, usual: Scalar | None) -> bool:
    return usual is not None and value == usual and any(value == each and type(value) is type(each) for each in NOTHING)
