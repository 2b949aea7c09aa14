import pytest

from fedmeta.text import first_bad_name, name_problem, visible

MARKS = "\n\r\t\0\x1b\x7f\x85\u2028\u202e\u200b\ufeff\ud800"


@pytest.mark.parametrize("name", ["hospital-a", "Zürich 4", "age (years)", "<script>", "a|b", "病院", "x" * 64, "0"])
def test_names_that_are_names(name: str) -> None:
    assert name_problem(name) == ""
    assert visible(name) == name


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is empty"),
        ("x" * 65, "has 65 characters, and may have 64"),
        (" a", "begins or ends with a space"),
        *[
            (f"a{mark}b", "has a character that cannot be printed")
            for mark in "\n\r\t\0\x1b\x7f\x85\u2028\u202e\u200b\ufeff\ud800"
        ],
    ],
)
def test_names_that_are_none(name: str, problem: str) -> None:
    assert name_problem(name) == problem
    shown = first_bad_name(["fine", name])
    assert shown.isprintable()
    assert shown.endswith(problem)
    assert visible(name).isprintable()
