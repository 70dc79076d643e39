"""Loading the tokenizer of a source, with a pad token from the model's vocabulary."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qdora.errors import UserError
from qdora.model.gguf_file import require_gguf
from qdora.model.source import TOKENIZER_FILES, ModelSource

# Tokens that models reserve for padding or never emit, best first.
_PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<unused0>")


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a source and make sure that it has a pad token.

    It is the tokenizer's own, else a token reserved for padding in the vocabulary, else the unknown token, else the end
    token. The vocabulary is never extended, since the model has no embedding for a new token.

    Raises:
        UserError: There are no tokenizer files, they cannot be used, or there is no token to pad with.
    """
    if not source.is_gguf and not any((source.path / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"model.tokenizer: {source.path} has no tokenizer, expected one of {', '.join(TOKENIZER_FILES)}. "
            "Fix: name a model that has it in model.tokenizer."
        )
    try:
        if source.is_gguf:
            require_gguf()
            tokenizer: Any = AutoTokenizer.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                str(source.path), trust_remote_code=source.trust_remote_code, local_files_only=True
            )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.tokenizer: {source.name}: its tokenizer cannot be used: {reason}") from error
    _set_pad_token(tokenizer, source)
    result: PreTrainedTokenizerBase = tokenizer
    return result


def _set_pad_token(tokenizer: Any, source: ModelSource) -> None:
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = next((token for token in _PAD_CANDIDATES if token in vocabulary), None)
    unknown = tokenizer.unk_token if tokenizer.unk_token not in (tokenizer.eos_token, tokenizer.bos_token) else None
    pad = reserved or unknown or tokenizer.eos_token
    if pad is None:
        raise UserError(f"model.tokenizer: {source.name} has no pad, unknown or end token to pad with.")
    tokenizer.pad_token = pad
