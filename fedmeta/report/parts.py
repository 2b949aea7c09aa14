"""The parts that a run's report and a comparison's have in common: the data, and how to do it again."""

from __future__ import annotations

import pandas as pd

from fedmeta.evaluation import NEW, TRAINING, VALIDATION
from fedmeta.experiment import Experiment
from fedmeta.experiment.validation import to_text
from fedmeta.problems.metric import score_of
from fedmeta.report.document import Block, Code, Folded, Section, Table, Text
from fedmeta.report.reading import Run
from fedmeta.tracking.run_page import data_name, latest, number
from fedmeta.versions import versions

KINDS = (NEW, TRAINING, VALIDATION)
NAMED_CLASSES = 30
EXPERIMENT_FILE = "report.toml"


def name_of(experiment: Experiment) -> str:
    """Returns what to call the data."""
    return data_name(experiment.params())


def data(run: Run) -> Section:
    """Returns who had which data: sites, rows, classes."""
    sites = latest(run.history)
    rows = []
    for kind in KINDS:
        own = sites[sites["kind"] == kind]
        if len(own):
            train, test = own["rows"], own["test_rows"]
            spread = f"{train.median():.0f} ({train.min()} to {train.max()})"
            rows.append((f"{kind} sites", f"{len(own):,}", f"{train.sum():,}", spread, f"{test.sum():,}"))
    table = Table(
        ("", "sites", "train rows", "per site: median (range)", "test rows"),
        tuple(rows),
        "New sites were drawn before training began and took no part in it. Test rows judge; they adapt, "
        "normalise and choose nothing.",
    )
    return Section("The data", (Text(_what(run)), table))


def _what(run: Run) -> str:
    state, described = run.checkpoint, run.experiment.data
    name = name_of(run.experiment)
    source = " ".join(part for part in (described.source, described.path) if part)
    named = name if source == name else f"{name} ({source})"
    shape = " x ".join(str(size) for size in state.shape)
    features = f"{len(state.features)} features a row" if state.features else f"rows of {shape} values" if shape else ""
    if state.regression:
        labels = "labels are numbers"
    elif len(state.classes) > NAMED_CLASSES:
        labels = f"{len(state.classes)} classes"
    else:
        labels = f"{len(state.classes)} classes: {', '.join(state.classes)}"
    said = "; ".join(part for part in (features, labels) if part)
    return f"Data: {named}. Each site adapts on {_support(run)} of its rows; {said}."


def _support(run: Run) -> str:
    settings = run.experiment.data
    return f"{settings.ways * settings.shots}" if settings.ways else f"at most {settings.support}"


def left_behind(run: Run) -> tuple[Block, ...]:
    """Returns the sites that personalisation leaves below their global score, the one that loses most first."""
    sites = latest(run.history)
    score = score_of(sites).name
    losing = sites[sites["gain"] < 0].sort_values(["gain", "site"])
    if losing.empty:
        return (Text("No site: each one's personalized score is at least its global one."),)
    many = "sites are" if len(losing) > 1 else "site is"
    said = (
        f"{len(losing)} {many} served worse by a personalized model than by the global one, of {len(sites)}. "
        "The global model is the better one there; with evaluation.gate = true each site decides that on its own rows."
    )
    return Text(said), site_table(losing, score)


def site_table(sites: pd.DataFrame, score: str) -> Table:
    """Returns sites with their scores before and after adapting."""
    columns = ["site", "kind", "rows", f"global_{score}", f"personalized_{score}", "gain"]
    rows = [
        (str(name), str(kind), f"{count:,}", number(before), number(after), f"{gain:+.3f}" if gain == gain else "-")
        for name, kind, count, before, after, gain in sites[columns].itertuples(index=False)
    ]
    headings = ("site", "kind", "train rows", f"global {score}", f"personalized {score}", "gain")
    return Table(headings, tuple(rows), left=2)


def again(experiment: Experiment, command: str, made_with: dict[str, str], told: str) -> Section:
    """Returns how to get these numbers again.

    Args:
        experiment: What was run, without what says only where.
        command: The command on `EXPERIMENT_FILE`.
        made_with: The versions that the run was made with; empty where it did not write them down.
        told: Further facts, as sentences.
    """
    whole = where_left_out(experiment)
    blocks: list[Block] = [
        Code(command, "sh"),
        Text(f"{EXPERIMENT_FILE}, beside this page; this is what differs from the defaults:"),
        Code(differing(whole), "toml"),
        Folded("Every key, defaults included", (Code(whole.to_toml(), "toml"),)),
        Text(f"{told} {_versions(made_with)}".strip()),
    ]
    return Section("How to do it again", tuple(blocks))


def where_left_out(experiment: Experiment) -> Experiment:
    """Returns an experiment without its section [tracking], which says where it was written and not what it was."""
    return experiment.model_copy(update={"tracking": type(experiment)().tracking})


def differing(experiment: Experiment) -> str:
    """Returns as TOML the keys that are not at their defaults."""
    usual = type(experiment)().model_dump()
    blocks = []
    for section, values in experiment.model_dump().items():
        said = {key: value for key, value in values.items() if value is not None}
        lines = [f"{key} = {to_text(value)}" for key, value in said.items()
                 if key not in usual[section] or usual[section][key] != value]  # fmt: skip
        if lines or section == "learner":
            lines = lines if section != "learner" or "name" not in said else _named_first(said, lines)
            blocks.append("\n".join([f"[{section}]", *lines]))
    return "\n\n".join(blocks) + "\n"


def _named_first(said: dict[str, object], lines: list[str]) -> list[str]:
    """Returns the learner's lines with its name, default or not: nobody should have to look it up."""
    name = f"name = {to_text(said['name'])}"
    return [name, *(line for line in lines if line != name)]


def _versions(made_with: dict[str, str]) -> str:
    if made_with:
        return f"Made with {_listed(made_with)}."
    return f"The run did not write its versions down; this page was made with {_listed(versions())}."


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())
