"""The learners' pages say what the code does: every learner, its keys and their defaults."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from fedmeta import Task
from fedmeta.learners import LEARNERS, build, settings_of

PAGES = Path(__file__).parents[2] / "docs" / "learners"


@pytest.mark.parametrize("name", LEARNERS)
def test_a_page_names_each_key_and_its_default(name: str) -> None:
    page = (PAGES / f"{name.replace('+', 'p')}.md").read_text()
    assert page.startswith(f"# {name}\n")
    assert f"[`{name}`]({name.replace('+', 'p')}.md)" in (PAGES / "README.md").read_text()
    reported = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page, re.MULTILINE))
    defaults = {field.name: field.default for field in fields(LEARNERS[name])}
    for key, default in reported.items():
        assert default.strip('"') == (str(defaults[key]) or "empty")
    unused = {
        "per-fedavg": {"inner_steps"},
        "fedper": {"body_steps"},
        "protonet": {"inner_steps", "inner_lr"},
    }.get(name, set())
    assert set(reported) == set(settings_of(LEARNERS[name])) - unused


def test_the_example_of_a_learner_of_ones_own_runs() -> None:
    example = re.findall(r"```python\n(.*?)```", (PAGES / "README.md").read_text(), re.DOTALL)[0]
    names: dict[str, type] = {"__name__": __name__}
    exec(example, names)
    learner = names["SignMaml"](torch.nn.Linear(2, 2), inner_steps=1)
    rows = (torch.randn(3, 2), torch.tensor([0, 1, 0]))
    gradient, _ = learner.meta_gradient(learner.init(0), Task(rows, rows))
    fomaml, _ = build("fomaml", torch.nn.Linear(2, 2), inner_steps=1).meta_gradient(learner.init(0), Task(rows, rows))
    assert all(torch.equal(value, fomaml[name].sign()) for name, value in gradient.items())
