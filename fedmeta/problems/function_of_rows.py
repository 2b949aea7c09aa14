"""Whether a model is a function of its rows: the same outputs for a row at all times and beside any other rows.

A row's outputs that depend on other rows leak test rows and change with padding; noise of torch's own generator differs
between processes and engines; a buffer that forward changes is lost or leaks from site to site. Each is refused once,
before the first gradient, for every engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmeta.errors import FedmetaError
from fedmeta.models.attention import exact_attention
from fedmeta.noise import in_objective
from fedmeta.problems.problem import Parameters
from fedmeta.problems.supervised import Supervised

TOLERANCE, TOLERANCE_FLOAT32 = 1e-7, 1e-4
"""How far outputs may differ, relative to the largest: by rounding alone, in float64 and where a model has less."""

ROWS = 6
"""How many rows are tried."""


def check_model(problem: Supervised, parameters: Parameters, x: Tensor) -> tuple[int, ...]:
    """Checks that a model's outputs are a function of each row alone, and that it changes nothing.

    Args:
        problem: The problem.
        parameters: All parameters, frozen ones and buffers included.
        x: Some rows [n, *shape].

    Returns:
        The shape of one row's outputs.

    Raises:
        FedmetaError: They are not; the message has the reason.
    """
    parameters = {n: v.detach().double() if v.is_floating_point() else v.detach() for n, v in parameters.items()}
    x = _varied(problem, parameters, x.detach()[:ROWS])
    kept = {name: value.clone() for name, value in parameters.items()}
    name = type(problem.network.module).__name__
    outputs = None
    for trains in (False, True):
        outputs = _check_outputs(problem, parameters, x, name, trains)
        for key, value in parameters.items():
            if not torch.equal(value.nan_to_num(), kept[key].nan_to_num()):
                raise FedmetaError(
                    f'model {name} changes "{key}" when it is run, which would be lost or leak from site to site: '
                    "keep what forward computes in local variables"
                )
    _check_buffers(problem.network.module, parameters, x, name)
    assert outputs is not None
    return tuple(outputs.shape[1:])


def _check_outputs(problem: Supervised, parameters: Parameters, x: Tensor, name: str, trains: bool) -> Tensor:
    """Checks outputs as they are predicted, or as they are trained on: there a model may draw noise by keys."""

    def outputs_of(rows: Tensor, differentiated: bool = False) -> Tensor:
        own = {name: value.detach() for name, value in parameters.items()}
        for key in problem.network.names:
            own[key].requires_grad_(differentiated)
        with torch.set_grad_enabled(differentiated), exact_attention():
            if not trains:
                return problem.predict(own, rows.clone()).detach()
            with in_objective("inner"):
                return problem.predict(own, rows.clone()).detach()

    state = torch.get_rng_state()
    outputs = outputs_of(x)
    if outputs.shape[:1] != x.shape[:1]:
        raise FedmetaError(
            f"model {name} returned outputs of shape {tuple(outputs.shape)} for {len(x)} rows: the first dimension "
            "must be the rows"
        )
    if not torch.equal(state, torch.get_rng_state()) or not _same(outputs, outputs_of(x)):
        torch.set_rng_state(state)
        raise FedmetaError(
            f"model {name} draws random numbers in forward (dropout, noise): its outputs differ whenever it is asked, "
            "between processes and between engines; draw by fedmeta.noise_key, such as fedmeta.noise.dropout"
        )
    if not _same(outputs, outputs_of(x, differentiated=True)):
        raise FedmetaError(
            f"model {name} has other outputs where it is differentiated than where it is evaluated: what is trained "
            "would not be what is evaluated"
        )
    try:
        alone = torch.cat([outputs_of(x[k : k + 1]) for k in range(len(x))])
        others = [outputs_of(x.flip(0)).flip(0), torch.cat([outputs_of(x[:-1]), outputs[-1:]])]
    except FedmetaError as error:
        raise FedmetaError(
            f"model {name} takes {len(x)} rows and fails on fewer, so that a row's outputs depend on the other rows: "
            f"normalize by GroupNorm or LayerNorm in place of batch statistics ({error})"
        ) from None
    if not all(_same(outputs, other) for other in (alone, *others)):
        raise FedmetaError(
            f"model {name}: a row's outputs depend on the other rows of the batch, which would leak test rows: "
            "normalize by GroupNorm or LayerNorm in place of batch statistics, and let no row look at another"
        )
    return outputs


def _check_buffers(module: nn.Module, parameters: Parameters, x: Tensor, name: str) -> None:
    """Checks that forward assigns no buffer: a new one would be dropped after the call."""
    given: dict[str, Tensor] = dict(parameters)

    def compare(ran: nn.Module, _: object, __: object) -> None:
        for key, value in ran.named_buffers():
            if key in given and value is not given[key]:
                raise FedmetaError(
                    f'model {name} assigns its buffer "{key}" in forward, which has no effect on later calls: '
                    "keep what forward computes in local variables"
                )

    x = x.to(_dtype(parameters)) if x.is_floating_point() else x
    handle = module.register_forward_hook(compare)
    try:
        with torch.no_grad(), exact_attention():
            functional_call(module, given, (x.clone(),))
    finally:
        handle.remove()


def _varied(problem: Supervised, parameters: Parameters, x: Tensor) -> Tensor:
    """Returns rows that differ, with shifted ones where the model takes them: mixing would hide in equal rows."""
    if not x.is_floating_point():
        return x
    x = x.double().nan_to_num()
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)
    more = torch.cat([x, x + (x.std() if x.numel() > 1 else x.new_zeros(())).clamp(min=0.1) * shift])
    try:
        with torch.no_grad(), exact_attention():
            problem.predict(parameters, more.clone())
    except FedmetaError:  # such as a number that is a code to look up
        return x
    return more


def _dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    return next(value.dtype for value in parameters.values() if value.is_floating_point())


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = TOLERANCE if one.dtype == torch.float64 else TOLERANCE_FLOAT32
    one, other = one.double().nan_to_num(), other.double().nan_to_num()
    return bool((one - other).abs().max() <= tolerance * one.abs().max().clamp(min=1e-30)) if one.numel() else True
