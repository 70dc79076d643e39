"""Merge without loading a model: each tensor is read, quantised as in training and merged when it is written.

Memory is bounded by the largest weight and a few slices of it, whatever the size of the model. Besides the merge on the
dequantised base, which is the model that was trained, there are two others:

    original      m (W + s B A) / ||W + s B A|| on the source's own 16-bit weights W, with the norm of that sum: free of
                  the base's quantisation error, but not the model that the adapter was fitted to
    requantised   the merge quantised to 4 bits again, as a bitsandbytes checkpoint: small, but rounded a second time
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import qdora
from qdora.errors import UserError
from qdora.export.options import MergeBase
from qdora.export.targets import FOUR_BIT_KINDS
from qdora.export.tensor_plan import CheckpointPlan, Source, held, plan_sources
from qdora.files.atomic import json_text
from qdora.model.adapter_file import StoredLayer, read_adapter
from qdora.model.bnb_checkpoint import quantization_config, stored_kind
from qdora.model.load import (
    Quantization,
    check_stored_packed,
    is_wide,
    layers_to_quantize,
    load_config,
    skeleton,
    stored_tensors,
    wide_names,
)
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import Stored, StoredPacked, tied_weights
from qdora.ops.bnb_state import to_bnb_state
from qdora.ops.codebooks import NESTED_BLOCK_SIZE
from qdora.ops.dora import merged_weight
from qdora.ops.packed import PackedWeight, dequantize, quantize

_STATE_BYTES = 256
"""Length of the JSON beside a packed weight, padded with blanks: it must be known before the scales are."""


@dataclass(frozen=True)
class StreamedMerge:
    """A merge that needs no model in memory.

    Attributes:
        source: The base.
        adapter: Directory of the adapter, or None: the base alone.
        quant: How training held the base.
        compute_dtype: The dtype in which training held what is not quantised.
        base: The weights on which the adapter is merged.
        requantize: Write the layers that were quantised as nf4 or fp4 again.
    """

    source: ModelSource
    adapter: Path | None
    quant: Quantization
    compute_dtype: torch.dtype
    base: MergeBase = "dequantized"
    requantize: bool = False

    def resume_key(self, plan: CheckpointPlan, dtype: torch.dtype, max_shard_bytes: int) -> str:
        """A digest of everything that the bytes of the export follow from; the base's files count by size and time."""
        adapter = ""
        if self.adapter is not None:
            files = sorted(path for path in self.adapter.iterdir() if path.is_file())
            adapter = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        base = self.source.path
        files = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        held_as = [asdict(self.quant), self.base, self.requantize, str(self.compute_dtype)]
        specs = [(item.spec.name, str(item.spec.dtype), item.spec.shape) for item in plan.tensors]
        content = [qdora.__version__, str(base.resolve()), stats, adapter, *held_as, str(dtype), max_shard_bytes, specs]
        return hashlib.sha256(json_text(content).encode()).hexdigest()


def check_merge(merge: StreamedMerge) -> None:
    """Refuse a merge that this base does not allow, before any weight is read.

    Raises:
        UserError: `original` without full-precision weights to merge on, or `requantize` of a base that was not held in
            nf4 or fp4.
    """
    faults = []
    if merge.base == "original":
        if merge.quant.kind == "none":
            faults.append(
                "--base original: the base was not quantised in training: it is the original. Fix: remove the option."
            )
        elif merge.source.is_gguf:
            faults.append(
                f"--base original: {merge.source.name} is a GGUF file, not the 16-bit model it was made from. "
                "Fix: use --base dequantized."
            )
        else:
            kind = stored_kind(getattr(load_config(merge.source), "quantization_config", None))
            if kind is not None:
                faults.append(
                    f"--base original: {merge.source.name} is stored in {kind} and has no 16-bit weights. Fix: use "
                    "--base dequantized, or train on the model it was made from."
                )
    if merge.requantize and merge.quant.kind not in FOUR_BIT_KINDS:
        faults.append(
            f"--requantize: the base must be held in nf4 or fp4 (got {merge.quant.kind}). Fix: remove the option."
        )
    if faults:
        raise UserError(*faults)


def open_merge(merge: StreamedMerge) -> OpenedMerge:
    """Read the adapter and the headers of all files, but no weight of the base.

    Raises:
        UserError: What `check_merge` refuses, or a checkpoint that does not fit its model.
    """
    check_merge(merge)
    config = load_config(merge.source)
    kind = stored_kind(getattr(config, "quantization_config", None))
    if kind is not None:
        del config.quantization_config
    model = skeleton(config, merge.source, merge.compute_dtype, "auto", torch.device("cpu"))
    stored = stored_tensors(merge.source, model)
    layers = layers_to_quantize(model, merge.quant)
    packed = {name: item for name, item in stored.items() if isinstance(item, StoredPacked)}
    if packed or kind is not None:
        check_stored_packed(packed, kind, merge.quant, layers)
        layers = set()
    linear = [path for path, module in model.named_modules() if type(module) is torch.nn.Linear]
    adapter = {} if merge.adapter is None else read_adapter(model, merge.adapter)[1]
    if not merge.source.is_gguf and (merge.source.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(merge.source.path))
    model.config._name_or_path = merge.source.name
    return OpenedMerge(
        merge=merge,
        model=model,
        stored=stored,
        adapter=adapter,
        linear=linear,
        quantized=layers,
        wide=wide_names(model, merge.compute_dtype),
    )


@dataclass(frozen=True)
class OpenedMerge:
    """A skeleton of the model, where its tensors are stored, and what happens to each.

    Attributes:
        merge: What is merged.
        model: The skeleton; its weights are on "meta".
        stored: Name in the model -> place in the files of the base.
        adapter: Path of a layer -> its adapter.
        linear: Paths of all linear layers.
        quantized: Paths of the layers that training quantised from dense weights.
        wide: Names of the tensors that stay in float32.
    """

    merge: StreamedMerge
    model: PreTrainedModel
    stored: Mapping[str, Stored]
    adapter: Mapping[str, StoredLayer]
    linear: Sequence[str]
    quantized: set[str]
    wide: Sequence[str]

    @property
    def packed_paths(self) -> set[str]:
        """Paths of the layers that training held in low precision."""
        stored = {name.rpartition(".")[0] for name, item in self.stored.items() if isinstance(item, StoredPacked)}
        return self.quantized | stored

    def plan(self, dtype: torch.dtype) -> CheckpointPlan:
        """The checkpoint with float tensors in `dtype`."""
        plan = plan_sources(self.model, self._sources(), dtype)
        if self.merge.requantize:
            quant = self.merge.quant
            dense = [path for path in self.linear if path not in self.packed_paths]
            plan.config.quantization_config = quantization_config(
                quant.kind, double_quant=quant.double_quant, dtype=dtype, dense=dense
            )
        return plan

    def num_parameters(self) -> int:
        """Parameters of the merged model, quantised or not."""
        items = [self.item(name) or tensor for name, tensor in self.model.state_dict().items()]
        return sum(torch.Size(item.shape).numel() for item in items if not isinstance(item, Tensor) or not item.is_meta)

    def item(self, name: str) -> Stored | None:
        """Where a tensor is stored; None for a copy that stays tied, and for what no checkpoint holds."""
        if name in self.stored or not self._is_changed(name):
            return self.stored.get(name)
        partners = tied_weights(self.model)
        partners |= {origin: target for target, origin in partners.items()}
        return self.stored.get(partners.get(name, ""))

    def _is_changed(self, name: str) -> bool:
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and (path in self.adapter or path in self.packed_paths)

    def _sources(self) -> dict[str, Source]:
        """Name in the model -> tensor of the output, in model order."""
        sources: dict[str, Source] = {}
        for name, tensor in self.model.state_dict().items():
            path = name.rpartition(".")[0]
            item = self.item(name)
            if item is None:
                if not tensor.is_meta:
                    sources[name] = held(tensor)
            elif not self._is_changed(name):
                sources[name] = Source(tensor.to("meta"), self._dense(name, item))
            elif self.merge.requantize and path in self.packed_paths:
                sources |= {f"{path}.{part}": source for part, source in self._packed_sources(path, item).items()}
            else:
                shaped = torch.empty(item.shape, dtype=torch.float32, device="meta")
                sources[name] = Source(shaped, self._weight(path, item))
        return sources

    def _dense(self, name: str, item: Stored) -> Callable[[], Tensor]:
        dtype = torch.float32 if is_wide(name, self.wide) else self.merge.compute_dtype

        def make() -> Tensor:
            value = item.read()
            assert isinstance(value, Tensor)
            if self.merge.base == "original" or not value.is_floating_point():
                return value
            return value.to(dtype)

        return make

    def _weight(self, path: str, item: Stored) -> Callable[[], Tensor]:
        """The merged or dequantised weight in float32."""
        return lambda: self._merged(path, self._base(path, item))

    def _base(self, path: str, item: Stored) -> Tensor:
        value = item.read()
        if isinstance(value, PackedWeight):
            return dequantize(value, torch.float32)
        if self.merge.base == "original":
            return value.float()
        if path in self.quantized:
            return dequantize(self._quantized(f"{path}.weight", value), torch.float32)
        return value.to(self.merge.compute_dtype).float()

    def _merged(self, path: str, base: Tensor) -> Tensor:
        layer = self.adapter.get(path)
        if layer is None:
            return base
        return merged_weight(base, layer.lora_A, layer.lora_B, layer.scaling, layer.magnitude)

    def _quantized(self, name: str, weight: Tensor) -> PackedWeight:
        quant = self.merge.quant
        return quantize(weight, quant.kind, quant.block_size, quant.double_quant, name=name)

    def _packed_sources(self, path: str, item: Stored) -> dict[str, Source]:
        """The merge in 4 bits; a layer without an adapter keeps the bytes that training used."""
        kept: dict[str, Tensor] = {}

        def part(name: str) -> Callable[[], Tensor]:
            def make() -> Tensor:
                if not kept:
                    kept.update(self._packed_state(path, item))
                return kept.pop(name)  # the writer asks for each part once, one after the other

            return make

        return {
            name: Source(torch.empty(shape, dtype=dtype, device="meta"), part(name), dtype=dtype)
            for name, (shape, dtype) in self._packed_layout(item).items()
        }

    def _packed_state(self, path: str, item: Stored) -> dict[str, Tensor]:
        value = item.read()
        if path in self.adapter:
            del value
            value = self._quantized(path, self._merged(path, self._base(path, item)))
        elif isinstance(value, Tensor):
            value = self._quantized(path, value)
        state = to_bnb_state(value, self.merge.compute_dtype)
        name = _state_name(self.merge.quant.kind)
        blanks = torch.full((_STATE_BYTES - state[name].numel(),), ord(" "), dtype=torch.uint8)
        state[name] = torch.cat([state[name], blanks])
        return state

    def _packed_layout(self, item: Stored) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        quant = self.merge.quant
        numel = item.shape[0] * item.shape[1]
        blocks = -(-numel // quant.block_size)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": (((numel + 1) // 2, 1), torch.uint8),
            "weight.absmax": ((blocks,), torch.uint8 if quant.double_quant else torch.float32),
            "weight.quant_map": ((16,), torch.float32),
        }
        if quant.double_quant:
            layout["weight.nested_absmax"] = ((-(-blocks // NESTED_BLOCK_SIZE),), torch.float32)
            layout["weight.nested_quant_map"] = ((256,), torch.float32)
        return layout | {_state_name(quant.kind): ((_STATE_BYTES,), torch.uint8)}


def _state_name(kind: str) -> str:
    return f"weight.quant_state.bitsandbytes__{kind}"
