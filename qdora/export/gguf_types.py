"""The types of a GGUF file's matrices that `qdora export` writes."""

from __future__ import annotations

from typing import Literal, get_args

GgufType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q4_0", "q3_k_m", "q2_k"
]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
QUANTIZED: dict[GgufType, int] = {
    "q6_k": 18,
    "q5_k_m": 17,
    "q5_k_s": 16,
    "q4_k_m": 15,
    "q4_k_s": 14,
    "q4_0": 2,
    "q3_k_m": 12,
    "q2_k": 10,
}
"""Types that llama.cpp's quantiser makes from a file in f16 -> number in llama.h's llama_ftype."""
CONVERTED = tuple(type_ for type_ in GGUF_TYPES if type_ not in QUANTIZED)
"""Types that llama.cpp's converter writes."""
