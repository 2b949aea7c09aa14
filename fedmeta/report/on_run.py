"""The report of one run: does adapting serve sites that were never seen, and whom does it not serve?"""

from __future__ import annotations

from typing import Any

from fedmeta.report import parts
from fedmeta.report.document import Document, Folded, Key, Picture, Pictures, Section, Table, Text
from fedmeta.report.reading import Run
from fedmeta.search.comparison import mean_interval
from fedmeta.tracking import pictures
from fedmeta.tracking.run_page import GROUPS, latest, number, worst_first

CAPTIONS = {
    "sites": "Every site: its score with the global model (ring) and with its own (dot). Names in bold are new sites.",
    "adaptation": "The score after each inner step; the band holds the middle 80 % of the sites.",
    "rounds": "Test scores while the start was learned.",
    "heat_map": "Each site's own model, evaluation by evaluation; the best at the end on top.",
    "gain_by_rows": "What adapting brings each site, against the rows that it has to train on.",
}


def on_run(run: Run) -> Document:
    """Returns the report."""
    summary, sites = run.summary, latest(run.history)
    score = summary["score"]["name"]
    group, judged = _judged(summary)
    name = parts.name_of(run.experiment)
    return Document(
        kind="Federated meta-learning: one run",
        title=f"{summary['learner']} on {name}: {score} {number(judged['personalized']['mean'])} on {group}",
        lead=_lead(run, group, judged, score),
        keys=_keys(run, group, judged, score),
        sections=(
            Section("The question", (Text(_question(run, group)),)),
            parts.data(run),
            Section("What came out", (_table(run, score), _drawn(run))),
            Section("Left behind", parts.left_behind(run)),
            parts.again(
                run.experiment, f"fedmeta run {parts.EXPERIMENT_FILE}", summary.get("versions", {}), _told(run)
            ),
            Section(
                "Every site",
                (Folded(f"All {len(sites)} sites, worst first", (parts.site_table(worst_first(sites), score),)),),
            ),
        ),
    )


def _judged(summary: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Returns the sites by which a run is judged: new ones, where there are any."""
    if "judge" in summary:
        return "validation sites", summary["new_sites"]
    key = "new_sites" if summary["new_sites"]["n"] else "training_sites"
    return GROUPS[key], summary[key]


def _question(run: Run, group: str) -> str:
    steps, rows = run.experiment.evaluation_steps, run.experiment.data.support
    seen = "that took no part in training" if group != "training sites" else "that took part in training"
    return (
        "The sites keep their rows; what they learn together is a start. Does a model that a site makes from that "
        f"start, in {steps} gradient steps on at most {rows} of its own rows, serve sites {seen} better than one "
        "global model for all, and better than what each would learn alone from the same rows?"
    )


def _lead(run: Run, group: str, judged: dict[str, Any], score: str) -> str:
    sites = latest(run.history)
    kind = {"new sites": "new", "training sites": "training", "validation sites": "validation"}[group]
    gains = sites[sites["kind"] == kind]["gain"].dropna().to_numpy(dtype=float)
    gain, low, high = mean_interval(gains, run.experiment.runtime.seed)
    unit = run.summary["score"].get("unit", "")
    what = f"{score} ({unit})" if unit else score
    change = "gains" if gain >= 0 else "loses"
    before, after = number(judged["global"]["mean"]), number(judged["personalized"]["mean"])
    said = (
        f"On {judged['n']} {group} the mean {what} goes from {before} with the global model to {after} "
        f"after adapting: a site {change} {abs(gain):.3f} on average"
        f" (95 % interval over sites {low:+.3f} to {high:+.3f})."
    )
    verdict = " Adapting helps." if low > 0 else " Adapting harms." if high < 0 else " That may be chance."
    if judged["n"] < 2:
        return said.partition(" (95 %")[0] + ". One site is no evidence."
    alone = judged["local_only"]["mean"]
    beside = f" Alone, on the same rows, sites reach {number(alone)}." if alone is not None else ""
    return said + verdict + beside


def _keys(run: Run, group: str, judged: dict[str, Any], score: str) -> tuple[Key, ...]:
    sites = latest(run.history)
    losing = int((sites["gain"] < 0).sum())
    return (
        Key(number(judged["personalized"]["mean"]), "personalized", f"mean {score}, {judged['n']} {group}"),
        Key(number(judged["global"]["mean"]), "global", "one model for all"),
        Key(number(judged["local_only"]["mean"]), "alone", "without the federation"),
        Key(number(judged["personalized"]["worst_decile"]), "worst tenth", f"of the {group}"),
        Key(number(judged["helped"], share=True), "helped", "strictly better than global"),
        Key(str(losing), "left behind", f"of all {len(sites)} sites"),
    )


def _table(run: Run, score: str) -> Table:
    rows = []
    for key, label in GROUPS.items():
        own = run.summary[key]
        if not own["n"]:
            continue
        label = "validation sites" if key == "new_sites" and "judge" in run.summary else label
        scores = [own["local_only"]["mean"], own["global"]["mean"], own["personalized"]["mean"]]
        spread = [own["personalized"]["std"], own["personalized"]["worst_decile"], own["personalized"]["min"]]
        cells = [number(value) for value in (*scores, *spread)]
        rows.append((label, str(own["n"]), *cells, number(own["helped"], share=True)))
    # The summary calls the lowest score `min`; of errors the worst one is the highest, which it does not have.
    headings = ("", "sites", "alone", "global", "personalized", "std", "worst tenth", "lowest", "helped")
    caption = (
        f"{score} on each site's test data, mean over sites. Alone: trained on the "
        "same rows without the federation. Helped: the share of sites whose personalized score is strictly better than "
        "the global one."
    )
    return Table(headings, tuple(rows), caption, strong=0)


def _drawn(run: Run) -> Pictures:
    order = [name for name in CAPTIONS if name in pictures.PICTURES]
    return Pictures(tuple(Picture(name, pictures.PICTURES[name](run.history), CAPTIONS[name]) for name in order))


def _told(run: Run) -> str:
    summary = run.summary
    sent = (summary["bytes_up"] + summary["bytes_down"]) / 1e6
    failed = f", {summary['failures']} failed replies" if summary["failures"] else ""
    return (
        f"Seed {summary['seed']}, {summary['rounds']} rounds in {summary['wall_s']:.0f} s, {sent:,.1f} MB sent"
        f"{failed}; cohort engine {run.checkpoint.engine}. Run {summary['run_id']}."
    )
