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
from rich.console import Console
from transformers import GenerationConfig

from qdora.adapter import adapted_linear, frozen_product
from qdora.adapter.adapted_linear import AdaptedLinear
from qdora.data.given_data import given_source, trained_on
from qdora.errors import UserError
from qdora.evaluate.perplexity import text_perplexity
from qdora.evaluate.token_scores import Span, score_spans
from qdora.export.export_run import export_run
from qdora.export.logit_comparison import compare_logits
from qdora.export.options import ExportOptions
from qdora.files.run_directory import open_run
from qdora.model.inject import adapted_layers
from qdora.quant import bnb_kernels
from qdora.recipe.data_settings import SourceConfig
from qdora.run import generate
from qdora.run.evaluate import EvalOptions, evaluate_target
from qdora.run.generate import Sampling, answer_chats, generate_from, prompt_ids
from qdora.run.load_run import load_target
from qdora.run.run import train_run
from qdora.run.run_page import page_of_run, run_facts
from tests import support

QUIET = Console(quiet=True)


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def scores(target: Any, **options: Any) -> dict[str, Any]:
    found = evaluate_target(str(target), EvalOptions(**options), console=QUIET)
    return {**found["evaluation"]["tasks"]}


# --- own data


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
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two sources."""
    root = tmp_path_factory.mktemp("two")
    recipe = support.one_layer_recipe(root, train__steps=1, train__checkpoint_every=...)
    train_run(recipe, root / "run", console=QUIET)
    return root / "run"


def test_a_file_is_scored_as_the_validation_data_of_the_source_and_stands_on_the_page(own: Path) -> None:
    held = own.parent / "mine/held.jsonl"
    at_end = json.loads((own / "eval/step-2.json").read_text())
    found = scores(own, data=str(held))
    assert found == {"held": at_end["tasks"]["times"]}
    assert found["held"]["num_examples"] == 4  # eval.limit of the run
    (kept,) = (own / "eval").glob("final-data-held.jsonl-*.json")
    document = json.loads(kept.read_text())
    assert (document["data"], document["step"], document.get("split")) == (str(held), 2, None)
    assert [each["nll"] for each in document["per_example"]] == [each["nll"] for each in at_end["per_example"]]
    scores(own, data=str(held), base_only=True)
    (compared,) = (each for each in run_facts(open_run(own))["evaluations"] if "data-held" in each["data"])
    assert compared["nll_per_token"][0]["num_examples"] == 4
    assert compared["data"] == kept.stem.removeprefix("final-")


def test_a_model_without_a_run_scores_it_too(own: Path) -> None:
    rows = [{"prompt": row["ask"], "completion": row["reply"]} for row in products(5)]
    file, model = write(own.parent / "mine/plain.jsonl", rows), str(own.parent / "model")
    (result,) = scores(model, data=str(file)).values()
    assert result["num_examples"] == 6
    like = evaluate_target(model, EvalOptions(data=str(own.parent / "mine/held.jsonl"), like=own), console=QUIET)
    assert like["evaluation"]["tasks"].keys() == {"held"}  # read like the run's source
    assert like["beside"] == {}


def test_of_several_sources_tasks_names_the_one_that_it_is_read_like(of_two: Path) -> None:
    """Without it the format is that of the columns."""
    rows = [json.loads(line) for line in (of_two.parent / "data/letters.jsonl").read_text().splitlines()[:3]]
    found = scores(of_two, data=str(write(of_two.parent / "more/test.jsonl", rows)))["test"]
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


def test_a_source_of_the_same_content_gives_its_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """So does any where all are read the same way; where that is not clear, a warning names what can be meant."""
    rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}"} for number in range(5)]
    a, held = write(tmp_path / "a.jsonl", rows[:2]), write(tmp_path / "held.jsonl", rows[2:4])
    copies = [write(tmp_path / f"copies/{name}.jsonl", part) for name, part in (("x", rows[:2]), ("y", rows[2:4]))]
    new = str(write(tmp_path / "new.jsonl", rows[4:]))
    chat = SourceConfig.model_validate({"source": str(a), "validation": str(held), "chat": True})
    other = SourceConfig.model_validate({"source": str(tmp_path / "b.jsonl"), "name": "other"})
    assert all(given_source(str(place), [chat, other]).chat for place in (a, held, *copies))
    assert given_source(new, [chat, other.model_copy(update={"chat": True})]).chat
    assert not given_source(new, [other, other]).chat
    assert caplog.messages == []
    assert not given_source(new, [chat, other]).chat
    (warning,) = caplog.messages
    assert warning.startswith(f"{new} is read by the names of its columns alone")
    assert warning.endswith("--tasks: a.")


def test_splits_and_patterns(own: Path, of_two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "own/test.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}])
    assert scores(of_two, data=str(tmp_path / "own"), split="test")["own"]["num_examples"] == 1
    assert list((of_two / "eval").glob("final-test-data-own-*.json"))
    with pytest.raises(UserError, match=r"own: no file for split 'validation'.*there are test"):
        scores(of_two, data=str(tmp_path / "own"))
    write(tmp_path / "a[1]/held.jsonl", products(4))
    monkeypatch.chdir(tmp_path / "a[1]")
    assert [each["num_examples"] for each in scores(own, data="h*.jsonl", limit=2).values()] == [2]


def test_a_copy_of_a_training_file_is_told(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = write(tmp_path / "copy.jsonl", products(3))
    with caplog.at_level(logging.WARNING, "qdora"):
        scores(own, data=str(copy), base_only=True)
        scores(own, data=str(own.parent / "mine/held.jsonl"))
        assert caplog.messages == []
        scores(own, data=str(copy))
    (warning,) = caplog.messages
    assert f"The run was trained on {copy} (source times)." in warning
    hub = SourceConfig.model_validate({"source": "org/b", "config": "main", "validation": "test"})
    assert (trained_on(hub, "train", [hub]), trained_on(hub, "test", [hub])) == (["b"], [])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "{tmp}/tset.jsonl"}, "tset.jsonl: no such file. Did you mean 'test.jsonl'"),
        ({"data": "{tmp}/test.jsonl"}, "fit no format"),
        ({"data": "{tmp}/test.jsonl", "split": "test"}, "--split: .*test.jsonl has no splits"),
        ({"data": "{tmp}/test.jsonl", "tasks": ["sums", "letters"]}, "--tasks: with --data names one .*sums.*letters"),
        ({"data": "{tmp}/test.jsonl", "tasks": ["sum"]}, "--tasks: got 'sum', .*: sums, letters. Did you mean 'sums'"),
        ({"data": "{tmp}/test.jsonl", "tasks": ["piqa"]}, "--data: must be a folder .* with --tasks piqa"),
        ({"data": "{tmp}/tasks"}, "--data: .*a folder for each task. Fix: add --tasks with one of piqa"),
        ({"split": "test"}, "--split: sums has no test split, .* Fix: name a file with --data"),
    ],
)
def test_what_does_not_fit(of_two: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write(tmp_path / "test.jsonl", [{"body": "a", "title": "b"}])
    (tmp_path / "tasks/piqa").mkdir(parents=True)
    own = {"data": options["data"].format(tmp=tmp_path)} if "data" in options else {}
    with pytest.raises(UserError, match=message):
        scores(of_two, **options | own)


def test_without_validation_data_other_data_is_named_in_the_fix(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"data__validation_fraction": 0, "eval__limit": ..., "train__checkpoint_every": ...}
    train_run(support.one_layer_recipe(tmp_path, train__steps=1, **changes), tmp_path / "run", console=QUIET)
    with pytest.raises(UserError, match=r"--split: the run has no validation examples. Fix: .* --data"):
        scores(tmp_path / "run")


# --- answers

PROMPT = "3 + 4 ="


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generate")
    support.write_llama(root / "model", intermediate_size=128)
    train_run(support.tiny_recipe(root, train__steps=2, train__lr=0.002), root / "run", console=QUIET)
    return root / "run"


@pytest.fixture(scope="module")
def merged(run: Path) -> Path:
    export_run(run, run.parent / "merged", ExportOptions(dtype="float32"), console=QUIET)
    return run.parent / "merged"


def answer(target: Path, prompt: str = PROMPT, *, raw: bool = True, **sampling: Any) -> dict[str, Any]:
    return generate_from(str(target), prompt, Sampling(**{"max_new_tokens": 12} | sampling), raw=raw)


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


def test_the_most_likely_tokens_are_streamed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = load_target(str(run), verb="test").tokenizer(PROMPT)["input_ids"]
    expected = plain_loop(run, ids, 12)
    calls, real, stream = [], AdaptedLinear._norm, io.StringIO()

    def counting(self: AdaptedLinear, *given: Any) -> torch.Tensor:
        calls.append(self)
        return real(self, *given)

    monkeypatch.setattr(AdaptedLinear, "_norm", counting)
    found = generate_from(str(run), PROMPT, Sampling(max_new_tokens=12), raw=True, write=stream.write)
    assert len(calls) == len(set(map(id, calls))) == 14
    assert all(layer.keeps_scales for layer in calls)
    assert found["text"] == expected
    assert stream.getvalue().strip() == found["text"].strip()
    assert (found["num_new_tokens"], found["num_prompt_tokens"], found["label"]) == (12, len(ids), "final")
    copy = shutil.copytree(run, tmp_path / "run")  # a run that kept no scales, so that its plan counts none
    recipe = (copy / "recipe.yaml").read_text()
    assert "keep_scales: true" in recipe
    (copy / "recipe.yaml").write_text(recipe.replace("keep_scales: true", "keep_scales: false"))
    layers = adapted_layers(load_target(str(copy), verb="generate").model).values()
    assert [layer.keeps_scales for layer in layers] == [False] * 14
    assert answer(copy)["text"] == expected


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
    with pytest.raises(UserError, match="no chat template"):
        prompt_ids(tokenizer, "a question", "be kind", raw=False)
    tokenizer = support.tokenizer(bos=True, adds_eos=True)  # the beginning once, and no end
    ids = [tokenizer.bos_token_id, *tokenizer("the cat", add_special_tokens=False)["input_ids"]]
    assert [prompt_ids(tokenizer, text, None, raw=True) for text in ("the cat", "<s>the cat")] == [ids, ids]


def test_draws_follow_the_seed(run: Path) -> None:
    def text(**settings: Any) -> str:
        return str(answer(run, temperature=1.0, **settings)["text"])

    state = torch.random.get_rng_state()
    first, greedy = text(seed=1), answer(run)["text"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert text(seed=1) == first != text(seed=2)
    assert text(seed=1, top_k=1) == text(seed=1, top_p=1e-6) == greedy


@pytest.mark.parametrize("exported", [False, True])
def test_no_scales_without_room(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: bool) -> None:
    """Also those of a run whose budget, not its recipe, turned them off. An export says what the run says."""
    target, options = run, {"limit": 4}
    if exported:
        target, options = tmp_path / "out", {"limit": 4, "like": run}
        export_run(run, target, ExportOptions(format_="nf4-lora"), console=QUIET)
        letters = "Which letter follows c?"
        found, expected = (answer(each, letters, raw=False) for each in (target, run))
        assert (found["text"], found["label"]) == (expected["text"], "out")
    expected = scores(target, **options)
    for task, of_run in scores(run, limit=4).items():
        assert expected[task]["nll_per_token"] == pytest.approx(of_run["nll_per_token"], rel=0.03)
    monkeypatch.setattr(adapted_linear, "_free_bytes", lambda _device: 0)
    layers = adapted_layers(load_target(str(target), verb="eval").model).values()
    assert [layer.keeps_scales for layer in layers] == [False] * 14
    assert scores(target, **options) == expected


def test_a_merged_model_answers_alike(
    run: Path, merged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    with caplog.at_level("WARNING", "qdora"):
        found = answer(target)
    assert (found["num_new_tokens"], found["stopped"]) == (5, "context")
    assert f"ends after 5 tokens: with the prompt of {full['num_prompt_tokens']} it fills" in caplog.text
    assert full["text"].startswith(found["text"])
    assert answer(target, max_new_tokens=5)["stopped"] == "length"
    positions = {"max_position_embeddings": full["num_prompt_tokens"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | positions))
    with pytest.raises(UserError, match=r"--prompt: got (\d+) tokens, must be fewer than \1, the context"):
        answer(target)


def test_settings_that_cannot_be_used_are_refused_before_loading() -> None:
    wrong = Sampling(temperature=-1, top_p=0.0, top_k=0, max_new_tokens=0)
    with pytest.raises(UserError) as raised:
        generate_from("nowhere", "", wrong, raw=True, system="x")
    names = ["--temperature", "--top-p", "--top-k", "--max-new-tokens", "--prompt", "--system"]
    assert [fault.split(":")[0] for fault in raised.value.faults] == names
    asked: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 0.5, "temperature": 1}, {}]
    assert [len(Sampling(**each).faults()) for each in asked] == [1, 0, 0]
    assert Sampling(temperature=100, top_p=1.0, top_k=1, max_new_tokens=1).faults() == []
    with pytest.raises(UserError, match="nowhere"):
        generate_from("./nowhere", "x")


def test_each_conversation_of_a_file_is_answered_as_its_prompt_is(run: Path, tmp_path: Path) -> None:
    turns = [
        [("user", PROMPT)],
        [("system", "be kind"), ("user", "a question"), ("assistant", "yes"), ("user", "?")],
    ]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns
    ]
    file, stream = write(tmp_path / "chats.jsonl", rows), io.StringIO()
    found = answer_chats(str(run), str(file), Sampling(max_new_tokens=12), write=stream.write)["answers"]
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
    turns = [("system", "system", "Be kind."), ("user", "human", "Why?")]
    conversations = [{"from": speaker, "value": text} for _, speaker, text in turns]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": role, "content": text} for role, _, text in turns]},
        {"conversations": conversations},
        {"conversations": conversations[1:], "system": "Be kind."},
        {"conversations": json.dumps(conversations)},
    ]
    file = write(tmp_path / "chats.jsonl", [row | {"tools": [{"name": "f"}]} for row in rows])
    first, *others = [(chat, tools) for _, chat, tools in generate._read_chats(file)]
    assert others == [first] * 3
    assert ([turn.role for turn in first[0]], len(first[1])) == (["system", "user"], 1)
    answered = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    write(file, [answered, {"text": "a"}])
    with pytest.raises(UserError) as raised:
        answer_chats("nowhere", str(file))
    starts = (f"{file}: line 1: messages: the last turn is", f"{file}: line 2: messages: must be a list of turns")
    assert all(fault.startswith(start) for fault, start in zip(raised.value.faults, starts, strict=True))


def test_a_run_without_chats_advises_raw_prompts(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert json.loads((run / "environment.json").read_text())["has_chats"] is False
    commands = [each["command"] for each in page_of_run(run, console=QUIET)["next"]]
    assert f"qdora generate {run} --raw --prompt '...'" in commands
    of_chats = shutil.copytree(run, tmp_path / "run")
    (of_chats / "environment.json").write_text('{"resumed": [{"has_chats": true}], "has_chats": false}')
    with caplog.at_level("INFO", logger="qdora"):
        for path, raw, advises in ((run, False, True), (run, True, False), (of_chats, False, False)):
            caplog.clear()
            answer(path, raw=raw, max_new_tokens=1)
            assert ("The run has trained no chats" in caplog.text) == advises
