"""A finished or interrupted run, loaded again with its adapter.

What `qdora eval` and `qdora generate` are pointed at: a run, an exported directory, or any model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.errors import UserError
from qdora.files.run_directory import RunDirectory, open_run
from qdora.model.adapter_file import CONFIG_FILE, load_adapter
from qdora.model.bnb_checkpoint import gather_packed, stored_kind
from qdora.model.build_model import Compute, choose_compute, find_model, put_adapters
from qdora.model.inject import adapter_parameters
from qdora.model.load import load_config, load_model
from qdora.model.source import ModelSource, load_tokenizer, resolve
from qdora.model.stored_tensors import StoredPacked, open_safetensors
from qdora.recipe.recipe_file import load_recipe, override
from qdora.recipe.settings import Recipe
from qdora.run.load_base import load_base, residency_here
from qdora.run.pruned_base import FOLDER, load_pruned_base
from qdora.train.checkpoint import PARAMETERS_FILE, copy_parameters


@dataclass(frozen=True)
class TrainedRun:
    """A run and its model in memory."""

    run: RunDirectory
    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    state: str
    """Which state was loaded: "final", "step-120" or "base"."""


def load_run(
    path: Path, *, step: int | None = None, base_only: bool = False, original: bool = False, widened: bool = False
) -> TrainedRun:
    """Load the base and the adapter of a run.

    Args:
        path: Run directory.
        step: Load this checkpoint; None takes the finished adapter, or the newest checkpoint of an unfinished run.
        base_only: Leave the adapter out.
        original: Put the adapter on the source's own weights, dense in the dtype that its config names.
        widened: Compute in float32 whatever the recipe says, with an attention that takes it, and on a GPU with the
            whole base there: graphs over graphs read any block at any time.
    Raises:
        UserError: No run, no such checkpoint, nothing trained yet.
    """
    run = open_run(path)
    recipe = load_recipe(run.recipe_file)
    if widened:
        recipe = override(recipe, ["model.dtype=float32", "model.attention=auto"])
    trained, state = trained_state(run, recipe, step)
    source, tokenizer = find_model(recipe)
    compute = choose_compute(recipe.model.dtype)
    if original:
        dense = recipe.base.model_copy(update={"quant": "none"})
        recipe = recipe.model_copy(update={"base": dense})
        dtype = load_config(source).dtype
        compute = Compute(compute.device, dtype if isinstance(dtype, torch.dtype) else torch.float32)
    loaded = residency_here(run, recipe, compute.device, differentiated=widened)
    if recipe.base.prune is None:
        model = load_base(loaded, source, compute)
    else:
        model = load_pruned_base(loaded, source, compute, run.inside(FOLDER))
    if base_only or recipe.adapter.kind == "none":
        state = "base"
    elif recipe.adapter.kind == "full":
        copy_parameters(load_file(trained / PARAMETERS_FILE), adapter_parameters(model), trained)
    else:
        put_adapters(model, recipe, trained if trained == run.adapter else trained / "adapter")
    return TrainedRun(run, recipe, model.eval(), tokenizer, state)


def trained_state(run: RunDirectory, recipe: Recipe, step: int | None) -> tuple[Path, str]:
    """Directory with the trained parameters, and its name; raises as `load_run`."""
    if recipe.adapter.kind == "none":
        return run.path, "base"
    if step is not None:
        path = run.inside("checkpoints", f"step-{step}")
        if not path.is_dir():
            steps = sorted(int(each.name.removeprefix("step-")) for each in run.checkpoints.glob("step-*"))
            raise UserError(
                f"{run.path}: no checkpoint of step {step}, allowed: {', '.join(map(str, steps)) or 'none'}."
            )
        return path, f"step-{step}"
    if run.adapter.is_dir():
        return run.adapter, "final"
    newest = run.newest_checkpoint()
    if newest is None:
        raise UserError(
            f"{run.path}: nothing is trained yet (no adapter, no checkpoint). Run: qdora train with --resume"
        )
    return newest.path, newest.path.name


ADAPTER_DIRECTORY = "adapter"


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory; `label` is the state of a run, or the name of a directory; `run` is None for a model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    run: RunDirectory | None


def is_run(target: str) -> bool:
    """Whether `target` is a run's directory."""
    return (Path(target) / "recipe.yaml").is_file()


def load_target(
    target: str, *, step: int | None = None, base_only: bool = False, quant: str | None = None, verb: str
) -> LoadedModel:
    """Load a run with its adapter, or a model: a directory, a Hub id, builtin, a GGUF file.

    A checkpoint that bitsandbytes quantised is held as it is stored; a directory of `qdora export --format nf4-lora`
    gets its adapter.

    Args:
        target: What to load.
        step, base_only: Of a run, see `load_run`.
        quant: Of a model in full precision: hold its linear layers in nf4, fp4 or int8; None keeps them dense.
        verb: For messages.
    Raises:
        UserError: Options that do not belong to such a target, or what loading refuses.
    """
    if is_run(target):
        if quant is not None:
            raise UserError(f"--quant: a run has a base of its own, got {quant!r} for {target}.")
        trained = load_run(Path(target), step=step, base_only=base_only)
        return LoadedModel(trained.model, trained.tokenizer, trained.state, trained.run)
    if step is not None or base_only:
        raise UserError(f"{verb}: --step and --base belong to a run, got {target}.")
    source = resolve(target)
    compute = choose_compute("auto")
    tokenizer = load_tokenizer(source)
    form = {"quant": quant} if quant is not None else _stored_form(source)
    model = load_model(source, device=compute.device, compute_dtype=compute.dtype, **form)
    adapter = source.path / ADAPTER_DIRECTORY
    if source.kind == "directory" and (adapter / CONFIG_FILE).is_file():
        load_adapter(model, adapter)
        model.eval()
    return LoadedModel(model, tokenizer, Path(target).name, None)


def _stored_form(source: ModelSource) -> dict[str, Any]:
    """How the checkpoint holds its linear layers, as settings of `load_model`."""
    kind = None if source.is_gguf else stored_kind(getattr(load_config(source), "quantization_config", None))
    if kind is None:
        return {"quant": "none"}
    packed = [item for item in gather_packed(open_safetensors(source.path)).values() if isinstance(item, StoredPacked)]
    if kind == "int8" or not packed:
        return {"quant": kind}
    return {"quant": kind, "block_size": packed[0].block_size, "double_quant": packed[0].double_quant}
