"""The house: arrows between packages run one way, and what is imported is declared."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("fedmeta", "clients", "server")


def imports(path: Path) -> Iterator[str]:
    """Yields the modules that a file imports, also inside its functions; `from fedmeta import x` is `fedmeta.x`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "fedmeta":
                yield from (f"fedmeta.{alias.name}" for alias in node.names)
            else:
                yield node.module


def package_of(module: str) -> str:
    """Returns the package that a module belongs to: clients, server, or a room of fedmeta."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "fedmeta" else parts[0]


def arrows() -> dict[str, set[str]]:
    """Returns what each package of the house imports of the others, without the lazy door of `fedmeta/__init__`."""
    found: dict[str, set[str]] = {}
    for top in OURS:
        for path in sorted((ROOT / top).rglob("*.py")):
            if path == ROOT / "fedmeta/__init__.py":
                continue
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            ours = {package_of(module) for module in imports(path) if module.split(".")[0] in OURS}
            found.setdefault(package_of(name), set()).update(ours - {package_of(name)})
    return found


@pytest.mark.slow
def test_no_circle_between_packages():
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as error:
        pytest.fail(f"packages import each other: {' -> '.join(error.args[1])}")


@pytest.mark.slow
def test_a_planted_circle_is_found():
    planted = arrows()
    planted["fedmeta.errors"].add("fedmeta.runtime")
    with pytest.raises(CycleError):
        TopologicalSorter(planted).prepare()


def test_clients_and_server_never_use_each_other():
    found = arrows()
    assert "server" not in found["clients"]
    assert "clients" not in found["server"]


@pytest.mark.slow
def test_only_tracking_imports_mlflow():
    others = [
        str(path.relative_to(ROOT))
        for top in OURS
        for path in (ROOT / top).rglob("*.py")
        if path.parent != ROOT / "fedmeta/tracking" and any(name.split(".")[0] == "mlflow" for name in imports(path))
    ]
    assert others == []


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in wanted}
    homes = packages_distributions()
    missing = {}
    for top in OURS:
        for path in (ROOT / top).rglob("*.py"):
            for module in imports(path):
                name = module.split(".")[0]
                if name in OURS or name in sys.stdlib_module_names:
                    continue
                names = {home.lower().replace("_", "-") for home in homes.get(name, [name])}
                if not names & declared:
                    missing[name] = str(path.relative_to(ROOT))
    assert missing == {}


class QuickPatterns:
    """A plugin that counts which cases each pattern of a `quick` marker names."""

    def __init__(self) -> None:
        self.cases: dict[tuple[str, str], int] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            marker = item.get_closest_marker("quick")
            for pattern in marker.args if marker and isinstance(item, pytest.Function) else ():
                key = (item.nodeid.partition("[")[0], pattern)
                self.cases[key] = self.cases.get(key, 0) + fnmatchcase(item.callspec.id, pattern)


@pytest.mark.slow
def test_every_pattern_of_quick_names_a_case() -> None:
    """Else a test would leave `make test` without a word."""
    script = (
        "import json, pytest; from tests.test_house import QuickPatterns; plugin = QuickPatterns();"
        "pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'tests'], plugins=[plugin]);"
        "print(json.dumps([*map(list, plugin.cases.items())]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found
    assert [key for key, count in found if not count] == []
