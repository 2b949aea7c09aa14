"""A report as a value, whatever it is written as: a head, and sections of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.figure import Figure

from fedmeta.tables import Cell


class Key(NamedTuple):
    """A key figure: its value, what it is, and what it is compared with."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table; all columns but the first `left` ones are numbers. `strong` is the row to look at, if any."""

    name: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    left: int = 1
    strong: int | None = None


@dataclass(frozen=True)
class Picture:
    """A figure, or the bytes of a PNG file; `name` becomes a file's name, `caption` also replaces it where unseen."""

    name: str
    image: Figure | bytes
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Pictures beside one another where there is room."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Code:
    """Text to copy, in a language by Markdown's name."""

    text: str
    language: str


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on request, where the format allows."""

    title: str
    blocks: Sequence[Block]


Block = Text | Table | Pictures | Code | Folded


@dataclass(frozen=True)
class Section:
    """A heading and its blocks."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        kind: What it is about, in a few words.
        title: Its title.
        lead: The answer, in a sentence or two.
        keys: The key figures.
        sections: The rest.
    """

    kind: str
    title: str
    lead: str
    keys: Sequence[Key]
    sections: Sequence[Section]

    def tables(self) -> Iterator[Table]:
        """Yields all tables in their order."""
        for section in self.sections:
            yield from _tables(section.blocks)


def _tables(blocks: Iterable[Block]) -> Iterator[Table]:
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Folded):
            yield from _tables(block.blocks)
