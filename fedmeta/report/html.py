"""A report as one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedmeta import tables
from fedmeta.report import drawing
from fedmeta.report.document import Document


def html_page(document: Document, footer: str) -> str:
    """Returns the page; everything but the pictures is escaped.

    Args:
        document: The report.
        footer: The last line.
    """
    pages = Environment(
        loader=PackageLoader("fedmeta.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[[Any], str]] = {
        "kind": lambda block: type(block).__name__,
        "text": tables.text,
        "inline": lambda picture: Markup(drawing.inline(picture)),
    }
    pages.filters |= filters
    page = pages.get_template("page.html.j2")
    return page.render(document=document, footer=footer, dark_colors=Markup(drawing.dark_colors())) + "\n"
