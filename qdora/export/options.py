"""The options of `qdora export`, and the checks of their combinations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from qdora.errors import UserError, first_line, not_one_of
from qdora.export.checkpoint_writer import MAX_SHARD_BYTES
from qdora.export.gguf_types import GGUF_TYPES, GgufType
from qdora.model.build_model import DTYPES
from qdora.recipe.byte_size import parse_size
from qdora.run.model_card import Form

Format = Literal["merged", "peft", "nf4-lora", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
MergeBase = Literal["dequantized", "original"]
BASES: tuple[MergeBase, ...] = get_args(MergeBase)
_MIN_SHARD_BYTES = 1000  # a smaller size lacks its unit


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `qdora export` writes.

    Attributes:
        format_: "merged" (one dense model for plain transformers), "nf4-lora" (a 4-bit base with the gain in its block
            scales, and plain LoRA), "gguf" (the merge as one file for llama.cpp) or "peft" (the adapter as it was
            trained).
        dtype: Of the weights that are not quantised: float16, bfloat16 or float32. None: the run's own for
            "nf4-lora"; for "merged" float16, or bfloat16 for models whose activations overflow in float16.
        base: For "merged" and "gguf": "dequantized" (the base of training) or "original" (the 16-bit source). None:
            dequantized.
        requantize: For "merged": quantise the merge to 4 bits, as the base was.
        shard_size: Size of a weights file ("5GB"). None: 5 GiB.
        step: Checkpoint of the run. None: the finished adapter.
        base_model, quant: For an adapter in place of a run, see `adopted_recipe`.
        audit: Compare all forms of the model. It takes longer than the export itself.
        push, public: Hub repository to which an export that passed its check is uploaded; make it a public one.
        gguf, llama_cpp: For "gguf": type of the matrices (default f16), and `given` of `find_llama_cpp`.
    """

    format_: str = "merged"
    dtype: str | None = None
    base: str | None = None
    requantize: bool = False
    shard_size: str | None = None
    step: int | None = None
    base_model: str | None = None
    quant: str | None = None
    audit: bool = False
    push: str | None = None
    public: bool = False
    gguf: str | None = None
    llama_cpp: Path | None = None

    @property
    def form(self) -> Form:
        """What the directory will hold."""
        if self.format_ != "merged":
            return cast(Form, self.format_)
        if self.requantize:
            return "requantized"
        return "original" if self.base == "original" else "merged"

    @property
    def gguf_type(self) -> GgufType:
        """The type of a GGUF file's matrices, for options that passed `check_options`."""
        return cast(GgufType, self.gguf or "f16")

    @property
    def shard_bytes(self) -> int:
        """Size of a weights file. Raises UserError if `shard_size` is no such size."""
        if self.shard_size is None:
            return MAX_SHARD_BYTES
        try:
            size = parse_size(self.shard_size)
        except ValueError as error:
            raise UserError(f"--shard-size: {error}") from error
        if size < _MIN_SHARD_BYTES or not self.shard_size.rstrip()[-1:].isalpha():
            raise UserError(
                f"--shard-size: must be at least 1KB and have a unit, such as 2GB (got {self.shard_size!r})."
            )
        return size


def check_options(options: ExportOptions) -> None:
    """Raise UserError with all options that are unknown or have no effect on the format."""
    named = {
        "--format": (options.format_, FORMATS),
        "--dtype": (options.dtype, tuple(DTYPES)),
        "--base": (options.base, BASES),
        "--gguf-type": (options.gguf, GGUF_TYPES),
    }
    faults = [
        not_one_of(name, value, allowed)
        for name, (value, allowed) in named.items()
        if value is not None and value not in allowed
    ]
    if options.format_ not in FORMATS:
        raise UserError(*faults)
    with_effect: dict[str, tuple[bool, tuple[Format, ...]]] = {
        "--base": (options.base is not None, ("merged", "gguf")),
        "--requantize": (options.requantize, ("merged",)),
        "--dtype": (options.dtype is not None, ("merged", "nf4-lora")),
        "--shard-size": (options.shard_size is not None, ("merged", "nf4-lora")),
        "--gguf-type": (options.gguf is not None, ("gguf",)),
        "--llama-cpp": (options.llama_cpp is not None, ("gguf",)),
    }
    faults += [
        f"{name}: has no effect on --format {options.format_}. Fix: remove {name}."
        for name, (is_set, formats) in with_effect.items()
        if is_set and options.format_ not in formats
    ]
    if options.requantize and options.base == "original":
        faults.append(
            "--requantize: is not used with --base original: base and rounding would differ from the run. "
            "Fix: remove one of them."
        )
    if options.public and options.push is None:
        faults.append("--public: has no effect without --push. Fix: add --push, or remove --public.")
    if faults:
        raise UserError(*faults)
    _ = options.shard_bytes  # raises
    if options.push is not None:
        try:
            validate_repo_id(options.push)
        except HFValidationError as error:
            raise UserError(f"--push: got {options.push!r}. {first_line(error)}") from error
