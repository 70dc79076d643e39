"""What a run tells of itself as it starts: stop tokens, labels, packing, gradients, validation examples."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from qdora.data.build_data import read_data, tokenized_sources
from qdora.data.chat_template import set_chat_settings
from qdora.data.mix_plan import MixPlan, SourcePlan
from qdora.data.sources import load_source
from qdora.data.tokenize import TokenizedExample, TokenizedSet, tokenize_all
from qdora.errors import UserError
from qdora.files.run_directory import RunDirectory
from qdora.recipe.data_settings import DataConfig, SourceConfig
from qdora.recipe.section import with_settings
from qdora.run import prepare, start_checks, trainer
from qdora.run.open_directory import newest_checkpoint
from qdora.run.start_checks import data_checks, repeated_checks
from qdora.run.train import train_run
from qdora.train.distributed import OtherProcessFailed, Processes
from tests import tiny_run, tiny_tokenizer
from tests.page_parser import Page
from tests.run_files import timeless

QUIET = Console(quiet=True)
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SOURCE = SourcePlan(
    name="s",
    num_examples=9,
    num_tokens=90,
    num_truncated=0,
    num_dropped=0,
    share_asked=1.0,
    share_seen=1.0,
    num_draws=9,
    num_tokens_seen=90,
    epochs=1.0,
)
PLAN = MixPlan(1, 1, True, (SOURCE,))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = tiny_tokenizer.make(more=["<think>"] * 50)
    set_chat_settings(made, stop_ids=frozenset({made.eos_token_id}))
    return made


def example(tokenizer: Any, *parts: tuple[str, bool]) -> TokenizedExample:
    """Texts, and whether each is learnt."""
    ids: list[int] = []
    mask: list[bool] = []
    for text, learnt in parts:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        mask += [learnt] * (len(ids) - len(mask))
    return TokenizedExample("t", "0", np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_))


def said(
    tokenizer: Any, *examples: TokenizedExample, cut: int = 0, notes: Sequence[str] = (), **data: Any
) -> list[str]:
    """state: text of the checks of one source."""
    part = TokenizedSet("s", examples, num_truncated=cut, notes=tuple(notes))
    config = DataConfig.model_validate({"mix": [{"source": "x.jsonl"}], **data})
    return [f"{check.state}: {check.text}" for check in data_checks([part], PLAN, tokenizer, config)]


PROMPT = ("Why did the dog sit?", False)


def test_answers_that_end_and_say_something(tokenizer: Any) -> None:
    one = example(tokenizer, PROMPT, ("the cat<|im_end|>", True))
    two = example(tokenizer, PROMPT, ("yes<|im_end|>\n", True), PROMPT, ("a long answer<|im_end|>", True))
    assert said(tokenizer, one, two) == [
        "passed: s: all 3 answers looked at end with a stop token (<|im_end|>).",
        "passed: s: 0 of 2 examples have no token in the loss.",
    ]


def test_answers_that_do_not_end(tokenizer: Any) -> None:
    ends, cut = (example(tokenizer, PROMPT, (f"the three answers{end}", True)) for end in ("<|im_end|>", ""))
    early = example(tokenizer, PROMPT, ("no<|im_end|>and then the dog sat on the cat", True))
    asked = example(tokenizer, ("Why<|im_end|>", False), ("the cat", True))
    assert "passed: s: 1 of 3 answers do not end with a stop token (<|im_end|>) in the loss." in said(
        tokenizer, ends, ends, cut
    )
    text = "warning: s: 3 of 4 answers do not end with a stop token (<|im_end|>) in the loss; 2 examples are cut"
    assert said(tokenizer, ends, cut, early, asked, cut=2)[0].startswith(text)
    # The note of the template says more
    notes = ["x: the model may not stop. Fix: y"]
    assert not [text for text in said(tokenizer, cut, notes=notes) if "stop token" in text]


def test_plain_text_may_end_anywhere(tokenizer: Any) -> None:
    text = example(tokenizer, ("the cat sat on the mat", True))
    assert not [each for each in said(tokenizer, text) if "stop token" in each]
    assert said(tokenizer, text, loss_on="all")[0].startswith("warning: s: 1 of 1 answers do not end")


def test_without_a_stop_token() -> None:
    made = tiny_tokenizer.make()
    first, *others = said(made, example(made, PROMPT, ("yes", True)))
    assert first.startswith("warning: neither the model nor the tokenizer")
    assert not [text for text in others if "stop token" in text]


def test_examples_without_a_label(tokenizer: Any) -> None:
    empty, whole = example(tokenizer, PROMPT), example(tokenizer, PROMPT, ("yes<|im_end|>", True))
    assert "warning: s: 2 of 3 examples have no token in the loss." in said(tokenizer, empty, whole, empty)


def test_a_run_tells_and_keeps_what_it_checked_once(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(tiny_run.recipe(root, train__steps=2, data__packing=True), run, console=QUIET)
    logged = [line[21:] for line in (run / "log.txt").read_text().splitlines() if " Checked: " in line]
    about = ("sums: all", "sums: 0 of", "letters: all", "letters: 0 of", "packed examples stay apart")
    assert all(line.startswith(f"Checked: {text}") for line, text in zip(logged, about, strict=True)), logged

    def kept() -> list[tuple[str, str]]:
        groups = json.loads((run / "checks.json").read_text())
        return [(each["state"], each["text"]) for group in groups.values() for each in group]

    assert {line.removeprefix("Checked: ") for line in logged} <= {text for _, text in kept()}
    assert [text[:48] for state, text in kept() if state == "open"] == [
        "whether every trainable tensor gets a gradient: "
    ]
    train_run(tiny_run.recipe(root, train__steps=6, data__packing=True), run, resume=True, console=QUIET)
    assert any("in 3 updates each of the 42 trainable tensors had a gradient" in text for _, text in kept())
    assert not [text for state, text in kept() if state == "open"]
    assert sum("packed examples stay apart" in text for _, text in kept()) == 1


def test_a_warning_of_the_checks_is_on_the_page_once(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes: dict[str, Any] = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    train_run(tiny_run.recipe(root, train__steps=1, train__batch=100, **changes), run, console=QUIET)
    assert Page((run / "report.html").read_text()).text.count("An optimizer step takes 100 examples") == 1
    assert json.loads((run / "checks.json").read_text())["data"][-1]["state"] == "warning"
    train_run(tiny_run.recipe(root, train__steps=2, train__batch=100, **changes), run, resume=True, console=QUIET)
    again = Page((run / "report.html").read_text()).text
    assert again.count("An optimizer step takes 100 examples") == 1
    assert "the training data has only 50: each step repeats the data 2.0 times. Fix: lower" in again


@pytest.mark.parametrize(
    "changes, warns",
    [
        ({}, True),
        ({"adapter__also_train": ["embed_tokens"], "adapter__also_train_rows": "all"}, False),
        (
            {
                "adapter__kind": "none",
                "train__steps": 0,
                "adapter__rank": ...,
                "adapter__alpha": ...,
                "adapter__dropout": ...,
            },
            False,
        ),
    ],
)
def test_tokens_of_the_chat_template_that_the_base_never_learnt(
    tmp_path: Path, changes: dict[str, Any], warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_run.write_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    ids = tiny_tokenizer.make().convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<s>"])
    weights["model.embed_tokens.weight"][ids] = 0.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    evaluation = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    recipe = tiny_run.recipe(
        tmp_path,
        data__mix=[{"source": "chat.jsonl"}],
        data__validation_fraction=0,
        **evaluation | {"train__steps": 1} | changes,
    )
    train_run(recipe, tmp_path / "run", console=QUIET)
    told = json.loads((tmp_path / "run/checks.json").read_text())["tokens"]
    text = "the training data has tokens that the base never learnt: <|im_start|>, <|im_end|>. Their rows"
    assert [check["text"].startswith(text) for check in told] == ([True] if warns else [])


def test_a_run_that_evaluates_nothing_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def told(**changes: Any) -> list[str]:
        recipe = tiny_run.one_layer_recipe(tmp_path, data__validation_fraction=0, **changes)
        found = prepare.prepare(recipe, tmp_path / "run", Processes(), where="r.yaml", force=False)
        caplog.clear()
        checks = prepare._evaluation_checks(found)
        return [*(each.text for each in checks if each.state == "warning"), *caplog.messages]

    assert told() == [
        "no source has validation data, so nothing is evaluated. Fix: set validation in a source, or eval.tasks: []."
    ]
    assert not told(eval__tasks=[], eval__limit=...)
    with pytest.raises(UserError, match=r"^eval\.every: got 2, but no source has validation data\. Fix: set valid"):
        told(eval__every=2)
    sums, letters = tiny_run.write_data(tmp_path / "data")
    mix = [{"source": str(sums), "validation": str(letters)}, {"source": str(sums), "name": "again"}]
    assert told(data__mix=mix, eval__every=2) == ["Not evaluated, since there is no validation data: again."]


def test_what_ends_another_process_is_no_fault_of_a_file(tmp_path: Path) -> None:
    """Only what the first process raises while it writes is a warning."""
    lost = Mock(shards=False, size=2, first=Mock(side_effect=OtherProcessFailed("process 1 has ended")))
    run, prepared = RunDirectory(tmp_path), Mock(memory_plan=None)
    told: dict[str, Any] = {"packs": False, "sources": (), "tokenizer": None}
    with pytest.raises(OtherProcessFailed):
        start_checks.check_model(Mock(), run, lost, **told)
    lost.first.side_effect = [None, OtherProcessFailed("process 1 has ended")]
    with pytest.raises(OtherProcessFailed), patch.object(prepare, "show_mix"):
        prepare.show_plans(prepared, run, lost, Mock())
    with patch.object(start_checks, "tell_checks", side_effect=OSError("full")):
        start_checks.check_model(Mock(), run, Processes(), **told)


def rows_of(folder: Path, rows: Sequence[dict[str, Any]]) -> list[SourceConfig]:
    """A source for each row."""
    files = [folder / f"{number}.jsonl" for number in range(len(rows))]
    for file, row in zip(files, rows, strict=True):
        file.write_text(json.dumps(row))
    return [SourceConfig(source=str(file)) for file in files]


def test_validation_examples_that_are_trained_on_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    """Whichever source trains on them."""
    texts = [{"prompt": f"the dog {word}", "completion": " sat"} for word in ("a", "b", "c")]
    chats = [
        {"messages": [{"role": "user", "content": word}, {"role": "assistant", "content": "sat"}]}
        for word in ("a", "b", "c")
    ]
    choices = [{"question": "the dog?", "choices": ["sat", "b"], "answer": right} for right in (0, 1)]
    held_out = {
        "texts": [*texts[1:], texts[0], {"prompt": "the dog b", "completion": " ran"}],
        "chats": chats[2:],
        "choices": [choices[0], choices[0], chats[0], choices[1]],
    }
    data = DataConfig.model_validate(
        {"mix": rows_of(tmp_path, [*texts[1:], *chats[:2], choices[0]]), "validation_fraction": 0.0, "cache": "off"}
    )
    sets = tokenized_sources(data, tokenizer, read_data(data)[0])
    (tmp_path / "held").mkdir()
    validation = {
        name: [each for source in rows_of(tmp_path / "held", rows) for each in load_source(source)]
        for name, rows in held_out.items()
    }
    found = repeated_checks(sets, validation, tokenizer, data)
    assert [check.text.partition(" are")[0] for check in found] == [
        "texts: of 4 validation examples looked up, 2",
        "choices: of 4 validation examples looked up, 3",
    ]
    assert all(check.state == "warning" for check in found)


def test_what_is_cut_or_cannot_be_encoded_is_no_copy(tmp_path: Path, tokenizer: Any) -> None:
    """Two texts of the same beginning are equal once they are cut; a source without a chat template loses no other."""
    start = "the dog " * 20
    trained, held = ([{"text": f"{start}{end}"}] for end in ("sat", "ran"))
    data = DataConfig.model_validate(
        {
            "mix": rows_of(tmp_path, [*trained, {"text": "the dog"}]),
            "validation_fraction": 0.0,
            "cache": "off",
            "max_length": 16,
            "too_long": "truncate",
        }
    )
    sets = tokenized_sources(data, tokenizer, read_data(data)[0])
    (tmp_path / "held").mkdir()
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    texts, short, chats = (
        [load_source(each)[0]] for each in rows_of(tmp_path / "held", [*held, {"text": "the dog"}, chat])
    )
    assert repeated_checks(sets, {"texts": texts}, tokenizer, data) == []
    plain = tiny_tokenizer.make(chat_template=None, more=["<think>"] * 50)
    (found,) = repeated_checks(sets, {"chats": chats, "short": short}, plain, data)
    assert found.text.startswith("short: of 1 validation examples looked up, 1 are")


def test_of_a_chat_in_several_parts_all_must_be_known(tmp_path: Path) -> None:
    """A template that leaves earlier reasoning out makes two examples of two answers."""
    made = tiny_tokenizer.make(chat_template=FORGETTING)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    data = DataConfig.model_validate(
        {"mix": rows_of(tmp_path, [{"messages": turns[:2]}]), "validation_fraction": 0.0, "cache": "off"}
    )
    sets = tokenized_sources(data, made, read_data(data)[0])
    (tmp_path / "held").mkdir()
    one, two = (
        [load_source(each)[0]] for each in rows_of(tmp_path / "held", [{"messages": turns[:2]}, {"messages": turns}])
    )
    assert len(tokenize_all(two, made, name="two", max_length=200)) == 2
    assert len(repeated_checks(sets, {"one": one}, made, data)) == 1
    assert repeated_checks(sets, {"two": two}, made, data) == []


def test_a_run_tells_of_validation_examples_that_it_trains_on(root: Path, tmp_path: Path) -> None:
    recipe = tiny_run.recipe(root, train__steps=1)
    train_run(recipe, tmp_path / "apart", console=QUIET)
    assert "training examples, too" not in (tmp_path / "apart/checks.json").read_text()
    source = recipe.data.mix[0]
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("".join(Path(str(source.source)).read_text().splitlines(keepends=True)[:3]))
    mix = (source.model_copy(update={"validation": str(held_out)}), *recipe.data.mix[1:])
    train_run(with_settings(recipe, data={"mix": mix}), tmp_path / "copies", console=QUIET)
    assert f"{source.label}: of 3 validation examples looked up, 3 are" in (tmp_path / "copies/checks.json").read_text()


def test_tokens_that_cannot_be_checked_lose_no_other_check(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = [Mock(examples=[Mock()])]  # not even token ids
    start_checks.check_model(Mock(), RunDirectory(tmp_path), Processes(), packs=False, sources=sources, tokenizer=None)
    assert set(json.loads((tmp_path / "checks.json").read_text())) == {"packing"}
    assert "the check of tokens in checks.json was not written: " in caplog.text


def test_the_checks_change_no_number(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_run.recipe(root, train__steps=4, data__packing=True)
    train_run(recipe, tmp_path / "with", console=QUIET)
    for place, name in ((prepare, "data_checks"), (prepare, "begin_checks"), (start_checks, "tell_checks")):
        monkeypatch.setattr(place, name, lambda *_, **__: None)
    monkeypatch.setattr(trainer.Trainer, "_updated", lambda *_: None)
    train_run(recipe, tmp_path / "without", console=QUIET)
    assert not (tmp_path / "without/checks.json").exists()
    assert timeless(tmp_path / "with") == timeless(tmp_path / "without")


def test_a_resumed_run_without_a_checkpoint_says_that_it_begins_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "checkpoints").mkdir()
    with caplog.at_level("WARNING", logger="qdora"):
        assert newest_checkpoint(RunDirectory(tmp_path), Processes()) is None
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path} has no whole checkpoint: the run begins again at its first step."
