"""Text from others: the one rule for names, and what a terminal may be shown."""

from __future__ import annotations

from collections.abc import Iterable

LONGEST_NAME = 64
"""The longest name of a site, a class or a feature (characters)."""


def name_problem(name: str) -> str:
    """Returns why a text cannot name a site, a class or a feature; "" where it can.

    A name has 1 to 64 printable characters and no space at either end. Control characters, line breaks, marks that
    turn the direction of writing and other invisible characters are not printable.
    """
    if not name:
        return "is empty"
    if len(name) > LONGEST_NAME:
        return f"has {len(name)} characters, and may have {LONGEST_NAME}"
    if not name.isprintable():
        return "has a character that cannot be printed"
    return "begins or ends with a space" if name != name.strip() else ""


def first_bad_name(names: Iterable[str]) -> str:
    """Returns the first text that cannot be a name, quoted and cut, with the reason; "" where all can."""
    for name in names:
        if problem := name_problem(name):
            return f'"{visible(name[:LONGEST_NAME])}" {problem}'
    return ""


def visible(text: str) -> str:
    r"""Returns text for one line of a terminal or a log: what cannot be printed stands as \xNN, \uNNNN or the like."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )
