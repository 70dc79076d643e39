"""Recipes as text: read YAML, apply `-s` overrides, and write the resolved recipe, which can be run again.

Relative paths in a recipe file start at the folder of that file, so that a recipe and its data can move together. In an
override and in a shipped recipe they start at the current directory. A bare name (`org/name`) is a path if it exists
there, else a Hub id. A checked recipe has only absolute paths.
"""

from __future__ import annotations

import copy
import glob
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from qdora.errors import UserError, nearest, nearest_path
from qdora.files.access_tokens import masked, token_paths
from qdora.files.setting_keys import GONE, is_below
from qdora.files.user_paths import user_path
from qdora.recipe.data_settings import absolute_pattern, is_path, is_pattern, names_files
from qdora.recipe.faults import container, dotted, fault_lines, is_section, one_line, shown, unknown_key
from qdora.recipe.section import Section
from qdora.recipe.settings import Recipe

_KEY = re.compile(r"[^.\[\]=\s]+(?:\.[^.\[\]=\s]+|\[\d{1,6}\])*")
_EITHER_OR = (("train.steps", "train.epochs"), ("train.tokens_per_step", "train.batch"))
"""Settings that replace each other: exactly one of them is set."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
"""What `Text` refuses, so that its fault shows the value as it was given."""
_STEP = re.compile(r"[^.\[\]]+|\[\d+\]")
_MOST_BYTES = 256 * 1024
"""Longest YAML text. PyYAML reads some 100 kB a second, and a recipe has 2."""
_LENGTH = f"allowed: at most {_MOST_BYTES // 1024} KiB"
_ALLOWED = {"data.chat_template": ", allowed: a file with a template (Jinja), or null for the tokenizer's own"}
"""What a missing file may be where users write the name of a template, such as chatml."""
_MOST_VALUES = 100_000
"""Most values of a document with its aliases written out: ten aliases to ten aliases to ... are 10^10 in one line."""


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file, apply `key=value` overrides, and check everything.

    ./name is a file even if a shipped recipe has that name. UserError lists all faults, one line each.
    """
    data, where = recipe_document(name_or_path)
    return recipe_from(apply_overrides(data, overrides), where, overrides)


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
    text, where, folder = _find(str(name_or_path))
    data = read_yaml(text, where)
    for key, value in GONE.items():
        section, _, name = key.partition(".")
        if isinstance(part := data.get(section), dict) and part.get(name, ...) == value:
            del part[name]
    base = data.get("base")
    if isinstance(base, dict) and base.get("residency") == "disk":  # of earlier versions: where a CPU kept its base
        del base["residency"]
        base.pop("streamed_blocks", None)
    _make_absolute_(data, folder)
    return data, where


def recipe_from(data: Any, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Check plain data and make a recipe from it; relative paths start at the current directory. `data` is not changed.

    UserError lists all faults, one line each: `<where>: <path.to.key>: what is wrong, got ..., allowed: ...`. A fault
    in a key of `overrides`, which were already applied, begins with -s instead of `where`.
    """
    secrets = [dotted(steps) for steps in token_paths(data)]
    if secrets:
        what = "holds an access token, which must not be in a recipe. Fix: run 'hf auth login' or set HF_TOKEN"
        raise UserError(*(f"{where}: {path}: {what}; revoke this token if the file was shared." for path in secrets))
    data = copy.deepcopy(data)
    _make_absolute_(data, Path.cwd())
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        lines = fault_lines(error)
    given = [item.partition("=")[0].strip() for item in overrides]
    raise UserError(*dict.fromkeys(f"{'-s' if is_below(path, given) else where}: {line}" for path, line in lines))


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A copy of a recipe with some settings changed, checked as a whole; UserError lists all faults."""
    return recipe_from(apply_overrides(settings(recipe), overrides), "recipe", overrides)


def settings(section: Section) -> dict[str, Any]:
    """All settings of a recipe that have an effect, as plain data: `recipe_from(settings(recipe)) == recipe`."""
    plain, left_out = {}, section.unused()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name not in left_out and (value is not None or field.default is not None):
            plain[name] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Section):
        return settings(value)
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


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


def missing_files(recipe: Recipe, where: str) -> list[str]:
    """One line for every path of a recipe that does not exist; checking a recipe itself does not read the disk."""
    named = [("model.source", recipe.model.source), ("model.tokenizer", recipe.model.tokenizer)]
    named.append(("adapter.resume_from", recipe.adapter.resume_from))
    named.append(("data.chat_template", recipe.data.chat_template))
    if recipe.base.prune is not None and recipe.base.prune.calibration.text != "mix":
        named.append(("base.prune.calibration.text", recipe.base.prune.calibration.text))
    for index, source in enumerate(recipe.data.mix):
        named += [(f"data.mix[{index}].{key}", getattr(source, key)) for key in ("source", "path")]
        if source.validation is not None and names_files(source.validation):
            named.append((f"data.mix[{index}].validation", source.validation))
    absolute = [(key, path) for key, path in named if path is not None and os.path.isabs(path)]
    return [
        f"{where}: {key}: no such file or directory, got {path}{_ALLOWED.get(key, '')}."
        f"{'' if is_pattern(path) else nearest_path(Path(path))}"
        for key, path in absolute
        if not (os.path.exists(path) or (is_pattern(path) and any(glob.iglob(path, recursive=True))))
    ]


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that escapes U+0085, which YAML otherwise reads back as a space."""

    def choose_scalar_style(self) -> str:
        is_folded = isinstance(self.event, yaml.ScalarEvent) and "\x85" in self.event.value
        return '"' if is_folded else super().choose_scalar_style()


class _Loader(yaml.SafeLoader):
    """A YAML loader that keeps 2:4 and 0100 as text; YAML 1.1 reads 124, to base 60, and 64, to base 8."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        is_number = tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        is_other_base = is_number and (":" in value or re.fullmatch(r"[-+]?0[\d_]+", value))
        return "tag:yaml.org,2002:str" if is_other_base else tag


def read_yaml(text: str, where: str, sections: Iterable[str] = Recipe.model_fields) -> dict[str, Any]:
    """Parse one YAML mapping; UserError has the line of a syntax error, or of every key that is given twice."""
    if len(text) > _MOST_BYTES:
        raise UserError(f"{where}: too long, {_LENGTH}.")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _num_values(node, {}, where) > _MOST_VALUES:
            raise UserError(f"{where}: holds too many values, with its aliases written out at most {_MOST_VALUES:,}.")
        twice = [] if node is None else list(_keys_given_twice(node, set()))
        if twice:
            raise UserError(*(f"{where}: line {line}: key {shown(key)} is given twice." for key, line in twice))
        data = None if node is None else loader.construct_document(node)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"{where}: {line}not YAML: {one_line(str(error.problem or error.context))}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {one_line(str(error))}.") from None
    except (ValueError, OverflowError) as error:  # such as the date 2024-13-45
        raise UserError(f"{where}: not a value: {one_line(str(error))}.") from None
    except (KeyError, AttributeError, TypeError):  # what PyYAML raises for !!bool maybe and !!timestamp x
        raise UserError(f"{where}: not YAML: a tag such as !!bool stands before a value of another kind.") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply.") from None
    if not isinstance(data, dict):
        what = "empty" if data is None else f"not a mapping, got {shown(data)}"
        raise UserError(f"{where}: {what}, allowed: the sections {', '.join(sections)}.")
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `data` with `key=value` settings applied in order; UserError lists the malformed and unknown keys.

    Keys are dotted paths, with [i] into lists; values are YAML. null removes a key, so that its default holds; only
    where null differs from the default (train.clip) it is a value. train.steps replaces train.epochs and the other way
    round, and so do train.tokens_per_step and train.batch, unless both are given.
    """
    changed = copy.deepcopy(data)
    faults, given = [], dict[str, Any]()
    for item in overrides:
        key, equals, text = item.partition("=")
        key = key.strip()
        try:
            if not equals or not _KEY.fullmatch(key):
                raise UserError("must be key=value, such as train.lr=1e-4 or data.mix[0].limit=5.")
            steps = [int(step[1:-1]) if step.startswith("[") else step for step in _STEP.findall(key)]
            given[key] = read_yaml(f"value: {text}", "value")["value"]
            if given[key] is None and text.strip().startswith("#"):
                raise UserError("# begins a comment, so there is no value. Fix: put it in quotes of YAML, '\"#...\"'.")
            _assign_(changed, Recipe, steps, given[key])
        except UserError as error:
            faults += [f"-s {one_line(item)}: {fault.removeprefix('value: line 1: ')}" for fault in error.faults]
    if faults:
        raise UserError(*faults)
    for one, other in (*_EITHER_OR, *(pair[::-1] for pair in _EITHER_OR)):
        if given.get(one) is not None and other not in given:
            train = changed.get("train")
            if isinstance(train, dict):  # a later override may have replaced it by something else
                train.pop(other.removeprefix("train."), None)
    return changed


def _assign_(node: Any, kind: Any, steps: Sequence[int | str], value: Any) -> None:
    """Put `value` at the path `steps` inside `node`, whose type in the recipe is `kind`; UserError if that fails."""
    step, rest = steps[0], steps[1:]
    if is_section(kind) and isinstance(step, str) and isinstance(node, dict):
        field = kind.model_fields.get(step)
        if field is None:
            raise UserError(unknown_key(kind, step))
        null_is_setting = type(None) in get_args(field.annotation) and field.default is not None
        if rest:
            inner = container(field.annotation, rest[0])
            if node.get(step) is None:
                node[step] = [] if get_origin(inner) is tuple else {}
            _assign_(node[step], inner, rest, value)
        elif value is None and not null_is_setting:
            node.pop(step, None)
        else:
            node[step] = value
    elif get_origin(kind) is tuple and isinstance(step, int) and isinstance(node, list):
        if step >= len(node):
            raise UserError(f"the index must be below the number of entries ({len(node)}), got [{step}].")
        if rest:
            _assign_(node[step], container(get_args(kind)[0], rest[0]), rest, value)
        else:
            node[step] = value
    elif get_origin(kind) is dict and isinstance(node, dict):
        # adapter.rank_pattern: the rest is one name, with its dots
        name = ".".join(map(str, steps))
        # In a table of any values, such as data.template_kwargs, null is one of them
        if value is None and get_args(kind)[1] is not Any:
            node.pop(name, None)
        else:
            node[name] = value
    else:
        is_index = get_origin(kind) is tuple and isinstance(step, str) and step.isdecimal()
        hint = f" It is a list. Fix: write [{step}]." if is_index else ""
        raise UserError(f"there is nothing called {dotted([step])} inside it.{hint}")


def _make_absolute_(data: Any, folder: Path | None) -> None:
    """Make relative paths absolute, starting at `folder`; malformed values are left to the checks."""
    if folder is None or not isinstance(data, dict):
        return
    _make_key_absolute_(data.get("model"), "source", folder)
    _make_key_absolute_(data.get("model"), "tokenizer", folder)
    _make_key_absolute_(data.get("adapter"), "resume_from", folder, always=True)
    calibration = _inner(_inner(data.get("base"), "prune"), "calibration")
    if _inner(calibration, "text") != "mix":
        _make_key_absolute_(calibration, "text", folder, always=True)
    _make_key_absolute_(data.get("data"), "chat_template", folder, always=True)
    for section, no_folder in (("base", "auto"), ("data", "off")):
        if _inner(data.get(section), "cache") != no_folder:
            _make_key_absolute_(data.get(section), "cache", folder, always=True)
    mix = _inner(data.get("data"), "mix")
    for source in mix if isinstance(mix, list) else ():
        _make_key_absolute_(source, "source", folder, patterns=True)
        _make_key_absolute_(source, "path", folder, always=True)
        validation = _inner(source, "validation")
        if isinstance(validation, str) and names_files(validation):
            _make_key_absolute_(source, "validation", folder, always=True, patterns=True)


def _inner(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, dict) else None


def _make_key_absolute_(section: Any, key: str, folder: Path, *, always: bool = False, patterns: bool = False) -> None:
    """`always`: a bare name is a path, too. `patterns`: the path may be a pattern, such as data/*.jsonl."""
    value = _inner(section, key)
    if not isinstance(value, str) or _CONTROL.search(value) or value in ("", "builtin"):
        return
    path = absolute_pattern(value, folder) if patterns else os.path.abspath(folder / user_path(value))
    if always or is_path(value) or os.path.exists(path):
        section[key] = path


def _find(name: str) -> tuple[str, str, Path | None]:
    """Text of a recipe, its name for messages, and the folder of its relative paths (None for a shipped recipe)."""
    names = recipe_names()
    if name in names:
        return recipe_text(name), name, None
    path = user_path(name)
    where, allowed = masked(name), f"must be a YAML file, or one of {', '.join(names)}."
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)  # never all of a device such as /dev/zero
        if len(content) <= _MOST_BYTES:
            text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8-sig").read()  # line ends as of a text file
            return text, where, Path(os.path.abspath(path)).parent
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} is not UTF-8 text; {allowed}") from None
    except IsADirectoryError:
        raise UserError(f"{where}: is a directory; {allowed}") from None
    except (FileNotFoundError, NotADirectoryError, ValueError):
        close = nearest(name, [*names, *_recipes_beside(path)]) or nearest(path.stem, names)
        raise UserError(f"{where}: no such file; {allowed}{close}") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); {allowed}") from None
    raise UserError(f"{where}: too long for a recipe, {_LENGTH}; {allowed}")


def _recipes_beside(path: Path) -> list[str]:
    try:
        return [str(path.parent / name) for name in os.listdir(path.parent) if name.endswith((".yaml", ".yml"))]
    except (OSError, ValueError):
        return []


def _num_values(node: yaml.Node, known: dict[int, int], where: str) -> int:
    """The values of a node with its aliases written out; `known` has those of the nodes that are counted, 0 while they
    are. UserError if a node is inside itself."""
    number = known.get(id(node))
    if number == 0:
        raise UserError(f"{where}: line {node.start_mark.line + 1}: an alias stands inside the value that it repeats.")
    if number is None:
        known[id(node)] = 0
        children = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ()
        pairs = children if isinstance(node, yaml.MappingNode) else ((child,) for child in children)
        number = 1 + sum(_num_values(child, known, where) for pair in pairs for child in pair)
        known[id(node)] = number
    return number


def _keys_given_twice(node: yaml.Node, seen: set[int]) -> Iterator[tuple[str, int]]:
    """(key, line from 1) of every key that its mapping already has; `seen` ends cycles of aliases."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _keys_given_twice(child, seen)
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, child in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    yield key.value, key.start_mark.line + 1
                keys.add((key.tag, key.value))
            yield from _keys_given_twice(child, seen)
