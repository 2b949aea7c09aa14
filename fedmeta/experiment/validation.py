"""What sections are made of, how values are written as text, and how what is wrong with a file is reported.

A section is a pydantic model; what pydantic finds wrong becomes one line that names the file, each key, what was given,
what it must be, and the nearest valid name.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import isfinite
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from fedmeta.errors import FedmetaError, meant, nearest

Scalar = bool | int | float | str

# ---------------------------------------------------------------- values as text


def to_text(value: object) -> str:
    """Returns a scalar or a list of scalars as TOML on one line; anything else (in messages) as JSON reads it."""
    if isinstance(value, float):
        return repr(value)
    # A JSON string is a TOML basic string but for DEL, which TOML wants escaped; other characters that
    # some readers take for the end of a line, such as U+2028, are escaped too.
    written = json.dumps(value, ensure_ascii=False, default=str)
    return "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in written)


def on_one_line(name: str) -> str:
    """Returns a name as it is, quoted where it holds what would break a line, and cut where it is long."""
    name = name if len(name) <= 80 else f"{name[:76]} ..."
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
    return text if _is_text(annotation) and not isinstance(value, str | list) else value


def _is_text(annotation: Any) -> bool:
    """Returns whether a key takes a text, or one or several, so that a number is the text of its digits."""
    kinds = {_bare(each) for each in get_args(annotation)} if get_origin(annotation) in (Union, UnionType) else set()
    return annotation is str or kinds == {str, tuple}


def _bare(annotation: Any) -> Any:
    """Returns a type without its marks and arguments."""
    origin = get_origin(annotation)
    return _bare(get_args(annotation)[0]) if origin is Annotated else origin or annotation


# ---------------------------------------------------------------- types of keys


@dataclass(frozen=True)
class TextFormat:
    """Describes what a text must look like where its type and range do not (a marker for `Annotated`)."""

    text: str


class Code:
    """Marks a key whose value may name code by its import path: `fedmeta.trust` decides whether it is imported."""


def _widths(value: object) -> object:
    """Returns one width or a list of widths as the comma-separated text that it is stored as."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return ",".join(str(width) for width in value)
    return re.sub(r"[\[\]\s]", "", value) if isinstance(value, str) else value


def _target(value: object) -> object:
    """Returns a target as the text that it is stored as, such as "score = 0.9", from a table or a text of one."""
    if isinstance(value, str):
        text = value.strip().removeprefix("{").removesuffix("}").strip()
        try:
            value = tomllib.loads(text)
        except (ValueError, RecursionError):
            return "not a target"
        if not value:
            return ""
    if not isinstance(value, Mapping) or set(value) != {"score"}:
        return "not a target"
    score = value["score"]
    finite = isinstance(score, int | float) and not isinstance(score, bool) and isfinite(score)
    return f"score = {to_text(float(score))}" if finite else "not a target"


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError("even")
    return number


def _fits_64_bits(value: object) -> object:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise PydanticCustomError("hint", "{hint}", {"hint": "must be a number that fits 64 bits"})
    return value


_DOTTED = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$"
FunctionPath = Annotated[str, Field(pattern=_DOTTED), TextFormat('"package.module:function"'), Code()]
ClassPath = Annotated[str, Field(pattern=_DOTTED), TextFormat('"package.module:Class"'), Code()]
Widths = Annotated[
    str,
    Field(pattern=r"^[1-9][0-9]{0,8}(,[1-9][0-9]{0,8}){0,255}$"),
    BeforeValidator(_widths),
    TextFormat('whole numbers of at least 1 with commas between, at most 256, such as "64,64"'),
]
Target = Annotated[
    str,
    Field(pattern=r"^(score = \S+)?$"),
    BeforeValidator(_target),
    TextFormat("a table with the key score, such as {score = 0.9}"),
]
Odd = Annotated[int, Field(ge=1), AfterValidator(_odd), TextFormat("an odd whole number of at least 1")]
Name = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[str, ...], Strict(False)]
Further = Annotated[Scalar, BeforeValidator(_fits_64_bits)]
"""The value of a key that is an argument of one's own class or function."""
FurtherList = Annotated[tuple[Further, ...], Strict(False)]

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

Conflicts = Iterator[tuple[str, str]]
"""Keys of a section that do not go together: a key, and what it must be; "" for a key that there is not."""


class Section(BaseModel):
    """One section: immutable, no conversion between types, no unknown keys, no infinities."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    def conflicts(self) -> Conflicts:
        """Yields what is wrong with keys that are each valid alone."""
        return iter(())

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_fit_64_bits(cls, value: object) -> object:
        return _fits_64_bits(value)

    @model_validator(mode="after")
    def _no_conflicts(self) -> Self:
        if found := list(self.conflicts()):
            raise PydanticCustomError("conflicts", "conflicting keys", {"conflicts": found})
        return self


class OpenSection(Section):
    """A section that passes further scalar keys on to code named by its import path, and otherwise refuses them."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Further | FurtherList] = Field(init=False)

    path_key: ClassVar[str] = "name"
    """The key that may hold an import path."""

    takes_lists: ClassVar[bool] = False
    """Whether further keys may be lists."""

    @property
    def extra(self) -> dict[str, Any]:
        """The further keys: arguments for the user's own function or class; empty for built-in names."""
        return dict(self.__pydantic_extra__)

    def conflicts(self) -> Conflicts:
        """Yields further keys that no code of the user's takes."""
        own = ":" in getattr(self, self.path_key)
        yield from ((key, "") for key in self.__pydantic_extra__ if not (own and key.isidentifier()))
        for key, value in self.__pydantic_extra__.items():
            if isinstance(value, tuple) and not self.takes_lists:
                yield key, "must be true or false, a number or a text"


# ---------------------------------------------------------------- types as text

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "none"}


def describe_type(annotation: Any, metadata: Iterable[object] = ()) -> str:
    """Returns what a value must be, for people: `a whole number of at least 1`."""
    marks = [mark for each in metadata for mark in (each.metadata if isinstance(each, FieldInfo) else [each])]
    for mark in marks:
        if isinstance(mark, TextFormat):
            return mark.text
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return describe_type(arguments[0], [*arguments[1:], *marks])
    if origin in (Union, UnionType):
        return ", or ".join(describe_type(each) for each in arguments)
    if origin is Literal:
        choices = [f'"{choice}"' for choice in arguments]
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    if origin is tuple:
        return 'a list of texts, such as ["a", "b"]'
    bounds = [text for mark in marks if (text := _bound(mark))]
    return f"{_KINDS[annotation]} {' and '.join(bounds)}" if bounds else _KINDS[annotation]


def _choices(annotation: Any) -> tuple[str, ...]:
    """Returns the names that a key accepts, through unions; empty where it takes no names."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(name for each in get_args(annotation) for name in _choices(each))


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


# ---------------------------------------------------------------- errors

Sections = Mapping[str, type[BaseModel]]
Origins = Mapping[tuple[str, str], str]
"""Where a key was set, if not in the file itself: (section, key) -> `--set section.key=value`."""

MOST = 10
"""How many problems of a file are listed."""

MOST_KEYS = 24
"""How many keys of a section are listed where none resembles an unknown one."""


def report(
    error: ValidationError, table: Mapping[str, Any], sections: Sections, origin: str, origins: Origins
) -> FedmetaError:
    """Returns pydantic's errors on `table` as one line that names the file and, for each key, what it must be."""
    problems: dict[tuple[str, str], str] = {}
    for section, key, hint in _located(error):
        # A key that takes this or that has an error for each.
        if (section, key) not in problems and len(problems) <= MOST:
            problems[section, key] = _problem(section, key, hint, table, sections)
    places = [origins.get(place, origin) for place in problems]
    if len(problems) == 1:
        return FedmetaError(f"{places[0]}: {next(iter(problems.values()))}")
    lines = (
        text if place == origin else f"{place}: {text}" for place, text in zip(places, problems.values(), strict=True)
    )
    listed = " ".join(f"({number}) {text}" for number, text in enumerate(islice(lines, MOST), 1))
    more = len(problems) > MOST
    count = f"more than {MOST}" if more else str(len(problems))
    return FedmetaError(f"{origin}: {count} problems: {listed}{' ...' if more else ''}")


def _located(error: ValidationError) -> Iterator[tuple[str, str, str | None]]:
    """Yields each error's section, key ("" for the section itself) and hint: "" for an unknown key, None for a type."""
    each: ErrorDetails
    for each in error.errors(include_url=False, include_input=False):
        section, *rest = map(str, each["loc"])
        context = each.get("ctx", {})
        if each["type"] == "conflicts":
            yield from ((section, key, hint) for key, hint in context["conflicts"])
        else:
            hint = "" if each["type"] == "extra_forbidden" else context.get("hint")
            yield section, rest[0] if rest else "", hint


def _problem(section: str, key: str, hint: str | None, table: Mapping[str, Any], sections: Sections) -> str:
    if section not in sections:
        return _unknown_section(section, table[section], sections)
    if not key:
        return f"{section} = {_shown(table[section])}: must be a section, written [{section}]"
    field = sections[section].model_fields.get(key)
    if field is None:
        start = f"[{section}] {on_one_line(key)} = {_shown(table[section][key])}"
        unknown = _unknown_key(section, key, start, sections)
        return unknown if hint == "" else f"{start}: {hint or 'must be true or false, a number or a text'}"
    value = table.get(section, {}).get(key, field.default)
    known = _choices(field.annotation)
    guess = nearest(value, known) if isinstance(value, str) and value not in known else ""
    hint = hint or f"must be {describe_type(field.annotation, field.metadata)}"
    return f"[{section}] {key} = {_shown(value)}: {hint}{guess}"


def _unknown_section(name: str, value: object, sections: Sections) -> str:
    if isinstance(value, Mapping):
        hint = nearest(name, sections) or f"; the sections are {', '.join(sections)}"
        return f"unknown section [{on_one_line(name)}]{hint}"
    return f"unknown key {on_one_line(name)} = {_shown(value)} outside of any section{_elsewhere(name, sections)}"


def _unknown_key(section: str, key: str, start: str, sections: Sections) -> str:
    known = sections[section].model_fields
    listed = ", ".join([*known][:MOST_KEYS]) + (", ... (docs/experiment.md has all)" if len(known) > MOST_KEYS else "")
    hint = _elsewhere(key, sections) or nearest(key, known) or f"; its keys are {listed}"
    return f"unknown key {start}{hint}"


def _elsewhere(key: str, sections: Sections) -> str:
    """Returns the section that does have this key, as a question."""
    found = [name for name, section in sections.items() if key in section.model_fields]
    return meant(f"[{found[0]}] {key}") if found else ""


def _shown(value: object) -> str:
    try:
        text = to_text(value)
    except (ValueError, RecursionError):
        return "a value too large to show"
    return text if len(text) <= 80 else f"{text[:76]} ..."
