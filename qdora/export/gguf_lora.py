"""Export a LoRA run as the GGUF file of its base and an adapter that llama.cpp puts on it (`--lora`), and check both.

llama.cpp computes W x + (alpha / rank) B (A x), with one alpha for all layers and the rank of each. The scaling of a
layer that has another one goes into its B. The rows of B are where the converter put those of W: it interleaves the
rows of q and k of some families. DoRA has no such form: its gain is a factor of the whole row, also of W.

The base is the dequantised one that the adapter was trained on. On another file of the same model it is another model.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.adapter.experts import AdaptedExperts
from qdora.errors import UserError, refuse, shorten
from qdora.export.checkpoints import write_form
from qdora.export.gguf import InLlamaCpp, compare_tensors, find_llama_cpp, merged_dtype, write_gguf
from qdora.export.verify import (
    Check,
    ComparisonText,
    fits_in_float32,
    load_with_transformers,
    logits_compared,
    verdict,
)
from qdora.export.write import base_of, merged, plan_export, write_checkpoint
from qdora.files.atomic import remove_directory
from qdora.model.build_model import find_source
from qdora.model.gguf import LAYOUTS, GgufHeader, gguf_tensors, processor_of, read_header, require_gguf
from qdora.model.inject import adapted_layers
from qdora.model.load import load_config, skeleton
from qdora.model.multimodal import is_multimodal
from qdora.model.source import ModelSource
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import recipe_of_run
from qdora.recipe.settings import Recipe
from qdora.run.load_run import TrainedRun, load_run
from qdora.run.report import Form

logger = logging.getLogger("qdora")

_ADAPTER = "adapter.gguf"
_FORM = Form(
    """`base-TYPE.gguf` is the base in the form that training used, `adapter.gguf` the LoRA for it, which is right on \
this file alone: on another file of the same base model it gives other results. Both were read again and compared with \
the trained model.""",
    library="gguf",
    serve=f"llama-server --jinja -m base-{{}}.gguf --lora {_ADAPTER}",
)


def export_gguf_lora(
    run: Path, folder: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], Check, Form]:
    """Convert the dequantised base and write the adapter; returns as `export_gguf`."""
    type_, recipe = options.gguf_type, recipe_of_run(run)
    config = load_config(find_source(recipe, weights=False))
    refuse([f"--format gguf-lora: {fault}" for fault in _faults(recipe, config, type_)])
    tools = find_llama_cpp(options.llama_cpp, type_)
    require_gguf()
    trained = load_run(run, step=options.step)
    dense, file, dtype = folder / "merged", folder / f"base-{type_}.gguf", merged_dtype(type_, config)
    write_form(_export_base, trained, dense, options, console, dtype=dtype)
    console.print(f"converting to {type_}")
    write_gguf(tools, dense, file, type_)
    alpha = write_lora(trained.model, read_header(file), _empty(dense), folder / _ADAPTER)
    sizes = {each.name: each.stat().st_size for each in (file, folder / _ADAPTER)}
    result = {"type": type_, "files": [*sizes], "num_bytes": sum(sizes.values()), "alpha": alpha}
    check = partial(verify_gguf_lora, trained, file, dense, dtype)
    return trained, result, check, _FORM._replace(serve=_FORM.serve.format(type_))


def _faults(recipe: Recipe, config: PreTrainedConfig, type_: str) -> list[str]:
    adapter = recipe.adapter
    reasons = {
        f"needs adapter.kind lora, got {adapter.kind}": adapter.kind != "lora",
        "a LoRA cannot mask B A (adapter.mask: keep)": adapter.mask == "keep",
        "an adapter has no embeddings (adapter.also_train)": adapter.also_train,
        "the model is multimodal": is_multimodal(config),
    }
    faults = [f"{fault}. Fix: use --format gguf." for fault, applies in reasons.items() if applies]
    if type_ not in ("f32", "f16", "bf16"):
        faults.append(
            f"--gguf-type must be f32, f16 or bf16, got {type_}: on other weights it is another model."
        )
    return faults


def _export_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: Path,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> dict[str, Any]:
    plan = plan_export(model, dtype, lambda layer: merged(base_of(layer)))
    return write_checkpoint(plan, tokenizer, directory, **options)


def _empty(dense: Path) -> PreTrainedModel:
    source = ModelSource("directory", dense, dense.name)
    return skeleton(load_config(source), source)


def write_lora(model: PreTrainedModel, header: GgufHeader, empty: PreTrainedModel, out: Path) -> float:
    """Write the adapters of `model` for the GGUF file of their base, in float32; returns alpha.

    `empty` is a skeleton of the base.
    """
    import gguf

    layers = adapted_layers(model)
    keys = {name.removesuffix(".weight"): item.key for name, item in gguf_tensors(header, empty).items()}
    absent = [path for path, layer in layers.items() if path not in keys or isinstance(layer, AdaptedExperts)]
    if absent or header.architecture not in LAYOUTS:
        what = (
            f"{absent[0]} has no tensor of its own in the file"
            if absent
            else "the layout of the file is not known"
        )
        raise UserError(f"--format gguf-lora: {what}. Fix: use --format gguf.")
    first = next(iter(layers.values()))
    alpha = first.scaling * first.rank
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells where it writes
    writer = gguf.GGUFWriter(str(out), header.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for path, layer in layers.items():
        b = layer.gated_B().detach().float().cpu() * (layer.scaling * layer.rank / alpha)
        in_file = torch.empty_like(b)
        in_file[_rows_in_file(header, empty, keys[path], len(b))] = b
        writer.add_tensor(f"{keys[path]}.lora_a", layer.lora_A.detach().float().cpu().numpy())
        writer.add_tensor(f"{keys[path]}.lora_b", in_file.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return float(alpha)


def _rows_in_file(header: GgufHeader, empty: PreTrainedModel, key: str, num_rows: int) -> Tensor:
    """Where the file has each row of the model's weight, (rows,) int64: numbered rows, read as the weight is."""
    numbered = np.arange(2 * num_rows, dtype=np.float32).reshape(2, num_rows).T.copy()
    read = torch.from_numpy(processor_of(header, empty).process(weights=numbered, name=key).weights).long()
    rows = read[:, 0]
    if not (
        torch.equal(read[:, 1], rows + num_rows) and torch.equal(rows.sort().values, torch.arange(num_rows))
    ):
        raise UserError(f"--format gguf-lora: llama.cpp changes the values of {key}. Fix: use --format gguf.")
    return rows


@torch.no_grad()
def verify_gguf_lora(
    trained: TrainedRun, file: Path, dense: Path, dtype: torch.dtype, text: ComparisonText
) -> dict[str, Any]:
    """Compare both files, read as llama.cpp reads them, with the running model; removes `dense`.

    Passed means: every tensor of the base's file is that of the dense checkpoint, and the logits of transformers with
    W + (alpha / rank) B A of the files stay within the tolerance of a merge in `dtype`; llama.cpp's own where
    llama-cpp-python is installed, with no tolerance for the rounding of its arithmetic.
    """
    import gguf

    model, header, adapter = trained.model, read_header(file), file.with_name(_ADAPTER)
    tensors, faults = compare_tensors(header, dense)
    faults, total = shorten(faults), None
    if importlib.util.find_spec("llama_cpp") is not None:
        in_llama_cpp: Any = logits_compared(model, InLlamaCpp(file, adapter), text)
        kl = 0.0 if in_llama_cpp is None else float(in_llama_cpp["exported_vs_reference"][:, 2].mean())
        if not kl <= 1e-3:
            faults.append(
                f"llama.cpp computes other probabilities with the files: mean KL {kl:.3g} (allowed 0.001)"
            )
    if fits_in_float32(dense, model):
        exported, missing = load_with_transformers(dense, model)
        reader, held = gguf.GGUFReader(adapter), {each.name: each for each in header.tensors}
        factors = {each.name: torch.from_numpy(each.data.copy()) for each in reader.tensors}
        alpha, empty = reader.fields["adapter.lora.alpha"].contents(), _empty(dense)
        processor = processor_of(header, empty)
        for name, item in gguf_tensors(header, empty).items():
            if f"{item.key}.lora_a" in factors:
                a, b = factors.pop(f"{item.key}.lora_a"), factors.pop(f"{item.key}.lora_b")
                values = header.values(held[item.key]) + (alpha / len(a) * b @ a).numpy()
                read = processor.process(weights=values, name=item.key).weights
                exported.get_parameter(name).copy_(torch.from_numpy(np.ascontiguousarray(read)))
        faults += missing + [f"the adapter's {name} has no place in the base" for name in factors]
        total = logits_compared(model, exported.to(model.device), text)
    remove_directory(dense)
    return verdict(total, faults, dtype, model.dtype) | {"tensors": tensors}
