"""Errors that are written for the person who can mend them."""

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST_WORD = 200
"""To compare longer texts with names takes long, and none is near (characters)."""


class FedmetaError(ValueError):
    """What was wrong, where, and what to do, in one line. The command line prints it and exits with code 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Returns `; did you mean "x"?` for the valid name nearest to `word`, or the empty string where none is near."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.5) if len(word) <= LONGEST_WORD else []
    return f'; did you mean "{close[0]}"?' if close else ""
