"""First weights from a file and frozen parameters: what travels, what is trained, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fedmeta import Task, models
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.learners import build


def body(seed: int = 5) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"1.weight": torch.randn(6, 8, generator=random), "1.bias": torch.randn(6, generator=random)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(body(), tmp_path / "body.safetensors")
    return tmp_path / "body.safetensors"


def of(**keys: object):
    return lambda: models.build("mlp", (8,), 3, hidden=(6,), **keys)


def test_a_file_gives_first_weights_and_the_seed_draws_the_rest(file: Path) -> None:
    learner = build("maml", of(weights=str(file)))
    one, other = learner.init(1), learner.init(2)
    for name, value in body().items():
        assert torch.equal(one[f"theta.{name}"], value)
        assert torch.equal(other[f"theta.{name}"], value)
    assert not torch.equal(one["theta.3.weight"], other["theta.3.weight"])
    assert torch.equal(one["theta.3.weight"], learner.init(1)["theta.3.weight"])
    assert models.load_weights(of()(), str(file)) == (["1.weight", "1.bias"], ["3.weight", "3.bias"])


@pytest.mark.parametrize("pattern", ["1.*", "1", "?.weight", "3.bias"])
def test_frozen_parameters_travel_and_are_never_trained(pattern: str, file: Path) -> None:
    learner = build("maml", of(weights=str(file), freeze=[pattern]), inner_steps=2)
    state = learner.init(0)
    frozen = {name.removeprefix("frozen.") for name in state if name.startswith("frozen.")}
    expected = {
        "1.*": {"1.weight", "1.bias"},
        "1": {"1.weight", "1.bias"},
        "?.weight": {"1.weight", "3.weight"},
        "3.bias": {"3.bias"},
    }
    assert frozen == expected[pattern]
    support = (torch.randn(5, 8), torch.randint(0, 3, (5,)))
    gradient, _ = learner.meta_gradient(state, Task(support, support))
    assert gradient.keys() == state.keys() - {f"frozen.{name}" for name in frozen}
    adapted = learner.adapt(state, support)
    for name in learner.problem.names:
        assert torch.equal(adapted[name], learner.theta(state)[name]) == (name in frozen)


def test_what_does_not_fit_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(FedmetaError, match=r'freeze: no parameter fits "body\.\*".*1\.weight'):
        of(freeze=["body.*"])()
    with pytest.raises(FedmetaError, match="no trainable parameter"):
        build("maml", of(freeze=["*"]))
    with pytest.raises(FedmetaError, match="no such file"):
        of(weights=str(tmp_path / "absent.safetensors"))()
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x04not safetensors")
    with pytest.raises(FedmetaError, match=r"not a safetensors file.*save_file"):
        of(weights=str(tmp_path / "pickle.pt"))()
    for tensors, message in (
        ({"1.weigth": torch.ones(6, 8)}, r'has no "1\.weigth"; did you mean "1\.weight"'),
        ({"1.weight": torch.ones(6, 7)}, r"has shape \(6, 7\), and the model needs \(6, 8\)"),
        ({"1.bias": torch.full((6,), torch.nan)}, "is not finite"),
        ({"1.bias": torch.ones(6, dtype=torch.int64)}, "of type torch.int64"),
        ({}, "it holds no tensor"),
    ):
        save_file(tensors, tmp_path / "wrong.safetensors")
        with pytest.raises(FedmetaError, match=message):
            of(weights=str(tmp_path / "wrong.safetensors"))()


def test_the_files_path_does_not_travel_and_is_made_absolute(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    experiment = Experiment.from_toml(f'[model]\nweights = "{file.name}"\nfreeze = ["1.*"]')
    assert experiment.absolute().model.weights == str(file)
    at_sites = Experiment.from_toml(experiment.for_sites())
    assert at_sites.model.weights == ""
    assert at_sites.model.freeze == ("1.*",)
    assert file.name not in experiment.for_sites()
