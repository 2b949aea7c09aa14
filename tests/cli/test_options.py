"""Options of the program itself."""

import subprocess
import sys

import pytest

import fedmeta


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "shown"),
    [("--version", fedmeta.__version__), ("-h", "Usage"), ("run -h", "--set"), ("-h", "--install-completion")],
)
def test_they_are_those_of_any_program(words: str, shown: str) -> None:
    command = [sys.executable, "-m", "fedmeta", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_public_names_are_listed_before_they_are_imported() -> None:
    assert set(fedmeta.__all__) <= set(dir(fedmeta))
