"""What every section is made of: its base class, and the types that keys share."""

import re
from typing import Annotated, ClassVar, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from fedmeta.experiment.refusals import refuse, refuse_unknown
from fedmeta.experiment.values import Form, Scalar


class Code:
    """Marks a key whose value may name code by its import path: `fedmeta.trust` decides whether it is imported."""


_DOTTED = r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$"
FunctionPath = Annotated[str, Field(pattern=_DOTTED), Form('"package.module:function"'), Code()]
ClassPath = Annotated[str, Field(pattern=_DOTTED), Form('"package.module:Class"'), Code()]


def _widths(value: object) -> object:
    """Returns one width or a list of widths as the comma-separated text that it is stored as."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return ",".join(str(width) for width in value)
    return re.sub(r"[\[\]\s]", "", value) if isinstance(value, str) else value


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError("even")
    return number


Widths = Annotated[
    str,
    Field(pattern=r"^[1-9][0-9]{0,8}(,[1-9][0-9]{0,8})*$"),
    BeforeValidator(_widths),
    Form('whole numbers of at least 1 with commas between, such as "64,64"'),
]
Odd = Annotated[int, Field(ge=1), AfterValidator(_odd), Form("an odd whole number of at least 1")]
Texts = Annotated[tuple[str, ...], Strict(False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """One section: immutable, no ignore_progress conversion between types, no unknown keys, no infinities."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers_fit_64_bits(cls, values: object) -> object:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise refuse(key, "must be a number that fits 64 bits")
        return values


class OpenSection(Section):
    """A section that passes further scalar keys on to code named by its import path, and otherwise refuses them."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, Scalar] = Field(init=False)

    path_key: ClassVar[str] = "name"
    """The key that may hold an import path."""

    @property
    def extra(self) -> dict[str, Scalar]:
        """The further keys: arguments for the user's own function or class; empty for built-in names."""
        return dict(self.__pydantic_extra__)

    @model_validator(mode="after")
    def _extra_only_by_import_path(self) -> Self:
        for key in self.__pydantic_extra__:
            if ":" not in getattr(self, self.path_key) or not key.isidentifier():
                raise refuse_unknown(key)
        return self
