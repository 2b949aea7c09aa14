"""The same small budget of settings for every learner, judged on validation sites of the first seed.

Every learner is tried at the same points of its own space (`fedmeta.tuning.usual_space`), the first of which is the
experiment as it stands, so that tuning can only lose to chance and never to a poor choice of ranges. New sites are left
out of these runs altogether.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Report
from fedmeta.runtime import Result
from fedmeta.tuning import Settings, evenly, usual_space, with_settings, words


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        settings: The values.
        score: The mean personalized score of validation sites; None where the run failed.
        run_id: The run.
        seconds: What it took.
        problem: Why it failed.
        untuned: Whether they are the experiment's own.
    """

    settings: Settings
    score: float | None
    run_id: str = ""
    seconds: float = 0.0
    problem: str = ""
    untuned: bool = False


def candidates(experiment: Experiment, count: int) -> list[Settings]:
    """Returns the settings to try for the experiment's learner; the first one is what the experiment says."""
    space = usual_space(experiment)
    return [{each.key: each.at(share) for each, share in zip(space, point, strict=False)} for point in evenly(count)]


def tried(
    experiment: Experiment,
    count: int,
    folder: Path,
    run: Callable[[Experiment, Report], Result],
    reports: Callable[[str, int], Report],
) -> list[Trial]:
    """Returns every setting's score, the best one first; what was tried before is not tried again.

    Args:
        experiment: The experiment with the learner and the first seed.
        count: How many settings.
        folder: Where trials are kept.
        run: Runs an experiment, or goes on with it where it was interrupted.
        reports: Returns what takes a run's progress, given what is tried in words, and its number from 1.

    Raises:
        FedmetaError: No setting gave a score; the message is the first one's.
    """
    trials = []
    lower_is_better = False
    for number, settings in enumerate(candidates(experiment, count), 1):
        name = f"{experiment.learner.name} · {words(settings)}"
        variant = _variant(experiment, settings, folder, name)
        kept = folder / f"{variant.identity()}.json"
        if kept.exists():
            entry = json.loads(kept.read_text())
        else:
            trial = Trial(settings, None, untuned=number == 1)
            entry = _try(variant, trial, run, reports(f"tune {name}", number))
            if entry["trial"]["score"] is not None:
                folder.mkdir(parents=True, exist_ok=True)
                part = kept.with_suffix(".part")
                part.write_text(json.dumps(entry))
                part.replace(kept)
        trials.append(Trial(**entry["trial"]))
        lower_is_better |= not entry["higher_is_better"]
    if all(trial.score is None for trial in trials):
        raise FedmetaError(trials[0].problem)
    return sorted(trials, key=lambda trial: _rank(trial, lower_is_better))


def _variant(experiment: Experiment, settings: Settings, folder: Path, name: str) -> Experiment:
    """Returns the run that judges settings: on validation sites, at its end alone, with its files among the trials."""
    judged = with_settings(experiment, settings)
    evaluation = judged.evaluation.model_copy(update={"judge": "validation_sites", "every": 0})
    tracking = judged.tracking.model_copy(update={"folder": str(folder), "name": name, "site_curves": 0})
    return judged.model_copy(update={"evaluation": evaluation, "tracking": tracking})


def _try(
    variant: Experiment, trial: Trial, run: Callable[[Experiment, Report], Result], report: Report
) -> dict[str, Any]:
    """Returns what is kept of a trial: its score, and what is scored by."""
    try:
        summary = run(variant, report).summary
    except FedmetaError as error:
        # Settings under which training diverges are a result like any other.
        return {"higher_is_better": True, "trial": asdict(replace(trial, problem=str(error)))}
    score = summary["new_sites"]["personalized"]["mean"]
    problem = "" if score is not None else "no validation site has a score"
    known = replace(trial, score=score, run_id=summary["run_id"], seconds=summary["wall_s"], problem=problem)
    return {"higher_is_better": summary["score"]["higher_is_better"], "trial": asdict(known)}


def _rank(trial: Trial, lower_is_better: bool) -> float:
    if trial.score is None:
        return float("inf")
    return trial.score if lower_is_better else -trial.score


def chosen(trials: Sequence[Trial]) -> Settings:
    """Returns the best settings; none where nothing was tried."""
    return trials[0].settings if trials else {}
