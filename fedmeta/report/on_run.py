"""The report of one run: does adapting serve sites that were never seen, and which does it harm?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from fedmeta import tables
from fedmeta.problems.metric import Metric, metric_of
from fedmeta.report import parts
from fedmeta.report.document import Block, Document, Folded, Key, Picture, Pictures, Section, Table, Text
from fedmeta.report.reading import Run
from fedmeta.search.comparison import mean_interval
from fedmeta.tables import number, percent
from fedmeta.tracking import plots
from fedmeta.tracking.description import data_name
from fedmeta.tracking.metrics import latest, left_behind, worst_first


def on_run(run: Run) -> Document:
    """Returns the report."""
    summary, sites = run.summary, latest(run.history)
    score = metric_of(summary["score"])
    found = tables.groups(summary)
    label, group = found[0] if found else ("sites", summary["new_sites"])
    name = data_name(run.experiment.params())
    result = f"{score.name} {number(group['personalized']['mean'])}{f' {score.unit}' * bool(score.unit)}"
    every = parts.site_table("sites", worst_first(sites), score)
    return Document(
        kind="Federated meta-learning: one run",
        title=f"{summary['learner']} on {name}: {result} on {label}",
        lead=_lead(run, label, group, score),
        keys=_keys(run, label, group, score),
        sections=(
            Section("The question", (Text(_question(run, label)),)),
            parts.data(run),
            Section("Results", (*_tables(run), *_own_pictures(run), _plots(run, score))),
            *_subgroups(run, sites, score),
            Section("Left behind", _left_behind(run, score)),
            *_in_time(run),
            *_decisions(run),
            parts.again(
                run.experiment, f"fedmeta run {parts.EXPERIMENT_FILE}", summary.get("versions", {}), _facts(run)
            ),
            Section("Every site", (Folded(f"All {len(sites)} sites, worst first", (every,)),)),
        ),
    )


def _question(run: Run, label: str) -> str:
    experiment = run.experiment
    rows = f"at most {experiment.data.support} of its rows" if experiment.on_rows else "its own data"
    seen = "that took part in training" if label == "training sites" else "that took no part in training"
    return (
        "The sites keep their data; together they learn a start. Does the solution that a site reaches from it, in "
        f"{experiment.evaluation_steps} inner steps on {rows}, serve sites {seen} better than one global solution "
        "for all, and better than what each would reach local-only, from the same data?"
    )


def _lead(run: Run, label: str, group: Mapping[str, Any], score: Metric) -> str:
    unit = f" {score.unit}" if score.unit else ""
    before, after, gain = group["global"]["mean"], group["personalized"]["mean"], group["gain"]
    if gain is None:
        return "No site has a score that is defined both before and after adapting."
    lead = (
        f"On {group['n']} {label} the mean {score.label} is {number(before)} with the global model and {number(after)} "
        f"after adapting: a site {'gains' if gain >= 0 else 'loses'} {number(abs(gain))}{unit} on average"
    )
    sites = latest(run.history)
    gains = sites[sites["kind"] == label.removesuffix(" sites")]["gain"].to_numpy(dtype=float)
    gains = gains[np.isfinite(gains)]
    _, low, high = mean_interval(gains, run.experiment.runtime.seed)
    if len(gains) < 2:
        return f"{lead}. One site is no evidence."
    verdict = "Adapting helps." if low > 0 else "Adapting harms." if high < 0 else "The interval includes 0."
    local = group["local_only"]["mean"]
    beside = f" Local-only, on the same data, sites reach {number(local)}." if local is not None else ""
    return f"{lead} (95 % interval over sites {number(low, sign=True)} to {number(high, sign=True)}). {verdict}{beside}"


def _keys(run: Run, label: str, group: Mapping[str, Any], score: Metric) -> tuple[Key, ...]:
    sites = latest(run.history)
    after = group["personalized"]
    ends = [number(after.get(end)) for end in ("low", "high")]
    spread = f", 95 % interval {ends[0]} to {ends[1]}" if after.get("low") is not None else ""
    pooled = [Key(number(after["pooled"]), "pooled", "over all test rows")] if after.get("pooled") is not None else []
    return (
        Key(number(after["mean"]), "personalized", f"mean {score.label}, {group['n']} {label}{spread}"),
        Key(number(group["global"]["mean"]), "global", "one model for all"),
        Key(number(group["local_only"]["mean"]), "local-only", "without the federation"),
        Key(number(after["worst_decile"]), "worst 10 %", f"of the {label}"),
        *pooled,
        Key(percent(group["helped"]), "helped", "strictly better than global"),
        Key(percent(group["harmed"]), "harmed", "strictly worse than global"),
        Key(f"{len(left_behind(sites))}", "left behind", f"of all {len(sites)} sites"),
    )


def _tables(run: Run) -> tuple[Block, ...]:
    caption = (
        f"Mean {tables.score_label(run.summary)}, on each site's test data. Local-only: what a site reaches without "
        "the federation. Helped and harmed: the share of sites whose personalized score is strictly better or worse "
        "than the global one; beats local-only: strictly better than that."
    )
    if methods := tables.local_methods(run.summary):
        caption += f" Local-only is the best method by cross-validation on a site's own support: {methods}."
    further = tables.metrics_table(run.summary)
    undefined = "Means over the sites where a metric is defined; pooled: over all test rows of the group."
    results = Table("results", *tables.results_table(run.summary), caption, strong=0)
    return (results, Table("metrics", *further, undefined, left=2)) if further.rows else (results,)


def _plots(run: Run, score: Metric) -> Pictures:
    drawn = []
    for name, draw in plots.plots_of(run.history).items():
        caption = caption_of(name, run.history, score)
        drawn.append(Picture(name, draw(run.history, score), caption[:1].upper() + caption[1:]))
    return Pictures(drawn)


def caption_of(name: str, history: pd.DataFrame, score: Metric) -> str:
    """Returns what a plot of `fedmeta.tracking.plots` shows of these sites: nothing is named that is not drawn."""
    sites = plots.defined_rows(latest(history), score)
    harmed = bool((sites["gain"] < 0).any())
    if name == "sites" and len(sites) > plots.NAMED_SITES:
        marks = "; orange strokes: harmed" if harmed else ""
        return (
            f"Sites by rank, worst to best: {score.label} of the personalized model (line) and of the global one at "
            f"the same site (gray dots); the worst 10 % are shaded{marks}."
        )
    if name == "sites":
        marks = "; orange strokes: harmed" if harmed else ""
        both = sites["kind"].eq("new").any() and sites["kind"].ne("new").any()
        bold = " Names of new sites are bold." if both else ""
        return f"Each site: {score.label} of the global model (ring) and of its personalized one (dot){marks}.{bold}"
    if name == "adaptation":
        rivals = [rival for rival, _, _ in plots.rivals(latest(history), score)]
        lines = f"; lines: new sites' mean by {', '.join(rivals)}" if rivals else ""
        return f"Mean {score.label} by inner step; the band holds the middle 80 % of sites{lines}."
    if name == "rounds":
        once = history["round"].nunique() == 1
        when = "at the only evaluation" if once else "by round"
        return f"Mean {score.label} on test data {when}: personalized, its worst 10 % (dotted), and global (dashed)."
    if name == "heat_map":
        return f"Personalized {score.label} of each site at each evaluation; the best at the end on top."
    below = "; below 0, shaded, adapting harms" if harmed else ""
    return f"Gain of each site in {score.label} by adapting, against the rows that it has to train on{below}."


def _own_pictures(run: Run) -> tuple[Block, ...]:
    """Returns the pictures that the problem drew, such as a solution before and after adapting."""
    if not run.pictures:
        return ()
    return (Pictures([Picture(name, data, name.replace("_", " ")) for name, data in run.pictures.items()]),)


def _left_behind(run: Run, score: Metric) -> tuple[Block, ...]:
    sites = latest(run.history)
    losing = left_behind(sites)
    if losing.empty:
        return (Text("No site: each one's personalized score is at least as good as its global one."),)
    many = "sites are" if len(losing) > 1 else "site is"
    advice = (
        f"{len(losing)} {many} served worse by personalization than by the global model, of {len(sites)}. The global "
        "model is the better one there; with evaluation.gate = true each site decides that on its own support data."
    )
    return Text(advice), parts.site_table("left_behind", losing, score)


def _in_time(run: Run) -> tuple[Section, ...]:
    """Returns what the blocks of a run in time came to."""
    found = tables.stream_table(run.summary)
    if found is None:
        return ()
    caption = "Each block was scored before it joined its site's rows."
    lines = tuple(Text(f"{line}.") for line in tables.stream_lines(run.summary))
    return (Section("In time", (*lines, Table("stream", *found, caption))),)


def _subgroups(run: Run, sites: pd.DataFrame, score: Metric) -> tuple[Section, ...]:
    """Returns the score by subgroup of test rows, over groups of sites and at each site, where the run has such."""
    found = tables.subgroups_table(run.summary)
    if not found.rows:
        return ()
    smallest = run.experiment.evaluation.smallest_subgroup
    caption = (
        f"{score.label} by subgroup of test rows. Sites: those with at least {smallest} rows of it, which alone are "
        "counted; smaller subgroups stay at their sites. Pooled: over all their rows; mean: over sites."
    )
    names = [str(row[0]) for row in found.rows if row[1] == found.rows[0][1]]
    rows = []
    for _, own in worst_first(sites).iterrows():
        for name in names:
            if own[f"rows {name}"] > 0:
                figures = (int(own[f"rows {name}"]), own[f"global {name}"], own[f"personalized {name}"])
                rows.append((str(own["site"]), name, *figures))
    headings = ("site", "subgroup", "test rows", "global", "personalized")
    every = Table("subgroups_by_site", headings, rows, f"{score.label} by subgroup at each site.", left=2)
    whole = Table("subgroups", *found, caption[:1].upper() + caption[1:], left=2)
    return (Section("Subgroups", (whole, Folded(f"Subgroups at {len(sites)} sites", (every,)))),)


def _decisions(run: Run) -> tuple[Section, ...]:
    """Returns what the run decided about itself, where it might have."""
    if "ledger" not in run.summary:
        return ()
    found = tables.ledger_table(run.summary)
    lines = tuple(Text(line) for line in tables.ledger_lines(run.summary)[len(found.rows) :])
    if not found.rows:
        return (Section("Decisions", (Text("The run made no decision about itself: it had all its rounds."), *lines)),)
    return (Section("Decisions", (Table("ledger", *found, tables.LEDGER, left=2), *lines)),)


def _facts(run: Run) -> str:
    summary = run.summary
    sent = (summary["bytes_up"] + summary["bytes_down"]) / 1e6
    failed = f", {summary['failures']} failed replies" if summary["failures"] else ""
    return (
        f"Seed {summary['seed']}, {summary['rounds']} rounds in {summary['wall_s']:.0f} s, {sent:,.1f} MB sent"
        f"{failed}; engine {run.checkpoint.engine}. Run {summary['run_id']}."
    )
