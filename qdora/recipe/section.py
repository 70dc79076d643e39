"""The base class of all sections of a recipe, and the types of their fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, model_validator

from qdora.recipe.byte_size import parse_size

Whole = Annotated[int, Strict(), Field(ge=1)]
WholeOrZero = Annotated[int, Strict(), Field(ge=0)]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
Positive = Annotated[float, Strict(), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Strict(), Field(ge=0, allow_inf_nan=False)]
OneOrMore = Annotated[float, Strict(), Field(ge=1, allow_inf_nan=False)]
Factor = Annotated[float, Strict(), Field(gt=1, allow_inf_nan=False)]
Share = Annotated[float, Strict(), Field(ge=0, lt=1, allow_inf_nan=False)]
Warmup = WholeOrZero | Share
AutoTokens = Literal["auto"] | Whole
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Targets = Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)]


def _size(value: str) -> str:
    try:
        parse_size(value)
    except ValueError:
        raise ValueError("Input should be a size such as 40GiB or 500 MB") from None
    return value


Size = Literal["auto"] | Annotated[str, AfterValidator(_size)]

Fault = tuple[str, str]
"""(path of a key inside its section, what is wrong with it)."""


class Section(BaseModel):
    """A group of settings: frozen, without unknown keys; null stands for the default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        """Without the keys that are null, except where null is a value, as in train.clip."""
        if not isinstance(given, dict):
            return given
        other = {name for name, field in cls.model_fields.items() if type(None) not in get_args(field.annotation)}
        return {name: value for name, value in given.items() if value is not None or name not in other}


_Settings = TypeVar("_Settings", bound=Section)


def with_settings(settings: _Settings, **sections: Mapping[str, Any]) -> _Settings:
    """A copy with some fields of some sections changed: `with_settings(recipe, base={"quant": "none"})`.

    Nothing is checked, unlike with `override`.
    """
    changed = {name: getattr(settings, name).model_copy(update=fields) for name, fields in sections.items()}
    return settings.model_copy(update=changed)
