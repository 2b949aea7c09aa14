"""The tests can fail: each of these faults, planted in a copy of the source, is caught by the tests named beside it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

EXACT = "learners/test_maml.py::test_maml_against_finite_differences[0.0-mlp-1]"
RATES = "learners/test_learned_rates.py::test_exact_gradients_against_finite_differences[0.0-meta-sgd-mlp]"
IMPLICIT = "learners/test_displacements.py::test_imaml_is_the_exact_implicit_gradient[0.5]"
PROOF = "engines/test_proof.py::"

FAULTS = {
    # learners
    "a flipped sign": ("problems/solvers.py", "v - rates[name] * found[name]", "v + rates[name] * found[name]", EXACT),
    "a dropped factor": (
        "learners/imaml.py",
        "add_scaled(vector, 1 / self.lam, ",
        "add_scaled(vector, 1.0, ",
        IMPLICIT,
    ),
    "a detach": ("problems/solvers.py", "rates[name] * found[name]", "rates[name] * found[name].detach()", RATES),
    "a second derivative that is not compared": (
        "learners/check.py",
        "TOLERANCE = 1e-5",
        "TOLERANCE = 1e5",
        "learners/test_check.py::test_a_wrong_second_derivative_is_refused[weight_norm-maml]",
    ),
    # engines
    "a check that lets all pass": (
        "engines/gradcheck.py",
        "TOLERANCE = 1e-8",
        "TOLERANCE = 1e8",
        PROOF + "test_a_planted_error_of_a_way_is_found[0.0]",
    ),
    "a check that remembers what proved nothing": (
        "engines/lowrank/engine.py",
        "            del known[key]\n",
        "",
        PROOF + "test_where_no_site_proves_anything_the_loop_computes_and_another_cohort_may[lowrank]",
    ),
    "a check that takes unknown kinds": (
        "engines/lowrank/engine.py",
        "if learner.estimator not in ESTIMATORS:",
        "if False:",
        PROOF + "test_kinds_that_the_low_rank_form_does_not_know_are_refused_outright[imaml]",
    ),
    "the other attention in evaluation": (
        "models/attention.py",
        "set_fastpath_enabled(False)",
        "set_fastpath_enabled(True)",
        PROOF + "test_what_is_trained_is_what_is_evaluated[loop]",
    ),
    "a forgotten weight": (
        "engines/weighted_sum.py",
        "torch.tensordot(own * factors,",
        "torch.tensordot(finite.double() * factors,",
        "engines/test_lowrank.py::test_global_weight[maml]",
    ),
    "a forgotten mask": (
        "problems/rows.py",
        "return (values * mask).sum() /",
        "return values.sum() /",
        "learners/test_loss.py::test_padding_and_unseen_classes",
    ),
    "rows that may mix": (
        "problems/function_of_rows.py",
        "    if not all(_same(outputs, other) for other in (alone, *others)):",
        "    if False:",
        "engines/test_own_mistakes.py::test_a_model_that_is_wrong[places in the batch-loop]",
    ),
    # seed
    "a start without its seed": (
        "models/functional.py",
        'torch.manual_seed(torch_seed(seed, "init"))',
        'torch.manual_seed(torch_seed(0, "init"))',
        "models/test_models.py::test_every_named_model_is_redrawn_by_seed",
    ),
    "noise without its step": (
        "noise.py",
        "{_steps.get()}",
        "",
        "test_noise.py::test_steps_and_calls_draw_different_noise",
    ),
    # data
    "a mean that is not taken off": (
        "data/sums.py",
        "sums.square / observed - mean**2",
        "sums.square / observed",
        "data/test_sums.py::test_scales_of_odd_columns",
    ),
    "support rows among the query": (
        "data/episodes.py",
        "_pad(order.rows, starts + supports, queries)",
        "_pad(order.rows, starts, queries)",
        "data/test_episodes.py::test_support_and_query_are_distinct_train_rows",
    ),
    "new sites without their seed": (
        "data/splits.py",
        "np.argsort(draws(seed, purpose, 0,",
        "np.argsort(draws(0, purpose, 0,",
        "data/test_splits.py::test_new_sites_follow_the_seed",
    ),
    # targets
    "targets that keep their spread": (
        "targets.py",
        "own) - mean) / scale",
        "own) - mean)",
        "test_targets.py::test_what_is_standardized_is_restored",
    ),
    "errors in standard units": (
        "targets.py",
        "own = z.double() * scale + mean",
        "own = z.double() + mean",
        "test_targets.py::test_units_change_nothing_but_the_units",
    ),
    # evaluation
    "a worst tenth rounded down": (
        "evaluation.py",
        "math.ceil(len(values) / 10)",
        "max(1, len(values) // 10)",
        "test_evaluation.py::test_the_worst_decile_is_the_mean_of_the_worst_tenth_rounded_up",
    ),
    "ties that help": (
        "evaluation.py",
        '(everyone["gain"] > 0)',
        '(everyone["gain"] >= 0)',
        "test_evaluation.py::test_groups_are_summarised_apart",
    ),
    "a rival by luck": (
        "clients/local_models.py",
        "gain.mean() > gain.std() / len(gain) ** 0.5",
        "gain.mean() > 0",
        "clients/test_local_models.py::test_a_rival_that_is_better_by_luck_only_is_not_taken",
    ),
    "five bins": ("problems/rows.py", "BINS = 10", "BINS = 5", "learners/test_loss.py::test_calibration_has_ten_bins"),
    # gate
    "a gate without a margin": (
        "engines/step_selection.py",
        "MARGIN = 1.25",
        "MARGIN = 0.0",
        "engines/test_step_selection.py::test_not_adapting_must_be_better_by_one_and_a_quarter_standard_errors",
    ),
    # aggregation
    "a trim at one end": (
        "server/aggregation.py",
        ".values[false : len(gradients) - false]",
        ".values[: len(gradients) - false]",
        "server/test_aggregation.py::test_the_trimmed_mean_leaves_out_the_assumed_number_at_either_end",
    ),
    # privacy
    "noise without its scale": (
        "server/privacy.py",
        "self.deviation * noise(",
        "noise(",
        "server/test_privacy.py::test_noise_has_the_scale_that_was_asked_for",
    ),
    "short gradients that are stretched": (
        "engines/weighted_sum.py",
        "self.clip_norm / norms.clamp(min=self.clip_norm)",
        "self.clip_norm / norms",
        "engines/test_ghost_clipping.py::test_clipped_sums_and_norms_are_the_same_in_every_engine[maml-loop]",
    ),
    # checkpoints
    "a damaged file that passes": (
        "checkpoint.py",
        "if digest != _digest(header, tensors):",
        "if not digest:",
        "test_checkpoint.py::test_no_change_of_a_byte_goes_unnoticed",
    ),
    "a memory that is not restored": (
        "server/optimizer.py",
        'load_state_dict({**whole, "state": memory})',
        "load_state_dict(whole)",
        "server/test_optimizer.py::test_restored_steps_are_the_unbroken_ones_bit_for_bit[adam]",
    ),
    # what travels
    "frozen parts that are trained": (
        "learners/learner.py",
        "return {name: value for name, value in meta_state.items() if not name.startswith(FROZEN)}",
        "return dict(meta_state)",
        "models/test_pretrained.py::test_frozen_parameters_travel_and_are_never_trained[1.*]",
    ),
}
"""What is planted: the file (in fedmeta, or from the root), the sound line, the faulty one, and who catches it."""

# One process for all copies, so that torch is imported once: each copy's own modules are imported again.
RUN_IN_EACH_COPY = """
import contextlib, json, os, sys, pytest
outcomes = {}
sys.path.insert(0, "")
for copy, tests in json.loads(sys.argv[1]).items():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("fedmeta", "clients", "server", "tests")]:
        del sys.modules[name]
    with contextlib.chdir(copy), contextlib.redirect_stdout(sys.stderr):
        options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
        outcomes[copy] = pytest.main([*options, *(f"tests/{test}" for test in tests)])
        assert sys.modules["fedmeta"].__file__.startswith(os.getcwd())
print(json.dumps(outcomes))
"""


def place(file: str) -> str:
    """Returns where a fault's file lies below the root."""
    return file if file.startswith(("clients/", "server/")) else f"fedmeta/{file}"


def test_each_fault_has_its_place_in_the_source() -> None:
    lost = [name for name, (file, sound, *_) in FAULTS.items() if (ROOT / place(file)).read_text().count(sound) != 1]
    assert not lost, f"the source to plant these faults in has changed, plant them again: {lost}"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """pytest's exit code by fault: 0 where all passed, 1 where some failed, above 1 an error."""
    copies = tmp_path_factory.mktemp("copies")
    plan = {"none": sorted({fault[3] for fault in FAULTS.values()}), **{name: [f[3]] for name, f in FAULTS.items()}}
    for name in plan:
        for package in ("fedmeta", "clients", "server", "tests"):
            shutil.copytree(ROOT / package, copies / name / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copies / name)
        if name == "none":
            continue
        file, sound, faulty, _ = FAULTS[name]
        source = copies / name / place(file)
        text = source.read_text()
        source.write_text(text.replace(sound, faulty))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", RUN_IN_EACH_COPY, json.dumps(plan)]
    ran = subprocess.run(command, cwd=copies, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, int] = json.loads(ran.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_a_planted_fault_is_caught(outcomes: dict[str, int], fault: str) -> None:
    assert outcomes[fault] == (0 if fault == "none" else 1)


def test_each_fault_names_a_line_that_is_there_once() -> None:
    for name, (file, sound, _, test) in FAULTS.items():
        source = ROOT / (file if file.startswith(("clients/", "server/")) else f"fedmeta/{file}")
        assert source.read_text().count(sound) == 1, name
        assert (ROOT / "tests" / test.partition("::")[0]).is_file(), name
