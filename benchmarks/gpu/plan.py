"""How large everything is: the full suite, and the dry run on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Shape = tuple[int, int]  # (in, out) of a linear layer


@dataclass(frozen=True)
class Plan:
    """Sizes of the suite."""

    shapes: tuple[Shape, ...]  # of the timed layers, the most telling first
    ranks: tuple[int, ...]  # the first one is measured at every number of tokens
    tokens: tuple[int, ...]  # of a layer's input
    repeats: int  # samples of each timed function
    sample_seconds: float  # short calls are repeated within a sample
    step_tokens: tuple[int, ...]  # of a whole model's step
    num_steps: int  # of each model's sample
    middle: dict[str, Any]  # the 8B-shaped model
    large: dict[str, Any]  # the 70B-shaped one
    check_shapes: tuple[tuple[int, int, int, int], ...]  # (tokens, in, out, rank) of the numeric checks


# Meta-Llama-3-8B and -70B, config.json of the checkpoints.
_LLAMA3 = {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_8B = _LLAMA3 | dict(zip(_KEYS, (4096, 14_336, 32, 32, 8), strict=True))
_70B = _LLAMA3 | dict(zip(_KEYS, (8192, 28_672, 80, 64, 8), strict=True))
_TINY = dict(zip(_KEYS, (64, 128, 2, 4, 2), strict=True)) | {"vocab_size": 512, "max_position_embeddings": 128}
# One token, primes, blocks that cross rows (in_features no multiple of 64), and real layers.
_ODD = ((1, 64, 64, 1), (37, 192, 200, 5), (67, 101, 130, 8))

FULL = Plan(
    shapes=((4096, 11008), (8192, 28_672), (4096, 4096)),
    ranks=(16, 64, 256),
    tokens=(2048, 8192, 4096, 16_384),
    repeats=20,
    sample_seconds=0.01,
    step_tokens=(2048, 8192),
    num_steps=1,
    middle=_8B,
    large=_70B,
    check_shapes=(*_ODD, (513, 1024, 768, 16), (2048, 4096, 4096, 16), (1000, 4096, 11008, 64)),
)
SMOKE = Plan(
    shapes=((128, 192), (192, 256), (128, 128)),
    ranks=(4,),
    tokens=(32, 64),
    repeats=2,
    sample_seconds=0.0,
    step_tokens=(16, 32),
    num_steps=1,
    middle=_TINY,
    large=_TINY | {"num_hidden_layers": 3},
    check_shapes=(*_ODD, (33, 128, 192, 8)),
)


def shape_name(shape: Shape) -> str:
    """in x out, as in 4096x11008."""
    return f"{shape[0]}x{shape[1]}"
