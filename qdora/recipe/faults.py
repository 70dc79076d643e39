"""The errors of pydantic in one line each: `path.to.key: what is wrong, got ... Did you mean ...?`"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qdora.errors import nearest
from qdora.files.atomic import masked
from qdora.files.run_directory import is_below

_MAX_SHOWN = 60  # characters of a given value that a fault repeats


def dotted(steps: Sequence[int | str]) -> str:
    """('data', 'mix', 0, 'limit') -> 'data.mix[0].limit', without access tokens."""
    return masked("".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix("."))


def one_line(text: str) -> str:
    """Text from a library in a fault: on one line, without access tokens."""
    return masked(" ".join(text.split()))


def reason_of(error: Exception) -> str:
    """The message of somebody else's error in one line."""
    return one_line(f"{type(error).__name__}: {error}")[:300]


def in_yaml(value: Any) -> str:
    """A value as in a recipe, in flow style; text is in quotes. Of a section only what was set is written."""
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    try:
        text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    except yaml.YAMLError:  # such as a decimal number of a Parquet file
        return repr(value)
    return text.removesuffix("\n...\n").strip()


def shown(value: Any) -> str:
    """A given value in a fault: short, without access tokens."""
    try:
        text = masked(in_yaml(value))
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def fault_lines(error: ValidationError, data: Any, root: type[BaseModel]) -> list[tuple[str, str]]:
    """(path, what is wrong) for every value in `data`, a document of type `root`, that pydantic refused."""
    found: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        found.setdefault(_path(detail, data), []).append(detail)
    # Of a union, only what is wrong inside the member that fits best
    inner = [path for path in found if not any(is_below(other, [path]) for other in found if other != path)]
    return [(path, _text(path, found[path], root)) for path in inner]


def _path(detail: ErrorDetails, data: Any) -> str:
    """The place in the document; pydantic's also names the member of a union that was tried."""
    steps: list[int | str] = []
    for step in detail["loc"]:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            if detail["type"] != "missing" or step is not detail["loc"][-1]:
                continue
        steps.append(step)
    return dotted(steps)


def _text(path: str, details: Sequence[ErrorDetails], root: type[BaseModel]) -> str:
    kind, given = details[0]["type"], details[0]["input"]
    if kind == "extra_forbidden":
        return _unknown(path, root)
    reasons = dict.fromkeys(one_line(detail["msg"]).removeprefix("Value error, ") for detail in details)
    text = " or ".join(reasons).replace(" or Input should be ", " or ")
    if kind == "missing":
        return f"{text}."
    names = re.findall(r"'([^']*)'", " ".join(str(detail.get("ctx", {}).get("expected")) for detail in details))
    close = nearest(given, names) if isinstance(given, str) else ""
    return f"{text}, got {shown(given)}.{close}"


def _unknown(path: str, root: type[BaseModel]) -> str:
    """An unknown key, with the nearest one of its section, or the same key of another one."""
    section, dot, key = re.sub(r"\[\d+\]", "[]", path).rpartition(".")
    paths = sorted(_paths(root), key=lambda each: each.count("."))
    below = [each.removeprefix(section + dot) for each in paths if each.startswith(section + dot)]
    here = [each for each in below if "." not in each]
    elsewhere = [each for each in paths if each.rpartition(".")[2] == key]
    close = nearest(key, here) or (f" Did you mean '{elsewhere[0]}'?" if elsewhere else f" Allowed: {', '.join(here)}.")
    return f"unknown key.{close}"


def _paths(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All settings of a section and of those in it, such as data.mix[].limit."""
    for name, field in section.model_fields.items():
        yield prefix + name
        index = "[]" if get_origin(field.annotation) is tuple else ""
        for inner in _sections(field.annotation):
            yield from _paths(inner, f"{prefix}{name}{index}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
