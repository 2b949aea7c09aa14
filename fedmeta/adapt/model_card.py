"""The card of a site's model: what it came from, what it is worth, how to use it. Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from fedmeta.adapt.adaptation import Adapted
from fedmeta.adapt.intervals import LEVEL, Estimate
from fedmeta.adapt.onnx_columns import MISSING_NUMBER
from fedmeta.tables import Cell, markdown_table, number, plain
from fedmeta.trust import SHIPPED, VARIABLE, code_of


def card(adapted: Adapted, files: Sequence[str]) -> str:
    """Returns the card of a site's model, with the files that lie beside it."""
    start, found = adapted.start, adapted.judgement
    model, experiment = start.experiment.model, start.experiment
    facts = [
        ("site's rows", f"{len(adapted.rows)} ({adapted.source})"),
        ("run", f"{start.run_id}, {start.round_number} rounds"),
        ("learner", f"{start.name}, inner rate {start.learner.inner_lr:g}"),
        ("network", model.name + (f", layers {model.hidden}" if model.name in ("mlp", "char_lstm") else "")),
        ("digest of the start", start.digest),
        ("signature of the start", start.signature),
        ("inner steps taken", f"{found.steps} (chosen by cross-validation on the rows)"),
        ("made", adapted.date),
        ("labels", "numbers" if start.form.regression else ", ".join(adapted.rows.classes)),
    ]
    lines = [f"# {experiment.learner.name} adapted to {plain(adapted.name)}", "", adapted.advice, ""]
    lines += [*markdown_table(("", ""), facts, left=2), ""]
    lines += ["## What it is worth", "", *_table(adapted), ""]
    lines += [
        "Each row was scored by a model that neither adapted nor chose its steps on it (nested cross-validation); the "
        f"interval is meant to cover the {found.before.metric} on the site's further rows {LEVEL:.0%} of the time, if "
        "these are drawn as the rows at hand were. It holds for no other site, and not for this one once its data "
        "change.",
        "",
    ]
    if start.experiment.privacy.noise_multiplier:
        lines += [
            "The start was trained with noise for site-level privacy; epsilon in the run's summary covers the sites "
            "that trained it. It does not cover this model: what this site's rows changed was made without noise.",
            "",
        ]
    if adapted.sets:
        lines += [adapted.sets.facts.guarantee, *measured_sets(adapted), ""]
    lines += [f"- {warning}" for warning in adapted.warnings] + [""] * bool(adapted.warnings)
    return "\n".join([*lines, "## How to use it", "", *_use(adapted, files)]) + "\n"


def measured_sets(adapted: Adapted) -> list[str]:
    """Returns a sentence on what the prediction sets gave on the test rows, where there are any."""
    test, form = adapted.test, adapted.start.form
    if not adapted.sets or not test or test.covered is None or test.size is None:
        return []
    what = "mean width" if form.regression else f"mean size of {len(form.classes)} classes"
    return [f"On {test.rows} test rows they held the truth for {test.covered:.1%}; {what}: {number(test.size)}."]


def _table(adapted: Adapted) -> list[str]:
    found, test = adapted.judgement, adapted.test
    headings = ["model", f"{found.before.metric} with {LEVEL:.0%} interval"]
    headings += [f"on {test.rows} test rows"] if test else []
    rows: list[list[Cell]] = [["global", _with_interval(found.before), *([test.before] if test else [])]]
    if found.chosen:
        name = f"after {found.chosen} steps"
        rows.append([name, _with_interval(found.after), *([test.after] if test else [])])
    return markdown_table(headings, rows)


def _with_interval(estimate: Estimate) -> str:
    return f"{number(estimate.score)} [{number(estimate.low)}, {number(estimate.high)}]"


def _use(adapted: Adapted, files: Sequence[str]) -> list[str]:
    form = adapted.start.form
    names = form.columns.names if form.categories else form.features
    columns = f"the columns {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
    if form.categories:
        named = ", ".join(name for name, _ in form.categories)
        columns += f'; {named} by their names, of which one that the run does not know is "other"'
    else:
        columns += ", in this order"
    rows = columns if form.named else f"rows of shape {form.shape}"
    takes = f"All of them take raw rows ({rows}; NaN where a value is missing): standardisation is part of the model."
    lines = [takes, ""]
    if "model.onnx" in files:
        output = "prediction" if form.regression else "probabilities"
        kind = {"torch.float64": "float64", "torch.float32": "float32", "torch.int64": "int64"}[str(form.dtype)]
        lines += ["`model.onnx` needs nothing but ONNX Runtime:", "", "```python", "import onnxruntime", ""]
        lines += ['session = onnxruntime.InferenceSession("model.onnx")']
        if form.categories:
            # One input for each column, in the type of that column; see fedmeta.adapt.onnx_columns.
            lines += [
                'kinds = {"tensor(double)": "float64", "tensor(int64)": "int64", "tensor(string)": str}',
                "cells = {each.name: frame[each.name].to_numpy().astype(kinds[each.type]) "
                "for each in session.get_inputs()}",
                f"{output} = session.run(None, cells)[0]  # a missing cell: NaN, of text an empty one, "
                f"of whole numbers {MISSING_NUMBER}",
            ]
        else:
            lines += [f'{output} = session.run(None, {{"x": rows}})[0]  # rows: {kind}']
        lines += ["```", ""]
    own = sorted(code_of(adapted.start.experiment).keys() - set(SHIPPED))
    variable = f"{VARIABLE}={','.join(own)} " if own else ""
    code = f", {own}" if own else ""
    lines += [
        "`mlflow-model` is served by MLflow, in an environment that has fedmeta:",
        "",
        "```",
        f"{variable}mlflow models predict -m mlflow-model -i rows.json --env-manager local",
        "```",
        "",
        "`model.safetensors` is the torch state:",
        "",
        "```python",
        "from pathlib import Path",
        "",
        "from fedmeta.adapt.model import SiteModel",
        "",
        f'model = SiteModel.read(Path("model.safetensors"){code})',
        "model.predict(rows)  # class names or numbers; model(tensor) gives "
        + ("numbers" if form.regression else "probabilities"),
        "```",
    ]
    return lines
