"""The Flower ServerApp."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmeta import checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.launch import (
    RESUME_VARIABLE,
    LogWriter,
    announce,
    launcher_folder,
    reporter,
    tracked,
    write_result,
)
from fedmeta.trust import code_of, refuse_foreign_code
from server import training_loop

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the experiment of the run config. Flower reports success whatever happens, so the outcome goes to a file."""
    folder = launcher_folder()
    if folder:
        announce(folder)
    log = LogWriter()
    try:
        experiment, resume = _task(context)
        report = reporter(folder) if folder else log.progress
        # A launcher waits on this machine alone, where the simulated sites' data are too.
        outcome = training_loop.run(grid, experiment, report, resume, data_here=bool(folder))
    except FedmetaError as error:
        log.error(str(error))
        _hand_over(folder, {"error": str(error)})
        raise
    except BaseException as error:
        _hand_over(folder, {"failure": f"{type(error).__name__}: {error}"})
        raise
    _hand_over(folder, {"summary": outcome.summary, "folder": str(outcome.folder.absolute())})
    print(json.dumps(outcome.summary), flush=True)


def _task(context: Context) -> tuple[Experiment, Path | None]:
    """Returns the experiment and the folder of the run to resume: a launcher's, or one of this server's."""
    experiment = Experiment.from_toml(str(context.run_config["experiment"]), origin="run config: experiment")
    if resume := os.environ.get(RESUME_VARIABLE):
        return experiment, Path(resume)
    experiment = tracked(experiment)
    if wanted := str(context.run_config.get("resume", "")):
        folder = checkpoint.find(Path(experiment.tracking.folder), wanted, experiment.to_toml())
        stored = Experiment.from_toml(checkpoint.newest(folder)[0].experiment, origin=str(folder))
        refuse_foreign_code(stored, str(folder), code_of(experiment), remedy="name {} in the experiment")
        return stored, folder
    return experiment, None


def _hand_over(folder: Path | None, result: dict[str, Any]) -> None:
    if folder:
        write_result(folder, result)
