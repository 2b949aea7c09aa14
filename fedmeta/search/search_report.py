"""A search as Markdown, as JSON, as an experiment to run, as pictures, and as one run in MLflow."""

from __future__ import annotations

import json
import textwrap
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from optuna import Study

from fedmeta.search.comparison import interval, significance
from fedmeta.search.privacy_spent import privacy_spent
from fedmeta.search.results import StudyResult
from fedmeta.search.space import describe, short, shown
from fedmeta.search.study import SearchConfig, load_study
from fedmeta.search.trial import Trial
from fedmeta.tables import markdown_table, number
from fedmeta.tracking.description import data_name
from fedmeta.tracking.metrics import metric_suffixes
from fedmeta.tracking.parent_run import ParentRun, parent_run

SECTION = "search"
MAX_ROWS = 12
"""How many trials a page shows; of more, the best ones."""


def verdict(result: StudyResult) -> str:
    """Returns in a sentence or two what was found, and what it is worth."""
    best, baseline = result.best, result.baseline
    spent = privacy_spent(result.config.experiment, [result.config.folder])
    privacy = f" {spent}" if spent else ""
    text = f"Best of {len(result.trials)} trials by {result.config.sampler}: {describe(best.settings)}"
    text += f" ({result.score.name} {number(best.score)} on validation sites"
    if best.untuned:
        return f"{text}): the experiment's own settings; no trial did better.{privacy}"
    text += f"; {number(baseline.score)} with the experiment's own)." if baseline else ")."
    if final := result.final:
        gain, low, high = final.difference
        text += f" On new sites {number(final.best)} against {number(final.baseline)}: {significance(low, high)}, "
        text += f"{interval(gain, low, high)}, {final.seeds} seed{'s' if final.seeds > 1 else ''}."
    return text + privacy


def markdown(result: StudyResult) -> str:
    """Returns the verdict, the best trials and the importance of keys as Markdown."""
    space, score = result.config.space, result.score
    unit = f" ({score.unit})" if score.unit else ""
    heads = [f"{score.name}{unit}", *(short(each.key) for each in space), "state"]
    states = [each.state for each in result.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines = [verdict(result), "", *markdown_table(heads, [cells(each, result) for each in shown_trials(result)]), ""]
    lines.append(
        f"{counts}, {result.wall_s:.0f} s in total. Scored on validation sites, split off the training sites "
        f"({'higher' if score.higher_is_better else 'lower'} is better); new sites took no part."
    )
    if result.importance:
        shares = [[short(key), f"{share:.0%}"] for key, share in result.importance.items()]
        lines += ["", *markdown_table(["key", "share of the variance that it explains"], shares)]
    if final := result.final:
        rows = [
            ["best", number(final.best_global), number(final.best), ""],
            ["experiment's own", number(final.baseline_global), number(final.baseline), ""],
            ["difference", "", "", interval(*final.difference)],
            ["difference, the search's own seed", "", "", interval(*final.first_seed)],
        ]
        lines += ["", *markdown_table(["on new sites", "global", "personalized", "95 % interval over sites"], rows)]
    return "\n".join([*lines, "", "Searched: " + "; ".join(f"`{each}`" for each in space) + "."]) + "\n"


def shown_trials(result: StudyResult, most: int = MAX_ROWS) -> list[Trial]:
    """Returns the best trials, and the baseline's where it is not among them."""
    best, baseline = result.completed[:most], result.baseline
    return [*best, baseline] if baseline and baseline not in best else best


def cells(trial: Trial, result: StudyResult) -> list[str]:
    """Returns a trial's row: score, settings, state."""
    settings = [shown(trial.settings[each.key]) for each in result.config.space]
    return [number(trial.score), *settings, "experiment's own" if trial.untuned else trial.state]


def to_json(result: StudyResult) -> str:
    """Returns the best settings, their score, every trial, and how they do on new sites as one JSON object."""
    value: dict[str, Any] = {
        "sampler": result.config.sampler,
        "score": result.score.to_json(),
        "best": _entry(result.best),
        "own": _entry(result.baseline) if result.baseline else None,
        "new_sites": _final_entry(result),
        "importance": result.importance,
        "wall_s": round(result.wall_s, 3),
        "experiment": str(result.config.folder / "best.toml"),
        "trials": [asdict(each) for each in result.trials],
    }
    return json.dumps(value)


def _entry(trial: Trial) -> dict[str, Any]:
    return {"settings": trial.settings, "score": trial.score, "run_id": trial.run_id}


def _final_entry(result: StudyResult) -> dict[str, Any] | None:
    if not (final := result.final):
        return None
    difference, low, high = (None if np.isnan(value) else value for value in final.difference)
    return {
        "seeds": final.seeds,
        "best": final.best, "own": final.baseline,
        "best_global": final.best_global, "own_global": final.baseline_global,
        "difference": difference, "low": low, "high": high,
        "first": [None if np.isnan(value) else value for value in final.first_seed],
    }  # fmt: skip


def write(result: StudyResult, folder: Path) -> None:
    """Writes tuning.md, tuning.json and best.toml, the experiment with the best settings, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tuning.md").write_text(markdown(result))
    (folder / "tuning.json").write_text(to_json(result) + "\n")
    comment = "".join(f"# {line}\n" for line in textwrap.wrap(verdict(result), 118))
    (folder / "best.toml").write_text(f"{comment}\n{result.experiment.to_toml()}")


def write_pictures(result: StudyResult, folder: Path) -> list[Path]:
    """Draws scores by trial, scores by key, and the importance of keys into a folder; returns the files."""
    import matplotlib
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter
    from optuna.importance import FanovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    study, name = load_study(result.config), f"{result.score.name} on validation sites"
    drawings: dict[str, Callable[[Study], Any]] = {
        "history": lambda study: plots.plot_optimization_history(study, target_name=name),
        "settings": lambda study: plots.plot_slice(study, target_name=name),
    }
    if len(result.importance) > 1:
        evaluator = FanovaImportanceEvaluator(seed=result.config.seed)
        drawings["importance"] = lambda study: plots.plot_param_importances(study, evaluator, target_name=name)
    files = []
    with matplotlib.rc_context(), warnings.catch_warnings():  # Optuna sets a style, and calls its plots experimental
        warnings.simplefilter("ignore")
        pyplot.switch_backend("agg")
        for file, draw in drawings.items():
            axes = np.ravel(draw(study))
            for each in (each for each in axes if each.get_xscale() == "log"):  # Optuna's labels overlap
                each.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
                each.xaxis.set_major_formatter("{x:g}")
                each.xaxis.set_minor_formatter(NullFormatter())
            files.append(folder / f"{file}.png")
            axes[0].figure.savefig(files[-1], dpi=150, bbox_inches="tight")
            pyplot.close(axes[0].figure)
    return files


def search_run(config: SearchConfig) -> AbstractContextManager[ParentRun | None]:
    """Returns what opens the search's run, the one that its folder names where there is one, and ends it.

    Raises:
        FedmetaError: The store cannot be reached or written.
    """
    what = " · ".join((data_name(config.experiment.params()), config.experiment.learner.name, config.sampler))
    return parent_run(config.experiment, "search", f"tune · {what} · {config.trials} trials", config.folder)


def publish(run: ParentRun | None, result: StudyResult) -> None:
    """Writes the search's files, and logs its figures, table and pictures; nothing where no trial completed."""
    if not result.completed:
        return
    folder = result.config.folder
    write(result, folder)
    if run is None:
        return
    baseline, final = result.baseline, result.final
    metrics = {f"{SECTION}/best": result.best.score, f"{SECTION}/own": baseline.score if baseline else None}
    if final:
        metrics |= {f"{SECTION}/new_sites_best": final.best, f"{SECTION}/new_sites_own": final.baseline}
        metrics |= {f"{SECTION}/new_sites_difference": final.difference[0]}
    keys = metric_suffixes(result.importance)
    metrics |= {f"{SECTION}_importance/{keys[key]}": share for key, share in result.importance.items()}
    first, _, rest = markdown(result).partition("\n")
    run.publish(
        f"**{first}**\n{rest}",
        metrics,
        {"trials.json": result.frame()},
        [folder / name for name in ("tuning.md", "tuning.json", "best.toml")],
        {f"{SECTION}/{path.stem}": path for path in write_pictures(result, folder)},
        {f"{SECTION}/best_so_far": result.best_so_far()},
    )
