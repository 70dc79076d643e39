"""Perplexity of text: every token scored exactly once, in windows that overlap so that each token has context."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qdora.data.tokenize import encode_pairs
from qdora.errors import Diverged, UserError
from qdora.evaluate.token_scores import score_spans, strided_spans
from qdora.model.attention import context_length

_MOST_NATS = math.log(sys.float_info.max)
DEFAULT_WINDOW = 2048
"""Tokens of a window where the model allows as many: the length in published WikiText perplexities."""


@dataclass(frozen=True)
class Perplexity:
    """Sums over all texts, and what follows from them."""

    nll_sum: float
    """Nats."""
    num_tokens: int
    """Scored tokens. The first token of a text has no context and is not scored, unless the tokenizer puts a
    beginning-of-sequence token before it."""
    num_bytes: int
    """UTF-8 bytes of the texts, whole."""
    num_texts: int
    window: int
    stride: int

    @property
    def perplexity(self) -> float:
        """exp(nll_sum / num_tokens); depends on the tokenizer."""
        return math.exp(self.nll_sum / self.num_tokens)

    @property
    def nll_per_byte(self) -> float:
        """nll_sum / num_bytes, nats: comparable between tokenizers."""
        return self.nll_sum / self.num_bytes

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "perplexity": self.perplexity, "nll_per_byte": self.nll_per_byte}


def text_perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    max_batch_tokens: int = 4096,
) -> Perplexity:
    """Perplexity of whole texts, each on its own.

    Args:
        texts: At least one, with at least two tokens in all.
        window: Tokens fed at once; None takes the model's context, at most 2,048.
        stride: Tokens by which a window moves, at most the window; None takes half of it.
        max_batch_tokens: Most tokens of a forward pass; a longer window is a batch of its own.
    Raises: UserError if the window exceeds the model's context, or nothing can be scored. Diverged if the perplexity is
        not finite.
    """
    context = context_length(model)
    if window is None:
        window = min(DEFAULT_WINDOW, context or DEFAULT_WINDOW)
    elif context is not None and window > context:
        raise UserError(f"perplexity window: must be at most the model's context, {context} tokens, got {window}")
    stride = max(window // 2, 1) if stride is None else stride
    encoded = encode_pairs(tokenizer, [("", text) for text in texts])  # as training does
    spans = [span for ids, _ in encoded for span in strided_spans(ids, window, stride)]
    num_bytes = sum(len(text.encode()) for text in texts)
    if not spans:
        raise UserError(f"perplexity: no token can be scored in {len(texts)} texts with {num_bytes} bytes")
    nll_sum = -float(score_spans(model, spans, max_batch_tokens=max_batch_tokens).sum())
    num_tokens = sum(span.num_scored for span in spans)
    if not nll_sum / num_tokens < _MOST_NATS:  # nan, too
        raise Diverged("perplexity: it is not finite. The model's weights or activations overflow or hold NaN.")
    return Perplexity(nll_sum, num_tokens, num_bytes, len(texts), window=window, stride=stride)


def read_texts(paths: Sequence[Path | str]) -> list[str]:
    """The texts of UTF-8 files. Raises UserError if one is missing, is no file, is not UTF-8 or is empty."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}") from None
        if not texts[-1]:
            raise UserError(f"{path}: the file is empty")
    return texts
