"""Figures by subgroup over a whole run: equal to scikit-learn's on the same rows, and small groups stay at the site."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import fedmeta
from fedmeta import checkpoint, report
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.model import SiteModel
from fedmeta.data import evaluation_episodes, load, split
from fedmeta.tables import subgroups_table
from fedmeta.tracking.metrics import final_metrics
from tests.test_categories import experiment, hospitals

SETTINGS = ('evaluation.subgroups=["sex", "age: 40, 65"]', "evaluation.smallest_subgroup=8", "server.rounds=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[fedmeta.Experiment, fedmeta.Result]:
    folder = tmp_path_factory.mktemp("subgroups")
    described = experiment(folder, hospitals(folder / "data"), *SETTINGS)
    return described, fedmeta.run(described)


def truth(described: fedmeta.Experiment, result: fedmeta.Result) -> pd.DataFrame:
    """Each test row of each site, whether the global model is right, and the groups that it is in."""
    start = MetaModel.of(checkpoint.newest(result.folder)[0])
    model = SiteModel.of(start, start.learner.theta(start.state))
    population = load(described.data)
    rows = split(population, described.data, described.runtime.seed)
    query = evaluation_episodes(rows, population.all_sites, described.data.support).query
    names = dict(population.categories)
    parts = []
    for site, name in enumerate(population.names):
        own = query.rows[site][query.mask[site]]
        frame = pd.DataFrame(population.x[own], columns=list(population.feature_names))
        for column, known in names.items():
            codes = frame[column]
            frame[column] = [known[int(code)] if code == code else None for code in codes]
        label = np.array(population.class_names)[population.y[own]]
        parts.append(frame.assign(site=name, right=model.predict(frame) == label))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the input")
def test_counts_and_scores_are_those_of_the_rows(finished: tuple[fedmeta.Experiment, fedmeta.Result]) -> None:
    described, result = finished
    rows = truth(described, result)
    band = np.select([rows["age"] < 40, rows["age"] < 65], ["age<40", "40<=age<65"], "age>=65")
    rows = rows.assign(band=band, sex="sex=" + rows["sex"].fillna("missing"))
    for column in ("sex", "band"):
        for site, own in rows.groupby("site"):
            shown = result.sites.set_index("site").loc[site]
            counts = own[column].value_counts()
            hidden = int(counts[counts < 8].sum())
            for name, count in counts.drop("sex=missing", errors="ignore").items():
                if count >= 8 and not 0 < hidden < 8:
                    assert shown[f"rows {name}"] == count
                    assert shown[f"global {name}"] == pytest.approx(own[own[column] == name]["right"].mean())
                if count < 8:
                    assert shown[f"rows {name}"] == 0
                    assert np.isnan(shown[f"global {name}"])
    entries = {each["name"]: each for each in result.summary["training_sites"]["subgroups"]}
    training = result.sites[result.sites["kind"] == "training"]
    for name, each in entries.items():
        weight, score = training[f"rows {name}"], training[f"personalized {name}"]
        assert each["rows"] == weight.sum()
        if each["rows"]:
            assert each["personalized"]["pooled"] == pytest.approx((weight * score).sum() / weight.sum())
    assert entries["sex=F"]["rows"] > 8


@pytest.mark.slow
def test_the_table_the_report_and_the_metrics_show_them(finished: tuple[fedmeta.Experiment, fedmeta.Result]) -> None:
    _, result = finished
    assert [row[0] for row in subgroups_table(result.summary).rows][:2] == ["sex=F", "sex=M"]
    metrics = final_metrics(result.summary, result.sites)
    assert metrics["subgroups/training_sites_sex=F_rows".replace("=", "_")] > 0
    (page, *_) = [path for path in report.write([str(result.folder)], None, Path(), "none") if path.suffix == ".html"]
    text = page.read_text()
    assert "sex=F" in text
    assert "smaller subgroups stay at their sites" in text
