"""Measures over whole texts: perplexity, and how far a compressed model's hidden states are from those of another."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora.adapter.layer import evaluation_mode
from qdora.data.tokenize import encode_pairs
from qdora.errors import Diverged, UserError
from qdora.evaluate.spans import score_spans, strided_spans
from qdora.model.attention import context_length

_MOST_NATS = math.log(sys.float_info.max)
_WINDOW = 2048  # tokens: the length in published WikiText perplexities


@dataclass(frozen=True)
class Perplexity:
    """Sums over all texts."""

    nll_sum: float  # nats
    num_tokens: int  # scored: of a text all, but the first without a beginning-of-sequence token before it
    num_bytes: int  # UTF-8 bytes of the texts
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
        return {**asdict(self), "perplexity": self.perplexity, "nll_per_byte": self.nll_per_byte}


def text_perplexity(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, window: int | None = None, stride: int | None = None
) -> Perplexity:
    """Perplexity of whole texts, each on its own: every token once, in windows that overlap.

    `window` tokens are fed at once, by default the model's context, at most 2,048; the next begins `stride` tokens
    later, by default half of it.
    """
    if window is None:
        window = min(_WINDOW, context_length(model) or _WINDOW)
    stride = max(window // 2, 1) if stride is None else stride
    encoded = encode_pairs(tokenizer, [("", text) for text in texts])  # as training does
    spans = [span for ids, _ in encoded for span in strided_spans(ids, window, stride)]
    num_bytes = sum(len(text.encode()) for text in texts)
    if not spans:
        raise UserError(f"perplexity: no token can be scored in {len(texts)} texts with {num_bytes} bytes")
    nll_sum = -float(score_spans(model, spans).sum())
    num_tokens = sum(span.num_scored for span in spans)
    if not nll_sum / num_tokens < _MOST_NATS:  # nan, too
        raise Diverged("perplexity: it is not finite.")
    return Perplexity(nll_sum, num_tokens, num_bytes, len(texts), window=window, stride=stride)


def read_texts(paths: Sequence[Path | str]) -> list[str]:
    """The texts of UTF-8 files."""
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}") from None
    return texts


@torch.no_grad()
def hidden_state_errors(model: nn.Module, reference: nn.Module, texts: Sequence[Sequence[int]]) -> list[float]:
    """Mean over all positions of all texts (token ids) of ||h - h'|| / ||h'||, after each block in turn.

    h' are the hidden states of the reference on its own earlier ones. Every position counts the same, since the first
    may be longer than all others together (massive activations, arXiv 2402.17762).
    """
    context, sums, number = context_length(model), torch.zeros(()), 0
    with evaluation_mode(model), evaluation_mode(reference):
        for ids in texts:
            tokens = torch.tensor([list(ids)[:context]])
            own, expected = _states(model, tokens), _states(reference, tokens)
            errors = (own - expected).norm(dim=-1) / expected.norm(dim=-1)  # (blocks, positions)
            sums, number = sums + errors.double().sum(dim=1), number + tokens.shape[1]
    return [float(each) for each in sums / number]


def _states(model: nn.Module, tokens: Tensor) -> Tensor:
    """(blocks, positions, width) float32: the states after each block."""
    output = model(input_ids=tokens.to(next(model.parameters()).device), output_hidden_states=True, use_cache=False)
    return torch.cat([state.cpu().float() for state in output.hidden_states[1:]])
