"""Values of keys as text: how they are written, read, and described to people."""

import json
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

Scalar = bool | int | float | str

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "none"}


@dataclass(frozen=True)
class Form:
    """Says what a text must look like, where its type and range do not say it (a marker for `Annotated`)."""

    text: str


def to_text(value: object) -> str:
    """Returns a scalar or a list of scalars as TOML; anything else (in messages) as JSON reads it."""
    if isinstance(value, float):
        return repr(value)
    # A JSON string is a TOML basic string but for DEL, which TOML wants escaped; other characters that
    # some readers take for the end of a line, such as U+2028, are escaped too.
    written = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in written)


def on_one_line(name: str) -> str:
    """Returns a name as it is, or quoted where it holds what would break a line."""
    return name if name.isprintable() else to_text(name)


def to_param(value: object, annotation: Any = Scalar) -> Scalar:
    """Returns a key's value as a flat scalar from which `from_text` recovers it."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value if from_text(value, annotation) == value else to_text(value)
    return value if isinstance(value, bool | int | float) else to_text(value)


def from_text(text: str, annotation: Any = Scalar) -> object:
    """Returns what `text` means for a key of this type: a TOML value where it is one, else the text itself."""
    if text.lower() in ("none", "true", "false") and annotation is not str:
        plain = {"none": None, "true": True, "false": False}[text.lower()]
        return plain if plain is not None or NoneType in get_args(annotation) else text
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    value = table["value"]
    if len(table) > 1 or not isinstance(value, str | int | float | list):
        return text
    return text if annotation is str and not isinstance(value, str) else value


def wanted(annotation: Any, metadata: Iterable[object] = ()) -> str:
    """Returns what a value must be, in words: `a whole number of at least 1`."""
    marks = list(_flat(metadata))
    for mark in marks:
        if isinstance(mark, Form):
            return mark.text
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return wanted(arguments[0], [*arguments[1:], *marks])
    if origin in (Union, UnionType):
        return ", or ".join(wanted(each) for each in arguments)
    if origin is Literal:
        choices = [f'"{choice}"' for choice in arguments]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if origin is tuple:
        return 'a list of texts, such as ["a", "b"]'
    bounds = [words for mark in marks if (words := _bound(mark))]
    return f"{_KINDS[annotation]} {' and '.join(bounds)}" if bounds else _KINDS[annotation]


def choices(annotation: Any) -> tuple[str, ...]:
    """Returns the names that a key accepts, through unions; empty where it takes no names."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(name for each in get_args(annotation) for name in choices(each))


def _flat(metadata: Iterable[object]) -> Iterator[object]:
    for mark in metadata:
        if isinstance(mark, FieldInfo):
            yield from mark.metadata
        else:
            yield mark


def _bound(mark: object) -> str:
    match mark:
        case Gt(gt=limit):
            return f"greater than {limit}"
        case Ge(ge=limit):
            return f"of at least {limit}"
        case Lt(lt=limit):
            return f"less than {limit}"
        case Le(le=limit):
            return f"at most {limit}"
        case MinLen():
            return "that is not empty"
        case _:
            return ""
