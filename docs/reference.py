"""Writes docs/api.md and docs/messages.md from the docstrings of what they describe: `python docs/reference.py`."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict

import fedmeta
from fedmeta import engines, learners, messages, noise
from fedmeta.messages import (
    CategoriesReply,
    CategoriesRequest,
    EngineReply,
    EvaluateReply,
    NormsReply,
    RoundRequest,
    SitesReply,
    SumsReply,
    SumsRequest,
    TrainReply,
)
from fedmeta.messages.secure import (
    Delivery,
    KeysReply,
    KeysRequest,
    MaskedReply,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
)
from fedmeta.search import compare, comparison, comparison_report

FOLDER = Path(__file__).parent
LONGEST_LINE = 100
BY_HAND = "Made by `python docs/reference.py` from docstrings; do not edit."

API: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("fedmeta", (fedmeta.load_experiment, fedmeta.Experiment, fedmeta.run, fedmeta.Result, fedmeta.Task)),
    ("fedmeta.adapt.classifier", (fedmeta.PersonalizedClassifier,)),
    ("fedmeta.problems", (fedmeta.Problem, fedmeta.Metric, fedmeta.Solver, fedmeta.TaskSource, fedmeta.implicit)),
    ("fedmeta.noise", (noise.noise_key, noise.dropout, noise.uniform, noise.normal)),
    ("fedmeta.learners", (learners.build, learners.Learner)),
    ("fedmeta.engines", (engines.meta_gradients,)),
    ("fedmeta.search.compare", (compare.compare,)),
    ("fedmeta.search.comparison", (comparison.Comparison,)),
    ("fedmeta.search.comparison_report", (comparison_report.write,)),
)
"""The modules that a program uses, and what of them."""

THETA = {"theta.weight": torch.zeros(3, 2)}
NAMES = ("hospital-a", "hospital-b")
KEY = bytes(32)
DELIVERY = Delivery.of("a round", {NAMES: KEY})
FIGURES = np.zeros((2, 6))
MESSAGES: tuple[tuple[str, str, Any], ...] = (
    (
        messages.QUERY_SITES,
        "node to server",
        SitesReply(NAMES, (40, 40), (20, 20), ("0", "1"), ("age",), (1,), False, False),
    ),
    (messages.QUERY_CATEGORIES, "server to node", CategoriesRequest(NAMES, ("sex",))),
    (messages.QUERY_CATEGORIES, "node to server", CategoriesReply((("sex", ("F", "M")),))),
    (messages.QUERY_SUMS, "server to node", SumsRequest(NAMES)),
    (messages.QUERY_SUMS, "node to server", SumsReply(np.zeros(2), np.zeros(2), np.zeros(2))),
    (messages.QUERY_ENGINE, "node to server", EngineReply("lowrank", 1 << 30, {"loop": 0.02, "lowrank": 0.01})),
    (messages.QUERY_NORMS, "node to server", NormsReply(NAMES, np.zeros(2))),
    (f"{messages.TRAIN}, {messages.EVALUATE}", "server to node", RoundRequest(THETA, 1, ("0", "1"), NAMES, "maml")),
    (messages.TRAIN, "node to server", TrainReply(THETA, 2.0, NAMES, np.zeros(2), np.ones(2, dtype=bool))),
    (messages.QUERY_KEYS, "server to node", KeysRequest(NAMES, "a round")),
    (messages.QUERY_KEYS, "node to server", KeysReply(NAMES, (KEY, KEY), (KEY, KEY))),
    (
        messages.QUERY_SHARES,
        "server to node",
        SharesRequest(NAMES, "a round", 2, 1, 2, NAMES, (0, 1), (KEY, KEY), (KEY, KEY)),
    ),
    (messages.QUERY_SHARES, "node to server", SharesReply(NAMES, NAMES, (0, 1), (1, 0), (KEY, KEY))),
    (f"{messages.MASKED_TRAIN}, {messages.MASKED_SUMS}", "server to node, beside the request", DELIVERY),
    (
        f"{messages.MASKED_TRAIN}, {messages.MASKED_SUMS}",
        "node to server",
        MaskedReply(NAMES, np.zeros((2, 9), dtype=np.uint64)),
    ),
    (messages.QUERY_UNMASK, "server to node", UnmaskRequest(NAMES, "a round", 2, NAMES, ())),
    (messages.QUERY_UNMASK, "node to server", UnmaskReply(NAMES, NAMES, (0,), (1,), (KEY + b"0",))),
    (
        messages.EVALUATE,
        "node to server",
        EvaluateReply(NAMES, {"loss": FIGURES, "accuracy": FIGURES, "ece": FIGURES}, np.zeros(2, dtype=np.int64)),
    ),
)
"""Every message with an example of its content."""


def api() -> str:
    """Returns docs/api.md."""
    parts = ["# Python", BY_HAND, "What is not here may change; [the README](../README.md) has an example."]
    for module, members in API:
        parts.append(f"## {module}")
        for member in members:
            parts += _described(member, module)
    return "\n\n".join(parts) + "\n"


def message_contract() -> str:
    """Returns docs/messages.md."""
    summary, *rest = (inspect.getdoc(messages) or "").split("\n\n")
    parts = ["# Messages", BY_HAND, summary, *(re.sub(r"\n +", " ", line) for line in rest[0].split("\n`"))]
    parts = [*parts[:3], *(f"- `{line.lstrip('`')}" for line in parts[3:]), *rest[1:]]
    for name, way, example in MESSAGES:
        kind = type(example)
        parts += [f"## {name}, {way}: `{kind.__name__}`", _first(kind), *_fields(kind), *_on_the_wire(example)]
    codes = [f"| `{code}` | {meaning} |" for code, meaning in messages.FAILURES.items()]
    parts += ["## Failures", "\n".join(["| code | meaning |", "|---|---|", *codes])]
    return "\n\n".join(parts) + "\n"


def _described(member: Any, module: str) -> Iterator[str]:
    name = member.__name__
    if not inspect.isclass(member):
        yield f"### {module}.{name}"
        yield from _function(member, name)
        return
    yield f"### {module}.{name}"
    yield _prose(inspect.getdoc(member) or "")
    for attribute, value in vars(member).items():
        function = value.__func__ if isinstance(value, classmethod) else value
        if not attribute.startswith("_") and inspect.isfunction(function) and function.__doc__:
            yield f"#### {name}.{attribute}"
            yield from _function(function, attribute)


def _function(function: Callable[..., Any], name: str) -> Iterator[str]:
    shown = list(_parameters(inspect.signature(function)))
    returned = _typed(inspect.signature(function).return_annotation)
    line = f"{name}({', '.join(shown)}) -> {returned}"
    if len(line) > LONGEST_LINE:
        line = f"{name}(\n" + "".join(f"    {each},\n" for each in shown) + f") -> {returned}"
    yield f"```python\n{line}\n```"
    yield _prose(inspect.getdoc(function) or "")


def _parameters(signature: inspect.Signature) -> Iterator[str]:
    named_alone = False
    for each in signature.parameters.values():
        if each.name in ("self", "cls"):
            continue
        if each.kind is each.KEYWORD_ONLY and not named_alone:
            named_alone = True
            yield "*"
        stars = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        usual = "" if each.default is each.empty else f" = {getattr(each.default, '__name__', repr(each.default))}"
        yield f"{stars}{each.name}: {_typed(each.annotation)}{usual}"


def _typed(annotation: Any) -> str:
    """Returns a type as one writes it, without the modules that it comes from."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b[a-z_]+(?:\.[a-z_]+)*\.(?=[A-Z])", "", text)


def _prose(text: str) -> str:
    """Returns a Google-style docstring as Markdown: its sections become lists."""
    lines: list[str] = []
    section = ""
    for line in text.split("\n"):
        if re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            section = line
            lines += [f"*{line[:-1]}*", ""]
        elif section in ("Args:", "Attributes:", "Raises:") and (found := re.match(r" {4}(\**\w+): (.*)", line)):
            lines.append(f"- `{found[1]}`: {found[2]}")
        else:
            lines.append(line.strip() if section and not line.startswith(" " * 8) else line.removeprefix(" " * 6))
    return "\n".join(lines).strip()


def _first(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0]


def _fields(kind: type) -> Iterator[str]:
    """Returns a message's fields as a table, in the words of its docstring."""
    text = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2]
    described = {
        found[1]: " ".join(found[2].split()) for found in re.finditer(r"^ {4}(\w+): ((?:.|\n {8})*)", text, re.M)
    }
    if not described:
        yield ", ".join(f"`{field.name}`: `{field.type}`" for field in dataclasses.fields(kind)) + "."
        return
    rows = [f"| `{field.name}` | `{field.type}` | {described[field.name]} |" for field in dataclasses.fields(kind)]
    yield "\n".join(["| field | type | what it is |", "|---|---|---|", *rows])


def _on_the_wire(example: Any) -> Iterator[str]:
    content: RecordDict = example.pack()
    records = []
    for name, record in content.items():
        values = {key: _kind(value) for key, value in record.items()}
        if isinstance(record, ArrayRecord):
            values = {"one per tensor": "array"}
        records.append(f"`{name}` ({type(record).__name__}: {', '.join(f'{k} {v}' for k, v in values.items())})")
    yield "On the wire: " + "; ".join(records) + "."


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"[{type(value[0]).__name__}]" if value else "[]"
    return type(value).__name__


PAGES: dict[str, Callable[[], str]] = {"api.md": api, "messages.md": message_contract}

if __name__ == "__main__":
    for name, text in PAGES.items():
        (FOLDER / name).write_text(text())
