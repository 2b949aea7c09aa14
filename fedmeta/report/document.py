"""A report as a value, whatever it is written as: a head, and sections of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.figure import Figure


class Key(NamedTuple):
    """A figure that one reads first: its value, what it is, and what it is to be held against."""

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

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    left: int = 1
    strong: int | None = None


@dataclass(frozen=True)
class Picture:
    """A picture; `name` becomes a file's name, `caption` also says to those who do not see it what it shows."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Pictures:
    """Pictures beside one another where there is room."""

    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Code:
    """Text to copy, of a language by Markdown's name."""

    text: str
    language: str


@dataclass(frozen=True)
class Folded:
    """Blocks that are opened by who asks for them."""

    title: str
    blocks: tuple[Block, ...]


Block = Text | Table | Pictures | Code | Folded


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """A whole report.

    Attributes:
        kind: What it is about, in a word or two.
        title: Its title.
        lead: The answer, in a sentence or two.
        keys: The figures that one reads first.
        sections: The rest.
    """

    kind: str
    title: str
    lead: str
    keys: tuple[Key, ...]
    sections: tuple[Section, ...]
