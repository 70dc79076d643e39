"""qdora generate: the same tokens as a plain loop, streamed; chat template, sampling, every kind of target."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from qdora.errors import UserError
from qdora.evaluation.perplexity import text_perplexity
from qdora.evaluation.token_scores import Span, score_spans
from qdora.export.export_run import export_run
from qdora.export.logit_comparison import compare_logits
from qdora.export.options import ExportOptions
from qdora.model.inject import adapted_layers
from qdora.nn import adapted_linear
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.ops import bnb_kernels, frozen_product
from qdora.run import generate
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.generate import Sampling, answer_chats, generate_from, prompt_ids
from qdora.run.load_run import load_target
from qdora.run.run_page import page_of_run
from qdora.run.train import train_run
from tests import tiny_adapted, tiny_run, tiny_tokenizer

SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    torch.manual_seed(0)
    sizes = tiny_adapted.SIZES | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 400}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(root / "model")
    tiny_tokenizer.make().save_pretrained(root / "model")
    train_run(tiny_run.recipe(root, train__steps=2, train__lr=0.002), root / "run")
    return root / "run"


@torch.no_grad()
def plain_loop(run: Path, ids: list[int], num: int) -> list[int]:
    """The most likely token again and again, the whole text anew each time."""
    loaded = load_target(str(run), verb="test")
    ids = list(ids)
    start = len(ids)
    while len(ids) - start < num:
        ids.append(int(loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == loaded.tokenizer.eos_token_id:
            break
    return ids[start:]


def test_the_most_likely_tokens_are_streamed(run: Path) -> None:
    stream = io.StringIO()
    found = generate_from(str(run), "3 + 4 =", SHORT, raw=True, write=stream.write)
    tokenizer = load_target(str(run), verb="test").tokenizer
    expected = plain_loop(run, tokenizer("3 + 4 =")["input_ids"], 12)
    assert found["num_new_tokens"] == len(expected) == 12
    assert found["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert stream.getvalue().strip() == found["text"].strip()
    assert found["label"] == "final"
    assert found["num_prompt_tokens"] == len(tokenizer("3 + 4 =")["input_ids"])


def test_only_text_is_written_by_the_fused_product(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose scores would else depend on how many tokens a batch has."""
    product, calls = bnb_kernels.product_4bit, list[int]()

    def counted(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(len(x))
        return product(x, *args, **options)

    monkeypatch.setattr(frozen_product, "device_kind", lambda _device: "cuda")
    monkeypatch.setattr(bnb_kernels, "has_product", lambda _kind: True)
    monkeypatch.setattr(bnb_kernels, "product_4bit", counted)
    loaded = load_target(str(run), verb="test")
    score_spans(loaded.model, [Span((1, 2, 3, 4), 1)], max_batch_tokens=64)
    text_perplexity(loaded.model, loaded.tokenizer, ["3 + 4 = 7"], window=16, stride=8)
    compare_logits(loaded.model, loaded.model, [[1, 2, 3, 4]])
    assert calls == []
    generate_from(str(run), "3 + 4 =", SHORT, raw=True)
    assert 1 in calls


def test_the_chat_template_is_used_where_there_is_one(run: Path) -> None:
    tokenizer: Any = tiny_tokenizer.make()
    text = tokenizer.decode(prompt_ids(tokenizer, "a question", "be kind", raw=False))
    for part in ("be kind", "a question", "assistant"):
        assert part in text
    assert text.index("be kind") < text.index("a question") < text.index("assistant")
    raw = tokenizer("a question")["input_ids"]
    assert prompt_ids(tokenizer, "a question", None, raw=True) == raw
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, "a question", None, raw=False) == raw
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(tokenizer, "a question", "be kind", raw=False)


def test_penalties_of_the_models_generation_config_are_not_used(run: Path, tmp_path: Path) -> None:
    """With them a token that was there is never the next one."""
    directory = tmp_path / "out"
    export_run(run, directory, ExportOptions(dtype="float32"))
    config = GenerationConfig(repetition_penalty=50.0, no_repeat_ngram_size=1, eos_token_id=399)
    config.save_pretrained(directory)
    expected = generate_from(str(run), "3 + 4 =", SHORT, raw=True)
    found = generate_from(str(directory), "3 + 4 =", SHORT, raw=True)
    assert found["text"] == expected["text"]
    loaded = load_target(str(directory), verb="test")
    assert loaded.model.generation_config.repetition_penalty == 50.0, "the config was not read"


def test_draws_follow_the_seed(run: Path) -> None:
    def text(**settings: Any) -> str:
        sampling = Sampling(max_new_tokens=12, temperature=1.0, **settings)
        return str(generate_from(str(run), "3 + 4 =", sampling, raw=True)["text"])

    state = torch.random.get_rng_state()
    first = text(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert text(seed=1) == first
    assert text(seed=2) != first
    greedy = generate_from(str(run), "3 + 4 =", SHORT, raw=True)["text"]
    assert text(seed=1, top_k=1) == greedy
    assert text(seed=1, top_p=1e-6) == greedy


def test_the_norm_is_computed_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = AdaptedLinear._norm

    def counting(self: AdaptedLinear, *given: Any) -> torch.Tensor:
        calls.append(self)
        return real(self, *given)

    monkeypatch.setattr(AdaptedLinear, "_norm", counting)
    found = generate_from(str(run), "3 + 4 =", SHORT, raw=True)
    assert found["num_new_tokens"] > 1
    assert len(calls) == len(set(map(id, calls))) == 14
    assert all(layer.keeps_scales for layer in calls)


def test_a_run_that_kept_no_scales_generates_without_them(run: Path, tmp_path: Path) -> None:
    """Its plan counts none."""
    copy = shutil.copytree(run, tmp_path / "run")
    recipe = (copy / "recipe.yaml").read_text()
    assert "keep_scales: true" in recipe
    (copy / "recipe.yaml").write_text(recipe.replace("keep_scales: true", "keep_scales: false"))
    for where, expected in ((run, True), (copy, False)):
        layers = adapted_layers(generate.load_target(str(where), verb="generate").model).values()
        assert [layer.keeps_scales for layer in layers] == [expected] * 14
    found = [generate_from(str(where), "3 + 4 =", SHORT, raw=True)["text"] for where in (run, copy)]
    assert found[0] == found[1]


@pytest.mark.parametrize("exported", [False, True])
def test_no_scales_are_kept_where_a_gpu_has_no_room(run, tmp_path, monkeypatch, exported):
    """Also those of a run whose budget, not its recipe, turned them off."""
    if exported:
        target = tmp_path / "out"
        export_run(run, target, ExportOptions(format_="nf4-lora"))
    else:
        target = run
    options = EvalOptions(limit=4, like=run if exported else None)
    expected = evaluate_target(str(target), options)["evaluation"]["tasks"]
    monkeypatch.setattr(adapted_linear, "_free_bytes", lambda _device: 0)
    layers = adapted_layers(load_target(str(target), verb="eval").model).values()
    assert [layer.keeps_scales for layer in layers] == [False] * 14
    assert evaluate_target(str(target), options)["evaluation"]["tasks"] == expected


@pytest.mark.parametrize("options", [ExportOptions(dtype="float32"), ExportOptions(format_="nf4-lora")])
def test_an_export_says_what_the_run_says(run: Path, tmp_path: Path, options: ExportOptions) -> None:
    export_run(run, tmp_path / "out", options)
    expected = generate_from(str(run), "Which letter follows c?", SHORT)
    found = generate_from(str(tmp_path / "out"), "Which letter follows c?", SHORT)
    assert found["text"] == expected["text"]
    assert found["label"] == "out"
    evaluated = evaluate_target(str(tmp_path / "out"), EvalOptions(like=run))["evaluation"]["average"]
    of_run = evaluate_target(str(run))["evaluation"]["average"]
    assert evaluated["nll_per_token"] == pytest.approx(of_run["nll_per_token"], rel=0.02)


def test_settings_that_cannot_be_used_are_refused_before_loading() -> None:
    with pytest.raises(UserError) as raised:
        generate_from(
            "nowhere", "", Sampling(temperature=-1, top_p=0.0, top_k=0, max_new_tokens=0), raw=True, system="x"
        )
    assert [fault.split(":")[0] for fault in raised.value.faults] == [
        "--temperature",
        "--top-p",
        "--top-k",
        "--max-new-tokens",
        "--prompt",
        "--system",
    ]
    with pytest.raises(UserError, match="--top-k: have no effect at temperature 0"):
        generate_from("nowhere", "x", Sampling(top_k=3))
    with pytest.raises(UserError, match="nowhere"):
        generate_from("./nowhere", "x")


def test_a_raw_prompt_gets_the_beginning_of_sequence_once_and_no_end() -> None:
    tokenizer = tiny_tokenizer.make(bos=True, adds_eos=True)
    ids = [tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False)["input_ids"]]
    assert [prompt_ids(tokenizer, text, None, raw=True) for text in ("the cat", "<s>the cat")] == [ids, ids]


def test_the_answer_stops_where_the_context_is_full(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """transformers itself goes on past the positions that the model was trained for."""
    directory = tmp_path / "out"
    export_run(run, directory, ExportOptions(dtype="float32"))
    config = directory / "config.json"
    num_prompt = len(load_target(str(run), verb="test").tokenizer("3 + 4 =")["input_ids"])
    short = json.loads(config.read_text()) | {"max_position_embeddings": num_prompt + 5}
    config.write_text(json.dumps(short))
    with caplog.at_level("WARNING", "qdora"):
        found = generate_from(str(directory), "3 + 4 =", SHORT, raw=True)
    assert (found["num_new_tokens"], found["stopped"]) == (5, "context")
    assert f"ends after 5 tokens: with the prompt of {num_prompt} it fills" in caplog.text
    full = generate_from(str(run), "3 + 4 =", SHORT, raw=True)
    assert (full["num_new_tokens"], full["stopped"]) == (12, "length")
    assert full["text"].startswith(found["text"])
    fits = generate_from(str(directory), "3 + 4 =", Sampling(max_new_tokens=5), raw=True)
    assert fits["stopped"] == "length"


def test_each_conversation_of_a_file_is_answered_as_its_prompt_is(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    turns = [
        [("user", "3 + 4 =")],
        [("system", "be kind"), ("user", "a question"), ("assistant", "yes"), ("user", "?")],
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = io.StringIO()
    found = answer_chats(str(run), str(file), SHORT, write=stream.write)
    alone = generate_from(str(run), "3 + 4 =", SHORT)
    assert found["answers"][0]["text"] == alone["text"]
    assert found["answers"][0]["num_prompt_tokens"] == alone["num_prompt_tokens"]
    tokenizer = load_target(str(run), verb="test").tokenizer
    whole = tokenizer.apply_chat_template(rows[1]["messages"], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    expected = plain_loop(run, ids, 12)
    assert found["answers"][1]["num_prompt_tokens"] == len(ids)
    assert found["answers"][1]["text"].strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert [line for line in stream.getvalue().splitlines() if line.startswith("---")] == [
        f"--- {file}: line 1",
        f"--- {file}: line 2",
    ]


def test_sharegpt_rows_are_asked_as_messages_are(tmp_path: Path) -> None:
    turns = [("system", "system", "Be kind."), ("user", "human", "Why?")]
    messages = [{"role": role, "content": text} for role, _, text in turns]
    conversations = [{"from": speaker, "value": text} for _, speaker, text in turns]
    file = tmp_path / "chats.jsonl"
    rows: list[dict[str, Any]] = [
        {"messages": messages},
        {"conversations": conversations},
        {"conversations": conversations[1:], "system": "Be kind."},
        {"conversations": json.dumps(conversations)},
    ]
    file.write_text("\n".join(json.dumps(row | {"tools": [{"name": "f"}]}) for row in rows))
    first, *others = [(chat, tools) for _, chat, tools in generate._read_chats(file)]
    assert others == [first] * 3
    assert ([turn.role for turn in first[0]], len(first[1])) == (["system", "user"], 1)


def test_a_run_without_chats_advises_raw_prompts(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert json.loads((run / "environment.json").read_text())["has_chats"] is False
    commands = [each["command"] for each in page_of_run(run, console=Console(quiet=True))["next"]]
    assert f"qdora generate {run} --raw --prompt '...'" in commands
    of_chats = shutil.copytree(run, tmp_path / "run")
    (of_chats / "environment.json").write_text('{"resumed": [{"has_chats": true}], "has_chats": false}')
    with caplog.at_level("INFO", logger="qdora"):
        for path, raw, advises in ((run, False, True), (run, True, False), (of_chats, False, False)):
            caplog.clear()
            generate_from(str(path), "3 + 4 =", Sampling(max_new_tokens=1), raw=raw)
            assert ("The run has trained no chats" in caplog.text) == advises


def test_conversations_that_cannot_be_answered_are_named_before_loading(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    answered = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file.write_text("\n".join(json.dumps(row) for row in (answered, {"text": "a"})))
    with pytest.raises(UserError) as raised:
        answer_chats("nowhere", str(file))
    first, second = raised.value.faults
    assert first == f"{file}: line 1: messages: the last turn is the assistant's, so there is nothing to answer"
    assert second.startswith(f"{file}: line 2: messages: must be a list of turns")
