r"""A site's meta-gradient by the adjoint of its inner steps, from the last one to the first.

With steps phi_(t+1) = phi_t - alpha_t * g_t, g_t the support loss's gradient at phi_t and H_t its Hessian there, and
the objective sum_t v_t L_Q(phi_t):

    lambda_K = v_K dL_Q(phi_K)
    d alpha_t = - g_t * lambda_(t+1)                                   (added up where one rate serves many numbers)
    lambda_t = lambda_(t+1) - H_t (alpha_t * lambda_(t+1)) + v_t dL_Q(phi_t)

lambda_0 is the derivative by theta. A rate may be one number, or one for each element of a parameter: the products are
elementwise either way. First-order gradients leave H_t out. Where K steps would take much memory, only the phi_t are
kept, and g_t is computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedmeta.engines.program.derivatives import Derivatives, Prepared
from fedmeta.learners import Learner
from fedmeta.learners.learner import key_of, trained
from fedmeta.models import Parameters
from fedmeta.task import Rows

Rates = Mapping[str, Tensor | float]

ByRates = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""A learned rate and the objective's derivative by it, for each parameter and each rate that it has in some step."""


def site_gradient(
    learner: Learner, model: Derivatives, state: Mapping[str, Tensor], support: Rows, query: Rows, recompute: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns a site's meta-gradient, with the keys of the trained meta-state, and its query loss.

    Args:
        learner: A learner whose estimator is exact or first-order.
        model: The model's derivatives.
        state: The meta-state.
        support: x [n, *shape], y [n], mask [n].
        query: The same with its own n.
        recompute: Whether only the phi_t are kept of the steps.
    """
    exact = learner.estimator == "exact"
    leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in state.items()}
    with torch.enable_grad():
        attached = [learner.rates(leaves if exact else state, step) for step in range(learner.inner_steps)]
    with torch.no_grad():
        rates = [{name: _detached(rate) for name, rate in step.items()} for step in attached]
        phi = {name: value.detach() for name, value in learner.theta(state).items()}
        dtype = phi[learner.network.names[0]].dtype
        rows, pieces = model.prepare(*shared_rows(support, dtype)), model.pieces(*shared_rows(query, dtype))
        counts = [float(count) for count in learner.query_weights(state)]
        path = [phi]
        kept: list[Any] = []
        gradients: list[Parameters] = []
        for step in rates:
            _, gradient, own = model.gradient(path[-1], rows, exact and not recompute)
            kept.append(own)
            gradients.append({} if recompute else gradient)
            path.append(stepped(path[-1], gradient, step))
        loss, total = _query(model, path[-1], pieces)
        total = _scaled(total, counts[-1])
        by_rates: ByRates = {}
        for place in range(len(rates) - 1, -1, -1):
            if exact:
                gradient, own = gradients[place], kept[place]
                if recompute:
                    _, gradient, own = model.gradient(path[place], rows, True)
                _add_by_rates(by_rates, attached[place], gradient, total)
                total = _pulled_back(model, own, path[place], rates[place], total)
                kept[place] = own = None
            if counts[place]:
                _, added = _query(model, path[place], pieces)
                total = {name: value.add(added[name], alpha=counts[place]) for name, value in total.items()}
    return _gathered(state, leaves, by_rates, total), loss


def shared_rows(rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x in the model's type, y, and each row's share of its site's loss [n]; rows of unseen classes have 0."""
    x, y, mask = rows
    mask = mask.to(dtype)
    known = mask if y.is_floating_point() else mask * (y >= 0)
    return (x.to(dtype) if x.is_floating_point() else x), y, known / known.sum().clamp(min=1)


def stepped(phi: Parameters, gradient: Parameters, rates: Rates) -> Parameters:
    """Returns phi - rate * gradient for the parameters with a rate, and the others as they are."""
    return {**phi, **{name: _less(phi[name], rate, gradient[name]) for name, rate in rates.items()}}


def _less(value: Tensor, rate: Tensor | float, other: Tensor) -> Tensor:
    if isinstance(rate, Tensor):
        return torch.addcmul(value, rate, other, value=-1)
    return torch.add(value, other, alpha=-rate)


def _query(model: Derivatives, phi: Parameters, pieces: Sequence[Prepared]) -> tuple[Tensor, Parameters]:
    """Returns the query loss, and its derivative by each trained parameter."""
    loss, total, _ = model.gradient(phi, pieces[0], False)
    for piece in pieces[1:]:
        more, added, _ = model.gradient(phi, piece, False)
        loss, total = loss + more, {name: value + added[name] for name, value in total.items()}
    return loss, total


def _pulled_back(model: Derivatives, kept: Any, phi: Parameters, rates: Rates, total: Parameters) -> Parameters:
    """Returns lambda - H (alpha * lambda)."""
    along = {name: total[name] * rate for name, rate in rates.items() if name in total}
    product = model.curvature(kept, phi, along)
    return {name: value - product[name] for name, value in total.items()}


def _add_by_rates(found: ByRates, rates: Rates, gradient: Parameters, total: Parameters) -> None:
    """Adds - g * lambda for each rate that is learned, to what other steps found that have the same one."""
    for name, rate in rates.items():
        if not (isinstance(rate, Tensor) and rate.requires_grad):
            continue
        key, one, other = (name, id(rate)), gradient[name], total[name]
        _, before = found.get(key, (rate, None))
        if before is None or rate.shape != other.shape:
            product = (one * other).neg_()
            value = product.sum() if rate.dim() == 0 else product.sum_to_size(rate.shape)
            found[key] = rate, value if before is None else before + value
        else:
            found[key] = rate, torch.addcmul(before, one, other, value=-1)


def _gathered(
    state: Mapping[str, Tensor], leaves: Mapping[str, Tensor], by_rates: ByRates, total: Parameters
) -> dict[str, Tensor]:
    """Returns the derivative by the trained meta-state: by theta, and by what learned rates are made of."""
    keys = trained(state)
    found = {key_of(state, name): value for name, value in total.items()}
    if by_rates:
        learned = [name for name in keys if leaves[name].requires_grad]
        rates, derivatives = zip(*by_rates.values(), strict=True)
        more = torch.autograd.grad(rates, [leaves[name] for name in learned], derivatives, allow_unused=True)
        for name, value in zip(learned, more, strict=True):
            if value is not None:
                found[name] = found[name] + value if name in found else value
    return {name: found[name] if name in found else torch.zeros_like(value) for name, value in keys.items()}


def _scaled(values: Parameters, factor: float) -> Parameters:
    return values if factor == 1 else {name: value * factor for name, value in values.items()}


def _detached(rate: Tensor | float) -> Tensor | float:
    return rate.detach() if isinstance(rate, Tensor) else rate
