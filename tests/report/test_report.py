"""A report holds what the run's files hold, loads nothing, and its experiment file repeats the run."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from fedmeta.errors import FedmetaError
from fedmeta.evaluation import summarize
from fedmeta.experiment import Experiment, load_experiment
from fedmeta.problems.metric import score_of
from fedmeta.progress import ignore_progress
from fedmeta.report import export, write
from fedmeta.report.document import Code, Document, Folded, Key, Picture, Pictures, Section, Table, Text
from fedmeta.report.html import html_page
from fedmeta.report.latex import latex_page
from fedmeta.report.markdown import markdown_page
from fedmeta.report.on_run import caption_of
from fedmeta.report.parts import EXPERIMENT_FILE, differing
from fedmeta.report.reading import labelled, read
from fedmeta.report.writing import csv_table
from fedmeta.runtime import run
from fedmeta.search.compare import compare
from fedmeta.tables import Change, Share
from fedmeta.tables import text as shown_as
from fedmeta.tracking import plots
from tests.tracking.browser import CHROMIUM, browser
from tests.tracking.made_up_run import ACCURACY, evaluation

TOML = """
[data]
source = "synthetic"
sites = 12
new_sites = 4
[model]
hidden = "8"
[server]
rounds = 4
[evaluation]
every = 2
[tracking]
uri = "{uri}"
folder = "{folder}"
"""
NOWHERE = "sqlite:////nowhere/mlflow.db"
HOSTILE = '</td><script>alert("1")</script> & `a|b` *c*'


class Parsed(HTMLParser):
    """What a browser would load, and what it would show."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.cells:
            self.cells[-1] += data


def described(folder: Path, *overrides: str, uri: str = "none") -> Experiment:
    return Experiment.from_toml(TOML.format(uri=uri, folder=folder), "a test", overrides)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return root, run(described(root))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    root = tmp_path_factory.mktemp("compared")
    found = compare(
        described(root, "runtime.seed=3"), ["local", "fedavg-ft", "maml"], 2, report=lambda *_: ignore_progress
    )
    return root, found


def page_of(*names: str, root: Path, out: Path) -> str:
    files = write(names, out, root, NOWHERE)
    assert [path.name for path in files] == ["report.html", "report.md", "report.tex", "report_tables"]
    assert set(files) <= set(out.iterdir())
    return files[0].read_text()


def assert_loads_nothing(page: str) -> Parsed:
    parsed = Parsed(page)
    assert not parsed.tags & {"script", "link", "iframe", "object", "embed", "base"}
    within = [address for address in parsed.addresses if not address.startswith("data:image/png;base64,")]
    assert all(address.startswith("#") for address in within), "only parts of the page itself"
    assert {address[1:] for address in within} <= set(parsed.ids)
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(parsed.ids) == len(set(parsed.ids)), "two pictures may not share names of their parts"
    return parsed


def test_a_run_report_holds_its_numbers_and_loads_nothing(made, tmp_path):
    root, result = made
    page = page_of(result.folder.name, root=root, out=tmp_path)
    parsed = assert_loads_nothing(page)
    for group in ("new_sites", "training_sites"):
        own = result.summary[group]
        wanted = [own["n"], own["local_only"]["mean"], own["global"]["mean"], own["personalized"]["mean"]]
        shown = [shown_as(value) for value in wanted]
        at = parsed.cells.index(group.replace("_", " "), 5 * 2)
        assert [cell.strip() for cell in parsed.cells[at + 1 : at + 5]] == shown
    assert page.count("<svg") == 4, "all sites have as many rows: gains against rows would show nothing"
    assert "prefers-color-scheme: dark" in page
    text = (tmp_path / "report.md").read_text()
    assert f"{result.summary['new_sites']['personalized']['mean']:.3f}" in text
    for picture in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (tmp_path / picture).is_file()


@pytest.mark.slow
def test_a_problems_own_pictures_are_in_the_page(made, tmp_path):
    root, result = made
    folder = shutil.copytree(result.folder, tmp_path / "run")
    (folder / "pictures").mkdir(exist_ok=True)
    Image.new("L", (8, 8)).save(folder / "pictures" / "start_before.png")
    page = page_of(str(folder), root=root, out=tmp_path / "out")
    assert_loads_nothing(page)
    assert page.count('<img alt="" src="data:image/png;base64,') == 1
    assert "start before" in page
    assert "(report_pictures/start_before.png)" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "report_pictures" / "start_before.png").is_file()


@pytest.mark.slow
def test_tables_are_written_in_full_as_csv(made, tmp_path):
    root, result = made
    page_of(str(result.folder), root=root, out=tmp_path)
    sites = pd.read_csv(tmp_path / "report_tables" / "sites.csv").set_index("site")
    exact = result.sites.set_index("site").loc[sites.index]
    assert sites["personalized accuracy"].to_numpy() == pytest.approx(exact["personalized_accuracy"].to_numpy())
    names = {path.stem for path in (tmp_path / "report_tables").iterdir()}
    assert names >= {"data", "results", "sites"}


@pytest.mark.slow
def test_a_paper_gets_every_figure_and_table(made, tmp_path):
    root, result = made
    about = str(result.folder)
    files = {path.name for path in export([about], tmp_path / "paper", root, NOWHERE)}
    write([about], tmp_path / "page", root, NOWHERE)
    tables = {path.stem for path in (tmp_path / "page" / "report_tables").iterdir()}
    drawn = {path.stem for path in (tmp_path / "page" / "report_pictures").glob("*.png")}
    assert tables
    assert drawn
    expected = {
        f"{name}.{kind}"
        for names, kinds in ((tables, ("csv", "tex")), (drawn, ("svg", "pdf")))
        for name in names
        for kind in kinds
    }
    assert files == expected | {"captions.md"}
    captions = (tmp_path / "paper" / "captions.md").read_text()
    assert all(f"- {name}.svg, {name}.pdf: " in captions for name in drawn)
    for path in (tmp_path / "paper").iterdir():
        content = path.read_bytes()
        assert str(root).encode() not in content, f"{path.name} names a folder of this machine"
        assert content.startswith(b"%PDF") or path.suffix != ".pdf"
        assert b"<text" in content or path.suffix != ".svg", "letters stay text"
    for name in tables:
        page = (tmp_path / "page" / "report_tables" / f"{name}.csv").read_text()
        assert (tmp_path / "paper" / f"{name}.csv").read_text() == page
        assert r"\toprule" in (tmp_path / "paper" / f"{name}.tex").read_text()
    again = export([about], tmp_path / "again", root, NOWHERE)
    assert all(path.read_bytes() == (tmp_path / "paper" / path.name).read_bytes() for path in again)
    with pytest.raises(FedmetaError, match="already and not empty"):
        export([about], tmp_path / "paper", root, NOWHERE)


def test_every_format_shows_what_is_written_as_it_is(tmp_path):
    """Names may hold anything: markup, formulas, letters that a format keeps for itself."""
    hostile = r"<b>&|_x_*$\~^{}#%"
    figure = Picture("dots", plots.new_figure(2, 2)[0], hostile)
    rows = [(hostile, 0.25, Share(0.5), Change(0.125), None, float("nan"), 3), ("=1+1", 1e-7, 1e6, 0, 1, 2, 3)]
    table = Table("some", (hostile, "a", "b", "c", "d", "e", "f"), rows, hostile)
    blocks = (Text(hostile), table, Pictures([figure]), Code(hostile, "sh"), Folded(hostile, (Text(hostile),)))
    document = Document("kind", hostile, hostile, [Key("1", hostile, hostile)], [Section(hostile, blocks)])
    parsed = assert_loads_nothing(html_page(document, hostile))
    assert "".join(parsed.words).count(hostile) >= 12
    assert [cell.strip() for cell in parsed.cells][:7] == [hostile, "0.250", "50%", "+0.125", "-", "-", "3"]
    markdown = markdown_page(document, hostile, tmp_path / "pictures")
    assert (tmp_path / "pictures" / "dots.png").is_file()
    assert all(line.count("|") - line.count(r"\|") == 8 for line in markdown.splitlines() if line.startswith("|"))
    latex = latex_page(document, hostile, "pictures")
    typeset = latex.partition(r"\begin{verbatim}")[0] + latex.partition(r"\end{verbatim}")[2]
    assert r"\textless{}b\textgreater{}\&\textbar{}\_x\_*\$" in typeset
    assert hostile not in typeset
    assert csv_table(table).splitlines()[2] == "'=1+1,1e-07,1000000.0,0,1,2,3"
    assert csv_table(table).splitlines()[1].endswith(",0.25,0.5,0.125,,,3")


@pytest.mark.slow
def test_sites_left_behind_are_named_whatever_the_name(made, tmp_path):
    root, result = made
    folder = shutil.copytree(result.folder, tmp_path / "run")
    sites = pd.read_parquet(folder / "sites.parquet")
    score = "personalized_accuracy"
    losing = [result.sites["site"].iloc[0], result.sites["site"].iloc[5]]
    sites.loc[sites["site"].isin(losing), "gain"] = [-0.25] * int(sites["site"].isin(losing).sum())
    sites.loc[~sites["site"].isin(losing), "gain"] = 0.125
    sites.loc[sites["site"] == losing[0], "site"] = HOSTILE
    sites.to_parquet(folder / "sites.parquet", index=False)
    assert score in sites.columns
    parsed = assert_loads_nothing(page_of(str(folder), root=root, out=tmp_path / "out"))
    section = "".join(parsed.words).partition("Left behind")[2].partition("How to repeat it")[0]
    assert HOSTILE in section
    assert losing[1] in section
    assert "2 sites are served worse" in section
    assert section.count("-0.250") == 2
    assert "0.125" not in section


@pytest.mark.slow
def test_the_experiment_file_repeats_the_run(made, tmp_path):
    root, result = made
    page_of(str(result.folder / "round-000004.safetensors"), root=root, out=tmp_path)
    again = load_experiment(tmp_path / EXPERIMENT_FILE, ["tracking.uri=none", f"tracking.folder={tmp_path}"])
    assert run(again).summary["new_sites"] == result.summary["new_sites"]
    assert Experiment.from_toml(differing(again)) == again
    assert "[learner]\nname = " in differing(again), "the learner is named though it may be the default"


@pytest.mark.slow
def test_a_comparison_report_holds_every_learner(compared, tmp_path):
    root, found = compared
    page = page_of(str(found.folder), root=root, out=tmp_path)
    parsed = assert_loads_nothing(page)
    for _, row in found.table.iterrows():
        assert any(cell.startswith(f"{row['personalized']:.3f}") for cell in parsed.cells)
    assert page.count("<svg") == 4
    command = "fedmeta compare report.toml --learners local,fedavg-ft,maml --seeds 2"
    assert command in page
    assert load_experiment(tmp_path / EXPERIMENT_FILE).runtime.seed == 3
    assert found.verdict in (tmp_path / "report.md").read_text().replace("\\", "")


@pytest.mark.slow
def test_a_learner_that_failed_is_named(compared, tmp_path):
    root, found = compared
    folder = shutil.copytree(found.folder, tmp_path / "comparison")
    content = json.loads((folder / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps(content | {"left_out": {"imaml": "training diverged"}}))
    page = page_of(str(folder), root=root, out=tmp_path / "out")
    assert "imaml is left out: training diverged" in page
    assert "--learners local,fedavg-ft,maml,imaml" in page


@pytest.mark.slow
def test_several_runs_are_distinguished(made, tmp_path):
    root, first = made
    other = run(described(root, "learner.inner_lr=0.5"))
    page = page_of(first.folder.name, other.folder.name, root=root, out=tmp_path)
    assert_loads_nothing(page)
    for name, result in (("maml, inner_lr 0.1", first), ("maml, inner_lr 0.5", other)):
        assert name in page
        assert f"{result.summary['new_sites']['personalized']['mean']:.3f}" in page
    elsewhere = run(described(root, "data.heterogeneity=2"))
    with pytest.raises(FedmetaError, match="different data"):
        read([first.folder.name, elsewhere.folder.name], root, NOWHERE)
    assert labelled([described(root)] * 2) == ["maml", "maml (2)"]


@pytest.mark.slow
def test_what_cannot_be_reported_is_refused_in_a_line(made, compared, tmp_path):
    root, result = made
    folder = shutil.copytree(result.folder, tmp_path / "unfinished")
    (folder / "summary.json").unlink()
    with pytest.raises(FedmetaError, match=r"has not ended.*--resume"):
        read([str(folder)], root, NOWHERE)
    with pytest.raises(FedmetaError, match="neither a finished run nor a comparison"):
        read(["no-such-run"], root, NOWHERE)
    with pytest.raises(FedmetaError, match="make one for each"):
        read([str(compared[1].folder), str(result.folder)], root, NOWHERE)


@pytest.mark.slow
def test_a_run_in_a_store_alone_has_the_same_report(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    result = run(described(tmp_path / "runs", uri=uri))
    at_hand = write([str(result.folder)], tmp_path / "a", tmp_path, NOWHERE)[0].read_text()
    fetched = write([result.summary["run_id"]], tmp_path / "b", tmp_path / "none", uri)[0].read_text()
    assert fetched.partition("<footer>")[0] == at_hand.partition("<footer>")[0]
    assert summarize(result.sites, [score_of(result.sites)])["new_sites"]["n"] == 4
    found = compare(described(tmp_path / "runs", uri=uri), ["local", "maml"], 1, report=lambda *_: ignore_progress)
    run_id = json.loads((found.folder / "mlflow.json").read_text())["run_id"]
    assert found.verdict in write([run_id], tmp_path / "c", tmp_path / "none", uri)[1].read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_loads_nothing_but_the_page(made, tmp_path):
    root, result = made
    html = write([result.folder.name], tmp_path, root, NOWHERE)[0]
    with browser(tmp_path / "profile") as page:
        page.open(html.as_uri())
        assert page.wait_for({"How to repeat it"}, 60) == set()
        assert page.evaluate("performance.getEntriesByType('resource').length") == 0
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth") is True
        page.open(html.as_uri(), width=390, height=844)
        assert page.wait_for({"How to repeat it"}, 60) == set()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        blocks = "[...document.querySelectorAll('.table, pre, p')]"
        wider = "each => each.scrollWidth > each.clientWidth + 1"
        assert page.evaluate(f"{blocks}.filter({wider}).length") == 0, "a phone folds, and cuts nothing"


@pytest.mark.parametrize(("new", "training"), [(3, 5), (0, 8), (40, 60)])
@pytest.mark.parametrize("sign", [1, -1])
def test_captions_describe_what_is_drawn(new: int, training: int, sign: int) -> None:
    sites = evaluation(new, training)
    sites["gain"] = sign * sites["gain"].abs()
    caption = caption_of("sites", sites, ACCURACY)
    few = new + training <= plots.NAMED_SITES
    assert ("ring" in caption, "by rank" in caption) == (few, not few)
    assert ("bold" in caption) == (few and new > 0)
    assert ("harmed" in caption) == (sign < 0)
    drawn = plots.site_ranking(sites, ACCURACY)
    legend = {text.get_text() for each in drawn.legends for text in each.get_texts()}
    assert ("harmed" in legend) == (sign < 0)
    assert ("shaded" in caption_of("gain_by_rows", sites, ACCURACY)) == (sign < 0)
    assert "only evaluation" in caption_of("rounds", sites, ACCURACY)
    named = [name for name, _, _ in plots.rivals(sites, ACCURACY)]
    assert all(name in caption_of("adaptation", sites, ACCURACY) for name in named)
