"""qdora eval and qdora generate: score a run, an export, an adapter or a bare model, or let it answer."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from qdora.data.chats import prompt_text, require_chat_template, set_chat_date, set_chat_settings
from qdora.data.example import Example, Messages, Tools, Turn
from qdora.data.files import read_rows
from qdora.data.formats import asked_chat
from qdora.data.sources import (
    given_source,
    has_splits,
    open_source,
    place_of,
    run_examples,
    task_examples,
    to_score,
    trained_on,
)
from qdora.data.tokenize import encode_batch, special_prefix, with_prefix
from qdora.errors import UserError, not_one_of
from qdora.evaluate.generation import evaluate_generated, generate, generation_faults, generation_table
from qdora.evaluate.harness import evaluate_harness, find_harness_tasks, harness_table
from qdora.evaluate.perplexity import read_texts, text_perplexity
from qdora.evaluate.suite import compare_table, evaluate
from qdora.files.console import bar, consoles
from qdora.files.machine import check_gpu, user_path
from qdora.files.run_directory import chat_date_of, open_run, unharmed
from qdora.memory.oom import keep_freed_memory
from qdora.model.attention import context_length
from qdora.model.tokens import stop_ids_of_model
from qdora.recipe.data_settings import COMMONSENSE_TASKS, TASKS
from qdora.recipe.options import EvalOptions, Sampling
from qdora.recipe.recipe_file import load_recipe, recipe_of_run
from qdora.recipe.settings import Recipe
from qdora.run.load_run import LoadedModel, check_target, is_run, load_target
from qdora.train.evals import state_step, stored_results

logger = logging.getLogger("qdora")

SPLITS = ("validation", "test", "train")
Write = Callable[[str], None]


# qdora eval


def check_options(options: EvalOptions, target: str) -> None:
    """Raise UserError with all options that do not fit each other or the target."""
    only = None if reads_tasks(options) else "--harness" if options.harness else "--text"
    named, path = data_tasks(options), user_path(options.data or ".")
    rules = {
        f"--like: {target} is a run and has data of its own.": options.like is not None and is_run(target),
        "--harness-include: is used only with --harness.": options.harness_include is not None and not options.harness,
        "--step: is not used with --base.": options.step is not None and options.base,
        "--limit: counts examples of tasks, got only --text.": only == "--text" and options.limit is not None,
        f"--method: is for examples of tasks, got only {only}.": only is not None and options.method is not None,
        f"--data: must be a folder of <task>/<split> files with --tasks {', '.join(named)}, got {path}.": (
            bool(named) and not path.is_dir()
        ),
        f"--split: {path} has no splits, being one file.": options.split is not None and split_read(options) is None,
        "--tasks: with --data names one source.": own_data(options) is not None and len(options.tasks) > 1,
    }
    faults = [text for text, is_wrong in rules.items() if is_wrong]
    if own_data(options) is None and options.split not in (None, *SPLITS):
        faults.append(not_one_of("--split", options.split, SPLITS))
    if faults:
        raise UserError(*faults)


def reads_tasks(options: EvalOptions) -> bool:
    """Whether examples of tasks are scored, not only texts or tasks of the harness."""
    return bool(options.tasks) or options.data is not None or not (options.text or options.harness)


def data_tasks(options: EvalOptions) -> list[str]:
    """The tasks whose folder `data` is; empty if it is own data."""
    return [] if options.data is None else sorted(set(options.tasks) & set(COMMONSENSE_TASKS))


def own_data(options: EvalOptions) -> str | None:
    """The place (`place_of`) of own data."""
    return None if options.data is None or data_tasks(options) else place_of(options.data)


def split_read(options: EvalOptions) -> str | None:
    """The split that is scored; None for own data without splits."""
    place = own_data(options)
    return None if place is not None and not has_splits(place) else options.split or "validation"


def kept_as(options: EvalOptions, recipe: Recipe | None) -> str:
    """Name of what is evaluated, in the names of the kept files: the split, and what differs from the run's eval."""
    split = split_read(options)
    parts = [] if split is None else [split]
    own = None if recipe is None else recipe.eval
    same_tasks = own is not None and options.data is None and set(options.tasks) == set(own.tasks or ())
    if options.tasks and not same_tasks:
        parts.append(_in_a_name(options.tasks))
    if options.data is not None:
        place = place_of(options.data)
        parts.append(f"data-{_in_a_name([Path(place).name])}-{_of_places([place])}")
    if options.limit is not None and (own is None or options.limit != own.limit):
        parts.append(f"limit-{options.limit}")
    return "-".join(parts)


def evaluate_target(
    target: str, options: EvalOptions = EvalOptions(), *, console: Console | None = None
) -> dict[str, Any]:
    """Evaluate a run, an adapter, a model directory, a Hub id or builtin; returns JSON values.

    A run keeps the results in its eval/.
    """
    check_options(options, target)
    texts = read_texts(options.text)
    check_gpu()
    check_target(target, base_model=options.base_model, quant=options.quant, verb="eval")
    if not (is_run(target) or options.like or options.tasks or options.data or options.text or options.harness):
        fix = "Fix: add --tasks, --data, --text, --harness or --like RUN."
        raise UserError(f"eval: {target} is not a run (it has no recipe.yaml), so it has no data. {fix}")
    progress, results = consoles(console)
    keep_freed_memory()
    data_run = Path(target) if is_run(target) else options.like
    recipe_in = recipe_of_run if is_run(target) else load_recipe  # of --like only the data is used
    recipe = None if data_run is None else recipe_in(open_run(data_run).recipe_file)
    harness = find_harness_tasks(options.harness, options.harness_include) if options.harness else None
    generates = (options.method or ("loglikelihood" if recipe is None else recipe.eval.method)) == "generate"
    examples = _examples(options, recipe, by_name=generates)
    if generates and (faults := generation_faults(examples)):
        raise UserError(*faults)
    split, name = split_read(options), kept_as(options, recipe)
    scored: dict[str, Any] = {"limit": options.limit, "block": None}
    if recipe is not None and options.limit in (None, recipe.eval.limit):  # as during training
        scored = {"limit": recipe.eval.limit, "block": recipe.eval.block}
    which: dict[str, Any] = {"step": options.step, "base_only": options.base}
    loaded = load_target(target, base_model=options.base_model, quant=options.quant, verb="eval", **which)
    model, tokenizer, label = loaded.model, loaded.tokenizer, loaded.label
    if options.like is not None and recipe is not None:
        set_chat_date(tokenizer, chat_date_of(options.like))
        set_chat_settings(tokenizer, template_kwargs=dict(recipe.data.template_kwargs))
    shown = "adapter" if loaded.run is not None and label == "final" else label
    document: dict[str, Any] = {"target": target, "label": label, "split": split}
    if examples:
        beside = {}
        if recipe is not None and options.like is not None and options.data is None and split == "validation":
            beside = stored_results(open_run(options.like), recipe.adapter.start_label)
        with bar(progress, f"evaluating {label}") as update:
            found = evaluate(model, tokenizer, examples, **scored, progress=update)
        results.print(compare_table(beside | {shown: found}))
        read = {} if options.data is None else {"data": place_of(options.data)}
        _keep(loaded, name, read | found.to_dict(per_example=True))
        document["evaluation"] = found.to_dict()
        document["beside"] = {label: stored.to_dict() for label, stored in beside.items()}
    if examples and generates:
        with bar(progress, f"answers of {label}") as update:
            answers = evaluate_generated(model, tokenizer, examples, **scored, progress=update)
        results.print(generation_table({shown: answers}))
        _keep(loaded, f"{name}-generated", answers.to_dict(per_example=True))
        document["generation"] = answers.to_dict()
    if texts:
        document["perplexity"] = perplexity = text_perplexity(model, tokenizer, texts)
        results.print(f"perplexity {perplexity['perplexity']:.3f} over {perplexity['num_tokens']:,} tokens")
        places = _of_places([str(file.resolve()) for file in options.text])
        text_name = f"perplexity-{_in_a_name([file.name for file in options.text])}-{places}"
        _keep(loaded, text_name, perplexity | {"texts": [str(file) for file in options.text]})
    if harness is not None:
        document["harness"] = evaluate_harness(model, tokenizer, harness, limit=options.limit)
        results.print(harness_table(document["harness"]))
        limited = "" if options.limit is None else f"-limit-{options.limit}"
        _keep(loaded, f"harness-{_in_a_name(options.harness)}{limited}", document["harness"] | {"limit": options.limit})
    return document


def _of_places(places: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(places).encode()).hexdigest()[:8]


def _in_a_name(what: Sequence[str]) -> str:
    joined = "+".join(re.sub(r"[^\w.]+", "-", name) for name in what)
    # File systems end at 255 bytes
    return joined if len(joined) <= 100 else hashlib.sha256(joined.encode()).hexdigest()[:16]


def _keep(loaded: LoadedModel, name: str, document: dict[str, Any]) -> None:
    if loaded.run is not None:
        file = f"eval/{loaded.label}-{name}.json"
        with unharmed(str(loaded.run.path / file)):
            loaded.run.write_json(file, {"step": state_step(loaded.run, loaded.label), **document})


def _examples(options: EvalOptions, recipe: Recipe | None, *, by_name: bool) -> dict[str, list[Example]]:
    if not reads_tasks(options):
        return {}
    if (place := own_data(options)) is not None:
        return _own_examples(options, place, recipe)
    asked, split, elsewhere = options.tasks, options.split or "validation", data_tasks(options)
    if not asked:
        assert recipe is not None  # evaluate_target
        found = run_examples(recipe, split, recipe.eval.tasks or None)
        if not found:
            raise UserError(f"--split: the run has no {split} examples. Fix: name other data with --data.")
        return found
    own = [task for task in asked if task not in elsewhere]
    known = {} if recipe is None else run_examples(recipe, split, own)
    sources = [] if recipe is None else [source.label for source in recipe.data.mix]
    names = list(dict.fromkeys([*sources, *TASKS]))
    faults = [not_one_of("--tasks", task, names) for task in asked if task not in names]
    faults += [
        f"--tasks: {task} has no {split} examples in this run. Fix: name other data with --data."
        for task in own
        if task in sources and task not in known
    ]
    if faults:
        raise UserError(*faults)
    folder = None if options.data is None else user_path(options.data)
    return {
        task: known[task] if task in known else task_examples(task, split=split, data=folder, by_name=by_name)
        for task in asked
    }


def _own_examples(options: EvalOptions, place: str, recipe: Recipe | None) -> dict[str, list[Example]]:
    mix = () if recipe is None else recipe.data.mix
    labels = [source.label for source in mix if source.source is not None]
    like = next(iter(options.tasks), None)
    if like is not None and like not in labels:
        raise UserError(not_one_of("--tasks: with --data names a source of the run", like, labels))
    split = split_read(options) or "train"  # a file is all one split
    source = given_source(place, mix, like)
    found = open_source(source, split)
    for label in [] if options.base else trained_on(source, split, mix):
        logger.warning("The run was trained on %s (source %s). The scores say nothing of new data.", place, label)
    return {source.label: list(found) if recipe is None else to_score(found, recipe.data)}


# qdora generate


def generate_from(
    target: str,
    prompt: str,
    sampling: Sampling = Sampling(),
    *,
    system: str | None = None,
    raw: bool = False,
    write: Write = lambda text: None,
    **which: Any,
) -> dict[str, Any]:
    """Load a run, an adapter or a model and let it answer a prompt; `raw` skips the chat template.

    `write` gets each piece of text as soon as it is known; `which` are options of `load_target`. Returns JSON values.
    """
    if not prompt:
        raise UserError("--prompt: is empty.")
    if system is not None and raw:
        raise UserError("--system: is not used with --raw, which skips the chat template.")
    keep_freed_memory()
    loaded = load_target(target, verb="generate", **which)
    ids = prompt_ids(loaded.tokenizer, prompt, system, raw)
    found = _answer(loaded, ids, sampling, write, where="--prompt")
    return {"target": target, "label": loaded.label, "prompt": prompt, **found}


def answer_chats(
    target: str, file: str, sampling: Sampling = Sampling(), *, write: Write = lambda text: None, **which: Any
) -> dict[str, Any]:
    """As `generate_from`, for each conversation of a data file (messages or sharegpt); returns `answers` in order."""
    chats = read_chats(user_path(file))
    keep_freed_memory()
    loaded = load_target(target, verb="generate", **which)
    asked = [(where, chat_ids(loaded.tokenizer, turns, tools, where)) for where, turns, tools in chats]
    answers = []
    for where, ids in asked:
        write(f"--- {where}\n")
        answers.append(_answer(loaded, ids, sampling, write, where=where))
    return {"target": target, "label": loaded.label, "chats": file, "answers": answers}


def read_chats(file: Path) -> list[tuple[str, Messages, Tools]]:
    """(place, turns, tools) of each row."""
    rows = read_rows(file)
    named = rows.made(lambda row, place: (place, *asked_chat(row)), range(rows.num_rows))
    return list(named)


def _answer(loaded: LoadedModel, ids: list[int], sampling: Sampling, write: Write, *, where: str) -> dict[str, Any]:
    model, tokenizer, context = loaded.model, loaded.tokenizer, context_length(loaded.model)
    if context is not None and len(ids) >= context:
        raise UserError(f"{where}: got {len(ids)} tokens, must be fewer than {context}, the context of the model.")
    most = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(ids))
    stops = stop_ids_of_model(model, tokenizer)
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: write(text + ("\n" if stream_end else ""))
    options: dict[str, Any] = {"streamer": streamer, "max_new_tokens": most, "eos_token_id": sorted(stops) or None}
    options["do_sample"] = sampling.temperature > 0
    if options["do_sample"]:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
    device, tokens = next(model.parameters()).device, torch.tensor([ids])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        began = time.perf_counter()
        out = generate(model, tokens, torch.ones_like(tokens), **options)
        seconds = time.perf_counter() - began
    new = out[0, len(ids) :].tolist()
    ended = bool(new) and new[-1] in stops
    is_cut = not ended and most < sampling.max_new_tokens
    if is_cut:
        logger.warning("The answer ends after %d tokens: it fills the model's context of %d tokens.", most, context)
    return {
        "text": str(tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)),
        "num_prompt_tokens": len(ids),
        "num_new_tokens": len(new),
        "stopped": "end" if ended else "context" if is_cut else "length",
        "seconds": seconds,
    }


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None, raw: bool) -> list[int]:
    """The tokens of a prompt: through the chat template if there is one, unless `raw`."""
    if raw or (system is None and not tokenizer.chat_template):
        [ids] = encode_batch(tokenizer, [prompt])
        return with_prefix(ids, special_prefix(tokenizer))
    turns = [Turn("system", system)] if system is not None else []
    return chat_ids(tokenizer, (*turns, Turn("user", prompt)))


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Messages, tools: Tools = (), where: str = "--prompt"
) -> list[int]:
    """The tokens that the model sees before it answers these turns."""
    require_chat_template(tokenizer, where)
    # The template writes the begin-of-text token itself.
    return encode_batch(tokenizer, [prompt_text(tokenizer, turns, tools, where)])[0]
