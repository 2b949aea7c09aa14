"""What the documentation says is what the program does."""

from pathlib import Path

from fedmeta.experiment import LEARNERS
from fedmeta.experiment.__main__ import reference

ROOT = Path(__file__).parents[1]


def test_the_reference_of_keys_is_current() -> None:
    assert (ROOT / "docs" / "experiment.md").read_text() == reference(), (
        "python -m fedmeta.experiment > docs/experiment.md"
    )


def test_every_learner_has_a_page_and_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for name in LEARNERS:
        assert (ROOT / "docs" / "learners" / f"{name.replace('++', 'pp')}.md").exists(), name
        assert f"`{name}`" in readme, name
