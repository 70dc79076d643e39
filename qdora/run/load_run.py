"""Load a run again with its adapter, or any model that `qdora eval` and `qdora generate` are given."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.adapted_linear import drop_scales_without_room
from qdora.data.chat_template import set_chat_date, set_chat_settings
from qdora.errors import UserError, not_one_of
from qdora.files.nvidia_driver import check_gpu
from qdora.files.run_directory import RunDirectory, chat_date_of, open_run
from qdora.model.adapter_file import CONFIG_FILE, load_adapter
from qdora.model.build_model import Compute, choose_compute, find_model, set_kept_scales_, token_ids
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.model.load import load_config, load_model, stored_form
from qdora.model.packed_base import PrunedBase
from qdora.model.source import ADAPTER_DIRECTORY, load_tokenizer, resolve
from qdora.model.trained_embeddings import extend_vocabulary
from qdora.recipe.recipe_file import override, recipe_of_run
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.adopted_run import adopted_recipe, adopted_run, is_adapter
from qdora.run.base import FOLDER, load_base
from qdora.run.recorded_base import check_base, residency_here
from qdora.train.checkpoint import PARAMETERS_FILE, copy_parameters

_QUANTS = ("nf4", "fp4", "int8")
"""What --quant takes for a model."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run and its model in memory."""

    run: RunDirectory
    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    state: str
    """The state that was loaded: "final", "step-120" or "base"."""


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A run or a model in memory."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    """The state of a run, or the last part of a model's name."""
    run: RunDirectory | None
    """None for a model."""


def load_run(
    path: Path, *, step: int | None = None, base_only: bool = False, original: bool = False, widened: bool = False
) -> TrainedRun:
    """Load the base and the adapter of a run.

    No layer keeps decoded scales where the recipe says so, or where a GPU has no room for them.

    Args:
        path: Run directory.
        step: Checkpoint; None: the finished adapter, or the newest checkpoint of an unfinished run.
        base_only: Leave the adapter out.
        original: Put the adapter on the source's own weights, dense in the dtype that its config names.
        widened: Compute in float32 with an attention that supports it, whatever the recipe says. A GPU holds the whole
            base, since second derivatives read any block at any time.
    Raises:
        UserError: There is no run, no such checkpoint, or nothing trained yet, or the base has changed.
    """
    run = open_run(path)
    recipe = recipe_of_run(run.recipe_file)
    if widened:
        recipe = override(recipe, ["model.dtype=float32", "model.attention=auto"])
    compute = choose_compute(recipe.model.dtype)
    trained, state = trained_state(run, recipe, step)
    source, tokenizer = find_model(recipe)
    check_base(run, source)
    set_chat_date(tokenizer, chat_date_of(path))
    if original:
        recipe = with_settings(recipe, base={"quant": "none"})
        if recipe.model.attention == "flash_attention_2":  # which the checkpoint's dtype may not have
            recipe = override(recipe, ["model.attention=auto"])
        dtype = load_config(source).dtype
        compute = Compute(compute.device, dtype if isinstance(dtype, torch.dtype) else torch.float32)
    loaded = residency_here(run, recipe, compute.device, differentiated=widened)
    pruned = None if recipe.base.prune is None else PrunedBase(run.inside(FOLDER))
    model = load_base(loaded, source, compute, placer=pruned)
    new_tokens = token_ids(recipe, tokenizer)
    extend_vocabulary(model, new_tokens)
    if base_only or recipe.adapter.kind == "none":
        state = "base"
    elif recipe.adapter.kind == "full":
        copy_parameters(load_file(trained / PARAMETERS_FILE), adapter_parameters(model), trained)
    else:
        load_adapter(model, adapter_of(run, trained))
        set_kept_scales_(model, recipe)
        drop_scales_without_room(adapted_layers(model).values())
    return TrainedRun(run=run, recipe=recipe, model=model.eval(), tokenizer=tokenizer, state=state)


def trained_state(run: RunDirectory, recipe: Recipe, step: int | None) -> tuple[Path, str]:
    """The directory with the trained parameters, and the name of the state. Raises as `load_run`."""
    if recipe.adapter.kind == "none":
        return run.path, "base"
    if step is not None:
        path = run.inside("checkpoints", f"step-{step}")
        if not path.is_dir():
            steps = ", ".join(map(str, run.checkpoint_steps()))
            if not steps:
                raise UserError(f"--step: got {step}, but {run.path} has no checkpoint. Fix: remove --step.")
            raise UserError(f"--step: got {step}, must be one of {steps} in {run.path}.")
        return path, f"step-{step}"
    if run.adapter.is_dir():
        return run.adapter, "final"
    newest = run.newest_checkpoint()
    if newest is None:
        raise UserError(f"{run.path}: has no adapter and no checkpoint yet. Fix: continue qdora train with --resume.")
    return newest.path, newest.path.name


def adapter_of(run: RunDirectory, trained: Path) -> Path:
    """The adapter in the directory of a trained state, which `trained_state` gave."""
    return trained if trained == run.adapter else trained / "adapter"


def is_run(target: str) -> bool:
    """Whether `target` is a run directory."""
    return (Path(target) / "recipe.yaml").is_file()


def check_target(target: str, *, base_model: str | None, quant: str | None, verb: str) -> None:
    """Raise UserError if a model or the base of an adapter is not found, or the adapter does not fit its base."""
    if is_adapter(target):
        adopted_recipe(Path(target), base_model, quant)
    elif not is_run(target):
        resolve(target, weights=False, setting=verb)


def load_target(
    target: str,
    *,
    step: int | None = None,
    base_only: bool = False,
    base_model: str | None = None,
    quant: str | None = None,
    verb: str,
) -> LoadedModel:
    """Load a run with its adapter, an adapter on its base, or a model: a directory, a Hub id, builtin, a GGUF file.

    A checkpoint that bitsandbytes quantised stays as it is stored. A directory of `qdora export --format nf4-lora` gets
    its adapter.

    Args:
        target: What to load.
        step, base_only: For a run, see `load_run`.
        base_model, quant: For an adapter, see `adopted_recipe`.
        quant: For a model in full precision: hold its linear layers in nf4, fp4 or int8. None: dense.
        verb: The command, for messages.
    Raises:
        UserError: Options that do not fit the target, or what loading refuses.
    """
    if base_model is not None and not is_adapter(target):
        raise UserError(f"--base-model: is used only with an adapter, got {target}. Fix: remove it.")
    if is_run(target):
        if quant is not None:
            raise UserError(
                f"--quant: is not used with a run, whose recipe says it, got {target}. Fix: remove --quant."
            )
        trained = load_run(Path(target), step=step, base_only=base_only)
        return LoadedModel(model=trained.model, tokenizer=trained.tokenizer, label=trained.state, run=trained.run)
    if step is not None or base_only:
        raise UserError(f"{verb}: --step and --base are used only with a run, got {target}. Fix: remove them.")
    if is_adapter(target):
        with adopted_run(Path(target), base_model, quant) as path:
            trained = load_run(path)
        return LoadedModel(model=trained.model, tokenizer=trained.tokenizer, label=path.name, run=None)
    if quant not in (None, *_QUANTS):
        raise UserError(not_one_of("--quant", quant, _QUANTS))
    check_gpu()  # before a download
    source = resolve(target, setting=verb)
    compute = choose_compute("auto")
    tokenizer = load_tokenizer(source, setting=verb)
    form = stored_form(source)
    if quant is not None and form["quant"] != "none":
        raise UserError(f"--quant: {target} is quantised already, in {form['quant']}. Fix: remove --quant.")
    form = form if quant is None else {"quant": quant}
    model = load_model(source, device=compute.device, compute_dtype=compute.dtype, **form)
    adapter = source.path / ADAPTER_DIRECTORY
    if not source.is_gguf and (adapter / CONFIG_FILE).is_file():
        load_adapter(model, adapter)
        drop_scales_without_room(adapted_layers(model).values())
        model.eval()
    return LoadedModel(model=model, tokenizer=tokenizer, label=Path(os.path.abspath(target)).name, run=None)


def render_chats_like(tokenizer: PreTrainedTokenizerBase, run: Path, recipe: Recipe) -> None:
    """Give the template of another model's tokenizer the date and the variables that those of a run have."""
    set_chat_date(tokenizer, chat_date_of(run))
    set_chat_settings(tokenizer, template_kwargs=dict(recipe.data.template_kwargs))
