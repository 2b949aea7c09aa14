"""The Flower ServerApp."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress, Report, silent
from server import rounds

RESULT_VARIABLE = "FEDMETA_RESULT"
"""Environment variable: the folder in which a launcher waits for `progress.jsonl` and `result.json`."""

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the experiment of the run config. Flower reports success whatever happens, so the outcome goes to a file."""
    folder = os.environ.get(RESULT_VARIABLE)
    try:
        experiment = Experiment.from_toml(str(context.run_config["experiment"]), origin="run config: experiment")
        resume = os.environ.get("FEDMETA_RESUME")
        report = _to_file(Path(folder)) if folder else silent
        outcome = rounds.run(grid, experiment, report, Path(resume) if resume else None)
    except FedmetaError as error:
        print(f"fedmeta: {error}", file=sys.stderr, flush=True)
        _write(folder, {"error": str(error)})
        raise
    _write(folder, {"summary": outcome.summary, "folder": str(outcome.folder.absolute())})
    print(json.dumps(outcome.summary), flush=True)


def _to_file(folder: Path) -> Report:
    def report(progress: Progress) -> None:
        with (folder / "progress.jsonl").open("a") as file:
            file.write(progress.to_json() + "\n")

    return report


def _write(folder: str | None, result: dict[str, object]) -> None:
    if folder:
        part = Path(folder, "result.part")
        part.write_text(json.dumps(result))
        part.replace(Path(folder, "result.json"))
