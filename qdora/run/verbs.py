"""qdora eval and qdora generate: score a run, an export, an adapter or a bare model, or let it answer."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
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
    open_source,
    place_of,
    run_examples,
    task_examples,
    to_score,
    trained_on,
)
from qdora.data.tokenize import encode_batch, special_prefix, with_prefix
from qdora.errors import UserError, not_one_of, refuse
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
from qdora.recipe.data_settings import COMMONSENSE_TASKS, TASKS, is_path
from qdora.recipe.options import EvalOptions, GenerateOptions, Sampling
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.run.load_run import LoadedModel, is_run, load_target
from qdora.train.evals import state_step

logger = logging.getLogger("qdora")

Write = Callable[[str], None]


# qdora eval


def evaluate_target(
    target: str, options: EvalOptions = EvalOptions(), *, console: Console | None = None
) -> dict[str, Any]:
    """Evaluate a run, an adapter, a model directory, a Hub id or builtin; returns JSON values.

    A run keeps the results in its eval/.
    """
    texts = read_texts(options.text)
    check_gpu()
    own_run = Path(target) if is_run(target) else None
    if own_run is not None and options.like is not None:
        raise UserError(f"--like: {target} is a run and has data of its own.")
    data_run = own_run or options.like
    if not (data_run or options.tasks or options.data or options.text or options.harness):
        fix = "Fix: add --tasks, --data, --text, --harness or --like RUN."
        raise UserError(f"eval: {target} is not a run (it has no recipe.yaml), so it has no data. {fix}")
    progress, results = consoles(console)
    keep_freed_memory()
    recipe = None if data_run is None else load_recipe(open_run(data_run).recipe_file)
    harness = find_harness_tasks(options.harness, options.harness_include) if options.harness else None
    generates = (options.method or ("loglikelihood" if recipe is None else recipe.eval.method)) == "generate"
    of_folder = options.data is None or not set(COMMONSENSE_TASKS).isdisjoint(options.tasks)
    place = None if of_folder else place_of(str(options.data))
    is_file = place is not None and is_path(place) and not Path(place).is_dir()
    split = None if is_file else options.split or "validation"
    examples = _examples(options, recipe, place, split, by_name=generates)
    idle = {"method": not examples, "limit": not (examples or harness), "split": is_file or not examples}
    given = [name for name, is_idle in idle.items() if is_idle and getattr(options, name) is not None]
    refuse([f"--{name}: has no effect on what is scored. Fix: remove it." for name in given])
    if generates:
        refuse(generation_faults(examples))
    scored: dict[str, Any] = {"limit": options.limit, "block": None}
    if recipe is not None and options.limit in (None, recipe.eval.limit):  # as during training
        scored = {"limit": recipe.eval.limit, "block": recipe.eval.block}
    loaded = load_target(target, options, verb="eval")
    model, tokenizer, label = loaded.model, loaded.tokenizer, loaded.label
    if options.like is not None and recipe is not None:
        set_chat_date(tokenizer, chat_date_of(options.like))
        set_chat_settings(tokenizer, template_kwargs=dict(recipe.data.template_kwargs))
    document: dict[str, Any] = {"target": target, "label": label, "split": split}
    if examples:
        with bar(progress, f"evaluating {label}") as update:
            found = evaluate(model, tokenizer, examples, **scored, progress=update)
        results.print(compare_table({label: found}))
        read = {} if options.data is None else {"data": place_of(options.data)}
        _keep(loaded, _kept_as(options, split), read | found.to_dict(per_example=True))
        document["evaluation"] = found.to_dict()
    if examples and generates:
        with bar(progress, f"answers of {label}") as update:
            answers = evaluate_generated(model, tokenizer, examples, **scored, progress=update)
        results.print(generation_table({label: answers}))
        _keep(loaded, f"{_kept_as(options, split)}-generated", answers.to_dict(per_example=True))
        document["generation"] = answers.to_dict()
    if texts:
        document["perplexity"] = perplexity = text_perplexity(model, tokenizer, texts)
        results.print(f"perplexity {perplexity['perplexity']:.3f} over {perplexity['num_tokens']:,} tokens")
        text_name = _in_a_name(
            [file.name for file in options.text], [str(file.resolve()) for file in options.text]
        )
        _keep(loaded, f"perplexity-{text_name}", perplexity | {"texts": [str(file) for file in options.text]})
    if harness is not None:
        document["harness"] = evaluate_harness(model, tokenizer, harness, limit=options.limit)
        results.print(harness_table(document["harness"]))
        limited = "" if options.limit is None else f"-limit-{options.limit}"
        _keep(
            loaded,
            f"harness-{_in_a_name(options.harness)}{limited}",
            document["harness"] | {"limit": options.limit},
        )
    return document


def _kept_as(options: EvalOptions, split: str | None) -> str:
    """Name of what is evaluated, in the names of the kept files."""
    parts = [] if split is None else [split]
    if options.tasks:
        parts.append(_in_a_name(options.tasks))
    if options.data is not None:
        place = place_of(options.data)
        parts.append(f"data-{_in_a_name([Path(place).name], [place])}")
    if options.limit is not None:
        parts.append(f"limit-{options.limit}")
    return "-".join(parts)


def _in_a_name(names: Sequence[str], places: Sequence[str] = ()) -> str:
    """`names` for a file name, which ends at 255 bytes; with a digest of `places`, where names may be repeated."""
    text = "+".join(re.sub(r"[^\w.]+", "-", name) for name in names)
    digest = hashlib.sha256("\0".join(places or names).encode()).hexdigest()[:8]
    return f"{text[:100]}-{digest}" if places or len(text) > 100 else text


def _keep(loaded: LoadedModel, name: str, document: dict[str, Any]) -> None:
    if loaded.run is not None:
        file = f"eval/{loaded.label}-{name}.json"
        with unharmed(str(loaded.run.path / file)):
            loaded.run.write_json(file, {"step": state_step(loaded.run, loaded.label), **document})


def _examples(
    options: EvalOptions, recipe: Recipe | None, place: str | None, split: str | None, *, by_name: bool
) -> dict[str, list[Example]]:
    asked = options.tasks
    if not asked and options.data is None and (options.text or options.harness):
        return {}
    if place is not None:
        mix = () if recipe is None else recipe.data.mix
        labels = [source.label for source in mix if source.source is not None]
        like = ", ".join(asked) or None
        if like is not None and like not in labels:
            raise UserError(not_one_of("--tasks: with --data names a source of the run", like, labels))
        split = split or "train"  # a file is all one split
        source = given_source(place, mix, like)
        own_data = open_source(source, split)
        for label in [] if options.base else trained_on(source, split, mix):
            logger.warning(
                "The run was trained on %s (source %s). The scores say nothing of new data.", place, label
            )
        return {source.label: list(own_data) if recipe is None else to_score(own_data, recipe.data)}
    assert split is not None
    if not asked:
        assert recipe is not None  # evaluate_target
        found = run_examples(recipe, split, recipe.eval.tasks or None)
        if not found:
            raise UserError(f"--split: the run has no {split} examples. Fix: name other data with --data.")
        return found
    own = [task for task in asked if options.data is None or task not in COMMONSENSE_TASKS]
    known = {} if recipe is None else run_examples(recipe, split, own)
    names = list(dict.fromkeys([*known, *TASKS]))
    refuse([not_one_of("--tasks", task, names) for task in asked if task not in names])
    folder = None if options.data is None else user_path(options.data)
    return {
        task: known[task] if task in known else task_examples(task, split=split, data=folder, by_name=by_name)
        for task in asked
    }


# qdora generate


def generate_from(
    target: str, options: GenerateOptions, sampling: Sampling = Sampling(), *, write: Write = lambda text: None
) -> dict[str, Any]:
    """Load a run, an adapter or a model and let it answer a prompt, or each conversation of a data file.

    `write` gets each piece of text as soon as it is known. Returns JSON values; `answers` are in the file's order.
    """
    chats = None if options.chats is None else read_chats(user_path(options.chats))
    keep_freed_memory()
    loaded = load_target(target, options, verb="generate")
    document: dict[str, Any] = {"target": target, "label": loaded.label}
    if chats is None:
        prompt = sys.stdin.read() if options.prompt == "-" else str(options.prompt)
        ids = prompt_ids(loaded.tokenizer, prompt, options.system, options.raw)
        return document | {"prompt": prompt, **_answer(loaded, ids, sampling, write, where="--prompt")}
    asked = [(where, chat_ids(loaded.tokenizer, turns, tools, where)) for where, turns, tools in chats]
    answers = []
    for where, ids in asked:
        write(f"--- {where}\n")
        answers.append(_answer(loaded, ids, sampling, write, where=where))
    return document | {"chats": options.chats, "answers": answers}


def read_chats(file: Path) -> list[tuple[str, Messages, Tools]]:
    """(place, turns, tools) of each row."""
    rows = read_rows(file)
    return list(rows.made(lambda row, place: (place, *asked_chat(row)), range(rows.num_rows)))


def _answer(
    loaded: LoadedModel, ids: list[int], sampling: Sampling, write: Write, *, where: str
) -> dict[str, Any]:
    model, tokenizer, context = loaded.model, loaded.tokenizer, context_length(loaded.model)
    if context is not None and len(ids) >= context:
        raise UserError(
            f"{where}: got {len(ids)} tokens, must be fewer than {context}, the context of the model."
        )
    most = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(ids))
    stops = stop_ids_of_model(model, tokenizer)
    streamer: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: write(text + ("\n" if stream_end else ""))
    options: dict[str, Any] = {
        "streamer": streamer,
        "max_new_tokens": most,
        "eos_token_id": sorted(stops) or None,
    }
    options["do_sample"] = sampling.temperature > 0
    if options["do_sample"]:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
    device, tokens = next(model.parameters()).device, torch.tensor([ids])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        out = generate(model, tokens, torch.ones_like(tokens), **options)
    new = out[0, len(ids) :].tolist()
    ended = bool(new) and new[-1] in stops
    return {
        "text": str(tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)),
        "num_prompt_tokens": len(ids),
        "num_new_tokens": len(new),
        "stopped": "end" if ended else "length" if len(new) == sampling.max_new_tokens else "context",
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
