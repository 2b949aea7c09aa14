"""What a run shows to people: the names of its metrics, its table of sites, its name, and its description.

Two values come in again and again. `sites` is the frame of an evaluation, one row per site: site, kind ("new" or
"training"), rows, of the score S global_S and personalized_S, gain (positive where personalization helps). `summary` is
the JSON object of a run, `groups` its "new_sites" and "training_sites".
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any
from zlib import crc32

import pandas as pd

from fedmeta.problems.metric import score_of

GROUPS = {"new_sites": "new sites", "training_sites": "training sites"}
HEADINGS = ("", "sites", "global", "personalized", "worst tenth", "helped")
RESULTS = "final/"
DESCRIPTION_LIMIT = 8000
NAMED_SITES = 12
GAP = "\N{NO-BREAK SPACE}" * 3
# Of Okabe and Ito (2008), the others of Tol (2021): a learner looks alike in every chart and to every eye.
COLOURS = {
    "local": "#999999",
    "fedavg": "#56B4E9",
    "fedavg-ft": "#0072B2",
    "fomaml": "#E69F00",
    "maml": "#D55E00",
    "meta-sgd": "#009E73",
}
OTHER_COLOURS = ("#CC79A7", "#882255", "#44AA99", "#999933", "#332288", "#000000")


def worst_first(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the sites ordered by personalized score, the worst one first and those without a score last."""
    score = score_of(sites)
    order = [f"personalized_{score.name}", "site"]
    return sites.sort_values(order, ascending=[score.higher_is_better, True], na_position="last", ignore_index=True)


def latest(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the last evaluation."""
    return sites[sites["round"] == sites["round"].max()] if "round" in sites.columns else sites


def left_behind(sites: pd.DataFrame) -> list[str]:
    """Returns the sites that personalisation leaves below their global score, the one that loses most first.

    Those whose adaptation has run away come last.
    """
    from fedmeta.evaluation import diverged  # here, for it imports torch, and opening the UI needs none of that

    losing = sites[(sites["gain"] < 0) | diverged(sites)].sort_values(["gain", "site"])
    return [str(name) for name in losing["site"]]


def metric_suffixes(names: Iterable[str]) -> dict[str, str]:
    """Maps each site's name to one that MLflow allows in a metric's name, unique whatever the letters' case.

    MLflow takes word characters, dots, dashes, colons and spaces; a slash would open a section of its own.
    """
    plain = {name: re.sub(r"[^\w.\- :]", "_", name).strip(" .")[:200] or "site" for name in names}
    uses = Counter(suffix.casefold() for suffix in plain.values())
    return {
        name: suffix if uses[suffix.casefold()] == 1 else f"{suffix}-{crc32(name.encode()):08x}"
        for name, suffix in plain.items()
    }


def curves(sites: pd.DataFrame, count: int) -> dict[str, str]:
    """Chooses the sites that get curves of their own: new sites first, then in the frame's order.

    Returns:
        Each chosen site's name and its metrics' suffix.
    """
    ordered = sites.sort_values("kind", key=lambda kind: kind != "new", kind="stable")["site"].astype(str)
    suffixes = metric_suffixes(ordered)
    return {name: suffixes[name] for name in ordered.iloc[:count]}


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Drops what is no finite number, since MLflow would store an infinity as 1.8e308."""
    numbers = {name: float(value) for name, value in metrics.items() if value is not None}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def evaluation_metrics(sites: pd.DataFrame, groups: Mapping[str, Any], suffixes: Mapping[str, str]) -> dict[str, float]:
    """Returns the metrics of one evaluation: each group's summary, and the curves of the sites in `suffixes`."""
    score = score_of(sites).name
    metrics: dict[str, Any] = {}
    for group in GROUPS:
        summary = groups.get(group) or {}
        personalized, before = summary.get("personalized") or {}, summary.get("global") or {}
        for statistic in ("mean", "std", "worst_decile"):
            metrics[f"{group}/personalized_{score}_{statistic}"] = personalized.get(statistic)
        metrics[f"{group}/global_{score}_mean"] = before.get("mean")
        for name, values in (personalized.get("metrics") or {}).items():
            metrics[f"{group}/personalized_{name}_mean"] = values.get("mean")
        if summary.get("diverged"):
            metrics[f"{group}/diverged"] = summary["diverged"]
    curved = sites[sites["site"].isin(list(suffixes))]
    for name in (f"personalized_{score}", f"global_{score}"):
        values = zip(curved["site"].astype(str), curved[name], strict=True)
        metrics |= {f"{name}/{suffixes[site]}": value for site, value in values}
    return finite(metrics)


def final_metrics(summary: Mapping[str, Any], sites: pd.DataFrame) -> dict[str, float]:
    """Returns the metrics that compare runs, logged once at the end.

    MLflow draws those as bars whose only round is 0; the others would be curves of one point. Scores of validation
    sites that stood in for new ones are named so, that nobody takes them for new sites'.
    """
    new, training = summary["new_sites"], summary["training_sites"]
    judges = summary.get("judge", "new_sites")
    return finite(
        {
            f"{RESULTS}{judges}_personalized": new["personalized"].get("mean"),
            f"{RESULTS}{judges}_global": new["global"].get("mean"),
            f"{RESULTS}{judges}_worst_decile": new["personalized"].get("worst_decile"),
            f"{RESULTS}helped": new.get("helped"),
            f"{RESULTS}harmed": new.get("harmed"),
            f"{RESULTS}beats_local": new.get("beats_local"),
            f"{RESULTS}training_sites_personalized": training["personalized"].get("mean"),
            f"{RESULTS}sites_left_behind": len(left_behind(latest(sites))),
        }
    )


def per_site(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the table that the artifact view compares across runs, the worst site first."""
    score = score_of(sites).name
    columns = ["site", "kind", "rows", f"global_{score}", f"personalized_{score}", "gain"]
    return worst_first(latest(sites))[columns].round(4)


def run_name(params: Mapping[str, Any]) -> str:
    """Returns what tells this run from its neighbours, such as "maml · digits · seed 0"."""
    judged = " · on validation sites" if params.get("evaluation.judge") == "validation_sites" else ""
    return f"{params['learner.name']} · {data_name(params)} · seed {params['runtime.seed']}{judged}"


def data_name(params: Mapping[str, Any]) -> str:
    """Returns the data's name: the stem of its path, or its source where it has none."""
    return PurePath(str(params.get("data.path") or "")).stem or str(params["data.source"])


def tags(params: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags by which runs are found and grouped, and the colour of their learner."""
    learner = str(params["learner.name"])
    parent = str(params.get("tracking.parent") or "")
    return {
        **({"mlflow.parentRunId": parent} if parent else {}),
        "fedmeta.learner": learner,
        "fedmeta.data": data_name(params),
        "fedmeta.seed": str(params["runtime.seed"]),
        "mlflow.runColor": COLOURS.get(learner) or OTHER_COLOURS[crc32(learner.encode()) % len(OTHER_COLOURS)],
    }


def number(value: float | None, share: bool = False) -> str:
    """Returns a score to three decimals or a share as a percentage; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0%}" if share else f"{value:.3f}"


def summary_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the final table's cells, a row for each group, in the order of `HEADINGS`."""
    return [
        (
            label,
            str(summary[group]["n"]),
            number(summary[group]["global"].get("mean")),
            number(summary[group]["personalized"].get("mean")),
            number(summary[group]["personalized"].get("worst_decile")),
            number(summary[group].get("helped"), share=True),
        )
        for group, label in GROUPS.items()
    ]


def description(summary: Mapping[str, Any], sites: pd.DataFrame) -> str:
    """Returns the run's page in Markdown: the verdict in two lines, above MLflow's fold, then the table."""
    final = latest(sites)
    lines = [*verdict(summary, final), "", *markdown_table(HEADINGS, summary_rows(summary)), ""]
    worst = per_site(final).head(NAMED_SITES)
    if len(worst):
        cells = [
            tuple(number(cell) if isinstance(cell, float) else str(cell) for cell in row)
            for row in worst.itertuples(index=False)
        ]
        lines += ["Worst first:", "", *markdown_table([name.replace("_", " ") for name in worst.columns], cells), ""]
    rounds, seconds = summary.get("rounds"), summary.get("wall_s")
    if rounds is not None and seconds is not None:
        lines.append(f"{rounds} rounds in {seconds:.0f} s.")
    return "\n".join(lines)[:DESCRIPTION_LIMIT]


def verdict(summary: Mapping[str, Any], sites: pd.DataFrame) -> list[str]:
    """Returns two lines: how well new sites are served, and who is left behind."""
    label, group = next(
        ((GROUPS[key], summary[key]) for key in GROUPS if summary[key]["n"]), ("sites", summary["new_sites"])
    )
    label = f"{summary['judge'].replace('_', ' ')} (no new site was seen)" if "judge" in summary else label
    before, after = group["global"].get("mean"), group["personalized"].get("mean")
    first = (
        f"**{summary['learner']}: {summary['score']['name']} {number(after)} on {group['n']} {label}**"
        f" ({number(before)} before adapting; {number(group.get('helped'), share=True)} helped,"
        f" worst tenth {number(group['personalized'].get('worst_decile'))})."
    )
    losing = left_behind(sites)
    more = f" and {len(losing) - NAMED_SITES} more" if len(losing) > NAMED_SITES else ""
    names = ", ".join(f"`{name.replace('`', ' ')[:60]}`" for name in losing[:NAMED_SITES])
    second = f"Left behind, {len(losing)} of {len(sites)}: {names}{more}." if losing else "No site is left behind."
    return [first, "", second]


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a Markdown table's lines; MLflow leaves no space between columns, so that the cells bring their own."""
    every = [[f"{cell.replace('|', ' ')[:80]}{GAP}" for cell in row] for row in (headings, *rows)]
    lines = ["|".join(["", *row, ""]) for row in every]
    return [lines[0], "|".join(["", *[" --- "] * len(headings), ""]), *lines[1:]]
