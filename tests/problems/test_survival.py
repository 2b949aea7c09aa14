"""Survival in discrete time: likelihood, scores and the truth of simulated sites."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.problems.source import form_of
from fedmeta.problems.survival import TRUE_WEIGHT, Survival, brier_score, c_index

from .fitting import fitted, joined


def drawn(rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(seed)
    risk = (torch.randn(rows, generator=draw, dtype=torch.float64) * 2).round()
    interval = torch.randint(0, 5, (rows,), generator=draw)
    event = (torch.rand(rows, generator=draw) < 0.6).double()
    mask = (torch.arange(rows) < rows - 3).double()
    return risk, interval, event, mask


def test_concordance_is_that_of_a_count_of_pairs() -> None:
    risk, interval, event, mask = drawn(30)
    right, pairs = 0.0, 0
    for i in range(27):
        for j in range(27):
            earlier = interval[i] < interval[j] or (interval[i] == interval[j] and not event[j])
            if event[i] and earlier:
                pairs += 1
                right += float(risk[i] > risk[j]) + 0.5 * float(risk[i] == risk[j])
    assert float(c_index(risk, interval, event, mask)) == pytest.approx(right / pairs)
    assert c_index(risk, interval, torch.zeros(30), mask).isnan(), "no event, no pair"


def test_the_brier_score_without_censoring_is_a_mean_square() -> None:
    _, interval, _, mask = drawn(30)
    survival = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = brier_score(survival, interval, torch.ones(30).double(), mask, 2)
    expected = ((interval > 2).double() - survival)[:27].square().mean()
    assert float(found) == pytest.approx(float(expected))


def test_weights_make_up_for_censored_rows() -> None:
    """Of many rows censored at random, the weighted score is that of the same rows without censoring."""
    draw = np.random.default_rng(0)
    rows = 20_000
    last = torch.from_numpy(np.minimum(draw.geometric(0.3, rows) - 1, 4))
    censored = torch.from_numpy(np.minimum(draw.geometric(0.2, rows) - 1, 9))
    survival = torch.from_numpy(draw.random(rows))
    ones = torch.ones(rows).double()
    whole = brier_score(survival, last, ones, ones, 2)
    event = (last <= censored).double()
    seen = brier_score(survival, torch.minimum(last, censored), event, ones, 2)
    assert float(seen) == pytest.approx(float(whole), abs=0.01)
    kept = event.bool() | (torch.minimum(last, censored) > 2)
    naive = brier_score(survival[kept], torch.minimum(last, censored)[kept], ones[kept], ones[kept], 2)
    assert abs(float(naive) - float(whole)) > 0.005 or abs(float(seen) - float(whole)) < 0.005
    nothing = brier_score(survival[:4], torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 0, 0, 0]), ones[:4], 2)
    assert nothing.isfinite(), "all at risk are censored, and no row is left after it"


def test_the_likelihood_is_that_of_each_interval() -> None:
    problem = Survival()
    parameters = {"weight": torch.zeros(3), "baseline": torch.logit(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))}
    data = {"x": torch.zeros(3, 3), "interval": torch.tensor([1, 1, 0]), "event": torch.tensor([1.0, 0.0, 1.0])}
    found = problem.inner(parameters, data | {"mask": torch.tensor([1.0, 1.0, 0.0])})
    expected = -(np.log(0.9) + np.log(0.2) + np.log(0.9)) / 2
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_all_rows_of_simulated_sites_give_the_truth() -> None:
    problem = Survival()
    tasks = [problem.task(site, "test", 0, 0).query for site in problem.sites()]
    assert len({form_of(problem.task(site, "test", 0, 0)) for site in problem.sites()}) == 1
    data = joined(tasks)
    own = fitted(problem, data)
    # Effects that differ between sites are shrunk a little where one is fitted for all.
    np.testing.assert_allclose(own["weight"], TRUE_WEIGHT, atol=0.2)
    scores = problem.evaluate(own, data)
    assert 0.6 < float(scores["c_index"]) < 0.9
    assert float(scores[problem.metrics[1].name]) < 0.25


def test_train_and_test_rows_of_a_site_are_disjoint() -> None:
    problem = Survival()
    test = problem.task("site-03", "test", 0, 5)
    for number in (1, 2):
        task = problem.task("site-03", "train", number, 5)
        seen = {tuple(row) for part in task for row in part["x"].tolist()}
        assert len(seen) == 80
        held = test.query["x"][test.query["mask"] > 0]
        assert not seen & {tuple(row) for row in held.tolist()}


def test_a_site_reads_its_file_and_names_what_is_wrong(tmp_path: Path) -> None:
    lines = "time,event,age\n" + "".join(f"{1 + row % 5},{row % 2},{40 + row}\n" for row in range(20))
    (tmp_path / "ward.csv").write_text(lines)
    keys = {"features": ["age"], "center": [50.0], "scale": [10.0]}
    own = Survival(str(tmp_path / "ward.csv"), "a", **keys)
    assert own.sites() == ["a"]
    assert float(own.rows["a"]["x"][0]) == -1.0
    assert own.rows["a"]["interval"][:5].tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "other.csv").write_text("time,event,Age\n1,1,2\n2,0,\n3,1,4\n")
    with pytest.raises(FedmetaError, match=r"other\.csv lacks age"):
        Survival(str(tmp_path), **keys)
    (tmp_path / "other.csv").write_text("time,event,age\n1,1,2\n2,0,\n3,1,4\n")
    with pytest.raises(FedmetaError, match=r'line 3, column "age" is no finite number'):
        Survival(str(tmp_path), **keys)
    (tmp_path / "other.csv").write_text("time,event,age\n1,2,2\n2,0,3\n3,1,4\n")
    with pytest.raises(FedmetaError, match="site other"):
        Survival(str(tmp_path), **keys)
    for wrong in ({"cuts": [2.0, 1.0]}, {"brier": 9}, {"scale": [1.0]}, {"path": str(tmp_path / "none")}):
        with pytest.raises(FedmetaError, match=r"\[problem\]"):
            Survival(**wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["survival", "counts"])
def test_new_sites_gain_by_adapting(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(__file__).parents[2] / "examples" / f"{name}.toml"
    monkeypatch.chdir(tmp_path)
    summary = fedmeta.run(fedmeta.load_experiment(file, ["tracking.uri=none", "evaluation.every=0"])).summary
    new = summary["new_sites"]
    better = new["personalized"]["mean"] - new["global"]["mean"]
    assert (better if summary["score"]["higher_is_better"] else -better) > 0
