"""Commands that list: the runs of a folder, and the learners there are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedmeta.cli.application import app
from fedmeta.cli.folding import fitted
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment, Tracking
from fedmeta.tables import number

RUNS = Path(Tracking().folder)
SUMMARY, DESCRIBED = "summary.json", "experiment.toml"
UNFINISHED = "unfinished"
"""The files of a run's folder; the last one is there until the run has ended."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines, one per entry.")]


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder of runs.")] = RUNS,
    as_json: AsJson = False,
) -> None:
    """Lists the runs of a folder, the newest first: learner, data, seed, state, and the score of new sites."""
    found, unreadable = list_runs(folder)
    if as_json:
        for each in found:
            print(json.dumps(each))
    elif found:
        console = Console()
        table = Table(title=f"{len(found)} run{'s' * (len(found) > 1)} in {escape(str(folder))}", title_justify="left")
        for heading in ("run", "learner", "data", "seed", "rounds", "score", "new sites\nbefore", "after", "state"):
            right = heading in ("seed", "rounds", "new sites\nbefore", "after")
            table.add_column(heading, justify="right" if right else "left", no_wrap=heading == "run")
        for each in found:
            before, after = (number(each[key]) if each["score"] else "" for key in ("global", "personalized"))
            about = [escape(each["run"]), escape(each["learner"]), escape(each["data"]), str(each["seed"])]
            table.add_row(*about, str(each["rounds"] or ""), escape(each["score"]), before, after, each["state"])
        console.print(fitted(table, console))
    else:
        print(f"no run in {folder}; fedmeta run FILE.toml makes one")
    for name in unreadable:
        print(f"note  {name}: no run that can be read")


@app.command()
def learners(as_json: AsJson = False) -> None:
    """Lists the learners: what sites compute, what they send, and the keys of [learner] that each obeys."""
    found = list_learners()
    if as_json:
        for each in found:
            print(json.dumps(each))
        return
    console = Console()
    table = Table(title="[learner] name = ...", title_justify="left")
    for heading in ("learner", "what it does", "sends", "keys"):
        table.add_column(heading, no_wrap=heading == "learner", overflow="fold")
    for each in found:
        table.add_row(each["learner"], escape(each["about"]), each["sends"], ", ".join(each["keys"]))
    console.print(fitted(table, console))
    print("an own one: name = package.module:Class (docs/howto/own_learner.md)")


def list_runs(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the runs of a folder, the newest first, and the names of folders that hold a run that cannot be read.

    Raises:
        FedmetaError: There is no such folder.
    """
    if not folder.is_dir():
        raise FedmetaError(f"{folder}: no such folder; runs lie in [tracking] folder of their experiment")
    found, unreadable = [], []
    paths = [path for path in folder.iterdir() if (path / DESCRIBED).is_file()]
    for path in sorted(paths, key=lambda path: ((path / DESCRIBED).stat().st_mtime, path.name), reverse=True):
        try:
            found.append(_run(path))
        except (FedmetaError, OSError, ValueError, KeyError, TypeError):
            unreadable.append(str(path))
    return found, unreadable


def _run(path: Path) -> dict[str, Any]:
    from fedmeta.tracking.description import data_name

    described = Experiment.from_toml((path / DESCRIBED).read_text(encoding="utf-8"), origin=str(path))
    entry: dict[str, Any] = {
        "run": path.name,
        "learner": described.learner.name,
        "data": data_name(described.params()),
        "seed": described.runtime.seed,
        "rounds": None,
        "score": "",
        "global": None,
        "personalized": None,
        "state": "unfinished",
        "run_id": "",
    }
    if not (path / SUMMARY).is_file():
        return entry
    summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
    new = summary["new_sites"]
    after = {key: new[key]["mean"] for key in ("global", "personalized")}
    known = {"rounds": summary["rounds"], "score": summary["score"]["name"], "run_id": summary["run_id"]}
    return entry | known | after | {"state": "unfinished" if (path / UNFINISHED).exists() else "finished"}


def list_learners() -> list[dict[str, Any]]:
    """Returns each built-in learner's name, what it does, what its sites send, and its keys."""
    from fedmeta.learners import LEARNERS, settings_of

    return [
        {
            "learner": name,
            "about": (kind.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " "),
            "sends": kind.update,
            "keys": list(settings_of(kind)),
        }
        for name, kind in LEARNERS.items()
    ]
