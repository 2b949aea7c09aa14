"""Pictures for a page: vector graphics whose colors follow the page's, light or dark, and PNG files."""

from __future__ import annotations

import base64
import re
import warnings
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib

from fedmeta.report.document import Picture
from fedmeta.tracking.plots import write

WIDTH_INCHES = 6.2
"""How wide pictures are drawn, so that their letters stay legible at half a page's width."""
DARK = {
    "#fafaf8": "#1b1d20", "#222222": "#e6e6e2", "#8c8c8c": "#9a9da1", "#e2e2e0": "#33363b",
    "#bdbdbd": "#5a5d62", "#c8c8c8": "#54575c", "#0072b2": "#5ab0ea", "#009e73": "#35c79c", "#d55e00": "#f5834a",
    "#56b4e9": "#a5daf8", "#999999": "#8b8e93", "#cc79a7": "#e39cc3", "#882255": "#cf6d9d", "#332288": "#9b8df0",
    "#999933": "#c4c45a", "#000000": "#f2f2ee",
}  # fmt: skip
"""What the pictures' colors become on a dark page, where they change."""


def inline(picture: Picture) -> str:
    """Returns the HTML element of a picture: SVG of a figure, an image that holds its data of a PNG."""
    if isinstance(picture.image, bytes):
        data = base64.b64encode(picture.image).decode()
        return f'<img alt="" src="data:image/png;base64,{data}">'
    figure = picture.image
    width, height = figure.get_size_inches()
    figure.set_size_inches(min(width, WIDTH_INCHES), height)
    text = StringIO()
    # Letters as text can be searched and take a tenth of the space; a fixed salt makes the file reproducible.
    settings: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": picture.name}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"font: ([^'\"]*)'DejaVu Sans'[^;\"]*", r"font: \1var(--sans)", drawn)
    # Identifiers are the page's, not the picture's: without a prefix two pictures would share them.
    drawn = re.sub(r'(id="|url\(#|href="#)', rf"\1{picture.name}-", drawn)
    return re.sub(r"#[0-9a-f]{6}\b", lambda found: f"var(--c-{found[0][1:]}, {found[0]})", drawn)


def png(picture: Picture, folder: Path) -> Path:
    """Writes a picture into a folder; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{picture.name}.png"
    if isinstance(picture.image, bytes):
        path.write_bytes(picture.image)
        return path
    return write(picture.image, path)


def dark_colors() -> str:
    """Returns the CSS declarations of the pictures' colors on a dark page."""
    return " ".join(f"--c-{light[1:]}: {dark};" for light, dark in DARK.items())
