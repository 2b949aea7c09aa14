"""The default compose file, brought up from the real image: see `container_check.sh` for what is checked."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = Path(os.environ.get("FEDMETA_CONTAINERS") or ROOT.parent / "shared" / "tools" / "containers.sh")
"""A script that builds the image, brings the compose file up, and runs a check: `TOOL PROJECT CHECK`. It says `## base`
once the machine has an engine and a base image."""
LONGEST_S = 2400.0


def missing() -> str:
    """Returns what this machine lacks, or nothing."""
    if not TOOL.is_file():
        return "containers: name a script that brings them up in FEDMETA_CONTAINERS"
    if os.geteuid() != 0:
        return "containers are brought up as root"
    return "" if shutil.which("apt-get") else "containers are brought up on Debian"


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_the_default_compose_file(tmp_path: Path) -> None:
    env = {
        "CHECK_S": "1200",
        "ROUNDS": "10",
        "FEDMETA_CERTS": str(tmp_path / "certs"),
        "FEDMETA_DATA": str(tmp_path / "data"),
    }
    check = Path(__file__).with_name("container_check.sh")
    command = ["bash", str(TOOL), str(ROOT), str(check)]
    done = subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=LONGEST_S
    )
    refused = [line for line in done.stderr.splitlines() if line.startswith(("unshare:", "mount:"))]
    if done.returncode and ("## base" not in done.stdout or refused):
        last = (refused or done.stderr.strip().splitlines() or ["it does not say why"])[-1]
        pytest.skip(f"this machine cannot bring containers up: {last}")
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
