"""qdora eval: score a run, a merged directory or a bare model."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.data.build_data import run_examples, task_examples, to_score
from qdora.data.example import Example
from qdora.data.given_data import given_source, has_splits, place_of, trained_on
from qdora.data.sources import open_source
from qdora.errors import UserError, nearest, not_one_of
from qdora.evaluate.generation import evaluate_generated, generation_faults, generation_table
from qdora.evaluate.harness import evaluate_harness, find_harness_tasks, harness_table
from qdora.evaluate.perplexity import read_texts, text_perplexity
from qdora.evaluate.suite import compare_table, evaluate
from qdora.files.console import bar, consoles
from qdora.files.nvidia_driver import check_gpu
from qdora.files.run_directory import open_run, unharmed
from qdora.files.user_paths import user_path
from qdora.memory.allocator import keep_freed_memory
from qdora.recipe.data_settings import COMMONSENSE_TASKS, TASKS
from qdora.recipe.recipe_file import load_recipe, recipe_of_run
from qdora.recipe.settings import Recipe
from qdora.run.load_run import LoadedModel, check_target, is_run, load_target, render_chats_like
from qdora.train.evals import state_step, stored_results

logger = logging.getLogger("qdora")

SPLITS = ("validation", "test", "train")
METHODS = ("loglikelihood", "generate")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What `qdora eval` is asked for. The fields are its options; its help says what they mean and what None takes."""

    tasks: Sequence[str] | None = None
    limit: int | None = None
    split: str | None = None
    data: str | None = None
    texts: Sequence[Path] = ()
    step: int | None = None
    base_only: bool = False
    like: Path | None = None
    base_model: str | None = None
    quant: str | None = None
    method: str | None = None
    harness: Sequence[str] = ()
    harness_include: Path | None = None

    @property
    def reads_tasks(self) -> bool:
        """Whether examples of tasks are scored, not only texts or tasks of the harness."""
        return bool(self.tasks) or self.data is not None or not (self.texts or self.harness)

    @property
    def data_tasks(self) -> set[str]:
        """The tasks whose folder `data` is; empty if it is own data."""
        return set() if self.data is None else set(self.tasks or ()) & set(COMMONSENSE_TASKS)

    @property
    def own_data(self) -> str | None:
        """The place (`place_of`) of own data."""
        return None if self.data is None or self.data_tasks else place_of(self.data)

    @property
    def split_read(self) -> str | None:
        """The split that is scored; None for own data without splits."""
        return None if self.own_data is not None and not has_splits(self.own_data) else self.split or "validation"

    def kept_as(self, recipe: Recipe | None) -> str:
        """Name of what is evaluated, in the names of the kept files: the split, and what differs from the run's eval.

        An evaluation of other tasks, of fewer examples or of other data never replaces that of the run's own settings.
        """
        parts = [] if self.split_read is None else [self.split_read]
        own = None if recipe is None else recipe.eval
        same_tasks = own is not None and self.data is None and set(self.tasks or ()) == set(own.tasks or ())
        if self.tasks is not None and not same_tasks:
            parts.append(_in_a_name(self.tasks))
        if self.data is not None:
            place = place_of(self.data)
            parts.append(f"data-{_in_a_name([Path(place).name])}-{_of_places([place])}")
        if self.limit is not None and (own is None or self.limit != own.limit):
            parts.append(f"limit-{self.limit}")
        return "-".join(parts)

    def check(self, target: str) -> None:
        """Raise UserError with all faults that show before anything is loaded."""
        only = None if self.reads_tasks else "--harness" if self.harness else "--text"
        rules = [
            (self.like is not None and is_run(target), f"--like: {target} is a run and has data of its own."),
            (self.step is not None and self.base_only, "--step: is not used with --base, which has no steps."),
            (self.harness_include is not None and not self.harness, "--harness-include: is used only with --harness."),
            (only == "--text" and self.limit is not None, "--limit: counts examples of tasks, got only --text."),
            (only is not None and self.method is not None, f"--method: is for examples of tasks, got only {only}."),
        ]
        if self.data is not None:
            path, named, like = user_path(self.data), ", ".join(sorted(self.data_tasks)), self.tasks or ()
            held = ", ".join(task for task in COMMONSENSE_TASKS if not named and (path / task).is_dir())
            split_tasks = f"--data: must be a folder of <task>/<split> files with --tasks {named}, got {path}."
            rules += [
                (named != "" and not path.is_dir(), split_tasks),
                (held != "", f"--data: {path} has a folder for each task. Fix: add --tasks with one of {held}."),
                (self.split is not None and self.split_read is None, f"--split: {path} has no splits, being one file."),
                (self.own_data is not None and len(like) > 1, f"--tasks: with --data names one source, got {like}."),
            ]
        faults = [text for is_wrong, text in rules if is_wrong]
        if self.own_data is None and self.split not in (None, *SPLITS):
            faults.append(not_one_of("--split", self.split, SPLITS))
        if self.method not in (None, *METHODS):
            faults.append(not_one_of("--method", self.method, METHODS))
        if faults:
            raise UserError(*faults)


def evaluate_target(
    target: str, options: EvalOptions = EvalOptions(), *, console: Console | None = None
) -> dict[str, Any]:
    """Evaluate a run (its adapter on its base), an adapter, a model directory, a Hub id or builtin.

    A run keeps the results in its eval/.

    `console` gets progress and tables, by default standard error and standard output.

    Returns JSON values: the evaluation, stored results beside it, generated answers, perplexity, harness results.
    Raises UserError for options that do not fit the target, unknown tasks, or what `load_target` refuses.
    """
    options.check(target)
    texts = read_texts(options.texts)
    check_gpu()
    # A wrong name is found before the data is read or fetched.
    check_target(target, base_model=options.base_model, quant=options.quant, verb="eval")
    if not (is_run(target) or options.like or options.tasks or options.data or options.texts or options.harness):
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
    split, name = options.split_read, options.kept_as(recipe)
    scored: dict[str, Any] = {"limit": options.limit, "block": None}
    if recipe is not None and options.limit in (None, recipe.eval.limit):  # as during training
        scored = {"limit": recipe.eval.limit, "block": recipe.eval.block}
    loaded = load_target(
        target,
        step=options.step,
        base_only=options.base_only,
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
        places = _of_places([str(file.resolve()) for file in options.texts])
        text_name = f"perplexity-{_in_a_name([file.name for file in options.texts])}-{places}"
        _keep(loaded, text_name, document["perplexity"] | {"texts": [str(file) for file in options.texts]})
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
    if not options.reads_tasks:
        return {}
    if options.own_data is not None:
        return _own_examples(options, options.own_data, recipe)
    asked, split, elsewhere = options.tasks, options.split or "validation", options.data_tasks
    if asked is None:
        assert recipe is not None  # EvalOptions.check
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
    like = next(iter(options.tasks or ()), None)
    if like is not None and like not in labels:
        raise UserError(
            f"--tasks: got {like!r}, with --data it must be a source of the run whose format the data has: "
            f"{', '.join(labels) or 'there is none'}.{nearest(like, labels)}"
        )
    split = options.split_read or "train"  # a file is all one split
    source = given_source(place, mix, like, split)
    found = open_source(source, split)
    for label in [] if options.base_only else trained_on(source, split, mix):
        logger.warning("The run was trained on %s (source %s). The scores say nothing of new data.", place, label)
    return {source.label: list(found) if recipe is None else to_score(found, recipe.data)}
