"""A cohort's descent over mini-batches: many small steps, which are recorded once and then replayed.

What a step needs of a layer whose input is fixed is its rows' part of A W + b and of A A^T, both formed once of all
rows of a site, and a sum of errors for each row (`Correction`).
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from fedmeta.engines.lowrank.adaptation import Adaptation, Correction, Rates
from fedmeta.engines.lowrank.capture import run_captured
from fedmeta.engines.lowrank.flat_batch import FlatBatch


def descend(adaptation: Adaptation, rows: FlatBatch, order: Tensor, rates: Rates, key: Hashable) -> None:
    """Takes one inner step on each mini-batch of an order of the rows.

    Args:
        adaptation: What adapts; its steps need not stay differentiable.
        rows: All rows of all sites.
        order: The places of each step's rows [sites, epochs, batches, size], -1 for none.
        rates: The rate of each parameter.
        key: What a step depends on besides tensors.
    """
    calls, forms = adaptation.forms.calls, adaptation.forms
    with torch.no_grad():
        adaptation.outputs(rows)  # keeps what is the same in every step
        adaptation.keep_products(rows)
    steps = rows.minibatches(order.flatten(1, 2))
    low_rank = [place for place, call in enumerate(calls) if call.weight in forms.lowrank]
    if not all(calls[place].fixed for place in low_rank):
        for step in steps:
            adaptation.step(rows.at(*step), rates)
        return
    kept = {name: value for name, value in rows.kept.items() if isinstance(name, tuple)}
    theta, dense = list(adaptation.theta), list(adaptation.dense)
    slots = {place: rows.slots_for(calls[place].outputs * calls[place].rows) for place in low_rank}

    def compute(*tensors: Tensor) -> list[Tensor]:
        left = iter(tensors)
        step = next(left), next(left), next(left)
        whole = FlatBatch(next(left), next(left), next(left), next(left))
        whole.kept.update({name: next(left) for name in kept})
        own = Adaptation(adaptation.network, {name: next(left) for name in theta}, forms, adaptation.sites, exact=False)
        own.dense = {name: next(left).detach().requires_grad_() for name in dense}
        for place in low_rank:
            own.corrections[place] = Correction.of_rows(whole, place, calls[place].outputs, next(left))
        errors, moved = own.errors(whole.at(*step), rates)
        return [*(errors[place].contiguous() for place in low_rank), *moved.values()]

    fixed = [rows.x, rows.y, rows.scored, rows.counted, *kept.values()]
    fixed += [value.detach() for value in adaptation.theta.values()]
    key = (key, forms, *kept, tuple(rates.items()))
    for step in steps:
        values = [value.detach() for value in adaptation.dense.values()]
        found = run_captured(adaptation.network, key, compute, [*step, *fixed, *values, *slots.values()])
        for place, errors in zip(low_rank, found, strict=False):
            # Rows of a batch are different ones, but for those that are none, whose slot is not read.
            own, at = slots[place], step[1]
            own.index_copy_(0, at, own.index_select(0, at) + errors.view(len(at), -1))
        moved = zip(dense, found[len(low_rank) :], strict=True)
        adaptation.dense |= {name: value.detach().requires_grad_() for name, value in moved}
    for place in low_rank:
        adaptation.corrections[place] = Correction.of_rows(rows, place, calls[place].outputs, slots[place])
