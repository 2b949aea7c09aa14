"""One straight-line program for a site, run for each site of a cohort, on workers of one thread each.

The program is the adjoint of the site's inner steps (`fedmeta.engines.program.site`), recorded as what torch's
operations it comes to (`fedmeta.engines.lowrank.capture`). It stays in a core's cache, needs no weights of other sites
beside it, and takes learned rates of any shape. Where the low-rank form applies to most parameters, that is quicker.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from math import isfinite
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedmeta import noise
from fedmeta.engines import loop, lowrank
from fedmeta.engines.gradcheck import UnprovenError, check, cut
from fedmeta.engines.lowrank.capture import run_captured
from fedmeta.engines.lowrank.trace import DATA_DEPENDENT
from fedmeta.engines.misfit import UnsupportedModelError
from fedmeta.engines.program.chain import chain_of
from fedmeta.engines.program.derivatives import Derivatives, Reverse
from fedmeta.engines.program.site import site_gradient
from fedmeta.engines.program.workers import deal, one_thread
from fedmeta.engines.weighted_sum import Figures, WeightedSum, summed
from fedmeta.learners import Learner
from fedmeta.learners.learner import trained
from fedmeta.models import FunctionalModel
from fedmeta.problems.supervised import Supervised
from fedmeta.task import Batch

ESTIMATORS = ("exact", "first-order")
"""What of `learner.estimator` this engine computes."""

KEPT_STEPS = 8
"""More inner steps than these keep their parameters alone, and are computed again on the way back."""

BLOCKS = 16
"""Into how many blocks of sites a cohort is cut at the least, where it has so many."""

LARGEST_BLOCK = 8
"""The most sites of a block, whose gradients are added up before they are added to the others'."""

_models: WeakKeyDictionary[FunctionalModel, Derivatives] = WeakKeyDictionary()
_known: WeakKeyDictionary[FunctionalModel, dict[Hashable, str | None]] = WeakKeyDictionary()


def add_sites(
    total: WeightedSum, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> None:
    """Adds each site's gradient to what `total` makes of them.

    The blocks of sites that workers add up do not depend on how many workers there are, and are added in site order.
    """
    _check(learner, batch)
    template = learner.message_template(meta_state)
    size = max(1, min(LARGEST_BLOCK, batch.sites // BLOCKS))
    blocks = [range(start, min(start + size, batch.sites)) for start in range(0, batch.sites, size)]

    def compute(sites: range) -> WeightedSum:
        own = WeightedSum.empty(template, total.clip_norm, total.kept is not None)
        for site in sites:
            add_site(own, *_site(learner, meta_state, batch, site), float(weights[site]))
        return own

    with one_thread() as workers:
        together = max(1, 4 * workers)
        for start in range(0, len(blocks), together):
            for own in deal(compute, blocks[start : start + together], workers):
                total.absorb(own)


meta_gradients = summed(add_sites)


def add_site(total: WeightedSum, gradient: Mapping[str, Tensor], loss: Tensor, weight: float) -> None:
    """Adds one site's gradient to what `total` makes of them: a sum without a copy, where that is all."""
    values = [loss, *(value.sum() for value in gradient.values())]
    if total.kept is not None or total.clip_norm or not all(isfinite(float(value)) for value in values):
        stacked = {name: value.unsqueeze(0) for name, value in gradient.items()}
        total.add(stacked, torch.tensor([weight], dtype=torch.float64), {"query_loss": loss.reshape(1)})
        return
    for name, value in gradient.items():
        total.total[name].add_(value, alpha=weight)
    total.note(weight, {"query_loss": loss.reshape(1), "finite": torch.ones(1)})


def evaluate(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Figures:
    """Returns the figures on the query rows after 0 ... `steps` inner steps on support, [sites, steps + 1].

    Nothing is differentiated twice there: the low-rank form computes it where it fits, else the loop.
    """
    if lowrank.fits(learner, batch, meta_state) is None:
        return lowrank.evaluate(learner, meta_state, batch, steps)
    return loop.evaluate(learner, meta_state, batch, steps)


def fits(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor] | None = None) -> str | None:
    """Returns why sites cannot be computed so, or None if they can.

    The gradients of two sites are compared with the reference loop's, once per model, learner and shape of batch.

    Args:
        learner: The learner.
        batch: Tasks like those to come.
        meta_state: The meta-state; None for a new one.

    Raises:
        FedmetaError: The learner or the model fails by itself too.
    """
    try:
        _check(learner, batch)
    except UnsupportedModelError as misfit:
        return str(misfit)
    x = batch.support[0]
    key = (type(learner), x.shape[2:], x.is_floating_point())
    known = _known.setdefault(learner.network, {})
    if key not in known:
        state = learner.init(0) if meta_state is None else meta_state
        try:
            _check_path(learner, state, batch)
            check(learner, state, batch, meta_gradients)
        except UnprovenError as unproven:
            return str(unproven)
        except UnsupportedModelError as misfit:
            known[key] = str(misfit)
        else:
            known[key] = None
    return known[key]


def _check(learner: Learner, batch: Batch) -> None:
    """Raises `UnsupportedModelError` where what a learner sends is not what this engine computes."""
    problem = learner.problem
    if not isinstance(problem, Supervised) or not problem.plain:
        raise UnsupportedModelError("its objectives are not those of supervised learning")
    if learner.estimator not in ESTIMATORS:
        raise UnsupportedModelError(f"what {type(learner).__name__} sends is no derivative of a query loss")
    if batch.device.type != "cpu":
        raise UnsupportedModelError("one site after the other leaves a GPU idle")


class _Watch(TorchFunctionMode):
    """Within it a model may not look at values: its path could not be recorded."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DATA_DEPENDENT:
            raise UnsupportedModelError(f"the model looks at values ({func.__name__}), so that no program is right")
        return func(*args, **(kwargs or {}))


def _check_path(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> None:
    """Raises `UnsupportedModelError` where a model looks at values, or draws noise, whose keys are those of a step."""
    rows = cut(batch.take(slice(0, 1))).support[0][0]
    with torch.no_grad(), noise.asked() as drawn, _Watch():
        learner.network(learner.theta(meta_state), rows)
    if drawn:
        raise UnsupportedModelError("the model draws noise")


def _site(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, site: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns a site's gradient and query loss, by the recorded program once there is one."""
    model = _model(learner.network)
    recompute = learner.inner_steps > KEPT_STEPS
    learned = trained(meta_state)

    def compute(*tensors: Tensor) -> list[Tensor]:
        state, rows = dict(zip(meta_state, tensors, strict=False)), tensors[len(meta_state) :]
        gradient, loss = site_gradient(learner, model, state, rows[:3], rows[3:], recompute)
        return [*(gradient[name] for name in learned), loss]

    rows = [tensor[site] for part in batch for tensor in part]
    *values, loss = run_captured(
        learner.network, (learner, "program", *meta_state), compute, [*meta_state.values(), *rows]
    )
    return dict(zip(learned, values, strict=True)), loss


def _model(network: FunctionalModel) -> Derivatives:
    if network not in _models:
        _models[network] = chain_of(network) or Reverse(network)
    return _models[network]
