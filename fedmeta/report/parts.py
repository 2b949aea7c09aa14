"""The parts that a run's report and a comparison's share: the data, tables of sites, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from fedmeta.evaluation import NEW, TRAINING, VALIDATION
from fedmeta.experiment import Experiment
from fedmeta.experiment.validation import to_text
from fedmeta.problems.metric import Metric
from fedmeta.report.document import Block, Code, Folded, Section, Table, Text
from fedmeta.report.reading import Run
from fedmeta.tables import Cell, Change, heading
from fedmeta.tracking.description import data_name
from fedmeta.tracking.metrics import latest, site_columns
from fedmeta.versions import versions

NAMED_CLASSES = 30
EXPERIMENT_FILE = "report.toml"


def data(run: Run) -> Section:
    """Returns which sites had which data: rows and classes, or the problem's own."""
    sites = latest(run.history)
    rows: list[tuple[Cell, ...]] = []
    for kind in (NEW, TRAINING, VALIDATION):
        own = sites[sites["kind"] == kind]
        if len(own):
            train = own["rows"]
            spread = f"{train.median():.0f} ({train.min()} to {train.max()})"
            rows.append((f"{kind} sites", len(own), int(train.sum()), spread, int(own["test_rows"].sum())))
    note = (
        "New sites were drawn before training began and took no part in it. Test data are for scores only: nothing "
        "adapts, is standardized or is chosen on them."
    )
    if run.summary.get("held_out") is False:
        note += " Support and query are the same data by nature."
    headings = ["", "sites", "train rows", "per site: median (range)", "test rows"]
    if not run.experiment.on_rows:  # tasks have no rows to count
        headings, rows = headings[:2], [row[:2] for row in rows]
    return Section("The data", (Text(_described(run)), Table("data", headings, rows, note)))


def _described(run: Run) -> str:
    state, experiment = run.checkpoint, run.experiment
    if not experiment.on_rows:
        source = experiment.problem.name if ":" in experiment.problem.name else experiment.data.source
        return f"Each site solves its own task, from {source}."
    described = experiment.data
    name, source = data_name(experiment.params()), f"{described.source} {described.path or ''}".strip()
    named = name if source == name else f"{name} ({source})"
    support = f"{described.ways * described.shots}" if described.ways else f"at most {described.support}"
    shape = " x ".join(str(size) for size in state.shape)
    features = (
        f"{len(state.features)} features a row; " if state.features else f"rows of {shape} values; " * bool(shape)
    )
    few = 0 < len(state.classes) <= NAMED_CLASSES
    classes = f"{len(state.classes)} classes" + (f": {', '.join(state.classes)}" if few else "")
    labels = "labels are numbers" if state.regression else classes
    return f"Data: {named}. Each site adapts on {support} of its rows; {features}{labels}."


def site_table(name: str, sites: pd.DataFrame, score: Metric) -> Table:
    """Returns sites with their scores before and after adapting, local-only where it was computed, further metrics."""
    columns = site_columns(sites)
    changed = sites[columns].astype(object)
    changed["gain"] = [Change(gain) for gain in sites["gain"]]
    headings = [heading(column) for column in columns]
    headings[columns.index("rows")] = "train rows"
    rows = [tuple(row) for row in changed.itertuples(index=False)]
    return Table(name, headings, rows, f"Scores are {score.label}; gain: positive where personalization helps.", left=2)


def again(experiment: Experiment, command: str, made_with: Mapping[str, str], facts: str) -> Section:
    """Returns how to get these numbers again.

    Args:
        experiment: What was run.
        command: The command on `EXPERIMENT_FILE`.
        made_with: The versions that the run was made with; empty where it did not record them.
        facts: Further facts, as sentences.
    """
    whole = without_tracking(experiment)
    used = f"Made with {_listed(made_with)}."
    if not made_with:
        used = f"The run did not record its versions; this page was made with {_listed(versions())}."
    blocks: tuple[Block, ...] = (
        Code(command, "sh"),
        Text(f"{EXPERIMENT_FILE} lies beside this page; the keys that differ from the defaults, and the learner's:"),
        Code(differing(whole), "toml"),
        Folded("Every key, defaults included", (Code(whole.to_toml(), "toml"),)),
        Text(f"{facts} {used}"),
    )
    return Section("How to repeat it", blocks)


def without_tracking(experiment: Experiment) -> Experiment:
    """Returns an experiment without its section [tracking], which describes where results went and not what was run."""
    return experiment.model_copy(update={"tracking": type(experiment)().tracking})


def differing(experiment: Experiment) -> str:
    """Returns as TOML the learner's keys, and those of other sections that are not at their defaults."""
    usual = type(experiment)().model_dump()
    blocks = []
    for section, values in experiment.model_dump().items():
        known = {} if section == "learner" else usual[section]  # its defaults depend on its name
        changed = {key: value for key, value in values.items() if value is not None and known.get(key) != value}
        # A learner's name is what one looks for first.
        named = {"name": changed.pop("name")} if "name" in changed else {}
        lines = [f"{key} = {to_text(value)}" for key, value in (named | changed).items()]
        blocks += ["\n".join([f"[{section}]", *lines])] if lines else []
    return "\n\n".join(blocks) + "\n"


def _listed(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())
