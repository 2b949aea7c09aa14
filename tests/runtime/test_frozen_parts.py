"""What outputs depend on is seeded and travels: buffers, frozen layers and first weights, to all that a run leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedmeta import checkpoint, run
from fedmeta.adapt import adaptation, export, writing
from fedmeta.adapt.initialization import FILE as START
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.model import FILE, SiteModel
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.progress import Progress
from tests.adapt.finished import hospitals, labels_of, rows, write_csv

ROOT = Path(__file__).parents[2]

MODELS = {
    "a buffer": ("model.name=tests.frozen_models:fourier",),
    "a buffer in torch's state": ("model.name=tests.frozen_models:fourier", "model.persistent=true"),
    "a layer": ("model.name=tests.frozen_models:random_body",),
    "by name": ("model.name=mlp", 'model.freeze=["1.*"]', "model.hidden=12"),
}


def described(folder: Path, data: Path, *overrides: str) -> Experiment:
    usual = ["server.rounds=4", "server.sites_per_round=0", "runtime.checkpoint_every=2", "evaluation.every=0"]
    usual += ["tracking.uri=none", f"tracking.folder={folder / 'runs'}", "evaluation.local_baseline=none"]
    return Experiment().with_overrides(["data.source=tables", f"data.path={data}", *usual, *overrides])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hospitals(tmp_path_factory.mktemp("data") / "hospitals")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.quick("a buffer")
@pytest.mark.parametrize("case", MODELS)
def test_a_seed_draws_the_frozen_part_and_another_seed_another(case: str, data: Path, tmp_path: Path) -> None:
    first, again = (run(described(tmp_path / name, data, *MODELS[case])) for name in "ab")
    assert first.summary["failures"] == 0
    assert_same(first.meta_state, again.meta_state)
    frozen = [name for name in first.meta_state if name.startswith("frozen.")]
    assert frozen
    other = run(described(tmp_path / "c", data, "runtime.seed=1", *MODELS[case]))
    assert all(not torch.equal(first.meta_state[name], other.meta_state[name]) for name in frozen if name.endswith("t"))


@pytest.mark.slow
def test_three_processes_agree_to_the_last_bit(data: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    states = []
    for name in "abc":
        (tmp_path / f"{name}.toml").write_text(described(tmp_path / name, data, *MODELS["a buffer"]).to_toml())
        command = [sys.executable, "-m", "fedmeta", "run", str(tmp_path / f"{name}.toml")]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
        (folder,) = (tmp_path / name / "runs").iterdir()
        states.append(dict(checkpoint.newest(folder)[0].meta_state))
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a buffer", "by name"])
def test_stopped_and_resumed_it_is_the_unbroken_run(case: str, data: Path, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.round_number == 3:
            raise KeyboardInterrupt

    unbroken = run(described(tmp_path / "whole", data, *MODELS[case]))
    broken = described(tmp_path / "broken", data, *MODELS[case])
    with pytest.raises(KeyboardInterrupt):
        run(broken, report=stop)
    resumed = run(broken, resume="auto")
    assert_same(unbroken.meta_state, resumed.meta_state)
    assert resumed.summary["new_sites"] == unbroken.summary["new_sites"]


@pytest.mark.quick("a buffer")
@pytest.mark.parametrize("case", MODELS)
def test_everything_that_a_run_leaves_has_its_frozen_part(case: str, data: Path, tmp_path: Path) -> None:
    import mlflow.pyfunc
    import pandas as pd

    result = run(described(tmp_path, data, *MODELS[case]))
    start = MetaModel.of(checkpoint.newest(result.folder)[0], code=["tests"])
    start.write(tmp_path / START)
    start = MetaModel.read(tmp_path / START, code=["tests"])
    x, score = rows(100, 40, 3.0)
    adapted = adaptation.adapt(start, str(write_csv(tmp_path / "mine.csv", x, labels_of(score))))
    written = writing.write(adapted, tmp_path / "out")
    state = {name: v for name, v in result.meta_state.items() if not name.startswith("standardisation.")}
    raw = torch.from_numpy(rows(7, 50, 3.0)[0])
    mean, scale = (result.meta_state[f"standardisation.{name}"] for name in ("mean", "scale"))
    standard = ((raw - mean) / scale).float()
    # The learner itself, by hand, from what the run's sites were sent.
    own = adaptation_of(start, state, x, score, mean, scale, adapted.judgement.steps)
    with torch.no_grad():
        expected = start.learner.predict(own, standard).softmax(-1)
        assert torch.allclose(SiteModel.read(written.folder / FILE, code=["tests"])(raw), expected, atol=1e-6)
    assert written.onnx_difference is not None
    assert np.abs(export.outputs_of(written.folder / "model.onnx", raw.numpy()) - expected.numpy()).max() < 1e-5
    names = [start.form.classes[code] for code in expected.argmax(-1).tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMETA_CODE", "tests")
        loaded = mlflow.pyfunc.load_model(str(written.folder / "mlflow-model"))
    assert loaded.predict(pd.DataFrame(raw.numpy(), columns=list(start.form.features))).tolist() == names


def adaptation_of(start, state, x, score, mean, scale, steps):
    classes = [start.form.classes.index(name) for name in labels_of(score)]
    support = (((torch.from_numpy(x) - mean) / scale).float(), torch.tensor(classes))
    return start.learner.adapt(state, support, steps)


@pytest.mark.slow
def test_first_weights_are_read_where_a_run_starts_and_nowhere_else(data: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    weight = torch.full((12, 3), 0.25)
    file = tmp_path / "first.safetensors"
    save_file({"1.weight": weight}, file)
    own = described(tmp_path, data, "model.hidden=12", f"model.weights={file}", 'model.freeze=["1.weight"]')
    result = run(own, report=lambda progress: notes.append(progress.note))
    assert torch.equal(result.meta_state["frozen.1.weight"], weight)
    assert any(f"starts from 1 tensors of {file}; drawn by the seed: 1.bias" in note for note in notes)
    file.unlink()
    start = MetaModel.of(checkpoint.newest(result.folder)[0])
    assert start.experiment.model.weights == ""
    assert torch.equal(start.learner.theta(start.state)["1.weight"], weight)
    with pytest.raises(FedmetaError, match=r"first\.safetensors.*no such file"):
        run(described(tmp_path / "again", data, "model.hidden=12", f"model.weights={file}"))


@pytest.mark.slow
def test_nodes_of_several_processes_compute_with_one_model(data: Path, tmp_path: Path) -> None:
    local = run(described(tmp_path / "local", data, *MODELS["a buffer"], "runtime.nodes=3"))
    ray = run(described(tmp_path / "ray", data, *MODELS["a buffer"], "runtime.nodes=3"), runtime="ray")
    assert torch.equal(local.meta_state["frozen.basis"], ray.meta_state["frozen.basis"])
    for name, value in local.meta_state.items():
        assert torch.allclose(value.double(), ray.meta_state[name].double(), atol=1e-5), name
    assert ray.summary["failures"] == 0
    frames = [r.sites.set_index("site")["personalized_accuracy"].sort_index() for r in (local, ray)]
    assert np.allclose(*frames)
