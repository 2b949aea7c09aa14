"""Metrics of rows against scikit-learn on the same predictions, per site and pooled, and where they are undefined."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

import fedmeta
from clients.app import app
from clients.node import learner_for, node_of, split_meta_state
from fedmeta.experiment import Experiment
from fedmeta.problems.pooled import Bins, auroc_bound, pooled, sums_of
from fedmeta.problems.row_metrics import BUILT_IN, Predictions, on_predictions
from fedmeta.runtime.local import LocalGrid

ROOT = Path(__file__).parents[2]
NAMES = ("accuracy", "auroc", "auprc", "sensitivity", "specificity", "f1", "balanced_accuracy", "brier", "log_loss")


def by_scikit_learn(y, probabilities, positive=1):
    """Returns every metric of binary predictions [n, 2] as scikit-learn computes it; NaN where it is undefined."""
    p, predicted, truth = probabilities[:, positive], probabilities.argmax(1), (y == positive).astype(int)
    chosen = (predicted == positive).astype(int)
    both = 0 < truth.sum() < len(truth)
    return {
        "accuracy": sk.accuracy_score(y, predicted),
        "auroc": sk.roc_auc_score(truth, p) if both else math.nan,
        "auprc": sk.average_precision_score(truth, p) if truth.any() else math.nan,
        "sensitivity": sk.recall_score(truth, chosen) if truth.any() else math.nan,
        "specificity": sk.recall_score(truth, chosen, pos_label=0) if not truth.all() else math.nan,
        "f1": sk.f1_score(truth, chosen) if (truth | chosen).any() else math.nan,
        "balanced_accuracy": np.mean([np.mean(predicted[y == code] == code) for code in np.unique(y)]),
        "brier": sk.brier_score_loss(truth, p),
        "log_loss": sk.log_loss(y, probabilities, labels=[0, 1]),
    }


def heart(shared_data, tmp_path, *more):
    names = ",".join(f'"{name}"' for name in NAMES)
    return fedmeta.load_experiment(
        ROOT / "experiments/heart.toml",
        [
            f"data.path={shared_data / 'heart/heart.npz'}",
            f"evaluation.metrics=[{names}]",
            "model.dtype=float64",
            "server.rounds=4",
            "evaluation.every=0",
            "evaluation.local_baseline=none",
            "tracking.uri=none",
            f"tracking.folder={tmp_path}",
            *more,
        ],
    )


def predictions(experiment, result):
    """Returns each site's labels and the class probabilities that its adapted model gives its test rows."""
    node = node_of(LocalGrid(app, experiment).context)
    learner = learner_for(node, node.classes())
    state, scale = split_meta_state(result.meta_state, "cpu")
    found = {}
    for group, batch in node.evaluation_batches(node.hosted, scale, node.classes()):
        for place, site in enumerate(group.tolist()):
            task = batch.task(place)
            outputs = learner.predict(learner.adapt(state, task.support), task.query[0])
            name = node.population.names[node.hosted[site]]
            found[name] = (task.query[1].numpy(), outputs.softmax(-1).detach().numpy())
    return found


@pytest.mark.slow
def test_the_figures_of_heart_are_those_of_scikit_learn(shared_data, tmp_path):
    experiment = heart(shared_data, tmp_path)
    result = fedmeta.run(experiment)
    sites, every = result.sites.set_index("site"), predictions(experiment, result)
    assert set(every) == set(sites.index)
    for site, (y, probabilities) in every.items():
        for name, value in by_scikit_learn(y, probabilities).items():
            assert sites.loc[site, f"personalized_{name}"] == pytest.approx(value, abs=1e-9, nan_ok=True), (site, name)
    for kind, group in (("new", "new_sites"), ("training", "training_sites")):
        own = [every[site] for site in sites.index[sites["kind"] == kind]]
        whole = by_scikit_learn(*(np.concatenate(part) for part in zip(*own, strict=True)))
        figures = result.summary[group]["personalized"]["metrics"]
        bound = figures["auroc"]["pooled_bound"]
        assert 0 <= bound <= 1e-3
        for name, value in whole.items():
            tolerance = {"auroc": bound + 1e-12, "auprc": 5e-3}.get(name, 1e-9)
            assert figures[name]["pooled"] == pytest.approx(value, abs=tolerance), name


@pytest.mark.parametrize("positive", [0, 1])
def test_the_positive_class_is_the_named_one(positive):
    random = np.random.default_rng(positive)
    logits = random.normal(size=(200, 2))
    y = (logits[:, 1] - logits[:, 0] + random.normal(size=200) > 0.7).astype(int)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = Predictions(y, p, np.empty(0), 2, positive)
    expected = by_scikit_learn(y, p, positive)
    for name in ("auroc", "auprc", "sensitivity", "specificity", "f1", "balanced_accuracy"):
        assert on_predictions(BUILT_IN[name], found) == pytest.approx(expected[name], abs=1e-12)
    sums = sums_of(found, len(y), [BUILT_IN[name] for name in NAMES], Bins())
    values = pooled(sums, [BUILT_IN[name] for name in NAMES], positive)
    for name in ("accuracy", "sensitivity", "specificity", "f1", "balanced_accuracy", "log_loss"):
        assert values[name] == pytest.approx(expected[name], abs=1e-12)
    assert abs(values["auroc"] - expected["auroc"]) <= auroc_bound(sums["histogram"]) + 1e-12


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.booleans(), st.floats(-20, 20)), min_size=2, max_size=60),
    st.integers(2, 64),
)
@settings(deadline=None)
def test_the_pooled_auroc_is_within_its_bound(rows, bins):
    y = np.array([int(label) for label, _ in rows])
    odds = np.array([value for _, value in rows])
    p = 1 / (1 + np.exp(-odds))
    found = Predictions(y, np.stack([1 - p, p], 1), np.empty(0), 2)
    sums = sums_of(found, len(y), [BUILT_IN["auroc"]], Bins(count=bins))
    value = pooled(sums, [BUILT_IN["auroc"]], 1).get("auroc", math.nan)
    if 0 < y.sum() < len(y):
        assert abs(value - sk.roc_auc_score(y, p)) <= auroc_bound(sums["histogram"]) + 1e-9
    else:
        assert math.isnan(value)


def test_macro_figures_of_many_classes_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(4), size=120)
    y = np.array([random.choice(4, p=0.5 * row + 0.125) for row in p])
    found = Predictions(y, p, np.empty(0), 4)
    one_hot = np.eye(4)[y]
    assert on_predictions(BUILT_IN["auroc"], found) == pytest.approx(
        sk.roc_auc_score(y, p, multi_class="ovr", average="macro"), abs=1e-12
    )
    assert on_predictions(BUILT_IN["auprc"], found) == pytest.approx(
        sk.average_precision_score(one_hot, p, average="macro"), abs=1e-12
    )
    assert on_predictions(BUILT_IN["f1"], found) == pytest.approx(sk.f1_score(y, p.argmax(1), average="macro"))
    logits = torch.from_numpy(np.log(p))
    brier = BUILT_IN["brier"].on_tensors(logits, torch.from_numpy(y), torch.ones(120, dtype=torch.float64))
    assert float(brier) == pytest.approx(np.square(p - one_hot).sum(1).mean(), abs=1e-12)


def one_class_hospital(folder):
    """Writes eight hospitals of two classes, of which the first has one class only."""
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 60, 3))
    y = (x[..., 0] + random.normal(size=(8, 60)) > 0).astype(int)
    y[0] = 0
    site = np.repeat(np.arange(8), 60)
    names = np.array([f"hospital-{number}" for number in range(8)])
    np.savez(folder / "hospitals.npz", x=x.reshape(-1, 3), y=y.reshape(-1), site=site, site_names=names)
    return folder / "hospitals.npz"


@pytest.mark.slow
def test_a_hospital_of_one_class_is_undefined_counted_and_spoils_no_mean(tmp_path):
    experiment = Experiment.from_toml(
        "",
        overrides=[
            "data.source=npz",
            f"data.path={one_class_hospital(tmp_path)}",
            'data.new_sites=["hospital-0", "hospital-1", "hospital-2"]',
            'evaluation.metrics=["auroc", "accuracy"]',
            "model.name=logistic",
            "server.rounds=3",
            "evaluation.every=0",
            "tracking.uri=none",
            f"tracking.folder={tmp_path}",
        ],
    )
    result = fedmeta.run(experiment)
    group = result.summary["new_sites"]
    sites = result.sites.set_index("site")
    assert math.isnan(sites.loc["hospital-0", "personalized_auroc"])
    assert group["undefined"] == {"auroc": 1}
    assert group["personalized"]["n"] == 2
    values = sites.loc[["hospital-1", "hospital-2"], "personalized_auroc"]
    assert group["personalized"]["mean"] == pytest.approx(values.mean())
    assert group["personalized"]["metrics"]["accuracy"]["n"] == 3
    assert group["helped"] + group["harmed"] <= 1
    assert math.isfinite(group["personalized"]["pooled"])
