"""Noise that a model draws by keys which the framework gives: dropout, noisy inputs, sampled latents.

A model that drew from torch's generator would have other outputs whenever it is asked, in every process and under every
engine. `noise_key` gives a key for each row of the batch, made of the run's seed, the site, the round, the inner step,
the row's own values and how many keys the objective asked for before: the same noise in a repeated run, on any node,
under any engine, and for a row whatever rows stand beside it. Where a model predicts there is no noise, and no key.

class Noisy(nn.Module):
    def forward(self, x):
        return self.head(fedmeta.noise.dropout(torch.relu(self.body(x)), 0.2))

Draws are stateless 64-bit hashes (the finalizer of SplitMix64: Steele, Lea and Flood, OOPSLA 2014), as
`fedmeta.randomness` has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.randomness import draws, site_keys, torch_seed

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
"""The whole numbers that the values of a row are read as, by their size in bytes."""


@dataclass
class _Stream:
    """The keys of one call of an objective."""

    purpose: str
    drawn: int = 0
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)


_site: ContextVar[Tensor | None] = ContextVar("site", default=None)
_steps: ContextVar[tuple[int, ...]] = ContextVar("steps", default=())
_stream: ContextVar[_Stream | None] = ContextVar("stream", default=None)
_rows: ContextVar[Tensor | None] = ContextVar("rows", default=None)
_asked: ContextVar[list[bool] | None] = ContextVar("asked", default=None)


def noise_key() -> Tensor | None:
    """Returns keys to draw noise from: int64, [n] for the rows of the model's batch, or [] in an own problem.

    Every call within one objective gives another key. None where a model predicts or is scored: there it has no noise.
    """
    asked, stream = _asked.get(), _stream.get()
    if asked is not None:
        asked.append(True)
    if stream is None:
        return None
    stream.drawn += 1
    place = torch_seed(stream.drawn, f"noise/{stream.purpose}/{_steps.get()}")
    site = _site.get()
    key = _mix((torch.zeros((), dtype=torch.int64) if site is None else site) ^ place)
    x = _rows.get()
    return key if x is None else _mix(key.to(x.device) ^ _content(x, stream))


def uniform(key: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns numbers in [0, 1) of shape [*key.shape, *shape] for keys."""
    places = torch.arange(math.prod(shape), device=key.device).reshape(shape) + 1
    bits = _mix(key.reshape(*key.shape, *[1] * len(shape)) + places * _GOLDEN)
    return (((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53).to(dtype or torch.get_default_dtype())


def normal(key: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Returns standard normal numbers of shape [*key.shape, *shape] for keys (Box and Muller 1958)."""
    first, second = (uniform(_mix(key ^ word), *shape, dtype=torch.float64) for word in (1, 2))
    found = (-2 * torch.log1p(-first)).sqrt() * torch.cos(2 * math.pi * second)
    return found.to(dtype or torch.get_default_dtype())


def dropout(x: Tensor, p: float) -> Tensor:
    """Returns x [n, ...] with a share p of its values set to 0 and the others divided by 1 - p; x where it predicts.

    Raises:
        FedmetaError: p is no share below 1, or x does not have the rows of the batch first.
    """
    if not 0 <= p < 1:
        raise FedmetaError(f"fedmeta.noise.dropout: p = {p}: it must be at least 0 and below 1")
    key = noise_key()
    if key is None:
        return x
    if key.dim() and x.shape[:1] != key.shape:
        raise FedmetaError(
            f"fedmeta.noise.dropout: x has shape {tuple(x.shape)}, and the batch {len(key)} rows: rows must come first"
        )
    kept = uniform(key, *x.shape[key.dim() :], dtype=x.dtype) >= p
    return x * kept / (1 - p)


def noise_keys(seed: int, round_number: int, names: Sequence[str]) -> Tensor:
    """Returns the key of each site's noise [sites], int64, in a round of a run; evaluation is round 0."""
    return torch.from_numpy(draws(seed, "noise", round_number, site_keys(names)).view("int64"))


@contextmanager
def at_site(key: Tensor | None) -> Iterator[None]:
    """Within it noise is that of one site in one round: `key` is an int64 tensor []."""
    token = _site.set(key)
    try:
        yield
    finally:
        _site.reset(token)


@contextmanager
def at_step(step: int) -> Iterator[None]:
    """Within it noise is that of one step, from 0, also of a loop within such a step."""
    token = _steps.set((*_steps.get(), step))
    try:
        yield
    finally:
        _steps.reset(token)


@contextmanager
def in_objective(purpose: str) -> Iterator[None]:
    """Within it a model is trained, and draws noise: one call of the objective `purpose`."""
    token = _stream.set(_Stream(purpose))
    try:
        yield
    finally:
        _stream.reset(token)


@contextmanager
def of_rows(x: Tensor) -> Iterator[None]:
    """Within it keys are those of the rows of a model's input [n, *shape]."""
    token = _rows.set(x)
    try:
        yield
    finally:
        _rows.reset(token)


@contextmanager
def asked() -> Iterator[list[bool]]:
    """Gives a list that holds something once a key has been asked for."""
    found: list[bool] = []
    token = _asked.set(found)
    try:
        yield found
    finally:
        _asked.reset(token)


def _mix(keys: Tensor) -> Tensor:
    keys = keys + _GOLDEN
    keys = (keys ^ _shifted(keys, 30)) * _MIX_1
    keys = (keys ^ _shifted(keys, 27)) * _MIX_2
    return keys ^ _shifted(keys, 31)


def _shifted(keys: Tensor, bits: int) -> Tensor:
    """Returns a logical shift to the right: torch's own keeps the sign."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)


def _content(x: Tensor, stream: _Stream) -> Tensor:
    """Returns a key [n] for the values of each row of x [n, *shape], the same wherever the row stands."""
    for known, key in stream.rows:
        if known is x:
            return key
    values = x.detach().reshape(x.shape[0], -1)
    if values.is_floating_point():
        values = (values + 0.0).view(_WORDS[values.element_size()])  # -0.0 and 0.0 are one value
    places = torch.arange(values.shape[1], device=x.device) * _GOLDEN
    key = _mix(_mix(values.to(torch.int64) + places).sum(1))
    stream.rows.append((x, key))
    return key
