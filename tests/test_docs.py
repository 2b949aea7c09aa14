"""What the documentation says is what the program does."""

import re
import runpy
from pathlib import Path

import pytest

from fedmeta.experiment import LEARNERS
from fedmeta.experiment.__main__ import reference

ROOT = Path(__file__).parents[1]
PAGES = runpy.run_path(str(ROOT / "docs" / "reference.py"))["PAGES"]


def test_the_reference_of_keys_is_current() -> None:
    assert (ROOT / "docs" / "experiment.md").read_text() == reference(), (
        "python -m fedmeta.experiment > docs/experiment.md"
    )


def test_every_learner_has_a_page_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in LEARNERS:
        assert (ROOT / "docs" / "learners" / f"{name.replace('++', 'pp')}.md").exists(), name
        assert f"`{name}`" in readme, name


@pytest.mark.parametrize("page", PAGES)
def test_the_references_from_docstrings_are_current(page: str) -> None:
    assert (ROOT / "docs" / page).read_text() == PAGES[page](), "python docs/reference.py"


def test_no_page_links_to_nothing() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"
