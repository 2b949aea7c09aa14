"""A new site's classifier in scikit-learn's form: adapted from a start, or without one fitted to its rows alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from fedmeta.adapt.estimate import cross_validate
from fedmeta.adapt.initialization import MetaModel
from fedmeta.adapt.locate import find_start
from fedmeta.adapt.model import SiteModel
from fedmeta.adapt.rows import raw_rows
from fedmeta.data import class_codes
from fedmeta.data.columns import name_of
from fedmeta.data.table_file import clean_name
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Tracking, default_uri

USES = ("advice", "global", "personal")


class PersonalizedClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier for one site: `fit` adapts a federation's start to the site's rows.

    How many inner steps it takes, none included, is chosen by cross-validation on the rows, as `fedmeta adapt` does it.
    Without a start it is a regularized logistic regression on standardized columns, fitted to the rows alone: what the
    site would have without the federation.

    Args:
        start: A finished run (its folder, `meta_model.safetensors`, MLflow id), or what it leaves as a `MetaModel`;
            None for none.
        use: Which model the site gets: "advice", "global" or "personal" (see docs/adapt.md).

    Attributes:
        classes_: The classes: with a start the run's, else those of the labels.
        n_features_in_: How many columns the rows have.
        result_: With a start: what cross-validation found, with the advice and both scores' intervals.
        model_: With a start the site's `SiteModel`; else the pipeline.
    """

    def __init__(self, start: MetaModel | str | Path | None = None, use: str = "advice") -> None:
        self.start = start
        self.use = use

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 - scikit-learn's name
        """Adapts the start to labelled rows.

        Args:
            X: A frame with the run's columns in any order, or an array [n, features] in the run's order; NaN where a
                value is missing. Other columns are refused.
            y: Labels [n]; with a start each must be a class of the run.

        Raises:
            FedmetaError: The start cannot be read or predicts numbers, or rows and labels are not of its form.
            ValueError: Without a start: as scikit-learn refuses rows.
        """
        if self.start is None:
            own, labels = validate_data(self, X, y, ensure_all_finite="allow-nan")
            check_classification_targets(labels)
            self.classes_ = np.unique(labels)
            if len(self.classes_) < 2:
                raise ValueError("Classifier can't train when only one class is present.")
            imputer = SimpleImputer(keep_empty_features=True)
            self.model_ = make_pipeline(imputer, StandardScaler(), LogisticRegression(max_iter=1000))
            self.model_.fit(own, labels)
            return self
        if self.use not in USES:
            raise FedmetaError(f"use = {self.use!r}: must be one of {', '.join(USES)}{nearest(self.use, USES)}")
        start = self.start if isinstance(self.start, MetaModel) else _found(str(self.start))
        if start.form.regression or not start.form.on_rows:
            raise FedmetaError("the start predicts no classes: use fedmeta adapt, which serves every kind of run")
        raw, given = torch.from_numpy(_rows(X, start)), np.asarray(y)
        if given.shape != (len(raw),) or not len(raw):
            raise FedmetaError(
                f"y has shape {given.shape}, and needs a label for each of {len(raw)} rows, at least one"
            )
        names = [name_of(label) for label in given.tolist()]
        codes = class_codes(names, start.form.classes)
        if (codes < 0).any():
            wrong = names[int(np.argmax(codes < 0))]
            raise FedmetaError(f'y: "{wrong[:40]}" is no class of the run; they are {", ".join(start.form.classes)}')
        bare = SiteModel.of(start, start.learner.theta(start.state))
        self.result_ = cross_validate(start, bare.prepare(raw), torch.from_numpy(codes), use=self.use)
        self.model_ = SiteModel.of(start, self.result_.parameters)
        self.classes_ = _as_given(start.form.classes, dict(zip(names, given.tolist(), strict=True)), given.dtype)
        self.n_features_in_ = np.shape(X)[1]
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """Returns the probability of each class [n, classes] for rows, in the order of `classes_`."""
        check_is_fitted(self, "model_")
        if isinstance(self.model_, SiteModel):
            _check_columns(X, self.model_.form.columns.names)
            return np.asarray(self.model_.predict_proba(X))
        own = validate_data(self, X, reset=False, ensure_all_finite="allow-nan")
        return np.asarray(self.model_.predict_proba(own))

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """Returns the most probable class of each row [n]."""
        probabilities = self.predict_proba(X)
        return np.asarray(self.classes_[probabilities.argmax(axis=1)])

    def __sklearn_tags__(self) -> Any:
        """Returns what scikit-learn is to know of it: missing values are welcome."""
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


def _found(start: str) -> MetaModel:
    return find_start(start, Path(Tracking().folder), default_uri())


def _rows(given: Any, start: MetaModel) -> NDArray[Any]:
    """Returns raw rows [n, *shape]; raises `FedmetaError` where columns are others than the run's."""
    _check_columns(given, start.form.columns.names)
    return np.ascontiguousarray(raw_rows(given, start.form, "X")[0])


def _check_columns(given: Any, wanted: tuple[str, ...]) -> None:
    """Checks that a frame has no column besides the run's; raises `FedmetaError` where it has."""
    names = [clean_name(str(name)) for name in getattr(given, "columns", [])]
    others = [name for name in names if name not in wanted]
    if others and set(wanted) <= set(names):
        shown = ", ".join(f'"{name}"' for name in others[:5]) + (" ..." if len(others) > 5 else "")
        raise FedmetaError(f"X has {shown}, which had no part in the run: leave it out")


def _as_given(classes: tuple[str, ...], seen: dict[str, Any], kind: np.dtype[Any]) -> NDArray[Any]:
    """Returns the run's classes as the labels are written, where all can be: numbers as numbers."""
    if kind.kind in "iuf":
        try:
            found = np.array([float(name) for name in classes])
        except ValueError:
            return np.array(classes, dtype=object)
        return found.astype(kind) if (found.astype(kind) == found).all() else found
    if kind.kind == "b" and set(classes) <= {"True", "False"}:
        return np.array([name == "True" for name in classes])
    return np.array([seen.get(name, name) for name in classes], dtype=object if kind.kind == "O" else None)
