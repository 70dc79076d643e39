"""What a model can read, against the examples: rows of its embedding, and positions. Streams are not looked at."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from qdora.data.mix import Source
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.model.attention import positions_of


def vocabulary_faults(sources: Sequence[Source], config: PreTrainedConfig, num_added: int) -> list[str]:
    """One line for each source with a token that the embedding has no row for.

    Args:
        num_added: Tokens of `model.add_tokens`, whose rows are made.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    if size is None:
        return []
    faults = []
    for part in sources:
        largest = max((int(each.input_ids.max()) for each in _examples(part) if len(each)), default=0)
        if largest >= size + num_added:
            faults.append(
                f"model.tokenizer: source {part.name!r} has token id {largest:,}, and the model's embedding has "
                f"{size:,} rows. Fix: use the tokenizer that belongs to the model."
            )
    return faults


def context_warnings(sources: Sequence[Source], config: PreTrainedConfig) -> list[str]:
    """One line for each source with examples that are longer than the model has positions."""
    positions = positions_of(config)
    if positions is None:
        return []
    warnings = []
    for part in sources:
        lengths = [len(each) for each in _examples(part) if len(each) > positions]
        if lengths:
            warnings.append(
                f"{part.name}: {len(lengths):,} of {len(_examples(part)):,} examples are longer than the model has "
                f"positions (up to {max(lengths):,} tokens, max_position_embeddings {positions:,}). Evaluation cuts "
                "them, training does not, and a model that learnt a vector for each position fails. Fix: "
                f"set data.max_length: {positions} and data.too_long: truncate."
            )
    return warnings


def _examples(part: Source) -> Sequence[TokenizedExample]:
    return part.examples if isinstance(part, TokenizedSet) else ()
