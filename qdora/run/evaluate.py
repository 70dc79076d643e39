"""qdora eval: score a run, a merged directory or a bare model."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.data.example import Example
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
from qdora.errors import UserError, nearest, not_one_of
from qdora.evaluate.generation import evaluate_generated, generation_faults, generation_table
from qdora.evaluate.harness import evaluate_harness, find_harness_tasks, harness_table
from qdora.evaluate.perplexity import read_texts, text_perplexity
from qdora.evaluate.suite import compare_table, evaluate
from qdora.files.console import bar, consoles
from qdora.files.nvidia_driver import check_gpu
from qdora.files.run_directory import open_run, unharmed
from qdora.files.user_paths import user_path
from qdora.memory.oom import keep_freed_memory
from qdora.recipe.data_settings import COMMONSENSE_TASKS, TASKS
from qdora.recipe.options import EvalOptions
from qdora.recipe.recipe_file import load_recipe, recipe_of_run
from qdora.recipe.settings import Recipe
from qdora.run.load_run import LoadedModel, check_target, is_run, load_target, render_chats_like
from qdora.train.evals import state_step, stored_results

logger = logging.getLogger("qdora")

SPLITS = ("validation", "test", "train")


def check_options(options: EvalOptions, target: str) -> None:
    """Raise UserError with all options that do not fit each other or the target."""
    only = None if reads_tasks(options) else "--harness" if options.harness else "--text"
    rules = [
        (options.like is not None and is_run(target), f"--like: {target} is a run and has data of its own."),
        (options.step is not None and options.base, "--step: is not used with --base, which has no steps."),
        (
            options.harness_include is not None and not options.harness,
            "--harness-include: is used only with --harness.",
        ),
        (only == "--text" and options.limit is not None, "--limit: counts examples of tasks, got only --text."),
        (only is not None and options.method is not None, f"--method: is for examples of tasks, got only {only}."),
    ]
    if options.data is not None:
        path, named = user_path(options.data), ", ".join(sorted(data_tasks(options)))
        held = ", ".join(task for task in COMMONSENSE_TASKS if not named and (path / task).is_dir())
        split_tasks = f"--data: must be a folder of <task>/<split> files with --tasks {named}, got {path}."
        no_splits, many = (
            f"--split: {path} has no splits, being one file.",
            own_data(options) and len(options.tasks) > 1,
        )
        rules += [
            (named != "" and not path.is_dir(), split_tasks),
            (held != "", f"--data: {path} has a folder for each task. Fix: add --tasks with one of {held}."),
            (options.split is not None and split_read(options) is None, no_splits),
            (bool(many), f"--tasks: with --data names one source, got {', '.join(options.tasks)}."),
        ]
    faults = [text for is_wrong, text in rules if is_wrong]
    if own_data(options) is None and options.split not in (None, *SPLITS):
        faults.append(not_one_of("--split", options.split, SPLITS))
    if faults:
        raise UserError(*faults)


def reads_tasks(options: EvalOptions) -> bool:
    """Whether examples of tasks are scored, not only texts or tasks of the harness."""
    return bool(options.tasks) or options.data is not None or not (options.text or options.harness)


def data_tasks(options: EvalOptions) -> set[str]:
    """The tasks whose folder `data` is; empty if it is own data."""
    return set() if options.data is None else set(options.tasks) & set(COMMONSENSE_TASKS)


def own_data(options: EvalOptions) -> str | None:
    """The place (`place_of`) of own data."""
    return None if options.data is None or data_tasks(options) else place_of(options.data)


def split_read(options: EvalOptions) -> str | None:
    """The split that is scored; None for own data without splits."""
    place = own_data(options)
    return None if place is not None and not has_splits(place) else options.split or "validation"


def kept_as(options: EvalOptions, recipe: Recipe | None) -> str:
    """Name of what is evaluated, in the names of the kept files: the split, and what differs from the run's eval.

    An evaluation of other tasks, of fewer examples or of other data never replaces that of the run's own settings.
    """
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
    """Evaluate a run (its adapter on its base), an adapter, a model directory, a Hub id or builtin.

    A run keeps the results in its eval/.

    `console` gets progress and tables, by default standard error and standard output.

    Returns JSON values: the evaluation, stored results beside it, generated answers, perplexity, harness results.
    Raises UserError for options that do not fit the target, unknown tasks, or what `load_target` refuses.
    """
    check_options(options, target)
    texts = read_texts(options.text)
    check_gpu()
    # A wrong name is found before the data is read or fetched.
    check_target(target, base_model=options.base_model, quant=options.quant, verb="eval")
    if not (is_run(target) or options.like or options.tasks or options.data or options.text or options.harness):
        raise UserError(
            f"eval: {target} is not a run (it has no recipe.yaml), so it has no data. "
            "Fix: add --tasks, --data, --text, --harness or --like RUN."
        )
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
    loaded = load_target(
        target,
        step=options.step,
        base_only=options.base,
        base_model=options.base_model,
        quant=options.quant,
        verb="eval",
    )
    model, tokenizer, label = loaded.model, loaded.tokenizer, loaded.label
    if options.like is not None and recipe is not None:
        render_chats_like(tokenizer, options.like, recipe)
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
        perplexity = text_perplexity(model, tokenizer, texts)
        document["perplexity"] = perplexity.to_dict()
        results.print(f"perplexity {perplexity.perplexity:.3f} over {perplexity.num_tokens:,} tokens")
        places = _of_places([str(file.resolve()) for file in options.text])
        text_name = f"perplexity-{_in_a_name([file.name for file in options.text])}-{places}"
        _keep(loaded, text_name, document["perplexity"] | {"texts": [str(file) for file in options.text]})
    if harness is not None:
        document["harness"] = evaluate_harness(model, tokenizer, harness, limit=options.limit)
        results.print(harness_table(document["harness"]))
        limited = "" if options.limit is None else f"-limit-{options.limit}"
        _keep(loaded, f"harness-{_in_a_name(options.harness)}{limited}", document["harness"] | {"limit": options.limit})
    return document


def _of_places(places: Sequence[str]) -> str:
    """Tells files apart that have the same name."""
    return hashlib.sha256("\0".join(places).encode()).hexdigest()[:8]


def _in_a_name(what: Sequence[str]) -> str:
    """Names of tasks or files, as a part of the name of a file."""
    joined = "+".join(re.sub(r"[^\w.]+", "-", each) for each in what)
    # File systems end at 255 bytes
    return joined if len(joined) <= 100 else hashlib.sha256(joined.encode()).hexdigest()[:16]


def _keep(loaded: LoadedModel, name: str, document: dict[str, Any]) -> None:
    """Write eval/<label>-<name>.json of a run, with the step; a model that is not a run keeps nothing.

    A run that cannot be written keeps nothing either, after a warning: the results are printed all the same.
    """
    if loaded.run is not None:
        file = f"eval/{loaded.label}-{name}.json"
        with unharmed(str(loaded.run.path / file)):
            step = state_step(loaded.run, loaded.label)
            loaded.run.write_json(file, {"step": step, **document})


def _examples(options: EvalOptions, recipe: Recipe | None, *, by_name: bool) -> dict[str, list[Example]]:
    """Task -> its examples: of own data, or of the run's sources and of the built-in tasks that are named.

    The commonsense tasks come from `options.data` where it is given, whatever the run's sources are called.
    """
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
    lacking = [task for task in own if task in sources and task not in known]
    faults += [
        f"--tasks: {task} has no {split} examples in this run. Fix: name other data with --data." for task in lacking
    ]
    if faults:
        raise UserError(*faults)
    folder = None if options.data is None else user_path(options.data)
    return {
        task: known[task] if task in known else task_examples(task, split=split, data=folder, by_name=by_name)
        for task in asked
    }


def _own_examples(options: EvalOptions, place: str, recipe: Recipe | None) -> dict[str, list[Example]]:
    """Examples of own data under its name. A warning says if the run trained on it."""
    mix = () if recipe is None else recipe.data.mix
    labels = [source.label for source in mix if source.source is not None]
    like = next(iter(options.tasks), None)
    if like is not None and like not in labels:
        raise UserError(
            f"--tasks: got {like!r}, with --data it must be a source of the run whose format the data has: "
            f"{', '.join(labels) or 'there is none'}.{nearest(like, labels)}"
        )
    split = split_read(options) or "train"  # a file is all one split
    source = given_source(place, mix, like)
    found = open_source(source, split)
    for label in [] if options.base else trained_on(source, split, mix):
        logger.warning("The run was trained on %s (source %s). The scores say nothing of new data.", place, label)
    return {source.label: list(found) if recipe is None else to_score(found, recipe.data)}
