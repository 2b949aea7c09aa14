"""Turns pydantic's list of errors into one line for the person who wrote the file."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment.values import choices, on_one_line, to_text, wanted

Sections = Mapping[str, type[BaseModel]]
Origins = Mapping[tuple[str, str], str]
"""Where a key was set, if not in the file itself: (section, key) -> `--set section.key=value`."""


def refuse(key: str, cure: str) -> PydanticCustomError:
    """Returns the error of a section's own check on one of its keys; `cure` says what the value must be."""
    return PydanticCustomError("refused", "{key} {cure}", {"key": key, "cure": cure})


def refuse_unknown(key: str) -> PydanticCustomError:
    """Returns the error of a section's own check that does not know a key."""
    return PydanticCustomError("extra_forbidden", "unknown key {key}", {"key": key})


def refusal(
    error: ValidationError, table: Mapping[str, Any], sections: Sections, origin: str, origins: Origins
) -> FedmetaError:
    """Returns the first of pydantic's errors on `table` as one line that names file, key, value and cure."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    section = str(first["loc"][0])
    if section not in sections:
        return FedmetaError(f"{origin}: {_unknown_section(section, table[section], sections)}")
    key = str(first["loc"][1]) if len(first["loc"]) > 1 else str(context.get("key", ""))
    if not key:
        return FedmetaError(f"{origin}: {section} = {_shown(table[section])}: must be a section, written [{section}]")
    place = origins.get((section, key), origin)
    if first["type"] == "extra_forbidden" or key not in sections[section].model_fields:
        return FedmetaError(f"{place}: {_unknown_key(section, key, table[section], sections, first)}")
    field = sections[section].model_fields[key]
    value = table[section].get(key, field.default)
    cure = context.get("cure") or f"must be {wanted(field.annotation, field.metadata)}"
    known = choices(field.annotation)
    guess = nearest(value, known) if isinstance(value, str) and value not in known else ""
    return FedmetaError(f"{place}: [{section}] {key} = {_shown(value)}: {cure}{guess}")


def _unknown_section(name: str, value: object, sections: Sections) -> str:
    if isinstance(value, Mapping):
        cure = nearest(name, sections) or f"; the sections are {', '.join(sections)}"
        return f"unknown section [{on_one_line(name)}]{cure}"
    return f"unknown key {on_one_line(name)} = {_shown(value)} outside of any section{_elsewhere(name, sections)}"


def _unknown_key(section: str, key: str, values: Mapping[str, Any], sections: Sections, error: ErrorDetails) -> str:
    known = sections[section].model_fields
    start = f"[{section}] {on_one_line(key)} = {_shown(values[key])}"
    if error["type"] != "extra_forbidden":
        return f"{start}: {error.get('ctx', {}).get('cure', 'must be true or false, a number or a text')}"
    listing = f"; its keys are {', '.join(known)}"
    return f"unknown key {start}{_elsewhere(key, sections) or nearest(key, known) or listing}"


def _elsewhere(key: str, sections: Sections) -> str:
    """Returns the section that does have this key, as a question."""
    found = [name for name, section in sections.items() if key in section.model_fields]
    return f"; did you mean [{found[0]}] {key}?" if found else ""


def _shown(value: object) -> str:
    try:
        text = to_text(value)
    except (ValueError, RecursionError):
        return "a value too large to show"
    return text if len(text) <= 80 else f"{text[:76]} ..."
