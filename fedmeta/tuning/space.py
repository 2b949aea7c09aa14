"""What a search may try: keys of an experiment, each with a range or a list of values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedmeta.experiment import Experiment, Scalar

Settings = dict[str, Scalar]
"""Values of some of an experiment's keys, "section.key" to value."""

DIGITS = 3
"""Values drawn from a range are rounded to so many significant digits: nobody wants to read or type more."""

PRIMES = (2, 3, 5, 7)

RATE, DISPLACEMENT_RATE, OWN = 8.0, 3.0, 10.0
"""How far the usual space reaches below and above an experiment's own value: learning rates, the server's rate for
displacements (1 is a plain mean of the sites' models), and a learner's other keys."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        key: The experiment's key, "section.key".
        low: The least value.
        high: The greatest value.
        log: Whether factors are alike, and not differences.
        whole: Whether values are whole numbers.
    """

    key: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    def at(self, share: float) -> Scalar:
        """Returns the value at a share of the way from `low` (0) to `high` (1)."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        return round(value) if self.whole else rounded(value)

    def holds(self, value: Scalar) -> bool:
        """Says whether a value lies in the range."""
        return not isinstance(value, bool | str) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choices:
    """One of some values, which have no order."""

    key: str
    values: tuple[Scalar, ...]

    def at(self, share: float) -> Scalar:
        """Returns the value at a share of the way through the list, from 0 to below 1."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def holds(self, value: Scalar) -> bool:
        """Says whether a value is one of them."""
        return value in self.values


Dimension = Range | Choices


def rounded(value: float) -> float:
    """Returns a value with as many digits as one wants to read."""
    return float(f"{value:.{DIGITS}g}")


def usual_space(experiment: Experiment) -> list[Range]:
    """Returns what is worth tuning of any learner: its inner rate, the server's rate, and its own weights and rates.

    Each range lies around the experiment's own value, equally far below and above it by factor, so that the middle of
    the space is the experiment as it stands.
    """
    # PyTorch takes seconds to import, and a command that only reads a search's options needs none of it.
    from fedmeta.build import DEFAULT_OPTIMIZERS
    from fedmeta.learners import learner_class, settings_of

    learner, server = experiment.learner, experiment.server
    kind = learner_class(learner.name)
    rate = DEFAULT_OPTIMIZERS[kind.update][1] if server.lr == "auto" else server.lr
    ranges = [
        _around("learner.inner_lr", learner.inner_lr, RATE),
        _around("server.lr", rate, RATE if kind.update == "gradient" else DISPLACEMENT_RATE),
    ]
    own = {"mu": OWN, "lam": OWN, "local_lr": RATE}
    values = {key: float(getattr(learner, key)) for key in own if key in settings_of(kind)}
    return ranges + [_around(f"learner.{key}", value, own[key]) for key, value in values.items() if value > 0]


def _around(key: str, value: float, factor: float) -> Range:
    return Range(key, value / factor, value * factor, log=True)


def evenly(count: int, dimensions: int = len(PRIMES)) -> list[list[float]]:
    """Returns points [count, dimensions] in the unit cube that cover it evenly, the first one in its middle.

    Multiples, modulo 1, of the square roots of the first primes (Richtmyer 1951). More points are the same ones and
    some more.
    """
    steps = [math.sqrt(prime) for prime in PRIMES[:dimensions]]
    return [[(0.5 + number * step) % 1 for step in steps] for number in range(count)]


def with_settings(experiment: Experiment, settings: Mapping[str, Scalar]) -> Experiment:
    """Returns the experiment with these values.

    Raises:
        FedmetaError: A key or value does not exist.
    """
    return experiment.with_overrides([f"{key}={value}" for key, value in settings.items()])


def words(settings: Mapping[str, Scalar], keys: Sequence[str] = ()) -> str:
    """Returns settings in words, such as "inner_lr 0.1, server.lr 0.003"; some keys alone where they are named."""
    shown = {key: settings[key] for key in (keys or settings)}
    return ", ".join(f"{key.removeprefix('learner.')} {_value(value)}" for key, value in shown.items())


def _value(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
