"""A cohort's inner loop: what each adapting parameter has become at each site, without one model per site.

Derivation: see `fedmeta.engines.lowrank.engine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmeta.engines.lowrank.flat_batch import FlatBatch
from fedmeta.engines.lowrank.matmul import products, summed_outer
from fedmeta.engines.lowrank.per_site_forward import CallRecord, LinearRecord, PerSiteForward, same_memory
from fedmeta.engines.lowrank.plan import ParameterPlan
from fedmeta.models import FunctionalModel, Parameters

Rates = Mapping[str, Tensor | float]


@dataclass
class Correction:
    """What the steps so far did to a weight by way of one call: W_i = W + sum_t E_t^T A_t.

    Attributes:
        inputs: A [sites, steps * rows, width], the call's inputs.
        errors: E [sites, steps * rows, outputs], minus the rate times the loss's derivative at the call's outputs.
        slots: Where steps take mini-batches of rows whose inputs are fixed: E with one more row for each site, that of
            none [sites * (rows + 1), calls * outputs].
    """

    inputs: Tensor
    errors: Tensor
    slots: Tensor | None = None

    @classmethod
    def of_rows(cls, rows: FlatBatch, place: int, outputs: int, slots: Tensor) -> Correction:
        """Returns the correction by a call whose inputs on all rows are kept, from its errors so far.

        A row's errors in several epochs add up, since its input is the same in each.
        """
        sites, n = rows.scored.shape
        errors = slots.view(sites, n + 1, -1, outputs)[:, :n].flatten(1, 2)
        return cls(rows.kept[place, "a"], errors, slots)

    def shrunk(self, left: Tensor) -> Correction:
        """Returns the share `left` [sites] of it."""
        slots = None if self.slots is None else (self.slots.view(len(left), -1) * left[:, None]).view_as(self.slots)
        return Correction(self.inputs, self.errors * left[:, None, None], slots)

    def then(self, inputs: Tensor, errors: Tensor, fixed: bool) -> Correction:
        """Returns this and one more step; where the inputs are `fixed`, the errors just add up."""
        if fixed:
            return Correction(self.inputs, self.errors + errors)
        return Correction(torch.cat([self.inputs, inputs], 1), torch.cat([self.errors, errors], 1))


class Adaptation:
    """The parameters of every site of a cohort, from theta on.

    Args:
        network: The model.
        theta: The shared parameters; they require gradients.
        forms: The form that each parameter takes.
        sites: The number of sites.
        exact: Whether the steps stay differentiable with respect to theta.
        by_site: Whether each site's own gradient is wanted. What takes one value per site then starts from a leaf of
            its own, and every product with a shared weight is noted.

    Attributes:
        start: What the values per site start from, by name.
        products: With `by_site`, every differentiable product with a shared weight.
    """

    def __init__(
        self,
        network: FunctionalModel,
        theta: Parameters,
        forms: ParameterPlan,
        sites: int,
        exact: bool,
        by_site: bool = False,
    ) -> None:
        self.network = network
        self.theta = theta
        self.forms = forms
        self.sites = sites
        self.exact = exact
        self.by_site = by_site
        self.corrections: dict[int, Correction] = {}
        self.products: list[LinearRecord] = []
        self.start = {name: theta[name].expand(sites, *theta[name].shape) for name in forms.dense}
        if by_site:
            self.start = {name: value.detach().clone().requires_grad_() for name, value in self.start.items()}
        self.dense = dict(self.start)

    def outputs(self, rows: FlatBatch) -> Tensor:
        """Returns the outputs [sites * n, outputs] of every site's own model on its rows.

        If not `exact`, their derivative with respect to theta is that with respect to the site's own parameters.
        """
        dense = self.dense
        if not self.exact and torch.is_grad_enabled():
            start = self.start if self.by_site else self.theta
            dense = {name: value.detach() + (start[name] - start[name].detach()) for name, value in dense.items()}
        return self._run(rows, dense)[0]

    def step(self, rows: FlatBatch, rates: Rates, left: Tensor | None = None) -> None:
        """Takes one inner step on the rows: phi_i <- phi_i - rate * d L_i / d phi_i at every site.

        Args:
            rows: The rows of all sites.
            rates: The rate of each parameter.
            left: The share of phi_i - theta that a pull to theta leaves each site first [sites]; None for all of it.
        """
        outputs, traces = self._run(rows, self.dense)
        found, moved = self._errors(rows, outputs, traces, rates, left)
        if left is not None:
            self.corrections = {place: own.shrunk(left) for place, own in self.corrections.items()}
        for trace, scaled in found:
            call = self.forms.calls[trace.place]
            inputs = trace.inputs if self.exact else trace.inputs.detach()
            before = self.corrections.get(trace.place)
            if call.fixed and rows.whole is not None:
                width = call.outputs * call.rows
                slots = rows.whole.slots_for(width) if before is None else before.slots
                assert slots is not None
                assert rows.slots is not None
                slots = slots.index_add(0, rows.slots, scaled.reshape(len(rows.slots), -1))
                self.corrections[trace.place] = Correction.of_rows(rows.whole, trace.place, call.outputs, slots)
                continue
            after = before.then(inputs, scaled, call.fixed) if before else Correction(inputs, scaled)
            self.corrections[trace.place] = after
        for name, value in moved.items():
            self.dense[name] = value if self.exact else value.detach().requires_grad_()

    def errors(self, rows: FlatBatch, rates: Rates, left: Tensor | None = None) -> tuple[dict[int, Tensor], Parameters]:
        """Returns what a `step` adds to each call's errors, by place, and what it makes of values per site."""
        found, moved = self._errors(rows, *self._run(rows, self.dense), rates, left)
        return {trace.place: scaled for trace, scaled in found}, moved

    def _errors(
        self, rows: FlatBatch, outputs: Tensor, traces: list[CallRecord], rates: Rates, left: Tensor | None
    ) -> tuple[list[tuple[CallRecord, Tensor]], Parameters]:
        calls = self.forms.calls
        lowrank = [trace for trace in traces if calls[trace.place].weight in rates]
        dense = [name for name in self.dense if name in rates]
        common = common_rate(rates)
        with torch.set_grad_enabled(self.exact):
            gradient = rows.errors(outputs, -1.0 if common is None else -common)
        errors = torch.autograd.grad(
            outputs,
            [*(trace.outputs for trace in lowrank), *(self.dense[name] for name in dense)],
            gradient,
            create_graph=self.exact,
            allow_unused=True,
            materialize_grads=True,
        )
        found = []
        for trace, error in zip(lowrank, errors, strict=False):
            rate = 1.0 if common is not None else rates[str(calls[trace.place].weight)]
            found.append((trace, error if common is not None else error * rate))
        moved = {}
        for name, error in zip(dense, errors[len(lowrank) :], strict=True):
            before = self.dense[name]
            if left is not None:
                share = left.view(-1, *[1] * (before.dim() - 1))
                before = self.theta[name] + share * (before - self.theta[name])
            moved[name] = before + (error if common is not None else error * rates[name])
        return found, {**self.dense, **moved}

    def keep_products(self, rows: FlatBatch) -> None:
        """Keeps a A^T of all rows for each pair of calls of one weight whose inputs are fixed and kept.

        A step on a mini-batch then takes its rows' part.
        """
        calls = self.forms.calls
        places = [
            place for place, call in enumerate(calls) if (place, "a") in rows.kept and call.weight in self.forms.lowrank
        ]
        for place in places:
            for source in places:
                if calls[place].fixed and calls[source].fixed and calls[place].weight == calls[source].weight:
                    inputs, others = rows.kept[place, "a"], rows.kept[source, "a"]
                    known = rows.pairs if source == place and same_memory(inputs, rows.x) else None
                    pairs = products(inputs, others) if known is None else known
                    rows.kept[place, source] = pairs + 1 if calls[place].bias in self.forms.absorbed else pairs

    def displacement(self, weights: Tensor) -> Parameters:
        """Returns the weighted sum over sites of theta - phi_i, for the parameters that adapt.

        Args:
            weights: The weight of each site [sites].
        """
        total: Parameters = {}
        for place, correction in self.corrections.items():
            call = self.forms.calls[place]
            errors = correction.errors * -weights.to(correction.errors.dtype)[:, None, None]
            moved = summed_outer(correction.inputs.flatten(0, 1), errors.flatten(0, 1))
            add_to(total, str(call.weight), moved)
            if call.bias in self.forms.absorbed:
                add_to(total, call.bias, errors.sum((0, 1)))
        for name, value in self.dense.items():
            total[name] = torch.tensordot(weights.to(value.dtype), self.theta[name] - value, dims=1)
        return total

    def _run(self, rows: FlatBatch, dense: Parameters) -> tuple[Tensor, list[CallRecord]]:
        with PerSiteForward(self, rows, dense) as models:
            outputs = self.network(self.theta, rows.x.clone() if self.forms.in_place else rows.x)
        return outputs, models.traces


def common_rate(rates: Rates) -> Tensor | float | None:
    """Returns the one rate of all parameters, or None if they have several."""
    first, *others = rates.values()
    same = all(other is first or (not isinstance(first, Tensor) and other == first) for other in others)
    return first if same else None


def add_to(total: Parameters, name: str, value: Tensor) -> None:
    """Adds a value to the one of that name, where there is one."""
    total[name] = total[name] + value if name in total else value
