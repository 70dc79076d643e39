"""A byte-level BPE tokenizer of some 400 tokens, trained on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Question: What is the answer to the question?\nAnswer: the first answer of the three answers",
    "Question: is the sky blue?\nAnswer: yes no yes no",
    "The cat sat on the mat, and then the dog sat on the cat. Why did the dog sit?",
] * 3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML as many models have it."""


def make(
    *,
    bos: bool = False,
    adds_eos: bool = False,
    eos: str | None = "<|im_end|>",
    chat_template: str | None = CHATML,
    more: Sequence[str] = (),
) -> Any:
    """Byte-level BPE; `bos` and `adds_eos`: it puts <s> before, and its end of sequence behind, every text.

    `more` texts teach it more tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*CORPUS, *more], trainer)
    if bos or adds_eos:
        pattern = ("<s> " if bos else "") + "$A" + (" <|im_end|>" if adds_eos else "")
        pairs = [(token, backend.token_to_id(token)) for token in ("<s>", "<|im_end|>")]
        backend.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=pairs)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token=eos, pad_token="<pad>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer
