"""The base class of all sections of a recipe, the types of their fields, and pydantic's errors in one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    FiniteFloat,
    Strict,
    StrictBool,
    StrictInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from qdora.errors import nearest
from qdora.files.atomic import masked
from qdora.files.run_directory import is_below

Whole = Annotated[StrictInt, Field(ge=1)]
WholeOrZero = Annotated[StrictInt, Field(ge=0)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
_Number = Annotated[FiniteFloat, Strict()]
Positive = Annotated[_Number, Field(gt=0)]
NotNegative = Annotated[_Number, Field(ge=0)]
OneOrMore = Annotated[_Number, Field(ge=1)]
Factor = Annotated[_Number, Field(gt=1)]
Share = Annotated[_Number, Field(ge=0, lt=1)]
Warmup = WholeOrZero | Share
AutoTokens = Literal["auto"] | Whole
Flag = StrictBool
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Targets = Literal["all-linear"] | Annotated[tuple[Text, ...], Field(min_length=1)]


def parse_size(text: str) -> int:
    """Bytes of a size such as '40GiB', '40 GB' or '512MiB'; ValueError if it is none."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ValueError(f"must be a size such as 40GiB or 500 MB, got {text!r}") from None


def size_text(num_bytes: int) -> str:
    """12.3 GiB, 45 MiB, 3 KiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"


def _size(value: str) -> str:
    parse_size(value)
    return value


Size = Literal["auto"] | Annotated[str, AfterValidator(_size)]

Fault = tuple[str, str]
"""(path of a key, what is wrong)."""


class Section(BaseModel):
    """A group of settings; null stands for the default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        other = {
            name for name, field in cls.model_fields.items() if type(None) not in get_args(field.annotation)
        }
        return {name: value for name, value in given.items() if value is not None or name not in other}


_Settings = TypeVar("_Settings", bound=Section)


def with_settings(settings: _Settings, **sections: Mapping[str, Any]) -> _Settings:
    """A copy with some fields of some sections changed and not checked: `with_settings(recipe, base={...})`."""
    changed = {name: getattr(settings, name).model_copy(update=fields) for name, fields in sections.items()}
    return settings.model_copy(update=changed)


def one_line(text: str) -> str:
    """Text of a library, without access tokens."""
    return masked(" ".join(text.split()))


def reason_of(error: Exception) -> str:
    """The message of somebody else's error in one line."""
    return one_line(f"{type(error).__name__}: {error}")[:300]


def shown(value: Any) -> str:
    """A given value as in a recipe, text in quotes: at most 60 characters, without access tokens."""
    try:
        given = value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value
        text = repr(given)
        if not isinstance(given, str):
            text = yaml.safe_dump(given, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
    except (yaml.YAMLError, ValueError, RecursionError):  # a Decimal, an integer of 5,000 digits
        text = f"a value of type {type(value).__name__}"
    text = masked(text)
    return text if len(text) <= 60 else f"{text[:60]}..."


def fault_lines(error: ValidationError, data: Any) -> list[Fault]:
    """(path, what is wrong) for every value in `data` that pydantic refused."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_path(detail, data), []).append(detail)
    # Of a union, only what is wrong inside the member that fits best
    inner = [path for path in found if not any(is_below(other, [path]) for other in found if other != path)]
    return [(path, _reason(path, found[path])) for path in inner]


def _path(detail: ErrorDetails, data: Any) -> str:
    """The place in the document, without the members of unions that were tried."""
    steps = ""
    for step in detail["loc"]:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            if detail["type"] != "missing" or step is not detail["loc"][-1]:
                continue
        steps += f"[{step}]" if isinstance(step, int) else f".{step}"
    return masked(steps.removeprefix("."))


def _reason(path: str, details: Sequence[ErrorDetails]) -> str:
    kind = details[0]["type"]
    if kind == "extra_forbidden":
        known = {name for section in Section.__subclasses__() for name in section.model_fields}
        return f"unknown key.{nearest(path.rpartition('.')[2], sorted(known))}"
    text = " or ".join(dict.fromkeys(one_line(each["msg"]).removeprefix("Value error, ") for each in details))
    return f"{text}." if kind == "missing" else f"{text}, got {shown(details[0]['input'])}."
