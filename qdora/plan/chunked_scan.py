"""Linear attention in a plan: the same bytes with fewer operations.

transformers' own code of the gated delta rule (Qwen3-Next, Qwen3.5, OLMo hybrid) hands a state from one chunk of 64
tokens to the next, so its operations on fake tensors grow with the text. Nothing but the state leaves a chunk: a text
of many chunks needs the same bytes as several texts of a few chunks each. A plan runs those in its place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from qdora.model.replaced_function import replaced

_RULE = "torch_chunk_gated_delta_rule"
"""The function's name in the file of each of these models."""
_CHUNK = 64
"""Tokens of a chunk; transformers' default, which no model changes."""
_FEWEST_CHUNKS = 4
"""Chunks of a short text. The loop holds its temporary tensors for one chunk of every text at once: here for a quarter
of all tokens, where the real loop holds them for one chunk."""


@contextmanager
def short_scans(model: nn.Module) -> Iterator[None]:
    """Inside, linear attention of the model runs several short texts for each long one, on fake tensors, by
    transformers' own code, never by a kernel, which takes no fake tensors."""
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    with ExitStack() as replacements:
        for file in files:
            rule = replaced(file, _RULE, lambda before: partial(_short_texts, inspect.unwrap(before)))
            replacements.enter_context(rule)
        yield


def _short_texts(
    rule: Callable[..., tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool,
    **_state: Any,
) -> tuple[Tensor, None]:
    """transformers' function on texts of as few chunks as divide all chunks, without a state before or after them.

    Args:
        query, key, value: (texts, tokens, heads, features).
        g, beta: (texts, tokens, heads).
    """
    num_tokens = value.shape[1]
    num_chunks = -(-num_tokens // _CHUNK)
    count = next((each for each in range(_FEWEST_CHUNKS, num_chunks) if num_chunks % each == 0), num_chunks)

    def cut(x: Tensor) -> Tensor:
        if count == num_chunks:
            return x
        more = num_chunks * _CHUNK - num_tokens
        padded = nn.functional.pad(x, (*[0, 0] * (x.ndim - 2), 0, more)) if more else x
        return padded.reshape(-1, count * _CHUNK, *x.shape[2:])

    # No names for what is cut: the function frees its inputs while it runs.
    norm = use_qk_l2norm_in_kernel
    out = rule(cut(query), cut(key), cut(value), g=cut(g), beta=cut(beta), use_qk_l2norm_in_kernel=norm)[0]
    return out.reshape(len(value), -1, *value.shape[2:])[:, :num_tokens], None
