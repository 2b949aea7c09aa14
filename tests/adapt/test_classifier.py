"""A new site's classifier in scikit-learn's form."""

import pickle
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from fedmeta import PersonalizedClassifier
from fedmeta.errors import FedmetaError
from tests.adapt.test_prediction import frame, start


@pytest.mark.slow
@parametrize_with_checks([PersonalizedClassifier()])
def test_without_a_start_it_is_one_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def labelled(rows: int) -> tuple[pd.DataFrame, np.ndarray]:
    own = frame(rows)
    return own, np.where(own["age"] + 10 * own["smoker"] > 55, "ill", "well")


def test_from_a_start_it_adapts_by_the_names_of_columns() -> None:
    x, y = labelled(30)
    own = clone(PersonalizedClassifier(start(), use="personal")).fit(x[["ward", "dose", "smoker", "age"]], y)
    assert own.classes_.tolist() == ["ill", "well"]
    np.testing.assert_allclose(own.predict_proba(x), own.model_.predict_proba(x))
    assert set(own.predict(x)) <= {"ill", "well"}
    assert own.score(x, y) == np.mean(own.predict(x) == y)
    assert pickle.loads(pickle.dumps(own)).predict(x).tolist() == own.predict(x).tolist()
    bare = PersonalizedClassifier(start(), use="global").fit(x, y)
    assert bare.result_.steps == 0
    assert not np.allclose(bare.predict_proba(x), own.predict_proba(x))


@pytest.mark.slow
def test_it_can_be_cross_validated() -> None:
    x, y = labelled(30)
    assert np.isfinite(cross_val_score(PersonalizedClassifier(start()), x, y, cv=3)).all()


@pytest.mark.parametrize(
    ("change", "labels", "message"),
    [
        ({"note": 1}, None, '"note", which had no part in the run'),
        ({"dose": None}, None, 'lacks "dose"'),
        ({}, "dead", '"dead" is no class of the run'),
    ],
)
def test_what_is_not_the_runs_is_refused(change: dict[str, Any], labels: str | None, message: str) -> None:
    x, y = labelled(12)
    x = x.drop(columns=[name for name in change if name in x]) if change and "dose" in change else x.assign(**change)
    with pytest.raises(FedmetaError, match=message):
        PersonalizedClassifier(start()).fit(x, y if labels is None else np.full(12, labels))


def test_a_start_of_numbers_is_refused() -> None:
    x, y = labelled(12)
    with pytest.raises(FedmetaError, match="predicts no classes"):
        PersonalizedClassifier(start(regression=True)).fit(x, y)
