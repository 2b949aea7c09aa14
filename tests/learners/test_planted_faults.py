"""The verification can fail: faults planted in a copy of the learners' source are each caught by it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

VERIFICATION = (
    "test_maml.py::test_maml_against_finite_differences[0.0-mlp-1]",
    "test_learned_rates.py::test_exact_gradients_against_finite_differences[0.0-meta-sgd-mlp]",
    "test_displacements.py::test_imaml_is_the_exact_implicit_gradient[0.5]",
)

FAULTS = {
    "none": ("inner.py", "", ""),
    "a flipped sign": ("inner.py", "value - own[name] * gradient[name]", "value + own[name] * gradient[name]"),
    "a dropped factor": ("imaml.py", "add_scaled(vector, 1 / self.lam, ", "add_scaled(vector, 1.0, "),
    "a detach": ("inner.py", "own[name] * gradient[name]", "own[name] * gradient[name].detach()"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(tmp_path: Path, fault: str) -> None:
    for package in ("fedmeta", "tests/learners"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    file, sound, faulty = FAULTS[fault]
    source = tmp_path / "fedmeta" / "learners" / file
    text = source.read_text()
    assert text.count(sound) == 1 or not sound, "the source to plant the fault in has changed: plant it anew"
    source.write_text(text.replace(sound, faulty) if sound else text)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=line"]
    tests = [f"tests/learners/{name}" for name in VERIFICATION]
    # Bytecode and plugins would cost more time than the tests.
    lean = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment = {**os.environ, **lean, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([*command, *tests], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    # pytest ends with 0 where all passed and 1 where some failed; anything else would be an error of this test.
    assert ran.returncode == (0 if fault == "none" else 1), ran.stdout + ran.stderr
    assert " error" not in ran.stdout, ran.stdout
