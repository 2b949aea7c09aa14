"""A report as LaTeX, for papers: tables by booktabs, pictures as the files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fedmeta import tables
from fedmeta.report.document import Block, Code, Document, Folded, Pictures, Table, Text

HEAD = r"""% Compile with lualatex or xelatex: names of sites may hold any letters.
\documentclass{article}
\usepackage{booktabs,longtable,graphicx,hyperref}
\usepackage[margin=2.2cm]{geometry}
\begin{document}
"""
SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", **{each: f"\\{each}" for each in "&%$#_{}"},
}  # fmt: skip


def latex_page(document: Document, footer: str, pictures: str) -> str:
    """Returns the text.

    Args:
        document: The report.
        footer: The last line.
        pictures: The folder of the pictures' PNG files, as seen from the text.
    """
    keys = [f"\\item \\textbf{{{escape(key.value)}}} {escape(key.label)}" for key in document.keys]
    parts = [rf"\section*{{{escape(document.title)}}}", escape(document.lead)]
    parts += ["\n".join([r"\begin{itemize}", *keys, r"\end{itemize}"])] if keys else []
    for section in document.sections:
        parts += [rf"\subsection*{{{escape(section.title)}}}", *_blocks(section.blocks, pictures)]
    return HEAD + "\n\n".join([*parts, rf"\emph{{{escape(footer)}}}", r"\end{document}"]) + "\n"


def escape(words: str) -> str:
    """Returns text that LaTeX typesets as it is."""
    return re.sub(r"[\\~^<>|&%$#_{}]", lambda found: SPECIAL[found[0]], words)


def _blocks(blocks: Iterable[Block], pictures: str) -> list[str]:
    return [text for block in blocks for text in _block(block, pictures)]


def _block(block: Block, pictures: str) -> list[str]:
    match block:
        case Text(text):
            return [escape(text)]
        case Table():
            return [latex_table(block)]
        case Pictures(drawn):
            files = (Path(pictures, f"{each.name}.png").as_posix() for each in drawn)
            return [
                f"\\begin{{center}}\\includegraphics[width=.7\\linewidth]{{\\detokenize{{{file}}}}}\\\\\n"
                f"{escape(each.caption)}\\end{{center}}"
                for each, file in zip(drawn, files, strict=True)
            ]
        case Code(text, _):
            return [f"\\begin{{verbatim}}\n{text.rstrip()}\n\\end{{verbatim}}"]
        case Folded(title, inside):
            return [rf"\paragraph{{{escape(title)}}}", *_blocks(inside, pictures)]


def latex_table(table: Table) -> str:
    """Returns a table in LaTeX, by the packages booktabs and longtable, with its caption under it."""
    sides = "".join("l" if place < table.left else "r" for place in range(len(table.headings)))
    head, *rows = [
        " & ".join(escape(tables.text(cell)) for cell in row) + r" \\" for row in (table.headings, *table.rows)
    ]
    lines = [rf"\begin{{longtable}}{{{sides}}}", r"\toprule", head, r"\midrule\endhead", *rows, r"\bottomrule"]
    caption = [f"\n{{\\small {escape(table.caption)}}}"] if table.caption else []
    return "\n".join([*lines, r"\end{longtable}", *caption])
