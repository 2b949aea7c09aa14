"""The Flower ServerApp."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import silent
from fedmeta.runtime.handover import RESUME_VARIABLE, launcher_folder, reporter, write_result
from server import rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the experiment of the run config. Flower reports success whatever happens, so the outcome goes to a file."""
    folder = launcher_folder()
    try:
        experiment = Experiment.from_toml(str(context.run_config["experiment"]), origin="run config: experiment")
        resume = os.environ.get(RESUME_VARIABLE)
        outcome = rounds.run(grid, experiment, reporter(folder) if folder else silent, Path(resume) if resume else None)
    except FedmetaError as error:
        print(f"fedmeta: {error}", file=sys.stderr, flush=True)
        _hand_over(folder, {"error": str(error)})
        raise
    except BaseException as error:
        _hand_over(folder, {"failure": f"{type(error).__name__}: {error}"})
        raise
    _hand_over(folder, {"summary": outcome.summary, "folder": str(outcome.folder.absolute())})
    print(json.dumps(outcome.summary), flush=True)


def _hand_over(folder: Path | None, result: dict[str, Any]) -> None:
    if folder:
        write_result(folder, result)
