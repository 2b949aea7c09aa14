"""A report as Markdown, for where HTML is not wanted; its pictures are files beside it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fedmeta.report.document import Block, Code, Document, Folded, Pictures, Table, Text
from fedmeta.report.drawing import png
from fedmeta.tables import markdown_table, plain


def markdown_page(document: Document, footer: str, pictures: Path) -> str:
    """Returns the text, and draws its pictures into a folder beside the file.

    Args:
        document: The report.
        footer: The last line.
        pictures: The folder; the text names it by its last part.
    """
    keys = [
        f"- **{plain(key.value)}** {plain(key.label)}" + (f" ({plain(key.note)})" if key.note else "")
        for key in document.keys
    ]
    parts = [f"# {plain(document.title)}", plain(document.lead), "\n".join(keys)]
    for section in document.sections:
        parts += [f"## {section.title}", *_blocks(section.blocks, pictures)]
    return "\n\n".join(part for part in [*parts, f"*{plain(footer)}*"] if part) + "\n"


def _blocks(blocks: Iterable[Block], pictures: Path) -> list[str]:
    return [text for block in blocks for text in _block(block, pictures)]


def _block(block: Block, pictures: Path) -> list[str]:
    match block:
        case Text(text):
            return [plain(text)]
        case Table():
            return ["\n".join(markdown_table(block.headings, block.rows, block.left)), plain(block.caption)]
        case Pictures(drawn):
            files = [(each, png(each, pictures)) for each in drawn]
            return [f"![{plain(each.caption)}]({pictures.name}/{file.name})" for each, file in files]
        case Code(text, language):
            return [f"```{language}\n{text.rstrip()}\n```"]
        case Folded(title, inside):
            return [f"### {plain(title)}", *_blocks(inside, pictures)]
