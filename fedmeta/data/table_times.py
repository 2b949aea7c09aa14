"""When the rows of tables were: a column of numbers or dates that orders a site's rows."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedmeta.data.columns import DATE, days, kind_of, numbers
from fedmeta.data.refusals import listed
from fedmeta.data.table_file import RawTable
from fedmeta.errors import nearest
from fedmeta.experiment import ROW_ORDER, Data


def table_times(tables: Sequence[RawTable], data: Data, problems: list[str]) -> NDArray[np.float64] | None:
    """Returns when each row of all files was [rows]: numbers, or days since 1970-01-01; None where it is not asked.

    Args:
        tables: The files.
        data: The experiment's description; `time` names the column.
        problems: Takes what is wrong: a file without the column, and cells that are missing or neither a number nor a
            date.
    """
    name = data.time
    if not name or name == ROW_ORDER:
        return None
    before = len(problems)
    for table in tables:
        there = [str(column) for column in table.frame.columns]
        if name not in there:
            guess = nearest(name, there)
            problems.append(f'{table.path}: no column "{name}" (data.time); its columns are {listed(there)}{guess}')
    if len(problems) > before:
        return None
    parts = [table.frame[name] for table in tables]
    dates = kind_of(parts, name, data) == DATE
    found: list[pd.Series] = []
    for table, part in zip(tables, parts, strict=True):
        if dates:
            when, not_read = days(part)
            wrong = not_read.to_numpy()
        else:
            when, wrong = numbers(part)
        absent = part.isna().to_numpy()
        if absent.any():
            rows = np.flatnonzero(absent).tolist()
            problems.append(f"{table.place(rows, name)} is missing: every row needs its time (data.time)")
        if wrong.any():
            rows = np.flatnonzero(wrong).tolist()
            problems.append(
                f'{table.place(rows, name)} is "{str(part.iloc[rows[0]])[:40]}", neither a number nor a date: write it '
                "as 2024-03-09 (data.time)"
            )
        found.append(when)
    return None if len(problems) > before else pd.concat(found).to_numpy(dtype=np.float64, na_value=np.nan)
