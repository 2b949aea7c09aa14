"""Errors that are written for the person who can mend them."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 1500
"""A longer message is cut in its middle: a file's content may be in it (characters)."""

LONGEST_WORD = 200
"""To compare longer texts with names takes long, and none is near (characters)."""


class FedmetaError(ValueError):
    """What was wrong, where, and what to do, in one line. The command line prints it and exits with code 2.

    A text may hold what a file or a site names: characters that do not print, line breaks among them, are escaped.

    Attributes:
        longest: A longer message is cut in its middle (characters).
    """

    longest = LONGEST

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message, self.longest))


def one_line(text: str, longest: int = LONGEST) -> str:
    """Returns a text on one line, cut if long; characters that do not print are escaped as in Python."""
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 3 :]}"
    if text.isprintable():
        return text
    plain = " ".join(text.splitlines()) if "\n" in text or "\r" in text else text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in plain)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean "x"?` for the valid name nearest to `word`, or the empty string where none is near."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5) if len(word) <= LONGEST_WORD else []
    return meant(f'"{close[0]}"') if close else ""


def meant(text: str) -> str:
    """Returns `; did you mean TEXT?`, as every hint has it."""
    return f"; did you mean {text}?"
