r"""The low-rank form: the exact sum of a cohort's meta-gradients, without any site's weights.

A linear layer z = a W + b with a scalar inner rate. At step t its input on the site's support rows is A_t [n, width],
and D_t [n, outputs] is the derivative of the support loss with respect to its output. The gradients are A_t^T D_t for W
and 1^T D_t for b, so that after steps 0 ... k-1 the adapted layer is

    z = a (W - sum_t alpha_t A_t^T D_t) + b - sum_t alpha_t 1^T D_t
      = a W + b - sum_t alpha_t (a A_t^T + 1) D_t

The first two terms are shared: one matrix product for the rows of all sites. The rest is a product of n x n matrices
with n x outputs ones: as large as the support, not as W. Everything on the right is a function of the shared W and b
(through A_t and D_t as well), so that automatic differentiation of sum_i w_i L_Q,i with respect to W and b gives the
cohort's sum of exact meta-gradients, in the memory of one model and its activations. D_t is d L_S / d z, taken by
automatic differentiation with respect to the outputs alone; it stays differentiable for the exact gradient, and A_t
and D_t are constants for the first-order one (d phi_i / d theta = 1). A displacement is theta - phi_i, hence
sum_t alpha_t A_t^T D_t.

- What does not change between steps is computed once: where no layer before it adapts, a layer's input is the same in
  every step, hence a W + b and a A^T are too, and the sum over steps moves inside: (a A^T + 1) sum_t alpha_t D_t.
- A displacement comes from steps on mini-batches, each of other rows (`minibatch_descent`). Where a layer's input is
  fixed, all that it needs is a A^T of all of a site's rows, once, and one sum of D_t for each row, over all epochs.
- Where the rows outnumber the layer, and for parameters of norms, embeddings and convolutions, one value per site is
  cheaper or the only way: phi_{t+1} = phi_t - alpha_t D_t with phi [sites, *shape] (`forms` chooses).
- The module's own forward is run on all rows of the cohort, [sites * n, ...], while its calls of linear layers and the
  like are answered by the sites' own versions (`adaptation`). Every adapting parameter must be seen in such a call, and
  no row may depend on another, or the model does not fit (`survey`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedmeta.engines.gradcheck import CHECKED_ROWS, UnprovenError, check, cut, double
from fedmeta.engines.lowrank.adaptation import Adaptation
from fedmeta.engines.lowrank.capture import run_captured
from fedmeta.engines.lowrank.flat_batch import FlatBatch, adjacent, concatenate
from fedmeta.engines.lowrank.minibatch_descent import descend
from fedmeta.engines.lowrank.plan import ParameterPlan, Rates, make_plan, rate_groups
from fedmeta.engines.lowrank.trace import ModuleTrace, trace_module
from fedmeta.engines.misfit import UnsupportedModelError
from fedmeta.engines.weighted_sum import Figures, WeightedSum, stack_path
from fedmeta.learners import FROZEN, THETA, Learner
from fedmeta.learners.learner import trained, with_theta
from fedmeta.learners.local_epochs import LocalEpochs
from fedmeta.learners.local_steps import with_order
from fedmeta.models import FunctionalModel
from fedmeta.models.attention import exact_attention
from fedmeta.problems.supervised import Supervised
from fedmeta.task import Batch, Rows

ESTIMATORS = ("exact", "first-order", "delta", "nothing")
"""What of `learner.estimator` this engine computes."""

_known: WeakKeyDictionary[FunctionalModel, dict[Hashable, ModuleTrace | str]] = WeakKeyDictionary()


def fits(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor] | None = None) -> str | None:
    """Returns why the low-rank form does not fit, or None if it does.

    The model is run on a few rows, and the gradient of two sites compared with the reference loop's, once per model,
    learner and shape of batch.

    Args:
        learner: The learner.
        batch: Tasks like those to come.
        meta_state: The meta-state; None for a new one.
    """
    try:
        plan_of(learner, batch, learner.init(0) if meta_state is None else meta_state)
    except UnsupportedModelError as reason:
        return str(reason)
    return None


def plan_of(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor]) -> ParameterPlan:
    """Returns the form that each parameter takes in the inner loop on support rows.

    Raises:
        UnsupportedModelError: The low-rank form does not fit.
    """
    if not isinstance(learner.problem, Supervised) or not learner.problem.plain:
        raise UnsupportedModelError("its objectives are not those of supervised learning")
    if learner.estimator not in ESTIMATORS:
        raise UnsupportedModelError(f"what {type(learner).__name__} sends is its own")
    if batch.order is not None and learner.estimator == "delta":
        rates = _all_rates(learner, meta_state, batch.order.shape[1] * batch.order.shape[2])
        return _forms(learner, meta_state, batch, batch.order.shape[3], rates, sum(len(r[0][0]) for r in batch))
    rates = _all_rates(learner, meta_state, learner.inner_steps)
    return _forms(learner, meta_state, batch, batch.support[0].shape[1], rates)


def meta_gradients(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor) -> WeightedSum:
    """Returns the cohort's contribution in one batched computation; see `fedmeta.engines.meta_gradients`.

    Raises:
        UnsupportedModelError: The low-rank form does not fit.
    """
    gradient, losses, finite = _finite_sum(learner, meta_state, with_order(learner, batch), weights)
    metrics = {"query_loss": [losses.double()], "finite": [finite.double()]}
    total = {name: gradient[name] for name in trained(meta_state)}
    return WeightedSum(total, float(weights[finite].sum()), metrics)


def evaluate(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Figures:
    """Returns the figures on the query rows after 0 ... `steps` inner steps on support, [sites, steps + 1].

    Raises:
        UnsupportedModelError: The low-rank form does not fit.
    """
    state = {name: value.detach() for name, value in meta_state.items()}
    rates = _all_rates(learner, state, steps)
    problem = learner.problem
    assert isinstance(problem, Supervised)
    support, query = (FlatBatch.of(rows, _dtype(meta_state)) for rows in batch)
    adaptation = _adaptation(learner, leaves(meta_state), batch, batch.support, rates, exact=False)
    path = []
    for step in range(steps + 1):
        with torch.no_grad():
            path.append(query.figures(adaptation.outputs(query), problem))
        if step < steps:
            adaptation.step(support, rates[step])
    return stack_path(path, dim=1)


def _uncaptured(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor) -> WeightedSum:
    """Returns the contribution of sites that are all finite, computed and not replayed."""
    gradient, losses = _weighted_sum(learner, meta_state, batch, weights)
    return WeightedSum(gradient, float(weights.sum()), {"query_loss": [losses]})


def _finite_sum(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Returns the weighted sum over the sites whose loss and gradient are finite, all losses, and which sites are.

    A sum that is not finite shows that some site is to blame: those with such losses are left out first, then halves
    are tried, until each is alone.
    """
    gradient, losses = _replayed_sum(learner, meta_state, batch, weights)
    finite = losses.isfinite()
    if bool(finite.all()) and all(_finite(value) for value in gradient.values()):
        return gradient, losses, finite
    nothing = {name: torch.zeros_like(value) for name, value in gradient.items()}
    if bool(finite.all()):
        if batch.sites == 1:
            return nothing, losses, torch.zeros_like(finite)
        half = batch.sites // 2
        parts = [torch.arange(half), torch.arange(half, batch.sites)]
    else:
        parts = [finite.nonzero().flatten()] if bool(finite.any()) else []
    for part in parts:
        added, _, good = _finite_sum(learner, meta_state, batch.take(part), weights[part])
        nothing = {name: value + added[name] for name, value in nothing.items()}
        finite[part] = good
    return nothing, losses, finite


def _finite(value: Tensor) -> bool:
    return isfinite(value.sum().item()) or bool(value.isfinite().all())


def _replayed_sum(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns `_weighted_sum`, from its second handful of calls on without what chooses its operations."""
    learned = trained(meta_state)

    def compute(*tensors: Tensor) -> list[Tensor]:
        state, own = dict(zip(meta_state, tensors, strict=False)), tensors[len(meta_state) :]
        own_batch = replace(batch, support=own[:3], query=own[3:6], **dict(zip(further, own[7:], strict=True)))
        gradient, losses = _weighted_sum(learner, state, own_batch, own[6])
        return [*(gradient[name] for name in learned), losses]

    further = {n: v for n, v in (("pairs", batch.pairs), ("order", batch.order)) if v is not None}
    inputs = [*meta_state.values(), *batch.support, *batch.query, weights, *further.values()]
    if batch.order is not None:
        # So many steps are one recording each, not one of all.
        *gradient, losses = compute(*inputs)
        return dict(zip(learned, gradient, strict=True)), losses
    *gradient, losses = run_captured(learner.network, (learner, adjacent(*batch), *meta_state), compute, inputs)
    return dict(zip(learned, gradient, strict=True)), losses


def _weighted_sum(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    if learner.estimator in ("exact", "first-order"):
        return _objective_gradient(learner, meta_state, batch, weights, learner.estimator == "exact")
    return _displacement(learner, meta_state, batch, weights)


def _objective_gradient(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor, exact: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns d/d state of sum_i w_i sum_t v_t L_Q,i(phi_i,t), and the losses after the last step [sites]."""
    state = leaves(meta_state)
    value, losses, _ = objective(learner, state, state if exact else meta_state, batch, weights)
    learned = {name: leaf for name, leaf in state.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(value, list(learned.values()), allow_unused=True, materialize_grads=True)
    constant = {name: torch.zeros_like(value) for name, value in trained(meta_state).items() if name not in learned}
    return constant | dict(zip(learned, gradients, strict=True)), losses


def objective(
    learner: Learner,
    state: Mapping[str, Tensor],
    inner: Mapping[str, Tensor],
    batch: Batch,
    weights: Tensor,
    by_site: bool = False,
) -> tuple[Tensor, Tensor, Adaptation]:
    """Returns sum_i w_i sum_t v_t L_Q,i(phi_i,t), a scalar; the losses after the last step [sites]; and the adaptation.

    Args:
        learner: One whose estimator is exact or first-order.
        state: The meta-state, ready to be differentiated by.
        inner: What the inner rates and the weights v_t are read from.
        batch: The sites' tasks.
        weights: w [sites].
        by_site: As for `Adaptation`.
    """
    rates, counts = _all_rates(learner, inner, learner.inner_steps), learner.query_weights(inner)
    support, query = FlatBatch.both(batch, _dtype(state))
    adaptation = _adaptation(learner, state, batch, batch.support, rates, learner.estimator == "exact", by_site)
    total, losses = torch.zeros(()), torch.zeros(())
    for step, count in enumerate(counts):
        if isinstance(count, Tensor) or count != 0 or step == len(rates):
            losses = query.losses(adaptation.outputs(query))
            total = total + count * (losses * weights.to(losses.dtype)).sum()
        if step < len(rates):
            adaptation.step(support, rates[step])
    return total, losses.detach(), adaptation


def _displacement(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns sum_i w_i (theta - phi_i), or zeros for a learner that sends nothing, and the query losses [sites]."""
    adaptation, losses = adapted(learner, meta_state, batch)
    with torch.no_grad():
        moved = adaptation.displacement(weights) if learner.estimator == "delta" else {}
        return with_theta(meta_state, moved), losses


def adapted(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch) -> tuple[Adaptation, Tensor]:
    """Returns the adaptation of a learner that sends what moved, or nothing, and the query losses after it [sites]."""
    if learner.estimator != "delta":
        rates = _all_rates(learner, meta_state, learner.evaluation_steps())
        adaptation = _adaptation(learner, leaves(meta_state), batch, batch.support, rates, exact=False)
        own, query = (FlatBatch.of(rows, _dtype(meta_state)) for rows in batch)
        for step in rates:
            adaptation.step(own, step)
        with torch.no_grad():
            return adaptation, query.losses(adaptation.outputs(query))
    batch = with_order(learner, batch)
    assert batch.order is not None, "what sends a displacement of rows takes them in mini-batches"
    state, forms = leaves(meta_state), plan_of(learner, batch, meta_state)
    adaptation = Adaptation(learner.network, learner.theta(state), forms, batch.sites, exact=False)
    own = FlatBatch.of(concatenate(*batch), _dtype(meta_state), batch.pairs)
    query = FlatBatch.of(batch.query, _dtype(meta_state))
    pull = learner.pull if isinstance(learner, LocalEpochs) else 0.0
    descend(adaptation, own, batch.order, learner.rates(meta_state, 0), learner, pull)
    with torch.no_grad():
        # The query rows are the last of all rows, whose products with shared weights are known.
        query.kept = own.kept_of_last(batch.query[2].shape[1])
        return adaptation, query.losses(adaptation.outputs(query))


def leaves(meta_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the meta-state with every trained tensor ready to be differentiated by."""
    return {
        name: value.detach().requires_grad_(value.is_floating_point() and not name.startswith(FROZEN))
        for name, value in meta_state.items()
    }


def _dtype(meta_state: Mapping[str, Tensor]) -> torch.dtype:
    return next(value.dtype for name, value in meta_state.items() if name.startswith(THETA))


def _all_rates(learner: Learner, meta_state: Mapping[str, Tensor], steps: int) -> list[Rates]:
    return [learner.rates(meta_state, step) for step in range(steps)]


def _adaptation(
    learner: Learner,
    state: Mapping[str, Tensor],
    batch: Batch,
    rows: Rows,
    rates: Sequence[Rates],
    exact: bool,
    by_site: bool = False,
) -> Adaptation:
    forms = _forms(learner, state, batch, rows[0].shape[1], rates)
    return Adaptation(learner.network, learner.theta(state), forms, batch.sites, exact, by_site)


def _forms(
    learner: Learner, state: Mapping[str, Tensor], batch: Batch, rows: int, rates: Sequence[Rates], whole: int = 0
) -> ParameterPlan:
    """Returns the form of each parameter, after a first look at what the model does.

    Raises:
        UnsupportedModelError: The low-rank form does not fit.
    """
    groups = rate_groups(rates)
    x = batch.support[0]
    adapting = frozenset(name for step in groups for name, _ in step)
    key = (type(learner), adapting, x.shape[2:], x.is_floating_point())
    known = _known.setdefault(learner.network, {})
    if key not in known:
        first = cut(batch.take(slice(0, 2))).support[0].flatten(0, 1)[: 2 * CHECKED_ROWS]
        first = first.double().nan_to_num() if first.is_floating_point() else first
        try:
            with exact_attention():
                # Needed by what is checked, and forgotten unless it passes.
                known[key] = trace_module(learner.network, double(learner.theta(state)), adapting, first)
                check(learner, state, batch, _uncaptured, evaluate)
        except UnprovenError:
            del known[key]
            raise
        except UnsupportedModelError as reason:
            known[key] = str(reason)
        except BaseException:
            known.pop(key, None)
            raise
    found = known[key]
    if isinstance(found, str):
        raise UnsupportedModelError(found)
    return make_plan(found, groups, rows, whole)
