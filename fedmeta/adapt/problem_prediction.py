"""What a shipped problem of tables predicts for the rows of a file: counts, chances to survive; a line for each row."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from fedmeta.adapt.distance import FAR
from fedmeta.adapt.initialization import FILE as START_FILE
from fedmeta.adapt.initialization import MetaModel, check_tensors
from fedmeta.adapt.own_problem import FILE, FORMAT
from fedmeta.adapt.prediction import Predicted, as_file
from fedmeta.build import problem_of
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.files import read_tensors
from fedmeta.problems import Parameters, Problem
from fedmeta.problems.cohort_tables import CohortTables, read_tables
from fedmeta.signing import check_signature
from fedmeta.trust import refuse_foreign_code, without_own_files


class SolvedProblem(NamedTuple):
    """A problem and parameters that solve it at a site.

    Attributes:
        problem: The problem.
        parameters: Its parameters as objectives see them.
        notes: What to know of them, a sentence each.
    """

    problem: CohortTables
    parameters: Parameters
    notes: tuple[str, ...]


def read_solved(folder: Path, code: Collection[str] = ()) -> SolvedProblem | None:
    """Returns the problem that a folder holds the parameters of; None where it holds a model of rows, or nothing.

    Args:
        folder: What `fedmeta adapt --out` made of a site of a problem, or the run's folder.
        code: What it may name of code that is not part of fedmeta (see `fedmeta.trust.allow_code`).

    Raises:
        FedmetaError: The file cannot be read, asks for other code, or the problem predicts for no rows of a table.
    """
    path = folder / FILE
    if path.is_file():
        texts, parameters = read_tensors(path, "site's parameters", FORMAT)
        check_signature(str(path), texts, parameters)
        experiment = without_own_files(Experiment.from_toml(texts.get("experiment", ""), str(path)))
        refuse_foreign_code(experiment, str(path), code)
        built = problem_of(experiment)
        problem = _of_tables(built, str(path))
        check_tensors(parameters, built.init(0), str(path))
        return SolvedProblem(problem, parameters, ())
    start_file = folder / START_FILE
    if not start_file.is_file():
        return None
    start = MetaModel.read(start_file, code)
    if start.form.on_rows:
        return None
    note = "These are a run's global parameters, adapted to no site: fedmeta adapt makes a site's own."
    problem = _of_tables(start.learner.problem, str(start_file))
    return SolvedProblem(problem, start.learner.theta(start.state), (note,))


def predict_solved(solved: SolvedProblem, data: str, missing: Sequence[str] = ()) -> Predicted:
    """Returns what a problem predicts for each row of a table without an outcome.

    Args:
        solved: The problem and its parameters.
        data: A CSV, TSV or Parquet file; "-" for the standard input.
        missing: Texts that mean a missing value in the file.

    Raises:
        FedmetaError: The file cannot be read, lacks a column, or a cell is no number.
    """
    problem = solved.problem
    with as_file(data) as path:
        if not Path(path).expanduser().is_file():
            raise FedmetaError(f"--data {path}: no such file")
        table = next(iter(read_tables(path, problem.needed, missing=missing).values()))
        try:
            found = problem.predicted(solved.parameters, table)
        except FedmetaError as error:
            raise FedmetaError(f"{path}: {error}") from None
    notes = solved.notes
    warning = np.full(len(next(iter(table.values()))), "", dtype=object)
    if problem.scaled:
        x = problem.standardized(table).numpy()
        for row in np.flatnonzero((np.abs(x) > FAR).any(axis=1)):
            place = int(np.abs(x[row]).argmax())
            warning[row] = f"{problem.features[place]} is {abs(x[row, place]):.1f} of the run's scale from its center"
    else:
        notes = (*notes, "no row is held against what the model has seen: [problem] scale is not set in the run")
    return Predicted(pd.DataFrame({**found, "warning": warning}), notes)


def _of_tables(problem: Problem, origin: str) -> CohortTables:
    if not isinstance(problem, CohortTables):
        raise FedmetaError(f"{origin}: the run solves an own problem and predicts for no rows")
    return problem
