"""An adapter of any trainer as a run, so that it is exported, evaluated and used as one.

The run directory is temporary and links to the adapter, where nothing is written. Its recipe follows from the adapter's
files. Nobody knows the data, so qdora's demo tasks are the text on which an export is compared.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qdora.errors import UserError, not_one_of
from qdora.files.atomic import atomic_write_json, atomic_write_text
from qdora.files.json_file import read_json_object
from qdora.files.run_directory import RunDirectory
from qdora.files.user_paths import user_path
from qdora.model.adapter_file import CONFIG_FILE, describe_adapter, read_adapter
from qdora.model.load import load_config, skeleton, stored_form
from qdora.model.source import BUILTIN, has_tokenizer, public_name, resolve
from qdora.recipe.data_settings import DEMO_TASKS, is_path
from qdora.recipe.recipe_file import recipe_from, resolved_yaml
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")

_QUANTS = ("nf4", "nf4-single", "fp4", "fp4-single", "int8", "none")
"""What --quant takes; -single is without double quantisation."""


def is_adapter(target: str | Path) -> bool:
    """Whether `target` is a directory with an adapter in PEFT's format. That of a run is inside it."""
    return (user_path(target) / CONFIG_FILE).is_file()


@contextmanager
def adopted_run(adapter: Path, base_model: str | None, quant: str | None) -> Iterator[Path]:
    """A run directory for an adapter, of the same name, as long as the block runs; logs what was assumed.

    Args and errors: See `adopted_recipe`.
    """
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

    Args:
        base_model: The base, as model.source. None: the one in adapter_config.json.
        quant: How the base was held in training, one of nf4, fp4 (also with -single), int8, none. None: as qdora.json
            or the base's own files say, else nf4 in blocks of 64 with double quantisation.
    Raises:
        UserError: An adapter that qdora does not read or that does not fit the base, or a base that is not here. No
            weight of the base is read.
    """
    adapter = user_path(adapter)
    described, file = describe_adapter(adapter), adapter / CONFIG_FILE
    config, trained_on = read_json_object(file), dict((described.base or {}).get("quant") or {})
    needed = ["base.prune"] if "prune" in trained_on else []
    needed += ["model.add_tokens"] if (described.extra or {}).get("add_tokens") else []
    if needed:
        raise UserError(f"{adapter}: was trained with {' and '.join(needed)}, which needs its run. Fix: name the run.")
    named = config.get("base_model_name_or_path")
    name, where = base_model or named, "--base-model" if base_model else f"{file}: base_model_name_or_path"
    if not name or (not base_model and is_path(name) and not user_path(name).exists()):
        is_here = "is not on this machine" if name else "is not set"
        raise UserError(f"{where}: {name} {is_here}. Fix: name the model that was trained on with --base-model.")
    revision = config.get("revision") if name == named and public_name(name) else None
    source = resolve(name, revision, setting=where)
    stored = stored_form(source)
    if quant not in (None, *_QUANTS):
        raise UserError(not_one_of("--quant", quant, _QUANTS))
    if quant is not None and stored["quant"] in ("nf4", "fp4", "int8"):
        raise UserError(f"--quant: {name} is quantised already, in {stored['quant']}. Fix: remove --quant.")
    if quant is not None:
        kind, _, single = quant.partition("-")
        base, known = {"quant": kind} | ({"double_quant": False} if single else {}), "--quant"
    elif trained_on:
        base, known = trained_on, "by qdora.json"
    elif stored["quant"] != "none":
        base, known = stored, "as the base is stored"
    else:
        base, known = {"quant": "nf4"}, "assumed; --quant changes it"
    config_of_base, lora = load_config(source), described.config
    model = {"source": name, "revision": source.revision}
    model["tokenizer"] = str(adapter.resolve()) if has_tokenizer(adapter) else None
    # Weights that are not quantised stay as the checkpoint has them, which may be finer than bfloat16.
    model["dtype"] = {torch.bfloat16: "auto", torch.float16: "float16"}.get(config_of_base.dtype, "float32")
    document = {
        "model": {key: value for key, value in model.items() if value is not None},
        "base": base,
        "adapter": {
            "kind": described.kind,
            "rank": lora.r,
            "alpha": lora.lora_alpha,
            "rank_stabilized": lora.use_rslora,
        },
        "data": {"mix": [{"task": task} for task in DEMO_TASKS]},
        "train": {"steps": 1, "batch": 1},
    }
    recipe = recipe_from(document, str(adapter))
    if getattr(config_of_base, "quantization_config", None) is not None:
        del config_of_base.quantization_config
    read_adapter(skeleton(config_of_base, source, torch.float32, "auto", torch.device("cpu")), adapter)
    public = name if name == BUILTIN else public_name(name)
    return recipe, {"base": public, "revision": source.revision, "quant": recipe.base.quant_in_words, "known": known}
