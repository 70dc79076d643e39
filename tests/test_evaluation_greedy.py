"""Greedy decoding in batches with a cache, against one sequence at a time without any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from qdora.evaluation.forward_path import pads_left
from qdora.evaluation.generation import decode_greedily
from tests import tiny_adapted
from tests.test_evaluation_spans import VOCABULARY, tiny_model

LENGTHS = [9, 1, 14, 3, 14, 6, 2, 11]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS]


def naive(model: nn.Module, prompt: Sequence[int], count: int, stops: Sequence[int] = ()) -> list[int]:
    """No padding, no cache, the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        token = int(logits.double().argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


PADDED = ("llama", "qwen2", "gemma2", "mistral", "gpt2")


@pytest.mark.parametrize("family", [*PADDED, "bloom", "lfm2", "qwen3_next", "mamba2"])
def test_batches_equal_one_at_a_time(family: str) -> None:
    model = tiny_model(family)
    # bloom takes no positions; the windows of gemma2 and mistral (6) are shorter than most prompts
    assert pads_left(model) == (family in PADDED)
    expected = [naive(model, prompt, 10) for prompt in prompts()]
    assert len({tuple(each) for each in expected}) > 4
    for budget in (1, 60, 4096):
        found = decode_greedily(model, prompts(), max_new_tokens=10, stop_ids=(), max_batch_tokens=budget)
        assert found == expected, budget


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_an_adapted_model_decodes_as_one_at_a_time(quant: str | None) -> None:
    model = tiny_adapted.adapted("llama", quant=quant)
    found = decode_greedily(model, prompts(), max_new_tokens=6, stop_ids=())
    assert found == [naive(model, prompt, 6) for prompt in prompts()]


def test_rows_end_at_their_own_stop_and_the_others_go_on() -> None:
    model = tiny_model("llama")
    free = [naive(model, prompt, 10) for prompt in prompts()]
    stops = sorted({free[0][2], free[3][0], free[4][5]})
    expected = [naive(model, prompt, 10, stops) for prompt in prompts()]
    assert {len(each) for each in expected} > {0, 10}
    assert decode_greedily(model, prompts(), max_new_tokens=10, stop_ids=stops) == expected


def test_a_row_that_has_enough_is_done() -> None:
    model = tiny_model("llama")
    free = [naive(model, prompt, 10) for prompt in prompts()]
    wanted = [10, 1, 2, 3, 10, 1, 1, 7]
    found = decode_greedily(
        model, prompts(), max_new_tokens=10, stop_ids=(), finished=lambda index, new: len(new) == wanted[index]
    )
    assert found == [new[:count] for new, count in zip(free, wanted, strict=True)]


def test_settings_of_the_model_are_set_aside() -> None:
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(repetition_penalty=50.0, eos_token_id=list(range(VOCABULARY)))
    expected = [naive(model, prompt, 6) for prompt in prompts()]
    assert decode_greedily(model, prompts(), max_new_tokens=6, stop_ids=()) == expected
    assert model.generation_config.repetition_penalty == 50.0


def test_progress_and_mode() -> None:
    model = tiny_model("llama")
    model.train()
    seen: list[tuple[int, int]] = []
    decode_greedily(
        model,
        prompts(),
        max_new_tokens=2,
        stop_ids=(),
        max_batch_tokens=40,
        progress=lambda *numbers: seen.append(numbers),
    )
    assert seen[-1] == (8, 8)
    assert len(seen) > 2
    assert model.training


def test_a_batch_that_does_not_fit_is_decoded_again_in_halves(caplog: pytest.LogCaptureFixture) -> None:
    """Memory runs out at the third token, as it does where the cache grows."""
    model = tiny_model("llama")
    expected = [naive(model, prompt, 6) for prompt in prompts()]
    sizes: list[int] = []

    def short(_model: nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2 and inputs["attention_mask"].shape[1] > max(LENGTHS) + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(short, with_kwargs=True)
    assert decode_greedily(model, prompts(), max_new_tokens=6, stop_ids=()) == expected
    assert max(sizes) == len(LENGTHS)
    assert sum("out of memory" in record.getMessage() for record in caplog.records) == 1
