"""What `qdora export` can be asked for, and what of it goes together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from qdora.errors import UserError, nearest
from qdora.export.directory import DTYPES, MAX_SHARD_BYTES
from qdora.export.hub_push import check_repository
from qdora.export.llama_cpp import GgufType
from qdora.export.targets import TARGETS, check_target_name
from qdora.recipe.byte_size import parse_size
from qdora.run.model_card import Form

Format = Literal["merged", "peft", "nf4-lora", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)


MergeBase = Literal["dequantized", "original"]
BASES: tuple[MergeBase, ...] = ("dequantized", "original")


@dataclass(frozen=True)
class ExportOptions:
    """What `qdora export` is asked for.

    Attributes:
        format_: "merged" (one dense model for plain transformers), "nf4-lora" (a 4-bit base with the gain in its block
            scales, and plain LoRA), "gguf" (the merge as one file for llama.cpp) or "peft" (the adapter as it was
            trained). None: the best that `target` loads, or "merged".
        dtype: Of the weights that are not quantised: float16, bfloat16 or float32. None: float16 for "merged", the
            run's own for "nf4-lora".
        base: Of "merged" and "gguf": "dequantized" (what was trained) or "original" (the 16-bit source). None:
            dequantized.
        requantize: Of "merged": write it in 4 bits again, as the base was.
        shard_size: Of a weights file ("5GB"). None: 5 GiB.
        step: Checkpoint; None takes the finished adapter.
        audit: Compare all forms of the model, and say which one to ship.
        push: Name of the Hub repository that the export is uploaded to once it has passed; None uploads nothing.
        public: Make that repository public.
        gguf: Of "gguf": the type of its matrices, one of GGUF_TYPES. None: f16.
        llama_cpp: Of "gguf": llama.cpp's folder, or its converter. None: found by `find_llama_cpp`.
        target: The program that is to run it, one of TARGETS: what it cannot load is refused. None: no matter which.
    """

    format_: str | None = None
    dtype: str | None = None
    base: str | None = None
    requantize: bool = False
    shard_size: str | None = None
    step: int | None = None
    audit: bool = True
    push: str | None = None
    public: bool = False
    target: str | None = None
    gguf: str | None = None
    llama_cpp: Path | None = None

    @property
    def format(self) -> str:
        """The format that is written."""
        if self.format_ is not None:
            return self.format_
        return "merged" if self.target is None else TARGETS[self.target].loads[0]

    @property
    def form(self) -> Form:
        """What will stand in the directory."""
        forms: dict[str, Form] = {"nf4-lora": "nf4-lora", "gguf": "gguf", "peft": "peft"}
        if self.format in forms:
            return forms[self.format]
        if self.requantize:
            return "requantized"
        return "original" if self.base == "original" else "merged"

    @property
    def gguf_type(self) -> GgufType:
        """The type of a GGUF file's matrices, once `check_options` has seen it."""
        return next(type_ for type_ in GGUF_TYPES if type_ == (self.gguf or "f16"))

    @property
    def shard_bytes(self) -> int:
        """Most bytes of a weights file (default 5 GiB).

        Raises:
            UserError: `shard_size` is no size.
        """
        if self.shard_size is None:
            return MAX_SHARD_BYTES
        try:
            return parse_size(self.shard_size)
        except ValueError as error:
            raise UserError(f"--shard-size: {error}") from None


def check_options(options: ExportOptions) -> None:
    """Raise UserError for options that are unknown, or that the format has no use for: all of them."""
    faults = []
    if options.target is not None:
        check_target_name(options.target)
    if options.format not in FORMATS:
        raise UserError(
            f"--format: {options.format!r}, allowed: {', '.join(FORMATS)}.{nearest(options.format, FORMATS)}"
        )
    if options.dtype is not None and options.dtype not in DTYPES:
        faults.append(f"--dtype: {options.dtype!r}, allowed: {', '.join(DTYPES)}.{nearest(options.dtype, DTYPES)}")
    if options.base is not None and options.base not in BASES:
        faults.append(f"--base: {options.base!r}, allowed: {', '.join(BASES)}.{nearest(options.base, BASES)}")
    if options.gguf is not None and options.gguf not in GGUF_TYPES:
        allowed = f"allowed: {', '.join(GGUF_TYPES)}.{nearest(options.gguf, GGUF_TYPES)}"
        faults.append(f"--gguf-type: {options.gguf!r}, {allowed}")
    faults += [
        f"{name}: has no effect on --format {options.format}."
        for name, (is_set, formats) in _formats_of(options).items()
        if is_set and options.format not in formats
    ]
    if options.requantize and options.base == "original":
        faults.append("--requantize: with --base original neither the base nor the rounding is the one of the run.")
    if options.public and options.push is None:
        faults.append("--public: has no effect without --push.")
    if faults:
        raise UserError(*faults)
    _ = options.shard_bytes
    if options.push is not None:
        check_repository(options.push)


def _formats_of(options: ExportOptions) -> dict[str, tuple[bool, tuple[Format, ...]]]:
    """Option -> whether it is given, and the formats that it has an effect on."""
    return {
        "--base": (options.base is not None, ("merged", "gguf")),
        "--requantize": (options.requantize, ("merged",)),
        "--dtype": (options.dtype is not None, ("merged", "nf4-lora")),
        "--shard-size": (options.shard_size is not None, ("merged", "nf4-lora")),
        "--gguf-type": (options.gguf is not None, ("gguf",)),
        "--llama-cpp": (options.llama_cpp is not None, ("gguf",)),
    }
