"""qdora eval: score a run, a merged directory or a bare model."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qdora.data.build_data import run_examples, task_examples, to_score
from qdora.data.example import Example
from qdora.data.given_data import given_source, has_splits, place_of, trained_on
from qdora.data.sources import open_source
from qdora.errors import UserError, nearest, not_one_of
from qdora.evaluation.generation import evaluate_generated, generation_faults, generation_table
from qdora.evaluation.harness import evaluate_harness, find_harness_tasks, harness_table
from qdora.evaluation.perplexity import read_texts, text_perplexity
from qdora.evaluation.suite import compare_table, evaluate
from qdora.files.console import bar, consoles
from qdora.files.nvidia_driver import check_gpu
from qdora.files.run_directory import open_run, unharmed
from qdora.files.user_paths import user_path
from qdora.memory.allocator import keep_freed_memory
from qdora.recipe.data_settings import COMMONSENSE_TASKS, TASKS
from qdora.recipe.recipe_file import load_recipe, recipe_of_run
from qdora.recipe.settings import Recipe
from qdora.run.adapter_step import state_step, stored_results
from qdora.run.load_run import LoadedModel, check_target, is_run, load_target, render_chats_like

logger = logging.getLogger("qdora")

SPLITS = ("validation", "test", "train")
METHODS = ("loglikelihood", "generate")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What `qdora eval` is asked for."""

    tasks: Sequence[str] | None = None
    """Sources of the run or built-in tasks; with own data the source that it is read like. None: the run's eval.tasks,
    by default all its sources; no tasks with texts or harness."""
    limit: int | None = None
    """Most examples of a task. None: the run's eval.limit, or all."""
    split: str | None = None
    """validation, test or train; with own data any split that it has. None: validation."""
    data: str | None = None
    """Own data: a file, a pattern, a folder or a Hub id. With commonsense tasks their folder of <task>/<split> files,
    in place of the Hub."""
    texts: Sequence[Path] = ()
    """Text files whose perplexity is measured."""
    step: int | None = None
    """Checkpoint of a run. None: the finished adapter."""
    base_only: bool = False
    """Leave the adapter of a run out."""
    like: Path | None = None
    """For a model that is not a run: use this run's data, limit, and date and variables of the chat template, and show
    this run's results beside."""
    base_model: str | None = None
    """For an adapter: its base. None: the one that its files name."""
    quant: str | None = None
    """For a model that is not a run: hold its linear layers in nf4, fp4 or int8. None: dense. For an adapter: as
    `adopted_recipe` has it."""
    method: str | None = None
    """loglikelihood, or generate: the model also answers in words. None: the run's eval.method."""
    harness: Sequence[str] = ()
    """Tasks of lm-evaluation-harness."""
    harness_include: Path | None = None
    """Folder of further tasks for the harness."""

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

    def harness_kept_as(self) -> str:
        """Name of the results of the harness, in the names of the kept files: its tasks, and the limit."""
        return f"harness-{_in_a_name(self.harness)}" + ("" if self.limit is None else f"-limit-{self.limit}")

    def check(self, target: str) -> None:
        """Raise UserError with all faults that show before anything is loaded."""
        faults = []
        if self.own_data is None and self.split not in (None, *SPLITS):
            faults.append(not_one_of("--split", self.split, SPLITS))
        if self.method is not None and self.method not in METHODS:
            faults.append(not_one_of("--method", self.method, METHODS))
        if self.like is not None and is_run(target):
            faults.append(f"--like: {target} is a run and has data of its own. Fix: remove --like.")
        if self.step is not None and self.base_only:
            faults.append("--step: is not used with --base, since the base has no steps. Fix: remove one of them.")
        if self.harness_include is not None and not self.harness:
            faults.append("--harness-include: is used only with --harness. Fix: name a task with --harness.")
        if not self.reads_tasks:
            used = "--harness" if self.harness else "--text"
            if self.limit is not None and not self.harness:
                faults.append("--limit: counts examples of tasks, got only --text. Fix: remove --limit or add --tasks.")
            if self.method is not None:
                faults.append(
                    f"--method: applies to examples of tasks, got only {used}. Fix: remove --method or add --tasks."
                )
        faults += self._data_faults()
        faults += [f"--text: {file} is not a file." for file in self.texts if not file.is_file()]
        if user_path(target).exists():  # else it is looked for first
            faults += self.faults_of_data(target)
        if faults:
            raise UserError(*faults)

    def faults_of_data(self, target: str) -> list[str]:
        """What is wrong if nothing says what a model that is not a run is scored on."""
        if is_run(target) or self.like or self.tasks or self.data or self.texts or self.harness:
            return []
        return [
            f"eval: {target} is not a run (it has no recipe.yaml), so it has no data. "
            "Fix: add --tasks, --data, --text, --harness or --like RUN."
        ]

    def _data_faults(self) -> Iterator[str]:
        """What is wrong with `data` and shows before it is read."""
        if self.data is None:
            return
        path, named = user_path(self.data), ", ".join(sorted(self.data_tasks))
        if named and not path.is_dir():
            yield (
                f"--data: must be a folder of <task>/<split> files with --tasks {named}, got {self.data}. "
                "Fix: name it, or remove --tasks to score data of your own."
            )
        held = [] if named else [task for task in COMMONSENSE_TASKS if (path / task).is_dir()]
        if held:
            yield f"--data: {self.data} has a folder for each task. Fix: add --tasks with one of {', '.join(held)}."
        if self.split is not None and self.split_read is None:
            yield f"--split: {self.data} is a single file or a pattern and has no splits. Fix: remove --split."
        if self.own_data is not None and len(given := self.tasks or ()) > 1:
            yield f"--tasks: with --data names the one source that has the format, got {', '.join(given)}."


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
    check_gpu()
    # A wrong name is found before the data is read or fetched.
    check_target(target, base_model=options.base_model, quant=options.quant, verb="eval")
    if lacking := options.faults_of_data(target):
        raise UserError(*lacking)
    progress, results = consoles(console)
    keep_freed_memory()
    data_run = Path(target) if is_run(target) else options.like
    recipe_in = recipe_of_run if is_run(target) else load_recipe  # of --like only the data is used
    recipe = None if data_run is None else recipe_in(open_run(data_run).recipe_file)
    harness = find_harness_tasks(options.harness, options.harness_include) if options.harness else None
    generates = (options.method or ("loglikelihood" if recipe is None else recipe.eval.method)) == "generate"
    examples = _examples(options, recipe, by_name=generates)
    faults = generation_faults(examples) if generates else ()
    if faults:
        raise UserError(*faults)
    texts = read_texts(options.texts)
    split, kept = options.split_read, options.kept_as(recipe)
    limit, block = options.limit, None
    if recipe is not None and limit in (None, recipe.eval.limit):  # as during training
        limit, block = recipe.eval.limit, recipe.eval.block
    loaded = load_target(
        target,
        step=options.step,
        base_only=options.base_only,
        base_model=options.base_model,
        quant=options.quant,
        verb="eval",
    )
    if options.like is not None and recipe is not None:
        render_chats_like(loaded.tokenizer, options.like, recipe)
    shown = "adapter" if loaded.run is not None and loaded.label == "final" else loaded.label
    document: dict[str, Any] = {"target": target, "label": loaded.label, "split": split}
    if examples:
        like = options.like if options.data is None and split == "validation" else None
        beside = {}
        if like is not None and recipe is not None:
            beside = stored_results(open_run(like), recipe.adapter.start_label)
        with bar(progress, f"evaluating {loaded.label}") as update:
            scored = evaluate(loaded.model, loaded.tokenizer, examples, limit=limit, block=block, progress=update)
        results.print(compare_table(beside | {shown: scored}))
        read = {} if options.data is None else {"data": place_of(options.data)}
        _keep(loaded, kept, read | scored.to_dict(per_example=True))
        document["evaluation"] = scored.to_dict()
        document["beside"] = {label: stored.to_dict() for label, stored in beside.items()}
    if examples and generates:
        with bar(progress, f"answers of {loaded.label}") as update:
            answers = evaluate_generated(
                loaded.model, loaded.tokenizer, examples, limit=limit, block=block, progress=update
            )
        results.print(generation_table({shown: answers}))
        _keep(loaded, f"{kept}-generated", answers.to_dict(per_example=True))
        document["generation"] = answers.to_dict()
    if texts:
        found = text_perplexity(loaded.model, loaded.tokenizer, texts)
        document["perplexity"] = found.to_dict()
        results.print(f"perplexity {found.perplexity:.3f} over {found.num_tokens:,} tokens")
        places = _of_places([str(file.resolve()) for file in options.texts])
        name = f"perplexity-{_in_a_name([file.name for file in options.texts])}-{places}"
        _keep(loaded, name, document["perplexity"] | {"texts": [str(file) for file in options.texts]})
    if harness is not None:
        document["harness"] = evaluate_harness(loaded.model, loaded.tokenizer, harness, limit=options.limit)
        results.print(harness_table(document["harness"]))
        _keep(loaded, options.harness_kept_as(), document["harness"] | {"limit": options.limit})
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
    try:
        found = open_source(source, split)
    except UserError as error:
        is_set_up = source.format != "auto" or source.chat or source.columns or source.template
        if is_set_up or like is not None or len(labels) < 2 or not Path(place).exists():
            raise
        fix = f"Fix: name a source of the run that has this format with --tasks: {', '.join(labels)}."
        raise UserError(*error.faults, f"--data: the format is that of the columns. {fix}") from error
    for label in [] if options.base_only else trained_on(source, split, mix):
        logger.warning("The run was trained on %s (source %s). The scores say nothing of new data.", place, label)
    return {source.label: list(found) if recipe is None else to_score(found, recipe.data)}
