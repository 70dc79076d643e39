"""Perplexity of whole texts."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qdora.data.tokenize import encode_pairs
from qdora.errors import Diverged, UserError
from qdora.evaluate.spans import score_spans, strided_spans
from qdora.model.attention import context_length

_MOST_NATS = math.log(sys.float_info.max)
_WINDOW = 2048  # tokens: the length in published WikiText perplexities


def text_perplexity(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:
    """Perplexity of whole texts, each on its own: every token once, in windows that overlap by half.

    A window is the model's context, at most 2,048 tokens. nll_sum: nats. num_tokens: scored, of a text all, but the
    first without a beginning-of-sequence token before it. perplexity: exp(nll_sum / num_tokens), which depends on the
    tokenizer; nll_per_byte (UTF-8) does not.
    """
    window = min(_WINDOW, context_length(model) or _WINDOW)
    stride = max(window // 2, 1)
    encoded = encode_pairs(tokenizer, [("", text) for text in texts])  # as training does
    spans = [span for ids, _ in encoded for span in strided_spans(ids, window, stride)]
    num_bytes = sum(len(text.encode()) for text in texts)
    if not spans:
        raise UserError(f"perplexity: no token can be scored in {len(texts)} texts with {num_bytes} bytes")
    nll_sum = -float(score_spans(model, spans).sum())
    num_tokens = sum(span.num_scored for span in spans)
    if not nll_sum / num_tokens < _MOST_NATS:  # nan, too
        raise Diverged("perplexity: it is not finite.")
    return {
        "nll_sum": nll_sum,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_texts": len(texts),
        "window": window,
        "stride": stride,
        "perplexity": math.exp(nll_sum / num_tokens),
        "nll_per_byte": nll_sum / num_bytes,
    }


def read_texts(paths: Sequence[Path | str]) -> list[str]:
    """The texts of UTF-8 files."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}") from None
    return texts
