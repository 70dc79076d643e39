"""Spans, examples and texts scored, greedy decoding, hidden states: against one sequence at a time in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
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
    GenerationConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
)

from qdora.data.example import Example, Turn
from qdora.errors import Diverged
from qdora.evaluate import perplexity
from qdora.evaluate import spans as span_scores
from qdora.evaluate.generation import decode_greedily
from qdora.evaluate.loglikelihood import score_examples, scoring_faults
from qdora.evaluate.perplexity import read_texts, text_perplexity
from qdora.evaluate.spans import Span, pads_left, score_groups, score_spans, scoring, shares_prefix
from tests import reference, support
from tests.data_rows import fault_of, says, tokenized

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
    "gemma2": lambda: Gemma2Config(head_dim=8, sliding_window=6, **SHAPE),
    "mistral": lambda: MistralConfig(sliding_window=6, **SHAPE),
    "lfm2": lambda: Lfm2Config(layer_types=["conv", "full_attention", "conv"], **SHAPE),
    "mamba2": lambda: Mamba2Config(**MAMBA, state_size=8, num_heads=4, head_dim=16, n_groups=1),
    "bloom": lambda: BloomConfig(hidden_size=32, **OLDER),
    "gpt2": lambda: GPT2Config(n_embd=32, n_positions=128, **OLDER),
}


def tiny_model(family: str, **changes: Any) -> Any:
    """A randomly initialised two-to-three-layer model of the family, float32, eval mode."""
    torch.manual_seed(5)
    return AutoModelForCausalLM.from_config(CONFIGS[family](**changes), dtype=torch.float32).eval()


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


def head_inputs(model: Any) -> list[bool]:
    """Whether each input of the output head lies flat in memory: else torch reads the head's weight once a row."""
    seen: list[bool] = []
    model.get_output_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].is_contiguous()))
    return seen


@pytest.mark.parametrize("family", CONFIGS)
def test_scores_equal_one_sequence_at_a_time(family: str) -> None:
    model, groups = tiny_model(family), random_groups(seed=1) + HARD
    inputs = head_inputs(model)
    assert shares_prefix(model) == (family in ("llama", "gpt2"))
    expected = naive_groups(model, groups)
    for attention in ("sdpa", "eager") if shares_prefix(model) else ("",):
        if attention:
            model.set_attn_implementation(attention)
        assert_close(score_groups(model, groups), expected)
    assert all(inputs)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), num_groups=st.integers(1, 5), max_batch_tokens=st.integers(1, 200))
def test_any_lengths(seed: int, num_groups: int, max_batch_tokens: int) -> None:
    model, groups = kept("llama"), random_groups(seed, num_groups, longest=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(span_scores, "BATCH_TOKENS", max_batch_tokens)
        assert_close(score_groups(model, groups), naive_groups(model, groups))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_batch_gives_the_same_scores(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups = kept(family), random_groups(seed=3)
    expected = naive_groups(model, groups)
    monkeypatch.setattr(span_scores, "BATCH_TOKENS", 60)
    assert_close(score_groups(model, groups), expected)
    monkeypatch.setattr(span_scores, "BATCH_TOKENS", 4096)
    monkeypatch.setattr(span_scores, "_ENOUGH_TOKENS", 1)
    assert_close(score_groups(model, groups), expected)
    monkeypatch.setattr(span_scores, "_MAX_CACHE_BYTES", 1)
    monkeypatch.setattr(span_scores, "_MAX_LOGITS", 3 * VOCABULARY)
    monkeypatch.setattr(span_scores, "_CPU_SOFTMAX_LOGITS", 2 * VOCABULARY)
    assert_close(score_groups(model, groups), expected)


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
    monkeypatch.setattr(span_scores, "BATCH_TOKENS", 240)
    assert_close(score_groups(model, many), expected)
    num_failed = sum(ids.numel() > 70 for ids in seen)
    assert 0 < num_failed < 8 < len(seen)  # later batches have as many parts as one has needed
    [told] = [message for message in caplog.messages if "out of memory" in message]
    assert "Tried to allocate 2.00 GiB" in told
    with monkeypatch.context() as patched:
        patched.setattr(span_scores, "FSDPModule", nn.Embedding)  # as if the base were divided among processes
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_long_span_never_makes_more_logits_than_fit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_scores, "_MAX_LOGITS", 8 * VOCABULARY + 5)
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


# Greedy decoding

LENGTHS = [9, 1, 14, 3, 14, 6, 2, 11]
PROMPTS = [np.random.default_rng([3, length]).integers(0, VOCABULARY, length).tolist() for length in LENGTHS]


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


@pytest.mark.parametrize("family", CONFIGS)
def test_batches_equal_one_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    # bloom takes no positions; the windows of gemma2 and mistral (6) are shorter than most prompts
    assert pads_left(model) == (family in ("llama", "gemma2", "mistral", "gpt2"))
    expected, inputs = decoded(model, 10), head_inputs(model)
    assert len({tuple(each) for each in expected}) > 4
    for budget in (1, 60, 4096):
        monkeypatch.setattr(span_scores, "BATCH_TOKENS", budget)
        found = decode_greedily(model, PROMPTS, max_new_tokens=10, stop_ids=())
        assert found == expected, budget
    assert all(inputs)


def test_rows_end_alone_and_settings_of_the_model_are_set_aside(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    free = decoded(model, 10)
    stops = sorted({free[0][2], free[3][0], free[4][5]})
    expected = decoded(model, 10, stops)
    assert {len(each) for each in expected} > {0, 10}
    model.generation_config = GenerationConfig(repetition_penalty=50.0, eos_token_id=list(range(VOCABULARY)))
    assert decode_greedily(model, PROMPTS, max_new_tokens=10, stop_ids=stops) == expected
    assert model.generation_config.repetition_penalty == 50.0
    seen: list[Any] = []
    model.train()
    decode_greedily(model, PROMPTS, max_new_tokens=1, stop_ids=(), progress=lambda *now: seen.append(now))
    assert (model.training, seen[-1]) == (True, (8, 8))
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


EXAMPLES = [
    Example("t", "0", "Question: what colour is the sky?\nAnswer:", " blue", (" blue", " green", " a cow"), 0),
    Example("t", "1", "Question: which animal gives milk?\nAnswer:", " a cow", (" a dog", " a cow"), 1),
    Example("t", "2", "the quick brown fox", " jumps over the lazy dog", (" jumps", " jumps over the lazy dog"), 1),
    Example("t", "3", "Question: what is the an", "swer", ("swer", "d", "t"), 0),  # no space: tokens span the border
    Example("t", "4", "the sky is ", "blue", ("blue", "a"), 0),  # a space at the end of the prompt
]
MOO = Example("t", "chat", "", "", messages=(Turn("user", "moo?"), Turn("assistant", "a cow")))
TEXT = Example("t", "text", "", "the lazy dog")
PLAIN = support.tokenizer()


def answer_of(example: Example) -> Example:
    return replace(example, choices=(), gold=None)


def model(**changes: Any) -> Any:
    return support.llama(vocab_size=400, initializer_range=0.3, **changes)


def border(tokenizer: Any, prompt: str, choice: str) -> tuple[list[int], int]:
    """Ids of prompt + choice and the first that the prompt alone does not have, spelled out."""
    ids, alone = tokenizer(prompt + choice)["input_ids"], tokenizer(prompt.rstrip(" "))["input_ids"]
    start = 0
    while start < min(len(ids), len(alone)) and ids[start] == alone[start]:
        start += 1
    return ids, start


@pytest.mark.parametrize("bos", [False, True])
def test_choices_and_answers_equal_one_sequence_at_a_time(bos: bool) -> None:
    net, tokenizer = model(), support.tokenizer(bos=bos)
    found = score_examples(net, tokenizer, EXAMPLES)
    answers = score_examples(net, tokenizer, [answer_of(example) for example in EXAMPLES])
    borders_that_merge = 0
    for example, scores, answer in zip(EXAMPLES, found, answers, strict=True):
        assert (scores.id, scores.gold, scores.num_truncated) == (example.id, example.gold, 0)
        for c, choice in enumerate(example.choices):
            ids, start = border(tokenizer, example.prompt, choice)
            assert scores.loglikelihoods[c] == pytest.approx(naive(net, ids, start), abs=2e-5)
            assert (scores.num_tokens[c], scores.num_chars[c]) == (len(ids) - start, len(choice.strip()))
            borders_that_merge += tokenizer.decode(ids[start:]) != choice
        # the tokens are those of training, without the end
        [trained] = tokenized([example], tokenizer).examples
        start = int(np.flatnonzero(trained.loss_mask)[0])
        for each in (scores, answer):
            assert each.nll == pytest.approx(-naive(net, trained.input_ids[:-1].tolist(), start), abs=2e-5)
            assert each.num_answer_tokens == trained.loss_mask.sum() - 1
    assert borders_that_merge >= 2


def test_prompts_longer_than_the_context_lose_their_left_end() -> None:
    net, tokenizer = model(max_position_embeddings=24), support.tokenizer(bos=True)
    prompt = "xyzzy plugh " * 5
    example = Example("t", "long", prompt, " one", (" one", " two words"), 0)
    [found] = score_examples(net, tokenizer, [example])
    [answer] = score_examples(net, tokenizer, [answer_of(example)])
    pairs = [border(tokenizer, prompt, choice) for choice in example.choices]
    cut, own_cut = max(len(ids) for ids, _ in pairs) - 1 - 24, len(pairs[0][0]) - 1 - 24
    assert (found.num_truncated, answer.num_truncated) == (cut, own_cut)
    assert cut > own_cut > 0
    expected = [naive(net, ids[:1] + ids[1 + cut :], start - cut) for ids, start in pairs]
    assert found.loglikelihoods.tolist() == pytest.approx(expected, abs=2e-5)
    ids, start = pairs[0]
    assert answer.nll == pytest.approx(-naive(net, ids[:1] + ids[1 + own_cut :], start - own_cut), abs=2e-5)


def test_long_answers_are_scored_in_windows_each_token_once() -> None:
    net, text = model(max_position_embeddings=16), "the quick brown fox jumps over the lazy dog " * 4
    [found] = score_examples(net, PLAIN, [Example("t", "text", "", text)])
    ids = PLAIN(text)["input_ids"]
    expected = naive(net, ids[:17], 1)
    for end in range(17, len(ids), 8):
        last = min(end + 8, len(ids))
        expected += naive(net, ids[last - 17 : last], 17 - (last - end))
    assert found.nll == pytest.approx(-expected, abs=5e-5)
    assert (found.num_answer_tokens, found.num_truncated) == (len(ids) - 1, 0)
    example = Example("t", "a", "z" * 30, " " + "q" * 40)  # keeps half a window of its prompt
    [found] = score_examples(net, PLAIN, [example])
    ids, start = border(PLAIN, example.prompt, example.answer)
    assert (found.num_answer_tokens, found.num_truncated) == (len(ids) - start, start - 9)


def test_chats_are_scored_on_the_assistants_turns_and_kinds_keep_their_order() -> None:
    net, encode = model(), PLAIN.encode
    turns = (Turn("user", "moo?"), Turn("assistant", "a cow"), Turn("user", "sure?"), Turn("assistant", "yes"))
    [found] = score_examples(net, PLAIN, [replace(MOO, messages=turns)])
    first = encode("<|im_start|>user\nmoo?<|im_end|>\n<|im_start|>assistant\n")
    second = encode("a cow<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n")
    said = [encode("a cow<|im_end|>\n"), encode("yes<|im_end|>\n")]
    expected = naive(net, first + said[0], len(first)) + naive(net, first + second + said[1], len(first + second))
    assert found.nll == pytest.approx(-expected, abs=2e-5)
    assert found.num_answer_tokens == len(said[0]) + len(said[1])
    examples, seen = [TEXT, MOO, EXAMPLES[0], answer_of(EXAMPLES[1]), MOO], list[Any]()
    together = score_examples(net, PLAIN, examples, progress=lambda *now: seen.append(now))
    assert seen[-1] == (5, 5)
    for score, example in zip(together, examples, strict=True):
        [alone] = score_examples(net, PLAIN, [example])
        assert score.id == example.id
        np.testing.assert_allclose(score.loglikelihoods, alone.loglikelihoods, atol=2e-5)


def test_examples_that_cannot_be_scored_are_refused() -> None:
    net = model(max_position_embeddings=16)
    faulty = [
        Example("t", "empty", "moo", " x", (" x", ""), 0),
        Example("t", "alone", "", "a", ("a", "b"), 0),
        Example("t", "huge", "moo", " x", (" x", " " + "q" * 60), 0),
        Example("t", "one", "", "a"),
    ]
    empty, alone, huge, one = faults = [fault_of(score_examples, net, PLAIN, [each]) for each in faulty]
    assert says(empty, "t: example empty: choices[1] has no token to score")
    assert says(alone, "t: example alone: choices[0] has no token to score")
    assert says(huge, "t: example huge: a choice does not fit the model's context of 16 tokens")
    assert says(one, "t: example one: the answer has no token to score")
    assert scoring_faults(PLAIN, [TEXT] * 1500 + faulty, 16) == faults[:1]
    assert scoring_faults(PLAIN, [TEXT], 16) == []
    fits = Example("t", "fits", "moo", " x", (" x", " " + "q" * 14), 0)
    ids, start = border(PLAIN, "moo", fits.choices[1])  # with the last token of its prompt, and without the last of all
    assert [len(scoring_faults(PLAIN, [fits], len(ids) - start - less)) for less in (0, 1)] == [0, 1]
    assert says(fault_of(score_examples, net, support.tokenizer(chat_template=None), [MOO]), "no chat template")


# Perplexity


@pytest.mark.parametrize("window", [16, 7, 1, 128])
def test_perplexity_equals_one_token_at_a_time(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net, texts = model(), ["Pack my box with five dozen liquor jugs now", "Ça va?", "x"]
    monkeypatch.setattr(perplexity, "_WINDOW", window)
    found = text_perplexity(net, PLAIN, texts)
    expected, count, stride = 0.0, 0, max(window // 2, 1)
    for ids in (PLAIN(text)["input_ids"] for text in texts):
        for t in range(1, len(ids)):
            begin = 0
            if t > window:
                block = (t - 1 - window) // stride
                begin = min(1 + window + (block + 1) * stride, len(ids)) - 1 - window
            expected, count = expected - naive(net, ids[begin : t + 1], t - begin), count + 1
    assert [found[f"num_{name}"] for name in ("tokens", "bytes", "texts")] == [count, 43 + 7 + 1, 3]
    assert found["nll_sum"] == pytest.approx(expected, abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(expected / count), rel=1e-5)
    assert found["nll_per_byte"] == pytest.approx(expected / 51, rel=1e-6)


def test_perplexity_by_hand_and_what_is_refused(tmp_path: Path) -> None:
    net = support.llama(vocab_size=400, tie_word_embeddings=False)
    torch.nn.init.zeros_(net.lm_head.weight)  # uniform
    found = text_perplexity(net, support.tokenizer(bos=True), ["abcd"])
    assert found["perplexity"] == pytest.approx(400, rel=1e-6)
    # with the beginning of sequence the first token counts
    assert (found["num_tokens"], found["window"], found["stride"]) == (len(PLAIN("abcd")["input_ids"]), 128, 64)
    contents = {"good": b"na\xc3\xafve", "bom": b"\xef\xbb\xbfna\xc3\xafve", "latin": b"na\xefve", "empty": b""}
    for name, content in contents.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    good = tmp_path / "good.txt"
    assert read_texts([good, tmp_path / "bom.txt"]) == ["naïve", "naïve"]
    for call, words in (
        (lambda: text_perplexity(net, PLAIN, ["", "a"]), "no token can be scored in 2 texts with 1 bytes"),
        (lambda: read_texts([good, tmp_path / "latin.txt"]), "latin.txt: 'utf-8' codec can't decode"),
        (lambda: read_texts([good, tmp_path / "missing.txt"]), "missing.txt: [Errno 2] No such file"),
    ):
        assert says(fault_of(call), words)
    for factor in (math.nan, 1e5):
        net = support.llama(vocab_size=400)
        net.lm_head.weight.data *= factor
        with pytest.raises(Diverged, match="perplexity: it is not finite"):
            text_perplexity(net, PLAIN, ["Pack my box"])
