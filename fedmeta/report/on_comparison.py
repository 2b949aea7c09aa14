"""The report of several learners on the same sites: which serves new sites best, and does the interval exclude 0?"""

from __future__ import annotations

import shlex

import pandas as pd

from fedmeta.experiment import Experiment
from fedmeta.report import parts
from fedmeta.report.document import Block, Code, Document, Folded, Key, Picture, Pictures, Section, Table, Text
from fedmeta.report.reading import Compared
from fedmeta.search.comparison import Comparison, compared_kind, significance, sites_by_learner
from fedmeta.search.comparison_report import against, spread
from fedmeta.search.space import describe, with_settings
from fedmeta.tables import Share, number
from fedmeta.tracking import comparison_plots
from fedmeta.tracking.description import data_name

NAMED_SITES = 10


def on_comparison(compared: Compared) -> Document:
    """Returns the report."""
    found = compared.found
    kind = compared_kind(found.sites)
    run = next(iter(compared.runs.values()), None)
    name = data_name(run.experiment.params()) if run else "the same sites"
    best = found.table.iloc[0]
    learners = ", ".join(found.table["learner"])
    seen = "that took no part in training" if kind == "new" else "that took part in training"
    question = (
        f"Which learner serves sites {seen} best, on the same sites, splits, rounds and seeds: {learners}? "
        f"Each is compared with {found.baseline}, site by site, with the 95 % interval of the mean difference."
    )
    left_out = [Text(f"{learner} is left out: {reason}") for learner, reason in found.left_out.items()]
    return Document(
        kind="Federated meta-learning: learners compared",
        title=f"{best['learner']} serves {kind} sites best on {name}",
        lead=found.verdict,
        keys=_keys(found, kind),
        sections=(
            Section("The question", (Text(question),)),
            *((parts.data(run),) if run else ()),
            Section("Results", (_table(found, kind), *left_out, *_settings(found), _plots(compared, kind))),
            Section("Left behind", (_left_behind(found, kind),)),
            _again(compared),
            Section("Every site", (Folded(f"{kind.capitalize()} sites under each learner", (_sites(found),)),)),
        ),
    )


def _keys(found: Comparison, kind: str) -> tuple[Key, ...]:
    best = found.table.iloc[0]
    label = f"mean personalized {found.score.label}, {kind} sites"
    keys = [Key(number(best["personalized"]), str(best["learner"]), label)]
    for _, row in found.table.iloc[1:4].iterrows():
        note = "the baseline"
        if row["learner"] != found.baseline:
            doubt = significance(row["low"], row["high"]).partition(" (")[0]
            note = f"{number(row['difference'], sign=True)} against {found.baseline}, {doubt}"
        keys.append(Key(number(row["personalized"]), str(row["learner"]), note))
    runs = f"{len(found.table)} learners, {found.runs['seed'].nunique()} seeds"
    return (*keys, Key(str(len(found.runs)), "runs", runs))


def _table(found: Comparison, kind: str) -> Table:
    rows = [
        (
            str(row["learner"]),
            row["local_only"],
            spread(row["global"], row["global_sd"]),
            spread(row["personalized"], row["personalized_sd"]),
            row["worst_decile"],
            Share(row["helped"]),
            Share(row["harmed"]),
            against(found, row),
            f"{row['bytes_up'] / 1e6:,.1f}",
            f"{row['wall_s']:,.0f}",
        )
        for _, row in found.table.iterrows()
    ]
    headings = ("learner", "local-only", "global", "personalized", "worst 10 %", "helped", "harmed")
    better = "higher" if found.score.higher_is_better else "lower"
    caption = (
        f"Mean {found.score.label} of {kind} sites on their test data, {better} is better, ± standard deviation over "
        "seeds; differences are paired by site and seed, with their 95 % interval (bootstrap over sites)."
    )
    return Table("results", (*headings, f"against {found.baseline}", "MB up", "seconds"), rows, caption, strong=0)


def _settings(found: Comparison) -> tuple[Block, ...]:
    if not found.trials:
        return ()
    rows = [
        (name, describe(found.trials[name][0].settings), len(found.trials[name])) for name in found.table["learner"]
    ]
    caption = "Each learner's best settings, chosen on validation sites of the first seed; no new site of it was seen."
    return (Table("settings", ("learner", "settings", "tried"), rows, caption, left=2),)


def _plots(compared: Compared, kind: str) -> Pictures:
    found, order = compared.found, list(compared.found.table["learner"])
    several = found.runs["seed"].nunique() > 1
    drawn = [
        Picture(
            "differences",
            comparison_plots.differences(found.table, found.baseline, found.score),
            f"Difference in {found.score.label} of each learner to {found.baseline}, paired by site, with its 95 % "
            f"interval{_rings(found)}.",
        ),
        Picture(
            "every_site",
            comparison_plots.every_site(found.sites, order, kind, found.score),
            f"Personalized {found.score.label}: a dot is a {kind} site{' in one seed' if several else ''}, the bar is "
            "the mean, the dotted line the mean of the global model.",
        ),
    ]
    if (found.table["bytes_up"] > 0).any():
        over = " over seeds" if several else ""
        caption = f"Mean {found.score.label} of new sites{over} against what the sites sent in a run."
        drawn.append(Picture("traffic", comparison_plots.traffic(found.table, found.score), caption))
    ids = found.runs.groupby("learner")["run_id"].agg(list)
    histories = {
        learner: [compared.runs[run_id].history for run_id in ids[learner] if run_id in compared.runs]
        for learner in order
    }
    if any(history["round"].nunique() > 1 for each in histories.values() for history in each):
        band = "; the band reaches from the lowest seed to the highest" if several else ""
        caption = f"Mean {found.score.label} over {kind} sites{' and seeds' if several else ''}, by round{band}."
        drawn.append(Picture("over_rounds", comparison_plots.over_rounds(histories, kind, found.score), caption))
    return Pictures(drawn)


def _rings(found: Comparison) -> str:
    """Returns what rings in the picture of differences are, where there is one."""
    includes = (found.table["low"] <= 0) & (found.table["high"] >= 0)
    others = found.table["learner"] != found.baseline
    return "; a ring: the interval includes 0" if (includes & others).any() else ""


def _left_behind(found: Comparison, kind: str) -> Table:
    rows = []
    for learner in found.table["learner"]:
        own = found.sites[found.sites["learner"] == learner].dropna(subset=["gain"])
        new, others = own[own["kind"] == kind], own[own["kind"] != kind]
        losing = new[new["gain"] < 0].sort_values(["gain", "site"])
        names = [
            f"{site} ({number(gain, sign=True)})" for site, gain in zip(losing["site"], losing["gain"], strict=True)
        ]
        more = f" and {len(names) - NAMED_SITES} more" if len(names) > NAMED_SITES else ""
        rest = f"{int((others['gain'] < 0).sum())} of {len(others)}" if len(others) else "-"
        listed = ", ".join(names[:NAMED_SITES]) + more if names else "none"
        rows.append((str(learner), f"{len(losing)} of {len(new)}", listed, rest))
    caption = (
        f"Sites whose personalized {found.score.name} is worse than their global one, counted once per seed, the "
        "largest loss first."
    )
    return Table("left_behind", ("learner", f"{kind} sites", "which", "other sites"), rows, caption, left=4)


def _sites(found: Comparison) -> Table:
    frame: pd.DataFrame = sites_by_learner(found)
    order = list(found.table["learner"])
    rows = [
        (str(row["site"]), int(row["rows"]), int(row["seeds"]), *(row[name] for name in order))
        for _, row in frame.iterrows()
    ]
    caption = f"Personalized {found.score.label}, worst first under the best learner."
    return Table("sites", ("site", "train rows", "seeds", *order), rows, caption)


def _again(compared: Compared) -> Section:
    found, run = compared.found, next(iter(compared.runs.values()), None)
    ids = " ".join(found.runs["run_id"])
    if run is None:
        return Section("How to repeat it", (Text(f"The files of its runs are not here; MLflow has them: {ids}"),))
    if not compared.command:
        lines = [f"# {row['learner']}, seed {row['seed']}: {row['run_id']}" for _, row in found.runs.iterrows()]
        blocks: list[Block] = [Text("Runs that were made one by one; each keeps its experiment.toml.")]
        blocks.append(Code("\n".join(lines), "sh"))
        for each in compared.runs.values():
            toml = parts.differing(parts.without_tracking(each.experiment))
            blocks.append(Folded(f"{each.summary['learner']}, seed {each.summary['seed']}", (Code(toml, "toml"),)))
        return Section("How to repeat it", tuple(blocks))
    tuned = f" --tune {len(next(iter(found.trials.values())))}" if found.trials else ""
    learners = ",".join([*dict.fromkeys(found.runs["learner"]), *found.left_out])
    seeds = sorted(set(found.runs["seed"]))
    command = f"fedmeta compare {parts.EXPERIMENT_FILE} --learners {shlex.quote(learners)} --seeds {len(seeds)}{tuned}"
    facts = f"Seeds {', '.join(str(seed) for seed in seeds)}. Runs {ids}."
    return parts.again(shared(compared), command, run.summary.get("versions", {}), facts)


def shared(compared: Compared) -> Experiment:
    """Returns the experiment that the compared runs have in common: the baseline's with the first seed, untuned."""
    found = compared.found
    first = int(found.runs["seed"].min())
    baseline = found.runs[(found.runs["learner"] == found.baseline) & (found.runs["seed"] == first)]["run_id"]
    run = compared.runs.get(str(baseline.iloc[0])) or next(iter(compared.runs.values()))
    trials = found.trials.get(run.summary["learner"], ())
    untuned = next((trial.settings for trial in trials if trial.untuned), {})
    return with_settings(run.experiment, untuned)
