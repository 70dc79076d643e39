"""The faults of a recipe, one line each: `path.to.key: what is wrong, got ..., allowed: ..., nearest name`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qdora.errors import nearest
from qdora.files.access_tokens import masked
from qdora.recipe.section import Section
from qdora.recipe.settings import Recipe

_MAX_SHOWN = 60  # characters of a given value that a fault repeats
_PEERS = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "batch_size": "batch",
    "per_device_train_batch_size": "batch",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_grad_norm": "clip",
    "optim": "optimizer",
    "logging_steps": "log_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "gradient_checkpointing": "checkpointing",
    "max_seq_length": "max_length",
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "use_rslora": "rank_stabilized",
}
"""What transformers, TRL and PEFT call a setting -> its key here."""
_PLAIN_TYPES = {"tuple_type": "a list", "too_short": "at least one entry", "dict_type": "a table of name: value"}


def dotted(steps: Sequence[int | str]) -> str:
    """('data', 'mix', 0, 'limit') -> 'data.mix[0].limit', on one line and without access tokens."""
    names = [step if isinstance(step, int) or step.isprintable() else repr(step) for step in steps]
    return masked("".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix("."))


def one_line(text: str) -> str:
    """Text from a library in a fault: on one line, without access tokens."""
    return masked(" ".join(text.split()))


def reason_of(error: Exception) -> str:
    """The message of somebody else's error in one line."""
    return one_line(f"{type(error).__name__}: {error}")[:300]


def shown(value: Any) -> str:
    """A given value in a fault: short, on one line, without access tokens."""
    try:
        text = masked(repr(value))
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def fault_lines(error: ValidationError, root: type[Section] = Recipe) -> list[tuple[str, str]]:
    """(path, 'path: what is wrong, ...') for every error that pydantic found in a document of type `root`."""
    return [line for detail in error.errors(include_url=False) for line in _lines(detail, root)]


def unknown_key(section: type[Section], key: str, root: type[Section] = Recipe) -> str:
    """'unknown key, allowed: ...' with the key of this section that is meant or nearest, or the section that has it."""
    names, meant = list(section.model_fields), _PEERS.get(key, key)
    close = nearest(meant, names) if meant == key or meant in names else ""
    if not close:
        homes = [f"{name}.{meant}" for name, field in root.model_fields.items() if meant in _keys(field.annotation)]
        close = f" Did you mean '{homes[0]}'?" if homes else ""
    return masked(f"unknown key, allowed: {', '.join(names)}.{close}")


def container(annotation: Any) -> Any:
    """The section, `tuple[...]` or `dict[...]` within a field's type; the type itself if it has none."""
    if get_origin(annotation) is Annotated:
        return container(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        parts = [container(part) for part in get_args(annotation)]
        return next((part for part in parts if get_origin(part) in (tuple, dict) or _keys(part)), annotation)
    return annotation


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field's type is a section."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _keys(annotation: Any) -> list[str]:
    return list(annotation.model_fields) if is_section(annotation) else []


def _section_at(steps: Sequence[int | str], root: type[Section]) -> type[Section]:
    """The section that a path of keys leads to."""
    found: Any = root
    for step in steps:
        inner = get_args(found)[0] if isinstance(step, int) else found.model_fields[step].annotation
        found = container(inner)
    assert is_section(found), f"{steps} leads to {found}"
    return found


def _lines(detail: ErrorDetails, root: type[Section]) -> Iterator[tuple[str, str]]:
    steps, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    if steps[-1:] == ("[key]",):  # pydantic's mark for the key of a table
        steps = steps[:-1]
    path, got = dotted(steps), f"got {shown(detail['input'])}"
    if kind == "faults":  # from Section._check
        for key, what in context["faults"]:
            inner = f"{path}.{key}".strip(".")
            yield inner, f"{inner}: {masked(what)}"
        return
    if kind == "extra_forbidden":
        text = unknown_key(_section_at(steps[:-1], root), str(steps[-1]), root)
    elif kind == "missing":
        text = f"missing, allowed: {_wanted(steps, root)}"
    elif kind == "allowed":
        text = f"not valid, {got}, allowed: {context['allowed']}.{masked(context['nearest'])}"
    elif kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        close = nearest(detail["input"], names) if isinstance(detail["input"], str) else ""
        text = f"not valid, {got}, allowed: {', '.join(names) or context['expected']}.{close}"
    elif kind == "model_type":
        text = f"not a section, {got}, allowed: {', '.join(_section_at(steps, root).model_fields)}."
    elif kind in _PLAIN_TYPES:
        text = f"not valid, {got}, allowed: {_PLAIN_TYPES[kind]}."
    else:
        text = f"{one_line(detail['msg'])}, {got}."
    yield path, f"{path}: {text}" if path else text


def _wanted(steps: Sequence[int | str], root: type[Section]) -> str:
    """What is missing at a path."""
    field = _section_at(steps[:-1], root).model_fields[str(steps[-1])]
    keys = _keys(field.annotation)
    return f"a section of {', '.join(keys)}." if keys else str(field.description)
