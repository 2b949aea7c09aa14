"""Tables in a terminal that is too narrow for them: a block of lines for each row, so that nothing is cut."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

FLEXIBLE = 20
"""The least width of a column of texts, which may wrap (characters); numbers and names never do."""


def fitted(table: Table, console: Console) -> RenderableType:
    """Returns a table as it is where it fits into the terminal, else its rows one below another.

    A row becomes its first cell, which names it, and a line "heading: value" for each further cell that is not empty.
    """
    _, right, _, left = table.padding
    borders = (left + right + 1) * len(table.columns) + 1
    if borders + sum(_width(column, console) for column in table.columns) <= console.width:
        return table
    first, *others = table.columns
    lines: list[Text] = [_text(table.title).copy()] if table.title else []
    for place, name in enumerate(first.cells):
        lines.append(Text.assemble(_text(name), style="bold"))
        for column in others:
            value = _text(list(column.cells)[place])
            heading = " ".join(_text(column.header).plain.replace("-\n", "-").split())
            if value.plain.strip():
                lines.append(Text.assemble("  ", f"{heading}: " if heading else "", value))
    return Group(*lines, *([_text(table.caption)] if table.caption else []), Text())


def _width(column: Column, console: Console) -> int:
    """Returns how many characters a column needs."""
    wide = console.options.update(max_width=10_000)
    widest = max(Measurement.get(console, wide, each).maximum for each in (column.header, *column.cells))
    return widest if column.no_wrap or column.justify == "right" else min(widest, FLEXIBLE)


def _text(cell: object) -> Text:
    return Text.from_markup(cell) if isinstance(cell, str) else cell if isinstance(cell, Text) else Text(str(cell))
