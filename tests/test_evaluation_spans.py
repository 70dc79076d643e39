"""Shared prefixes, padding and chunks against one sequence at a time in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qdora.evaluation import batches
from qdora.evaluation import token_scores as spans_module
from qdora.evaluation.forward_path import scoring, shares_prefix
from qdora.evaluation.generation import decode_greedily
from qdora.evaluation.token_scores import Span, score_groups, score_spans
from tests import tiny_adapted, tiny_experts

VOCABULARY = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # at 0.02 every logit is nearly 0 and wrong masks would hardly show
}


def tiny_model(family: str, **changes: Any) -> Any:
    """A randomly initialised two-to-three-layer model of the family, float32, eval mode."""
    shape = {**_SHAPE, **changes}
    torch.manual_seed(5)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**shape)).eval()
        for layer in model.model.layers:  # biases start at zero
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                nn.init.normal_(linear.bias, std=0.3)
        return model
    if family == "gemma":
        return GemmaForCausalLM(GemmaConfig(head_dim=8, **shape)).eval()
    if family == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(head_dim=8, sliding_window=6, **shape)).eval()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=6, **shape)).eval()
    if family == "lfm2":
        kinds = ["conv", "full_attention", "conv"]
        return Lfm2ForCausalLM(Lfm2Config(layer_types=kinds, **shape)).eval()
    if family == "qwen3_next":  # linear and full attention, experts
        return tiny_experts.make(family, vocab_size=VOCABULARY)
    if family == "mamba2":
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        return Mamba2ForCausalLM(
            Mamba2Config(**sizes, num_heads=4, head_dim=16, n_groups=1, initializer_range=0.3)
        ).eval()
    if family == "bloom":
        return BloomForCausalLM(
            BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
        ).eval()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    ).eval()


def naive(model: nn.Module, span: Span) -> float:
    """log p(ids[start:] | ids[:start]): one sequence, no padding, no cache, float64 softmax written out."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([span.ids]), use_cache=False).logits[0].double().numpy()
    total = 0.0
    for position in range(span.start, len(span.ids)):
        row = logits[position - 1]
        total += row[span.ids[position]] - (row.max() + np.log(np.exp(row - row.max()).sum()))
    return float(total)


def random_groups(seed: int, num_groups: int = 9, longest: int = 40) -> list[list[Span]]:
    """Questions with 1 to 5 choices of 1 to 12 tokens; some choices share tokens, some starts lie before the fork."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, longest)).tolist()
        common = rng.integers(0, VOCABULARY, rng.integers(0, 3)).tolist()
        group = []
        for _ in range(int(rng.integers(1, 6))):
            tail = rng.integers(0, VOCABULARY, rng.integers(1, 12)).tolist()
            ids = prompt + common + tail
            if g % 3 == 2 and len(prompt) > 3:  # a merge at the boundary: the prompt's last tokens differ by choice
                ids[len(prompt) - 1] = int(rng.integers(0, VOCABULARY))
            group.append(Span(tuple(ids), len(prompt)))
        groups.append(group)
    return groups


def naive_groups(model: nn.Module, groups: list[list[Span]]) -> list[list[float]]:
    return [[naive(model, span) for span in group] for group in groups]


def assert_close(found: list[Any], expected: list[list[float]], atol: float = 2e-5) -> None:
    """Measured over 5 seeds and the four families: largest difference 1.2e-5 at sums up to 88 nats."""
    assert [scores.dtype for scores in found] == [np.dtype(np.float64)] * len(expected)
    for scores, naive_scores in zip(found, expected, strict=True):
        np.testing.assert_allclose(scores, naive_scores, rtol=1e-6, atol=atol)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: threads that wait for each other on a busy machine cost more than the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
def test_shared_prefix_equals_one_sequence_at_a_time(family: str, attention: str) -> None:
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    assert shares_prefix(model)
    groups = random_groups(seed=1)
    assert_close(score_groups(model, groups), naive_groups(model, groups))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "bloom", "lfm2", "qwen3_next", "mamba2"])
def test_models_without_a_plain_cache_are_run_whole(family: str) -> None:
    model = tiny_model(family)
    assert not shares_prefix(model)
    groups = random_groups(seed=2)
    assert_close(score_groups(model, groups), naive_groups(model, groups))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_any_batch_size_gives_the_same_scores(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family)
    groups = random_groups(seed=3)
    expected = naive_groups(model, groups)
    for max_batch_tokens in (1, 50, 300, 10**6):
        assert_close(score_groups(model, groups, max_batch_tokens=max_batch_tokens), expected)
    monkeypatch.setattr(batches, "_ENOUGH_TOKENS", 1)
    assert_close(score_groups(model, groups), expected)
    monkeypatch.setattr(spans_module, "_MAX_CACHE_BYTES", 1)
    monkeypatch.setattr(spans_module, "_MAX_LOGITS", 3 * VOCABULARY)
    monkeypatch.setattr(spans_module, "_CPU_SOFTMAX_LOGITS", 2 * VOCABULARY)
    assert_close(score_groups(model, groups), expected)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_batches_that_do_not_fit_are_run_in_halves(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a prefix cache (llama) and without one; memory for 70 tokens, more than any single question needs."""
    model, groups = tiny_model(family), random_groups(seed=3)
    many = groups + random_groups(seed=7) + random_groups(seed=8)
    expected = naive_groups(model, many)
    sizes: list[int] = []
    fitting = 70

    def short(_model: nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.register_forward_pre_hook(short, with_kwargs=True)
    assert_close(score_groups(model, many, max_batch_tokens=240), expected)
    assert max(sizes) > fitting
    assert sum(size > fitting for size in sizes) < 8 < len(sizes)  # later batches have as many parts as one has needed
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(told) == 1
    assert "Tried to allocate 2.00 GiB" in told[0]
    with monkeypatch.context() as patched:
        patched.setattr(batches, "FSDPModule", nn.Embedding)  # as if the base were divided among processes
        with pytest.raises(torch.OutOfMemoryError):
            score_groups(model, groups)
    fitting = 0  # not even a single one
    with pytest.raises(torch.OutOfMemoryError):
        score_groups(model, groups)


def test_float64_model_agrees_to_float32_softmax() -> None:
    model = tiny_model("llama").double()
    groups = random_groups(seed=4)
    assert_close(score_groups(model, groups), naive_groups(model, groups), atol=5e-6)


def test_bf16_differs_by_rounding_only() -> None:
    """Measured over five seeds of nine questions, nats per token: cached scores against the float32 model with the same
    weights 0.0062, one sequence at a time in bf16 against it 0.0073, the two bf16 scores against each other 0.0064."""
    model = tiny_model("llama", initializer_range=0.1).bfloat16()
    exact = tiny_model("llama", initializer_range=0.1)
    exact.load_state_dict(model.state_dict())
    for seed in range(2):
        groups = random_groups(seed, num_groups=5, longest=20)
        found = np.concatenate(score_groups(model, groups))
        flat = [span for group in groups for span in group]
        tokens = np.array([span.num_scored for span in flat])
        true = np.array([naive(exact, span) for span in flat])
        alone = np.array([naive(model, span) for span in flat])
        error, error_alone = np.abs(found - true) / tokens, np.abs(alone - true) / tokens
        assert error.max() <= 2 * error_alone.max()


def test_long_choices_and_a_choice_that_begins_another() -> None:
    model = tiny_model("llama")
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, VOCABULARY, 5).tolist()
    long = rng.integers(0, VOCABULARY, 90).tolist()
    group = [Span(tuple(prompt + long[:length]), 5) for length in (1, 2, 90)]
    groups = [group, group[:1], [group[2], group[2]]]
    assert_close(score_groups(model, groups), naive_groups(model, groups))


def test_first_tokens_that_differ_leave_no_prefix() -> None:
    group = [Span((1, 2, 3, 4), 1), Span((5, 2, 3), 1)]
    model = tiny_model("llama")
    groups = [group, [Span((1, 2, 3), 2), Span((1, 2, 4, 4), 2)]]
    assert_close(score_groups(model, groups), naive_groups(model, groups))


def test_prefix_tokens_are_fed_once() -> None:
    """Four choices of two tokens behind a prompt of 30: 30 positions and then 4, not 4 x 31."""
    model = tiny_model("llama")
    fed: list[tuple[int, ...]] = []
    logits: list[tuple[int, ...]] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, inputs, _o: fed.append(tuple(inputs[0].shape)))
    model.lm_head.register_forward_hook(lambda _m, _i, output: logits.append(tuple(output.shape)))
    prompt = list(range(30))
    score_groups(model, [[Span((*prompt, 40 + choice, 50), 30) for choice in range(4)]])
    assert fed == [(1, 30), (4, 1)]
    assert logits == [(1, 4, VOCABULARY), (1, 4, VOCABULARY)]


def test_single_token_choices_need_one_forward_pass() -> None:
    model = tiny_model("llama")
    calls: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    score_groups(model, [[Span((1, 2, 3, choice), 3) for choice in (7, 8)]])
    assert len(calls) == 1


def test_whole_spans_make_logits_of_scored_positions_only() -> None:
    model = tiny_model("llama")
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape)))
    score_spans(model, [Span(tuple(range(40)), 37)])
    assert shapes == [(1, 3, VOCABULARY)]


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "gemma2"])
def test_a_long_span_never_makes_more_logits_than_fit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans_module, "_MAX_LOGITS", 8 * VOCABULARY + 5)
    model = tiny_model(family)
    ids = tuple(np.random.default_rng(3).integers(0, VOCABULARY, 61).tolist())
    spans = [Span(ids, 1), Span(ids[:41], 30), Span(ids[:12], 5), Span(ids[:17], 1)]
    numbers: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _i, output: numbers.append(output[..., 0].numel()))
    scores = score_spans(model, spans)
    kept = list(numbers)
    assert_close([scores], [[naive(model, span) for span in spans]])
    # Gemma 2 has windows, so no cache that grows
    assert max(kept) == (60 if family == "gemma2" else 8)


def test_training_flags_and_gradients_come_back() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]

    def stop_while_scoring() -> None:
        with scoring(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_while_scoring()
    assert [module.training for module in model.modules()] == before
    score_groups(model, random_groups(seed=1, num_groups=2))
    assert [module.training for module in model.modules()] == before
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_adapted_model_between_two_training_steps(architecture: str) -> None:
    """DoRA on NF4: what scoring leaves behind in the layers must not enter, or break, the next backward pass."""
    model = tiny_adapted.adapted(architecture, quant="nf4").train()
    batch = torch.arange(1, 9)[None]

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    before = gradients()
    groups = random_groups(seed=6)
    found = score_groups(model, groups)
    after = gradients()
    assert len(before) > 10
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert_close(found, naive_groups(model.eval(), groups))


def test_progress_ends_at_all() -> None:
    for family in ("llama", "mistral"):
        seen: list[tuple[int, int]] = []
        score_groups(
            tiny_model(family),
            random_groups(seed=1),
            max_batch_tokens=60,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert len(seen) > 1
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1] >= 9


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    max_batch_tokens=st.integers(1, 200),
    seed=st.integers(0, 2**16),
)
def test_any_lengths(prompts: list[int], widths: list[int], max_batch_tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = []
    for length in prompts:
        prompt = rng.integers(0, VOCABULARY, length).tolist()
        groups.append([Span((*prompt, *rng.integers(0, VOCABULARY, width).tolist()), length) for width in widths])
    model = _shared_llama()
    assert_close(score_groups(model, groups, max_batch_tokens=max_batch_tokens), naive_groups(model, groups))


_LLAMA: list[Any] = []


def _shared_llama() -> Any:
    """One model for all hypothesis examples."""
    if not _LLAMA:
        _LLAMA.append(tiny_model("llama"))
    return _LLAMA[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_the_head_takes_a_flat_input_so_that_its_weight_is_read_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch makes one product of all rows only where the strides are those of a new tensor."""
    model = tiny_model(family)
    head = model.get_output_embeddings()
    forward, seen = head.forward, []

    def watched(hidden: Tensor) -> Tensor:
        seen.append((tuple(hidden.shape), hidden.stride()))
        return forward(hidden)

    monkeypatch.setattr(head, "forward", watched)
    spans = [Span(tuple(range(1, 12 + row)), 7) for row in range(4)]
    score_spans(model, spans)
    score_spans(model, spans[:1])
    score_groups(model, [[Span((*range(1, 9), 3 + choice, 5), 8) for choice in range(3)] for _ in range(2)])
    decode_greedily(model, [[1, 2, 3], [4, 5]], max_new_tokens=2, stop_ids=())
    assert any(positions > 1 for (_, positions, _), _ in seen)
    assert any(rows > 1 for (rows, _, _), _ in seen)
    assert all(strides == (shape[1] * shape[2], shape[2], 1) for shape, strides in seen), seen
    assert not head._forward_pre_hooks
