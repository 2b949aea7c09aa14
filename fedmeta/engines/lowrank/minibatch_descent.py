"""A cohort's descent over mini-batches: many small steps, which are recorded once and then replayed.

What a step needs of a layer whose input is fixed is its rows' part of A W + b and of A A^T, both formed once of all
rows of a site, and a sum of errors for each row (`Correction`).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from fedmeta.engines.lowrank.adaptation import Adaptation, Correction, Rates, common_rate
from fedmeta.engines.lowrank.capture import run_captured
from fedmeta.engines.lowrank.flat_batch import FlatBatch


def descend(
    adaptation: Adaptation, rows: FlatBatch, order: Tensor, rates: Rates, key: Hashable, pull: float = 0.0
) -> None:
    """Takes one inner step on each mini-batch of an order of the rows.

    With a pull to theta a step is theta + (1 - rate * pull) (phi - theta) - rate * gradient: what the steps before did
    shrinks, in both forms, at the sites that take the step.

    Args:
        adaptation: What adapts; its steps need not stay differentiable.
        rows: All rows of all sites.
        order: The places of each step's rows [sites, epochs, batches, size], -1 for none.
        rates: The rate of each parameter.
        key: What a step depends on besides tensors.
        pull: The weight of 1 / 2 * |phi - theta|^2 in what a step descends.
    """
    calls, forms = adaptation.forms.calls, adaptation.forms
    with torch.no_grad():
        adaptation.outputs(rows)  # keeps what is the same in every step
        adaptation.keep_products(rows)
    order = order.flatten(1, 2)
    steps, left = rows.minibatches(order), _left_over(rows, order, rates, pull)
    low_rank = [place for place, call in enumerate(calls) if call.weight in forms.lowrank]
    if not all(calls[place].fixed for place in low_rank):
        for step, share in zip(steps, left, strict=True):
            adaptation.step(rows.at(*step), rates, share)
        return
    kept = {name: value for name, value in rows.kept.items() if isinstance(name, tuple)}
    theta, dense = list(adaptation.theta), list(adaptation.dense)
    slots = {place: rows.slots_for(calls[place].outputs * calls[place].rows) for place in low_rank}

    def compute(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        step = next(given), next(given), next(given)
        share = next(given) if pull else None
        whole = FlatBatch(next(given), next(given), next(given), next(given))
        whole.kept.update({name: next(given) for name in kept})
        shared = {name: next(given) for name in theta}
        own = Adaptation(adaptation.network, shared, forms, adaptation.sites, exact=False)
        own.dense = {name: next(given).detach().requires_grad_() for name in dense}
        for place in low_rank:
            own.corrections[place] = Correction.of_rows(whole, place, calls[place].outputs, next(given))
        errors, moved = own.errors(whole.at(*step), rates, share)
        return [*(errors[place].contiguous() for place in low_rank), *moved.values()]

    fixed = [rows.x, rows.y, rows.scored, rows.counted, *kept.values()]
    fixed += [value.detach() for value in adaptation.theta.values()]
    key = (key, forms, *kept, tuple(rates.items()))
    for step, share in zip(steps, left, strict=True):
        shares = [] if share is None else [share]
        values = [value.detach() for value in adaptation.dense.values()]
        found = run_captured(adaptation.network, key, compute, [*step, *shares, *fixed, *values, *slots.values()])
        for place, errors in zip(low_rank, found, strict=False):
            # Rows of a batch are different ones, but for those that are none, whose slot is not read.
            own, at = slots[place], step[1]
            if share is not None:
                own.view(len(share), -1).mul_(share[:, None])
            own.index_copy_(0, at, own.index_select(0, at) + errors.view(len(at), -1))
        moved = zip(dense, found[len(low_rank) :], strict=True)
        adaptation.dense |= {name: value.detach().requires_grad_() for name, value in moved}
    for place in low_rank:
        adaptation.corrections[place] = Correction.of_rows(rows, place, calls[place].outputs, slots[place])


def _left_over(rows: FlatBatch, order: Tensor, rates: Rates, pull: float) -> list[Tensor | None]:
    """Returns of each step the share of phi - theta that the pull leaves each site [sites]; None without a pull."""
    if not pull:
        return [None] * order.shape[1]
    rate = common_rate(rates)
    assert rate is not None, "what sends a displacement of rows has one rate"
    there = (rows.scored > 0).gather(1, order.clamp(min=0).flatten(1)).view_as(order) & (order >= 0)
    steps = there.any(2).to(rows.counted.dtype).T.contiguous()
    return list(1 - steps * (rate * pull))
