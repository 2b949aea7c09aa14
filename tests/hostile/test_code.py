"""Files that others made may name built-in code only: nothing else is imported, and the refusal shows what it was."""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict

import fedmeta
from clients.app import app
from clients.node import node_of
from fedmeta import checkpoint, trust
from fedmeta.adapt.initialization import FILE as START
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.locate import find_start
from fedmeta.adapt.model import FILE as MODEL
from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.serving import _load_pyfunc
from fedmeta.cli.main import main
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.runtime.local import LocalGrid
from tests.adapt.finished import run

CODE = ("subprocess:call", "os:system", "builtins:eval", "canary_of_hostile_tests:anything")
KEYS = ("model.name", "learner.name", "problem.name", "data.source")
CASES = [(key, path) for key in KEYS for path in CODE]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[MetaModel, checkpoint.Checkpoint]:
    """What a small run leaves, and its checkpoint."""
    result, found = run(tmp_path_factory.mktemp("finished"), None, "server.rounds=1")
    return found, checkpoint.newest(result.folder)[0]


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module that leaves a file where it is imported, and a watch over every import by name."""
    (tmp_path / "canary_of_hostile_tests.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    usual, asked = importlib.import_module, list[str]()

    def watched(name: str, package: str | None = None) -> Any:
        asked.append(name)
        return usual(name, package)

    monkeypatch.setattr(importlib, "import_module", watched)
    monkeypatch.setattr(trust, "import_module", watched)
    yield
    assert not {path.partition(":")[0] for path in CODE} & set(asked)
    assert not (tmp_path / "imported").exists()
    assert "canary_of_hostile_tests" not in sys.modules


def evil(experiment: Experiment, key: str, path: str) -> Experiment:
    return experiment.with_overrides([f"{key}={path}"])


def as_checkpoint(folder: Path, start: MetaModel, state: checkpoint.Checkpoint, key: str, path: str) -> Path:
    changed = evil(Experiment.from_toml(state.experiment), key, path)
    return checkpoint.write(replace(state, experiment=changed.to_toml()), folder)


def as_meta_model(folder: Path, start: MetaModel, state: checkpoint.Checkpoint, key: str, path: str) -> Path:
    replace(start, experiment=evil(start.experiment, key, path)).write(folder / START)
    return folder / START


def as_run_folder(folder: Path, start: MetaModel, state: checkpoint.Checkpoint, key: str, path: str) -> Path:
    return as_checkpoint(folder, start, state, key, path).parent


def as_mlflow_folder(folder: Path, start: MetaModel, state: checkpoint.Checkpoint, key: str, path: str) -> Path:
    return as_meta_model(folder / "data", start, state, key, path).parents[1]


FILES = (as_checkpoint, as_meta_model, as_run_folder, as_mlflow_folder)


@pytest.mark.slow
@pytest.mark.parametrize("make", FILES)
@pytest.mark.parametrize(("key", "path"), CASES)
def test_what_a_new_site_adapts_from(
    make: Callable[..., Path], key: str, path: str, start: Any, tmp_path: Path
) -> None:
    file = make(tmp_path / "handed", *start, key, path)
    section, _, name = key.partition(".")
    shown = re.escape(f'[{section}] {name} = "{path}"; it was not imported')
    with pytest.raises(FedmetaError, match=shown):
        find_start(str(file), tmp_path, "none")
    with pytest.raises(FedmetaError, match=re.escape(path)):
        find_start(str(file), tmp_path, "none", trust.allow_code(["examples", "sub", "o", "built"]))


@pytest.mark.parametrize(("key", "path"), CASES)
def test_what_mlflow_loads(key: str, path: str, start: Any, tmp_path: Path) -> None:
    found, state = start
    as_meta_model(tmp_path / "meta" / "data", found, state, key, path)
    model = SiteModel.of(found, found.learner.theta(found.state))
    (tmp_path / "adapted").mkdir()
    changed = replace(found, experiment=evil(found.experiment, key, path))
    model.write(tmp_path / "adapted" / MODEL, changed, {})
    for place in (tmp_path / "meta" / "data", tmp_path / "adapted", tmp_path / "adapted" / MODEL):
        with pytest.raises(FedmetaError, match=rf"{re.escape(path)}.*FEDMETA_CODE={path.partition(':')[0]}"):
            _load_pyfunc(str(place))


@pytest.mark.parametrize("path", CODE)
def test_metrics_too(path: str, start: Any, tmp_path: Path) -> None:
    found, state = start
    for override in (f'evaluation.metrics=["{path}"]', f"evaluation.score={path}"):
        own = found.experiment.with_overrides([override])
        replace(found, experiment=own).write(tmp_path / START)
        with pytest.raises(FedmetaError, match=re.escape(path)):
            find_start(str(tmp_path / START), tmp_path, "none")
        file = checkpoint.write(replace(state, experiment=own.to_toml()), tmp_path)
        find_start(str(file), tmp_path, "none")  # a new site has no use for them, and nothing is imported


def test_no_file_that_was_handed_on_has_another_file_read(start: Any, tmp_path: Path) -> None:
    found, state = start
    weights = "model.weights=/nowhere/theirs.safetensors"
    named = found.experiment.with_overrides([weights])
    replace(found, experiment=named).write(tmp_path / START)
    assert find_start(str(tmp_path / START), tmp_path, "none").digest == found.digest
    model = SiteModel.of(found, found.learner.theta(found.state))
    model.write(tmp_path / MODEL, replace(found, experiment=named), {})
    SiteModel.read(tmp_path / MODEL)
    own = Experiment.from_toml(state.experiment).with_overrides([weights])
    find_start(str(checkpoint.write(replace(state, experiment=own.to_toml()), tmp_path)), tmp_path, "none")


@pytest.mark.parametrize("path", CODE)
def test_a_deployed_node(path: str, tmp_path: Path) -> None:
    for key in KEYS:
        grid = LocalGrid(app, evil(Experiment(), key, path))
        for config in ({"data": "site.csv", "site": "a"}, {}, {"code": "examples"}):
            grid.context.node_config.clear()
            grid.context.node_config.update(config)
            message = grid.create_message(RecordDict(), "query.sites", 2, "0")
            (reply,) = grid.send_and_receive([message])
            failure = reply.content["failure"]
            assert isinstance(failure, ConfigRecord)
            assert failure["code"] == "bad-experiment"


@pytest.mark.parametrize("path", CODE)
def test_a_run_to_resume(path: str, start: Any, tmp_path: Path) -> None:
    _, state = start
    folder = tmp_path / "runs" / "evil"
    mine = Experiment.from_toml(state.experiment).with_overrides([f"tracking.folder={tmp_path / 'runs'}"])
    checkpoint.write(replace(state, experiment=evil(mine, "model.name", path).to_toml(), finished=False), folder)
    with pytest.raises(FedmetaError, match="a run of another experiment"):
        fedmeta.run(mine, resume="evil")


def test_the_command_line_shows_one_line(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = as_meta_model(tmp_path, *start, "model.name", "subprocess:call")
    words = ["fedmeta", "adapt", str(file), "--data", "none.csv", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert '[model] name = "subprocess:call"' in printed
    assert "--code subprocess" in printed


# ---------------------------------------------------------------- what a person allows


def test_names_of_packages() -> None:
    assert trust.allow_code(["a.b, c", "d:E", ""]) == {"a.b", "c", "d:E"}
    for name in ("a b", "a/b", "..", "a:", ":a", "a\nb"):
        with pytest.raises(FedmetaError, match="must be the name of a package"):
            trust.allow_code([name])


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        (["examples"], False),
        (["examples.own_model"], False),
        (["examples.own_model:residual"], False),
        (["examples.own_model:other"], True),
        (["examples.own"], True),
        (["example"], True),
        (["own_model"], True),
        ([], True),
    ],
)
def test_a_package_allows_its_modules_and_a_path_itself(
    allowed: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    experiment = Experiment().with_overrides(["model.name=examples.own_model:residual"])
    if refused:
        with pytest.raises(FedmetaError, match="not part of fedmeta"):
            trust.refuse_foreign_code(experiment, "a file", allowed)
    else:
        trust.refuse_foreign_code(experiment, "a file", allowed)


def test_fedmeta_s_own_code_by_import_path_is_refused_in_true_words() -> None:
    experiment = Experiment().with_overrides(["problem.name=fedmeta.problems.cohort_tables:read_tables"])
    with pytest.raises(FedmetaError, match="code of fedmeta by its import path") as refused:
        trust.refuse_foreign_code(experiment, "a file", remedy=trust.BY_NODE_CONFIG)
    assert "not part of fedmeta" not in str(refused.value)
    assert 'code="fedmeta.problems.cohort_tables" in the node config' in str(refused.value)
    trust.refuse_foreign_code(experiment, "a file", ["fedmeta.problems.cohort_tables"])


@pytest.mark.parametrize("path", trust.SHIPPED)
def test_a_shipped_problem_is_allowed_and_names_no_file(path: str) -> None:
    experiment = Experiment().with_overrides([f"problem.name={path}", "problem.path=/etc/passwd", "problem.site=x"])
    trust.refuse_foreign_code(experiment, "a file")
    assert trust.without_own_files(experiment).problem.extra == {"path": "", "site": ""}
    model = Experiment().with_overrides(["model.name=" + path])
    with pytest.raises(FedmetaError, match="code of fedmeta by its import path"):
        trust.refuse_foreign_code(model, "a file")


def test_what_an_allowed_module_imported_from_another_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets_of_hostile_tests.py").write_text("from subprocess import call\n")
    experiment = Experiment().with_overrides(["model.name=my_nets_of_hostile_tests:call"])
    with pytest.raises(FedmetaError, match="code of subprocess; it was not called"):
        trust.refuse_foreign_code(experiment, "a file", ["my_nets_of_hostile_tests"])


def test_every_key_that_imports_is_known() -> None:
    paths = ["a:b", "c:d", "e:f", "g:h", "i:j", "m:n", "o:p", "k:l"]
    keys = [
        "model.name",
        "learner.name",
        "problem.name",
        "data.source",
        "evaluation.score",
        "server.aggregator",
        "server.sampling",
    ]
    overrides = [f"{key}={path}" for key, path in zip(keys, paths, strict=False)]
    found = trust.code_of(Experiment().with_overrides([*overrides, 'evaluation.metrics=["accuracy", "k:l"]']))
    assert set(found) == set(paths)
    importers = {
        str(file.relative_to(ROOT))
        for package in ("fedmeta", "clients", "server")
        for file in (ROOT / package).rglob("*.py")
        if re.search(r"import_module\(|__import__\(|(?<!\.)\b(?:eval|exec)\(", file.read_text())
    }
    by_name = {"importing.py", "trust.py"}
    fixed = {"__init__.py", "data/__init__.py", "problems/__init__.py", "prefork_superexec.py", "runtime/superlink.py"}
    assert {name.removeprefix("fedmeta/") for name in importers} <= by_name | fixed


# ---------------------------------------------------------------- one's own code, from end to end


@pytest.mark.slow
def test_own_code_adapts_and_serves_where_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedmeta.adapt import adaptation, writing
    from tests.adapt.finished import hospitals, labels_of, rows, write_csv

    monkeypatch.syspath_prepend(str(ROOT))
    own = ("model.name=examples.own_model:residual", "model.width=8", "server.rounds=2", "learner.inner_steps=1")
    folder = hospitals(tmp_path / "hospitals")
    experiment = Experiment().with_overrides(
        [f"data.path={folder}", "data.source=tables", "tracking.uri=none", f"tracking.folder={tmp_path / 'runs'}", *own]
    )
    result = fedmeta.run(experiment)
    with pytest.raises(FedmetaError, match=r"--code examples\.own_model"):
        find_start(str(result.folder), tmp_path, "none")
    found = find_start(str(result.folder), tmp_path, "none", trust.allow_code(["examples"]))
    x, score = rows(99, 30, 3.0)
    adapted = adaptation.adapt(found, str(write_csv(tmp_path / "site.csv", x, labels_of(score))))
    writing.write(adapted, tmp_path / "out")
    card = (tmp_path / "out" / "card.md").read_text()
    assert "FEDMETA_CODE=examples.own_model:residual mlflow models predict" in card
    assert """model.safetensors"), ['examples.own_model:residual'])""" in card
    with pytest.raises(FedmetaError, match=r"FEDMETA_CODE=examples\.own_model"):
        _load_pyfunc(str(tmp_path / "out"))
    monkeypatch.setenv("FEDMETA_CODE", "examples")
    assert len(_load_pyfunc(str(tmp_path / "out")).predict(x)) == len(x)


def test_a_node_imports_what_its_config_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.adapt.finished import hospitals

    monkeypatch.syspath_prepend(str(ROOT))
    file = hospitals(tmp_path / "hospitals") / "hospital-0.csv"
    experiment = Experiment().with_overrides(["model.name=examples.own_model:residual"])
    grid = LocalGrid(app, experiment)
    grid.context.node_config.clear()
    grid.context.node_config.update({"data": str(file), "site": "a"})
    with pytest.raises(FedmetaError, match=r'allow it: code="examples\.own_model" in the node config'):
        node_of(grid.context)
    grid.context.node_config["code"] = "numpy, examples.own_model"
    assert node_of(grid.context).describe().names == ("a",)
