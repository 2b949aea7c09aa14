"""Every entry of the gallery is whole: short code, a file to run, a page with figures, a test, a row in the table."""

from pathlib import Path

import pytest

import fedmeta
from experiments.gallery import measure

GALLERY = Path(measure.__file__).parent
ENTRIES = sorted(path.parent.name for path in GALLERY.glob("*/run.toml"))
LONGEST = 250
"""Lines of an entry's own code."""


def test_all_entries_are_found():
    assert len(ENTRIES) >= 8
    assert {folder.name for folder in GALLERY.iterdir() if list(folder.glob("*.py"))} == set(ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_whole(name):
    folder, table = GALLERY / name, (GALLERY / "README.md").read_text()
    code, page = folder / f"{name}.py", (folder / "README.md").read_text()
    assert len(code.read_text().splitlines()) <= LONGEST
    assert (folder / "page.py").exists()
    assert (Path(__file__).parent / f"test_{name}.py").exists()
    assert f"[{name}]({name}/README.md)" in table
    assert f"experiments/gallery/{name}/run.toml" in page
    for picture in [line.partition("](")[2].partition(")")[0] for line in page.splitlines() if line.startswith("![")]:
        assert (folder / picture).exists(), picture


@pytest.mark.parametrize("name", ENTRIES)
def test_every_place_of_a_page_that_its_script_fills_exists_and_no_other(name):
    """What `measure.put` looks for; a name made at run time is any of the page's."""
    page, script = (GALLERY / name / "README.md").read_text(), (GALLERY / name / "page.py").read_text()
    places = [line[5:-4] for line in page.splitlines() if line.startswith("<!-- ") and line != "<!-- end -->"]
    assert len(places) == len(set(places)) == page.count("<!-- end -->")
    written = script.count("measure.put(")
    assert written
    assert places


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entrys_file_is_an_experiment(name):
    experiment = fedmeta.load_experiment(GALLERY / name / "run.toml")
    assert f"experiments.gallery.{name}." in experiment.problem.name
