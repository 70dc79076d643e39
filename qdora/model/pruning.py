"""Pruning a base while it is loaded: block by block read, measured, pruned, quantised, and gone through.

One forward pass of the model drives it. When the pass reaches a block, the block's weights are read, its inputs are
run through it to measure those of its linear layers, these are pruned and quantised, and the inputs are run through it
once more, so that the next block is measured behind what came out. Memory holds one dense block at a time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.errors import UserError
from qdora.model.load import (
    Quantization,
    layers_to_quantize,
    load_config,
    place_all,
    place_dense,
    place_frozen,
    settle,
    skeleton,
    stored_tensors,
)
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import Stored, StoredPacked
from qdora.ops.packed import dequantize, quantize, zero_packed
from qdora.ops.prune import DAMPING, InputStatistics, magnitude_scores, prune_weight, wanda_scores
from qdora.ops.sparsity import Group, SparsityPattern, keep_mask, mask_bits
from qdora.ops.tiles import Weight, dense_weight

log = logging.getLogger("qdora")

Progress = Callable[[int, int], None]

# Calibration tokens that go through a block at a time; bounds its activations.
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class PruneSettings:
    """How the linear layers of the blocks are pruned; see `ops.prune.prune_weight`."""

    method: str
    pattern: SparsityPattern
    group: Group | None = None
    order: Literal["prune_first", "quantize_first"] = "prune_first"
    damping: float = DAMPING


@dataclass(frozen=True)
class CompressedLayer:
    """What became of a layer.

    Attributes:
        num_weights, num_pruned: Counts; the pruned ones are those the mask names.
        num_zeros: All zeros of the result: a quantised weight can be 0 without having been pruned.
        relative_error: ||W' - W|| / ||W||, Frobenius, of the dense weight and the result.
        num_packed_bytes: Of the result in its format, zeros stored like all else (`PackedWeight.num_packed_bytes`).
    """

    num_weights: int
    num_pruned: int
    num_zeros: int
    relative_error: float
    num_packed_bytes: int

    @property
    def sparsity(self) -> float:
        """Share of pruned weights."""
        return self.num_pruned / self.num_weights


class Compression:
    """A `Placer` that prunes; `layers` says afterwards what became of each layer.

    Args:
        settings: How to prune.
        calibration: Token ids (sequences, length), for methods that measure inputs; None for magnitude.
    """

    def __init__(self, settings: PruneSettings, calibration: Tensor | None = None) -> None:
        if (calibration is None) != (settings.method == "magnitude"):
            raise ValueError(f"pruning by {settings.method} goes with calibration text exactly where it measures.")
        self.settings, self.calibration = settings, calibration
        self.layers: dict[str, CompressedLayer] = {}

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, Stored],
        layers: set[str],
        wanted: Quantization,
        device: torch.device,
        compute_dtype: torch.dtype,
        progress: Progress | None = None,
    ) -> None:
        """Read every stored tensor and put it into the model, the linear layers of the blocks pruned.

        Args:
            As of `load.place_all`.
        Raises:
            UserError: A checkpoint that is quantised already, a model whose blocks are not found, a weight that cannot
                have the pattern.
        """
        packed = [name for name, item in stored.items() if isinstance(item, StoredPacked)]
        if packed:
            raise UserError(
                f"base.prune: the checkpoint is quantised already (e.g. {packed[0]}), "
                "allowed: a model in full precision."
            )
        path, blocks = decoder_blocks(model)
        counted = _Counted(progress, len(stored))
        inside = {name for name in stored if name.startswith(f"{path}.")}
        outside = {name: item for name, item in stored.items() if name not in inside}
        quantized = layers if wanted.kind != "none" else set()
        place_all(model, outside, quantized, wanted, device, compute_dtype, counted)
        settle(model, device)
        job = _PruningTask(self, model, layers, wanted, device, compute_dtype, counted)
        of_block = [
            {name: item for name, item in stored.items() if name.startswith(f"{path}.{index}.")}
            for index in range(len(blocks))
        ]
        if self.calibration is None:
            for tensors in of_block:
                job.place_dense(tensors, but=layers)
                job.compress(tensors, {})
            return
        for block, tensors in zip(blocks, of_block, strict=True):
            block.forward = functools.partial(job.through_block, block, tensors)
        _run(model, self.calibration.to(device))
        left = [index for index, block in enumerate(blocks) if "forward" in vars(block)]
        assert not left, f"blocks {left} were never reached"


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and modules of the blocks that a model is a sequence of.

    Raises:
        UserError: None are found.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, module
    raise UserError(
        f"base.prune: {model.config.model_type} has no list of its {count} blocks, allowed: models built of one list "
        "of decoder blocks (Llama, Qwen, Gemma, Mistral, Phi, ...)."
    )


class _Counted:
    """Adds up the tensors of several passes over parts of a checkpoint."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, _done: int = 1, _total: int = 1) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass
class _PruningTask:
    """What one load needs in every block."""

    compression: Compression
    model: PreTrainedModel
    layers: set[str]
    wanted: Quantization
    device: torch.device
    compute_dtype: torch.dtype
    counted: _Counted

    def place_dense(self, tensors: Mapping[str, Stored], but: set[str]) -> None:
        """Put the tensors of a block in as they are, all but the weights of the layers named."""
        rest = {name: item for name, item in tensors.items() if not _is_weight_of(name, but)}
        place_all(self.model, rest, set(), self.wanted, self.device, self.compute_dtype, self.counted)

    def through_block(self, block: nn.Module, tensors: Mapping[str, Stored], *args: Any, **kwargs: Any) -> Any:
        """In place of a block's forward, once: compress it on the way."""
        del block.forward  # back to the class's own
        settings = self.compression.settings
        self.place_dense(tensors, but=self.layers)
        if settings.order == "quantize_first":
            weights = {name: item for name, item in tensors.items() if _is_weight_of(name, self.layers)}
            place_all(self.model, weights, self.layers, self.wanted, self.device, self.compute_dtype)
        else:
            for name, item in tensors.items():
                if _is_weight_of(name, self.layers):
                    layer = self.model.get_submodule(name.rpartition(".")[0])
                    place_dense(layer, "weight", cast(Tensor, item.read()), self.device, self.compute_dtype)
        method = cast(Literal["wanda", "sparsegpt"], settings.method)
        modules = {name: module for name, module in self.model.named_modules() if name in self.layers}
        inside = {name: modules[name] for name in (each.rpartition(".")[0] for each in tensors) if name in modules}
        with _Recorder(inside, method) as recorder:
            for part in _parts(args, kwargs):
                block(*part[0], **part[1])
        self.compress(tensors, recorder.statistics)
        return _joined([block(*part[0], **part[1]) for part in _parts(args, kwargs)])

    def compress(self, tensors: Mapping[str, Stored], statistics: Mapping[str, InputStatistics]) -> None:
        """Prune and quantise the linear layers of a block and put them in."""
        for name, item in tensors.items():
            if not _is_weight_of(name, self.layers):
                continue
            path = name.rpartition(".")[0]
            value = item.read()
            assert isinstance(value, Tensor)
            weight, mask = self._compressed(value.to(self.device), statistics.get(path), name)
            place_frozen(self.model, path, weight, mask_bits(mask))
            self.compression.layers[path] = _report(value.to(self.device), weight, mask)
            del value, weight, mask
            self.counted()

    def _compressed(self, value: Tensor, statistics: InputStatistics | None, name: str) -> tuple[Weight, Tensor]:
        settings, wanted = self.compression.settings, self.wanted
        if statistics is None and settings.method != "magnitude":
            # A layer that the calibration never ran, such as an expert that no token was sent to.
            log.warning("%s: no calibration token came to this layer; the magnitudes decide.", name)
            method = cast(Literal["wanda", "sparsegpt"], settings.method)
            statistics = InputStatistics(value.shape[1], method, self.device)
        pack = functools.partial(quantize, kind=wanted.kind, block_size=wanted.block_size, name=name)
        if settings.order == "quantize_first":
            packed = pack(value, double_quant=wanted.double_quant)
            dense = dequantize(packed)
            scores = magnitude_scores(dense) if statistics is None else wanda_scores(dense, statistics.column_squares)
            group: Group = settings.group or ("tensor" if statistics is None else "row")
            mask = keep_mask(scores, settings.pattern, group)
            return zero_packed(packed, mask), mask
        # Corrected weights are not rounded to the file's dtype in between.
        wide = value.float() if settings.method == "sparsegpt" else value
        pruned, mask = prune_weight(
            wide,
            settings.method,
            settings.pattern,
            statistics=statistics,
            group=settings.group,
            damping=settings.damping,
            name=name,
        )
        if wanted.kind == "none":
            return pruned.to(self.compute_dtype), mask
        return pack(pruned, double_quant=wanted.double_quant), mask


class _Recorder:
    """Measures the inputs of linear layers while it is entered; layers that share an input share its statistics."""

    def __init__(self, layers: Mapping[str, nn.Module], method: Literal["wanda", "sparsegpt"]) -> None:
        self.layers, self.method = layers, method
        self.statistics: dict[str, InputStatistics] = {}
        self._last: tuple[Tensor, InputStatistics] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> _Recorder:
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_pre_hook(functools.partial(self._record, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def _record(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        (x,) = inputs
        own = self.statistics.get(name)
        if self._last is not None and self._last[0] is x and own in (None, self._last[1]):
            # The query, key and value layers, and gate and up, read the same tensor.
            self.statistics[name] = self._last[1]
            return
        own = own or InputStatistics(x.shape[-1], self.method, x.device)
        own.add(x)
        self.statistics[name] = own
        self._last = (x, own)


def _is_weight_of(name: str, layers: set[str]) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and path in layers


def _run(model: PreTrainedModel, tokens: Tensor) -> None:
    """The blocks of a model on token ids (sequences, length), without its head."""
    was_training = model.training
    model.eval()
    inner = getattr(model, model.base_model_prefix, model)
    inner(input_ids=tokens, use_cache=False)
    model.train(was_training)


def _parts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    """The arguments of a block cut into a few sequences at a time; what all sequences share is passed on whole."""
    hidden = args[0] if args else kwargs["hidden_states"]
    step = max(1, _TOKENS_AT_ONCE // hidden.shape[1])
    for start in range(0, len(hidden), step):
        cut = functools.partial(_cut, count=len(hidden), some=slice(start, start + step))
        yield [cut(value) for value in args], {key: cut(value) for key, value in kwargs.items()}


def _cut(value: Any, *, count: int, some: slice) -> Any:
    if isinstance(value, Tensor):
        return value[some] if value.ndim > 1 and value.shape[0] == count else value
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(item, count=count, some=some) for item in value)
    return value


def _joined(outputs: list[Any]) -> Any:
    """Outputs of the parts as those of the whole: tensors, or tuples that begin with one."""
    if isinstance(outputs[0], Tensor):
        return torch.cat(outputs)
    return (torch.cat([output[0] for output in outputs]), *outputs[0][1:])


def quantized_layers(source: ModelSource, wanted: Quantization) -> dict[str, dict[str, Any]]:
    """What quantising alone, without pruning, makes of each linear layer that is not skipped.

    Args:
        source: From `resolve`; one weight of it is in memory at a time.
        wanted: How it is held. Nothing comes back for "none", nor for a checkpoint that is quantised already.
    Returns:
        Path -> `layer_record`.
    Raises:
        UserError: As `load_model`.
    """
    config = load_config(source)
    if wanted.kind == "none" or getattr(config, "quantization_config", None) is not None:
        return {}
    model = skeleton(config, source, torch.float32, "auto", torch.device("cpu"))
    layers, found = layers_to_quantize(model, wanted), {}
    for name, item in stored_tensors(source, model).items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and path in layers and not isinstance(item, StoredPacked):
            value = item.read()
            assert isinstance(value, Tensor)
            weight = quantize(value, wanted.kind, wanted.block_size, wanted.double_quant, name=name)
            found[path] = layer_record(weight.kind, weight.shape, weight.block_size, _report(value, weight, None))
            del value, weight
    return found


def layer_record(kind: str, shape: tuple[int, int], block_size: int, layer: CompressedLayer) -> dict[str, Any]:
    """JSON values of a layer: its format, shape (out, in) and block size, counts and error."""
    known = {"kind": kind, "shape": list(shape), "block_size": block_size, "sparsity": layer.sparsity}
    return {**known, **asdict(layer)}


def _report(value: Tensor, weight: Weight, mask: Tensor | None) -> CompressedLayer:
    """`mask`: True where a weight was kept; None where all were."""
    dense, original = dense_weight(weight, torch.float32), value.float()
    norm = float(original.norm())
    return CompressedLayer(
        num_weights=value.numel(),
        num_pruned=0 if mask is None else int((~mask).sum()),
        num_zeros=int((dense == 0).sum()),
        relative_error=float((dense - original).norm()) / norm if norm else 0.0,
        num_packed_bytes=weight.nbytes if isinstance(weight, Tensor) else weight.num_packed_bytes,
    )
