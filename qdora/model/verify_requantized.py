"""What quantising the merge again costs: reloaded by transformers and bitsandbytes, and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.model.logit_comparison import compare_logits, token_sequences, verdict
from qdora.model.verify import tokenizer_faults
from qdora.model.verify_nf4_lora import load_with_bnb


def verify_requantized(
    model: PreTrainedModel,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    texts: Sequence[str] | None = None,
    input_ids: Sequence[Sequence[int]] | None = None,
    max_tokens: int = 2048,
    max_length: int = 512,
) -> dict[str, Any]:
    """The differences of `verify_merged`, without a tolerance: this format rounds to 4 bits, the figures say how far.

    Passed means only: every tensor found its place, the tokenizer gives the same ids, all logits are finite.

    Args:
        model, tokenizer, texts, input_ids, max_tokens, max_length: As of `verify_merged`.
        directory: From `export_streamed` with `requantize`.
    Raises:
        UserError: As of `verify_merged`.
    """
    sequences = token_sequences(tokenizer, texts, input_ids, max_tokens, max_length)
    device = next(model.parameters()).device
    exported, faults = load_with_bnb(directory, model, device)
    total = compare_logits(model, exported, sequences, device)
    faults += tokenizer_faults(tokenizer, directory, texts, sequences)
    return verdict(total, faults, torch.float32, model.dtype, lossy=True) | {"num_texts": len(sequences)}
