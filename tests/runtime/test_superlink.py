import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from hypothesis import given
from hypothesis import strategies as st

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.runtime.superlink import PACKAGES, environment, keep, last_log_line, write_app, write_run_config

REPOSITORY = Path(__file__).parents[2]


def bundled(app: Path) -> set[str]:
    """Returns what Flower's bundle of an app folder holds."""
    with zipfile.ZipFile(BytesIO(build_fab_from_disk(app))) as bundle:
        return set(bundle.namelist())


def sources(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for package in PACKAGES for path in (root / package).rglob("*.py")}


def flower_app(folder: Path) -> dict[str, object]:
    table: dict[str, object] = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    return table


def test_the_app_that_is_submitted_is_the_three_packages(tmp_path: Path) -> None:
    app = write_app(tmp_path / "app")
    assert sources(app) == sources(REPOSITORY)
    assert sources(REPOSITORY) <= bundled(app)
    assert "fedmeta/data/__init__.py" in bundled(app)


@pytest.mark.slow  # Flower looks at every file of the checkout, the virtual environment's too
def test_the_repository_as_an_app_holds_the_three_packages_and_no_more() -> None:
    names = {name for name in bundled(REPOSITORY) if not name.startswith(".info")}
    assert names - {"pyproject.toml"} == sources(REPOSITORY)


def test_the_repository_and_the_submitted_app_are_described_alike(tmp_path: Path) -> None:
    own, submitted = flower_app(REPOSITORY), flower_app(write_app(tmp_path / "app"))
    assert own["components"] == submitted["components"]
    assert own["publisher"] == submitted["publisher"]
    assert own["fab-include"] == submitted["fab-include"]
    keys, others = own["config"], submitted["config"]
    assert isinstance(keys, dict)
    assert isinstance(others, dict)
    assert keys.keys() == others.keys()
    assert Experiment.from_toml(keys["experiment"]).data.source == "digits"


@pytest.mark.slow
def test_an_installed_package_can_be_submitted_too(tmp_path: Path) -> None:
    # What a wheel leaves behind: the packages in some folder, and no pyproject.toml anywhere near.
    site_packages = tmp_path / "site-packages"
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, site_packages / package, ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import sys; from pathlib import Path; from fedmeta.runtime.superlink import write_app; "
        "print(write_app(Path(sys.argv[1])), sys.modules['fedmeta'].__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(site_packages)}
    command = [sys.executable, "-c", program, str(tmp_path / "app")]
    shown = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert str(site_packages) in shown
    assert sources(tmp_path / "app") == sources(REPOSITORY)
    assert bundled(tmp_path / "app") >= sources(REPOSITORY)


@given(st.text(), st.text(st.characters(categories=["L", "N", "Pd"]), max_size=9))
def test_the_run_config_is_the_text_that_went_in(tmp_path_factory: pytest.TempPathFactory, text: str, run: str) -> None:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    write_run_config(path, text.encode("utf-8", "ignore").decode(), run)
    assert tomllib.loads(path.read_text(encoding="utf-8")) == {
        "experiment": text.encode("utf-8", "ignore").decode(),
        "resume": run,
    }


def test_flowers_processes_see_nothing_of_the_users_flower(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLWR_HOME", "/home/somebody/.flwr")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("models-of-mine")
    env = environment(tmp_path / "flwr", {"SOMETHING": "else"})
    assert env["FLWR_HOME"] == str(tmp_path / "flwr")
    assert env["FLWR_TELEMETRY_ENABLED"] == "0"
    assert env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert env["SOMETHING"] == "else"
    assert str(tmp_path / "models-of-mine") in env["PYTHONPATH"].split(os.pathsep)
    assert shutil.which("flower-superlink", path=env["PATH"])


def test_a_command_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(FedmetaError, match=r"^flower-nothing is not installed"),
        keep(["flower-nothing"], environment(tmp_path, {}), tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        ("", "it printed nothing"),
        ("\n---\n\n", "it printed nothing"),
        ("starting\nlistening on 8000\n", "listening on 8000"),
        ("Traceback:\n  File x\nImportError: no module named torch\nstopping\n", "ImportError: no module named torch"),
        ("x" * 999, "x" * 300),
    ],
)
def test_the_last_words_of_a_log_are_one_telling_line(tmp_path: Path, log: str, shown: str) -> None:
    (tmp_path / "log").write_text(log)
    assert last_log_line(tmp_path / "log") == shown


def test_a_log_that_is_not_there_gives_nothing(tmp_path: Path) -> None:
    assert last_log_line(tmp_path / "log") == "it printed nothing"
