"""Several labels of 0 or 1: objective and metrics, and a run on mixed tables with a site that joins."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from typer.testing import CliRunner

import fedmeta
from fedmeta.adapt.export import outputs_of
from fedmeta.adapt.model import FILE, SiteModel
from fedmeta.cli.main import app
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.problems.multilabel import NAME, MultiLabel, check_labels
from fedmeta.problems.row_metrics import Predictions

LABELS = ("sepsis", "delirium")


def frame(number: int, rows: int = 60) -> pd.DataFrame:
    draw = np.random.default_rng(number)
    found = pd.DataFrame({"age": draw.integers(20, 90, rows), "ward": draw.choice(["A", "B"], rows)})
    risk = (found["age"] - 55) / 10
    found["sepsis"] = (risk + draw.normal(0, 0.5, rows) > 0).astype(int)
    found["delirium"] = (2 * (found["ward"] == "B") - 1 + draw.normal(0, 0.5, rows) > 0).astype(int)
    return found


def test_the_objective_and_the_metrics_are_those_of_scikit_learn() -> None:
    problem = MultiLabel(torch.nn.Linear(3, 2), LABELS, with_outputs=True)
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 3, generator=draw), (torch.rand(9, 2, generator=draw) < 0.5).float()
    mask = torch.tensor([1.0] * 7 + [0.0] * 2)
    parameters = problem.init(0)
    p = problem.predict(parameters, x)
    expected = np.mean([log_loss(y[:7, k], p[:7, k].detach().double(), labels=[0, 1]) for k in range(2)])
    assert float(problem.inner(parameters, (x, y, mask))) == pytest.approx(expected, rel=1e-5)
    found = problem.evaluate(parameters, (x, y, mask))
    assert float(found["bce"]) == pytest.approx(expected, rel=1e-5)
    assert float(found["label_accuracy"]) == pytest.approx(float(((p > 0.5) == (y > 0.5))[:7].float().mean()))
    metrics = {each.name: each for each in problem.metrics if each.on_predictions}
    given = Predictions(y[:7].double().numpy(), np.empty((7, 0)), p[:7].detach().double().numpy(), 0)
    own = [roc_auc_score(y[:7, k], p[:7, k].detach()) for k in range(2)]
    assert metrics["auroc"].on_predictions(given) == pytest.approx(np.mean(own))
    assert metrics["auroc_delirium"].on_predictions(given) == pytest.approx(own[1])
    one_value = Predictions(np.ones((4, 2)), np.empty((4, 0)), np.ones((4, 2)), 0)
    assert np.isnan(metrics["auroc_sepsis"].on_predictions(one_value))


def test_what_is_not_0_or_1_is_refused() -> None:
    with pytest.raises(FedmetaError, match='site 1: label "delirium" is 2 in some row'):
        check_labels(np.array([[0.0, 1.0], [1.0, 2.0]]), LABELS, lambda row: f"site {row}")
    with pytest.raises(FedmetaError, match="must be one of label_accuracy"):
        MultiLabel(torch.nn.Linear(3, 2), LABELS, score="rmse")


@pytest.mark.slow
def test_a_run_on_tables_and_a_site_that_joins(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number in range(5):
        frame(number).to_csv(tmp_path / "data" / f"h{number}.csv", index=False)
    settings = [f"problem.name={NAME}", 'data.label=["sepsis", "delirium"]', f"data.path={tmp_path / 'data'}"]
    settings += ["data.source=tables", "model.name=logistic", "data.new_sites=1", "server.rounds=15", "server.lr=0.1"]
    settings += ["learner.inner_lr=0.5", "server.sites_per_round=0", "evaluation.every=0", "tracking.uri=none"]
    settings += ["problem.score=auroc"]
    result = fedmeta.run(Experiment().with_overrides([*settings, f"tracking.folder={tmp_path / 'runs'}"]))
    new = result.summary["new_sites"]
    assert result.summary["score"]["name"] == "auroc"
    assert new["personalized"]["mean"] > 0.85
    assert set(new["personalized"]["metrics"]) >= {"label_accuracy", "bce", "auroc_sepsis", "auprc_delirium"}
    mine = frame(9)
    mine.to_csv(tmp_path / "mine.csv", index=False)
    out, rows = tmp_path / "mine", tmp_path / "rows.csv"
    found = CliRunner().invoke(
        app, ["adapt", str(result.folder), "--data", str(tmp_path / "mine.csv"), "--out", str(out)]
    )
    assert not found.exit_code, found.output
    later = frame(10, 30)
    later.drop(columns=list(LABELS))[["ward", "age"]].to_csv(rows, index=False)
    found = CliRunner().invoke(app, ["predict", str(out), "--data", str(rows), "--out", str(tmp_path / "p.csv")])
    assert not found.exit_code, found.output
    table = pd.read_csv(tmp_path / "p.csv")
    p = table[[f"prediction_{name}" for name in LABELS]].to_numpy()
    assert ((p >= 0) & (p <= 1)).all()
    assert roc_auc_score(later["sepsis"], p[:, 0]) > 0.85
    np.testing.assert_allclose(SiteModel.read(out / FILE).predict(later), p, atol=1e-6)
    cells = {"age": later["age"].to_numpy(float), "ward": later["ward"].to_numpy(str)}
    np.testing.assert_allclose(outputs_of(out / "model.onnx", cells), p, atol=1e-5)
    mine.assign(delirium=mine["delirium"] + 1).to_csv(tmp_path / "data" / "h0.csv", index=False)
    with pytest.raises(ValueError, match='site h0: label "delirium" is 2'):
        fedmeta.run(Experiment().with_overrides([*settings, f"tracking.folder={tmp_path / 'runs'}"]))
