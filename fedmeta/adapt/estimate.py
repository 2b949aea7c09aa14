"""How far a new site should adapt, and how good that makes its model, both from the same few labelled rows.

The number of inner steps is chosen by cross-validation on the rows (`fedmeta.engines.step_selection`): zero, the
usual number or
more. Any number need beat the usual one by one standard error only, for there is no other evidence. The figures
of that cross-validation favour the choice that it made, so they are no estimate. The estimate comes from a second
cross-validation around the first: a part of the rows is set aside, the others choose their own number of steps and
adapt, and the rows set aside score the result (Varma and Simon, BMC Bioinformatics 7:91, 2006). Each row is so scored
by a model that neither adapted nor chose on it, and that had nearly as many rows as the final one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta import engines
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.intervals import Estimate, Gain, accuracy, paired_gain, rmse, shared_excess
from fedmeta.data.stratified import stratified
from fedmeta.engines.step_selection import FOLDS, choose_steps, last_good_steps
from fedmeta.engines.weighted_sum import Figures
from fedmeta.learners import Learner
from fedmeta.models import Parameters
from fedmeta.problems.row_metrics import BUILT_IN, in_original_units
from fedmeta.problems.supervised import OUTPUTS
from fedmeta.randomness import row_draws, site_keys
from fedmeta.targets import TargetScale
from fedmeta.task import Batch, Rows, Task, stack

SplitProgress = Callable[[int, int], None]
"""Takes how many of how many choices are made."""


def ignore_progress(done: int, count: int) -> None:
    """Takes progress and shows nothing."""


MIN_SCORED_ROWS = 20
"""Into how many parts rows are set aside in turn: with more, each model has nearly as many rows as the final one."""

MANY_ROWS = 1000
"""From how many rows on twice as many of them may be set aside at a time."""

MARGIN = 1.0
"""By how many standard errors any number of steps must beat the usual one."""

LONGEST = 2
"""How many times the run's own number of inner steps a site may take, as in a run's automatic schedule."""

GROUP_VALUES = 1 << 24
"""How many features are adapted on at once while steps are chosen: 64 MB."""


PERSONAL, GLOBAL, UNDECIDED = "personal", "global", "undecided"
"""What a site is advised to use; undecided = the interval of the difference includes 0."""


@dataclass(frozen=True)
class NestedCVResult:
    """What the rows show.

    Attributes:
        steps: The inner steps that the site's model takes; 0 for the global model.
        chosen: The inner steps that cross-validation chose, before they had to prove themselves.
        before: The global model's score.
        after: The score of the model after `chosen` steps; that of the global model where it is 0.
        gain: How much better the latter is, paired by rows.
        parameters: The site's own parameters, after `steps` steps on all rows.
    """

    steps: int
    chosen: int
    before: Estimate
    after: Estimate
    gain: Gain
    parameters: Parameters

    @property
    def advice(self) -> str:
        """What the rows show: "personal" or "global" where the interval excludes 0, else "undecided"."""
        if not self.chosen or self.gain.high < 0:
            return GLOBAL
        return PERSONAL if self.gain.low > 0 else UNDECIDED

    @property
    def best(self) -> Estimate:
        """The score of the site's model."""
        return self.after if self.steps else self.before


def cross_validate(
    start: MetaModel, x: Tensor, y: Tensor, report: SplitProgress = ignore_progress, use: str = "advice"
) -> NestedCVResult:
    """Chooses how far a site adapts, and estimates what that does.

    Args:
        start: What the run leaves for new sites.
        x: Standardised features [n, *shape].
        y: Codes of classes [n], or targets in standard units [n] or [n, targets].
        report: Takes progress.
        use: Which model the site gets: "advice" (the personalized one where the interval of its gain lies above 0,
            or where the rows do not decide and `leans_on_record`), "global" or "personal".
    """
    learner, state = start.learner, start.state
    cv = _NestedCV.of(start, x, y)
    parts = cv.parts()
    others = [np.flatnonzero(parts != part) for part in range(parts.max() + 1)]
    chosen, *inner = cv.choices([np.arange(len(y)), *others], report)
    chosen = cv.last_good_step(chosen)
    score = rmse if start.form.regression else accuracy
    before, after = cv.set_aside(parts, inner)
    rows, excess = np.bincount(parts), shared_excess(np.bincount(parts))
    unadapted, adapted = score(before, rows), score(after, rows, excess)
    adapted = adapted if chosen else unadapted
    gain = paired_gain(unadapted.metric, before, after if chosen else before, rows, excess)
    found = NestedCVResult(0, chosen, unadapted, adapted, gain, {})
    personal = use == PERSONAL or (use == "advice" and (found.advice == PERSONAL or leans_on_record(start, found)))
    steps = chosen if personal else 0
    own = learner.adaptation_path(state, (x, y), steps)[-1]
    return replace(found, steps=steps, parameters={name: value.detach() for name, value in own.items()})


def leans_on_record(start: MetaModel, found: NestedCVResult) -> bool:
    """Returns whether a site whose own rows do not decide gets the personalized model for what it did elsewhere.

    It does where adapting made the run's training sites better on average, beyond chance, and the site's own estimate
    is not worse: twenty rows alone can prove a gain of a few points at hardly any site, though most sites have it. With
    fewer rows than those sites adapted on, its own estimate must be better (on ten rows each, new writers lost .004).
    """
    if found.advice != UNDECIDED or start.record is None or not start.record.helps:
        return False
    data = start.experiment.data
    usual = data.ways * data.shots if data.ways else data.support
    return found.gain.score > 0 or (found.gain.score == 0 and found.before.rows >= usual)


def choose(start: MetaModel, x: Tensor, y: Tensor) -> int:
    """Returns the number of inner steps that rows choose, without an estimate of what that does."""
    cv = _NestedCV.of(start, x, y)
    return cv.last_good_step(cv.choices([np.arange(len(y))])[0])


@dataclass(frozen=True)
class _NestedCV:
    """A site's rows, in the order in which they are dealt to folds, and who adapts on them.

    Attributes:
        learner: The learner.
        state: The meta-state.
        x: Standardised features [n, *shape].
        y: Codes of classes or numbers [n].
        most: The most inner steps that may be chosen.
        blocks: Whether neighbouring rows resemble each other, so that a fold is a run of neighbours.
        target: What targets of a regression are standardized by.
    """

    learner: Learner
    state: dict[str, Tensor]
    x: Tensor
    y: Tensor
    most: int
    blocks: bool
    target: TargetScale = field(default_factory=TargetScale)

    @classmethod
    def of(cls, start: MetaModel, x: Tensor, y: Tensor) -> _NestedCV:
        learner, blocks = start.learner, start.experiment.data.neighbors_alike
        order = torch.from_numpy(np.arange(len(y)) if blocks else _spread(y, start.experiment.runtime.seed))
        most = learner.evaluation_steps(LONGEST * max(start.steps, learner.inner_steps))
        return cls(learner, start.state, x[order], y[order], most, blocks, start.target)

    def parts(self) -> NDArray[np.int64]:
        """Returns in which part each row is set aside [n]."""
        rows = len(self.y)
        count = min(rows, MIN_SCORED_ROWS if rows < MANY_ROWS else MIN_SCORED_ROWS // 2)
        if not self.blocks:
            return np.arange(rows) % count
        return np.repeat(np.arange(count), [len(part) for part in np.array_split(np.arange(rows), count)])

    def choices(self, sets: list[NDArray[np.int64]], report: SplitProgress = ignore_progress) -> list[int]:
        """Returns the number of steps that each set of rows (indices, in order) chooses."""
        if not self.most:
            return [0] * len(sets)
        longest = max(1, max(map(len, sets)))
        together = max(1, GROUP_VALUES // (FOLDS * longest * max(1, self.x[0].numel())))
        steps: list[int] = []
        for start in range(0, len(sets), together):
            support = self._padded(sets[start : start + together], longest)
            steps += choose_steps(self._evaluate, support, self.most // LONGEST, margin=MARGIN, between=MARGIN).tolist()
            report(len(steps), len(sets))
        return steps

    def last_good_step(self, chosen: int) -> int:
        """Returns the chosen number of steps, or fewer where the rows' own loss blows up on the way there."""
        rows = (self.x[None], self.y[None], torch.ones(1, len(self.y), dtype=self._kind))
        return int(last_good_steps(self._evaluate, rows, torch.tensor([chosen]))[0])

    def set_aside(self, parts: NDArray[np.int64], steps: list[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns each part's score [parts] before and after adapting on all other parts, by their own steps.

        Of a regression the RMSE in the targets' own units.
        """
        rows = self.x, self.y, torch.ones(len(self.y), dtype=self._kind)
        tasks = [_task(rows, torch.from_numpy(parts == part)) for part in range(len(steps))]
        scores = np.empty((len(tasks), self.most + 1))
        together = max(1, GROUP_VALUES // (len(self.y) * max(1, self.x[0].numel())))
        for start in range(0, len(tasks), together):
            group = slice(start, start + together)
            batch = stack(tasks[group])
            found = self._evaluate(batch)
            if self.score == "rmse":
                outputs, (_, y, mask) = found[OUTPUTS], batch.query
                found = in_original_units(outputs, y, mask, self.target, [BUILT_IN["rmse"]])[0]
            scores[group] = found[self.score].double().numpy()
        return scores[:, 0], scores[np.arange(len(steps)), steps]

    def _evaluate(self, folds: Batch) -> Figures:
        return engines.evaluate(self.learner, self.state, folds, steps=self.most)

    def _padded(self, sets: list[NDArray[np.int64]], length: int) -> Rows:
        """Returns x [sets, length, *shape], y and mask [sets, length] of sets of rows."""
        index = torch.from_numpy(np.stack([np.pad(own, (0, length - len(own))) for own in sets]))
        present = torch.from_numpy(np.stack([np.arange(length) < len(own) for own in sets]))
        y = self.y[index] * present.reshape(*present.shape, *[1] * (self.y.dim() - 1))
        return self.x[index], y, present.to(self._kind)

    @property
    def score(self) -> str:
        """The figure that rows are scored by: accuracy, or RMSE for regression."""
        return "rmse" if self.y.is_floating_point() else "accuracy"

    @property
    def _kind(self) -> torch.dtype:
        return self.x.dtype if self.x.is_floating_point() else torch.float32


def _task(rows: Rows, held: Tensor) -> Task:
    """Returns the task whose query is the rows `held` [n], and whose support is all others."""
    x, y, mask = rows
    # Masked and not left out: of a single row nothing would be left.
    return Task((x, y, mask * ~held), (x[held], y[held], mask[held]))


def _spread(y: Tensor, seed: int) -> NDArray[np.int64]:
    """Returns an order of rows in which each class is spread evenly."""
    labels = np.zeros(len(y), dtype=np.int64) if y.is_floating_point() else y.numpy()
    own = np.zeros(len(y), dtype=np.int64)
    drawn = row_draws(seed, "adapt", 0, site_keys([""]).repeat(len(y)), np.arange(len(y)))
    return np.argsort(stratified(labels, own, drawn, seed, "adapt"), kind="stable")
