"""Create or open the directory of a run, by the first of its processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qdora.errors import UserError, first_few
from qdora.files.atomic import atomic_write_text
from qdora.files.environment import environment
from qdora.files.json_file import read_json_object
from qdora.files.run_directory import Checkpoint, RunDirectory, create_run, open_run, resume_run
from qdora.files.setting_keys import flat
from qdora.model.multimodal import TRAINED_PART, is_multimodal
from qdora.model.source import is_commit
from qdora.recipe.faults import shown
from qdora.recipe.recipe_file import load_recipe, recipe_of_run, resolved_yaml, settings
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.prepare import PreparedRun
from qdora.run.recorded_base import REVISIONS, base_record, check_base, recorded_base, with_revisions_of
from qdora.run.residency_choice import keep_residency
from qdora.train.checkpoint import unreadable
from qdora.train.distributed import Processes

CHAT_TEMPLATE, CHAT_TEMPLATE_FILE = "data.chat_template", "chat_template.jinja"
_SHOWN = 3
"""Settings that a warning names; the rest is counted."""

logger = logging.getLogger("qdora")


def open_directory(prepared: PreparedRun, directory: Path, processes: Processes, *, resume: bool) -> RunDirectory:
    """Create the run directory, or with `resume` open it; it holds the recipe as it was given."""
    recipe = _text(prepared.given)

    def found() -> dict[str, Any]:
        return (
            environment()
            | {"base": base_record(prepared.source)}
            | {"chat_date": prepared.chat_date, "has_chats": prepared.has_chats}
            | ({} if processes.size == 1 else {"num_processes": processes.size})
            | ({"trained_part": TRAINED_PART} if _has_other_parts(prepared) else {})
        )

    def resumed() -> RunDirectory:
        known = open_run(directory)
        before = load_recipe(known.recipe_file)
        if recorded_base(known) is None:  # an older version did not pin the base: the run goes on with this one
            before = with_settings(before, model={"revision": prepared.given.model.revision})
        before = with_revisions_of(before, prepared.given)  # older versions did not pin the tokenizer
        check_base(known, prepared.source)
        if prepared.given.data.chat_template is not None:
            _check_chat_template(known, str(prepared.tokenizer.chat_template))
        _check_data(prepared, known)
        return resume_run(directory, recipe, found(), before=_text(before))

    processes.first(resumed if resume else lambda: create_run(directory, recipe, found()))
    run = RunDirectory(directory)
    if prepared.given.data.chat_template is not None:
        # recipe.yaml names this copy, so a later change of the file has no effect
        text = str(prepared.tokenizer.chat_template)
        processes.first(lambda: atomic_write_text(run.inside(CHAT_TEMPLATE_FILE), text))
    processes.first(lambda: keep_residency(run, prepared.given, prepared.recipe))
    return run


def _check_data(prepared: PreparedRun, run: RunDirectory) -> None:
    """Refuse other data than that of the newest checkpoint while nothing is written yet. UserError as `check_state`."""
    steps = run.checkpoint_steps()
    if not steps:
        return
    newest, state = run.checkpoint_path(steps[-1]), None
    with suppress(OSError, ValueError, LookupError, TypeError):  # damaged: an older one is taken, or a fault told
        state = read_json_object(newest / "state.json")["loader"]
    if state is not None:
        with unreadable(newest):
            prepared.loader.check_state(state)


def _text(recipe: Recipe) -> str:
    """recipe.yaml of a run: it names the run's own copy of a chat template."""
    if recipe.data.chat_template is not None:
        recipe = with_settings(recipe, data={"chat_template": CHAT_TEMPLATE_FILE})
    return resolved_yaml(recipe)


def resumed_recipe(directory: Path, where: str, overrides: Sequence[str]) -> Recipe:
    """The recipe of an earlier run with `overrides`.

    A warning names the settings in which the recipe `where`, with the same overrides, differs from it. That one need
    not be valid: options of the start that it needs are not given again.

    Raises:
        UserError: There is no run, an override does not fit, or what the recipe names was moved.
    """
    run = open_run(directory)
    own = recipe_of_run(run.recipe_file, overrides, sections=Recipe.model_fields)
    try:
        given = load_recipe(where, overrides)
    except UserError as error:
        text = "%s continues with its own recipe.yaml. %s is not compared with it: %s"
        logger.warning(text, directory, where, error.faults[0])
        return own
    mine, other = flat(settings(own)), flat(settings(given))
    if _same_text(own.data.chat_template, given.data.chat_template):
        mine.pop(CHAT_TEMPLATE, None), other.pop(CHAT_TEMPLATE, None)
    for revision in REVISIONS.values():
        if not is_commit(getattr(given.model, revision)):  # the run has pinned the commit
            mine.pop(f"model.{revision}", None), other.pop(f"model.{revision}", None)
    different = [key for key in dict.fromkeys((*mine, *other)) if mine.get(key) != other.get(key)]
    if different and os.environ.get("RANK", "0") == "0":
        named = [f"{key} (the run: {shown(mine.get(key))}, {where}: {shown(other.get(key))})" for key in different]
        text = (
            "%s continues with its own recipe.yaml, which differs from %s in %s. "
            "`qdora guide runs` names the settings that -s can change."
        )
        logger.warning(text, directory, where, first_few(named, _SHOWN))
    return own


def _same_text(first: str | None, second: str | None) -> bool:
    """Whether two files have one content: a run has its own copy of a chat template."""
    try:
        return first is not None and second is not None and Path(first).read_bytes() == Path(second).read_bytes()
    except OSError:
        return False


def _has_other_parts(prepared: PreparedRun) -> bool:
    return not prepared.source.is_gguf and is_multimodal(prepared.config)  # a GGUF file holds a language model alone


def _check_chat_template(run: RunDirectory, text: str) -> None:
    file = run.inside(CHAT_TEMPLATE_FILE)
    if run.has_begun and file.is_file() and file.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{run.path}: data.chat_template differs from {file}, with which the run began. Fix: name that file."
        )


def newest_checkpoint(run: RunDirectory, processes: Processes) -> Checkpoint | None:
    """The checkpoint that the first process finds: all processes continue from it. A warning tells if there is none."""
    found = processes.first(run.newest_checkpoint)
    step = processes.gather(found.step if found else None)[0]
    if step is None and processes.is_first:
        logger.warning("%s has no whole checkpoint: the run begins again at its first step.", run.path)
    return None if step is None else Checkpoint(step, run.checkpoint_path(step))
