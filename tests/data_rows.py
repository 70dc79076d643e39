"""Rows as data files, tokenised sources, and what a user reads of them: shared by the tests of data."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from qdora.data.example import Example, RowFault
from qdora.data.mix import Mix, Source, make_mix
from qdora.data.sources import open_source, read_data, tokenized_mix
from qdora.data.tokenize import TokenizedSet, tokenize_all
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig, SourceConfig
from tests import support

Rows = list[dict[str, Any]]
_tokenizer = cache(support.tokenizer)


def content(suffix: str, rows: Rows) -> bytes:
    """Rows as a file of this ending."""
    plain, _, packed = suffix.rpartition(".")
    if packed == "gz":
        return gzip.compress(content(plain, rows), mtime=0)
    if packed == "zst":
        return bytes(pa.compress(content(plain, rows), codec="zstd", asbytes=True))
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if suffix == ".parquet":
        file = io.BytesIO()
        pd.DataFrame(rows).to_parquet(file)
        return file.getvalue()
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter={".csv": ",", ".tsv": "\t"}[suffix])
    writer.writerow(rows[0])
    writer.writerows([each if isinstance(each, str) else json.dumps(each) for each in row.values()] for row in rows)
    return text.getvalue().encode()


def write(path: Path, rows: Rows) -> str:
    """Rows as a file, in the layout of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffixes = path.suffixes[-2:] if path.suffix in (".gz", ".zst") else path.suffixes[-1:]
    path.write_bytes(content("".join(suffixes), rows))
    return str(path)


def faults_of(call: Callable[..., Any], *given: Any, **options: Any) -> tuple[str, ...]:
    """The lines with which a call is refused."""
    with pytest.raises((UserError, RowFault)) as error:
        call(*given, **options)
    return error.value.faults if isinstance(error.value, UserError) else (str(error.value),)


def fault_of(call: Callable[..., Any], *given: Any, **options: Any) -> str:
    """The one line."""
    [line] = faults_of(call, *given, **options)
    return line


def says(text: str, words: str) -> bool:
    """Whether a text has all parts of `words`, which " ... " divides, in this order."""
    return re.search(".*".join(map(re.escape, words.split(" ... "))), text, re.DOTALL) is not None


def load_source(source: SourceConfig, split: str | None = None) -> list[Example]:
    return list(open_source(source, split))


def tokenized(examples: Any, tokenizer: Any, name: str = "x", **data: Any) -> TokenizedSet:
    """Examples as the source of a recipe with these settings of `data`."""
    settings = DataConfig.model_validate({"mix": [{"source": "x.jsonl"}], "max_length": 200} | data)
    return tokenize_all(examples, tokenizer, name, settings)


def mix_of(sets: Sequence[Source], max_epochs: Sequence[float | None] | None = None, **data: Any) -> Mix:
    """Sources as the mix of a recipe with these settings of `data`."""
    mix = [{"source": "x.jsonl", "max_epochs": most} for most in max_epochs or [None] * len(sets)]
    return make_mix(sets, DataConfig.model_validate({"mix": mix} | data))


def mixed(data: DataConfig, tokenizer: Any = None) -> Mix:
    """The tokenised mix of a recipe that has only this section."""
    recipe: Any = SimpleNamespace(data=data)
    return tokenized_mix(recipe, tokenizer or _tokenizer(), read_data(data)[0])
