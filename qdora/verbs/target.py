"""What `qdora eval` and `qdora generate` are pointed at: a run, an exported directory, or any model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.errors import UserError
from qdora.model.adapter_file import CONFIG_FILE, load_adapter
from qdora.model.bnb_checkpoint import gather_packed, stored_kind
from qdora.model.checkpoint import StoredPacked, open_safetensors
from qdora.model.export_nf4_lora import ADAPTER_DIRECTORY
from qdora.model.load import load_config, load_model
from qdora.model.source import ModelSource, resolve
from qdora.model.tokenizer import load_tokenizer
from qdora.record import RunDirectory
from qdora.verbs.assemble import choose_compute
from qdora.verbs.trained import load_run


@dataclass(frozen=True)
class Target:
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
) -> Target:
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
        return Target(trained.model, trained.tokenizer, trained.state, trained.run)
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
    return Target(model, tokenizer, Path(target).name, None)


def _stored_form(source: ModelSource) -> dict[str, Any]:
    """How the checkpoint holds its linear layers, as settings of `load_model`."""
    kind = None if source.is_gguf else stored_kind(getattr(load_config(source), "quantization_config", None))
    if kind is None:
        return {"quant": "none"}
    packed = [item for item in gather_packed(open_safetensors(source.path)).values() if isinstance(item, StoredPacked)]
    if kind == "int8" or not packed:
        return {"quant": kind}
    return {"quant": kind, "block_size": packed[0].block_size, "double_quant": packed[0].double_quant}
