"""A comparison in words: Markdown for people, JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fedmeta.comparison.results import SCORES, Comparison, interval
from fedmeta.tuning import words


def markdown(comparison: Comparison) -> str:
    """Returns the verdict, the table, and the settings where they were tuned, as Markdown."""
    heads = [
        "learner",
        "seeds",
        "global",
        "personalized",
        "worst tenth",
        "alone",
        "helped",
        "harmed",
        f"against {comparison.baseline}",
    ]
    heads += ["rounds", "MB up", "seconds"]
    lines = [comparison.verdict, "", *_head(heads)]
    for _, row in comparison.table.iterrows():
        cells = [str(row["learner"]), str(int(row["seeds"]))]
        cells += [spread(row[name], row[f"{name}_sd"]) for name in SCORES]
        cells.append(interval(row["difference"], row["low"], row["high"]))
        cells += [f"{row['rounds']:.0f}", f"{row['bytes_up'] / 1e6:.1f}", f"{row['wall_s']:.1f}"]
        lines.append(_row(cells))
    for learner, reason in comparison.left_out.items():
        lines += ["", f"{learner} is left out: {reason}."]
    return "\n".join([*lines, *_settings(comparison)]) + "\n"


def _settings(comparison: Comparison) -> list[str]:
    if not comparison.trials:
        return []
    count = len(next(iter(comparison.trials.values())))
    score = comparison.score.name
    lines = [
        "",
        f"Each learner at the best of {count} settings, the same draw for all, by the mean personalized {score} of "
        "validation sites of the first seed, which were split off its training sites; no new site of that seed was "
        "seen. Other seeds draw other new sites, and some of those had their part in this choice.",
        "",
        *_head(["learner", "best settings", f"{score} there", f"{score} untuned", "tried", "failed", "seconds"]),
    ]
    for learner in comparison.table["learner"]:
        trials = comparison.trials[learner]
        untuned = next((trial.score for trial in trials if trial.untuned), None)
        failed = sum(trial.score is None for trial in trials)
        seconds = sum(trial.seconds for trial in trials)
        cells = [learner, words(trials[0].settings), _score(trials[0].score), _score(untuned)]
        lines.append(_row([*cells, str(len(trials)), str(failed), f"{seconds:.0f}"]))
    return lines


def to_json(comparison: Comparison) -> str:
    """Returns the verdict, the table, the runs, and the trials of settings as one JSON object."""
    table, runs = (json.loads(frame.to_json(orient="records")) for frame in (comparison.table, comparison.runs))
    trials = {learner: [asdict(trial) for trial in tried] for learner, tried in comparison.trials.items()}
    return json.dumps(
        {"verdict": comparison.verdict, "baseline": comparison.baseline, "score": comparison.score.to_json()}
        | {"table": table, "runs": runs, "left_out": dict(comparison.left_out)}
        | {"settings": {learner: tried[0]["settings"] for learner, tried in trials.items()}, "trials": trials}
    )


def write(comparison: Comparison, folder: Path) -> None:
    """Writes comparison.md, comparison.json and sites.parquet (every run's final evaluation) into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.md").write_text(markdown(comparison))
    (folder / "comparison.json").write_text(to_json(comparison) + "\n")
    comparison.sites.to_parquet(folder / "sites.parquet", index=False)


def spread(mean: float, sd: float) -> str:
    """Returns a mean with its standard deviation over seeds in words; without one where there is one seed."""
    return f"{mean:.3f}" if np.isnan(sd) else f"{mean:.3f} ± {sd:.3f}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
