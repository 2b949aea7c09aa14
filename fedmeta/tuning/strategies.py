"""Ways of searching beside one another: the same space, budget and seeds, and how good the best is after each trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmeta.errors import FedmetaError
from fedmeta.problems.metric import Metric
from fedmeta.tracking.results import quiet_matplotlib
from fedmeta.tracking.run_page import data_name
from fedmeta.tracking.summary_run import SummaryRun, summary_run
from fedmeta.tuning.plan import Plan
from fedmeta.tuning.results import Search
from fedmeta.tuning.searching import Report, search

SECTION = "strategies"


@dataclass(frozen=True)
class Strategies:
    """What came of several ways of searching.

    Attributes:
        plan: What they share.
        searches: Each way's searches, one for each seed.
        folder: Where they are kept.
    """

    plan: Plan
    searches: Mapping[str, Sequence[Search]]
    folder: Path

    @property
    def score(self) -> Metric:
        """What settings are scored by."""
        return next(iter(self.searches.values()))[0].score

    def curves(self, name: str) -> NDArray[np.float64]:
        """Returns the best score so far [seeds, trials] of a way of searching.

        A search that has fewer trials, as a grid that does not fill the budget, keeps its last value.
        """
        curves = [each.best_so_far() for each in self.searches[name]]
        longest = max(len(curve) for searches in self.searches.values() for curve in map(Search.best_so_far, searches))
        return np.array([[*curve, *[curve[-1]] * (longest - len(curve))] for curve in curves])

    def table(self) -> pd.DataFrame:
        """Returns one row per way, the best first: the mean best score after a quarter, half and all of the trials.

        Returns:
            Columns strategy, trials, after_N for three N, sd (over seeds, of the last), pruned (share), seconds.
        """
        rows = []
        for name, searches in self.searches.items():
            curves = self.curves(name)
            row: dict[str, object] = {"strategy": name, "seeds": len(searches)}
            row["trials"] = np.mean([len(each.attempts) for each in searches])
            for count in self.milestones():
                row[f"after_{count}"] = curves[:, min(count, curves.shape[1]) - 1].mean()
            row["sd"] = curves[:, -1].std(ddof=1) if len(curves) > 1 else np.nan
            states = [attempt.state for each in searches for attempt in each.attempts]
            row["pruned"] = states.count("pruned") / len(states)
            row["seconds"] = np.mean([each.wall_s for each in searches])
            rows.append(row)
        last = f"after_{self.milestones()[-1]}"
        return pd.DataFrame(rows).sort_values(
            last, ascending=not self.score.higher_is_better, ignore_index=True, kind="stable"
        )

    def milestones(self) -> list[int]:
        """Returns after how many trials the ways are compared."""
        total = self.plan.trials
        return sorted({max(1, total // 4), max(1, total // 2), total})

    def verdict(self) -> str:
        """Returns in a sentence which way found the best settings, and whether that is more than luck."""
        table = self.table()
        last = f"after_{self.milestones()[-1]}"
        best, rest = table.iloc[0], table.iloc[1:]
        said = f"Best way of searching: {best['strategy']} ({self.score.name} {best[last]:.3f} after "
        f"{self.plan.trials} trials"
        said += f", mean of {best['seeds']} seeds)"
        if not len(rest) or best["seeds"] < 2:
            return f"{said}."
        gaps = [self.curves(best["strategy"])[:, -1] - self.curves(name)[:, -1] for name in rest["strategy"]]
        sign = self.score.sign
        ahead = [name for name, gap in zip(rest["strategy"], gaps, strict=True) if (sign * gap > 0).all()]
        others = ", ".join(ahead) or "none of the others"
        same = ", though a grid's points are the same with every seed" if best["strategy"] == "grid" else ""
        return f"{said}; with every seed it did better than {others}{same}."


def compare_strategies(plan: Plan, names: Sequence[str], seeds: int, report: Callable[[str], Report]) -> Strategies:
    """Gives each way of searching the same budget with the same seeds; what was done before is not done again.

    Args:
        plan: What they share: its sampler and seed are replaced.
        names: The ways.
        seeds: How many seeds, from the plan's upwards.
        report: Returns what takes a search's progress, given its title.

    Raises:
        FedmetaError: A way is named twice; or as for `fedmeta.tuning.searching.search`.
    """
    if len(set(names)) != len(names):
        raise FedmetaError(f"--compare names one twice: {', '.join(names)}")
    said = json.dumps([plan.experiment.identity(), repr(plan.space), plan.trials, plan.pruner])
    folder = Path(plan.experiment.tracking.folder) / f"tune-compare-{blake2b(said.encode(), digest_size=6).hexdigest()}"
    searches: dict[str, list[Search]] = {name: [] for name in names}
    with _strategies_run(plan, names, folder) as run:
        for offset in range(seeds):
            for name in names:
                own = replace(plan, sampler=name, seed=plan.seed + offset, parent=run.run_id if run else "")
                searches[name].append(search(own, report(f"{name}, seed {own.seed}")))
        found = Strategies(plan, searches, folder)
        write(found, folder)
        if run:
            _publish(run, found)
    return found


def markdown(found: Strategies) -> str:
    """Returns the verdict and the table as Markdown."""
    counts = found.milestones()
    heads = ["strategy", "seeds", "trials", *(f"best after {count}" for count in counts), "sd", "pruned", "seconds"]
    rows = [heads, ["---"] * len(heads)]
    for _, row in found.table().iterrows():
        cells = [row["strategy"], str(row["seeds"]), f"{row['trials']:.0f}"]
        cells += [f"{row[f'after_{count}']:.3f}" for count in counts]
        rows.append([*cells, f"{row['sd']:.3f}", f"{row['pruned']:.0%}", f"{row['seconds']:.0f}"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    note = f"The best mean personalized {found.score.name} of validation sites after so many trials, the mean over "
    "seeds of "
    note += "the search; sd over seeds, after all trials. Every way begins with the experiment's own settings."
    return "\n".join([found.verdict(), "", *lines, "", note]) + "\n"


def to_json(found: Strategies) -> str:
    """Returns the verdict, the table, the curves and each search's best settings as one JSON object."""
    table = json.loads(found.table().to_json(orient="records"))
    curves = {name: found.curves(name).round(6).tolist() for name in found.searches}
    best = {name: [asdict(each.best) for each in searches] for name, searches in found.searches.items()}
    return json.dumps(
        {"verdict": found.verdict(), "score": found.score.to_json(), "table": table, "curves": curves} | {"best": best}
    )


def write(found: Strategies, folder: Path) -> None:
    """Writes strategies.md, strategies.json and the picture of the curves into a folder."""
    quiet_matplotlib()
    from fedmeta.tuning.pictures import strategies

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "strategies.md").write_text(markdown(found))
    (folder / "strategies.json").write_text(to_json(found) + "\n")
    curves = {name: found.curves(name) for name in found.table()["strategy"]}
    strategies(curves, found.score.name).savefig(folder / "strategies.png")


def _strategies_run(plan: Plan, names: Sequence[str], folder: Path) -> AbstractContextManager[SummaryRun | None]:
    what = " · ".join((data_name(plan.experiment.params()), plan.experiment.learner.name, ", ".join(names)))
    return summary_run(plan.experiment, "search", f"tune · {what} · {plan.trials} trials each", folder)


def _publish(run: SummaryRun, found: Strategies) -> None:
    said, _, rest = markdown(found).partition("\n")
    last = f"after_{found.milestones()[-1]}"
    metrics = {f"{SECTION}/best/{row['strategy']}": row[last] for _, row in found.table().iterrows()}
    curves = {f"{SECTION}/best_so_far/{name}": found.curves(name).mean(axis=0).tolist() for name in found.searches}
    files = [found.folder / name for name in ("strategies.md", "strategies.json")]
    picture = {f"{SECTION}/curves": found.folder / "strategies.png"}
    run.publish(f"**{said}**\n{rest}", metrics, {"ways.json": found.table()}, files, picture, curves)
