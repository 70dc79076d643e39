"""How large everything is: the full suite, and the dry run on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Shape = tuple[int, int]
"""(in, out) of a linear layer."""


@dataclass(frozen=True)
class Plan:
    """Sizes of the suite.

    Attributes:
        shapes: (in, out) of the timed layers, the most telling first.
        ranks: The first one is measured at every number of tokens before the others.
        tokens: Tokens of a layer's input.
        repeats: Samples of each timed function.
        sample_seconds: Length of a sample; short calls are repeated within it.
        step_tokens: Tokens of a whole model's step.
        num_steps: Steps of each model's sample.
        middle, large: Settings of the 8B- and 70B-shaped models.
        check_shapes: (tokens, in, out, rank) of the numeric checks.
        reduce_shapes: (tokens, out) of the checks of `column_dot`.
    """

    shapes: tuple[Shape, ...]
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]
    repeats: int
    sample_seconds: float
    step_tokens: tuple[int, ...]
    num_steps: int
    middle: dict[str, Any]
    large: dict[str, Any]
    check_shapes: tuple[tuple[int, int, int, int], ...]
    reduce_shapes: tuple[tuple[int, int], ...]


# Meta-Llama-3-8B and -70B, config.json of the checkpoints.
_LLAMA3 = {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
_8B = _LLAMA3 | {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
_70B = _LLAMA3 | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
_TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
# One token, primes, blocks that cross rows (in_features no multiple of 64), and real layers.
_ODD = ((1, 64, 64, 1), (37, 192, 200, 5), (67, 101, 130, 8))

FULL = Plan(
    shapes=((4096, 11008), (8192, 28_672), (4096, 4096)),
    ranks=(16, 64, 256),
    tokens=(2048, 8192, 4096, 16_384),
    repeats=20,
    sample_seconds=0.01,
    step_tokens=(2048, 8192),
    num_steps=4,
    middle=_8B,
    large=_70B,
    check_shapes=(*_ODD, (513, 1024, 768, 16), (2048, 4096, 4096, 16), (1000, 4096, 11008, 64)),
    reduce_shapes=((1, 1), (2, 64), (37, 200), (513, 11008), (2048, 4096), (16_384, 4096), (4096, 28_672)),
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
    reduce_shapes=((1, 1), (2, 64), (37, 200)),
)


def shape_name(shape: Shape) -> str:
    """in x out, as in 4096x11008."""
    return f"{shape[0]}x{shape[1]}"
