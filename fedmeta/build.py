"""From an experiment to its problem, its task source and its learner."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedmeta import models
from fedmeta.data import Population, left_out, load, without_sites
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.importing import first_line, load_object
from fedmeta.learners import Learner, build, learner_class, settings_of
from fedmeta.problems import Problem, Supervised, TaskSource, choose_metrics

DEFAULT_OPTIMIZERS = {"gradient": ("adam", 0.003), "delta": ("sgd", 1.0), "nothing": ("sgd", 1.0)}
"""The server's optimizer and learning rate by what a learner's sites send, where the experiment has "auto"."""

SUPERVISED = "supervised"


def learner_of(experiment: Experiment, shape: tuple[int, ...], classes: tuple[str, ...], targets: int = 1) -> Learner:
    """Builds the learner, and the problem that it solves, as an experiment describes them.

    Args:
        experiment: The run's description.
        shape: The shape of one row; empty where the data are no rows.
        classes: The run's class list; empty for regression and for data that are no rows.
        targets: How many numbers a regression predicts for each row.

    Raises:
        FedmetaError: The learner, the problem or the model cannot be built from these settings.
    """
    section = experiment.learner
    own = settings_of(learner_class(section.name))
    settings = {key: value for key, value in section.model_dump(exclude={"name"}).items() if key in own}
    try:
        return build(section.name, problem_of(experiment, shape, classes, targets), **{**settings, **section.extra})
    except FedmetaError:
        raise
    except Exception as error:
        if ":" not in section.name:
            raise
        raise FedmetaError(f'[learner] name = "{section.name}" cannot be built: {first_line(error)}') from error


def problem_of(
    experiment: Experiment, shape: tuple[int, ...] = (), classes: tuple[str, ...] = (), targets: int = 1
) -> Problem:
    """Builds the problem of an experiment.

    A subclass of `Supervised` is given the run's model; any other class or function those of `shape`, `classes` and
    `outputs` that it names as arguments; and each the keys of [problem] that are its own.

    Raises:
        FedmetaError: It cannot be built, or it is no problem.
    """
    evaluation, name = experiment.evaluation, experiment.problem.name
    outputs = len(classes) or max(1, targets)
    if name != SUPERVISED:
        factory = load_code(name, "[problem] name")
        if not (isinstance(factory, type) and issubclass(factory, Supervised)):
            given = {"shape": shape, "classes": classes, "outputs": outputs}
            problem = _call(factory, "[problem] name", name, {**_asked(factory, given), **experiment.problem.extra})
            if not isinstance(problem, Problem):
                raise FedmetaError(f'[problem] name = "{name}" is not a fedmeta.Problem, but {type(problem).__name__}')
            return problem

    def model() -> nn.Module:
        section = experiment.model
        not_its_own = {"name", "dtype", "freeze", "weights", "start"}
        keys = dict(section.extra) if ":" in section.name else section.model_dump(exclude=not_its_own)
        module = models.build(section.name, shape, outputs, freeze=section.freeze, weights=section.weights, **keys)
        return module.to(dtype_of(experiment))

    settings: dict[str, Any] = {
        "metrics": choose_metrics(evaluation.metrics, evaluation.score, regression=not classes),
        "positive": _positive(experiment, classes),
        "with_outputs": True,
    }
    if name == SUPERVISED:
        return Supervised(model, **settings)
    factory = load_code(name, "[problem] name")
    keys = {**settings, **_asked(factory, {"labels": experiment.data.label_names}), **experiment.problem.extra}
    found: Problem = _call(factory, "[problem] name", name, keys, model)
    return found


def _positive(experiment: Experiment, classes: tuple[str, ...]) -> int:
    wanted = experiment.data.positive
    if not wanted or not classes:
        return 1
    if wanted not in classes:
        raise FedmetaError(f'[data] positive = "{wanted}": no such class; they are {", ".join(classes[:20])}')
    return classes.index(wanted)


def dtype_of(experiment: Experiment) -> torch.dtype:
    """Returns the type of parameters and data."""
    return torch.float64 if experiment.model.dtype == "float64" else torch.float32


def source_of(experiment: Experiment, **node: str) -> Population | TaskSource:
    """Returns who holds what: a population of rows, or a task source.

    Args:
        experiment: The run's description.
        **node: At a deployed node, the `path` of its data and its `site`.

    Raises:
        FedmetaError: The data cannot be read, or the function does not return either.
    """
    name = experiment.data.source
    if ":" in name:
        found = _call(load_code(name, "[data] source"), "[data] source", name, {**experiment.data.extra, **node})
        if not isinstance(found, TaskSource | Population):
            kind = type(found).__name__
            raise FedmetaError(f'[data] source = "{name}" returned {kind}, not a fedmeta.TaskSource or a population')
        # A task source's sites are left out where they are listed.
        return found if isinstance(found, TaskSource) else without_sites(found, experiment.data.without)
    if experiment.problem.name != SUPERVISED:
        factory = load_code(experiment.problem.name, "[problem] name")
        if isinstance(factory, type) and issubclass(factory, TaskSource):
            keys = {**experiment.problem.extra, **_asked(factory, dict(node))}
            source: TaskSource = _call(factory, "[problem] name", experiment.problem.name, keys)
            return source
    return load(experiment.data)


def load_code(path: str, key: str) -> Callable[..., Any]:
    """Returns what an import path names.

    Raises:
        FedmetaError: It cannot be imported, or is nothing that can be called.
    """
    found = load_object(path, key)
    if not callable(found):
        raise FedmetaError(f'{key} = "{path}" is neither a class nor a function')
    function: Callable[..., Any] = found
    return function


def _call(factory: Callable[..., Any], key: str, path: str, keys: dict[str, Any], *arguments: Any) -> Any:
    try:
        return factory(*arguments, **keys)
    except FedmetaError:
        raise
    except Exception as error:  # whatever a user's own code raises
        given = ", ".join(f"{name}={value!r}" for name, value in keys.items())[:200]
        raise FedmetaError(f'{key} = "{path}" failed when called with ({given}): {first_line(error)}') from error


def _asked(factory: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Returns those of the given arguments that a factory names."""
    try:
        names = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in given.items() if name in names}


def site_names(experiment: Experiment) -> tuple[str, ...]:
    """Returns the names of an experiment's sites, sorted."""
    source = source_of(experiment)
    names = sorted(map(str, source.sites() if isinstance(source, TaskSource) else source.names))
    without, _ = left_out(names, experiment.data.without)
    return tuple(name for name in names if name not in without)


def smoke_test(experiment: Experiment) -> Learner:
    """Reads an experiment's data and builds its learner on their form (`validated_learner`); returns the learner."""
    source = source_of(experiment)
    if isinstance(source, TaskSource):
        return validated_learner(experiment, (), ())
    return validated_learner(experiment, tuple(source.shape), source.class_names, source.targets, tokens=source.tokens)


def validated_learner(
    experiment: Experiment, shape: tuple[int, ...], classes: tuple[str, ...], targets: int = 1, *, tokens: bool = False
) -> Learner:
    """Builds the learner, and runs its model on two rows of zeros, to refuse what cannot work before a file exists.

    Args:
        experiment: The run's description.
        shape: The shape of one row.
        classes: The class list; empty for regression and for data that are no rows.
        targets: How many numbers a regression predicts for each row.
        tokens: Whether rows are codes of symbols.

    Raises:
        FedmetaError: The learner or the model cannot be built, or the model does not take such rows or returns
            something else than outputs for each.
    """
    if len(classes) == 1:
        raise FedmetaError(
            f'every label of every site is "{classes[0]}": with one class there is nothing to learn; check the label '
            "column, or data.label and data.binarise"
        )
    learner, name = learner_of(experiment, shape, classes, targets), experiment.model.name
    outputs = len(classes) or max(1, targets)
    if not isinstance(learner.problem, Supervised):
        if experiment.evaluation.gate:
            raise FedmetaError(
                "[evaluation] gate = true: steps are selected on folds of rows, and an own problem's data have none; "
                "set it to false"
            )
        learner.init(experiment.runtime.seed)
        return learner
    if learner.classes_only and not classes:
        raise FedmetaError(
            f'[learner] name = "{experiment.learner.name}" needs classes, and the labels here are numbers: take anil'
        )
    if name == "char_lstm" and not tokens:
        raise FedmetaError(
            '[model] name = "char_lstm" needs rows of symbol codes, as data.source = "shakespeare" has them'
        )
    parameters = learner.problem.init(0)
    rows = torch.zeros(2, *shape, dtype=torch.int64 if tokens else torch.float32)
    try:
        with torch.no_grad():
            found = learner.predict(parameters, rows)
    except FedmetaError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise FedmetaError(f'[model] name = "{name}" failed on rows of shape {shape}: {error}') from error
    if type(learner.problem) is not Supervised:
        return learner
    fits = (
        found.numel() == 2 * outputs and len(found) == 2
        if not classes
        else found.dim() == 2 and len(found) == 2 and found.shape[1] >= outputs
    )
    if not fits:
        raise FedmetaError(
            f'[model] name = "{name}" returned outputs of shape {tuple(found.shape)} for 2 rows: make it (2, {outputs})'
        )
    return learner
