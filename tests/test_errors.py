"""An error for people is one line, whatever a file or a site has in it."""

import copy
import pickle

import pytest

from fedmeta.errors import FedmetaError, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain text, with ä and 中", "plain text, with ä and 中"),
        ("two\nlines\r\nand three", "two lines and three"),
        ("bell \a and escape \x1b[31m", "bell \\x07 and escape \\x1b[31m"),
        ("form\x0cfeed and \x1c and \u2028", "form\\x0cfeed and \\x1c and \\u2028"),
        ("\u202eright to left", "\\u202eright to left"),
        ("", ""),
    ],
)
def test_an_error_is_one_line_of_what_prints(text: str, line: str) -> None:
    error = FedmetaError(text)
    assert str(error) == one_line(text) == line
    assert len(line.splitlines()) <= 1
    assert str(pickle.loads(pickle.dumps(error))) == str(copy.copy(error)) == line


def test_a_long_text_is_cut_in_its_middle() -> None:
    line = str(FedmetaError("where: " + "x" * 10_000 + ": what to do"))
    assert len(line) < 2000
    assert line.startswith("where: x")
    assert line.endswith("x: what to do")
