"""Recipes as text: read YAML, apply `-s` overrides, check, and write the resolved recipe, which can be run again.

Relative paths in a recipe file start at its folder; in an override and in a shipped recipe at the current directory. A
bare name (`org/name`) is a path if it exists there, else a Hub id. A checked recipe has only absolute paths.
"""

from __future__ import annotations

import copy
import glob
import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qdora.errors import UserError, nearest, refuse
from qdora.files.atomic import masked
from qdora.files.machine import user_path
from qdora.files.run_directory import flat, is_below, open_run
from qdora.recipe.data_settings import (
    CHAT_FORMATS,
    COMMONSENSE_TASKS,
    absolute_pattern,
    has_file_ending,
    is_path,
    is_pattern,
    names_files,
)
from qdora.recipe.section import Fault, Section, fault_lines, one_line, shown
from qdora.recipe.settings import Recipe, has_eps

_SHIPPED = Path(__file__).with_name("shipped")
_FLOAT = r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
    "merge": (r"<<", ["<"]),
}
"""What plain text means in YAML 1.2: its pattern, and the characters that it begins with."""

logger = logging.getLogger("qdora")


class _Loader(yaml.SafeLoader):
    """YAML 1.2: 1e-4 is a number; 2:4, 0100, on, no and 2024-05-01 are text. A key that is given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  filled below

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that YAML 1.1 or 1.2 reads as something else."""


for _tag, (_pattern, _first) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT})$"), _PLAIN["float"][1])


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe or a YAML file, apply `key=value` overrides, and check everything.

    ./name is a file even if a shipped recipe has that name.
    """
    data, where = recipe_document(name_or_path)
    return recipe_from(with_overrides(data, overrides, logging.INFO), where, overrides)


def recipe_of_run(path: Path) -> Recipe:
    """The recipe of a run, whose model is still where it was."""
    file = open_run(path).recipe_file
    recipe, start = load_recipe(file), f"{file}: model."
    moved = [fault for fault in missing_files(recipe, str(file)) if fault.startswith(start)]
    refuse([f"{fault} Fix: if it was moved, write its new path into {file}." for fault in moved])
    return recipe


def recipe_document(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """A recipe as written, not checked but with absolute paths, and its name for messages."""
    name, names = str(name_or_path), recipe_names()
    if name in names:
        return read_yaml(recipe_text(name), name), name
    path, where = user_path(name), masked(name)
    if not os.path.exists(path):
        raise UserError(f"{where}: must be a YAML file, or one of {', '.join(names)}.{nearest(where, names)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({one_line(str(error))}); must be a YAML file.") from None
    data = read_yaml(text, where)
    _make_absolute_(data, Path(os.path.abspath(path)).parent)
    return data, where


def recipe_from(data: Any, where: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """Check plain data and make a recipe from it; relative paths start at the current directory.

    A fault is a line `<where>: <key>: what is wrong`, or `-s: ...` in a key of `overrides`, which `data` has already.
    """
    try:
        secrets = [
            masked(key) for key, value in flat(data).items() if masked(text := f"{key}: {value}") != text
        ]
    except RecursionError:
        raise UserError(f"{where}: an alias contains itself.") from None
    what = (
        "holds an access token, which others may read. Fix: revoke it, and run 'hf auth login' or set HF_TOKEN."
    )
    refuse([f"{where}: {path}: {what}" for path in secrets])
    data = copy.deepcopy(data)
    _make_absolute_(data, Path.cwd())
    try:
        recipe = Recipe.model_validate(data)
        lines = list(_faults(recipe))
    except ValidationError as error:
        lines = fault_lines(error, data)
    given = [item.partition("=")[0].strip() for item in overrides]
    placed = [("-s" if is_below(key, given) else where, key, what) for key, what in lines]
    refuse([": ".join(filter(None, line)) for line in placed])
    return recipe


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A copy of a recipe with some settings changed, checked as a whole."""
    return recipe_from(with_overrides(settings(recipe), overrides), "recipe", overrides)


def settings(recipe: Recipe) -> dict[str, Any]:
    """All settings of a recipe that have an effect, as plain data: `recipe_from(settings(recipe)) == recipe`."""
    found = recipe.model_dump(mode="json", exclude_none=True)
    for name in ("clip", "checkpoint_every"):  # null is not their default
        found["train"].setdefault(name, None)
    for key in _unused(recipe):
        section, _, name = key.rpartition(".")
        _inner(found, section).pop(name, None)
    return found


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe with all defaults as YAML, which can be run again."""
    return yaml_text(settings(recipe))


def yaml_text(document: dict[str, Any]) -> str:
    return str(yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def recipe_names() -> list[str]:
    return sorted(file.stem for file in _SHIPPED.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe with its comments."""
    return (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def read_yaml(text: str, where: str) -> dict[str, Any]:
    data = _parsed(text, where)
    if not isinstance(data, dict):
        raise UserError(f"{where}: must be a table of settings, got {shown(data)}.")
    return data


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # whatever a tag or an odd value makes the parser raise
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        what = one_line(str(getattr(error, "problem", None) or error))
        raise UserError(f"{where}: {line}not YAML: {what}.") from None


def key_and_value(item: str, *, of_vary: bool = False) -> tuple[str, Any]:
    """`key=value` of -s, or with `of_vary` the list of `key=value,value` of --vary; values are YAML."""
    key, equals, text = (part.strip() for part in item.partition("="))
    option, example = ("--vary", "base.quant=none,nf4") if of_vary else ("-s", "data.mix[0].limit=5")
    if not equals or not _steps(key) or (of_vary and not text):
        raise UserError(f"{option} {one_line(item)}: must be key=value, such as {example}.")
    return key, _parsed(f"[{text}]" if of_vary else text, f"{option} {one_line(item)}")


def with_overrides(
    data: dict[str, Any], overrides: Sequence[str], level: int = logging.DEBUG
) -> dict[str, Any]:
    """A copy of `data` with `key=value` settings put in, in order.

    Values are YAML, and null stands for the default. A setting of `data` that has no effect under the given ones is
    dropped, with a line: base.quant=none drops base.block_size. train.steps replaces train.epochs, train.batch
    train.tokens_per_step, and the other way round, unless both are given.
    """
    changed, wrong, given = copy.deepcopy(data), list[str](), dict[str, Any]()
    for item in overrides:
        try:
            key, value = key_and_value(item)
            *steps, last = _steps(key)
            here: Any = changed
            for step in steps:
                if isinstance(here, dict) and here.get(step) is None:
                    here[step] = {}
                here = here[step]
            here[last] = given[key] = value
        except UserError as error:
            wrong += error.faults
        except (IndexError, KeyError, TypeError):
            wrong.append(f"-s {one_line(item)}: the recipe has nothing called {masked(key)}.")
    refuse(wrong)
    for pair in (("steps", "epochs"), ("tokens_per_step", "batch")):
        for one, other in itertools.permutations(pair):
            if given.get(f"train.{one}") is not None and f"train.{other}" not in given:
                changed["train"].pop(other, None)
    disabled = {key: why for key, why in ignored(changed).items() if not is_below(key, given)} if given else {}
    for key in sorted(disabled.keys() - (ignored(data) if disabled else {})):
        head, _, name = key.rpartition(".")
        value = _inner(changed, head).pop(name)
        logger.log(level, "%s %s is dropped from the recipe: %s.", key, shown(value), disabled[key])
    return changed


def _steps(key: str) -> list[int | str]:
    return [int(index) if index else name for index, name in re.findall(r"\[(\d{1,6})\]|([^.\[\]]+)", key)]


_PATHS = {
    "model.source": "builtin",
    "model.tokenizer": "",
    "adapter.resume_from": "",
    "base.cache": "auto",
    "base.calibration.text": "mix",
    "base.prune.calibration.text": "mix",
    "data.chat_template": "",
    "data.cache": "off",
}
"""Settings that are paths, each with the word that is none there."""
_PATHS_OF_SOURCES = ("source", "path", "validation")


def missing_files(recipe: Recipe, where: str) -> list[str]:
    """One line for every path of a recipe that does not exist."""
    paths = [(setting, section[key]) for setting, section, key in _paths(settings(recipe)) if key != "cache"]
    return [
        f"{where}: {setting}: no such file or directory, got {path}."
        for setting, path in paths
        if os.path.isabs(path) and not os.path.exists(path) and not any(glob.iglob(path, recursive=True))
    ]


def _make_absolute_(data: Any, folder: Path) -> None:
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
    """(dotted setting, its section, its key) of all text in plain data that may be a path."""
    mix = _inner(data, "data.mix")
    indices = range(len(mix)) if isinstance(mix, list) else ()
    for setting in (*_PATHS, *(f"data.mix[{index}].{key}" for index in indices for key in _PATHS_OF_SOURCES)):
        head, _, key = setting.rpartition(".")
        section = _inner(data, head)
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(value, str) and value not in ("", _PATHS.get(setting)):
            yield setting, section, key


def _inner(data: Any, setting: str) -> Any:
    """What a recipe or plain data has at a dotted setting, or None."""
    for step in _steps(setting):
        try:
            data = getattr(data, str(step)) if isinstance(data, Section) else data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data


_OF_FACTORS = "rank alpha rank_stabilized experts init rank_pattern same_scaling mask"
_BEST = "best_by best_metric patience"


def _unused(recipe: Recipe) -> dict[str, str]:
    """Settings without effect under the others -> the reason. Setting one is a fault; a resolved recipe has none."""
    model, base, adapter, data = recipe.model, recipe.base, recipe.adapter, recipe.data
    train, evals, kind, prune = recipe.train, recipe.eval, recipe.adapter.kind, recipe.base.prune
    evaluates = evals.every is not None or evals.at_start or evals.at_end
    untrained, why = kind in ("none", "full"), f"adapter.kind {kind} has no adapter"
    own_validation = all(source.validation is not None or source.stream for source in data.mix)
    plain, others = base.quant == "none", type(adapter).model_fields.keys() - {"kind", "mask"}
    rows: list[tuple[str, str, Any]] = [  # section and keys, reason, whether they have no effect
        ("model revision", f"model.source {model.source} is not on the Hub", model.is_local),
        ("model tokenizer_revision", "model.tokenizer is not on the Hub", is_path(model.tokenizer or "/")),
        ("base block_size double_quant", f"base.quant {base.quant} has none to choose", not base.has_blocks),
        ("base method", f"base.quant {base.quant} is always rounded", not base.has_blocks),
        ("base clip calibration", "it is for base.method gptq", base.method == "round" or not base.has_blocks),
        ("base skip", "base.quant none quantises no layer", plain and prune is None),
        ("base cache", "only a base that is quantised and not pruned has one", plain or prune is not None),
        ("base streamed_blocks", "base.residency is device", base.residency == "device"),
        (f"adapter {' '.join(others)}", why, untrained),
        ("adapter mask", why, untrained and (kind == "none" or prune is None)),
        (f"adapter {_OF_FACTORS} targets", "the adapter in adapter.resume_from has its own", adapter.resume_from),
        (f"adapter {_OF_FACTORS} dropout gates dtype resume_from", "magnitudes have none", kind == "magnitude"),
        ("adapter same_scaling", "all layers have one rank", not adapter.has_own_ranks),
        ("adapter also_train_rows", "adapter.also_train is empty", not adapter.also_train),
        ("data temperature", f"data.strategy is {data.strategy}", data.strategy != "temperature"),
        ("data max_bad_rows", "no source is streamed, and faulty rows of others are errors", not data.has_stream),
        ("data validation_fraction", "every source names validation data or is streamed", own_validation),
        ("train lr_ratio_B lr_ratio_magnitude", why, untrained),
        ("train eps", f"train.optimizer {train.optimizer} has no eps", not has_eps(train.optimizer)),
        ("train max_skips", "train.on_bad_step stop skips no step", train.on_bad_step == "stop"),
        ("train lr_end", "train.schedule is constant", train.schedule == "constant"),
        ("train lr_ratio_magnitude", "adapter.kind lora has no magnitudes", kind == "lora"),
        ("train lr_ratio_B", "adapter.kind magnitude has no lora_B", kind == "magnitude"),
        (f"eval limit block method every at_start at_end {_BEST}", "eval.tasks is empty", evals.tasks == ()),
        ("eval block", "eval.limit is not set, so all examples are evaluated", evals.limit is None),
        ("eval best_metric patience", "eval.best_by is not set", evals.best_by is None),
        (f"eval {_BEST}", "eval.every is not set", evals.best_by and not evals.every),
        ("eval tasks limit block method", "nothing is evaluated", evals.tasks != () and not evaluates),
        ("interference every", why, untrained),
        ("interference examples", "interference.every is not set", recipe.interference.every is None),
        ("memory offload_activations", "memory.checkpointing is false", not recipe.memory.checkpointing),
    ]  # fmt: skip
    if prune is not None:
        rows += [
            ("base.prune damping", f"base.prune.method {prune.method} has none", not prune.corrects),
            ("base.prune calibration", f"base.prune.method {prune.method} needs none", not prune.measures),
            ("base calibration", "base.prune.calibration serves both", prune.measures),
            ("base.prune group", f"{prune.method} with {prune.pattern} has its own",
             prune.pattern != "unstructured" or prune.corrects),
            ("base.prune sparsity", f"base.prune.pattern {prune.pattern} implies it", ":" in prune.pattern),
        ]  # fmt: skip
    for index, source in enumerate(data.mix):
        where, task, own, format = f"data.mix[{index}]", source.task or "", source.source or "", source.format
        eight = task in COMMONSENSE_TASKS and format in ("auto", "commonsense170k")
        rows += [
            (f"{where} limit", "a stream is not counted in advance (max_epochs limits it)", source.stream),
            (f"{where} size shuffle_window", "the source is not streamed", not source.stream),
            (f"{where} stream chat columns template config data_files", f"task {task} has its own place", task),
            (f"{where} format", f"task {task} has its own layout", task and not eight),
            (f"{where} revision", "the data comes from path", task and source.path is not None),
            (f"{where} path revision", f"{task} ships inside the package", task.startswith("demo/")),
            (f"{where} path", "it is for a task, and the data comes from source", own),
            (f"{where} revision config data_files", "source is not on the Hub", own and is_path(own)),
            (f"{where} split", "source is a file or a pattern", has_file_ending(own) or is_pattern(own)),
            (f"{where} chat", f"no chats are made of format {format}", format not in ("auto", *CHAT_FORMATS)),
            (f"{where} format", "template makes prompt and completion", source.template is not None),
            (
                f"{where} weight",
                f"data.strategy is {data.strategy} and not weights",
                data.strategy != "weights",
            ),
            (
                f"{where} loss_weight",
                "there is no other source to train on",
                len(data.mix) == 1 or kind == "none",
            ),
        ]
    unused = dict[str, str]()
    for names, why, applies in rows:
        section, *keys = names.split()
        unused |= {f"{section}.{key}": why for key in keys if applies}
    return unused


def ignored(data: Recipe | dict[str, Any]) -> dict[str, str]:
    """Those of the `_unused` settings that a recipe sets -> the reason; none if plain data is no recipe."""
    try:
        recipe = data if isinstance(data, Recipe) else Recipe.model_validate(data)
    except ValidationError:
        return {}
    found = {}
    for key, why in _unused(recipe).items():
        section, _, name = key.rpartition(".")
        if name in _inner(recipe, section).model_fields_set and _inner(recipe, key) is not None:
            found[key] = why
    return found


def _faults(recipe: Recipe) -> Iterator[Fault]:
    for key, why in ignored(recipe).items():
        yield key, f"would be ignored because {why}, got {shown(_inner(recipe, key))}. Fix: remove it."
    seen = set()
    for key, must, applies in _contradictions(recipe):
        if applies and key not in seen:
            seen.add(key)
            yield key, f"must {must}, got {shown(_inner(recipe, key))}."


def _contradictions(recipe: Recipe) -> list[tuple[str, str, Any]]:
    model, base, adapter, data, evals = recipe.model, recipe.base, recipe.adapter, recipe.data, recipe.eval
    train, memory, prune = recipe.train, recipe.memory, base.prune
    gates, added = adapter.gates, model.add_tokens
    full, nothing, plain = adapter.kind == "full", adapter.kind == "none", base.quant == "none"
    away, stream, micro = base.residency != "device", data.has_stream, train.micro_batch_tokens
    matrices = adapter.also_train and adapter.also_train_rows == "all"
    untrained = added and not full and not nothing and "embed_tokens" not in adapter.also_train
    is_pinned = not model.is_local and re.fullmatch(r"[0-9a-f]{40}", model.revision or "")
    exact, is_packed, loftq = plain and prune is None, not plain and prune is None, adapter.init == "loftq"
    undivided = full or adapter.also_train or loftq or away
    labels, per_step = [source.label for source in data.mix], train.tokens_per_step
    rows: list[tuple[str, str, Any]] = [
        ("model.trust_remote_code", "be false unless model.revision is a full commit",
         model.trust_remote_code and not is_pinned),
        ("train.lr_end", f"be at most train.lr ({train.lr:g})", train.lr_end > train.lr),
        ("model.dtype", "not be float16 with adapter.also_train_rows all", model.dtype == "float16" and matrices),
        ("model.add_tokens", "be empty with adapter.kind none, and where base.prune.method or base.method measures",
         added and (nothing or base.measured)),
        ("adapter.also_train", "hold embed_tokens with model.add_tokens", untrained),
        ("adapter.also_train_rows", "be all without model.add_tokens", adapter.also_train and not (added or matrices)),
        ("base.residency", "be device with base.quant none and with base.prune", away and not is_packed),
        ("adapter.kind", f"not be full with base.quant {base.quant}", full and not plain),
        ("adapter.mask", "be keep with adapter.kind full and base.prune", full and prune and adapter.mask != "keep"),
        ("adapter.init", "not be loftq without base.quant and base.prune", loftq and exact),
        ("adapter.mask", "be ignore without base.prune", adapter.mask == "keep" and prune is None),
        ("data.temperature", "be set with data.strategy temperature",
         data.strategy == "temperature" and data.temperature is None),
        ("data.too_long", "be truncate, drop or split with a stream", data.too_long == "error" and stream),
        ("train.steps", "be set, or epochs, but not both", (train.steps is None) == (train.epochs is None)),
        ("train.steps", "be 0 with adapter.kind none", nothing and train.steps != 0),
        ("train.epochs", "be null with a stream (set train.steps)", train.epochs and stream),
        ("train.tokens_per_step", "be set, or batch, but not both",
         (train.tokens_per_step is None) == (train.batch is None)),
        ("train.warmup", f"be at most train.steps ({train.steps})", train.steps and train.warmup > train.steps),
        ("train.micro_batch_tokens", f"be data.max_length ({data.max_length}) to tokens_per_step ({per_step})",
         micro != "auto" and not data.max_length <= micro <= (per_step or micro)),
        ("train.parallel", "be auto or replicate with full, also_train, loftq and what is on the host",
         train.divides_base and undivided),
        ("memory.checkpointing", "be true with base.residency host", away and not memory.checkpointing),
    ]  # fmt: skip
    if prune is not None:
        n, is_n_of_m, m = prune.pattern.partition(":")
        rows += [
            ("base.prune.pattern", "have n below m", is_n_of_m and int(n) >= int(m)),
            ("base.prune.sparsity", f"be set for pattern {n}", not is_n_of_m and prune.sparsity is None),
            ("base.prune.order", "be prune_first with sparsegpt, with base.method gptq and with base.quant none",
             prune.order == "quantize_first" and (plain or base.corrects)),
        ]  # fmt: skip
    if gates is not None:
        largest = max(adapter.rank, *adapter.rank_pattern.values(), adapter.experts.rank or 1)
        rows += [
            ("adapter.gates.mean_rank", "be set, or parameters, but not both",
             (gates.mean_rank is None) == (gates.parameters is None)),
            ("adapter.gates.mean_rank", "be less than adapter.rank",
             adapter.resume_from is None and (gates.mean_rank or 0) >= largest),
            ("adapter.gates.anneal", f"end, after warmup, within the {train.steps} steps of the run",
             train.steps is not None and gates.length_fault(train.steps)),
            ("eval.best_by", "be null with adapter.gates", evals.best_by),
        ]  # fmt: skip
    for index, source in enumerate(data.mix):
        where, weighted = f"data.mix[{index}]", data.strategy == "weights"
        rows += [
            (f"{where}.source", "be set, or task, but not both", (source.source is None) == (source.task is None)),
            (f"{where}.weight", "be set with data.strategy weights", weighted and source.weight is None),
            (f"{where}.weight", "be above 0 in at least one source", not any(each.weight != 0 for each in data.mix)),
            (f"{where}.name", f"differ from that of another source ({source.label})", source.label in labels[:index]),
        ]  # fmt: skip
    return rows
