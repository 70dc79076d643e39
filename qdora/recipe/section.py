"""The base class of all sections of a recipe, and their field types, each with a text that says what it allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator, WrapValidator
from pydantic_core import PydanticCustomError

from qdora.errors import nearest
from qdora.recipe.byte_size import parse_size


def allowed(text: str, *names: str) -> WrapValidator:
    """Replace every fault inside this type by one that says what is allowed and names the nearest of `names`."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            close = nearest(value, names) if isinstance(value, str) else ""
            raise PydanticCustomError("allowed", "allowed: {allowed}", {"allowed": text, "nearest": close}) from None

    return WrapValidator(check)


def _as_number(value: Any) -> Any:
    """Read text such as 1e-4 as a number: to PyYAML it is text, since YAML 1.1 wants 1.0e-4. A bool is not a number."""
    if isinstance(value, bool):
        raise PydanticCustomError("number", "not a number")
    return float(value) if isinstance(value, str) else value  # pydantic makes a fault of float's ValueError


_NUMBER = BeforeValidator(_as_number)

Whole = Annotated[int, Strict(), Field(ge=1), allowed("a whole number, 1 or more")]
WholeOrZero = Annotated[int, Strict(), Field(ge=0), allowed("a whole number, 0 or more")]
Seed = Annotated[int, Strict(), Field(ge=0, lt=2**63), allowed("a whole number from 0 to 2^63 - 1")]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), _NUMBER, allowed("a finite number above 0")]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False), _NUMBER, allowed("a finite number, 0 or more")]
OneOrMore = Annotated[float, Field(ge=1, allow_inf_nan=False), _NUMBER, allowed("a finite number, 1 or more")]
Factor = Annotated[float, Field(gt=1, allow_inf_nan=False), _NUMBER, allowed("a finite number above 1")]
Share = Annotated[float, Field(ge=0, lt=1), _NUMBER, allowed("a number, at least 0 and below 1")]
Beta = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Warmup = Annotated[
    Annotated[int, Strict(), Field(ge=0)] | Annotated[float, Strict(), Field(ge=0, lt=1)],
    _NUMBER,
    allowed("a whole number of steps, or a share of the run below 1"),
]
AutoTokens = Annotated[
    Literal["auto"] | Annotated[int, Strict(), Field(ge=1)], allowed("auto, or a whole number of tokens", "auto")
]


def _size(value: str) -> str:
    parse_size(value)
    return value


Size = Annotated[
    Literal["auto"] | Annotated[str, AfterValidator(_size)], allowed("auto, or a size such as 40GiB or 500 MB", "auto")
]
Flag = Annotated[bool, Strict(), allowed("true or false")]
Text = Annotated[
    str,
    Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$"),
    allowed("text of one line (in quotes where YAML reads it otherwise)"),
]
Targets = Annotated[
    Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)],
    allowed("all-linear, or a list of layer names such as [q_proj, v_proj]", "all-linear"),
]

_MAX_DEPTH = 6  # a list in YAML or JSON may hold itself, or thousands of others
_PLAIN = re.compile(r"(?!(?:true|false|null|yes|no|on|off|y|n)$)[a-z_/][\w./-]*", re.IGNORECASE)

Fault = tuple[str, str]
"""(path of a key inside its section, or '' for the section itself; what is wrong with it)."""


class Section(BaseModel):
    """A group of settings: frozen, without unknown keys and without settings that would be ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def unused(self) -> dict[str, str]:
        """Field that has no effect under the other settings of this section -> the reason, as in 'because <reason>'."""
        return {}

    def faults(self) -> Iterator[Fault]:
        """Contradictions between the fields of this section."""
        return iter(())

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = [*self.faults(), *ignored_faults(self, self.unused())]
        if found:
            text = "\n".join(f"{key}: {what}" if key else what for key, what in found)
            raise PydanticCustomError("faults", "{text}", {"text": text, "faults": found})
        return self


_Settings = TypeVar("_Settings", bound=Section)


def with_settings(settings: _Settings, **sections: Mapping[str, Any]) -> _Settings:
    """A copy with some fields of some sections changed: `with_settings(recipe, base={"quant": "none"})`.

    Nothing is checked, unlike with `override`.
    """
    changed = {name: getattr(settings, name).model_copy(update=fields) for name, fields in sections.items()}
    return settings.model_copy(update=changed)


def in_yaml(value: Any, depth: int = 0) -> str:
    """A value on one line as a recipe has it: null, true, [a, b], {key: value}; text that stands alone is in quotes.

    Of a section only what was set is written.
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Section):
        value = {name: getattr(value, name) for name in type(value).model_fields if name in value.model_fields_set}
    if isinstance(value, str) and depth:
        return value if _PLAIN.fullmatch(value) else repr(value)
    if isinstance(value, list | tuple | Mapping) and depth == _MAX_DEPTH:
        return "..."
    if isinstance(value, Mapping):
        pairs = (f"{in_yaml(key, depth + 1)}: {in_yaml(each, depth + 1)}" for key, each in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(in_yaml(each, depth + 1) for each in value)}]"
    return value.isoformat() if isinstance(value, date) else repr(value)


def one_of_fault(section: Section, first: str, second: str) -> Iterator[Fault]:
    """A fault unless exactly one of two fields is set."""
    given = [name for name in (first, second) if getattr(section, name) is not None]
    if len(given) != 1:
        got = "both" if given else "neither"
        yield first, f"exactly one of {first} and {second} must be set, got {got}."


def ignored_faults(section: Section, unused: dict[str, str], prefix: str = "") -> Iterator[Fault]:
    """A fault for every field in `unused` that is set; null counts as not set."""
    for name, reason in unused.items():
        value = getattr(section, name)
        if name in section.model_fields_set and value is not None:
            fix = "Fix: remove it (in an override: set it to null)."
            what = f"would be ignored because {reason}, got {in_yaml(value)}. {fix}"
            yield f"{prefix}{name}", what
