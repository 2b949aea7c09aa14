"""What a model does with its parameters, found by running it once on a few rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fedmeta import noise
from fedmeta.engines.lowrank.ops import OPERATIONS, Operands
from fedmeta.engines.misfit import UnsupportedModelError
from fedmeta.models import FunctionalModel, Parameters

METADATA_ONLY = frozenset(
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_leaf")
) | {Tensor.dim, Tensor.size, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__}
"""What may be asked of any parameter: it reads no value."""

DATA_DEPENDENT = frozenset(
    {Tensor.__bool__, Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__int__, Tensor.__float__}
)
"""What makes a model's path depend on its data: sites that go different ways cannot share one batch."""

ROWS_MIX = "a row's outputs depend on the other rows"
"""Why a model does not fit whose padding would change its outputs: no batched form is right for unequal sites."""


@dataclass(frozen=True)
class OpCall:
    """One use of adapting or of constant-shape parameters by a model, in the order of its calls.

    Attributes:
        weight: The weight's name, or None.
        bias: The bias's name, or None.
        kind: What operation it is; see `Operands`.
        adapts: Whether one of these parameters adapts.
        fixed: Whether its input is the same in every inner step: no call before it adapts.
        by_rows: Whether its input has a row for each row of the data; else it is one for all, such as positions.
        rows: How many rows of the input come from one row of the data.
        width: The input's last dimension.
        outputs: The output's last dimension.
        size: The elements of the output for one row of the data.
    """

    weight: str | None
    bias: str | None
    kind: str
    adapts: bool
    fixed: bool
    by_rows: bool
    rows: int
    width: int
    outputs: int
    size: int

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that it uses."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)


@dataclass(frozen=True)
class ModuleTrace:
    """A model's calls, and whether it changes tensors in place."""

    calls: tuple[OpCall, ...]
    in_place: bool


def parameters_in(values: Any, names: Mapping[int, str]) -> Iterator[str]:
    """Yields the names of the parameters among values, also within lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        if id(values) in names:
            yield names[id(values)]
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from parameters_in(value, names)
    elif isinstance(values, dict):
        yield from parameters_in(tuple(values.values()), names)


class _Observer(TorchFunctionMode):
    """Notes every call of an operation of `OPERATIONS` on parameters; refuses every other use of one that adapts."""

    def __init__(self, parameters: Parameters, adapting: frozenset[str], rows: int) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in parameters.items()}
        self.adapting = adapting
        self.rows = rows
        self.calls: list[OpCall] = []
        self.outputs: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DATA_DEPENDENT:
            raise UnsupportedModelError(
                f"the model looks at values ({func.__name__}), so that its path may differ between sites"
            )
        used = set(parameters_in((args, kwargs), self.names))
        if not used or func in METADATA_ONLY:
            return func(*args, **kwargs)
        if func not in OPERATIONS:
            if used & self.adapting:
                name = getattr(func, "__name__", str(func))
                raise UnsupportedModelError(f"parameter {sorted(used & self.adapting)[0]} is used by {name}")
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self._note(OPERATIONS[func](*args, **kwargs), used, result)
        return result

    def _note(self, operands: Operands, used: set[str], result: Tensor) -> None:
        weight, bias = (
            None if value is None else self.names.get(id(value)) for value in (operands.weight, operands.bias)
        )
        if used & self.adapting and (used != {weight, bias} - {None} or (weight is None and bias is not None)):
            raise UnsupportedModelError(f"parameter {sorted(used & self.adapting)[0]} is used in an unusual place")
        x = operands.x
        self.calls.append(
            OpCall(
                weight,
                bias,
                operands.kind,
                bool(used & self.adapting),
                not any(call.adapts for call in self.calls),
                by_rows=x.dim() > 0 and x.shape[0] == self.rows,
                rows=max(1, x.numel() // max(1, x.shape[-1] * self.rows)),
                width=x.shape[-1],
                outputs=result.shape[-1],
                size=result.numel() // self.rows,
            )
        )
        self.outputs.append((result, result._version))


def trace_module(network: FunctionalModel, parameters: Parameters, adapting: frozenset[str], x: Tensor) -> ModuleTrace:
    """Returns what a model does with its parameters.

    Args:
        network: The model.
        parameters: Its parameters.
        adapting: Those that the inner loop moves.
        x: A few rows [n, *shape]; fewer than 3 are repeated, scaled where they are numbers.

    Raises:
        UnsupportedModelError: An adapting parameter is not used, or not by an operation that is known here; or a
        row's outputs
            depend on other rows or on how many there are.
    """
    if 0 < len(x) < 3:
        x = torch.cat([x, *(x * (1 + 0.25 * k) if x.is_floating_point() else x for k in range(1, 3))])
    with torch.no_grad(), noise.asked() as drawn:
        outputs, first = network(parameters, x.clone()), network(parameters, x[:-1].clone())
    if drawn:
        raise UnsupportedModelError("the model draws noise")
    mixed = first.numel() and bool((outputs[:-1] - first).abs().max() > 1e-9 * outputs.abs().max().clamp(min=1e-30))
    if outputs.shape[0] != len(x) or mixed:
        raise UnsupportedModelError(ROWS_MIX)
    calls, in_place = _observe(network, parameters, adapting, x)
    fewer, _ = _observe(network, parameters, adapting, x[:-1])
    if [call.names for call in calls] != [call.names for call in fewer]:
        raise UnsupportedModelError("what the model does depends on how many rows it is given")
    # An input that is not by rows may be as long as one of the two runs, but not as both.
    calls = [replace(call, by_rows=call.by_rows and other.by_rows) for call, other in zip(calls, fewer, strict=True)]
    unseen = adapting - {name for call in calls for name in call.names}
    if unseen:
        raise UnsupportedModelError(f"parameter {sorted(unseen)[0]} is used where it cannot be seen")
    for call in calls:
        if call.adapts and not call.by_rows and call.kind != "lookup":
            raise UnsupportedModelError(f"the input to parameter {call.names[0]} does not have the data's rows first")
    return ModuleTrace(tuple(calls), in_place)


def _observe(
    network: FunctionalModel, parameters: Parameters, adapting: frozenset[str], x: Tensor
) -> tuple[list[OpCall], bool]:
    x = x.clone()
    before = x._version
    with torch.no_grad(), _Observer(parameters, adapting, len(x)) as observer:
        network(parameters, x)
    changed = x._version != before or any(value._version != version for value, version in observer.outputs)
    return observer.calls, changed
