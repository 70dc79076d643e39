"""Recipes as text: read YAML, apply `-s` overrides, and write the resolved recipe, which can be run again.

Relative paths in a recipe file start at the folder of that file, so that a recipe and its data can move together. In an
override and in a shipped recipe they start at the current directory. A bare name (`org/name`) is a path if it exists
there, else a Hub id. A checked recipe has only absolute paths.
"""

from __future__ import annotations

import copy
import functools
import glob
import itertools
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qdora.errors import UserError, nearest, nearest_path
from qdora.files.atomic import masked, token_paths
from qdora.files.machine import user_path
from qdora.files.run_directory import GONE, is_below
from qdora.recipe.data_settings import absolute_pattern, is_path, is_pattern, names_files
from qdora.recipe.faults import dotted, fault_lines, one_line, shown
from qdora.recipe.rules import faults, ignored, unused
from qdora.recipe.section import Section
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

_STEP = re.compile(r"\[(\d{1,6})\]|([^.\[\]]+)")
_EITHER_OR = (("steps", "epochs"), ("tokens_per_step", "batch"))
"""Settings of `train` that replace each other: exactly one of them is set."""
_MOST_BYTES = 2**20
"""Longest recipe. Who names the weights of a model is told so at once."""
_PATHS = {
    "model.source": "builtin",
    "model.tokenizer": "",
    "adapter.resume_from": "",
    "base.cache": "auto",
    "base.prune.calibration.text": "mix",
    "data.chat_template": "",
    "data.cache": "off",
}
"""Settings that are paths, each with the word that is none there."""
_FLOAT = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}
"""What plain text means in YAML 1.2: its pattern, and the characters that it begins with."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 1e-4 is a number; 2:4, 0100, on, no and 2024-05-01 are text. A key that is given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  filled below

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that puts text in quotes that YAML 1.1 or 1.2 reads as something else."""


for _tag, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), _PLAIN["float"][1])


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file, apply `key=value` overrides, and check everything.

    ./name is a file even if a shipped recipe has that name. UserError lists all faults, one line each.
    """
    data, where = recipe_document(name_or_path)
    changed, dropped = with_overrides(data, overrides)
    for line in dropped:
        logger.info(line)
    return recipe_from(changed, where, overrides)


def recipe_of_run(file: Path, overrides: Sequence[str] = (), *, sections: Collection[str] = ("model",)) -> Recipe:
    """The recipe.yaml of a run, read as by `load_recipe`, whose paths in these sections still exist.

    UserError: Those that do not, and where to write their new places.
    """
    recipe, starts = load_recipe(file, overrides), tuple(f"{file}: {section}." for section in sections)
    moved = [fault for fault in missing_files(recipe, str(file)) if fault.startswith(starts)]
    if moved:
        raise UserError(*(f"{fault} Fix: if it was moved, write its new path into {file}." for fault in moved))
    return recipe


def recipe_document(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """A recipe as written, not checked but with absolute paths, and its name for messages.

    UserError: There is no such recipe, or it is not YAML.
    """
    name = str(name_or_path)
    if name in recipe_names():
        data, where = read_yaml(recipe_text(name), name), name
    else:
        path, where = user_path(name), masked(name)
        data = read_yaml(_text(path, where), where)
        _make_absolute_(data, Path(os.path.abspath(path)).parent)
    for key, value in GONE.items():
        section, _, name = key.partition(".")
        if isinstance(part := data.get(section), dict) and part.get(name, ...) == value:
            del part[name]
    base = data.get("base")
    if isinstance(base, dict) and base.get("residency") == "disk":  # of earlier versions: where a CPU kept its base
        del base["residency"]
        base.pop("streamed_blocks", None)
    return data, where


def _text(path: Path, where: str) -> str:
    names = recipe_names()
    try:
        if path.stat().st_size <= _MOST_BYTES:
            return path.read_text(encoding="utf-8-sig")
        reason = "too long for a recipe"
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or str(error))
    close = "" if os.path.exists(path) else nearest(where, [*names, *map(str, path.parent.glob("*.y*ml"))])
    raise UserError(f"{where}: {reason}; must be a YAML file, or one of {', '.join(names)}.{close}")


def recipe_from(data: Any, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Check plain data and make a recipe from it; relative paths start at the current directory. `data` is not changed.

    UserError lists all faults, one line each: `<where>: <path.to.key>: what is wrong, got ...`. A fault in a key of
    `overrides`, which were already applied, begins with -s instead of `where`.
    """
    secrets = [dotted(steps) for steps in token_paths(data)]
    if secrets:
        what = "holds an access token, which must not be in a recipe. Fix: run 'hf auth login' or set HF_TOKEN"
        raise UserError(*(f"{where}: {path}: {what}; revoke this token if the file was shared." for path in secrets))
    data = copy.deepcopy(data)
    _make_absolute_(data, Path.cwd())
    try:
        recipe = Recipe.model_validate(data)
        lines = list(faults(recipe))
    except ValidationError as error:
        lines = fault_lines(error, data, Recipe)
    if lines:
        given = [item.partition("=")[0].strip() for item in overrides]
        placed = [("-s" if is_below(key, given) else where, key, what) for key, what in lines]
        raise UserError(*(": ".join(filter(None, line)) for line in placed))
    return recipe


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A copy of a recipe with some settings changed, checked as a whole; UserError lists all faults."""
    return recipe_from(with_overrides(settings(recipe), overrides)[0], "recipe", overrides)


def settings(recipe: Recipe) -> dict[str, Any]:
    """All settings of a recipe that have an effect, as plain data: `recipe_from(settings(recipe)) == recipe`."""
    left_out = unused(recipe)

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, tuple):
            return [plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
        if isinstance(value, dict):
            return {name: plain(item, key) for name, item in value.items()}
        if not isinstance(value, Section):
            return value
        fields = [(name, f"{key}.{name}".lstrip("."), field) for name, field in type(value).model_fields.items()]
        return {
            name: plain(inner, full)
            for name, full, field in fields
            if full not in left_out and ((inner := getattr(value, name)) is not None or field.default is not None)
        }

    whole: dict[str, Any] = plain(recipe, "")
    return whole


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with all defaults as YAML, which can be run again."""
    return str(yaml.dump(settings(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, for editors; the descriptions are the docstrings of the fields."""
    return Recipe.model_json_schema()


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    files = resources.files("qdora.recipe").joinpath("shipped").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe with its comments; UserError if there is none of that name."""
    names = recipe_names()
    if name not in names:
        raise UserError(f"{masked(name)}: no such recipe, must be one of {', '.join(names)}.{nearest(name, names)}")
    return resources.files("qdora.recipe").joinpath("shipped", f"{name}.yaml").read_text(encoding="utf-8")


def read_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse one YAML mapping; UserError has the line of a mistake."""
    data = _parsed(text, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: must be a table of settings, got {shown(data)}.")
    return data


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        what = one_line(str(getattr(error, "problem", None) or error))
        raise UserError(f"{where}: {line}not YAML: {what}.") from None


def with_overrides(data: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """A copy of `data` with `key=value` settings put in, in order, and a line for each setting of `data` that it drops.

    Keys are dotted paths, with [i] into lists; values are YAML, and null stands for the default. A setting of `data`
    that has no effect under the given ones is dropped: base.quant=none drops base.block_size. train.steps replaces
    train.epochs and the other way round, and so do train.tokens_per_step and train.batch, unless both are given.
    `recipe_from` checks the result.
    """
    changed, wrong, given = copy.deepcopy(data), list[str](), dict[str, Any]()
    for item in overrides:
        key, equals, text = item.partition("=")
        steps = _steps(key)
        try:
            if not equals or not steps:
                raise UserError(f"-s {one_line(item)}: must be key=value, such as data.mix[0].limit=5.")
            value = given[key.strip()] = _parsed(text, f"-s {one_line(item)}")
            here: Any = changed
            for step, below in itertools.pairwise(steps):
                if isinstance(here, dict) and here.get(step) is None:
                    here[step] = [] if isinstance(below, int) else {}
                here = here[step]
            here[steps[-1]] = value
        except UserError as error:
            wrong += error.faults
        except (IndexError, KeyError, TypeError):
            wrong.append(f"-s {one_line(item)}: the recipe has nothing called {masked(key.strip())}.")
    if wrong:
        raise UserError(*wrong)
    for one, other in (*_EITHER_OR, *(pair[::-1] for pair in _EITHER_OR)):
        train = changed.get("train")
        if given.get(f"train.{one}") is not None and f"train.{other}" not in given and isinstance(train, dict):
            train.pop(other, None)
    return changed, _drop_disabled_(changed, data, given)


def _drop_disabled_(changed: dict[str, Any], data: dict[str, Any], given: Collection[str]) -> list[str]:
    """Remove settings that have no effect in `changed` but have in `data`, unless they are given."""
    disabled = {key: why for key, why in _ignored(changed).items() if not is_below(key, given)} if given else {}
    before, dropped = _ignored(data) if disabled else {}, []
    for key, why in disabled.items():
        if key not in before:
            *steps, last = _steps(key)
            section: Any = changed
            for step in steps:
                section = section[step]
            dropped.append(f"{key} {shown(section.pop(last))} is dropped from the recipe: {why}.")
    return dropped


def _ignored(data: dict[str, Any]) -> dict[str, str]:
    """Settings of plain data that would be ignored -> the reason; none if the data is no recipe."""
    try:
        return ignored(Recipe.model_validate(data))
    except ValidationError:
        return {}


def _steps(key: str) -> list[int | str]:
    return [int(index) if index else name for index, name in _STEP.findall(key.strip())]


def missing_files(recipe: Recipe, where: str) -> list[str]:
    """One line for every path of a recipe that does not exist; checking a recipe itself does not read the disk."""
    missing = []
    for setting, section, key in _paths(settings(recipe)):
        path = section[key]
        if key == "cache" or not os.path.isabs(path) or os.path.exists(path):
            continue
        if not any(glob.iglob(path, recursive=True)):
            close = "" if is_pattern(path) else nearest_path(Path(path))
            missing.append(f"{where}: {setting}: no such file or directory, got {path}.{close}")
    return missing


def _make_absolute_(data: Any, folder: Path) -> None:
    """Make relative paths absolute, starting at `folder`; malformed values are left to the checks."""
    for setting, section, key in _paths(data):
        value, may_be_pattern = section[key], setting.endswith(("].source", "].validation"))
        path = absolute_pattern(value, folder) if may_be_pattern else os.path.abspath(folder / user_path(value))
        if key in ("source", "tokenizer"):  # or on the Hub
            is_here = is_path(value) or os.path.exists(path)
        else:
            is_here = key != "validation" or names_files(value)
        if is_here:
            section[key] = path


def _paths(data: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(dotted setting, the section that has it, its key) of all text in plain data that may be a path."""
    found = []
    for setting in _PATHS:
        *steps, key = setting.split(".")
        found.append((setting, functools.reduce(_inner, steps, data), key))
    mix = _inner(_inner(data, "data"), "mix")
    for index, source in enumerate(mix if isinstance(mix, list) else ()):
        found += [(f"data.mix[{index}].{key}", source, key) for key in ("source", "path", "validation")]
    for setting, section, key in found:
        value = _inner(section, key)
        if isinstance(value, str) and value not in ("", _PATHS.get(setting)):
            yield setting, section, key


def _inner(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, dict) else None
