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
        # A session of its own: whatever a page leaves running ends with it.
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


def missing(promised: str, printed: str) -> list[str]:
    """Returns the promised lines that were not printed; figures, spaces and the table's rules may differ."""
    loose = [plain(line) for line in printed.splitlines()]
    return [line for line in promised.splitlines() if line.strip() and not any(plain(line) in each for each in loose)]


def plain(line: str) -> str:
    return " ".join(re.sub(r"[│┃┏┗━┓┛─|]", " ", re.sub(r"\d+", "0", line)).split())
