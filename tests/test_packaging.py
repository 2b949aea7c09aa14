"""What is built and what is installed: the wheel holds the three packages alone, and the audit reads its report."""

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_the_three_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "-w", str(tmp_path)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip(f"the build's own tool cannot be had: {built.stderr.splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packages = {name.partition("/")[0] for name in names}
    assert {name for name in packages if not name.endswith(".dist-info")} == {"fedmeta", "clients", "server"}
    # The client app's command is found by its name on the path, so that it has no suffix.
    assert "fedmeta/prefork_client/flwr-clientapp" in names
    others = [name for name in names if ".dist-info" not in name and Path(name).name != "flwr-clientapp"]
    suffixes = {Path(name).suffix for name in others}
    assert suffixes <= {".py", ".typed", ".j2"}, suffixes
    assert not [name for name in names if "test" in Path(name).name]
    sources = {
        str(path.relative_to(ROOT))
        for package in ("fedmeta", "clients", "server")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sources == {name for name in names if name.endswith(".py")}


@pytest.fixture
def audit() -> ModuleType:
    specification = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_an_audit_fails_for_what_a_newer_version_mends(audit: ModuleType) -> None:
    report = {
        "dependencies": [
            {"name": "sound", "version": "1.0", "vulns": []},
            {"name": "skipped", "skip_reason": "not on PyPI"},
            {"name": "holey", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]},
            {"name": "open", "version": "3.0", "vulns": [{"id": "PYSEC-2", "fix_versions": []}]},
        ]
    }
    assert audit.unaccepted(report, {}) == (["holey 2.0: PYSEC-1, mended in 2.1", "open 3.0: PYSEC-2, open"], 1)
    assert audit.unaccepted(report, {"PYSEC-1": "a part that is not used"}) == (["open 3.0: PYSEC-2, open"], 0)


class _Index(BaseHTTPRequestHandler):
    """Answers as PyPI and OSV do, and knows one vulnerability, of numpy."""

    def do_GET(self) -> None:
        self._answer({"vulnerabilities": []})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]
        affected = [{"package": asked, "ranges": [{"type": "ECOSYSTEM", "events": EVENTS}]}]
        known = {"id": "PYSEC-0", "modified": "2026-01-01T00:00:00Z", "details": "made up", "affected": affected}
        self._answer({"vulns": [known]} if asked["name"] == "numpy" else {})

    def _answer(self, value: object) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def log_message(self, *arguments: object, **named: object) -> None:
        """Says nothing."""


EVENTS = [{"introduced": "0"}, {"fixed": "99.0"}]


@pytest.mark.slow
def test_an_audit_reads_what_an_index_answers(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Index) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(audit, "PROBE", url)
        monkeypatch.setattr(audit, "SERVICE", ("--vulnerability-service", "osv", "--osv-url", url))
        code, shown = audit.main(), capsys.readouterr().out
        server.shutdown()
    if "cannot be installed" in shown:
        pytest.skip(shown.strip())
    assert f"numpy {version('numpy')}: PYSEC-0, mended in 99.0" in shown
    assert re.search(r"audit: \d{2,} packages, 1 known vulnerabilities", shown)
    assert code == 1


def test_an_audit_without_the_list_reports_it_and_passes(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "PROBE", "http://127.0.0.1:9/nothing")
    assert audit.main() == 0
    assert capsys.readouterr().out.startswith("audit: skipped: ")
