"""Scores of token spans and greedy decoding, in batches with caches, against one sequence at a time without any."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    Qwen2Config,
)

from qdora.evaluate import batches, token_scores
from qdora.evaluate.forward_path import pads_left, scoring, shares_prefix
from qdora.evaluate.generation import decode_greedily
from qdora.evaluate.token_scores import Span, score_groups, score_spans
from tests import reference, support

VOCABULARY = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # at 0.02 every logit is nearly 0 and wrong masks would hardly show
}
OLDER: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
MAMBA: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
CONFIGS: dict[str, Any] = {
    "llama": lambda **changes: LlamaConfig(**SHAPE | changes),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "gemma": lambda: GemmaConfig(head_dim=8, **SHAPE),
    "gemma2": lambda: Gemma2Config(head_dim=8, sliding_window=6, **SHAPE),
    "mistral": lambda: MistralConfig(sliding_window=6, **SHAPE),
    "lfm2": lambda: Lfm2Config(layer_types=["conv", "full_attention", "conv"], **SHAPE),
    "mamba2": lambda: Mamba2Config(**MAMBA, state_size=8, num_heads=4, head_dim=16, n_groups=1),
    "bloom": lambda: BloomConfig(hidden_size=32, **OLDER),
    "gpt2": lambda: GPT2Config(n_embd=32, n_positions=128, **OLDER),
}


def tiny_model(family: str, **changes: Any) -> Any:
    """A randomly initialised two-to-three-layer model of the family, float32, eval mode."""
    if family == "qwen3_next":  # linear and full attention, experts
        return support.mixture(family, vocab_size=VOCABULARY)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**changes), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if family == "qwen2" and name.endswith("proj.bias"):  # biases start at zero
            nn.init.normal_(parameter, std=0.3)
    return model


kept = cache(tiny_model)
"""For tests that do not change the model."""


def naive(model: nn.Module, ids: Sequence[int], start: int) -> float:
    """log p(ids[start:] | ids[:start]): one sequence, no padding, no cache, the softmax in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double().numpy()
    return -reference.token_nll(logits[start - 1 : -1], np.array(ids[start:]))[0]


def random_groups(seed: int, num_groups: int = 9, longest: int = 40) -> list[list[Span]]:
    """Questions with 1 to 5 choices of 1 to 12 tokens; some choices share tokens, some starts lie before the fork."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, longest)).tolist()
        common = rng.integers(0, VOCABULARY, rng.integers(0, 3)).tolist()
        group = []
        for _ in range(int(rng.integers(1, 6))):
            ids = prompt + common + rng.integers(0, VOCABULARY, rng.integers(1, 12)).tolist()
            if g % 3 == 2 and len(prompt) > 3:  # a merge at the boundary: the prompt's last tokens differ by choice
                ids[len(prompt) - 1] = int(rng.integers(0, VOCABULARY))
            group.append(Span(tuple(ids), len(prompt)))
        groups.append(group)
    return groups


LONG = np.random.default_rng(0).integers(0, VOCABULARY, 95).tolist()
BEGUN = [Span(tuple(LONG[:length]), 5) for length in (6, 7, 95)]  # a choice that begins another, a long one
HARD = [BEGUN, BEGUN[:1], [BEGUN[2], BEGUN[2]], [Span((1, 2, 3, 4), 1), Span((5, 2, 3), 1)]]  # first tokens that differ


def naive_groups(model: nn.Module, groups: list[list[Span]]) -> list[list[float]]:
    return [[naive(model, span.ids, span.start) for span in group] for group in groups]


def assert_close(found: list[Any], expected: list[list[float]]) -> None:
    """Measured over 5 seeds and the four families: largest difference 1.2e-5 at sums up to 88 nats."""
    for scores, naive_scores in zip(found, expected, strict=True):
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, naive_scores, rtol=1e-6, atol=2e-5)


SHARING = ("llama", "qwen2", "gemma", "gpt2")
WHOLE = ("mistral", "gemma2", "bloom", "lfm2", "qwen3_next", "mamba2")


FULL = [(name, "eager") for name in SHARING]


@pytest.mark.parametrize("family, attention", [*FULL, *((name, "sdpa") for name in (*SHARING, *WHOLE))])
def test_scores_equal_one_sequence_at_a_time(family: str, attention: str) -> None:
    model = tiny_model(family)
    if family in SHARING:
        model.set_attn_implementation(attention)
    assert shares_prefix(model) == (family in SHARING)
    groups = random_groups(seed=1) + HARD
    assert_close(score_groups(model, groups), naive_groups(model, groups))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), num_groups=st.integers(1, 5), max_batch_tokens=st.integers(1, 200))
def test_any_lengths(seed: int, num_groups: int, max_batch_tokens: int) -> None:
    model, groups = kept("llama"), random_groups(seed, num_groups, longest=20)
    assert_close(score_groups(model, groups, max_batch_tokens=max_batch_tokens), naive_groups(model, groups))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_batch_gives_the_same_scores_and_reports_progress(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = kept(family), random_groups(seed=3)
    expected = naive_groups(model, groups)
    for max_batch_tokens in (1, 60, 10**6):
        seen: list[Any] = []
        options: Any = {"max_batch_tokens": max_batch_tokens, "progress": lambda *now, seen=seen: seen.append(now)}
        found = score_groups(model, groups, **options)
        assert_close(found, expected)
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1] >= 9
        assert len(seen) > 2 or max_batch_tokens > 100
    monkeypatch.setattr(batches, "_ENOUGH_TOKENS", 1)
    assert_close(score_groups(model, groups), expected)
    monkeypatch.setattr(token_scores, "_MAX_CACHE_BYTES", 1)
    monkeypatch.setattr(token_scores, "_MAX_LOGITS", 3 * VOCABULARY)
    monkeypatch.setattr(token_scores, "_CPU_SOFTMAX_LOGITS", 2 * VOCABULARY)
    assert_close(score_groups(model, groups), expected)


def test_batches_are_cut_where_they_do_not_fit_or_would_be_padding() -> None:
    widths = [512, 410, 409, 100, 10]

    def cut(most: int) -> list[list[int]]:
        cuts = batches.length_batches(range(5), widths.__getitem__, lambda some: widths[some[0]] * len(some) <= most)
        return list(cuts)

    assert cut(10**6) == [[0, 1], [2, 3, 4]]  # from 512 tokens on, 409 is below 0.8 x 512
    assert cut(1000) == [[0], [1, 2], [3, 4]]
    assert cut(1) == [[index] for index in range(5)]
    assert list(batches.length_batches([], widths.__getitem__, lambda _: True)) == []


def out_of_memory(model: nn.Module, fails: Any) -> list[Any]:
    """Memory for no input of which `fails` is true; the inputs so far."""
    seen: list[Any] = []

    def short(_model: nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        seen.append(inputs["input_ids"])
        if fails(inputs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(short, with_kwargs=True)
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_batches_that_do_not_fit_are_run_in_halves(family: str, monkeypatch: Any, caplog: Any) -> None:
    """With a prefix cache (llama) and without one; memory for 70 tokens, more than any single question needs."""
    model, groups = tiny_model(family), random_groups(seed=3)
    many = groups + random_groups(seed=7) + random_groups(seed=8)
    expected, fitting = naive_groups(model, many), [70]
    seen = out_of_memory(model, lambda inputs: inputs["input_ids"].numel() > fitting[0])
    assert_close(score_groups(model, many, max_batch_tokens=240), expected)
    num_failed = sum(ids.numel() > 70 for ids in seen)
    assert 0 < num_failed < 8 < len(seen)  # later batches have as many parts as one has needed
    [told] = [message for message in caplog.messages if "out of memory" in message]
    assert "Tried to allocate 2.00 GiB" in told
    with monkeypatch.context() as patched:
        patched.setattr(batches, "FSDPModule", nn.Embedding)  # as if the base were divided among processes
        with pytest.raises(torch.OutOfMemoryError):
            score_groups(model, groups)
    fitting[0] = 0  # not even a single one
    with pytest.raises(torch.OutOfMemoryError):
        score_groups(model, groups)


def test_bf16_differs_by_rounding_only() -> None:
    """Measured over five seeds of nine questions, nats per token: cached scores against the float32 model with the same
    weights 0.0062, one sequence at a time in bf16 against it 0.0073, the two bf16 scores against each other 0.0064."""
    model, exact = (tiny_model("llama", initializer_range=0.1) for _ in range(2))
    exact.load_state_dict(model.bfloat16().state_dict())
    for seed in range(2):
        groups = random_groups(seed, num_groups=5, longest=20)
        found, flat = np.concatenate(score_groups(model, groups)), [span for group in groups for span in group]
        tokens = np.array([span.num_scored for span in flat])
        true, alone = (np.array([naive(each, span.ids, span.start) for span in flat]) for each in (exact, model))
        assert (np.abs(found - true) / tokens).max() <= 2 * (np.abs(alone - true) / tokens).max()


@pytest.mark.parametrize(
    "groups, fed, logits",
    [
        # four choices of two tokens behind a prompt of 30: 30 positions and then 4, not 4 x 31
        ([[Span((*range(30), 40 + choice, 50), 30) for choice in range(4)]], [(1, 30), (4, 1)], [4, 4]),
        ([[Span((1, 2, 3, choice), 3) for choice in (7, 8)]], [(1, 3)], [2]),  # one pass for choices of one token
        ([[Span(tuple(range(40)), 37)]], [(1, 39)], [3]),
    ],
)
def test_shared_tokens_run_once_and_scored_ones_alone_make_logits(groups: Any, fed: Any, logits: list[int]) -> None:
    model = tiny_model("llama")
    seen: list[tuple[int, ...]] = []
    made: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: seen.append(tuple(inputs[0].shape)))
    model.lm_head.register_forward_hook(lambda _m, _i, output: made.append(tuple(output.shape)))
    score_groups(model, groups)
    assert (seen, made) == (fed, [(1, number, VOCABULARY) for number in logits])


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gemma2"])
def test_a_long_span_never_makes_more_logits_than_fit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "_MAX_LOGITS", 8 * VOCABULARY + 5)
    model, ids = tiny_model(family), tuple(np.random.default_rng(3).integers(0, VOCABULARY, 61).tolist())
    spans = [Span(ids, 1), Span(ids[:41], 30), Span(ids[:12], 5), Span(ids[:17], 1)]
    expected, numbers = [[naive(model, span.ids, span.start) for span in spans]], list[int]()
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: numbers.append(output[..., 0].numel()))
    assert_close([score_spans(model, spans)], expected)
    assert max(numbers) == (60 if family == "gemma2" else 8)  # Gemma 2 has windows, so no cache that grows


def test_modes_come_back_and_scoring_leaves_nothing_in_training() -> None:
    """DoRA on NF4: what scoring leaves behind in the layers must not enter, or break, the next backward pass."""
    model, batch = support.adapted_model("llama", quant="nf4").train(), torch.arange(1, 9)[None]
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def stop_while_scoring() -> None:
        with scoring(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    own, groups = gradients(), random_groups(seed=6)
    with pytest.raises(RuntimeError, match="stop"):
        stop_while_scoring()
    found = score_groups(model, groups)
    assert [module.training for module in model.modules()] == before
    assert len(own) > 10
    assert all(torch.equal(one, other) for one, other in zip(own, gradients(), strict=True))
    assert_close(found, naive_groups(model.eval(), groups))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_head_takes_a_flat_input_so_that_its_weight_is_read_once(family: str, monkeypatch: Any) -> None:
    """torch makes one product of all rows only where the strides are those of a new tensor."""
    model = tiny_model(family)
    head, seen = model.get_output_embeddings(), list[Any]()
    forward = head.forward

    def watched(hidden: Tensor) -> Tensor:
        seen.append((tuple(hidden.shape), hidden.stride()))
        return forward(hidden)

    monkeypatch.setattr(head, "forward", watched)
    score_spans(model, [Span(tuple(range(1, 12 + row)), 7) for row in range(4)])
    score_groups(model, [[Span((*range(1, 9), 3 + choice, 5), 8) for choice in range(3)] for _ in range(2)])
    decode_greedily(model, [[1, 2, 3], [4, 5]], max_new_tokens=2, stop_ids=())
    assert all(max(each) > 1 for each in zip(*(shape[:2] for shape, _ in seen), strict=True))
    assert all(strides == (shape[1] * shape[2], shape[2], 1) for shape, strides in seen), seen
    assert not head._forward_pre_hooks


# Greedy decoding

LENGTHS = [9, 1, 14, 3, 14, 6, 2, 11]
PROMPTS = [np.random.default_rng([3, length]).integers(0, VOCABULARY, length).tolist() for length in LENGTHS]
PADDED = ("llama", "qwen2", "gemma2", "mistral", "gpt2")


def decoded(model: nn.Module, count: int, stops: Sequence[int] = ()) -> list[list[int]]:
    """No padding, no cache, the whole sequence again for every token."""
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(count):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            token = int(logits.double().argmax())
            if token in stops:
                break
            ids.append(token)
        found.append(ids[len(prompt) :])
    return found


@pytest.mark.parametrize("family", [*PADDED, "bloom", "lfm2", "qwen3_next", "mamba2"])
def test_batches_equal_one_at_a_time(family: str) -> None:
    model = kept(family)
    # bloom takes no positions; the windows of gemma2 and mistral (6) are shorter than most prompts
    assert pads_left(model) == (family in PADDED)
    expected = decoded(model, 10)
    assert len({tuple(each) for each in expected}) > 4
    for budget in (1, 60, 4096):
        found = decode_greedily(model, PROMPTS, max_new_tokens=10, stop_ids=(), max_batch_tokens=budget)
        assert found == expected, budget


def test_rows_end_alone_and_settings_of_the_model_are_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    free = decoded(model, 10)
    stops = sorted({free[0][2], free[3][0], free[4][5]})
    expected = decoded(model, 10, stops)
    assert {len(each) for each in expected} > {0, 10}
    model.generation_config = GenerationConfig(repetition_penalty=50.0, eos_token_id=list(range(VOCABULARY)))
    assert decode_greedily(model, PROMPTS, max_new_tokens=10, stop_ids=stops) == expected
    assert model.generation_config.repetition_penalty == 50.0
    wanted, seen = [10, 1, 2, 3, 10, 1, 1, 7], list[Any]()
    options: dict[str, Any] = {"max_new_tokens": 10, "stop_ids": (), "max_batch_tokens": 60}
    model.train()
    options |= {"finished": lambda index, new: len(new) == wanted[index], "progress": lambda *now: seen.append(now)}
    found = decode_greedily(model, PROMPTS, **options)
    assert found == [new[:count] for new, count in zip(free, wanted, strict=True)]
    assert (model.training, seen[-1], len(seen) > 2) == (True, (8, 8), True)
    # memory runs out at the third token, as it does where the cache grows
    third = max(LENGTHS) + 2
    sizes = out_of_memory(
        model, lambda given: len(given["input_ids"]) > 2 and given["attention_mask"].shape[1] >= third
    )
    assert decode_greedily(model, PROMPTS, max_new_tokens=6, stop_ids=()) == [new[:6] for new in free]
    assert max(map(len, sizes)) == len(LENGTHS)
    assert sum("out of memory" in message for message in caplog.messages) == 1
    adapted = support.adapted_model("llama", quant="nf4")
    assert decode_greedily(adapted, PROMPTS, max_new_tokens=6, stop_ids=()) == decoded(adapted, 6)
