"""The low-rank form's sum of clipped gradients: every site's norm, and no site's gradient of a shared weight.

A site's gradient of a weight is the sum of A^T G over the products A W + b that use it, with A the product's input
[rows, width] and G the derivative of the site's own objective with respect to the product [rows, outputs]. An exact
gradient has a second kind of product: an inner step's derivative goes through a layer as E W^T, whose part is G'^T E
with G' [rows, width]. Hence

    |A^T G|^2 = sum over all pairs of rows of (A A^T) (G G^T)        (Goodfellow 2015; Li et al. 2022, section 4)
    sum_i c_i A_i^T G_i = one product over the rows of all sites

which is as large as the rows and not as the weight. For a displacement A and -G are what `Correction` holds. Parameters
that take one value per site have a gradient per site anyhow.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedmeta.engines.gradcheck import UnprovenError, check
from fedmeta.engines.lowrank import engine
from fedmeta.engines.lowrank.plan import ParameterPlan
from fedmeta.engines.lowrank.trace import OpCall
from fedmeta.engines.misfit import UnsupportedModelError
from fedmeta.engines.weighted_sum import NORM, WeightedSum, by_site
from fedmeta.learners import FROZEN, THETA, Learner
from fedmeta.learners.learner import with_theta
from fedmeta.models import FunctionalModel
from fedmeta.task import Batch

_known: WeakKeyDictionary[FunctionalModel, dict[Hashable, bool]] = WeakKeyDictionary()


@dataclass
class FactoredGradients:
    """The gradients of all sites, weights of linear layers taken apart.

    Attributes:
        products: For each such weight the pairs A [sites, rows, width] and G [sites, rows, outputs].
        own: For each other parameter the gradient itself [sites, *shape].
    """

    products: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)

    def add(self, call: OpCall, inputs: Tensor, errors: Tensor, bias: bool) -> None:
        """Adds one product's, and with `bias` its bias's."""
        self.products.setdefault(str(call.weight), []).append((inputs, errors))
        if bias and call.bias is not None:
            self.own[call.bias] = self.own.get(call.bias, 0) + errors.sum(1)

    def joined(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns A and G of each weight, all its products one after the other."""
        return {
            name: (torch.cat([a for a, _ in pairs], 1), torch.cat([g for _, g in pairs], 1))
            for name, pairs in self.products.items()
        }


def fits(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor]) -> bool:
    """Whether clipped gradients can be added up so: the low-rank form fits, and its every parameter can be taken apart.

    Learned inner rates are shared by all sites and cannot. As in the low-rank form itself, two sites' sum is compared
    with
    the reference loop's, once per model, learner and shape of batch.

    Args:
        learner: The learner.
        batch: Tasks like those to come.
        meta_state: The meta-state.
    """
    learned = any(not name.startswith((THETA, FROZEN)) for name in meta_state)
    if learned or learner.estimator == "nothing" or engine.fits(learner, batch, meta_state) is not None:
        return False
    forms = engine.plan_of(learner, batch, meta_state)
    if not all(_parts(call, forms) for call in forms.calls):
        return False
    key = (type(learner), forms, batch.support[0].shape[2:])
    known = _known.setdefault(learner.network, {})
    if key not in known:
        try:
            check(learner, meta_state, batch, _weighted_sum)
            known[key] = True
        except UnprovenError:
            return False
        except UnsupportedModelError:
            known[key] = False
    return known[key]


def add_sites(
    total: WeightedSum, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> None:
    """Adds each site's gradient, shortened to `total.clip_norm`.

    Args:
        total: What is added to; its `clip_norm` is above 0, and it keeps no site's own gradient.
        learner: A learner that `fits`.
        meta_state: The meta-state.
        batch: The sites' tasks.
        weights: The weight of each site [sites].
    """
    pieces, losses = _pieces(learner, meta_state, batch)
    joined = pieces.joined()
    squares = torch.zeros_like(losses, dtype=torch.float64)
    for inputs, errors in joined.values():
        squares += _squared_norms(inputs, errors)
    for value in pieces.own.values():
        squares += by_site(value).double().square().sum(1)
    finite = losses.isfinite() & squares.isfinite()
    shares = torch.where(finite, weights, 0.0) * total.clip_norm / squares.sqrt().clamp(min=total.clip_norm)
    if not bool(finite.all()):
        shares = torch.where(finite, shares, 0.0)
        joined = {name: (_mask_sites(a, finite), _mask_sites(g, finite)) for name, (a, g) in joined.items()}
        pieces.own = {name: _mask_sites(value, finite) for name, value in pieces.own.items()}
    summed = _sums(meta_state, joined, pieces.own, shares)
    weight = float(torch.where(finite, weights, 0.0).sum())
    norms = torch.where(finite, squares.sqrt(), 0.0)
    figures = {"query_loss": [losses.double()], "finite": [finite.double()], NORM: [norms]}
    total.merge(WeightedSum(summed, weight, figures))


def _parts(call: OpCall, forms: ParameterPlan) -> bool:
    """Whether a call's parameters have gradients per site: by its rows, or by values of their own at every site."""
    if call.kind == "linear" and call.weight not in forms.dense:
        return call.by_rows
    return set(call.names) <= set(forms.dense)


def _pieces(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> tuple[FactoredGradients, Tensor]:
    """Returns the sites' gradients in pieces, and their query losses [sites]."""
    pieces = FactoredGradients()
    if learner.estimator == "delta":
        adaptation, losses = engine.adapted(learner, meta_state, batch)
        for place, correction in adaptation.corrections.items():
            call = adaptation.forms.calls[place]
            pieces.add(call, correction.inputs, -correction.errors, bias=call.bias in adaptation.forms.absorbed)
        pieces.own |= {name: (adaptation.theta[name] - value).detach() for name, value in adaptation.dense.items()}
        return pieces, losses
    state = engine.leaves(meta_state)
    inner = state if learner.estimator == "exact" else meta_state
    ones = torch.ones(batch.sites, device=batch.device)
    value, losses, adaptation = engine.objective(learner, state, inner, batch, ones, by_site=True)
    products, start = adaptation.products, adaptation.start
    errors = torch.autograd.grad(value, [*(each.product for each in products), *start.values()], allow_unused=True)
    for each, error in zip(products, errors, strict=False):
        if error is not None:
            call, factor = adaptation.forms.calls[each.place], each.factor.detach()
            inputs, outer = (error, factor) if each.turned else (factor, error)
            pieces.add(call, inputs, outer, bias=not each.turned and call.bias not in start)
    own = zip(start.items(), errors[len(products) :], strict=True)
    pieces.own |= {name: error for (name, _), error in own if error is not None}
    return pieces, losses


def _squared_norms(inputs: Tensor, errors: Tensor) -> Tensor:
    """Returns |A^T G|^2 [sites], by the pairs of rows or by the product itself, whichever is smaller.

    In float64: pairs of rows may cancel, and a norm that is too small would let a site send more than it may.
    """
    rows, width, outputs = inputs.shape[1], inputs.shape[2], errors.shape[2]
    inputs, errors = inputs.double(), errors.double()
    if rows * (width + outputs) < width * outputs:
        return (torch.bmm(inputs, inputs.transpose(1, 2)) * torch.bmm(errors, errors.transpose(1, 2))).sum((1, 2))
    return torch.bmm(errors.transpose(1, 2), inputs).square().sum((1, 2))


def _sums(
    meta_state: Mapping[str, Tensor],
    joined: Mapping[str, tuple[Tensor, Tensor]],
    own: Mapping[str, Tensor],
    shares: Tensor,
) -> dict[str, Tensor]:
    """Returns the sum over sites of share times gradient, with the meta-state's keys, float64."""
    sums = {}
    for name, (inputs, errors) in joined.items():
        shared = errors * shares.to(errors.dtype)[:, None, None]
        sums[name] = shared.flatten(0, 1).T @ inputs.flatten(0, 1)
    for name, value in own.items():
        sums[name] = torch.tensordot(shares.to(value.dtype), value, dims=1)
    return {name: value.double() for name, value in with_theta(meta_state, sums).items()}


def _mask_sites(value: Tensor, finite: Tensor) -> Tensor:
    """Returns a value [sites, ...] with zeros for the sites that are not finite."""
    return torch.where(finite.reshape(-1, *[1] * (value.dim() - 1)), value, 0.0)


def _weighted_sum(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor) -> WeightedSum:
    pieces, losses = _pieces(learner, meta_state, batch)
    total = _sums(meta_state, pieces.joined(), pieces.own, weights)
    return WeightedSum(total, float(weights.sum()), {"query_loss": [losses]})
