"""A first experiment for data as they lie there: what can be seen in the files is written down, with comments."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from fedmeta.data.columns import CATEGORY, DATE, FREE, NUMBER, kind_of, names_of, numbers
from fedmeta.data.findings import FEW_NUMBERS
from fedmeta.data.npz import load_npz
from fedmeta.data.refusals import listed
from fedmeta.data.table_file import RawTable, read_raw, site_name
from fedmeta.data.tables import SITE_WORDS, table_files
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data

LABEL_WORDS = (
    "label", "diagnosis", "outcome", "target", "class", "disease", "event", "death", "died", "mortality", "readmitted",
    "relapse", "response", "status", "result", "y",
)  # fmt: skip
"""Names that labels often have, the most certain first."""

_ID = re.compile(r"(?:^|[_\W])(?:id|ids|mrn|pid|key|uuid|nr)$|^id[_\W]|^unnamed: \d+$|^index$", re.IGNORECASE)


@dataclass
class Proposal:
    """What was seen in the files.

    Attributes:
        path: The folder or file.
        source: "tables", or "npz" for such a file.
        sites: How many sites there are.
        rows: How many rows each has.
        label: The label's column.
        usual: Whether the label's name is one that labels have.
        site_column: The column that names the site; empty where a file is a site.
        ignored: Columns to leave out, and why.
        categorical: Columns of few whole numbers.
        text: Columns of categories that are text.
        dates: Columns of dates.
    """

    path: str
    source: str = "tables"
    sites: int = 0
    rows: list[int] = field(default_factory=list)
    label: str = ""
    usual: bool = False
    site_column: str = ""
    ignored: dict[str, str] = field(default_factory=dict)
    categorical: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)


def propose(path: str, label: str = "") -> Proposal:
    """Returns what an experiment on these tables would be.

    Args:
        path: A folder with a table per site, one table, or an npz file.
        label: The label's column; "" to look for it.

    Raises:
        FedmetaError: There is no table, or none can be read.
    """
    where = Path(path).expanduser()
    if where.suffix.lower() == ".npz":
        population = load_npz(Data(source="npz", path=path))
        rows = population.sizes(population.all_sites).tolist()
        return Proposal(path, "npz", len(population), rows)
    files = table_files(where, Data(source="tables", path=path))
    data = Data(source="tables", path=path, label=label or "label")
    tables = [read_raw(file, data) for file in files]
    readable = [table for table in tables if len(table.frame.columns) > 1]
    if not readable:
        raise FedmetaError(next(iter(table.problems[0] for table in tables if table.problems), f"{path}: no columns"))
    everywhere = [str(name) for name in readable[0].frame.columns if all(name in each.frame for each in readable)]
    found = Proposal(path)
    if label and label not in everywhere:
        raise FedmetaError(f'{path}: no column "{label}" in every file; they share {listed(everywhere)}')
    found.site_column = _site_column(readable, everywhere, len(files))
    found.label, found.usual = (label, True) if label else _label(readable, everywhere, found.site_column)
    # Read again, so that a label's "01" stays as it is.
    data = data.model_copy(update={"label": found.label, "site_column": found.site_column})
    tables = [read_raw(file, data, (found.label, found.site_column)) for file in files]
    readable = [table for table in tables if len(table.frame.columns) > 1]
    for name in sorted({str(name) for table in readable for name in table.frame.columns} - set(everywhere)):
        lacking = [site_name(table.path) for table in readable if name not in table.frame]
        found.ignored[name] = f"not in {listed(lacking, 3)}"
    for name in everywhere:
        if name not in (found.label, found.site_column):
            _place_column(found, name, [table.frame[name] for table in readable], data)
    found.rows = _rows(readable, found.site_column)
    found.sites = len(found.rows)
    return found


def _rows(tables: Sequence[RawTable], site_column: str) -> list[int]:
    if not site_column:
        return [len(table.frame) for table in tables]
    named = pd.concat([names_of(table.frame[site_column]) for table in tables if site_column in table.frame])
    counts: list[int] = named.value_counts().tolist()
    return counts


def _site_column(tables: Sequence[RawTable], names: Sequence[str], files: int) -> str:
    """Returns the column that names sites where one file holds several; "" where there is none."""
    for name in names if files == 1 else ():
        column = tables[0].frame[name]
        count = column.nunique()
        if any(word in name.lower() for word in SITE_WORDS) and 2 <= count <= max(2, len(column) // 5):
            return name
    return ""


def _label(tables: Sequence[RawTable], names: Sequence[str], site_column: str) -> tuple[str, bool]:
    """Returns the column that is most like a label, and whether its name is one that labels have."""
    others = [name for name in names if name != site_column]
    for word in LABEL_WORDS:
        for name in others:
            if name.lower() == word:
                return name, True
    for word in LABEL_WORDS[:-1]:
        for name in others:
            if word in re.split(r"[_\W]", name.lower()):
                return name, True
    for name in reversed(others):
        if 2 <= pd.concat([names_of(table.frame[name]) for table in tables]).nunique() <= 2:
            return name, False
    return others[-1], False


def _place_column(found: Proposal, name: str, parts: "Sequence[pd.Series]", data: Data) -> None:
    kind = kind_of(parts, name, data)
    if kind == DATE:
        found.dates.append(name)
        return
    if kind == FREE:
        found.ignored[name] = "a different text in nearly every row"
        return
    if kind == CATEGORY:
        distinct = pd.concat([names_of(part) for part in parts]).nunique()
        if distinct == sum(int(part.notna().sum()) for part in parts) or _ID.search(name):
            found.ignored[name] = "an id"
        else:
            found.text.append(name)
        return
    assert kind == NUMBER
    values = np.concatenate([numbers(part)[0].to_numpy(dtype=np.float64, na_value=np.nan) for part in parts])
    there = values[~np.isnan(values)]
    whole = bool(len(there)) and bool((there == np.round(there)).all())
    if not len(there):
        found.ignored[name] = "empty in every row"
        return
    distinct = np.unique(there)
    own = [part.dropna() for part in parts]
    unique = whole and all(len(part) == part.nunique() for part in own) and len(there) >= 20
    if (unique and (_ID.search(name) or len(distinct) == len(there))) or (whole and np.abs(there).max() >= 2**53):
        found.ignored[name] = "an id: a different number in every row"
    elif len(distinct) == 1 and len(there) > 1:
        found.ignored[name] = "the same in every row"
    elif whole and 3 <= len(distinct) <= FEW_NUMBERS and len(there) >= 10 * len(distinct):
        found.categorical.append(name)


def to_toml(found: Proposal) -> str:
    """Returns the proposal as an experiment, a commented TOML text."""
    sure = "" if found.usual else "  # a guess: check it"
    lines = [
        f"# {found.sites} site{'s' if found.sites != 1 else ''} with {min(found.rows)} to {max(found.rows)} rows. "
        "Look first:  fedmeta sites FILE    then:  fedmeta run FILE",
        "",
        "[data]",
        f'source = "{found.source}"',
        f"path = {_text(found.path)}",
    ]
    if found.source == "tables":
        lines.append(f"label = {_text(found.label)}{sure}")
    if found.site_column:
        lines.append(f"site_column = {_text(found.site_column)}  # one file: this column names each row's site")
    ignored = dict(found.ignored)
    if found.dates:
        ignored |= dict.fromkeys(found.dates, 'a date; with dates = "days" it is a number of days')
    if ignored:
        lines.append("ignore = [")
        lines += [f"    {_text(name)},  # {why}" for name, why in ignored.items()]
        lines.append("]")
    if found.text:
        lines.append(f"# Text, and categories by itself: {listed(found.text)}.")
    if found.categorical:
        lines.append("# Few whole numbers: categories. Take out what is a number, such as a count.")
        lines.append(f"categorical = [{', '.join(map(_text, found.categorical))}]")
    new = 0 if found.sites < 2 else max(1, round(0.2 * found.sites))
    train = min(found.rows) - round(min(found.rows) * 0.5)
    support = max(1, min(20, train // 2))
    lines += [
        f"new_sites = {new if new else 0.0}  # sites that never train: they show what a hospital that joins gets",
        f"support = {support}  # rows that a site adapts on",
        f"query = {support}  # rows that score the adapted model in training",
        "",
        "[model]",
        'name = "logistic"  # or "mlp", with hidden = "32,32"',
        "",
        "[learner]",
        'name = "maml"  # fedmeta compare FILE puts it beside fedavg, fedavg-ft and local',
        "inner_steps = 3",
        "inner_lr = 0.1",
        "",
        "[server]",
        "rounds = 100",
        f"sites_per_round = {max(1, min(10, found.sites - new))}",
        "lr = 0.03",
        "",
    ]
    return "\n".join(lines)


def _text(text: str) -> str:
    """Returns a text as TOML writes it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
