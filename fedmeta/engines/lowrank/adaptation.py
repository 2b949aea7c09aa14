"""A cohort's inner loop: what each adapting parameter has become at each site, without one model per site.

Derivation: see `fedmeta.engines.lowrank.engine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmeta.engines.lowrank.flat_batch import FlatBatch
from fedmeta.engines.lowrank.matmul import summed_outer
from fedmeta.engines.lowrank.per_site_forward import PerSiteForward, Product, Trace
from fedmeta.engines.lowrank.plan import ParameterPlan
from fedmeta.models import FunctionalModel, Parameters

Rates = Mapping[str, Tensor | float]


@dataclass
class Correction:
    """What the steps so far did to a weight by way of one call: W_i = W + sum_t E_t^T A_t.

    Attributes:
        inputs: A [sites, steps * rows, width], the call's inputs.
        errors: E [sites, steps * rows, outputs], minus the rate times the loss's derivative at the call's outputs.
        slots: Where the inputs are those of all of a site's rows and steps take mini-batches of them: E with one more
            row for each site, that of none [sites * (rows + 1), calls * outputs].
    """

    inputs: Tensor
    errors: Tensor
    slots: Tensor | None = None

    @classmethod
    def of_batch(
        cls, before: Correction | None, inputs: Tensor, rows: FlatBatch, outputs: int, errors: Tensor
    ) -> Correction:
        """Returns a correction and one more step on a mini-batch of the rows whose inputs are these.

        A row's errors in several epochs add up, since its input is the same in each.
        """
        assert rows.whole is not None
        assert rows.slots is not None
        sites, n = rows.whole.scored.shape
        errors = errors.reshape(len(rows.slots), -1)
        if before is None or before.slots is None:
            slots = errors.new_zeros(sites * (n + 1), errors.shape[1]).index_copy(0, rows.slots, errors)
        else:
            # Rows of a batch are different ones, but for those that are none, whose slot is not read.
            slots = before.slots.index_copy_(0, rows.slots, before.slots.index_select(0, rows.slots) + errors)
        whole = slots.view(sites, n + 1, -1, outputs)[:, :n].flatten(1, 2)
        return cls(inputs, whole, slots)

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
        self.products: list[Product] = []
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

    def step(self, rows: FlatBatch, rates: Rates) -> None:
        """Takes one inner step on the rows: phi_i <- phi_i - rate * d L_i / d phi_i at every site."""
        calls = self.forms.calls
        outputs, traces = self._run(rows, self.dense)
        spans = [trace for trace in traces if calls[trace.place].weight in rates]
        dense = [name for name in self.dense if name in rates]
        common = common_rate(rates)
        with torch.set_grad_enabled(self.exact):
            gradient = rows.errors(outputs, -1.0 if common is None else -common)
        errors = torch.autograd.grad(
            outputs,
            [*(trace.outputs for trace in spans), *(self.dense[name] for name in dense)],
            gradient,
            create_graph=self.exact,
            allow_unused=True,
            materialize_grads=True,
        )
        for trace, error in zip(spans, errors, strict=False):
            call = calls[trace.place]
            scaled = error if common is not None else error * rates[str(call.weight)]
            inputs = trace.inputs if self.exact else trace.inputs.detach()
            before = self.corrections.get(trace.place)
            if call.fixed and rows.whole is not None:
                whole = rows.whole.kept[trace.place, "a"]
                self.corrections[trace.place] = Correction.of_batch(before, whole, rows, call.outputs, scaled)
                continue
            after = before.then(inputs, scaled, call.fixed) if before else Correction(inputs, scaled)
            self.corrections[trace.place] = after
        for name, error in zip(dense, errors[len(spans) :], strict=True):
            moved = self.dense[name] + (error if common is not None else error * rates[name])
            self.dense[name] = moved if self.exact else moved.detach().requires_grad_()

    def descend(self, rows: FlatBatch, order: Tensor, rates: Rates) -> None:
        """Takes one inner step on each mini-batch of an order [sites, epochs, batches, size] of the rows."""
        with torch.no_grad():
            self._run(rows, self.dense)  # keeps what is the same in every step
        for places in order.flatten(1, 2).unbind(1):
            self.step(rows.taken(places), rates)

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

    def _run(self, rows: FlatBatch, dense: Parameters) -> tuple[Tensor, list[Trace]]:
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
