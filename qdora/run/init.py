"""A recipe for a person's own files, with a comment on each choice: `qdora init`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.prompt import Prompt
from rich.table import Table

from qdora.data.files import read_rows
from qdora.data.formats import FIRST_ROWS, format_of
from qdora.data.sources import draw, open_source
from qdora.data.tokenize import ExampleTally
from qdora.errors import HubFailure, NoTokenizer, UserError
from qdora.files.atomic import atomic_write_text
from qdora.files.console import consoles
from qdora.files.machine import user_path
from qdora.model.source import BUILTIN, load_tokenizer, resolve
from qdora.recipe.data_settings import CHAT_FORMATS, DataConfig, SourceConfig
from qdora.recipe.options import InitOptions
from qdora.recipe.recipe_file import load_recipe
from qdora.run.preview import MOST_ROWS, preview

# Names of columns, in lower case, that hold what is asked and what is answered.
_ASKED = ("prompt", "question", "instruction", "input", "query", "user", "request", "problem", "frage")
_ANSWERED = ("completion", "answer", "output", "response", "reply", "assistant", "target", "antwort")


def init_recipe(files: Sequence[Path], options: InitOptions) -> dict[str, Any]:
    """Look at data files, write a recipe for them, and show two rows of each as they will be trained: JSON values."""
    out, has_gpu = options.out, torch.cuda.is_available()
    if out.exists():
        raise UserError(f"--out: {out} exists. Fix: name another file with -o.")
    model = options.model or ("Qwen/Qwen2.5-7B-Instruct" if has_gpu else BUILTIN)
    tokenizer, unchecked = None, ""
    try:
        tokenizer = load_tokenizer(resolve(model, weights=False, setting="--model"))
    except (HubFailure, NoTokenizer) as error:
        unchecked = f"Lengths are a third of the characters, since there is no tokenizer: {error.faults[0]}"
    named = dict(pair.split("=", 1) for pair in (options.columns or "").split(",") if "=" in pair)
    sources = [_source(user_path(str(file)), named, tokenizer) for file in files]
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out, _text(sources, model, out, has_gpu=has_gpu))
    _, results = consoles()
    table = Table("source", "rows", "format", "columns", "longest, tokens")
    for each in sources:
        columns = ", ".join(f"{name} = {own}" for name, own in each["settings"].get("columns", {}).items())
        table.add_row(each["source"], f"{each['rows']:,}", each["format"], columns, f"{each['longest']:,}")
    results.print(table)
    if unchecked:
        results.print(unchecked, markup=False)
    else:
        preview(load_recipe(str(out)), str(out), 2)
    run = f"runs/{out.stem}"
    next_ = [f"qdora plan {out}", f"qdora train {out} --run-dir {run}", f'qdora generate {run} --prompt "..."']
    results.print("\nNext:", *(f"  {command}" for command in next_), sep="\n", markup=False)
    return {"recipe": str(out), "model": model, "sources": sources, "commands": next_}


def _source(path: Path, named: dict[str, str], tokenizer: Any) -> dict[str, Any]:
    """What a file holds by its first rows, the settings that it needs, and its longest row in tokens."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    rows, settings = read_rows(path), dict[str, Any]()
    first = [row for _, row in rows.chosen(range(min(FIRST_ROWS, rows.num_rows))) if isinstance(row, dict)]
    names = list(dict.fromkeys(name for row in first for name in row))
    format = format_of(names)
    if not format:
        texts = [name for name in names if all(isinstance(row.get(name), str | None) for row in first)]
        settings["columns"] = named or _columns(path, names, texts)
        format = "text" if "text" in settings["columns"] else "completion"
    if format in CHAT_FORMATS and (tokenizer is None or tokenizer.chat_template):
        settings["chat"] = True
    source = SourceConfig.model_validate({"source": str(path), **settings})
    examples, lengths = open_source(source), [1]
    if tokenizer is None:
        for each in examples:
            text = f"{each.prompt}{each.answer}{''.join(turn.content for turn in each.messages)}"
            lengths.append(len(text) // 3)
    else:
        data = DataConfig.model_validate({"mix": [source], "max_length": 1 << 20})
        tally = ExampleTally(source.label, data, tokenizer, lengths=lengths)
        tally.add(draw(examples, MOST_ROWS, data.seed))
    return {
        "source": str(path),
        "rows": rows.num_rows,
        "longest": max(lengths),
        "format": format,
        "settings": settings,
    }


def _columns(path: Path, names: list[str], texts: list[str]) -> dict[str, str]:
    """The columns of prompt and completion, or of text; a terminal is asked where several may be meant."""
    if len(names) == 1 and ";" in names[0]:
        raise UserError(f"{path}: is separated by semicolons. Fix: save it with commas.")
    if len(texts) == 1:
        return {"text": texts[0]}
    asked, answered = (
        [name for name in texts if name.lower().strip() in known] for known in (_ASKED, _ANSWERED)
    )
    if len(asked) == len(answered) == 1:
        return {"prompt": asked[0], "completion": answered[0]}
    if len(texts) < 2 or not sys.stdin.isatty():
        pair = zip(("prompt", "completion"), texts or names, strict=False)
        what = f"columns {', '.join(names)} do not show what is asked and what is answered"
        raise UserError(f"{path}: {what}. Fix: --columns {','.join(f'{key}={name}' for key, name in pair)}")
    prompt = Prompt.ask("Which column is the prompt?", choices=texts)
    rest = [name for name in texts if name != prompt]
    return {"prompt": prompt, "completion": Prompt.ask("Which one is the answer to learn?", choices=rest)}


def _text(sources: Sequence[dict[str, Any]], model: str, out: Path, *, has_gpu: bool) -> str:
    rows, longest = sum(each["rows"] for each in sources), max(each["longest"] for each in sources)
    length = min(max(128, 1 << (longest - 1).bit_length()), 4096)
    epochs, batch = (3, 8) if rows < 2000 else (2, 16) if rows < 20000 else (1, 32)
    mix = ""
    for each in sources:
        source = json.dumps(os.path.relpath(each["source"], out.parent), ensure_ascii=False)
        mix += f"    - source: {source}  # {each['rows']:,} rows, format {each['format']}\n"
        for key, value in each["settings"].items():
            why = {"columns": "name in the format: yours", "chat": "through the model's chat template"}[key]
            mix += f"      {key}: {json.dumps(value, ensure_ascii=False)}  # {why}\n"
    text = f"""\
# Written by qdora init. `qdora guide settings` explains all settings.
model: {{source: {json.dumps(model)}}}  # a Hub id, a directory of safetensors, a .gguf file, or builtin
adapter: {{kind: dora, rank: 16, alpha: 32}}  # or lora
data:
  mix:
{mix}  max_length: {length}  # in tokens; the longest of the rows that were read has about {longest:,}
  too_long: truncate  # cuts the start of a long prompt, the end of a long chat
train:
  epochs: {epochs}  # passes over {rows:,} rows
  batch: {batch}  # examples of an optimizer step
  lr: 2.0e-4
  warmup: 0.05  # share of all steps
"""
    if has_gpu:
        return text
    return f"""{text}  optimizer: adamw  # 8-bit states, the default, are slow on a CPU
memory: {{checkpointing: false}}  # faster; with a GPU remove this line and the one above
"""
