"""A report as one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from fedmeta.report.document import Block, Code, Document, Folded, Key, Picture, Pictures, Section, Table, Text
from fedmeta.report.drawing import svg
from fedmeta.report.style import STYLE


def html_page(document: Document, footer: str) -> str:
    """Returns the page.

    Args:
        document: The report.
        footer: What stands at its very end.
    """
    keys = "".join(_key(key) for key in document.keys)
    body = [
        f'<p class="kind">{escape(document.kind)}</p>',
        f"<h1>{escape(document.title)}</h1>",
        f'<p class="lead">{escape(document.lead)}</p>',
        f'<ul class="keys">{keys}</ul>' if keys else "",
        *(_section(section) for section in document.sections),
        f"<footer>{escape(footer)}</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _key(key: Key) -> str:
    note = f"<small>{escape(key.note)}</small>" if key.note else ""
    return f"<li><b>{escape(key.value)}</b><span>{escape(key.label)}</span>{note}</li>"


def _section(section: Section) -> str:
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{_blocks(section.blocks)}\n</section>"


def _blocks(blocks: Iterable[Block]) -> str:
    return "\n".join(_block(block) for block in blocks)


def _block(block: Block) -> str:
    match block:
        case Text(text):
            return f"<p>{escape(text)}</p>"
        case Table():
            return _table(block)
        case Pictures(pictures):
            alone = " one" if len(pictures) == 1 else ""
            return f'<div class="pictures{alone}">\n{"".join(_picture(each) for each in pictures)}</div>'
        case Code(text, language):
            return f'<pre><code class="language-{language}">{escape(text)}</code></pre>'
        case Folded(title, inside):
            return f"<details><summary>{escape(title)}</summary>\n{_blocks(inside)}\n</details>"


def _table(table: Table) -> str:
    sides = [' class="left"' if place < table.left else "" for place in range(len(table.headings))]
    head = "".join(f"<th{side}>{escape(cell)}</th>" for side, cell in zip(sides, table.headings, strict=True))
    rows = [
        f"<tr{' class=strong' if number == table.strong else ''}>"
        + "".join(f"<td{side}>{escape(cell)}</td>" for side, cell in zip(sides, row, strict=True))
        + "</tr>"
        for number, row in enumerate(table.rows)
    ]
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    body = "\n".join(rows)
    return f'<div class="table"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _picture(picture: Picture) -> str:
    caption = escape(picture.caption)
    return (
        f'<figure role="group" aria-label="{escape(picture.caption, quote=True)}">{svg(picture)}'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )
