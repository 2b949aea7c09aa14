"""The verification can fail: faults planted in copies of the learners' source are each caught by it."""

import json
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
    "none": ("problems/solvers.py", "", ""),
    "a flipped sign": ("problems/solvers.py", "v - rates[name] * found[name]", "v + rates[name] * found[name]"),
    "a dropped factor": ("learners/imaml.py", "add_scaled(vector, 1 / self.lam, ", "add_scaled(vector, 1.0, "),
    "a detach": ("problems/solvers.py", "rates[name] * found[name]", "rates[name] * found[name].detach()"),
}

# One process for all copies, so that torch is imported once: each copy's own modules are imported anew.
RUN_IN_EACH_COPY = """
import contextlib, json, os, sys, pytest
outcomes = {}
sys.path.insert(0, "")
for copy in sorted(os.listdir(".")):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fedmeta", "tests", "learners")]:
        del sys.modules[name]
    with contextlib.chdir(copy), contextlib.redirect_stdout(sys.stderr):
        outcomes[copy] = pytest.main(["-q", "-x", "--tb=line", "-p", "no:cacheprovider", *sys.argv[1:]])
        assert sys.modules["fedmeta"].__file__.startswith(os.getcwd())
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """pytest's exit code of the verification by fault: 0 where all passed, 1 where some failed, above 1 an error."""
    copies = tmp_path_factory.mktemp("copies")
    for fault, (file, sound, faulty) in FAULTS.items():
        for package in ("fedmeta", "tests/learners"):
            shutil.copytree(ROOT / package, copies / fault / package, ignore=shutil.ignore_patterns("__pycache__"))
        source = copies / fault / "fedmeta" / file
        text = source.read_text()
        assert text.count(sound) == 1 or not sound, "the source to plant the fault in has changed: plant it anew"
        source.write_text(text.replace(sound, faulty) if sound else text)
    tests = [f"tests/learners/{name}" for name in VERIFICATION]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", RUN_IN_EACH_COPY, *tests]
    ran = subprocess.run(command, cwd=copies, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, int] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(outcomes: dict[str, int], fault: str) -> None:
    assert outcomes[fault] == (0 if fault == "none" else 1)
