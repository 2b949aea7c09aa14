"""Models as MLflow keeps them: a folder that MLflow can load and serve, and the entry of a run and of the registry."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from numpy.typing import NDArray

from fedmeta.tracking.description import BETTER_TAG, SCORE_TAG
from fedmeta.tracking.experiment_view import DATA_TAG, PRIMARY_METRIC
from fedmeta.tracking.metrics import RESULTS
from fedmeta.tracking.mlflow_client import MLFLOW_DEFAULTS, reason_of, status_of_error
from fedmeta.versions import __version__

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

FOLDER = "model"
"""The name of a run's model, and of its folder."""

CHAMPION = "champion"
"""The alias of the registered version with the best score of new sites."""
ABOUT = "A start from which each site, also a new one, adapts in a few steps."
TAGS = ("fedmeta.learner", DATA_TAG, "fedmeta.seed", SCORE_TAG, BETTER_TAG)
VALUE_TAG = "fedmeta.new_sites"
"""The tag of a registered version that holds its score of new sites."""

LOADER = "fedmeta.adapt.serving"
SUPPORT: Mapping[str, tuple[str, Any]] = {
    "support_x": ("string", ""),
    "support_y": ("string", ""),
    "steps": ("long", -1),
}
"""The parameters of a prediction that make a run's model a site's own: their types and what they are if left out."""

PROBABILITIES: Mapping[str, tuple[str, Any]] = {"probabilities": ("boolean", False)}
"""The parameter that asks for the classes' probabilities in place of their names."""


def save(
    folder: Path, data: Path, example: NDArray[Any], columns: tuple[str, ...], *, regression: bool, adapts: bool
) -> None:
    """Writes a folder that `mlflow.pyfunc.load_model` and `mlflow models predict` take.

    Args:
        folder: The folder; must not be there.
        data: The file that `fedmeta.adapt.serving` loads.
        example: Raw rows [n, *shape] that show what the model takes.
        columns: The names of a row's features; empty where rows are arrays without names.
        regression: Whether predictions are numbers, and not the names of classes.
        adapts: Whether predictions take a labelled support.
    """
    for key, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(key, value)
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    shown: Any = pd.DataFrame(example, columns=list(columns)) if columns else example
    # Of any type: MLflow refuses whole numbers and truth values for "double". What is no number is refused by the
    # model, as is an array of another shape, for which MLflow would want the very type too.
    of_any_type: Any = AnyType
    inputs = Schema([ColSpec(of_any_type(), name) for name in columns]) if columns else None
    outputs: list[Any] = [ColSpec("double" if regression else "string")]
    known = {**(SUPPORT if adapts else {}), **({} if regression else PROBABILITIES)}
    params = ParamSchema([ParamSpec(name, kind, usual) for name, (kind, usual) in known.items()])
    mlflow.pyfunc.save_model(
        str(folder),
        loader_module=LOADER,
        data_path=str(data),
        signature=ModelSignature(inputs, Schema(outputs), **({"params": params} if known else {})),
        input_example=shown,
        # Given, since MLflow would otherwise load the model in another process to see what it imports.
        pip_requirements=[f"fedmeta=={__version__}"],
    )


def log(client: MlflowClient, run_id: str, folder: Path, registered: str) -> str:
    """Logs a run's model and registers it where it has a name; may be repeated.

    Returns:
        What the store refused, as a sentence; empty where it took everything.

    Raises:
        Exception: The store does not answer, and may do so later.
    """
    from mlflow import MlflowException

    try:
        model = _logged(client, run_id) or _log(client, run_id, folder)
    except MlflowException as error:
        if status_of_error(error) in _LATER:
            raise
        client.log_artifacts(run_id, str(folder), FOLDER)
        return f"the store keeps no models ({reason_of(error)}); the run's artifacts hold this one"
    try:
        if registered:
            return _register(client, run_id, model, registered)
    except MlflowException as error:
        if status_of_error(error) in _LATER:
            raise
        return f'the model is not registered as "{registered}": {reason_of(error)}'
    return ""


_LATER = (401, 429, 500, 502, 503, 504)
"""HTTP's codes after which the same request may succeed later: with a login, or once the server has recovered."""


def _logged(client: MlflowClient, run_id: str) -> LoggedModel | None:
    """Returns the model that a run has logged whole, if there is one."""
    outputs = client.get_run(run_id).outputs
    models = [client.get_logged_model(output.model_id) for output in outputs.model_outputs] if outputs else []
    return next((model for model in models if str(model.status) == "READY"), None)


def _log(client: MlflowClient, run_id: str, folder: Path) -> LoggedModel:
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    run = client.get_run(run_id)
    model = client.create_logged_model(run.info.experiment_id, FOLDER, run_id, model_type="fedmeta")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    described = Model.load(str(folder))
    described.run_id, described.model_id, described.artifact_path = run_id, model.model_id, model.artifact_location
    described.save(str(folder / "MLmodel"))
    client.log_model_artifacts(model.model_id, str(folder))
    _show_results(client, run_id, model.model_id, run.data.metrics)
    return client.finalize_logged_model(model.model_id, "READY")


def _show_results(client: MlflowClient, run_id: str, model_id: str, metrics: Mapping[str, float]) -> None:
    """Gives the model the run's results, which the list of models shows beside it."""
    from mlflow.entities import Metric

    found = [client.get_metric_history(run_id, name)[-1] for name in metrics if name.startswith(RESULTS)]
    entries = [Metric(m.key, m.value, m.timestamp, m.step, model_id=model_id, run_id=run_id) for m in found]
    client.log_batch(run_id, metrics=entries)


def _register(client: MlflowClient, run_id: str, model: LoggedModel, name: str) -> str:
    """Registers a run's model with the run's verdict and tags, and gives the best version its alias.

    Returns:
        Why the alias stays where it is although this version might be better; empty where that is decided.
    """
    from mlflow import MlflowException

    try:
        client.create_registered_model(name, description=ABOUT)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{name}'")
    version = next((each for each in versions if each.run_id == run_id), None)
    run = client.get_run(run_id).data
    tags = {key: run.tags[key] for key in TAGS if key in run.tags}
    score = run.metrics.get(PRIMARY_METRIC)
    tags |= {VALUE_TAG: repr(score)} if score is not None else {}
    verdict = run.tags.get("mlflow.note.content", "").partition("\n\n|")[0].strip()
    if version is None:
        version = client.create_model_version(
            name, model.artifact_location, run_id, tags=tags, description=verdict, model_id=model.model_id
        )
    else:
        client.update_model_version(name, version.version, verdict)
        for key, value in tags.items():
            client.set_model_version_tag(name, version.version, key, value)
    return _crown(client, name, str(version.version), tags)


def _crown(client: MlflowClient, name: str, version: str, tags: Mapping[str, str]) -> str:
    """Gives a new version the alias of the best one where its new-site score is better than that one's."""
    from mlflow import MlflowException

    if VALUE_TAG not in tags:
        return ""  # no new site has a score: nothing to be best by
    try:
        best = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if status_of_error(error) in _LATER:
            raise
        client.set_registered_model_alias(name, CHAMPION, version)
        return ""
    if str(best.version) == version:
        return ""
    for key in (DATA_TAG, SCORE_TAG):
        if best.tags.get(key) != tags.get(key):
            return (
                f'the alias "{CHAMPION}" of the model "{name}" stays at version {best.version}: its '
                f"{key.partition('.')[2]} is {best.tags.get(key, 'not known')}, that of version {version} "
                f"{tags.get(key, 'not known')}, and scores of the two do not compare"
            )
    earlier, found = float(best.tags.get(VALUE_TAG, "nan")), float(tags[VALUE_TAG])
    better = found < earlier if tags.get(BETTER_TAG) == "lower" else found > earlier
    if better or math.isnan(earlier):
        client.set_registered_model_alias(name, CHAMPION, version)
    return ""
