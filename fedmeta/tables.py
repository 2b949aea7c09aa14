"""Tables of results, for every page that has some: what they hold, how a number looks, and Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

GROUPS = {"new_sites": "new sites", "training_sites": "training sites"}
"""The groups of sites in a run's summary, and what people call them."""

LARGE, SMALL, ROUNDING = 1e5, 5e-4, 1e-12
"""Beyond the first two, a number needs a power of ten to be read; below the last one it is zero."""


class Share(float):
    """A share in [0, 1], shown as a percentage."""


class Change(float):
    """A difference, shown with its sign."""


Cell = str | float | None


class Cells(NamedTuple):
    """A table: its headings, and rows with a cell for each."""

    headings: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def number(value: float | None, sign: bool = False) -> str:
    """Returns a score to three decimals, with a power of ten where these would not show it; a dash where undefined."""
    if value is None or not math.isfinite(value):
        return "-"
    size, plus = abs(value), "+" if sign else ""
    if size >= LARGE or ROUNDING < size < SMALL:
        return f"{value:{plus}.2e}"
    return f"{value if size > ROUNDING else 0.0:{plus}.3f}"


def percent(value: float | None) -> str:
    """Returns a share as a percentage; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.0%}"


def text(cell: Cell) -> str:
    """Returns what a cell shows."""
    match cell:
        case str():
            return cell
        case Share():
            return percent(cell)
        case int():
            return f"{cell:,}"
        case _:
            return number(cell, sign=isinstance(cell, Change))


def heading(column: str) -> str:
    """Returns what a column of a frame of sites is called, such as "local-only accuracy" for local_accuracy."""
    return re.sub("^local_", "local-only ", column).replace("_", " ")


def plain(words: str) -> str:
    """Returns text that Markdown shows as it is; names of sites may hold anything."""
    return re.sub(r"([\\`*<>#|]|\](?=[(\[:])|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(words.split()))


def markdown_table(
    headings: Sequence[str], rows: Iterable[Sequence[Cell]], left: int = 1, padding: str = " "
) -> list[str]:
    """Returns a table's lines as Markdown.

    Args:
        headings: The columns' names.
        rows: A cell for each.
        left: How many columns, from the first, are text; the others are numbers.
        padding: What stands after a cell.
    """
    body = [[text(cell) for cell in row] for row in rows]
    lines = ["|" + "".join(f" {plain(cell)}{padding}|" for cell in row) for row in (headings, *body)]
    sides = [" --- |" if place < left else " ---: |" for place in range(len(headings))]
    return [lines[0], "|" + "".join(sides), *lines[1:]]


def groups(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns a run's groups that have sites, by what people call them, the one that its score is about first."""
    stands_in = str(summary.get("judge", "new_sites")).replace("_", " ")
    named = {**GROUPS, "new_sites": stands_in}
    return [(label, summary[key]) for key, label in named.items() if summary[key]["n"]]


def with_diverged(group: Mapping[str, Any]) -> list[str]:
    """Returns a phrase on a group's sites whose adaptation diverged, which means leave out; none where none did."""
    count = group.get("diverged", 0)
    if not count:
        return []
    mean = group.get("personalized_with_diverged")
    shown = "not finite" if mean is None or not math.isfinite(mean) else number(mean)
    return [f"{count} diverged and left out of the means (with them the personalized mean is {shown})"]


def score_label(summary: Mapping[str, Any]) -> str:
    """Returns a run's score with its unit and which way is better, such as "snr (dB), higher is better"."""
    score = summary["score"]
    unit = f" ({score['unit']})" if score.get("unit") else ""
    return f"{score['name']}{unit}, {'higher' if score['higher_is_better'] else 'lower'} is better"


def results_table(summary: Mapping[str, Any]) -> Cells:
    """Returns a run's scores: a row for each group that has sites; pooled figures only where there are some."""
    found = groups(summary)
    is_pooled = any(own["personalized"].get("pooled") is not None for _, own in found)
    headings = ["", "sites", "local-only", "global", "personalized", "std", "worst 10 %"]
    headings += ["pooled"] if is_pooled else []
    rivals = [name for name in ("classical", "optimum") if any(name in own for _, own in found)]
    headings += [{"classical": "classical (evaluations)"}.get(name, name) for name in rivals]
    rows = []
    for label, own in found:
        after = own["personalized"]
        scores = [own["local_only"]["mean"], own["global"]["mean"], after["mean"], after["std"], after["worst_decile"]]
        scores += [after.get("pooled")] if is_pooled else []
        scores += [_rival(own.get(name)) for name in rivals]
        shares = [None if own.get(key) is None else Share(own[key]) for key in ("helped", "harmed", "beats_local")]
        rows.append((label, own["n"], *scores, *shares))
    return Cells((*headings, "helped", "harmed", "beats local-only"), rows)


def local_methods(summary: Mapping[str, Any]) -> str:
    """Returns how sites solve alone, such as "linear 12, trees 3 (sites)"; "" where it is not known."""
    counts: dict[str, int] = {}
    for _, own in groups(summary):
        for name, count in (own.get("local_methods") or {}).items():
            counts[name] = counts.get(name, 0) + count
    listed = ", ".join(f"{name} {count}" for name, count in sorted(counts.items(), key=lambda each: -each[1]))
    return f"{listed} (sites)" if listed else ""


def _rival(found: Mapping[str, Any] | None) -> Cell:
    """Returns the mean score of a problem's own baseline, with the evaluations that it took where they are known."""
    if not found or found["mean"] is None:
        return None
    taken = found.get("evaluations")
    return f"{number(found['mean'])} ({taken:.0f})" if taken else number(found["mean"])


def metrics_table(summary: Mapping[str, Any]) -> Cells:
    """Returns a run's further metrics, and of each metric at how many sites it is undefined: a row for each."""
    score = summary["score"]["name"]
    rows: list[tuple[Cell, ...]] = []
    for label, own in groups(summary):
        missing = own.get("undefined") or {}
        for name, after in own["personalized"].get("metrics", {}).items():
            if name != score or missing.get(name):
                before = own["global"]["metrics"].get(name, {})
                scores = (before.get("mean"), after["mean"], after["worst_decile"], after.get("pooled"))
                rows.append((name, label, *scores, after["n"], missing.get(name, 0)))
    headings = ("metric", "", "global", "personalized", "worst 10 %", "pooled", "sites", "undefined at")
    return Cells(headings, rows)


def subgroups_table(summary: Mapping[str, Any]) -> Cells:
    """Returns the score by subgroup of test rows: a row for each subgroup and group of sites."""
    rows: list[tuple[Cell, ...]] = []
    for label, own in groups(summary):
        for each in own.get("subgroups") or []:
            before, after = each["global"], each["personalized"]
            figures = (before["pooled"], after["pooled"], before["mean"], after["mean"])
            rows.append((each["name"], label, each["sites"], each["rows"], *figures))
    states = ("global pooled", "personalized pooled", "global mean", "personalized mean")
    return Cells(("subgroup", "", "sites", "test rows", *states), rows)


LEDGER = (
    "Scores are those of validation sites. Saved: against all the rounds that the run might have had, by the mean of "
    "its own rounds; below 0 it was lost. Dashes: not measured."
)
"""What the table of a run's decisions holds, for a caption."""


def ledger_table(summary: Mapping[str, Any]) -> Cells:
    """Returns what a run decided about itself: a row for each decision, with its figures before and after."""
    rows: list[tuple[Cell, ...]] = []
    for each in summary.get("ledger") or []:
        saved = Change(each["saved_rounds"]), Change(each["saved_s"]), Change(each["saved_bytes"] / 1e6)
        rows.append((f"{each['what']} after round {each['round']}", each["why"], each["before"], each["after"], *saved))
    headings = ("decision", "why", "score before", "score after", "rounds saved", "seconds saved", "MB saved")
    return Cells(headings, rows)


def ledger_lines(summary: Mapping[str, Any]) -> list[str]:
    """Returns a line for each decision of a run about itself, and what it came to; none where it made none."""
    lines = []
    for each in summary.get("ledger") or []:
        saved = (
            f"; saves {each['saved_rounds']:.0f} rounds, {each['saved_s']:.1f} s" if each["saved_rounds"] > 0 else ""
        )
        lost = f"; {-each['saved_rounds']:.0f} rounds lost" if each["saved_rounds"] < 0 else ""
        lines.append(f"{each['what']} after round {each['round']}: {each['why']}{saved}{lost}")
    if reached := (summary.get("stopping") or {}).get("to_target"):
        moved = (reached["bytes_up"] + reached["bytes_down"]) / 1e6
        lines.append(f"to the target: {reached['rounds']} rounds, {reached['wall_s']:.1f} s, {moved:.1f} MB")
    if order := summary.get("order"):
        costs = [f"{name} {order[f'{name}_s']:.3g} s" for name in ("first", "exact") if order[f"{name}_s"] is not None]
        saved = order["saved_s"]
        total = "" if saved is None else f"; first order saved {saved:.1f} s, probes counted"
        lines.append(
            f"order: {order['rounds_first']} rounds of first order, {order['rounds_exact']} exact, {order['probes']} "
            f"probes; a cohort takes {', '.join(costs) or 'an unmeasured time'}{total}"
        )
    return lines


def stream_table(summary: Mapping[str, Any]) -> Cells | None:
    """Returns a row for each block of a run in time; None for other runs."""
    found = summary.get("stream")
    if not found:
        return None
    shown = [group for group in GROUPS if any(found[group]["sites"])]
    headings = ["block"]
    for group in shown:
        headings += [f"{GROUPS[group]}: n", "global", "personalized"]
    rows: list[tuple[Cell, ...]] = []
    for block in range(found["blocks"]):
        row: list[Cell] = [str(block + 1)]
        for group in shown:
            own = found[group]
            row += [own["sites"][block], own["global"][block], own["personalized"][block]]
        rows.append(tuple(row))
    return Cells(tuple(headings), rows)


def stream_lines(summary: Mapping[str, Any]) -> list[str]:
    """Returns what a run in time came to, a line for each group of sites; none for other runs."""
    found = summary.get("stream")
    if not found:
        return []
    score, lines = summary["score"]["name"], []
    for group, label in GROUPS.items():
        own = found[group]
        if not any(own["sites"]):
            continue
        beyond = f"; regret {number(own['regret'])} (loss beyond the last meta-state's)" if "regret" in own else ""
        lines.append(
            f"{label} over {found['blocks']} blocks, each scored before it joined: {score} "
            f"{number(own['mean']['global'])} not adapted, {number(own['mean']['personalized'])} adapted{beyond}"
        )
    if found["memory"] == "alarm":
        sites = {alarm["site"] for alarm in found["alarms"]}
        lines.append(f"alarms: {len(found['alarms'])}, at {len(sites)} of the sites")
    return lines
