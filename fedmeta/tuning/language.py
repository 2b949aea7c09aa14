"""How a search's space is written on the command line: KEY=LOW:HIGH, KEY=LOW:HIGH:log, or KEY=VALUE,VALUE,...

- `learner.inner_lr=0.01:1:log`: numbers in a range, by factors
- `learner.inner_steps=1:10`: whole numbers, since the key takes no others
- `learner.name=maml,anil`: one of some values
- `model.hidden=32,[64,64]`: brackets hold a value together that has commas of its own
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, get_args, get_origin

from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Experiment, Scalar
from fedmeta.experiment.files import SECTIONS
from fedmeta.tuning.space import Choices, Dimension, Range

FIXED = (
    "data.source", "data.path", "data.new_sites", "data.test", "data.split", "data.support", "evaluation.judge",
    "evaluation.validation_sites", "evaluation.tasks", "runtime.seed",
)  # fmt: skip
"""Keys that say who is judged and on what: to vary them would be to choose the exam, not the student."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"\s*({_NUMBER})\s*:\s*({_NUMBER})\s*(?::\s*(\w*)\s*)?")
_COMMAS = re.compile(r",(?![^\[]*\])")


def space_of(texts: Sequence[str], experiment: Experiment) -> list[Dimension]:
    """Returns the space that some texts describe.

    Args:
        texts: As in the module's description, one for each key.
        experiment: What is searched for; every end and every value must be possible in it.

    Raises:
        FedmetaError: A text is not written so, names a key twice or one that must not vary, or a value is impossible.
    """
    space = [_dimension(text, experiment) for text in texts]
    for place, each in enumerate(space):
        if each.key in [earlier.key for earlier in space[:place]]:
            raise FedmetaError(f"--over {each.key}: given twice")
    return space


def _dimension(text: str, experiment: Experiment) -> Dimension:
    key, equals, values = (part.strip() for part in text.partition("="))
    if not (equals and values and "." in key):
        raise FedmetaError(f"--over {text}: must be written KEY=LOW:HIGH[:log] or KEY=VALUE,VALUE,...")
    if key in FIXED or key.startswith("tracking."):
        raise FedmetaError(f"--over {key}: must stay as it is, for it changes what is judged and not how well")
    found = _RANGE.fullmatch(values)
    if found:
        numbers = _range(text, key, found)
        for end in (numbers.low, numbers.high):
            _checked(text, key, end, experiment)
        return numbers
    return Choices(key, tuple(_checked(text, key, value, experiment) for value in _listed(text, key, values)))


def _checked(text: str, key: str, value: Scalar, experiment: Experiment) -> Scalar:
    """Returns a value as the experiment holds it, which it must be able to."""
    try:
        return experiment.with_overrides([f"{key}={value}"]).params()[key]
    except FedmetaError as error:
        reason = str(error).removeprefix(f"--set {key}={value}: ")
        raise FedmetaError(f"--over {text}: {reason}") from None


def _range(text: str, key: str, found: re.Match[str]) -> Range:
    low, high, form = found.groups()
    if form not in (None, "log"):
        raise FedmetaError(f'--over {text}: "{form}" is not known; a range may end with :log')
    if float(low) >= float(high):
        raise FedmetaError(f"--over {text}: {low} must be below {high}")
    if form and float(low) <= 0:
        raise FedmetaError(f"--over {text}: a range by factors (:log) must begin above 0")
    kinds = _kinds(_annotation(key)) or {int, float}
    written_whole = all(re.fullmatch(r"[-+]?\d+", end) for end in (low, high))
    if int in kinds and float not in kinds and not written_whole:
        raise FedmetaError(f"--over {text}: {key} takes whole numbers")
    if int in kinds and written_whole:
        return Range(key, int(low), int(high), log=bool(form), whole=True)
    return Range(key, float(low), float(high), log=bool(form))


def _listed(text: str, key: str, values: str) -> list[str]:
    listed = [value.strip() for value in _COMMAS.split(values)]
    if "" in listed or len(set(listed)) != len(listed):
        raise FedmetaError(f"--over {text}: a value is missing or given twice")
    if len(listed) < 2:
        raise FedmetaError(f"--over {text}: one value leaves nothing to search; give it with --set {key}={values}")
    return listed


def _kinds(annotation: Any) -> set[Any]:
    """Returns the types that a key's values may have; none where the key is the user's own."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    inner = get_args(annotation)
    return {kind for each in inner for kind in _kinds(each)} if inner else {annotation} - {None}


def _annotation(key: str) -> Any:
    section, _, name = key.partition(".")
    if section not in SECTIONS:
        raise FedmetaError(f"--over {key}: unknown section {section}{nearest(section, SECTIONS)}")
    field = SECTIONS[section].model_fields.get(name)
    return field.annotation if field else None
