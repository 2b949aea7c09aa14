"""A module's own forward over the rows of a whole cohort, each row with the parameters of its site.

The module's calls of linear layers and the like are answered by the sites' own versions; see
`fedmeta.engines.lowrank.engine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fedmeta.engines.lowrank.flat_batch import FlatBatch, concatenate
from fedmeta.engines.lowrank.matmul import fused_linear, products, traced_linear
from fedmeta.engines.lowrank.ops import OPERATIONS, Operands
from fedmeta.engines.lowrank.trace import OpCall, parameters_in
from fedmeta.engines.misfit import UnsupportedModelError
from fedmeta.models import Parameters

if TYPE_CHECKING:
    from fedmeta.engines.lowrank.adaptation import Adaptation


@dataclass(frozen=True)
class CallRecord:
    """One call in one pass: its place among the calls, its input A and its output z, [sites, rows, *] each."""

    place: int
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class LinearRecord:
    """A product with a shared weight [outputs, width]: of inputs, A W^T, or in an inner step's derivative, E W.

    Attributes:
        place: The call's place among the calls.
        factor: A [sites, rows, width], or E [sites, rows, outputs].
        product: What came out.
        turned: Whether it is E W.
    """

    place: int
    factor: Tensor
    product: Tensor
    turned: bool


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same order, whatever their shapes."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.is_contiguous()


class PerSiteForward(TorchFunctionMode):
    """Within it, a module that is given theta computes each row with the parameters of the row's own site."""

    def __init__(self, adaptation: Adaptation, rows: FlatBatch, dense: Parameters) -> None:
        super().__init__()
        self.adaptation = adaptation
        self.forms = adaptation.forms
        self.names = {id(value): name for name, value in adaptation.theta.items()}
        self.rows = rows
        self.dense = dense
        self.traces: list[CallRecord] = []
        self.place = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in OPERATIONS or next(parameters_in((args, kwargs), self.names), None) is None:
            return func(*args, **kwargs)
        place, operands = self.place, OPERATIONS[func](*args, **kwargs)
        call = self._call(operands)
        self.place += 1
        if not call.adapts and not self._serves_others(place, call, operands.x):
            kept = self.rows.kept.get(place) if call.fixed else None
            result = func(*args, **kwargs) if kept is None else kept
            if call.fixed:
                self.rows.kept[place] = result
        elif call.kind == "linear" and call.weight not in self.dense:
            result = self._linear(place, call, operands)
        else:
            result = self._dense(call, operands)
        return result.clone() if self.forms.in_place else result

    def _call(self, operands: Operands) -> OpCall:
        names = tuple(self.names[id(value)] for value in (operands.weight, operands.bias) if id(value) in self.names)
        if self.place >= len(self.forms.calls) or self.forms.calls[self.place].names != names:
            raise UnsupportedModelError("the model does not always use its parameters in the same order")
        return self.forms.calls[self.place]

    def _linear(self, place: int, call: OpCall, operands: Operands) -> Tensor:
        """Returns x W_i + b_i for each site's rows, with W_i = W + sum_t E_t^T A_t never formed."""
        kept = self.rows.kept
        x, weight, bias = operands.x, operands.weight, operands.bias
        assert weight is not None
        if not (call.fixed and (place, "z") in kept):
            inputs = x.reshape(self.rows.sites, -1, call.width)
            if self._first(call, x):
                self._keep_first(place, call, inputs.shape[1], weight, bias)
            elif call.fixed and self.rows.whole is not None and (place, "z") in self.rows.whole.kept:
                kept[place, "a"], kept[place, "z"] = inputs, self.rows.of_whole((place, "z")).requires_grad_()
            else:
                kept[place, "a"], kept[place, "z"] = inputs, self._shared(place, call, inputs, weight, bias)
        inputs, z = kept[place, "a"], kept[place, "z"]
        for source, correction in self.adaptation.corrections.items():
            if self.forms.calls[source].weight == call.weight:
                pairs = self._pairs(place, source, inputs, correction.inputs)
                z = torch.baddbmm(z, pairs, correction.errors)
        if call.bias in self.dense:
            z = z + self.dense[call.bias].unsqueeze(1)
        if call.weight in self.forms.lowrank:
            self.traces.append(CallRecord(place, inputs, z))
        return z.view(*x.shape[:-1], call.outputs)

    def _shared(self, place: int, call: OpCall, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Returns A W + b [sites, rows, outputs], with the weight of all sites."""
        bias = None if call.bias in self.dense else bias
        rows = inputs.flatten(0, 1)
        if not self.adaptation.by_site:
            return functional.linear(rows, weight, bias).view(self.rows.sites, -1, call.outputs)

        def note(factor: Tensor, product: Tensor, turned: bool) -> Tensor:
            one, other = (value.view(self.rows.sites, -1, value.shape[-1]) for value in (factor, product))
            self.adaptation.products.append(LinearRecord(place, one, other, turned))
            return other

        z = traced_linear(rows, weight, note)
        return z if bias is None else z + bias

    def _serves_others(self, place: int, call: OpCall, x: Tensor) -> bool:
        """Whether the product of a layer that does not adapt is noted, or computed for other rows too."""
        known = (place, "z") in self.rows.kept or self._first(call, x)
        return call.kind == "linear" and (self.adaptation.by_site or known)

    def _first(self, call: OpCall, x: Tensor) -> bool:
        """Whether a call is on the rows themselves, and others of the same sites will be computed too."""
        alone = self.rows.beside is None or self.adaptation.by_site
        return not alone and call.fixed and same_memory(x, self.rows.x)

    def _whole(self, inputs: Tensor) -> bool:
        """Whether a call's inputs are all rows that inner products are known of."""
        return self.rows.beside is None and same_memory(inputs, self.rows.x)

    def _keep_first(self, place: int, call: OpCall, first: int, weight: Tensor, bias: Tensor | None) -> None:
        """Keeps A W + b of the rows, `first` a site, and of those beside them.

        One derivative by the first layer's weight, often the largest, instead of two and their sum.
        """
        rows, beside = self.rows, self.rows.beside
        assert beside is not None
        assert rows.tasks is not None
        x = concatenate(*rows.tasks)[0].to(weight.dtype).reshape(rows.sites, -1, call.width)
        both = fused_linear(x, first, weight, None if call.bias in self.dense else bias)
        for own, inputs, z in zip((rows, beside), (x[:, :first], x[:, first:]), both, strict=True):
            own.kept[place, "a"], own.kept[place, "z"] = inputs, z
        rows.kept[place, "both"] = x

    def _pairs(self, place: int, source: int, inputs: Tensor, others: Tensor) -> Tensor:
        """Returns a A^T, plus 1 where the bias moves with its weight."""
        calls, kept = self.forms.calls, self.rows.kept
        if (place, source) in kept:
            return kept[place, source]
        if self.rows.whole is not None and (place, source) in self.rows.whole.kept:
            return self.rows.of_whole((place, source))
        both = kept.get((place, "both")) if source == place else None
        # For `both` these are the rows themselves.
        known = self.rows.pairs if both is not None or (source == place and self._whole(inputs)) else None
        wanted = others if both is None else both
        pairs = products(inputs, wanted) if known is None else known[:, : inputs.shape[1]]
        if calls[place].bias in self.forms.absorbed:
            pairs = pairs + 1
        if both is not None and self.rows.beside is not None:
            # A wide product at once takes little more than half as long as two narrow ones.
            first = inputs.shape[1]
            self.rows.beside.kept[place, source] = pairs[..., first:].transpose(1, 2)
            pairs = pairs[..., :first]
        if calls[place].fixed and calls[source].fixed:
            kept[place, source] = pairs
        return pairs

    def _dense(self, call: OpCall, operands: Operands) -> Tensor:
        x, sites = operands.x, self.rows.sites
        if not call.by_rows:
            row = x.shape[1:] if x.dim() > 1 and x.shape[0] == 1 else x.shape
            x = x.expand(self.rows.x.shape[0], *row)
        own = [
            None if value is None else self.dense.get(name, value.expand(sites, *value.shape))
            for name, value in ((call.weight or "", operands.weight), (call.bias or "", operands.bias))
        ]
        return operands.per_site(x, own[0], own[1])
