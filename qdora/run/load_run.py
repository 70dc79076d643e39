"""Load a run again with its adapter, or any model that `qdora eval` and `qdora generate` are given."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.layer import drop_scales_without_room
from qdora.data.chats import set_chat_date
from qdora.errors import UserError, not_one_of
from qdora.files.atomic import atomic_write_json, atomic_write_text, read_json_object
from qdora.files.machine import check_gpu, user_path
from qdora.files.run_directory import RunDirectory, chat_date_of, open_run
from qdora.model.adapter_file import CONFIG_FILE, describe_adapter, load_adapter, read_adapter
from qdora.model.build_model import Compute, choose_compute, find_model, set_kept_scales_
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.model.load import load_config, load_model, skeleton, stored_form
from qdora.model.source import ADAPTER_DIRECTORY, BUILTIN, has_tokenizer, load_tokenizer, public_name, resolve
from qdora.model.store import compressed_layers
from qdora.model.tokens import extend_vocabulary, new_token_ids
from qdora.recipe.data_settings import DEMO_TASKS, is_path
from qdora.recipe.options import WhichOrBase
from qdora.recipe.recipe_file import override, recipe_from, recipe_of_run, resolved_yaml
from qdora.recipe.section import with_settings
from qdora.recipe.settings import Recipe
from qdora.run.base import FOLDER, check_base, load_base, residency_here
from qdora.train.checkpoint import PARAMETERS_FILE, copy_parameters

_QUANTS = ("nf4", "nf4-single", "fp4", "fp4-single", "int8", "none")  # -single is without double quantisation
NOT_TRAINED: dict[str, Any] = {
    "data": {"mix": [{"task": task} for task in DEMO_TASKS]},
    "train": {"steps": 0, "batch": 1},
}
"""Sections of a recipe that trains nothing. On the text of its data an export is compared."""

logger = logging.getLogger("qdora")


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run and its model in memory; `state` is what was loaded: "final", "step-120" or "base"."""

    run: RunDirectory
    recipe: Recipe
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    state: str


class LoadedModel(NamedTuple):
    """A run or a model in memory; the label is the state of a run, or the last part of a model's name."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    run: RunDirectory | None = None


def load_run(
    path: Path,
    *,
    step: int | None = None,
    base_only: bool = False,
    original: bool = False,
    widened: bool = False,
) -> TrainedRun:
    """Load the base and the adapter of a run.

    step: None is the finished adapter, or the newest checkpoint of an unfinished run. original: the adapter on the
    source's own weights, dense in the dtype of its config. widened: float32 with an attention that supports it, the
    whole base on the GPU.
    """
    run = open_run(path)
    recipe = recipe_of_run(path)
    if widened:
        recipe = override(recipe, ["model.dtype=float32", "model.attention=auto"])
    compute = choose_compute(recipe.model.dtype)
    trained, state = trained_state(run, recipe, step)
    source, tokenizer = find_model(recipe)
    check_base(run, source)
    set_chat_date(tokenizer, chat_date_of(path))
    if original:
        recipe = with_settings(recipe, base={"quant": "none", "method": "round"})
        if recipe.model.attention == "flash_attention_2":  # which the checkpoint's dtype may not have
            recipe = override(recipe, ["model.attention=auto"])
        dtype = load_config(source).dtype
        compute = Compute(compute.device, dtype if isinstance(dtype, torch.dtype) else torch.float32)
    loaded = residency_here(run, recipe, compute.device, differentiated=widened)
    compressed = compressed_layers(run.inside(FOLDER)) if recipe.base.is_made_once else None
    model = load_base(loaded, source, compute, compressed=compressed)
    extend_vocabulary(model, new_token_ids(tokenizer, recipe.model.add_tokens))
    if base_only or recipe.adapter.kind == "none":
        state = "base"
    elif recipe.adapter.kind == "full":
        copy_parameters(load_file(trained / PARAMETERS_FILE), adapter_parameters(model))
    else:
        load_adapter(model, adapter_of(run, trained))
        set_kept_scales_(model, recipe)
        drop_scales_without_room(adapted_layers(model).values())
    return TrainedRun(run=run, recipe=recipe, model=model.eval(), tokenizer=tokenizer, state=state)


def trained_state(run: RunDirectory, recipe: Recipe, step: int | None) -> tuple[Path, str]:
    """The directory with the trained parameters, and the name of the state."""
    if recipe.adapter.kind == "none":
        return run.path, "base"
    if step is not None:
        path = run.inside("checkpoints", f"step-{step}")
        if not path.is_dir():
            raise UserError(f"--step: got {step}, must be one of {run.checkpoint_steps()} in {run.path}.")
        return path, path.name
    if run.adapter.is_dir():
        return run.adapter, "final"
    newest = run.newest_checkpoint()
    if newest is None:
        raise UserError(
            f"{run.path}: has no adapter and no checkpoint yet. Fix: continue qdora train with --resume."
        )
    return newest, newest.name


def adapter_of(run: RunDirectory, trained: Path) -> Path:
    """The adapter in the directory of a trained state, which `trained_state` gave."""
    return trained if trained == run.adapter else trained / "adapter"


def is_adapter(target: str | Path) -> bool:
    """Whether `target` is a directory with an adapter in PEFT's format. That of a run is inside it."""
    return (user_path(target) / CONFIG_FILE).is_file()


@contextmanager
def adopted_run(adapter: Path, base_model: str | None, quant: str | None) -> Iterator[Path]:
    """An adapter of any trainer as a run, with the demo tasks as data, in a temporary directory that links to it."""
    recipe, record = adopted_recipe(adapter, base_model, quant)
    adapter, of = user_path(adapter).resolve(), "adapter" if recipe.model.tokenizer else "base"
    base = " at ".join(filter(None, (recipe.model.source, recipe.model.revision)))
    text = "%s: taken as trained on %s, held in %s (%s), with the tokenizer of the %s."
    logger.info(text, adapter.name, base, record["quant"], record["known"], of)
    with tempfile.TemporaryDirectory(prefix="qdora-") as folder:
        run = RunDirectory(Path(folder) / adapter.name)
        run.path.mkdir()
        run.adapter.symlink_to(adapter)
        atomic_write_json(run.environment_file, {"adopted": record})
        atomic_write_text(run.recipe_file, resolved_yaml(recipe))
        yield run.path


def adopted_recipe(adapter: Path, base_model: str | None, quant: str | None) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of an adapter, and what is written of its base: name, revision, form, how the form is known.

    `base_model`: None is the one in adapter_config.json. `quant` is how the base was held in training; None: as
    qdora.json or the base's files say, else nf4 in blocks of 64 with double quantisation.
    """
    adapter = user_path(adapter)
    described, file = describe_adapter(adapter), adapter / CONFIG_FILE
    config, trained_on = read_json_object(file), dict((described.base or {}).get("quant") or {})
    if {"prune", "method"} & trained_on.keys() or (described.extra or {}).get("add_tokens"):
        what = "its base is pruned, quantised by GPTQ or has new tokens, which only its run has"
        raise UserError(f"{adapter}: {what}. Fix: name the run.")
    named = config.get("base_model_name_or_path")
    name, where = base_model or named, "--base-model" if base_model else f"{file}: base_model_name_or_path"
    if not name or (not base_model and is_path(name) and not user_path(name).exists()):
        is_here = f"{name} is not on this machine" if name else "is not set"
        raise UserError(f"{where}: {is_here}. Fix: name the model that was trained on with --base-model.")
    revision = config.get("revision") if name == named and public_name(name) else None
    source = resolve(name, revision, setting=where)
    stored, base_config, lora = stored_form(source), load_config(source), described.config
    if quant is not None:
        base, known = _asked_form(quant, stored, name), "--quant"
    elif trained_on:
        base, known = trained_on, "by qdora.json"
    elif stored["quant"] != "none":
        base, known = stored, "as the base is stored"
    else:
        base, known = {"quant": "nf4"}, "assumed; --quant changes it"
    model = {"source": name, "revision": source.revision}
    model["tokenizer"] = str(adapter.resolve()) if has_tokenizer(adapter) else None
    # Weights that are not quantised stay as the checkpoint has them, which may be finer than bfloat16.
    model["dtype"] = {torch.bfloat16: "auto", torch.float16: "float16"}.get(base_config.dtype, "float32")
    sizes = {"rank": lora.r, "alpha": lora.lora_alpha, "rank_stabilized": lora.use_rslora}
    document = {
        "model": model,
        "base": base,
        "adapter": {"kind": described.kind, **sizes},
        **NOT_TRAINED,
    }
    recipe = recipe_from(document, str(adapter))
    read_adapter(skeleton(base_config, source), adapter)
    public = name if name == BUILTIN else public_name(name)
    return recipe, {
        "base": public,
        "revision": source.revision,
        "quant": recipe.base.quant_in_words,
        "known": known,
    }


def _asked_form(quant: str, stored: dict[str, Any], name: str) -> dict[str, Any]:
    if quant not in _QUANTS:
        raise UserError(not_one_of("--quant", quant, _QUANTS))
    if stored["quant"] not in ("none", "mxfp4"):
        raise UserError(f"--quant: {name} is quantised already, in {stored['quant']}.")
    kind, _, single = quant.partition("-")
    return {"quant": kind} | ({"double_quant": False} if single else {})


def is_run(target: str | Path) -> bool:
    """Whether `target` is a run directory."""
    return (Path(target) / "recipe.yaml").is_file()


def load_target(target: str, which: WhichOrBase = WhichOrBase(), *, verb: str) -> LoadedModel:
    """Load a run with its adapter, an adapter on its base, or a model: a directory, a Hub id, builtin, a GGUF file.

    A directory of `qdora export --format nf4-lora` gets its adapter. Of a model in full precision `which.quant` holds
    the linear layers in nf4, fp4 or int8.
    """
    base_model, quant = which.base_model, which.quant
    if base_model is not None and not is_adapter(target):
        raise UserError(f"--base-model: is used only with an adapter, got {target}.")
    if is_run(target):
        if quant is not None:
            raise UserError(f"--quant: is not used with a run, whose recipe says it, got {target}.")
        trained = load_run(Path(target), step=which.step, base_only=which.base)
        return LoadedModel(trained.model, trained.tokenizer, trained.state, trained.run)
    if which.step is not None or which.base:
        raise UserError(f"{verb}: --step and --base are used only with a run, got {target}.")
    if is_adapter(target):
        with adopted_run(Path(target), base_model, quant) as path:
            trained = load_run(path)
        return LoadedModel(trained.model, trained.tokenizer, path.name)
    check_gpu()  # before a download
    source = resolve(target, setting=verb)
    compute = choose_compute("auto")
    tokenizer = load_tokenizer(source, setting=verb)
    form = stored_form(source)
    form = form if quant is None else _asked_form(quant, form, target)
    model = load_model(source, device=compute.device, compute_dtype=compute.dtype, **form)
    adapter = source.path / ADAPTER_DIRECTORY
    if not source.is_gguf and (adapter / CONFIG_FILE).is_file():
        load_adapter(model, adapter)
        drop_scales_without_room(adapted_layers(model).values())
        model.eval()
    return LoadedModel(model, tokenizer, Path(os.path.abspath(target)).name)
