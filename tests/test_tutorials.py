"""The tutorials work line by line, from an empty folder, and print what they promise."""

import pytest

from fedmeta.runtime.superlink import free_port
from tests.deployment.proxies import MISSING, NGINX
from tests.pages import ROOT, missing, read, run

TUTORIALS = ROOT / "docs" / "tutorials"


def follow(name, folder, replaced=None):
    page = read(TUTORIALS / f"{name}.md")
    blocks = zip(page.commands, run(page, folder, replaced), strict=True)
    wrong = [
        f"after\n{commands}\nnot {lines}, but:\n{printed[-3000:]}"
        for (commands, promised), printed in blocks
        if (lines := missing(promised, printed))
    ]
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
def test_a_researcher_comes_from_one_file_to_a_report(tmp_path):
    follow("researcher", tmp_path)
    assert "prefers-color-scheme" in (tmp_path / "data" / "compared" / "report" / "report.html").read_text()


@pytest.mark.slow
def test_a_new_site_comes_to_its_own_model(tmp_path):
    follow("new_site", tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(NGINX is None, reason=MISSING)
def test_an_operator_comes_to_a_federation_of_processes(tmp_path):
    ports = {port: str(free_port()) for port in ("8000", "8443", "9101", "9201")}
    ports["port=$((port + 1)) way=$((way + 1))"] = f'port=$(python -c "{FREE}") way=$(python -c "{FREE}")'
    follow("operator", tmp_path, ports)


FREE = "from fedmeta.runtime.superlink import free_port; print(free_port())"


@pytest.mark.parametrize(
    ("promised", "printed", "kept"),
    [
        ("a 0.75 b", "x a 0.78 b", True),
        ("a 0.75 b", "x a 1.25 b", False),
        ("a 0.75 c", "x a 0.75 b", False),
        ("│ new │  8 │", "│ new │ 8 │ 3 │", True),
        ("│ new │  8 │", "│ new │ 12 │ 3 │", False),
        ("8 new", "18 new", False),
        ("100 rounds in 3.1 s", "maml: 100 rounds in 12.0 s", True),
        ("100 rounds in 3.1 s", "maml: 10 rounds in 3.1 s", False),
        ("rmse 12.0", "rmse 12.5", True),
        ("rmse 12.0", "rmse 13.5", False),
    ],
)
def test_a_promise_that_is_not_kept_is_seen(promised, printed, kept):
    assert missing(promised, printed) == ([] if kept else [promised])
