"""Targets of a regression are learned in standard units; scores and predictions are in their own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, r2_score

import fedmeta
from fedmeta import checkpoint
from fedmeta.adapt import adaptation, export, writing
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.model import FILE, SiteModel
from fedmeta.adapt.serving import _load_pyfunc
from fedmeta.data import load, split, target_scale, target_sums
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.problems.pooled import Bins, pooled, sums_of
from fedmeta.problems.row_metrics import BUILT_IN, on_predictions, predictions_of
from fedmeta.targets import TARGET_MEAN, TARGET_SCALE, TargetScale

SITES, COLUMNS = 6, ("dose", "age", "weight")


def patients(seed: int, count: int, targets: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Features and targets of size 1, with a shift and weights of the site's own."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, len(COLUMNS)))
    weights = np.array([[1.0, -0.5], [0.3, 1.0], [0.0, 0.5]])[:, :targets] + 0.3 * draw.normal(size=(3, targets))
    y = x @ weights + draw.normal(size=targets) + 0.1 * draw.normal(size=(count, targets))
    return x, y


def federation(
    path: Path, mean: float = 0.0, sd: float = 1.0, targets: int = 1, log: bool = False
) -> tuple[str, NDArray[Any]]:
    """Writes a federation whose targets have this mean and standard deviation; returns its file and targets."""
    every = [patients(seed, 30 + 3 * seed, targets) for seed in range(SITES)]
    y = np.concatenate([own for _, own in every])
    y = mean + sd * (y - y.mean(0)) / y.std(0)
    y = np.exp(y) if log else y
    sites = np.repeat(np.arange(SITES), [len(own) for _, own in every])
    arrays = {"x": np.concatenate([x for x, _ in every]), "y": y if targets > 1 else y[:, 0], "site": sites}
    np.savez(path, **arrays, feature_names=np.array(COLUMNS))
    return str(path), y


def experiment(tmp: Path, path: str, *overrides: str) -> Experiment:
    usual = ["data.source=npz", f"data.path={path}", "tracking.uri=none", f"tracking.folder={tmp / 'runs'}"]
    usual += ["server.rounds=8", "evaluation.every=0", "model.hidden=8", "server.lr=0.02", "learner.inner_lr=0.1"]
    return Experiment().with_overrides([*usual, *overrides])


@pytest.mark.parametrize("scale", [TargetScale(), TargetScale(np.array([3.0, -1.0]), np.array([2.0, 1e-6]))])
@pytest.mark.parametrize("log", [False, True])
def test_what_is_standardized_is_restored(scale: TargetScale, log: bool) -> None:
    scale = TargetScale(scale.mean, scale.scale, log)
    y = np.random.default_rng(0).uniform(0.1, 9.0, (4, 5, 2))
    for values in (y, torch.from_numpy(y)):
        back = scale.restore(scale.standardize(values))
        assert np.allclose(np.asarray(back), y, rtol=1e-9)
    assert np.allclose(scale.standardize(y), scale.standardize(torch.from_numpy(y)).numpy(), rtol=1e-12)
    assert scale.identity == (len(scale.mean) == 1 and not log)


@pytest.mark.parametrize("kind", ["standardise", "log", "none"])
@pytest.mark.parametrize("targets", [1, 2])
def test_the_scale_is_that_of_train_rows_of_training_sites(tmp_path: Path, kind: str, targets: int) -> None:
    path, _ = federation(tmp_path / "sites.npz", 2.0, 0.5, targets, log=True)
    data = experiment(tmp_path, path).data
    parts = split(load(data), data, 3)
    training = np.array([0, 2, 5])
    scale = target_scale(target_sums(parts, training, kind), kind)  # type: ignore[arg-type]
    own = parts.population.labels(parts.train_rows(training).rows).reshape(-1, targets)
    own = {"standardise": own, "log": np.log(own), "none": np.array([[-1.0], [1.0]])}[kind]
    assert np.allclose(scale.mean, own.mean(0))
    assert np.allclose(scale.scale, own.std(0))
    assert scale.log == (kind == "log")


@pytest.mark.slow
def test_units_change_nothing_but_the_units(tmp_path: Path) -> None:
    """The same federation in units a thousand times as large and as small: the same figures in standard units."""
    found = []
    for mean, sd in ((0.0, 1.0), (1000.0, 200.0), (0.001, 0.0002)):
        path, _ = federation(tmp_path / f"{mean}.npz", mean, sd)
        result = fedmeta.run(experiment(tmp_path, path, 'evaluation.metrics=["rmse", "mae", "r2", "nll"]'))
        figures: list[float] = []
        for group in ("new_sites", "training_sites"):
            for state in ("global", "personalized", "local_only"):
                entry = result.summary[group][state]
                figures += [entry["metrics"][name]["mean"] / sd for name in ("rmse", "mae")]
                figures += [entry["metrics"]["r2"]["mean"], entry["metrics"]["nll"]["mean"] - np.log(sd)]
                figures += [entry["pooled"] / sd] if state != "local_only" else []
            figures += [result.summary[group][key] for key in ("helped", "harmed", "beats_local")]
        found.append(figures)
        assert result.summary["score"]["name"] == "rmse"
        for name in (TARGET_MEAN, TARGET_SCALE):
            assert result.meta_state[name].dtype == torch.float64
    assert np.allclose(found[1], found[0], rtol=1e-5)
    assert np.allclose(found[2], found[0], rtol=1e-5)
    # Not a score that nothing was learned for: below that of predicting the mean.
    assert found[0][4] < 0.9


@pytest.mark.quick("2-False")
@pytest.mark.parametrize(("targets", "log"), [(1, False), (1, True), (2, False), (2, True)])
def test_a_site_that_joins_gets_predictions_in_its_own_units(tmp_path: Path, targets: int, log: bool) -> None:
    """Run, adapt, torch, ONNX and MLflow's loader agree with what is computed by hand from the meta-state."""
    path, _ = federation(tmp_path / "sites.npz", 7.0, 0.7, targets, log)
    overrides = ["data.target=log"] if log else []
    result = fedmeta.run(experiment(tmp_path, path, *overrides))
    start = MetaModel.of(checkpoint.newest(result.folder)[0])
    x, y = patients(77, 40, targets)
    y = np.exp(7.0 + 0.7 * y) if log else 7.0 + 0.7 * y
    np.savez(tmp_path / "mine.npz", x=x, y=y if targets > 1 else y[:, 0], feature_names=np.array(COLUMNS))
    adapted = adaptation.adapt(start, str(tmp_path / "mine.npz"))
    folder = writing.write(adapted, tmp_path / "out").folder
    parameters = adapted.judgement.parameters
    prepared = ((torch.from_numpy(x) - start.mean) / start.scale).float()
    z = start.learner.predict(parameters, prepared).detach().double().numpy()
    mean, scale = (result.meta_state[name].numpy() for name in (TARGET_MEAN, TARGET_SCALE))
    expected = np.exp(z * scale + mean) if log else z * scale + mean
    expected = expected if targets > 1 else expected[:, 0]
    assert np.allclose(SiteModel.read(folder / FILE).predict(x), expected, rtol=1e-6)
    assert np.allclose(export.outputs_of(folder / "model.onnx", x), expected, rtol=1e-4)
    served = _load_pyfunc(str(folder))
    assert np.allclose(served.predict(pd.DataFrame(x, columns=list(COLUMNS))), expected, rtol=1e-6)
    # A start adapts to a support that is in the site's own units.
    steps = adapted.judgement.steps
    params = {"support_x": json.dumps(x.tolist()), "support_y": json.dumps(y.squeeze().tolist()), "steps": steps}
    start.write(tmp_path / "meta_model.safetensors")
    assert np.allclose(_load_pyfunc(str(tmp_path)).predict(x, params), expected, rtol=1e-4)
    # The estimate is in the same units.
    errors = np.sqrt(np.square(expected - (y if targets > 1 else y[:, 0])).mean())
    assert 0.3 * errors < adapted.judgement.best.score < 3 * errors
    if targets > 1:
        assert start.form.targets == ("y0", "y1")


def test_figures_of_several_targets_are_those_of_scikit_learn() -> None:
    draw = np.random.default_rng(5)
    y, outputs = draw.normal(size=(2, 50, 3))
    found = predictions_of(outputs, y, 1)
    tensors = [torch.from_numpy(each) for each in (outputs, y, np.ones(50))]
    rmse, mae, nll = (float(BUILT_IN[name].on_tensors(*tensors)) for name in ("rmse", "mae", "nll"))  # type: ignore[misc]
    assert rmse == pytest.approx(np.sqrt(np.square(outputs - y).mean()))
    assert mae == pytest.approx(mean_absolute_error(y, outputs))
    assert on_predictions(BUILT_IN["r2"], found) == pytest.approx(r2_score(y, outputs))
    parts = [predictions_of(outputs[part], y[part], 1) for part in (slice(0, 20), slice(20, 50))]
    metrics = [BUILT_IN[name] for name in ("rmse", "mae", "r2", "nll")]
    sums = [sums_of(part, len(part.y), metrics, Bins())["regression"] for part in parts]
    together = pooled({"regression": sums[0] + sums[1]}, metrics, 1)
    assert together == pytest.approx({"rmse": rmse, "mae": mae, "r2": r2_score(y, outputs), "nll": nll})


def test_local_ridge_serves_several_targets() -> None:
    """Against scikit-learn's ridge of the same penalty on each target."""
    from clients import local_models

    x, y = patients(3, 40, 2)
    gram, cross = (torch.from_numpy(a @ x.T + local_models.INTERCEPT)[None] for a in (x, x))
    present = torch.ones(1, 40, dtype=torch.float64)
    folds = torch.arange(40)[None] % local_models.FOLDS
    masks = torch.stack([present * (folds != fold) for fold in range(local_models.FOLDS)] + [present], 1)
    found = local_models._ridge(gram, cross, torch.from_numpy(y)[None], present, masks, folds)[0].numpy()
    columns = np.concatenate([x, np.full((40, 1), local_models.INTERCEPT**0.5)], 1)
    fits = [
        RidgeCV([alpha], fit_intercept=False).fit(columns, y - y.mean(0)).predict(columns) + y.mean(0)
        for alpha in local_models.PENALTIES
    ]
    assert min(np.abs(found - fit).max() for fit in fits) < 1e-8


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.target=log"], "needs numbers above 0"),
        (["data.target=log", "data.source=digits"], "the labels are classes"),
        (["data.target=logarithm"], "must be one of"),
        (['data.label=["a", "a"]'], "several different ones"),
    ],
)
def test_targets_that_cannot_be_are_refused_in_one_line(tmp_path: Path, overrides: list[str], words: str) -> None:
    path, _ = federation(tmp_path / "sites.npz")
    with pytest.raises(FedmetaError, match=words) as refused:
        fedmeta.run(experiment(tmp_path, path, *overrides))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_several_columns_of_tables_are_targets(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    folder.mkdir()
    for seed in range(4):
        x, y = patients(seed, 30, 2)
        frame = pd.DataFrame(x, columns=list(COLUMNS)).assign(motor=y[:, 0], total=y[:, 1])
        frame.to_csv(folder / f"clinic-{seed}.csv", index=False)
    wanted = ["data.source=tables", f"data.path={folder}", 'data.label=["total", "motor"]', "server.rounds=2"]
    made = experiment(tmp_path, "", *wanted)
    population = load(made.data)
    assert (population.target_names, population.targets) == (("total", "motor"), 2)
    assert population.feature_names == tuple(sorted(COLUMNS))
    assert fedmeta.run(made).summary["new_sites"]["personalized"]["mean"] > 0
    (folder / "clinic-9.csv").write_text("age,dose,weight,motor,total\n1,2,3,4,5\n1,2,3,high,5\n")
    with pytest.raises(FedmetaError, match=r'clinic-9.csv: line 3, column "motor" is "high": targets must be numbers'):
        load(made.data)


@pytest.mark.slow
@pytest.mark.parametrize("gate", [True, False])
def test_a_site_whose_steps_blow_up_takes_no_mean_with_it(tmp_path: Path, gate: bool) -> None:
    """One new site's features are forty times as large: its steps diverge at the rate that suits all others."""
    path, _ = federation(tmp_path / "sites.npz", 29.0, 11.0)
    arrays = dict(np.load(path))
    arrays["x"][arrays["site"] == 5] *= 40
    np.savez(path, **arrays)
    overrides = ['data.new_sites=["site-4", "site-5"]', f"evaluation.gate={str(gate).lower()}"]
    result = fedmeta.run(experiment(tmp_path, path, *overrides))
    new = result.summary["new_sites"]
    sites = result.sites.set_index("site")
    assert np.isfinite(new["personalized"]["mean"])
    if gate:
        assert new["diverged"] == 0
        assert sites.loc["site-5", "personalized_rmse"] <= 2 * sites.loc["site-5", "global_rmse"]
    else:
        assert (new["n"], new["diverged"], new["harmed"]) == (1, 1, 0.5)
        assert new["personalized"]["mean"] == pytest.approx(sites.loc["site-4", "personalized_rmse"])
        with_it = new["personalized_with_diverged"]
        assert with_it is None or with_it > 10 * new["personalized"]["mean"]
