"""Packed bases on disk, in bitsandbytes' checkpoint format under the model's own names, read like any checkpoint.

    a base cache        model-00000.safetensors, ...        all weights of a model
    base/ of a run      the same, a block each, and         the layers that are pruned, with `<path>.keep_bits`,
                        compressed.json                     or quantised by GPTQ

The directory of a cached base is named for a hash of the settings, the names and shapes of the model's tensors, and the
model's files. Weights that are not quantised keep the checkpoint's dtype, so the compute dtype is not part of it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdora.adapter.layer import FrozenLinear
from qdora.errors import UserError
from qdora.files.atomic import (
    atomic_directory,
    atomic_file,
    atomic_write_json,
    disk_failures,
    in_turn,
    json_text,
    read_json_object,
    remove_directory,
    sampled_digest,
    sync,
)
from qdora.files.console import Progress
from qdora.files.tensor_file import write_tensors
from qdora.model.checkpoint import (
    Stored,
    StoredPacked,
    StoredTensor,
    gather_packed,
    match_to_model,
    open_safetensors,
    shard_files,
)
from qdora.model.load import Loading, Quantization, layers_to_quantize, settle_stored, tensors_of_source
from qdora.model.multimodal import not_loaded
from qdora.model.source import ModelSource
from qdora.quant.bnb import to_bnb_state
from qdora.quant.tiles import Weight

log = logging.getLogger("qdora")

_RECORD_FILE, _UNFINISHED_FILE = "compressed.json", "unfinished.json"


def _stored_in(directory: Path) -> dict[str, Stored]:
    return gather_packed(open_safetensors(directory, sorted(directory.glob("*.safetensors"))))


def _parts(name: str, weight: Weight) -> dict[str, Tensor]:
    if isinstance(weight, Tensor):
        return {name: weight}
    return {name.removesuffix("weight") + part: each for part, each in to_bnb_state(weight).items()}


@dataclass
class BaseWriter:
    """Writes a compressed base, a file a block; whole is a directory that has its compressed.json.

    A later start with the same `key`, a hash of all that decides the base, goes on behind the last finished block.
    `layers`: path -> the record of each layer in a finished block.
    """

    directory: Path
    key: str
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        file = self.directory / _UNFINISHED_FILE
        found = read_json_object(file) if file.is_file() else {}
        if found.get("key") == self.key:
            self.layers = found["layers"]
        else:
            remove_directory(self.directory)
            self.directory.mkdir(parents=True)

    def _file(self, block: int) -> Path:
        return self.directory / f"model-{block:05d}.safetensors"

    def finished(self, block: int, paths: Iterable[str]) -> dict[str, Stored]:
        """Model name -> weight of the layers `paths` of a block; empty if it is not finished."""
        if not (names := {*paths}) or not self.layers.keys() >= names:
            return {}
        return _with_masks(gather_packed(open_safetensors(self.directory, [self._file(block)])))

    def write(
        self, block: int, layers: Mapping[str, FrozenLinear], records: Mapping[str, dict[str, Any]]
    ) -> None:
        """Keep a block. First its weights and then its records appear, each whole or not at all."""
        held: dict[str, Tensor] = {}
        for path, layer in layers.items():
            held |= _parts(f"{path}.weight", layer.stored_weight)
            if layer.keep_bits is not None:
                held[f"{path}.keep_bits"] = layer.keep_bits
        with atomic_file(self._file(block)) as aside:
            write_tensors(aside, held)
            sync(aside)
        self.layers |= records
        atomic_write_json(self.directory / _UNFINISHED_FILE, {"key": self.key, "layers": self.layers})

    def finish(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Write compressed.json, which is returned."""
        counts = {
            name: sum(row[name] for row in self.layers.values()) for name in ("num_weights", "num_pruned")
        }
        share = counts["num_pruned"] / counts["num_weights"]
        record = {"format": 1, "key": self.key, "settings": dict(settings), **counts, "sparsity": share}
        record["layers"] = self.layers
        atomic_write_json(self.directory / _RECORD_FILE, record)
        (self.directory / _UNFINISHED_FILE).unlink(missing_ok=True)
        return record


def compressed_key(directory: Path) -> str | None:
    """The key of the compressed base in a directory; None if there is no whole one."""
    file = directory / _RECORD_FILE
    return str(read_json_object(file)["key"]) if file.is_file() else None


def compressed_layers(directory: Path) -> dict[str, Stored]:
    """Model name -> weight of the pruned layers, or those quantised by GPTQ, in a directory of `BaseWriter`."""
    read_json_object(directory / _RECORD_FILE)  # without which it is not whole
    return _with_masks(_stored_in(directory))


def _with_masks(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The weights alone, with the masks that lie beside them."""
    found = dict[str, Stored]()
    for name, item in stored.items():
        if name.endswith(".weight"):
            mask = stored.get(f"{name.removesuffix('weight')}keep_bits")
            found[name] = replace(item, keep_bits=mask.read if isinstance(mask, StoredTensor) else None)
    return found


@dataclass
class BaseCache:
    """A `reader` of `load_model` that quantises a source into a directory once and reads it from there later.

    `wanted` says how to hold the linear layers (not "none"), `directory` is that of the last base.
    """

    root: Path
    wanted: Quantization
    device: torch.device
    progress: Progress | None = None
    directory: Path | None = None

    def __call__(self, source: ModelSource, model: PreTrainedModel) -> dict[str, Stored]:
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        decides = {
            "format": 2,
            "quantization": asdict(self.wanted),
            "model": shapes,
            "files": fingerprints(source),
        }
        key = hashlib.sha256(json_text(decides).encode()).hexdigest()
        directory = self.directory = self.root / key[:20]
        with in_turn(directory):
            if not directory.is_dir():
                stored = tensors_of_source(source, model)
                if self.wanted.kind in {
                    item.kind for item in stored.values() if isinstance(item, StoredPacked)
                }:
                    return stored  # a checkpoint in this format needs no copy
                log.info("Writing the packed base to %s, for later starts.", directory)
                layers = layers_to_quantize(model, self.wanted)
                stored, layers = settle_stored(stored, "none", self.wanted, layers)
                load = Loading(model, stored, layers, self.wanted, self.device, model.dtype)
                failures = disk_failures(directory, "name another directory in base.cache")
                with failures, atomic_directory(directory) as folder:
                    for number, (name, item) in enumerate(stored.items()):
                        write_tensors(
                            folder / f"model-{number:05d}.safetensors", _parts(name, load.read(name, item))
                        )
                        if self.progress is not None:
                            self.progress(number + 1, len(stored))
            else:
                log.info("Reading the packed base from %s.", directory)
                if not_loaded(model):  # an export copies these from the source
                    tensors_of_source(source, model)
        try:
            return match_to_model(_stored_in(directory), model)
        except UserError as error:
            raise UserError(*error.faults, f"base.cache: {directory} is damaged. Fix: delete it.") from error


def fingerprints(source: ModelSource) -> list[dict[str, Any]]:
    """Name, size, time and samples of each of a model's files, as JSON values."""
    values = []
    for file in [source.path] if source.is_gguf else [*shard_files(source.path), source.path / "config.json"]:
        facts, samples = sampled_digest(file)
        values.append({"name": file.name, "size": facts.st_size, "time": facts.st_mtime_ns, "samples": samples})
    return values
