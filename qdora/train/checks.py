"""What a run tries with its model, and checks in its first updates: in log.txt and checks.json, in words.

Packed rows: transformers finds the borders of examples by positions that start again at 0. It masks the rest of the row
(sdpa, eager, flex; any number of rows) or calls a kernel for variable lengths (flash attention; a single row). Models
with a state that runs through the row (Mamba, linear attention), or with positions of their own, do not support that,
so each model is tried.

A divided base: a wrong byte in a gathered weight would train an adapter for a model that does not exist, at a plausible
loss. So the loss is also computed with some blocks gathered by a plain collective instead of torch's `fully_shard`.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdora.adapter.layer import FrozenLinear, evaluation_mode
from qdora.adapter.norms import refresh
from qdora.adapter.rows import divided_tensors
from qdora.data.batches import PackedLayout
from qdora.errors import RunFailure, UserError
from qdora.files.atomic import read_json_object
from qdora.files.run_directory import RunDirectory
from qdora.model.attention import attention_of, flash_inputs, flash_lengths, takes_flash_lengths
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import block_list
from qdora.quant.tiles import Weight
from qdora.train.distributed import Processes
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.passes import batch_loss

CHECKS_FILE = "checks.json"
DATA, TOKENS, PACKING, DIVISION, GRADIENTS = GROUPS = "data", "tokens", "packing", "division", "gradients"
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
# Relative differences allowed between two passes of a divided base: sums on a GPU may have another order, and the norms
# of a block come from the rows of each process in one pass and from the whole weight in the other.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5}
_ROUNDING_16 = 5e-3
_NUM_TOKENS = 32

logger = logging.getLogger("qdora")


@dataclass(frozen=True)
class Check:
    """The answer to one question, in words; `open` where it is not known yet."""

    state: Literal["passed", "warning", "open"]
    text: str


def kept_checks(run: RunDirectory) -> dict[str, Any]:
    """Group -> its checks in checks.json."""
    try:
        return read_json_object(run.inside(CHECKS_FILE))
    except (UserError, OSError):
        return {}


def tell_checks(run: RunDirectory, found: Mapping[str, Sequence[Check]]) -> None:
    """Log the checks and put them into checks.json, in place of those of the same groups."""
    for check in (check for checks in found.values() for check in checks):
        if check.state == "warning":
            logger.warning("%s", check.text)
        elif check.state == "passed":
            logger.info("Checked: %s", check.text)
    groups = kept_checks(run) | {group: [asdict(check) for check in checks] for group, checks in found.items()}
    run.write_json(CHECKS_FILE, {group: groups[group] for group in GROUPS if group in groups})


class MissingGradientCheck:
    """Finds the trainable tensors that get no gradient other than zero in the first updates of a run.

    It reads gradients, not parameters: a healthy update can be too small to show in float32, at the end of a cosine or
    the start of a slow warm-up.
    """

    num_updates = 3  # lora_A gets no gradient while lora_B is zero, that is, in the first one

    def __init__(self, optimizer: AdapterOptimizer) -> None:
        self._parameters, self._optional = optimizer.parameters, optimizer.undecayed
        self.num_tensors = len(self._parameters)
        self._num_seen = 0
        self._arrived: dict[str, Tensor] = {}

    def updated(self, lr: float) -> list[str] | None:
        """After the last update that is looked at, the tensors that had no gradient in any of them; otherwise None.

        Must be called after each update, while its gradients exist. An update with `lr` 0 does not count.
        """
        if lr == 0.0 or self._num_seen == self.num_updates:
            return None
        self._num_seen += 1
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                some = parameter.grad.any()  # stays on the device, so that the host does not wait for it
                self._arrived[name] = self._arrived.get(name, some) | some
        if self._num_seen < self.num_updates:
            return None
        flags = torch.stack([*self._arrived.values()]).tolist() if self._arrived else []
        arrived = dict(zip(self._arrived, flags, strict=True))
        # Rows of new tokens have a gradient only in steps whose texts have such a token.
        return [name for name in self._parameters if name not in self._optional and not arrived.get(name, False)]

    def in_words(self, missing: Sequence[str]) -> str:
        """What `updated` found."""
        seen = f"in {self.num_updates} updates"
        if not missing:
            return f"{seen} each of the {self.num_tensors:,} trainable tensors had a gradient."
        number = f"{len(missing):,} of {self.num_tensors:,} trainable tensors"
        return f"{seen} {number} had no gradient, e.g. {missing[0]}: they did not train."


def packed_layout(model: PreTrainedModel) -> tuple[PackedLayout, str]:
    """The layout of packed rows for the model, after a check that its examples do not see each other; both in words.

    Four forward passes (six with flash attention) of at most 44 tokens, without a draw from the global generators.
    UserError if an example's outputs depend on its neighbours, or differ from the example alone beyond rounding.
    """
    attention = attention_of(model) or "its own code"
    layout = layout_for(attention)
    with evaluation_mode(model):
        seen, most = _try_packing(model, layout, attention)
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
def _try_packing(model: PreTrainedModel, layout: PackedLayout, attention: str) -> tuple[float, float]:
    """(largest change of a logit by other tokens in the example before, what rounding may change)."""
    name = model.config.model_type
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise UserError(f"data.packing: must be false for {name}, which takes no position_ids (got true).")
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size

    def text(length: int) -> Tensor:
        return torch.randint(vocabulary, (length,), generator=generator)

    def rms(values: Tensor) -> float:
        return float(values.square().mean().sqrt())

    probe = text(_PROBED)
    alone = _logits(model, probe[None])[0]
    # In a causal model later tokens have no effect, so this is the rounding error of a row of another length.
    rounding = _logits(model, torch.cat([probe, text(_BEHIND)])[None])[0, :_PROBED] - alone
    first, second = (
        _probe_outputs(model, layout, [[text(before), probe, text(_BEHIND)] for before in _BEFORE]) for _ in range(2)
    )
    eps = max(torch.finfo(model.dtype).eps, _LEAST)
    seen, wrong = float((first - second).abs().max()), rms(first - alone)
    most = max(float(rounding.abs().max()), float(eps * alone.abs().max()))
    most_wrong = _SPREAD * max(rms(rounding), eps * rms(alone))
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
        packed.append((torch.cat(parts)[None], torch.cat([torch.arange(len(part)) for part in parts])[None]))
    if layout == "rows":
        packed = [(torch.cat([ids for ids, _ in packed]), torch.cat([positions for _, positions in packed]))]
    logits: list[Tensor] = []
    for ids, positions in packed:
        inputs: dict[str, Any] = {"position_ids": positions.to(model.device)}
        if layout == "single" and takes_flash_lengths(model):
            starts, longest = flash_lengths(positions)
            inputs |= flash_inputs(starts.to(model.device), longest)
        logits += _logits(model, ids, **inputs)
    return torch.stack([out[len(row[0]) :][: len(row[1])] for out, row in zip(logits, rows, strict=True)])


def check_division(model: PreTrainedModel, processes: Processes) -> str | None:
    """What was compared, in words; None if the base is not divided. All processes must call this together.

    RunFailure in all processes if one has another loss, or another one than with the first, the middle and the last
    block gathered whole.
    """
    if not processes.shards:
        return None
    found = block_list(model)
    assert found is not None, "a base is divided by blocks"
    blocks = list(found[1])
    blocks = [blocks[index] for index in sorted({0, len(blocks) // 2, len(blocks) - 1})]
    layers = [layer for block in blocks for layer in frozen_layers(block).values()]
    try:
        mine = [_loss(model)]
        with _read_from({layer: layer.share.whole() for layer in layers if layer.share is not None}):
            mine.append(_loss(model))
    except RuntimeError as error:
        raise processes.broken(error) from error
    losses = processes.gather(mine)
    right = losses[0][1]
    for rank, theirs in enumerate(losses):
        if not all(math.isclose(loss, right, rel_tol=_ROUNDING.get(model.dtype, _ROUNDING_16)) for loss in theirs):
            raise RunFailure(
                f"train.parallel: the base is not the same when it is divided: process {rank} has a loss of "
                f"{theirs[0]:.8g}, and {theirs[1]:.8g} with blocks gathered whole, instead of {right:.8g}. "
                "Fix: train with train.parallel: replicate, and report it."
            )
    return f"a divided base and one with {len(blocks)} whole blocks have one loss, {right:.6g} on {_NUM_TOKENS} tokens."


@torch.no_grad()
def _loss(model: PreTrainedModel) -> float:
    """Mean loss of random tokens, the same in all processes, without dropout."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, _NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    layers, training = adapted_layers(model).values(), model.training
    model.eval()
    for layer in layers:
        layer.parameters_changed()
    refresh(layer for layer in layers if layer.base.share is not None)
    given = ids.to(model.device)
    loss = batch_loss(model, given, torch.ones_like(given), ids).nll_sum / _NUM_TOKENS
    model.train(training)
    return float(loss)


@contextmanager
def _read_from(whole: Mapping[FrozenLinear, tuple[Weight, Tensor | None]]) -> Iterator[None]:
    """Let layers read these weights in the block, as layers do whose base is not divided."""
    before = {layer: (dict(layer._buffers), layer.residency, layer.share) for layer in whole}
    try:
        for layer, (weight, keep_bits) in whole.items():
            layer.residency = layer.share = None
            layer._buffers.update(divided_tensors(weight, keep_bits))
        yield
    finally:
        for layer, (buffers, residency, share) in before.items():
            layer._buffers.update(buffers)
            layer.residency, layer.share = residency, share
