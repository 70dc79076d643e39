"""Export a run as one GGUF file for llama.cpp, and check that the file holds the merged model.

llama.cpp's own converter writes the file from a merged checkpoint. The check reads values with the package `gguf`, and
undoes llama.cpp's changes of layout (rows of q and k, Gemma's norms) with transformers' readers, which share no code
with the converter.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TensorProcessor

from qdora.errors import RunFailure
from qdora.export.comparison_text import ComparisonText, comparison_text, validation_examples
from qdora.export.llama_cpp import GgufType, find_llama_cpp, write_gguf
from qdora.export.logit_comparison import compare_logits, larger, verdict
from qdora.export.merged import write_merge
from qdora.export.options import ExportOptions
from qdora.export.verify import fits_in_float32, load_with_transformers, verify_merged
from qdora.files.atomic import atomic_directory, remove_directory
from qdora.files.run_directory import open_run
from qdora.model.gguf_file import knows_layout, layout_processor, model_names, read_header, require_gguf
from qdora.model.load import load_config, skeleton
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import open_safetensors, rename_to_model, shorten, tied_weights
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import TrainedRun, trained_state
from qdora.run.model_card import card_files

logger = logging.getLogger("qdora")

Values = np.ndarray[Any, np.dtype[Any]]
_DENSE = ("F32", "F16", "BF16")
_NOT_IN_CHECKPOINTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""The converter computes these from the config."""
_LOSSY = 0.3
"""Largest allowed ||error|| / ||weight|| of types below 8 bits. They have 0.02 to 0.1; a tensor at another one's place
has 1.4."""
_EMBEDDING = "token_embd.weight"
_Q8_BYTES = 34  # a block of 32: its step in float16, then 32 signed bytes
_MERGED_IN: dict[GgufType, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}
"""Dtype of the merge for each type; float16 for the others: its rounding is at most an eighth of that of q8_0."""


def export_gguf(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], dict[str, Any]]:
    """Merge into a folder beside `out`, convert, compare, remove the folder; `out` appears after the comparison.

    Returns:
        The running model, facts for export.json, and the result of `verify_gguf`.
    Raises:
        UserError: A program of llama.cpp or the package gguf is missing, or the run cannot be merged.
        RunFailure: The converter refuses the model, or the disk is full.
    """
    start = time.perf_counter()
    require_gguf()
    type_ = options.gguf_type
    tools = find_llama_cpp(options.llama_cpp, type_)
    opened = open_run(run)
    recipe = load_recipe(opened.recipe_file)
    _, state = trained_state(opened, recipe, options.step)
    merged = out.with_name(f".{out.name}.merged")
    remove_directory(merged)
    file = out / f"model-{type_}.gguf"
    try:
        dtype = _MERGED_IN.get(type_, torch.float16)
        written, load_trained = write_merge(run, merged, options, dtype, console, with_card=False)
        console.print(f"converting to {type_}", highlight=False)
        try:
            with atomic_directory(out) as partial:
                write_gguf(tools, merged, partial / file.name, type_)
                for name, content in card_files(opened, recipe, state, form="gguf").items():
                    (partial / name).write_text(content, encoding="utf-8")
                trained = load_trained()
                console.print(
                    "comparing the file with the merge, tensor by tensor, and with the running model", highlight=False
                )
                text = comparison_text(trained.tokenizer, validation_examples(recipe))
                check = verify_gguf(trained, partial / file.name, merged, text, lossy=type_.upper() not in _DENSE)
        except OSError as error:
            raise RunFailure(f"{out}: cannot be written or compared: {error}. Nothing is left there.") from error
    finally:
        remove_directory(merged)
    result = {
        "type": type_,
        "base": options.base or "dequantized",
        "files": [file.name],
        "num_bytes": file.stat().st_size,
        "num_merged_layers": written.num_merged_layers,
        "num_parameters": written.num_parameters,
        "merged_in": written.dtype,
        "seconds": time.perf_counter() - start,
    }
    return trained, result, check


def verify_gguf(trained: TrainedRun, file: Path, merged: Path, text: ComparisonText, *, lossy: bool) -> dict[str, Any]:
    """Compare a GGUF file with its checkpoint, the checkpoint with the running model, and the logits of all.

    Passed means: the checkpoint passes `verify_merged`, every tensor of the file passes `check_tensors`, and its
    vocabulary, end token and chat template are the tokenizer's.

    For a lossy file the logits are computed by transformers with the file's values. They have no tolerance: the figures
    say how far they are. If that model does not fit in memory in float32, or llama.cpp's layout of the architecture is
    unknown, the logits are the checkpoint's, and a warning says so. Tensors that differ in an unknown layout are no
    fault: they are counted as not checked.

    Args:
        trained: The running model with its adapters, and its tokenizer.
        file: The GGUF file.
        merged: Directory of the dense checkpoint that it was made from.
        text: What to compare logits on.
        lossy: Whether the file's matrices have fewer than 16 bits.
    Returns:
        The result of `verify_merged`, with `tensors`.
    Raises:
        UserError: See `verify_merged`.
    """
    import gguf

    model = trained.model
    check = verify_merged(model, merged, text)
    reader = gguf.GGUFReader(str(file))
    device = next(model.parameters()).device
    target = None
    known = knows_layout(read_header(file))
    if lossy and known and fits_in_float32(merged, device):
        target = load_with_transformers(merged, model)[0]
    elif lossy:
        why = "The model does not fit in memory in float32" if known else "Layout unknown"
        logger.warning("%s: the logits are those before the file's own rounding.", why)
    tensors = check_tensors(reader, file, merged, into=target)
    faults = [*check["faults"], *shorten(tensors.faults), *vocabulary_faults(reader, trained.tokenizer)]
    if target is not None:
        total = compare_logits(model, target.to(device), text.sequences)
        check |= verdict(total, faults, torch.float32, model.dtype, lossy=True)
    return check | {"passed": not faults, "faults": faults, "tensors": tensors.to_dict()}


@dataclass
class TensorCheck:
    """Result of comparing the tensors of a GGUF file.

    Attributes:
        types: Type of the file -> number of tensors.
        dense_error: Largest |difference| of a tensor that is not quantised.
        q8_0_error: Largest error of a q8_0 weight in units of what rounding allows: half a step of its block and the
            step's own rounding.
        lossy_error: Largest ||error|| / ||weight|| of a tensor in fewer bits.
        worst: Name of the tensor with the largest error in units of what is allowed.
        faults: What is wrong.
        layout_known: Whether llama.cpp's layout of this architecture is known.
        unchecked: Tensors that differ in an unknown layout: laid out differently, or wrong.
    """

    types: Counter[str] = field(default_factory=Counter)
    dense_error: float = 0.0
    q8_0_error: float = 0.0
    lossy_error: float = 0.0
    worst: str = ""
    faults: list[str] = field(default_factory=list)
    layout_known: bool = True
    unchecked: list[str] = field(default_factory=list)
    _largest: float = 0.0

    def note(self, name: str, type_: str, error: float, measure: str, value: float) -> None:
        """Count a tensor. `error` is in units of what is allowed: above 1 is a fault. `value` is for `measure`."""
        self.types[type_] += 1
        if not error <= 1.0:
            self.fault(name, f"tensor {name} ({type_}): its error is {error:.3g} times what rounding allows")
            if not self.layout_known:
                return
        setattr(self, measure, larger(getattr(self, measure), value))
        if not error <= self._largest:  # not >: NaN counts
            self._largest, self.worst = error, name

    def fault(self, name: str, words: str) -> None:
        """Note a wrong tensor; in an unknown layout it counts as not checked."""
        if self.layout_known:
            self.faults.append(words)
        else:
            self.unchecked.append(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the faults."""
        found = asdict(self)
        del found["_largest"], found["faults"], found["unchecked"]
        counts = {"num_tensors": self.types.total(), "num_unchecked": len(self.unchecked)}
        return found | {"types": dict(self.types), **counts}


def check_tensors(reader: Any, file: Path, merged: Path, into: PreTrainedModel | None = None) -> TensorCheck:
    """Compare every tensor of a GGUF file with the dense checkpoint that it was made from.

    A tensor in 16 or 32 bits must be equal (in a layout that adds 1, within a rounding of the sum). A q8_0 weight must
    be within half a step of its block plus the rounding of the step to float16. The error of other types must be within
    0.3 of the norm. One tensor is in memory at a time, in float32 and a few copies. An embedding may lack the rows for
    which the file has no word: the converter leaves them out of Gemma 3.

    Args:
        reader: `gguf.GGUFReader` of the file.
        file: The GGUF file.
        merged: Directory of the checkpoint.
        into: A model to fill with the values of the file.
    """
    source = ModelSource("directory", merged, merged.name)
    model = skeleton(load_config(source), source, torch.float32, "auto", torch.device("cpu"))
    stored = rename_to_model(open_safetensors(merged), model)
    tied = tied_weights(model)
    header = read_header(file)
    processor = layout_processor(header, model)
    names = model_names(header, model, processor)
    parameters = {} if into is None else dict(into.named_parameters(remove_duplicate=False))
    found = TensorCheck(layout_known=knows_layout(header))
    tokens = reader.get_field("tokenizer.ggml.tokens")
    num_words = 0 if tokens is None else len(tokens.data)
    seen = set()
    for tensor in reader.tensors:
        if tensor.name in _NOT_IN_CHECKPOINTS:
            continue
        name = names.get(tensor.name, "")
        name = name if name in stored else tied.get(name, "")
        if name not in stored:
            found.fault(tensor.name, f"tensor {tensor.name} is not in the checkpoint")
            continue
        seen.add(name)
        expected = stored[name].read()
        assert isinstance(expected, Tensor)  # a dense checkpoint
        if tensor.name == _EMBEDDING and int(tensor.shape[-1]) == num_words < len(expected):
            expected = expected[:num_words]
        values = _compare(found, tensor, expected.float().numpy(), processor)
        if name in parameters:
            parameters[name].data[: len(values)].copy_(torch.from_numpy(values))
    for name in sorted(stored.keys() - seen):
        found.fault(name, f"{name} is missing in the file")
    return found


def _compare(found: TensorCheck, tensor: Any, expected: Values, processor: TensorProcessor) -> Values:
    """Note the error of a tensor; returns its values in the layout of transformers."""
    import gguf

    type_ = tensor.tensor_type.name

    def laid_out(values: Values) -> Values:
        changed: Values = processor.process(weights=values, name=tensor.name).weights
        return np.require(changed, requirements=["C", "W"])  # torch warns of arrays that it may not write to

    read = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    values = laid_out(read)
    if values.shape != expected.shape:
        got = f"shape {list(values.shape)}, expected {list(expected.shape)}"
        found.fault(tensor.name, f"tensor {tensor.name} has {got}")
        return expected
    error = np.abs(values - expected)
    if type_ in _DENSE:
        # A layout that adds 1 (Gemma's norms) loses the last digits in float32; nothing else may.
        allowed = np.float32(2.0**-23) * (1 + np.abs(expected)) if type_ == "F32" else np.float32(0)
        off = float("inf") if type_ != "F32" and error.any() else largest_share(error, allowed)
        found.note(tensor.name, type_, off, "dense_error", float(error.max()))
    elif type_ == "Q8_0":
        off = largest_share(error, laid_out(q8_0_rounding(tensor.data, read)))
        found.note(tensor.name, type_, off, "q8_0_error", off)
    else:
        share = float(np.linalg.norm(error) / max(float(np.linalg.norm(expected)), 1e-30))
        found.note(tensor.name, type_, share / _LOSSY, "lossy_error", share)
    return values


def largest_share(error: Values, allowed: Any) -> float:
    """max(error / allowed), with 0 / 0 = 0; NaN if one is NaN."""
    if not error.any():
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(error == 0, 0, error / allowed).max())


def q8_0_rounding(stored: Values, values: Values) -> Values:
    """Largest error that rounding to q8_0 can cause, for each weight of a tensor, in the file's layout, float32."""
    blocks = np.ascontiguousarray(stored).reshape(-1, _Q8_BYTES)
    steps = np.abs(blocks[:, :2].copy().view(np.float16).astype(np.float32))
    codes = np.abs(blocks[:, 2:].view(np.int8).astype(np.float32))
    # A step is rounded to float16 after the weights were divided by it: by 2^-11 of it, or 2^-25 if it is subnormal.
    rounding = np.maximum(steps * np.float32(2.0**-11), np.float32(2.0**-25))
    allowed: Values = (steps / 2 + (codes + np.float32(0.51)) * rounding).reshape(values.shape)
    return allowed


def vocabulary_faults(reader: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """How the tokenizer in the file differs from the run's: words, end token, chat template."""
    faults = []
    field_ = reader.get_field("tokenizer.ggml.tokens")
    words = [] if field_ is None else field_.contents()
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    ids = [index for index in range(min(len(words), len(tokenizer))) if index not in added]
    # Not the added tokens: the file has them as text, with their blanks.
    wrong = [i for i, word in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if word != words[i]]
    if len(words) < len(tokenizer) or wrong:
        where = f", first difference at token {wrong[0]}" if wrong else ""
        faults.append(f"the file has another vocabulary: {len(words)} words for {len(tokenizer)}{where}")
    end = reader.get_field("tokenizer.ggml.eos_token_id")
    if tokenizer.eos_token_id is not None and (end is None or end.contents() != tokenizer.eos_token_id):
        faults.append("the file has another end token")
    template = reader.get_field("tokenizer.chat_template")
    wanted = tokenizer.chat_template
    if isinstance(wanted, str) and (template is None or template.contents() != wanted):
        faults.append("the file has another chat template")
    return faults
