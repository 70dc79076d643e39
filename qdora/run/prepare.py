"""What happens before a run loads its model: read the data, plan, and check the recipe against both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor, float16
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.batches import StepLoader
from qdora.data.chats import chat_settings, set_chat_date
from qdora.data.example import Example
from qdora.data.mix import Mix, Source
from qdora.data.mix_plan import plan_mix, show_mix
from qdora.data.sources import (
    make_loader,
    micro_batch_tokens,
    num_steps_of,
    read_data,
    tokenized_mix,
)
from qdora.data.tokenize import ExampleTally, TokenizedExample, TokenizedSet
from qdora.errors import UserError, first_few, refuse
from qdora.evaluate.generation import generation_faults
from qdora.evaluate.loglikelihood import scoring_faults
from qdora.evaluate.suite import spread
from qdora.files.atomic import json_bytes
from qdora.files.run_directory import PLAN_FILE, RunDirectory, chat_date_of
from qdora.model.attention import context_length
from qdora.model.build_model import (
    Compute,
    choose_compute,
    find_source,
    find_tokenizer,
    find_tokenizer_source,
)
from qdora.model.load import load_config, with_quant
from qdora.model.quantised import form_of_config
from qdora.model.source import ModelSource
from qdora.model.tokens import untrained_rows
from qdora.plan.fit import within_budget, workload_of_data
from qdora.plan.plan import Plan
from qdora.plan.show import show_plan
from qdora.quant.codebooks import MXFP4
from qdora.recipe.data_settings import DataConfig
from qdora.recipe.recipe_file import missing_files
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.base import base_record, calibration_tokens
from qdora.train.distributed import Processes
from qdora.train.evals import evaluated_sources, selection_faults
from qdora.train.guards import Check
from qdora.train.logs import interference_faults
from qdora.train.passes import task_weights

logger = logging.getLogger("qdora")


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run whose recipe, data and plan have passed; only checks of the loaded model are left."""

    given: Recipe  # with the commit of a base from the Hub; the run directory keeps it
    recipe: Recipe  # that runs: `memory.budget: auto` may have changed it
    source: ModelSource
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    compute: Compute
    loader: StepLoader
    validation: dict[str, list[Example]]  # by source
    num_steps: int
    mix_plan: dict[str, Any]  # mix.json
    memory_plan: Plan | None  # None without memory.budget
    chat_date: str  # the day that chat templates print, YYYY-MM-DD: the run started on it
    calibration: Tensor | None  # token ids on which compression measures inputs, (sequences, length) int64


def prepare(recipe: Recipe, directory: Path, processes: Processes, *, where: str, force: bool) -> PreparedRun:
    """Read the data, plan the run, and check both against the machine. Loads no weights and writes only caches.

    With `force` a plan over memory.budget is a warning.
    """
    refuse(missing_files(recipe, where))
    compute = choose_compute(recipe.model.dtype)
    # Without a plan the weights are fetched first: a missing model fails before the data is read.
    source = find_source(recipe, weights=recipe.memory.budget is None)
    tokenizer_source = find_tokenizer_source(recipe, source)
    # The commits that were found on the Hub; local sources have none.
    of_tokenizer = None if tokenizer_source is source else tokenizer_source.revision
    recipe = with_settings(recipe, model={"revision": source.revision, "tokenizer_revision": of_tokenizer})
    tokenizer = find_tokenizer(recipe, source, tokenizer_source)
    config = load_config(source)
    stored = form_of_config(config)["quant"]
    recipe = with_quant(recipe, config)
    if recipe.base.is_made_once and stored not in ("none", MXFP4):
        raise UserError(f"model.source: is in {stored}; base.prune and base.method gptq need full precision.")
    chat_date = processes.gather(chat_date_of(directory))[0]
    set_chat_date(tokenizer, chat_date)

    def read() -> tuple[Mix, dict[str, list[Example]]]:
        train, validation = read_data(recipe.data)
        return tokenized_mix(recipe, tokenizer, train), validation

    # The others wait for the first process, and then find what it has kept.
    mix, validation = processes.first(read) or read()
    loader = make_loader(recipe, mix, tokenizer, processes.rank, processes.size)
    num_steps = num_steps_of(recipe, loader)
    mix_plan = plan_mix(loader, num_steps)
    scored = scored_examples(recipe, validation, num_steps)

    def unscored() -> list[str]:
        """What the first evaluation would refuse, which may come only after many steps."""
        context = context_length(config)
        found = (scoring_faults(tokenizer, examples, context) for examples in scored.values())
        return [f"validation data: {fault}" for faults in found for fault in faults]

    evaluated = {name: validation[name] for name in evaluated_sources(recipe, validation) if name in validation}
    faults = [*_machine_faults(recipe, compute), *processes.from_first(unscored)]
    if recipe.eval.method == "generate":
        faults += generation_faults(evaluated)
    warmup = recipe.train.warmup
    if recipe.train.epochs is not None and isinstance(warmup, int) and warmup > num_steps:
        faults.append(f"train.warmup: must be at most the {num_steps:,} steps of train.epochs, got {warmup:,}.")
    faults += selection_faults(recipe, evaluated, num_steps)
    faults += interference_faults(recipe, validation)
    task_weights(recipe, loader)  # refuses two weights of one task
    num_rows = config.get_text_config().vocab_size + len(recipe.model.add_tokens)
    for part in mix.sets:
        if isinstance(part, TokenizedSet):  # not of streams
            id = max(int(example.input_ids.max()) for example in part.examples)
            if id >= num_rows:
                text = f"source {part.name!r} has token id {id:,}, and the model's embedding has {num_rows:,} rows."
                faults.append(f"model.tokenizer: {text}")
    unknown = [name for name in recipe.eval.tasks or () if name not in validation]
    faults += [f"eval.tasks: {name!r} has no validation data in this mix." for name in unknown]
    missing = [name for name in recipe.trackers if find_spec(name) is None]
    faults += [f"trackers: {name} is not installed. Fix: pip install 'qdora[{name}]'" for name in missing]
    refuse(faults)
    workload = workload_of_data(recipe, mix, tokenizer)
    applied, memory_plan = within_budget(recipe, compute, workload, force=force, processes=processes)
    if memory_plan is not None:
        source = find_source(applied)
        loader.batching.max_tokens = micro_batch_tokens(applied)
    if processes.size > 1:
        facts: dict[str, Any] = {"training data": loader.fingerprint, "number of steps": num_steps}
        facts["validation data"] = {name: list(map(repr, examples)) for name, examples in validation.items()}
        facts["base"] = base_record(source)
        mine = {what: hashlib.sha256(json_bytes(value)).hexdigest() for what, value in facts.items()}
        first, *others = processes.gather(mine)
        for rank, theirs in enumerate(others, 1):
            if different := [what for what in facts if theirs[what] != first[what]]:
                raise UserError(f"process {rank} has another {' and another '.join(different)} than process 0.")
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
        calibration=calibration_tokens(applied, tokenizer, mix, config),
    )


def _machine_faults(recipe: Recipe, compute: Compute) -> list[str]:
    faults = []
    if recipe.base.residency == "host" and compute.device.type != "cuda":
        faults.append("base.residency: host needs a GPU.")
    if recipe.memory.offload_activations and compute.device.type != "cuda":
        faults.append("memory.offload_activations: needs a GPU.")
    if recipe.adapter.kind == "full" and compute.dtype == float16:
        faults.append("model.dtype: must be bfloat16 or float32 with adapter.kind full, got float16.")
    return faults


def scored_examples(
    recipe: Recipe, validation: dict[str, list[Example]], num_steps: int
) -> dict[str, Sequence[Example]]:
    """The validation examples that the run's evaluations score, by source; none without evaluations."""
    asked = recipe.eval
    if not (asked.at_start or asked.at_end or (asked.every or num_steps + 1) <= num_steps):
        return {}
    names = evaluated_sources(recipe, validation)
    return {name: spread(validation.get(name, ()), asked.limit, asked.block) for name in names}


_NEAR = 4  # a stop token among the last tokens of an answer ends it: some templates write a line end behind it
_MOST_LOOKED_AT = 1000


def show_plans(prepared: PreparedRun, run: RunDirectory, processes: Processes, console: Console) -> None:
    """Show and keep what the run will see of its data and, with memory.budget, the memory that it will need."""
    recipe, sources, asked = prepared.recipe, prepared.loader.tokenised, prepared.recipe.eval
    mix, memory = prepared.mix_plan, prepared.memory_plan
    show_mix(console, mix)
    if memory is not None:
        show_plan(console, memory)

    def keep() -> None:
        run.write_json("mix.json", mix)
        if memory is not None:
            run.write_json(PLAN_FILE, memory.to_dict())
        checks = example_checks(sources, prepared.tokenizer, recipe.data)
        if asked.tasks is None and not prepared.validation and (asked.every or asked.at_start or asked.at_end):
            checks.append(Check("warning", "no source has validation data, so nothing is evaluated."))
        if recipe.adapter.kind != "none":
            scored = scored_examples(recipe, prepared.validation, prepared.num_steps)
            checks += repeated_checks(sources, scored, prepared.tokenizer, recipe.data)
        for check in checks:
            check.log()

    processes.first(keep)


def _some(items: Sequence[Any]) -> Sequence[Any]:
    return items[:: -(-len(items) // _MOST_LOOKED_AT) or 1]


def example_checks(sources: Sequence[Source], tokenizer: Any, data: DataConfig) -> list[Check]:
    """Two numbers for each source: answers that teach no end (some are looked at), examples that teach nothing."""
    stops = sorted(chat_settings(tokenizer).stop_ids or ())
    names = ", ".join(tokenizer.decode([id]) for id in stops) or "the model names none"
    checks = []
    for part in sources:
        examples = part.examples
        ends = [end for example in _some(examples) for end in _ends(example, stops, data)]
        if ends:
            missing = ends.count(False)
            text = f"{part.name}: {missing:,} of {len(ends):,} answers do not end with a stop token ({names})."
            checks.append(Check("warning" if 2 * missing > len(ends) else "passed", text))
        empty = sum(not example.loss_mask.any() for example in examples)
        text = f"{part.name}: {empty:,} of {len(examples):,} examples have no token in the loss."
        checks.append(Check("warning" if empty else "passed", text))
    return checks


def _ends(example: TokenizedExample, stops: Sequence[int], data: DataConfig) -> list[bool]:
    """Whether a stop token ends each stretch of labelled tokens; none of plain text, whose pieces end anywhere."""
    ids, mask = example.input_ids, example.loss_mask
    if (data.loss_on != "all" or data.too_long == "split") and mask.sum() >= len(mask) - 2:
        return []  # all but a beginning mark is learnt
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    return [bool(np.isin(ids[max(begin, end - _NEAR) : end], stops).any()) for begin, end in edges]


def repeated_checks(
    sources: Sequence[Source], scored: Mapping[str, Sequence[Example]], tokenizer: Any, data: DataConfig
) -> list[Check]:
    """One number for each source with validation examples: those that are training examples, too, of any source."""
    looked_up: dict[str, list[list[bytes]]] = {}
    for name, examples in scored.items():
        tally, some = ExampleTally(name, data, tokenizer), _some(examples)
        with suppress(UserError):  # such as chats without a template, an error only where they are scored
            rows = tally.add(some)
            parts = [
                [
                    each.input_ids.tobytes()
                    for each in row
                    if isinstance(each, TokenizedExample) and not each.is_cut
                ]
                for row in rows
            ]
            looked_up[name] = [
                whole for whole, row in zip(parts, rows, strict=True) if len(whole) == len(row) > 0
            ]
    wanted = {part for found in looked_up.values() for parts in found for part in parts}
    trained = wanted.intersection(
        example.input_ids.tobytes() for source in sources for example in source.examples
    )
    numbers = {name: sum(trained.issuperset(parts) for parts in found) for name, found in looked_up.items()}
    text = "{}: of {:,} validation examples looked up, {:,} are training examples, too."
    return [
        Check("warning", text.format(name, len(looked_up[name]), number))
        for name, number in numbers.items()
        if number
    ]


def token_checks(model: PreTrainedModel, sources: Sequence[Source], tokenizer: Any) -> list[Check]:
    """A warning with the tokens of the data that cannot be learnt; some examples of each source are looked at."""
    examples = [example for part in sources for example in _some(part.examples)]
    if not examples or not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    read = np.concatenate([example.input_ids for example in examples])
    learnt = read[np.concatenate([example.loss_mask for example in examples])]
    ids = untrained_rows(model, *(np.unique(each).tolist() for each in (read, learnt)))
    if not ids:
        return []
    names = first_few(tokenizer.convert_ids_to_tokens(ids), 8)
    text = f"the training data has tokens that the base never learnt: {names}. Their rows are zero, and an adapter "
    text += "does not change them. Fix: name the instruct version in model.source, or train them "
    return [Check("warning", f"{text}(adapter.also_train_rows: all).")]
