"""What a search may vary: keys of an experiment, each with a range or a list of values.

On the command line a dimension is KEY=LOW:HIGH, KEY=LOW:HIGH:log, or KEY=VALUE,VALUE,...

- `learner.inner_lr=0.01:1:log`: numbers in a range, on a log scale
- `learner.inner_steps=1:10`: integers, since the key takes no others
- `learner.name=maml,anil`: one of some values
- `model.hidden=32,[64,64]`: brackets enclose a value that contains commas
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from optuna import Trial

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment, Scalar

Settings = dict[str, Scalar]
"""Values of some of an experiment's keys, "section.key" to value."""

DIGITS = 3
"""Values drawn from a range are rounded to this many significant digits."""

FACTORS = {
    "learner.mu": 10.0,
    "learner.lam": 10.0,
    "learner.local_lr": 8.0,
    "learner.local_epochs": 3.0,
    "learner.batch_size": 3.0,
}
ROUNDS_FACTOR = 2.0
RATE_FACTOR, DELTA_RATE_FACTOR = 8.0, 3.0
"""How far the default space reaches below and above an experiment's own value: a learner's own keys, the number of
rounds, learning rates, and the server's rate where sites send model deltas (1 is a plain mean of their models)."""

FIXED = (
    "data.source", "data.path", "data.new_sites", "data.test", "data.split", "data.support", "data.positive",
    "data.target", "problem.name", "evaluation.judge", "evaluation.metrics", "evaluation.score",
    "evaluation.validation_sites", "evaluation.tasks", "runtime.seed",
)  # fmt: skip
"""Keys that define the evaluation and therefore must not be tuned."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\s*:\s*({_NUMBER})\s*(:\s*\w*)?")
_COMMAS = re.compile(r"\s*,(?![^\[]*\])\s*")


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    Attributes:
        key: The experiment's key, "section.key".
        low: The smallest value.
        high: The largest value.
        log: Whether values are drawn on a log scale.
        whole: Whether values are integers.
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
        """Returns whether a value lies in the range."""
        return not isinstance(value, bool | str) and self.low <= value <= self.high

    def suggest(self, trial: Trial) -> Scalar:
        """Returns the value that Optuna suggests, rounded."""
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        return rounded(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def __str__(self) -> str:
        return f"{self.key}={self.low:g}:{self.high:g}{':log' if self.log else ''}"


@dataclass(frozen=True)
class Choices:
    """One of some values, which have no order."""

    key: str
    values: tuple[Scalar, ...]

    def holds(self, value: Scalar) -> bool:
        """Returns whether a value is one of them."""
        return value in self.values

    def suggest(self, trial: Trial) -> Scalar:
        """Returns the value that Optuna suggests."""
        return cast(Scalar, trial.suggest_categorical(self.key, self.values))

    def __str__(self) -> str:
        values = (f"[{value}]" if "," in str(value) else str(value) for value in self.values)
        return f"{self.key}={','.join(values)}"


Dimension = Range | Choices


def rounded(value: float) -> float:
    """Returns a value with `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def parse(texts: Sequence[str], experiment: Experiment) -> tuple[Dimension, ...]:
    """Returns the space that `--over` describes.

    Args:
        texts: One text per key, as in the module's description.
        experiment: What is tuned; every end of a range and every choice must be valid in it.

    Raises:
        FedmetaError: A text cannot be read, repeats a key, names one that defines the evaluation, or holds an invalid
            value.
    """
    space = tuple(_dimension(text, experiment) for text in texts)
    keys = [each.key for each in space]
    for key in keys:
        if keys.count(key) > 1:
            raise FedmetaError(f"--over {key}: given twice")
    return space


def _dimension(text: str, experiment: Experiment) -> Dimension:
    key, _, written = (part.strip() for part in text.partition("="))
    if not written or "." not in key:
        raise FedmetaError(f"--over {text}: must be written KEY=LOW:HIGH[:log] or KEY=VALUE,VALUE,...")
    if key in FIXED or key.startswith("tracking."):
        raise FedmetaError(f"--over {key}: cannot be tuned, since it defines the evaluation; set it with --set")
    found = _RANGE.fullmatch(written)
    items = list(found.groups()[:2]) if found else _COMMAS.split(written)
    if "" in items or len(set(items)) < len(items):
        raise FedmetaError(f"--over {text}: a value is missing or given twice")
    if len(items) < 2:
        raise FedmetaError(f"--over {text}: one value leaves nothing to search; set it with --set {key}={written}")
    values = tuple(_value(text, key, item, experiment) for item in items)
    if not found:
        return Choices(key, values)
    low, high = (float(value) for value in values)
    log = (found[3] or "").lstrip(": ")
    if log not in ("", "log"):
        raise FedmetaError(f'--over {text}: "{log}" is not known; a range may end with :log')
    if low >= high:
        raise FedmetaError(f"--over {text}: {items[0]} must be below {items[1]}")
    if log and low <= 0:
        raise FedmetaError(f"--over {text}: a range on a log scale must begin above 0")
    return Range(key, low, high, bool(log), whole=all(isinstance(value, int) for value in values))


def _value(text: str, key: str, item: str, experiment: Experiment) -> Scalar:
    """Returns a value as the experiment holds it."""
    try:
        return experiment.with_overrides([f"{key}={item}"]).params()[key]
    except FedmetaError as error:
        raise FedmetaError(f"--over {text}: {str(error).removeprefix(f'--set {key}={item}: ')}") from None


def default_space(experiment: Experiment) -> tuple[Range, ...]:
    """Returns what is worth tuning of any learner: rates, rounds, and its own weights, rates, epochs and batch size.

    Each range reaches equally far below and above the experiment's own value by factor, so that the middle of the
    space is the experiment as it stands.
    """
    # Both import PyTorch, which takes seconds; the commands that only print settings do not need it.
    from fedmeta.build import DEFAULT_OPTIMIZERS
    from fedmeta.learners import learner_class, settings_of

    learner, server = experiment.learner, experiment.server
    kind = learner_class(learner.name)
    rate = DEFAULT_OPTIMIZERS[kind.update][1] if server.lr == "auto" else server.lr
    ranges = [
        _around("learner.inner_lr", learner.inner_lr, RATE_FACTOR),
        _around("server.lr", rate, RATE_FACTOR if kind.update == "gradient" else DELTA_RATE_FACTOR),
    ]
    if server.rounds:
        ranges.append(_around("server.rounds", server.rounds, ROUNDS_FACTOR))
    names = {key: key.partition(".")[2] for key in FACTORS}
    own = {key: getattr(learner, name) for key, name in names.items() if name in settings_of(kind)}
    return (*ranges, *(_around(key, value, FACTORS[key]) for key, value in own.items() if value > 0))


def _around(key: str, value: float, factor: float) -> Range:
    if isinstance(value, int):
        return Range(key, max(1, round(value / factor)), round(value * factor), log=True, whole=True)
    return Range(key, value / factor, value * factor, log=True)


def with_settings(experiment: Experiment, settings: Mapping[str, Scalar]) -> Experiment:
    """Returns the experiment with these values.

    Raises:
        FedmetaError: A key or value does not exist.
    """
    return experiment.with_overrides([f"{key}={value}" for key, value in settings.items()])


def describe(settings: Mapping[str, Scalar]) -> str:
    """Returns settings as text, such as "inner_lr 0.1, server.lr 0.003"."""
    return ", ".join(f"{short(key)} {shown(value)}" for key, value in settings.items())


def short(key: str) -> str:
    """Returns a key as tables show it: without "learner."."""
    return key.removeprefix("learner.")


def shown(value: Scalar) -> str:
    """Returns a value as tables show it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
