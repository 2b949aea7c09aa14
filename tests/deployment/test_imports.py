"""What runs often at a site, or is waited for at a keyboard, imports nothing that takes seconds."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["fedmeta.health", "fedmeta.certs", "fedmeta.runtime.deployment", "fedmeta.cli"])
def test_light_modules_stay_light(module: str) -> None:
    code = f"import {module}, sys; print(*({{'torch', 'pandas', 'mlflow', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_client_imports_neither_mlflow_nor_ray_nor_pandas() -> None:
    code = "import clients.app, sys; print(*({'pandas', 'mlflow', 'ray', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
