"""Data never chooses code: which import paths an experiment may name, by where the experiment comes from.

The experiment file that a person runs may name any code. One that comes out of a file that others made, such as a
checkpoint, a meta-model or a model's folder, may name built-in models, problems and learners, and beyond them only
code of packages that the person allows: by `--code`, by the environment variable FEDMETA_CODE where MLflow loads a
model, or by `code` in a deployed node's config. Every place that reads an experiment from data calls
`refuse_foreign_code` before anything is built from it.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Iterable, Iterator
from importlib import import_module
from typing import Any, get_args

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.experiment.validation import Code, on_one_line

VARIABLE = "FEDMETA_CODE"
"""Environment variable: the packages whose code a model that MLflow loads may name, with commas between."""

SHIPPED = (
    "fedmeta.problems.survival:Survival",
    "fedmeta.problems.counts:Counts",
    "fedmeta.problems.multilabel:MultiLabel",
)
"""Import paths of fedmeta's own problems: any file may name them, as it may name built-in models and learners, but not
the path of their tables (`without_own_files`)."""

BY_OPTION, BY_VARIABLE, BY_NODE_CONFIG = "--code {}", VARIABLE + "={}", 'code="{}" in the node config'
"""How a person allows a module, as messages put it."""

_FOREIGN = "code that is not part of fedmeta", "If you know and trust that code, allow it"
_OWN = (
    "code of fedmeta by its import path, which data may not choose",
    "What it is called with may name a file of this machine; where that is meant, allow it",
)
"""What a refused import path names, and what a person may do."""

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*)?")


def allow_code(names: Iterable[str] = (), *, origin: str = "--code") -> frozenset[str]:
    """Returns the packages, modules or import paths that a person allows.

    Args:
        names: Texts with one name each, or several with commas between: `package`, `package.module` or
            `package.module:name`. A package allows all modules in it.
        origin: Where they were given, for messages.

    Raises:
        FedmetaError: A text is no such name.
    """
    allowed = {name.strip() for text in names for name in text.split(",") if name.strip()}
    for name in sorted(allowed):
        if not _NAME.fullmatch(name):
            raise FedmetaError(
                f"{origin} {on_one_line(name)}: must be the name of a package or module, such as my.nets"
            )
    return frozenset(allowed)


def code_allowed_here() -> frozenset[str]:
    """Returns what the environment variable FEDMETA_CODE allows.

    Raises:
        FedmetaError: It holds something else than names of packages.
    """
    return allow_code([os.environ.get(VARIABLE, "")], origin=VARIABLE)


def code_of(experiment: Experiment) -> dict[str, str]:
    """Returns the import paths that an experiment names, each with where it does, such as `[model] name`."""
    return {path: where for where, path in _named(experiment) if ":" in path}


def refuse_foreign_code(
    experiment: Experiment, origin: str, allowed: Collection[str] = (), *, remedy: str = BY_OPTION
) -> None:
    """Checks that an experiment which was read from data names no code but what a person allows.

    Args:
        experiment: The experiment; nothing that it names has been imported yet.
        origin: What it was read from, for the message.
        allowed: What is allowed, as `allow_code` returns it.
        remedy: How a person allows a module, for the message.

    Raises:
        FedmetaError: It names other code; or, under an allowed module's name, code that another module defines.
    """
    for path, where in code_of(experiment).items():
        module = path.partition(":")[0]
        if path in allowed or (path in SHIPPED and where == "[problem] name"):
            continue
        if not _inside(module, allowed):
            what, advice = _OWN if _inside(module, ("fedmeta",)) else _FOREIGN
            raise FedmetaError(
                f'{origin}: asks for {what}, {where} = "{path}"; it was not imported. {advice}: {remedy.format(module)}'
            )
        home = _home(path)
        if not _inside(home, allowed):
            raise FedmetaError(
                f'{origin}: asks for {where} = "{path}", which is code of {home}; it was not called. '
                f"If that is meant, allow it: {remedy.format(path)}"
            )


def without_own_files(experiment: Experiment) -> Experiment:
    """Returns an experiment that was read from data, which may choose no file of this machine.

    Left out are the file or run that a first meta-state came from, and of a shipped problem the path of its tables.
    """
    found = experiment.without_weights()
    return found.without_problem_path() if found.problem.name in SHIPPED else found


def _inside(module: str, allowed: Collection[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def _home(path: str) -> str:
    """Returns the module that defines the class or function that an allowed import path names.

    A module holds more than its own code: `my.nets:call` may be what it imported from subprocess. The path's own module
    is returned for other objects, and where nothing can be imported, which the code that builds from it reports.
    """
    module, _, name = path.partition(":")
    try:
        found: Any = getattr(import_module(module), name)
    except Exception:  # importing runs a user's own code
        return module
    defined = isinstance(found, type) or inspect.isroutine(found)
    return str(found.__module__ or module) if defined else module


def _named(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yields every text of a key that may hold an import path, and where it stands."""
    for section in type(experiment).model_fields:
        values = getattr(experiment, section)
        for key, field in type(values).model_fields.items():
            if any(_takes_code(part) for part in (field.annotation, *field.metadata)):
                value = getattr(values, key)
                for text in value if isinstance(value, tuple) else (value,):
                    if isinstance(text, str):  # a key may take a number or code
                        yield f"[{section}] {key}", text


def _takes_code(part: Any) -> bool:
    return isinstance(part, Code) or any(map(_takes_code, get_args(part)))
