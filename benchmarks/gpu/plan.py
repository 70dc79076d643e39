"""How large everything is, in the full suite and in the dry run on a CPU; and the file of what a section has found."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdora.files.atomic import atomic_write_json

ERROR_LINES = 15  # that are kept


@dataclass(frozen=True)
class Plan:
    shapes: tuple[tuple[int, int], ...]  # (in, out) of the timed layers, the most telling first
    ranks: tuple[int, ...]  # the first one is measured at every number of tokens
    tokens: tuple[int, ...]  # of a layer's input
    repeats: int  # samples of each timed function
    sample_seconds: float  # short calls are repeated within a sample
    step_tokens: tuple[int, ...]  # of a whole model's step
    middle: dict[str, Any]  # the 8B-shaped model
    large: dict[str, Any]  # the 70B-shaped one


# Meta-Llama-3-8B and -70B, config.json of the checkpoints.
_LLAMA3 = {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_TINY = dict(zip(_KEYS, (64, 128, 2, 4, 2), strict=True)) | {"vocab_size": 512, "max_position_embeddings": 128}

FULL = Plan(
    shapes=((4096, 11008), (8192, 28_672), (4096, 4096)),
    ranks=(16, 64, 256),
    tokens=(2048, 8192, 4096, 16_384),
    repeats=20,
    sample_seconds=0.01,
    step_tokens=(2048, 8192),
    middle=_LLAMA3 | dict(zip(_KEYS, (4096, 14_336, 32, 32, 8), strict=True)),
    large=_LLAMA3 | dict(zip(_KEYS, (8192, 28_672, 80, 64, 8), strict=True)),
)
SMOKE = Plan(
    shapes=((128, 192), (192, 256), (128, 128)),
    ranks=(4,),
    tokens=(32, 64),
    repeats=2,
    sample_seconds=0.0,
    step_tokens=(16, 32),
    middle=_TINY,
    large=_TINY | {"num_hidden_layers": 3},
)


class Part:
    """The entries of one section: a JSON file that is rewritten after each, so that a crash loses nothing. After
    `seconds` no case is begun."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.entries = path, dict[str, Any]()
        self._end = time.monotonic() + seconds

    def put(self, key: str, value: Any) -> None:
        self.entries[key] = value
        atomic_write_json(self.path, self.entries)

    def attempt(self, key: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Put what the call returns, or the end of its error: one failed case must not cost the others."""
        if time.monotonic() > self._end:
            self.put("skipped", [*self.entries.get("skipped", []), key])
            return
        try:
            self.put(key, function(*arguments, **options))
        except Exception:
            self.put(key, {"error": traceback.format_exc().strip().splitlines()[-ERROR_LINES:]})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
