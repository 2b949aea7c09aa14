"""A report as Markdown, for where HTML is not wanted; its pictures are files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fedmeta.report.document import Block, Code, Document, Folded, Pictures, Table, Text
from fedmeta.report.drawing import png


def markdown_page(document: Document, footer: str, pictures: Path) -> str:
    """Returns the text, and draws its pictures into a folder beside the file.

    Args:
        document: The report.
        footer: What stands at its very end.
        pictures: The folder; the text names it by its last part.
    """
    keys = [f"- **{_plain(key.value)}** {_plain(key.label)}" + (f" ({_plain(key.note)})" if key.note else "")
            for key in document.keys]  # fmt: skip
    parts = [f"# {_plain(document.title)}", _plain(document.lead), "\n".join(keys)]
    for section in document.sections:
        parts += [f"## {section.title}", *_blocks(section.blocks, pictures)]
    return "\n\n".join(part for part in [*parts, f"*{_plain(footer)}*"] if part) + "\n"


def _blocks(blocks: Iterable[Block], pictures: Path) -> list[str]:
    return [text for block in blocks for text in _block(block, pictures)]


def _block(block: Block, pictures: Path) -> list[str]:
    match block:
        case Text(text):
            return [_plain(text)]
        case Table():
            return [_table(block)]
        case Pictures(drawn):
            files = [(each, png(each, pictures)) for each in drawn]
            return [f"![{_plain(each.caption)}]({pictures.name}/{file.name})" for each, file in files]
        case Code(text, language):
            return [f"```{language}\n{text.rstrip()}\n```"]
        case Folded(title, inside):
            return [f"### {_plain(title)}", *_blocks(inside, pictures)]


def _table(table: Table) -> str:
    sides = [":--" if place < table.left else "--:" for place in range(len(table.headings))]
    rows = [_row(table.headings), "|" + "|".join(sides) + "|", *(_row(row) for row in table.rows)]
    caption = f"\n\n{_plain(table.caption)}" if table.caption else ""
    return "\n".join(rows) + caption


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in cells) + " |"


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is; names of sites may hold anything."""
    return re.sub(r"([\\`*_<>\[\]#])", r"\\\1", " ".join(text.split()))
