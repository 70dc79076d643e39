"""qdora eval --data and qdora generate: own data scored as the run's, and the same tokens as a plain loop."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import GenerationConfig

from qdora.adapter import layer as layer_module
from qdora.adapter import product as products_of_layers
from qdora.data.sources import given_source, trained_on
from qdora.evaluate.perplexity import text_perplexity
from qdora.evaluate.spans import Span, score_spans
from qdora.export.export import export_run
from qdora.export.verify import compare_logits
from qdora.files.run_directory import open_run
from qdora.model.inject import adapted_layers
from qdora.quant import kernels
from qdora.recipe.data_settings import SourceConfig
from qdora.recipe.options import EvalOptions, ExportOptions, GenerateOptions, Sampling
from qdora.run.load_run import load_target
from qdora.run.report import run_facts
from qdora.run.run import train_run
from qdora.run.verbs import evaluate_target, generate_from, prompt_ids, read_chats
from tests import support
from tests.data_rows import fault_of, faults_of, says, write

QUIET = Console(quiet=True)


def scores(target: Any, **options: Any) -> dict[str, Any]:
    found = evaluate_target(str(target), EvalOptions(**options), console=QUIET)
    return {**found["evaluation"]["tasks"]}


def products(first: int) -> list[dict[str, Any]]:
    return [{"ask": f"{first} x {other} =", "reply": f" {first * other}"} for other in range(2, 8)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one source with columns of its own, whose validation data is held.jsonl."""
    root = tmp_path_factory.mktemp("own")
    source = {
        "source": str(write(root / "mine/products.jsonl", products(3))),
        "columns": {"prompt": "ask", "completion": "reply"},
        "validation": str(write(root / "mine/held.jsonl", products(4))),
        "name": "times",
    }
    changes: dict[str, Any] = {"data__mix": [source], "train__steps": 2, "train__checkpoint_every": ...}
    train_run(support.one_layer_recipe(root, **changes), root / "run", console=QUIET)
    return root / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    support.write_llama(root / "model", intermediate_size=128)
    train_run(support.tiny_recipe(root, train__steps=2, train__lr=0.002), root / "run", console=QUIET)
    return root / "run"


def test_a_file_is_scored_as_the_validation_data_of_the_source_and_stands_on_the_page(own: Path) -> None:
    held = own.parent / "mine/held.jsonl"
    at_end = json.loads((own / "eval/step-2.json").read_text())
    assert scores(own, data=str(held)) == {"held": at_end["tasks"]["times"]}
    assert at_end["tasks"]["times"]["num_examples"] == 4  # eval.limit of the run
    (kept,) = (own / "eval").glob("final-data-held.jsonl-*.json")
    document = json.loads(kept.read_text())
    assert (document["data"], document["step"], document.get("split")) == (str(held), 2, None)
    assert [each["nll"] for each in document["per_example"]] == [each["nll"] for each in at_end["per_example"]]
    scores(own, data=str(held), base=True)
    (compared,) = (each for each in run_facts(open_run(own))["evaluations"] if "data-held" in each["data"])
    assert compared["nll_per_token"][0]["num_examples"] == 4
    assert compared["data"] == kept.stem.removeprefix("final-")
    # a model without a run scores it, too, read by its columns or like the run's source
    rows = [{"prompt": row["ask"], "completion": row["reply"]} for row in products(5)]
    file, model = write(own.parent / "mine/plain.jsonl", rows), str(own.parent / "model")
    (result,) = scores(model, data=file).values()
    assert result["num_examples"] == 6
    like = evaluate_target(model, EvalOptions(data=str(held), like=own), console=QUIET)
    assert like["evaluation"]["tasks"].keys() == {"held"}


def test_of_several_sources_tasks_names_the_one_that_it_is_read_like(run: Path) -> None:
    """Without it the format is that of the columns."""
    rows = [json.loads(line) for line in (run.parent / "data/letters.jsonl").read_text().splitlines()[:3]]
    found = scores(run, data=write(run.parent / "more/test.jsonl", rows))["test"]
    assert (found["num_examples"], found["chance"]) == (3, 0.5)
    mix = [
        SourceConfig.model_validate({"source": "a.jsonl", "template": {"prompt": "", "completion": "{{ text }}"}}),
        SourceConfig.model_validate({"source": "org/b", "config": "main", "columns": {"text": "body"}}),
    ]
    assert given_source("/x/new.csv", mix).columns is None
    assert given_source("/x/new.csv", mix, "a").template == mix[0].template
    like_b = given_source("/x/new.csv", mix, "b")
    assert (like_b.columns, like_b.config, like_b.label) == ({"text": "body"}, None, "new")
    assert given_source("org/b", mix).config == "main"  # the same data set
    assert given_source("org/c", mix[:1]).template == mix[0].template  # the only source
    assert given_source("/x/new.csv", [SourceConfig(task="boolq")]).task is None


def test_a_source_of_the_same_file_gives_its_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where that is not clear there is a warning."""
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(5)]
    a, held = write(tmp_path / "a.jsonl", rows[:2]), write(tmp_path / "held.jsonl", rows[2:4])
    new = write(tmp_path / "new.jsonl", rows[4:])
    chat = SourceConfig.model_validate({"source": a, "validation": held, "chat": True})
    other = SourceConfig.model_validate({"source": str(tmp_path / "b.jsonl"), "name": "other"})
    assert all(given_source(place, [chat, other]).chat for place in (a, held))
    assert not given_source(new, [other, other]).chat
    assert caplog.messages == []
    assert not given_source(new, [chat, other]).chat
    assert says("\n".join(caplog.messages), f"{new} is read by its columns alone ... --tasks.")


def test_splits_and_patterns(own: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Path(write(tmp_path / "own/test.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}]))
    assert scores(run, data=str(tmp_path / "own"), split="test")["own"]["num_examples"] == 1
    assert list((run / "eval").glob("final-test-data-own-*.json"))
    write(tmp_path / "a[1]/held.jsonl", products(4))
    monkeypatch.chdir(tmp_path / "a[1]")
    assert [each["num_examples"] for each in scores(own, data="h*.jsonl", limit=2).values()] == [2]
    for ignored, options in (
        ("--split", {"split": "test", "data": str(file)}),
        ("--limit", {"limit": 1, "text": (file,)}),
        ("--method", {"method": "generate", "text": (file,)}),
    ):
        assert fault_of(scores, run, **options).startswith(f"{ignored}: has no effect")


def test_a_training_file_is_told(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.symlink_to(own.parent / "mine/products.jsonl")
    with caplog.at_level(logging.WARNING, "qdora"):
        scores(own, data=str(copy), base=True)
        scores(own, data=str(own.parent / "mine/held.jsonl"))
        assert caplog.messages == []
        scores(own, data=str(copy))
    (warning,) = caplog.messages
    assert f"The run was trained on {copy} (source times)." in warning
    hub = SourceConfig.model_validate({"source": "org/b", "config": "main", "validation": "test"})
    assert (trained_on(hub, "train", [hub]), trained_on(hub, "test", [hub])) == (["b"], [])


def test_what_does_not_fit(run: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "test.jsonl", [{"body": "a", "title": "b"}])
    for options, words in (
        ({"data": f"{tmp_path}/tset.jsonl"}, "tset.jsonl: no such file."),
        ({"data": data}, "fit no format"),
        ({"data": str(tmp_path)}, "no file for split 'validation'"),
        (
            {"data": data, "tasks": ["sums", "letters"]},
            "--tasks: with --data ... got 'sums, letters', ... sums, letters.",
        ),
        ({"data": data, "tasks": ["sum"]}, "--tasks: ... got 'sum', ... sums, letters."),
        ({"split": "test"}, "--split: sums has no test split. Fix: name data with --data"),
    ):
        assert says("\n".join(faults_of(scores, run, **options)), words), words
    bare = shutil.copytree(run, tmp_path / "run")
    recipe = yaml.safe_load((bare / "recipe.yaml").read_text())
    recipe["data"]["validation_fraction"] = 0
    (bare / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert says(fault_of(scores, bare), "--split: the run has no validation examples. Fix: ... --data")


PROMPT = "3 + 4 ="


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    export_run(run, run.parent / "merged", ExportOptions(dtype="float32"), console=QUIET)
    return run.parent / "merged"


def answer(target: Path, prompt: str = PROMPT, *, raw: bool = True, **sampling: Any) -> dict[str, Any]:
    options = GenerateOptions(prompt=prompt, raw=raw)
    return generate_from(str(target), options, Sampling(**{"max_new_tokens": 12} | sampling))


@torch.no_grad()
def plain_loop(run: Path, ids: list[int], num: int) -> str:
    """The most likely token again and again, the whole text anew each time."""
    loaded = load_target(str(run), verb="test")
    ids, start = list(ids), len(ids)
    while len(ids) - start < num:
        ids.append(int(loaded.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == loaded.tokenizer.eos_token_id:
            break
    return str(loaded.tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_the_most_likely_tokens_are_streamed(run: Path) -> None:
    ids, stream = load_target(str(run), verb="test").tokenizer(PROMPT)["input_ids"], io.StringIO()
    options = GenerateOptions(prompt=PROMPT, raw=True)
    found = generate_from(str(run), options, Sampling(max_new_tokens=12), write=stream.write)
    assert found["text"] == plain_loop(run, ids, 12)
    assert stream.getvalue().strip() == found["text"].strip()
    assert (found["num_new_tokens"], found["num_prompt_tokens"], found["label"]) == (12, len(ids), "final")


def test_only_text_is_written_by_the_fused_product(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose scores would else depend on how many tokens a batch has."""
    product, calls = kernels.product_4bit, list[int]()

    def counted(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(len(x))
        return product(x, *args, **options)

    monkeypatch.setattr(products_of_layers, "device_kind", lambda _device: "cuda")
    monkeypatch.setattr(kernels, "has_product", lambda _kind: True)
    monkeypatch.setattr(kernels, "product_4bit", counted)
    loaded = load_target(str(run), verb="test")
    score_spans(loaded.model, [Span((1, 2, 3, 4), 1)])
    text_perplexity(loaded.model, loaded.tokenizer, ["3 + 4 = 7"])
    compare_logits(loaded.model, loaded.model, [[1, 2, 3, 4]])
    assert calls == []
    answer(run)
    assert 1 in calls


def test_prompts_get_the_chat_template_where_there_is_one() -> None:
    tokenizer: Any = support.tokenizer()
    text = tokenizer.decode(prompt_ids(tokenizer, "a question", "be kind", raw=False))
    assert 0 <= text.index("be kind") < text.index("a question") < text.index("assistant")
    raw = tokenizer("a question")["input_ids"]
    assert prompt_ids(tokenizer, "a question", None, raw=True) == raw
    tokenizer.chat_template = None
    assert prompt_ids(tokenizer, "a question", None, raw=False) == raw
    assert says(fault_of(prompt_ids, tokenizer, "a question", "be kind", raw=False), "no chat template")
    tokenizer = support.tokenizer(bos=True, adds_eos=True)  # the beginning once, and no end
    ids = [tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False)["input_ids"]]
    assert [prompt_ids(tokenizer, text, None, raw=True) for text in ("the cat", "<s>the cat")] == [ids, ids]


def test_draws_follow_the_seed(run: Path) -> None:
    def text(**settings: Any) -> str:
        return str(answer(run, temperature=1.0, max_new_tokens=6, **settings)["text"])

    state = torch.random.get_rng_state()
    first, greedy = text(seed=1), answer(run, max_new_tokens=6)["text"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert text(seed=1) == first != text(seed=2)
    assert text(seed=1, top_k=1) == text(seed=1, top_p=1e-6) == greedy


@pytest.mark.parametrize("exported", [False, True])
def test_no_scales_without_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: bool) -> None:
    """Also those of a run whose budget, not its recipe, turned them off. An export says what the run says."""
    target, options = run, {"limit": 4}
    if exported:
        target, options = tmp_path / "out", {"limit": 4, "like": run}
        export_run(run, target, ExportOptions(format="nf4-lora"), console=QUIET)
        letters = "Which letter follows c?"
        found, expected = (answer(each, letters, raw=False) for each in (target, run))
        assert (found["text"], found["label"]) == (expected["text"], "out")
    expected = scores(target, **options)
    for task, of_run in scores(run, limit=4).items():
        assert expected[task]["nll_per_token"] == pytest.approx(of_run["nll_per_token"], rel=0.03)
    monkeypatch.setattr(layer_module, "_free_bytes", lambda _device: 0)
    layers = adapted_layers(load_target(str(target), verb="eval").model).values()
    assert [layer.keeps_scales for layer in layers] == [False] * 14
    assert scores(target, **options) == expected


def test_a_merged_model_answers_alike(run: Path, merged: Path, tmp_path: Path) -> None:
    """With its penalties a token that was there is never the next one. The answer stops where the context is full,
    while transformers itself goes on past the positions that the model was trained for."""
    target = Path(shutil.copytree(merged, tmp_path / "out"))
    config = GenerationConfig(repetition_penalty=50.0, no_repeat_ngram_size=1, eos_token_id=399)
    config.save_pretrained(target)
    full, found = answer(run), answer(target)
    assert (found["text"], found["label"]) == (full["text"], "out")
    assert (full["num_new_tokens"], full["stopped"]) == (12, "length")
    assert load_target(str(target), verb="test").model.generation_config.repetition_penalty == 50.0, "it was read"
    file = target / "config.json"
    positions = {"max_position_embeddings": full["num_prompt_tokens"] + 5}
    file.write_text(json.dumps(json.loads(file.read_text()) | positions))
    found = answer(target)
    assert (found["num_new_tokens"], found["stopped"]) == (5, "context")
    assert full["text"].startswith(found["text"])
    assert answer(target, max_new_tokens=5)["stopped"] == "length"
    positions = {"max_position_embeddings": full["num_prompt_tokens"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | positions))
    num = full["num_prompt_tokens"]
    assert says(fault_of(answer, target), f"--prompt: got {num} tokens, must be fewer than {num}, the context")


def test_settings_that_cannot_be_used_are_refused_before_loading() -> None:
    wrong = faults_of(Sampling, temperature=-1, top_p=0.0, top_k=0, max_new_tokens=0)
    assert {fault.split(":")[0] for fault in wrong} == {"--temperature", "--top-p", "--top-k", "--max-new-tokens"}
    assert fault_of(GenerateOptions, prompt="").startswith("--prompt: ")
    assert fault_of(GenerateOptions, prompt="a", raw=True, system="x").startswith("--system: ")
    asked: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.5}, {"temperature": 101}]
    assert [len(faults_of(Sampling, **each)) for each in asked] == [1, 1, 1]
    Sampling(temperature=100, top_p=1.0, top_k=1, max_new_tokens=1)


def test_each_conversation_of_a_file_is_answered_as_its_prompt_is(run: Path, tmp_path: Path) -> None:
    several = [("system", "be kind"), ("user", "a question"), ("assistant", "yes"), ("user", "?")]
    turns = [[{"role": role, "content": text} for role, text in chat] for chat in ([("user", PROMPT)], several)]
    rows: list[dict[str, Any]] = [{"messages": chat} for chat in turns]
    file, stream = write(tmp_path / "chats.jsonl", rows), io.StringIO()
    options = GenerateOptions(chats=file)
    found = generate_from(str(run), options, Sampling(max_new_tokens=12), write=stream.write)["answers"]
    alone = answer(run, raw=False)
    assert all(found[0][key] == alone[key] for key in ("text", "num_prompt_tokens"))
    tokenizer = load_target(str(run), verb="test").tokenizer
    whole = tokenizer.apply_chat_template(rows[1]["messages"], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert found[1]["num_prompt_tokens"] == len(ids)
    assert found[1]["text"].strip() == plain_loop(run, ids, 12).strip()
    heads = [line for line in stream.getvalue().splitlines() if line.startswith("---")]
    assert heads == [f"--- {file}: line {number}" for number in (1, 2)]


def test_sharegpt_rows_are_asked_as_messages_are_and_others_are_named_before_loading(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    said = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Why?"}]
    rows: list[dict[str, Any]] = [
        {"messages": messages},
        {"conversations": said},
        {"conversations": said[1:], "system": "Be kind."},
        {"conversations": json.dumps(said)},
    ]
    file = Path(write(tmp_path / "chats.jsonl", [row | {"tools": [{"name": "f"}]} for row in rows]))
    first, *others = [(chat, tools) for _, chat, tools in read_chats(file)]
    assert others == [first] * 3
    assert ([turn.role for turn in first[0]], len(first[1])) == (["system", "user"], 1)
    write(file, [{"messages": [*messages, {"role": "assistant", "content": "b"}]}, {"text": "a"}])
    answered, bare = faults_of(generate_from, "nowhere", GenerateOptions(chats=str(file)))
    assert answered.startswith(f"{file}: line 1: messages: the last turn is")
    assert bare.startswith(f"{file}: line 2: KeyError: ")
