"""A new site joins: its rows are read, it adapts, and is shown what that is worth and what to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmeta.adapt.conformal import Sets, make_sets
from fedmeta.adapt.estimate import (
    PERSONAL,
    UNDECIDED,
    NestedCVResult,
    SplitProgress,
    cross_validate,
    ignore_progress,
    leans_on_record,
)
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.intervals import LEVEL, Estimate
from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.rows import SiteRows, read_rows
from fedmeta.data.table_file import site_name
from fedmeta.problems.rows import score
from fedmeta.tables import number

SENSIBLE_ROWS = 20
"""With fewer rows an estimate is vague: nine right of ten may be anything from 61 to 99 %."""


@dataclass(frozen=True)
class Proof:
    """Scores on rows that were set apart.

    Attributes:
        rows: How many.
        before: The global model's score.
        after: That of the model after the steps that cross-validation chose.
        covered: The share of these rows whose prediction set holds the truth; None without sets.
        size: The mean size of their sets, of a number the mean width of the interval.
    """

    rows: int
    before: float
    after: float
    covered: float | None = None
    size: float | None = None


@dataclass(frozen=True)
class Adapted:
    """What came of a site's rows.

    Attributes:
        start: What the run exported.
        name: The site's name: its file's.
        source: Its file's name.
        rows: Its rows.
        judgement: Their verdict.
        model: The site's model.
        test: Scores on test rows; None where there are none.
        warnings: What to know before the model is used, a sentence each.
        date: When, in UTC.
        sets: Its prediction sets; None where several numbers are predicted.
    """

    start: MetaModel
    name: str
    source: str
    rows: SiteRows
    judgement: NestedCVResult
    model: SiteModel
    test: Proof | None
    warnings: tuple[str, ...]
    date: str
    sets: Sets | None = None

    @property
    def advice(self) -> str:
        """One sentence: which model to use, and why."""
        found = self.judgement
        if not self.start.learner.adapts:
            return f"{self.start.name} serves every site with the global model, and so is this."
        here = f"This is the {'personalized' if found.steps else 'global'} model."
        if found.advice == PERSONAL:
            return (
                f"Use the personal model: {found.chosen} inner steps on these rows make it better "
                f"({self.difference}). {here}"
            )
        if found.advice == UNDECIDED and leans_on_record(self.start, found):
            record = self.start.record
            assert record is not None
            return (
                f"The interval on these rows includes 0 ({self.difference}); at the run's {record.sites} "
                f"training sites adapting gained {number(record.gain, sign=True)} on average, and made "
                f"{record.harmed:.0%} of them worse. Use the personal model unless this site must not do worse than "
                f"the global one. {here}"
            )
        if found.advice == UNDECIDED:
            return (
                f"The interval on these rows includes 0 ({self.difference}): keep the global model unless you know "
                f"that this site differs from the others, or further rows show it; --use personal writes "
                f"the other one. {here}"
            )
        if found.chosen:
            return (
                f"Use the global model: {found.chosen} inner steps looked better, but on rows that had no part in that "
                f"choice they made it worse ({self.difference}). {here}"
            )
        return f"Use the global model: adapting to these rows does not make it better. {here}"

    @property
    def difference(self) -> str:
        """How much better the personalized model is on the same rows, with the interval."""
        gain, metric = self.judgement.gain, self.judgement.before.metric
        what = f"reduction of {metric}" if metric == "rmse" else f"gain in {metric}"
        low, high = (number(end, sign=True) for end in (gain.low, gain.high))
        return f"{what} {number(gain.score, sign=True)}, {LEVEL:.0%} interval {low} to {high}"

    def summary(self) -> dict[str, Any]:
        """Returns what the command line prints as JSON."""
        found, test = self.judgement, self.test
        return {
            "run_id": self.start.run_id,
            "learner": self.start.name,
            "digest": self.start.digest,
            "site": self.name,
            "rows": len(self.rows),
            "metric": found.before.metric,
            "level": LEVEL,
            "steps": found.steps,
            "steps_chosen": found.chosen,
            "advice": found.advice,
            "federation": asdict(self.start.record) if self.start.record else None,
            "model": "personal" if found.steps else "global",
            "difference": {
                name: value if np.isfinite(value) else None
                for name, value in (("estimate", found.gain.score), ("low", found.gain.low), ("high", found.gain.high))
            },
            "global": _figures(found.before, test.before if test else None),
            "personalized": _figures(found.after, test.after if test else None),
            "test_rows": test.rows if test else 0,
            "sets": self._sets(),
            "warnings": list(self.warnings),
        }

    def _sets(self) -> dict[str, Any] | None:
        """Returns what is known of the prediction sets, with their coverage and mean size on test rows."""
        if not self.sets:
            return None
        measured = {"test_coverage": self.test.covered, "test_size": self.test.size} if self.test else {}
        finite = {name: value if value is not None and np.isfinite(value) else None for name, value in measured.items()}
        return asdict(self.sets.facts) | {"guarantee": self.sets.facts.guarantee} | finite


def adapt(
    start: MetaModel,
    data: str,
    test: str = "",
    report: SplitProgress = ignore_progress,
    use: str = "advice",
    missing: Sequence[str] = (),
) -> Adapted:
    """Adapts a run's model to a site's rows.

    Args:
        start: What the run leaves.
        data: The site's file.
        test: A file of further rows of the site, which only score the result; "" where there is none.
        report: Takes progress.
        use: Which model the site gets: "advice", "global" or "personal" (see `estimate.cross_validate`).
        missing: Texts that mean a missing value in the files, besides the run's.

    Raises:
        FedmetaError: A file cannot be read, or is not of the run's form.
    """
    rows = read_rows(start, data, missing=missing)
    start = replace(start, form=replace(start.form, classes=rows.classes))
    apart = read_rows(start, test, rows.classes, missing) if test else None
    bare = SiteModel.of(start, start.learner.theta(start.state))
    x, y = bare.prepare(rows.x), start.target.standardize(rows.y)
    y = y.to(x.dtype) if start.form.regression else y
    found = cross_validate(start, x, y, report, use)
    model = SiteModel.of(start, found.parameters)
    sets = make_sets(start, model, rows.x, rows.y)
    tested = None
    if apart:
        chosen = found.parameters if found.steps else start.learner.adapt(start.state, (x, y), found.chosen)
        tested = _test(bare, SiteModel.of(start, chosen), apart)
        if sets:
            covered, size = sets.covered(apart.x, apart.y)
            tested = replace(tested, covered=covered, size=size)
    path = Path(data)
    notes = (*rows.notes, *(apart.notes if apart else ()))
    warnings = (*_warnings(start, rows), *column_warnings(start, rows.x), *notes)
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Adapted(start, site_name(path), path.name, rows, found, model, tested, warnings, date, sets)


def _test(before: SiteModel, after: SiteModel, rows: SiteRows) -> Proof:
    return Proof(len(rows), *(_score(model, rows) for model in (before, after)))


def _score(model: SiteModel, rows: SiteRows) -> float:
    with torch.no_grad():
        outputs = model(rows.x)
    return float(score(outputs, rows.y, torch.ones(len(rows), dtype=outputs.dtype)))


def _warnings(start: MetaModel, rows: SiteRows) -> list[str]:
    warnings = []
    if not start.finished:
        warnings.append(f"The run has not ended: this is its state after round {start.round_number}.")
    if len(rows) < SENSIBLE_ROWS:
        warnings.append(
            f"There are {len(rows)} rows: below about {SENSIBLE_ROWS} neither the choice nor its estimate is reliable."
        )
    if not start.form.regression:
        seen = np.unique(rows.y.numpy())
        absent = [name for code, name in enumerate(rows.classes) if code not in seen]
        if len(seen) == 1:
            warnings.append(
                f'All rows are of class "{rows.classes[int(seen[0])]}": nothing is known about other classes.'
            )
        elif absent and not start.experiment.data.ways:
            warnings.append(f"No row is of class {', '.join(absent[:5])}{' ...' if len(absent) > 5 else ''}.")
    if start.experiment.data.neighbors_alike:
        warnings.append(
            f"Neighboring rows resemble each other (data.split = {start.experiment.data.split}), so that they carry "
            "less information than as many others: the true interval is wider."
        )
    return warnings


FAR = 3.0
"""A column's mean is far from the training sites' from this many of their standard deviations."""


def column_warnings(start: MetaModel, x: Tensor) -> list[str]:
    """Returns the columns of a site that lie far from those of the training sites, or are missing in every row.

    Args:
        start: What the run leaves.
        x: The site's features [n, features], not standardized.
    """
    form, found = start.form, []
    if not form.named or start.mean.numel() != len(form.features):
        return []
    column = {f"{name}={each}": name for name, names in form.categories for each in names}
    mean, scale = start.mean.double().reshape(-1), start.scale.double().reshape(-1)
    for place, feature in enumerate(form.features):
        own = x[:, place].double()
        own = own[~own.isnan()]
        name = column.get(feature, feature)
        if not len(own):
            found.append(f'Column "{name}" is missing in every row: the mean of the training sites stands in for it.')
            continue
        distance = float((own.mean() - mean[place]) / scale[place])
        if feature not in column and len(own) >= 5 and abs(distance) > FAR:
            found.append(
                f'Column "{name}" has mean {float(own.mean()):.4g} here and {float(mean[place]):.4g} at the training '
                f"sites, {abs(distance):.1f} standard deviations apart: convert it if its units are not theirs, such "
                "as kPa for mmHg or mg/dL for mmol/L."
            )
    return list(dict.fromkeys(found))


def _figures(estimate: Estimate, test: float | None) -> dict[str, float | None]:
    values = {"estimate": estimate.score, "low": estimate.low, "high": estimate.high, "test": test}
    return {name: value if value is not None and np.isfinite(value) else None for name, value in values.items()}
