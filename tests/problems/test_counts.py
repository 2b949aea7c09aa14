"""Poisson counts: likelihood, scores and the truth of simulated sites."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_poisson_deviance

from fedmeta.errors import FedmetaError
from fedmeta.problems.counts import TRUE_WEIGHT, Counts

from .fitting import fitted, joined


def test_scores_are_those_of_scikit_learn() -> None:
    problem = Counts()
    data = problem.task("site-02", "test", 0, 0).query
    parameters = {"weight": torch.tensor([0.4, -0.2, 0.1]), "bias": torch.tensor(0.1)}
    mean = problem.log_mean(parameters, data).exp()
    own = data["mask"] > 0
    found = problem.evaluate(parameters, data)
    assert float(found["deviance"]) == pytest.approx(mean_poisson_deviance(data["y"][own], mean[own]), rel=1e-4)
    assert float(found["mae"]) == pytest.approx(float((data["y"] - mean)[own].abs().mean()), rel=1e-5)


def test_all_rows_of_simulated_sites_give_the_truth() -> None:
    problem = Counts()
    parts = [{**rows, "mask": torch.ones(len(rows["x"]))} for rows in problem.rows.values()]
    own = fitted(problem, joined(parts))
    np.testing.assert_allclose(own["weight"], TRUE_WEIGHT, atol=0.2)


def test_what_is_no_count_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ward.csv"
    for cells, message in (("1.5,1", '"count" must be a whole number'), ("2,0", '"days" must be greater than 0')):
        path.write_text(f"count,days,a\n{cells},1\n3,1,2\n4,2,3\n5,1,2\n")
        with pytest.raises(FedmetaError, match=message):
            Counts(str(path), exposure="days", features=["a"])
    path.write_text("count,days,a\n1,1,1\n3,1,2\n4,2,3\n5,1,2\n")
    assert Counts(str(path), exposure="days", features=["a"], support=1, query=1).sites() == ["ward"]
