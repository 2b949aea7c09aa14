"""The house: arrows between packages run one way, and what is imported is declared."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
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
