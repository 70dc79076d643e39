"""Packed rows: the layout that a model's attention takes, and a check that their examples do not see each other."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdora.adapter.evaluation_mode import evaluation_mode
from qdora.data.batches import PackedLayout
from qdora.errors import UserError
from qdora.model.attention import attention_of
from qdora.model.patches import flash_inputs, flash_lengths, takes_flash_lengths

# Tokens of the probed example, of the example before it in each of two rows, and of the example behind it. The borders
# differ between the rows, so that a model that reads the positions of the first row only fails, too.
_PROBED, _BEFORE, _BEHIND = 9, (7, 4), 6
# Largest root mean square between a packed example and the same one alone, in units of measured rounding (SmolLM2-135M
# in bf16: 1.5). Root mean squares vary less than the largest of many differences. Other neighbours in rows of the same
# shape should change no bit, except perhaps in mixtures of experts, and may change a logit by one unit.
_SPREAD = 8.0
# Rounding in units of the logits, at least: in float32 a row of another length may take other kernels (1e-6), and
# an example that sees its neighbour moves logits by more than 0.1.
_LEAST = 1e-4


def packed_layout(model: PreTrainedModel) -> tuple[PackedLayout, str]:
    """The layout of packed rows for the model, after a check that its examples do not see each other; both in words.

    transformers finds the borders of examples by positions that start again at 0. It masks the rest of the row (sdpa,
    eager, flex; any number of rows) or calls a kernel for variable lengths (flash attention; a single row). Models with
    a state that runs through the row (Mamba, linear attention), or with positions of their own, do not support that, so
    each model is tried: four forward passes (six with flash attention) of at most 44 tokens, without a draw from the
    global generators.

    Raises:
        UserError: An example's outputs depend on its neighbours, or differ from the example alone beyond rounding.
    """
    attention = attention_of(model) or "its own code"
    layout = layout_for(attention)
    with evaluation_mode(model):
        seen, most = _check(model, layout, attention)
    rows = "one row without padding" if layout == "single" else "rows with a mask"
    kinds = sorted(set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"})
    others = f" Its layers of {', '.join(kinds)} are in the trial." if kinds else ""
    return layout, (
        f"packed examples stay apart: other tokens in one example change the logits of the next by {seen:.2g}, "
        f"rounding by up to {most:.2g} (tried with this model: attention by {attention}, a micro-batch is {rows})."
        f"{others}"
    )


def layout_for(attention: str) -> PackedLayout:
    """The layout for an attention implementation of transformers."""
    return "single" if "flash" in attention else "rows"


@torch.no_grad()
def _check(model: PreTrainedModel, layout: PackedLayout, attention: str) -> tuple[float, float]:
    """(largest change of a logit by other tokens in the example before, what rounding may change)."""
    name = model.config.model_type
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(f"data.packing: must be false for {name}, which takes no position_ids (got true).")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def text(length: int) -> Tensor:
        return torch.randint(vocabulary, (length,), generator=generator)

    probe = text(_PROBED)
    alone = _logits(model, probe[None])[0]
    # In a causal model later tokens have no effect, so this is the rounding error of a row of another length.
    rounding = _logits(model, torch.cat([probe, text(_BEHIND)])[None])[0, :_PROBED] - alone
    first, second = (
        _probe_outputs(model, layout, [[text(before), probe, text(_BEHIND)] for before in _BEFORE]) for _ in range(2)
    )
    eps = max(torch.finfo(model.dtype).eps, _LEAST)
    seen, wrong = float((first - second).abs().max()), _rms(first - alone)
    most = max(float(rounding.abs().max()), float(eps * alone.abs().max()))
    most_wrong = _SPREAD * max(_rms(rounding), eps * _rms(alone))
    if not seen <= most:  # NaN fails both
        fault = f"other tokens in a packed example change logits of the next one by {seen:.2g}"
    elif not wrong <= most_wrong:
        fault = f"logits of a packed example differ from those of the example alone by {wrong:.2g} (root mean square)"
        most = most_wrong
    else:
        return seen, most
    instead = "" if attention == "sdpa" else ", or model.attention: sdpa if the model has it"
    raise UserError(
        f"data.packing: {name} (attention by {attention}) does not keep packed examples apart: {fault}, where "
        f"rounding is {most:.2g}. Fix: data.packing: false{instead}."
    )


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    """(rows, length, vocabulary) float32."""
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, **inputs).logits
    return logits.float()


def _probe_outputs(model: PreTrainedModel, layout: PackedLayout, rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Logits of the second example of each row, (rows, length, vocabulary) float32; rows may differ in length."""
    width = max(sum(map(len, row)) for row in rows)
    packed = []
    for row in rows:
        parts = list(row) if layout == "single" else [*row, torch.zeros(width - sum(map(len, row)), dtype=torch.int64)]
        positions = torch.cat([torch.arange(len(part)) for part in parts])
        packed.append((torch.cat(parts)[None], positions[None]))
    if layout == "rows":
        packed = [(torch.cat([ids for ids, _ in packed]), torch.cat([positions for _, positions in packed]))]
    logits: list[Tensor] = []
    for ids, positions in packed:
        inputs: dict[str, Any] = {"position_ids": positions.to(model.device)}
        if layout == "single" and takes_flash_lengths(model):
            starts, longest = flash_lengths(positions)
            inputs |= flash_inputs(starts.to(model.device), longest)
        logits += _logits(model, ids, **inputs)
    places = [slice(len(row[0]), len(row[0]) + len(row[1])) for row in rows]
    return torch.stack([each[place] for each, place in zip(logits, places, strict=True)])
