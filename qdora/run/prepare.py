"""What happens before a run loads its model: read the data, plan, and check the recipe against both."""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from torch import Tensor, float16
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qdora.data.batches import StepLoader
from qdora.data.chat_template import set_chat_date
from qdora.data.example import Example
from qdora.data.mix import Mix
from qdora.data.mix_plan import MixPlan, keep_mix, mix_facts, plan_mix, show_mix
from qdora.data.sources import (
    check_first_rows,
    has_chats,
    make_loader,
    micro_batch_tokens,
    num_steps_of,
    read_data,
    tokenized_mix,
    tokenized_sources,
)
from qdora.errors import HubFailure, UserError
from qdora.evaluate.generation import generation_faults
from qdora.evaluate.loglikelihood import scoring_faults
from qdora.evaluate.suite import spread
from qdora.files.atomic import json_bytes
from qdora.files.run_directory import PLAN_FILE, RunDirectory, chat_date_of, unharmed
from qdora.model.attention import positions_of
from qdora.model.build_model import (
    Compute,
    choose_compute,
    find_model,
    find_source,
    find_tokenizer,
    find_tokenizer_source,
    token_ids,
)
from qdora.model.load import load_config
from qdora.model.source import ModelSource
from qdora.plan.fit import within_budget, workload_of_data
from qdora.plan.plan import Plan
from qdora.plan.show import show_plan
from qdora.recipe.recipe_file import missing_files
from qdora.recipe.settings import Recipe
from qdora.run.base import base_record, calibration_tokens, pinned
from qdora.run.data_checks import begin_checks, context_warnings, data_checks, repeated_checks, vocabulary_faults
from qdora.train.checks import CHECKS_FILE, Check
from qdora.train.distributed import Processes
from qdora.train.evals import evaluated_sources, selection_faults
from qdora.train.interference import interference_faults
from qdora.train.loss import check_router_loss
from qdora.train.passes import task_weight_faults

logger = logging.getLogger("qdora")


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that passed all checks and can start."""

    given: Recipe
    """The recipe as it was given, with the commit of a base from the Hub; the run directory keeps it."""
    recipe: Recipe
    """The recipe that runs: `memory.budget: auto` may have changed it."""
    source: ModelSource
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    compute: Compute
    loader: StepLoader
    validation: dict[str, list[Example]]
    """Source -> its validation examples."""
    num_steps: int
    mix_plan: MixPlan
    memory_plan: Plan | None
    """None without memory.budget."""
    chat_date: str
    """The day that chat templates print, YYYY-MM-DD: the run started on it."""
    has_chats: bool
    calibration: Tensor | None
    """Token ids on which pruning measures inputs, (sequences, length) int64; None if it measures none."""


def prepare(recipe: Recipe, directory: Path, processes: Processes, *, where: str, force: bool) -> PreparedRun:
    """Read the data, plan the run, and check both against the machine. Loads no weights and writes nothing.

    Args:
        directory: The run directory, for the day on which an earlier start began.
        where: Name of the recipe in messages.
        force: Only warn if the plan is over memory.budget.
    Raises:
        UserError: All faults of the recipe, its data or the plan.
    """
    if faults := missing_files(recipe, where):
        raise UserError(*faults)
    compute = choose_compute(recipe.model.dtype)
    # Without a plan the weights are fetched first: a missing model fails before the data is read.
    source = find_source(recipe, weights=recipe.memory.budget is None)
    tokenizer_source = find_tokenizer_source(recipe, source)
    recipe = pinned(recipe, source, tokenizer_source)
    tokenizer = find_tokenizer(recipe, source, tokenizer_source)
    config = load_config(source)
    check_router_loss(recipe, config)
    chat_date = processes.gather(chat_date_of(directory))[0]
    set_chat_date(tokenizer, chat_date)

    def read() -> tuple[Mix, dict[str, list[Example]], bool]:
        train, validation = read_data(recipe.data)
        mix = tokenized_mix(recipe, tokenizer, train)
        return mix, validation, has_chats(mix, train)

    # The others wait for the first process, and then find what it has kept.
    mix, validation, chats = processes.first(read) or read()
    loader = make_loader(recipe, mix, tokenizer, processes.rank, processes.size)
    num_steps = num_steps_of(recipe, loader)
    mix_plan = plan_mix(mix, loader, num_steps)
    scored = scored_examples(recipe, validation, num_steps)
    unscored = processes.from_first(lambda: _scoring_faults(recipe, scored, tokenizer, positions_of(config)))
    faults = [*_machine_faults(recipe, compute), *unscored]
    faults += _data_faults(recipe, validation, num_steps, loader, config)
    faults += [
        f"trackers: {name} is not installed. Fix: pip install 'qdora[{name}]'"
        for name in recipe.trackers
        if find_spec(name) is None
    ]
    if faults:
        raise UserError(*faults)
    workload = workload_of_data(recipe, mix, tokenizer)
    applied, memory_plan = within_budget(recipe, compute, workload, force=force, processes=processes)
    if memory_plan is not None:
        source = find_source(applied)
        loader.batching.max_tokens = micro_batch_tokens(applied)
    _check_alike(processes, loader, validation, num_steps, source)
    return PreparedRun(
        given=recipe,
        recipe=applied,
        source=source,
        config=config,
        tokenizer=tokenizer,
        compute=compute,
        loader=loader,
        validation=validation,
        num_steps=num_steps,
        mix_plan=mix_plan,
        memory_plan=memory_plan,
        chat_date=chat_date,
        has_chats=chats,
        calibration=calibration_tokens(applied, tokenizer, mix, config),
    )


def _machine_faults(recipe: Recipe, compute: Compute) -> list[str]:
    faults = []
    if compute.dtype == float16 and recipe.adapter.kind == "full":
        need = "must be bfloat16 or float32 with adapter.kind full, which trains the weights"
        faults.append(f"model.dtype: got float16, {need}.")
    if compute.device.type != "cuda":
        if recipe.base.residency == "host":
            faults.append("base.residency: got host, must be device on a machine without a GPU.")
        faults += [
            f"memory.{name}: got true, must be false on a machine without a GPU."
            for name in ("offload_activations", "host_embeddings")
            if getattr(recipe.memory, name)
        ]
    return faults


def _data_faults(
    recipe: Recipe,
    validation: dict[str, list[Example]],
    num_steps: int,
    loader: StepLoader,
    config: PreTrainedConfig,
) -> list[str]:
    """All settings that do not fit the data."""
    faults, asked = [], recipe.eval
    evaluated = {n: validation[n] for n in evaluated_sources(recipe, validation) if n in validation}
    if asked.method == "generate":
        faults += generation_faults(evaluated)
    warmup = recipe.train.warmup
    if recipe.train.epochs is not None and isinstance(warmup, int) and warmup > num_steps:
        faults.append(f"train.warmup: must be at most the {num_steps:,} steps of train.epochs, got {warmup:,}.")
    faults += selection_faults(recipe, evaluated, num_steps)
    if asked.every is not None and asked.tasks is None and not validation:
        fix = "Fix: set validation in a source, or eval.every: null."
        faults.append(f"eval.every: got {asked.every}, but no source has validation data. {fix}")
    faults += interference_faults(recipe, validation)
    faults += task_weight_faults(recipe, loader)
    faults += vocabulary_faults(loader.tokenised, config, len(recipe.model.add_tokens))
    known = f"must be one of {', '.join(validation)}." if validation else "nor has another source."
    return faults + [
        f"eval.tasks: {name!r} has no validation data in this mix, {known} Fix: set validation in this source."
        for name in asked.tasks or ()
        if name not in validation
    ]


def scored_examples(
    recipe: Recipe, validation: dict[str, list[Example]], num_steps: int
) -> dict[str, Sequence[Example]]:
    """The validation examples that the run's evaluations score, by source; none without evaluations."""
    asked = recipe.eval
    if not (asked.at_start or asked.at_end or (asked.every or num_steps + 1) <= num_steps):
        return {}
    names = evaluated_sources(recipe, validation)
    return {name: spread(validation.get(name, ()), asked.limit, asked.block) for name in names}


def _scoring_faults(
    recipe: Recipe, scored: Mapping[str, Sequence[Example]], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> list[str]:
    """What the first evaluation would refuse, which may come only after many steps."""
    files = {source.label: source.validation for source in recipe.data.mix}
    return [
        f"validation data{f' ({files[name]})' if files[name] else ''}: {fault}"
        for name, examples in scored.items()
        for fault in scoring_faults(tokenizer, examples, context)
    ]


def _check_alike(
    processes: Processes,
    loader: StepLoader,
    validation: Mapping[str, Sequence[Example]],
    num_steps: int,
    source: ModelSource,
) -> None:
    """UserError in all processes if one of them, perhaps on another machine, has other data or another base."""
    if processes.size == 1:
        return
    mine = {
        "training data": loader.fingerprint,
        "validation data": {task: list(map(repr, examples)) for task, examples in validation.items()},
        "number of steps": num_steps,
        "base": base_record(source),
    }
    per_rank = processes.gather({what: hashlib.sha256(json_bytes(value)).hexdigest() for what, value in mine.items()})
    others = [rank for rank, theirs in enumerate(per_rank) if theirs != per_rank[0]]
    if others:
        different = " and ".join(f"another {what}" for what in mine if per_rank[others[0]][what] != per_rank[0][what])
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        where = processes.gather(socket.gethostname())
        raise UserError(
            f"process {others[0]}{more} on {where[others[0]]} has {different} than process 0 on {where[0]}. Fix: give "
            "all machines the same files, settings and versions."
        )


def show_plans(prepared: PreparedRun, run: RunDirectory, processes: Processes, console: Console) -> None:
    """Show and keep what the run will see of its data and, with memory.budget, the memory that it will need."""
    mix, memory = prepared.mix_plan, prepared.memory_plan
    show_mix(console, mix)
    processes.first(lambda: keep_mix(run, mix))
    processes.first(unharmed(CHECKS_FILE)(lambda: _tell_data_checks(prepared, run)))
    name = prepared.recipe.train.optimizer
    if processes.is_first and prepared.compute.device.type == "cpu" and name.endswith("_8bit"):
        logger.info("train.optimizer %s is slow on a CPU; adamw is faster.", name)
    if memory is not None:
        show_plan(console, memory)
        processes.first(lambda: run.write_json(PLAN_FILE, memory.to_dict()))


def _tell_data_checks(prepared: PreparedRun, run: RunDirectory) -> None:
    recipe, sources = prepared.recipe, prepared.loader.tokenised
    checks = data_checks(sources, prepared.mix_plan, prepared.tokenizer, recipe.data)
    if unseen := unseen_tokens(prepared):
        names = ", ".join(map(repr, unseen))
        text = f"model.add_tokens: the training data does not have {names}, so the model learns nothing of it."
        checks.append(Check("warning", text))
    checks += [Check("warning", text) for text in context_warnings(sources, prepared.config)]
    if recipe.adapter.kind != "none":
        scored = scored_examples(recipe, prepared.validation, prepared.num_steps)
        checks += repeated_checks(sources, scored, prepared.tokenizer, recipe.data)
    checks += _evaluation_checks(prepared)
    for text in mix_facts(prepared.mix_plan):
        logger.info("%s", text)
    begin_checks(run, checks, trains=recipe.adapter.kind != "none")


def _evaluation_checks(prepared: PreparedRun) -> list[Check]:
    """A warning if no source can be evaluated though the recipe asks for it; sources that are left out are logged."""
    data, asked = prepared.recipe.data, prepared.recipe.eval
    missing = [source.label for source in data.mix if source.label not in prepared.validation]
    if asked.tasks is not None or not missing or not (asked.every or asked.at_start or asked.at_end):
        return []
    if not prepared.validation:
        fix = "Fix: set validation in a source, or eval.tasks: []."
        return [Check("warning", f"no source has validation data, so nothing is evaluated. {fix}")]
    logger.info("Not evaluated, since there is no validation data: %s.", ", ".join(missing))
    return []


def unseen_tokens(prepared: PreparedRun) -> list[str]:
    """The new tokens that no training example has; none where a source is streamed."""
    tokens = prepared.recipe.model.add_tokens
    names = dict(zip(token_ids(prepared.recipe, prepared.tokenizer), tokens, strict=True))
    if not names or prepared.loader.streams:
        return []
    missing, first = set(names), min(names)
    for example in (example for part in prepared.loader.tokenised for example in part.first()):
        missing.difference_update(example.input_ids[example.input_ids >= first].tolist())
        if not missing:
            break
    return [names[id] for id in sorted(missing)]


def check_data(recipe: Recipe, names: Collection[str]) -> None:
    """Check some sources as a run does at its start, for `qdora validate`.

    The first rows of each are read. With data.too_long: error, all rows are read and tokenised; `data.cache` keeps the
    tokens, and without a tokenizer a note says that no lengths were checked.
    """
    check_first_rows(recipe.data, names)
    if recipe.data.too_long != "error":
        return
    try:
        _, tokenizer = find_model(recipe, weights=False)
    except HubFailure as error:  # anything else a run would refuse, too
        logger.info("The lengths of the examples are not checked: there is no tokenizer: %s", error.faults[0])
        return
    train, _ = read_data(recipe.data, names)
    tokenized_sources(recipe.data, tokenizer, train, names)
