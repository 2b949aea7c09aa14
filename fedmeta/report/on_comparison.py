"""The report of several learners on the same sites: which serves new sites best, and is that more than chance?"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from fedmeta.experiment import Experiment
from fedmeta.report import learner_pictures, parts
from fedmeta.report.document import Block, Code, Document, Folded, Key, Picture, Pictures, Section, Table, Text
from fedmeta.report.reading import Compared
from fedmeta.search.comparison import Comparison, compared_kind, interval, sites_by_learner
from fedmeta.search.comparison_report import spread
from fedmeta.search.space import describe, with_settings
from fedmeta.tracking import comparison_pictures
from fedmeta.tracking.run_page import number

NAMED_SITES = 10


def on_comparison(compared: Compared) -> Document:
    """Returns the report."""
    found = compared.found
    kind = compared_kind(found.sites)
    run = next(iter(compared.runs.values()), None)
    known = parts.name_of(run.experiment) if run else "the same sites"
    best = found.table.iloc[0]
    return Document(
        kind="Federated meta-learning: learners compared",
        title=f"{best['learner']} serves {kind} sites best on {known}",
        lead=found.verdict,
        keys=_keys(found, kind),
        sections=(
            Section("The question", (Text(_question(found, kind)),)),
            *((parts.data(run),) if run else ()),
            Section("What came out", (_table(found, kind), *_left_out(found), *_settings(found), _drawn(compared))),
            Section("Left behind", (_left_behind(found),)),
            _again(compared),
            Section("Every site", (Folded(f"{kind.capitalize()} sites under each learner", (_sites(found),)),)),
        ),
    )


def _keys(found: Comparison, kind: str) -> tuple[Key, ...]:
    best = found.table.iloc[0]
    what = f"mean personalized {found.score.name}, {kind} sites"
    keys = [Key(number(best["personalized"]), str(best["learner"]), what)]
    others = found.table.iloc[1:4]
    keys += [
        Key(number(row["personalized"]), str(row["learner"]), _against(found, row.to_dict()))
        for _, row in others.iterrows()
    ]
    runs = f"{len(found.table)} learners, {found.runs['seed'].nunique()} seeds"
    return (*keys, Key(str(len(found.runs)), "runs", runs))


def _against(found: Comparison, entry: Mapping[Hashable, Any]) -> str:
    if entry["learner"] == found.baseline:
        return "the baseline"
    sure = "" if entry["low"] > 0 or entry["high"] < 0 else ", not surely"
    return f"{entry['difference']:+.3f} against {found.baseline}{sure}"


def _question(found: Comparison, kind: str) -> str:
    learners = ", ".join(found.table["learner"])
    seen = "that took no part in training" if kind == "new" else "that took part in training"
    return (
        f"Which learner serves sites {seen} best, on the same sites, splits, rounds and seeds: {learners}? "
        f"Each is held against {found.baseline}, site by site; an interval that leaves out zero is more than chance."
    )


def _table(found: Comparison, kind: str) -> Table:
    rows = [
        (
            str(row["learner"]),
            spread(row["global"], row["global_sd"]),
            spread(row["personalized"], row["personalized_sd"]),
            number(row["worst_decile"]),
            number(row["helped"], share=True),
            "baseline" if row["learner"] == found.baseline else interval(row["difference"], row["low"], row["high"]),
            f"{row['bytes_up'] / 1e6:,.1f}",
            f"{row['wall_s']:,.0f}",
        )
        for _, row in found.table.iterrows()
    ]
    headings = ("learner", "global", "personalized", "worst tenth", "helped", f"against {found.baseline}")
    caption = (
        f"Mean {found.score.name} of {kind} sites on their test rows, ± standard deviation over seeds; differences are "
        "paired by site and seed, with their 95 % interval (bootstrap over sites)."
    )
    return Table((*headings, "MB up", "seconds"), tuple(rows), caption, strong=0)


def _left_out(found: Comparison) -> tuple[Block, ...]:
    return tuple(Text(f"{learner} is left out: {reason}") for learner, reason in found.left_out.items())


def _settings(found: Comparison) -> tuple[Block, ...]:
    if not found.trials:
        return ()
    rows = tuple((name, describe(found.trials[name][0].settings), str(len(found.trials[name])))
                 for name in found.table["learner"])  # fmt: skip
    caption = "Each learner's best settings, chosen on validation sites of the first seed; no new site of it was seen."
    return (Table(("learner", "settings", "tried"), rows, caption, left=2),)


def _drawn(compared: Compared) -> Pictures:
    found = compared.found
    drawn = [
        Picture(
            "differences",
            comparison_pictures.differences(found.table, found.baseline, found.score),
            f"Each learner against {found.baseline}, paired by site, with its 95 % interval; rings are not sure.",
        ),
        Picture(
            "every_site",
            learner_pictures.every_site(found),
            "Every site and seed is a dot; the bar is the mean, the dotted line the mean of the global model.",
        ),
    ]
    if (found.table["bytes_up"] > 0).any():
        caption = "What a site's gain costs the line: the means over seeds."
        drawn.append(Picture("traffic", comparison_pictures.traffic(found.table, found.score), caption))
    histories = {name: run.history for name, run in compared.runs.items()}
    if any(history["round"].nunique() > 1 for history in histories.values()):
        caption = "The mean over sites and seeds; the band reaches from the lowest seed to the highest."
        drawn.append(Picture("over_rounds", learner_pictures.over_rounds(found, histories), caption))
    return Pictures(tuple(drawn))


def _left_behind(found: Comparison) -> Table:
    kind = compared_kind(found.sites)
    rows = []
    for learner in found.table["learner"]:
        own = found.sites[found.sites["learner"] == learner].dropna(subset=["gain"])
        new = own[own["kind"] == kind]
        losing = new[new["gain"] < 0].sort_values(["gain", "site"])
        names = [f"{site} ({gain:+.3f})" for site, gain in zip(losing["site"], losing["gain"], strict=True)]
        more = f" and {len(names) - NAMED_SITES} more" if len(names) > NAMED_SITES else ""
        others = own[own["kind"] != kind]
        rest = f"{int((others['gain'] < 0).sum())} of {len(others)}" if len(others) else "-"
        said = ", ".join(names[:NAMED_SITES]) + more if names else "nobody"
        rows.append((str(learner), f"{len(losing)} of {len(new)}", said, rest))
    caption = "Sites whose personalized score is below their global one, counted once per seed, the largest loss first."
    return Table(("learner", f"{kind} sites", "who", "other sites"), tuple(rows), caption, left=4)


def _sites(found: Comparison) -> Table:
    frame = sites_by_learner(found)
    order = list(found.table["learner"])
    rows = tuple(
        (str(row["site"]), f"{int(row['rows']):,}", str(int(row["seeds"])), *(number(row[name]) for name in order))
        for _, row in frame.iterrows()
    )
    return Table(("site", "train rows", "seeds", *order), rows, "Worst first under the best learner.")


def _again(compared: Compared) -> Section:
    found, run = compared.found, next(iter(compared.runs.values()), None)
    ids = " ".join(found.runs["run_id"])
    if run is None:
        told = f"The files of its runs are not here; MLflow has them: {ids}"
        return Section("How to do it again", (Text(told),))
    if not compared.command:
        lines = [f"# {row['learner']}, seed {row['seed']}: {row['run_id']}" for _, row in found.runs.iterrows()]
        blocks: list[Block] = [Text("Runs that were made one by one; each keeps its experiment.toml.")]
        blocks.append(Code("\n".join(lines), "sh"))
        for each in compared.runs.values():
            toml = parts.differing(parts.where_left_out(each.experiment))
            blocks.append(Folded(f"{each.summary['learner']}, seed {each.summary['seed']}", (Code(toml, "toml"),)))
        return Section("How to do it again", tuple(blocks))
    seeds = found.runs["seed"].nunique()
    tuned = f" --tune {len(next(iter(found.trials.values())))}" if found.trials else ""
    learners = ",".join([*dict.fromkeys(found.runs["learner"]), *found.left_out])
    command = f"fedmeta compare {parts.EXPERIMENT_FILE} --learners {learners} --seeds {seeds}{tuned}"
    told = f"Seeds {', '.join(str(seed) for seed in sorted(set(found.runs['seed'])))}. Runs {ids}."
    return parts.again(shared(compared), command, run.summary.get("versions", {}), told)


def shared(compared: Compared) -> Experiment:
    """Returns the experiment that the compared runs have in common: the baseline's with the first seed, untuned."""
    found = compared.found
    first = int(found.runs["seed"].min())
    baseline = found.runs[(found.runs["learner"] == found.baseline) & (found.runs["seed"] == first)]["run_id"]
    runs = compared.runs
    run = runs.get(str(baseline.iloc[0])) or next(iter(runs.values()))
    trials = found.trials.get(run.summary["learner"], ())
    untuned = next((trial.settings for trial in trials if trial.untuned), {})
    return with_settings(run.experiment, untuned)
