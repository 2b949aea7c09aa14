"""The names and values of a run's metrics in MLflow."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd

from fedmeta.problems.metric import score_of
from fedmeta.tables import GROUPS

SAVED = ("saved_rounds", "saved_s", "saved_bytes")
"""What a decision of a run saved, as its ledger names it."""

RESULTS = "final/"
"""How the metrics that compare runs begin."""


def metric_suffixes(names: Iterable[str]) -> dict[str, str]:
    """Maps each site's name to one that MLflow allows in a metric's name, unique whatever the letters' case.

    MLflow takes word characters, dots, dashes, colons and spaces; a slash would open another section.
    """
    valid = {name: re.sub(r"[^\w.\- :]", "_", name).strip(" .")[:200] or "site" for name in names}
    uses = Counter(suffix.casefold() for suffix in valid.values())
    return {
        name: suffix if uses[suffix.casefold()] == 1 else f"{suffix}-{crc32(name.encode()):08x}"
        for name, suffix in valid.items()
    }


def curves(sites: pd.DataFrame, count: int) -> dict[str, str]:
    """Chooses the sites that get a curve each: new sites first, then in the frame's order.

    Returns:
        Each chosen site's name and its metrics' suffix.
    """
    ordered = sites.sort_values("kind", key=lambda kind: kind != "new", kind="stable")["site"].astype(str)
    suffixes = metric_suffixes(ordered)
    return {name: suffixes[name] for name in ordered.iloc[:count]}


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Drops what is no finite number: MLflow would store an infinity as 1.8e308."""
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
            if name != score:
                metrics[f"{group}/personalized_{name}_mean"] = values.get("mean")
        if summary.get("diverged"):
            metrics[f"{group}/diverged"] = summary["diverged"]
            metrics[f"{group}/personalized_with_diverged"] = summary.get("personalized_with_diverged")
        metrics |= {f"{group}/undefined_{name}": count for name, count in (summary.get("undefined") or {}).items()}
    curved = sites[sites["site"].isin(list(suffixes))]
    for name in (f"personalized_{score}", f"global_{score}"):
        values = zip(curved["site"].astype(str), curved[name], strict=True)
        metrics |= {f"{name}/{suffixes[site]}": value for site, value in values}
    return finite(metrics)


def final_metrics(summary: Mapping[str, Any], sites: pd.DataFrame) -> dict[str, float]:
    """Returns the metrics that compare runs, logged once at the end.

    At step 0, MLflow draws them as bars. Scores of validation sites that stand in for new ones are named after these,
    so that they are not taken for scores of new sites.
    """
    new, training = summary["new_sites"], summary["training_sites"]
    group = summary.get("judge", "new_sites")
    return finite(
        {
            f"{RESULTS}{group}_personalized": new["personalized"]["mean"],
            f"{RESULTS}{group}_global": new["global"]["mean"],
            f"{RESULTS}{group}_local_only": new["local_only"]["mean"],
            f"{RESULTS}{group}_worst_decile": new["personalized"]["worst_decile"],
            f"{RESULTS}{group}_pooled": new["personalized"].get("pooled"),
            f"{RESULTS}helped": new.get("helped"),
            f"{RESULTS}harmed": new.get("harmed"),
            f"{RESULTS}beats_local": new.get("beats_local"),
            f"{RESULTS}training_sites_personalized": training["personalized"]["mean"],
            f"{RESULTS}sites_left_behind": len(left_behind(latest(sites))),
            **_ledger(summary),
            **_subgroups(summary),
        }
    )


def _subgroups(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the pooled score by subgroup of each group of sites; their test rows stand beside."""
    found: dict[str, Any] = {}
    for group in GROUPS:
        entries = summary[group].get("subgroups") or []
        suffixes = metric_suffixes(each["name"] for each in entries)
        for each in entries:
            place = f"subgroups/{group}_{suffixes[each['name']]}"
            found |= {f"{place}_{state}": each[state]["pooled"] for state in ("global", "personalized")}
            found[f"{place}_rows"] = each["rows"]
    return found


def _ledger(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the totals of what a run decided about itself; nothing where it might decide nothing."""
    if "ledger" not in summary:
        return {}
    totals = {name: sum(each[name] for each in summary["ledger"]) for name in SAVED}
    reached = (summary.get("stopping") or {}).get("to_target") or {}
    return {
        **{f"ledger/{name}": total for name, total in totals.items()},
        "ledger/order_saved_s": (summary.get("order") or {}).get("saved_s"),
        **{f"ledger/to_target_{name}": value for name, value in reached.items()},
    }


def latest(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows of the last evaluation."""
    found: pd.DataFrame = sites[sites["round"] == sites["round"].max()]
    return found


def worst_first(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the sites ordered by personalized score, the worst one first and those without a score last."""
    score = score_of(sites)
    order = [f"personalized_{score.name}", "site"]
    return sites.sort_values(order, ascending=[score.higher_is_better, True], na_position="last", ignore_index=True)


def left_behind(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the sites that personalization harms, the largest loss first, those whose adaptation diverged last."""
    from fedmeta.evaluation import diverged  # here, for it imports torch, which takes seconds

    losing = sites[(sites["gain"] < 0) | diverged(sites)]
    return losing.sort_values(["gain", "site"], na_position="last")


def site_columns(sites: pd.DataFrame) -> list[str]:
    """Returns the columns of a table of sites: who, how many rows, the scores and the gain, further metrics."""
    score = score_of(sites).name
    first = ["site", "kind", "rows", f"global_{score}", f"personalized_{score}", f"local_{score}", "gain"]
    known = {*first, "personalized_loss"}
    further = [str(name) for name in sites.columns if str(name).startswith("personalized_") and name not in known]
    return [name for name in first if name != f"local_{score}" or np.isfinite(sites[name]).any()] + further


def per_site(sites: pd.DataFrame) -> pd.DataFrame:
    """Returns the table that MLflow compares across runs: the last evaluation, the worst site first."""
    final = worst_first(latest(sites))
    table: pd.DataFrame = final[site_columns(final)].copy()
    for column in table.select_dtypes("float"):
        # Digits and not decimals: the errors of small targets are small.
        table[column] = [float(f"{value:.5g}") for value in table[column]]
    return table
