"""The types of a GGUF file's matrices that `qdora export` writes."""

from __future__ import annotations

from typing import Literal, get_args

GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k"
]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
CONVERTED = GGUF_TYPES[:4]
"""Types that llama.cpp's converter writes; its quantiser makes the others from a file in f16."""
