"""Whether an nf4-lora directory is the model that was trained: loaded by those who know nothing of DoRA, and compared.

transformers and bitsandbytes load the base, PEFT the adapter where it is installed; else qdora's own loader reads both.

What quantising the merge again costs: reloaded by transformers and bitsandbytes, and compared.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.export.logit_comparison import compare_logits, token_sequences, verdict
from qdora.export.nf4_lora import FOUR_BIT_KINDS
from qdora.export.verify import compare_weights, load_plainly, tokenizer_faults
from qdora.model.adapter_file import WEIGHTS_FILE, factor_names, load_adapter
from qdora.model.bnb_checkpoint import gather_packed
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.model.stored_tensors import Stored, open_safetensors, rename_to_model
from qdora.ops.packed import PackedWeight, dequantize
from qdora.run.load_run import ADAPTER_DIRECTORY

PLAIN_LOADER = "transformers, bitsandbytes, PEFT"
OWN_LOADER = "qdora (PEFT is not installed)"


def verify_nf4_lora(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    texts: Sequence[str] | None = None,
    input_ids: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 2048,
    max_length: int = 512,
) -> dict[str, Any]:
    """Reload base and adapter and compare their logits, in float32, with those of the running adapter model.

    Passed means: every tensor found its place; the tokenizer gives the same ids; rows of every scaled base + s B A
    equal the float64 formula g (W + s B A) within float32's roundings; and the logits stay within the tolerance of
    `logit_comparison` for a float32 export.

    Args:
        model: The running model with its adapters.
        directory: From `export_nf4_lora`.
        tokenizer, texts, input_ids, max_tokens, max_length: As of `verify_merged`.
    Returns:
        As of `verify_merged`, with `loaded_by`.
    Raises:
        UserError: As of `verify_merged`.
    """
    sequences = token_sequences(tokenizer, texts, input_ids, max_tokens, max_length)
    device = next(model.parameters()).device
    if importlib.util.find_spec("peft") is not None:
        loaded_by = PLAIN_LOADER
        exported, faults = load_with_peft(directory, model, device)
    else:
        loaded_by = OWN_LOADER
        exported, faults = load_with_qdora(directory, model, device), []
    total = compare_logits(model, exported, sequences, device)
    del exported
    weights = compare_weights(model, exported_weights(directory, model), torch.float32)
    if not weights["max_error"] <= 1.0:
        faults.append(f"{weights['worst_layer']}: its exported weight is {weights['max_error']:.3g} roundings off")
    faults += tokenizer_faults(tokenizer, directory, texts, sequences)
    found = verdict(total, faults, torch.float32, model.dtype)
    return found | {"num_texts": len(sequences), "weights": weights, "loaded_by": loaded_by}


def load_with_peft(directory: Path, model: PreTrainedModel, device: torch.device) -> tuple[Any, list[str]]:
    """Base and adapter as a stranger loads them, computing in float32, and what did not find its place.

    Args:
        directory: From `export_nf4_lora`.
        model: The running model, for its attention.
        device: Where to.
    """
    peft = importlib.import_module("peft")
    base, faults = load_with_bnb(directory, model, device)
    exported = peft.PeftModel.from_pretrained(base, str(directory / ADAPTER_DIRECTORY))
    stored = load_file(directory / ADAPTER_DIRECTORY / WEIGHTS_FILE)
    held = peft.get_peft_model_state_dict(exported)
    if held.keys() != stored.keys():
        differing = sorted(held.keys() ^ stored.keys())
        faults.append(f"PEFT has other tensors than the adapter file: {', '.join(differing[:5])} ({len(differing)})")
    return exported.eval(), faults


def load_with_bnb(directory: Path, model: PreTrainedModel, device: torch.device) -> tuple[PreTrainedModel, list[str]]:
    """A bitsandbytes checkpoint as a stranger loads it, computing in float32, and what did not find its place."""
    base, faults = load_plainly(directory, model, device_map={"": device})
    for parameter in base.parameters():
        # transformers keeps the file's dtype beside quantised weights, whatever it is asked for.
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            # The checkpoint names the dtype of deployment; the comparison is of float32 with float32.
            layer.compute_dtype = layer.weight.quant_state.dtype = torch.float32
            # On some CPUs bitsandbytes repacks the weight for a bf16 kernel at the first forward otherwise.
            layer.support_avx512bf16_for_cpu = False
    return base, faults


def load_with_qdora(directory: Path, model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Base and adapter by qdora's own loader, in float32."""
    first = next(layer for layer in frozen_layers(model).values() if layer.kind in FOUR_BIT_KINDS)
    attention = model.config._attn_implementation
    exported = load_model(
        resolve(str(directory)),
        quant=first.kind,
        block_size=first.block_size,
        double_quant=False,
        device=device,
        compute_dtype=torch.float32,
        attention=attention if attention in ("eager", "sdpa") else "auto",
    )
    load_adapter(exported, directory / ADAPTER_DIRECTORY)
    return exported.eval()


def exported_weights(directory: Path, model: PreTrainedModel) -> Callable[[str], Tensor | None]:
    """Path of an adapted layer -> the dense weight that the files stand for, scaled base + s B A, in float64."""
    files: Mapping[str, Stored] = rename_to_model(gather_packed(open_safetensors(directory)), model)
    factors = load_file(directory / ADAPTER_DIRECTORY / WEIGHTS_FILE)
    layers = adapted_layers(model)

    def weight(path: str) -> Tensor | None:
        item = files.get(f"{path}.weight")
        name_a, name_b = factor_names(path)
        if item is None or name_a not in factors or name_b not in factors:
            return None
        stored = item.read()
        base = dequantize(stored, torch.float64) if isinstance(stored, PackedWeight) else stored.double()
        return base + layers[path].scaling * (factors[name_b].double() @ factors[name_a].double())

    return weight


def verify_requantized(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    texts: Sequence[str] | None = None,
    input_ids: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 2048,
    max_length: int = 512,
) -> dict[str, Any]:
    """The differences of `verify_merged`, without a tolerance: this format rounds to 4 bits, the figures say how far.

    Passed means only: every tensor found its place, the tokenizer gives the same ids, all logits are finite.

    Args:
        model, tokenizer, texts, input_ids, max_tokens, max_length: As of `verify_merged`.
        directory: From `export_streamed` with `requantize`.
    Raises:
        UserError: As of `verify_merged`.
    """
    sequences = token_sequences(tokenizer, texts, input_ids, max_tokens, max_length)
    device = next(model.parameters()).device
    exported, faults = load_with_bnb(directory, model, device)
    total = compare_logits(model, exported, sequences, device)
    faults += tokenizer_faults(tokenizer, directory, texts, sequences)
    return verdict(total, faults, torch.float32, model.dtype, lossy=True) | {"num_texts": len(sequences)}
