"""What the settings of a recipe say about each other, in two tables: what has no effect, and what must not be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from qdora.errors import nearest
from qdora.recipe.data_settings import (
    CHAT_FORMATS,
    COMMONSENSE_TASKS,
    FILE_SUFFIXES,
    SourceConfig,
    has_file_ending,
    is_path,
    is_pattern,
)
from qdora.recipe.faults import shown
from qdora.recipe.section import Fault
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import MACRO

_COMMIT = re.compile(r"[0-9a-f]{40}")
_OF_FACTORS = "rank alpha rank_stabilized experts init rank_pattern same_scaling mask"
_BEST = "best_by best_metric patience"


def unused(recipe: Recipe) -> dict[str, str]:
    """Settings that have no effect under the others -> the reason, as in 'would be ignored because <reason>'.

    Setting one is a fault, and the resolved recipe leaves them out, so that it can be run again.
    """
    model, base, adapter, data = recipe.model, recipe.base, recipe.adapter, recipe.data
    train, evals, kind, prune = recipe.train, recipe.eval, recipe.adapter.kind, recipe.base.prune
    evaluates = evals.every is not None or evals.at_start or evals.at_end
    rows: list[tuple[str, str, str, Any]] = [  # section, keys, reason, whether they have no effect
        ("model", "revision", f"model.source {model.source} is not on the Hub", model.is_local),
        ("model", "tokenizer_revision", "model.tokenizer is null", model.tokenizer is None),
        ("model", "tokenizer_revision", "model.tokenizer is not on the Hub", is_path(model.tokenizer or "org/name")),
        ("base", "block_size double_quant", f"base.quant {base.quant} has no blocks", base.quant in ("int8", "none")),
        ("base", "block_size double_quant", "the blocks of mxfp4 are as they are stored", base.quant == "mxfp4"),
        ("base", "skip", "base.quant none quantises no layer", base.quant == "none" and prune is None),
        ("base", "cache", "base.quant none packs nothing", base.quant == "none"),
        ("base", "cache", "a pruned base is stored in the run directory", prune is not None),
        ("base", "streamed_blocks", "base.residency is device", base.residency == "device"),
        ("adapter", f"{_OF_FACTORS} targets", "the adapter in adapter.resume_from has its own", adapter.resume_from),
        ("adapter", "same_scaling", "all layers have one rank", not adapter.has_own_ranks),
        ("adapter", "also_train_rows", "adapter.also_train is empty", not adapter.also_train),
        ("data", "temperature", f"data.strategy is {data.strategy}", data.strategy != "temperature"),
        ("data", "max_bad_rows", "no source is streamed, and faulty rows of others are errors", not data.has_stream),
        ("train", "eps", f"train.optimizer {train.optimizer} has no eps", "lion" in train.optimizer),
        ("train", "max_skips", "train.on_bad_step stop skips no step", train.on_bad_step == "stop"),
        ("train", "lr_end", "train.schedule is constant", train.schedule == "constant"),
        ("train", "lr_ratio_magnitude", "adapter.kind lora has no magnitudes", kind == "lora"),
        ("train", "lr_ratio_B", "adapter.kind magnitude has no lora_B", kind == "magnitude"),
        ("eval", f"limit block method every at_start at_end {_BEST}", "eval.tasks is empty", evals.tasks == ()),
        ("eval", "block", "eval.limit is not set, so all examples are evaluated", evals.limit is None),
        ("eval", "best_metric patience", "eval.best_by is not set", evals.best_by is None),
        ("eval", _BEST, "eval.every is not set, so there is nothing to choose from", evals.best_by and not evals.every),
        ("eval", "tasks limit block method", "nothing is evaluated", evals.tasks != () and not evaluates),
        ("interference", "examples", "interference.every is not set", recipe.interference.every is None),
        ("memory", "offload_activations", "memory.checkpointing is false", not recipe.memory.checkpointing),
    ]
    if all(source.validation is not None or source.stream for source in data.mix):
        rows.append(("data", "validation_fraction", "every source names validation data or is streamed", True))
    if kind in ("none", "full"):
        why = f"adapter.kind {kind} has no adapter"
        rows.append(("adapter", " ".join(key for key in type(adapter).model_fields if key != "kind"), why, True))
        rows += [("train", "lr_ratio_B lr_ratio_magnitude", why, True), ("interference", "every", why, True)]
    if kind == "magnitude":
        keys = f"{_OF_FACTORS} dropout gates dtype resume_from"
        rows.append(("adapter", keys, "adapter.kind magnitude trains no lora_A and lora_B", True))
    if prune is not None:
        rows += [
            ("base.prune", "damping", "only base.prune.method sparsegpt has a damping", prune.method != "sparsegpt"),
            ("base.prune", "calibration", "base.prune.method magnitude needs none", prune.method == "magnitude"),
            ("base.prune", "group", f"pattern {prune.pattern} has its own groups", prune.pattern != "unstructured"),
            ("base.prune", "group", "sparsegpt compares within blocks of columns", prune.method == "sparsegpt"),
            ("base.prune", "sparsity", f"base.prune.pattern {prune.pattern} implies it", ":" in prune.pattern),
        ]
    for index, source in enumerate(data.mix):
        rows += [(f"data.mix[{index}]", keys, why, True) for keys, why, applies in _unused(source, recipe) if applies]
    return {f"{section}.{key}": why for section, keys, why, applies in rows if applies for key in keys.split()}


def _unused(source: SourceConfig, recipe: Recipe) -> Iterable[tuple[str, str, Any]]:
    """`unused` of a source: keys, reason, whether they have no effect."""
    task, own, format = source.task or "", source.source or "", source.format
    eight = task in COMMONSENSE_TASKS and format in ("auto", "commonsense170k")
    strategy = recipe.data.strategy
    return [
        ("limit", "the examples of a stream are not counted in advance (max_epochs limits it)", source.stream),
        ("size shuffle_window", "the source is not streamed", not source.stream),
        ("stream", f"task {task} is read into memory", task),
        ("chat columns template config data_files", f"task {task} has its own place and layout", task),
        ("format", f"task {task} has its own layout", task and not eight),
        ("revision", "the data comes from path", task and source.path is not None),
        ("path revision", f"{task} ships inside the package", task.startswith("demo/")),
        ("path", "it is for a task, and the data comes from source", own),
        ("revision config data_files", "source is not on the Hub", own and is_path(own)),
        ("split", "source is a single file", has_file_ending(own)),
        ("split", "source is a pattern", is_pattern(own)),
        ("chat", f"no chats are made of rows of format {format}", format not in ("auto", *CHAT_FORMATS)),
        ("format", "template makes prompt and completion", source.template is not None),
        ("weight", f"data.strategy is {strategy} and not weights", strategy != "weights"),
        ("loss_weight", "there is no other source", len(recipe.data.mix) == 1),
        ("loss_weight", "adapter.kind none trains nothing", recipe.adapter.kind == "none"),
    ]


def faults(recipe: Recipe) -> Iterator[Fault]:
    """Settings that would be ignored, and those that contradict others."""
    for key, why in ignored(recipe).items():
        yield key, f"would be ignored because {why}, got {shown(_at(recipe, key)[1])}. Fix: remove it."
    seen = set()
    for key, must, applies in [*_contradictions(recipe), *_of_sources(recipe)]:
        if applies and key not in seen:
            seen.add(key)
            yield key, f"must {must}, got {shown(_at(recipe, key)[1])}."
    names = [source.label for source in recipe.data.mix]
    by, tasks = recipe.eval.best_by, recipe.eval.tasks or names
    named = [(f"eval.tasks[{index}]", task, names) for index, task in enumerate(recipe.eval.tasks or ())]
    named += [] if by is None else [("eval.best_by", by, [MACRO, *tasks])]
    for key, name, among in named:
        if name not in among:
            yield key, f"must be one of {', '.join(among)}, got {name!r}.{nearest(name, among)}"


def ignored(recipe: Recipe) -> dict[str, str]:
    """Those of the `unused` settings that the recipe sets."""
    found = {}
    for key, why in unused(recipe).items():
        section, value = _at(recipe, key)
        if key.rpartition(".")[2] in section.model_fields_set and value is not None:
            found[key] = why
    return found


def _at(recipe: Recipe, key: str) -> tuple[Any, Any]:
    """The section that has a setting, and its value."""
    section: Any = None
    value: Any = recipe
    for step in re.findall(r"\w+", key):
        section, value = value, value[int(step)] if step.isdecimal() else getattr(value, step)
    return section, value


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str, Any]]:
    """Key, what it must be or do, whether it is not so."""
    model, base, adapter, data = recipe.model, recipe.base, recipe.adapter, recipe.data
    train, memory, prune, gates = recipe.train, recipe.memory, base.prune, adapter.gates
    full, nothing, plain = adapter.kind == "full", adapter.kind == "none", base.quant == "none"
    away, stream = base.residency != "device", data.has_stream
    measures = prune is not None and prune.method != "magnitude"
    matrices = adapter.also_train and adapter.also_train_rows == "all"
    is_pinned = not model.is_local and _COMMIT.fullmatch(model.revision or "")
    what = "be false unless model.revision is the commit (40 hex digits) of a model on the Hub"
    yield "model.trust_remote_code", what, model.trust_remote_code and not is_pinned
    yield "model.dtype", "not be float16 with adapter.also_train_rows all", model.dtype == "float16" and matrices
    if model.add_tokens:
        yield "model.add_tokens", "be empty with adapter.kind none, which trains no rows", nothing
        yield "model.add_tokens", "be empty with a base.prune.method that measures text", measures
        untrained = not full and not nothing and "embed_tokens" not in adapter.also_train
        yield "adapter.also_train", "hold embed_tokens with model.add_tokens: [embed_tokens, lm_head]", untrained
    elif adapter.also_train:
        yield "adapter.also_train_rows", "be all without model.add_tokens: there are no new rows", not matrices
    yield "base.residency", "be device with quant none, which packs no weights", plain and away
    yield "base.residency", "be device with a pruned base", prune is not None and away
    if prune is not None:
        n, is_n_of_m, m = prune.pattern.partition(":")
        late, no_share = prune.order == "quantize_first", not is_n_of_m and prune.sparsity is None
        yield "base.prune.pattern", "have n below m", is_n_of_m and int(n) >= int(m)
        yield "base.prune.sparsity", f"be set for pattern {n}: a share of zeros below 1", no_share
        yield "base.prune.order", "be prune_first with sparsegpt", late and prune.method == "sparsegpt"
        yield "base.prune.order", "be prune_first with base.quant none", late and plain
        mixed = measures and prune.calibration.text == "mix"
        yield "base.prune.calibration.text", "be a text file with a streamed source", mixed and stream
    yield "adapter.kind", f"not be full with base.quant {base.quant}: it trains 16-bit weights", full and not plain
    yield "adapter.kind", "not be full with base.prune: it would fill the zeros", full and prune is not None
    exact = plain and prune is None
    yield "adapter.init", "not be loftq without base.quant and base.prune", adapter.init == "loftq" and exact
    yield "adapter.mask", "be ignore without base.prune", adapter.mask == "keep" and prune is None
    if gates is not None:
        both_or_none = (gates.mean_rank is None) == (gates.parameters is None)
        largest = max(adapter.rank, *adapter.rank_pattern.values(), adapter.experts.rank or 1)
        keeps_all = adapter.resume_from is None and (gates.mean_rank or 0) >= largest
        yield "adapter.gates.mean_rank", "be set, or parameters, but not both", both_or_none
        yield "adapter.gates.mean_rank", "be less than adapter.rank, so that components are removed", keeps_all
        too_late = train.steps is not None and gates.length_fault(train.steps)
        yield "adapter.gates.anneal", f"end, after warmup, within the {train.steps} steps of the run", too_late
        what = "be null with adapter.gates: the best step may be before the budget is reached"
        yield "eval.best_by", what, recipe.eval.best_by
    unset = data.strategy == "temperature" and data.temperature is None
    yield "data.temperature", "be set with data.strategy temperature", unset
    what = "be truncate, drop or split with a stream, which is not read before training"
    yield "data.too_long", what, data.too_long == "error" and stream
    both_or_none = (train.steps is None) == (train.epochs is None)
    yield "train.steps", "be set, or epochs, but not both", both_or_none
    yield "train.steps", "be 0 with adapter.kind none, which trains nothing", nothing and train.steps != 0
    yield "train.epochs", "be null with a stream, whose length is not known (set train.steps)", train.epochs and stream
    both_or_none = (train.tokens_per_step is None) == (train.batch is None)
    yield "train.tokens_per_step", "be set, or batch, but not both", both_or_none
    yield "train.warmup", f"be at most train.steps ({train.steps})", train.steps and train.warmup > train.steps
    yield "train.lr_end", f"be at most train.lr ({train.lr:g})", train.lr_end > train.lr
    if train.micro_batch_tokens != "auto":
        micro, step = train.micro_batch_tokens, train.tokens_per_step
        yield "train.micro_batch_tokens", f"be at most train.tokens_per_step ({step})", step and micro > step
        yield "train.micro_batch_tokens", f"be at least data.max_length ({data.max_length})", micro < data.max_length
    if train.divides_base:
        what = "be auto or replicate with"
        yield "train.parallel", f"{what} adapter.kind full", full
        yield "train.parallel", f"{what} adapter.also_train", adapter.also_train
        yield "train.parallel", f"{what} adapter.init loftq", adapter.init == "loftq"
        yield "train.parallel", f"{what} base.residency {base.residency}", away
        yield "train.parallel", f"{what} memory.host_embeddings", memory.host_embeddings
    kept = away and not memory.checkpointing
    yield "memory.checkpointing", f"be true with base.residency {base.residency}", kept
    what = "be false with {}, which trains the embedding"
    yield "memory.host_embeddings", what.format("adapter.kind full"), memory.host_embeddings and full
    yield "memory.host_embeddings", what.format("adapter.also_train_rows all"), memory.host_embeddings and matrices


def _of_sources(recipe: Recipe) -> Iterator[tuple[str, str, Any]]:
    """`_contradictions` of the sources."""
    mix, strategy, by = recipe.data.mix, recipe.data.strategy, recipe.eval.best_by
    labels = [source.label for source in mix]
    is_shared = len(mix) > 1 and strategy in ("proportional", "temperature")
    for index, source in enumerate(mix):
        where, label = f"data.mix[{index}]", source.label
        yield f"{where}.source", "be set, or task, but not both", (source.source is None) == (source.task is None)
        yield f"{where}.weight", "be set with data.strategy weights", strategy == "weights" and source.weight is None
        yield f"{where}.name", f"differ from that of another source ({label})", label in labels[:index]
        # Parquet files say how many rows they have, and data sets of the Hub may
        is_counted = (is_shared or source.max_epochs) and (source.source or "").lower().endswith(FILE_SUFFIXES[1:])
        what = f"be given for files other than Parquet with data.strategy {strategy} or max_epochs"
        yield f"{where}.size", what, source.stream and source.size is None and is_counted
    yield "eval.best_by", "not be both the average and the name of a source", by == MACRO and MACRO in labels
