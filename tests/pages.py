"""The pages of docs/ as what they promise: files that they show, commands that they run, and what these print."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEXT = "=== the next block ==="
TIME_S = 1200


@dataclass(frozen=True)
class Page:
    """A page's fenced blocks: files by their paths, and (commands, what they print) in order."""

    files: dict[str, str]
    commands: list[tuple[str, str]]


def read(path: Path) -> Page:
    files: dict[str, str] = {}
    commands: list[tuple[str, str]] = []
    for language, name, text in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", path.read_text(), re.M | re.S):
        if name:
            files[name] = text
        elif language == "sh":
            commands.append((text, ""))
        elif language == "text":
            commands[-1] = (commands[-1][0], text)
    return Page(files, commands)


def run(page: Page, folder: Path, replaced: dict[str, str] | None = None) -> list[str]:
    """Runs a page's commands one after the other in one shell, as a reader would; returns what each block printed.

    Args:
        page: The page.
        folder: Where; gets the examples and docker/.
        replaced: Texts in the commands to be replaced, such as ports.
    """
    for name in ("examples", "docker"):
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    script = f"\necho '{NEXT}'\n".join(commands for commands, _ in page.commands)
    for old, new in (replaced or {}).items():
        assert old in script
        script = script.replace(old, new)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1"}
    output = folder / "output.txt"
    with output.open("wb") as file:
        # A new session: whatever a page leaves running ends with it.
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            code = shell.wait(TIME_S)
        finally:
            end(shell.pid)
    printed = output.read_text(errors="replace").split(NEXT)
    assert code == 0, f"block {len(printed)} ended with {code}:\n{printed[-1][-3000:]}"
    return printed


def end(session: int) -> None:
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        return


NUMBER = r"\d+(?:\.\d+)?"
TIMES = re.compile(r" ?(?:s|ms|min|kB|KB|MB|GB)\b")
TOLERANCE = 0.05
"""How far a printed figure may lie from the page's: processors round differently, and training magnifies it."""


def missing(promised: str, printed: str) -> list[str]:
    """Returns the promised lines that were not printed; spaces, rules of tables and what `close` allows may differ."""
    lines = [plain(line) for line in printed.splitlines()]
    return [line for line in promised.splitlines() if line.strip() and not any(_holds(plain(line), of) for of in lines)]


def _holds(promised: str, printed: str) -> bool:
    texts, wanted = re.split(NUMBER, promised), re.findall(NUMBER, promised)
    pattern = f"({NUMBER})".join(re.escape(text) for text in texts)
    return any(
        all(close(*pair) for pair in zip(wanted, found.groups(), texts[1:], strict=True))
        for found in re.finditer(f"(?<!\\d){pattern}" if not texts[0] else pattern, printed)
    )


def close(wanted: str, found: str, after: str) -> bool:
    """Compares a number on a page with the printed one: counts equal, times free, figures within a tolerance."""
    if TIMES.match(after):
        return True
    if "." not in wanted:
        return wanted == found
    return abs(float(wanted) - float(found)) <= TOLERANCE * max(1.0, abs(float(wanted)))


def plain(line: str) -> str:
    return " ".join(re.sub(r"[│┃┏┗━┓┛─|]", " ", line).split())
