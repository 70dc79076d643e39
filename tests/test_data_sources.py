"""Files of all formats -> examples, and what the user reads when they are wrong."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qdora.data import demo, row_examples
from qdora.data.batching import Batching
from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.loader import StepLoader
from qdora.data.messages import Turn
from qdora.data.mix_plan import mix_facts, mix_warnings, plan_mix
from qdora.data.row_formats import commonsense_task
from qdora.data.rows import Rows
from qdora.data.sources import load_source, open_shards, open_source, train_and_validation
from qdora.data.split_examples import SplitExamples, draw, split_off
from qdora.data.text_notes import TextNotes
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig, SourceConfig
from tests import tiny_tokenizer

CHOICE = {"question": "Q?", "choices": ["a", "b"], "answer": 1}
PAIR = {"prompt": "1+1=", "completion": " 2"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
BOOLQ170K = {
    "instruction": "Please answer the following question with true or false, question: is ice cold?\n\n"
    "Answer format: true/false",
    "input": "",
    "output": "the correct answer is true",
    "answer": "true",
}


CALL = {"name": "f", "arguments": '{"a": "\\udc00"}'}


def write(path, rows):
    """Rows as a file, in the layout of its ending."""
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def faults_of(source, split=None):
    with pytest.raises(UserError) as error:
        load_source(source, split)
    return error.value.faults


def opened(source: SourceConfig) -> object:
    """A source as a run opens it."""
    return open_shards(source) if source.stream else open_source(source)


def split_up(source, fraction=None, **settings):
    """The training and validation examples of one source."""
    cut = {} if fraction is None else {"validation_fraction": fraction}
    train, validation = train_and_validation(source, DataConfig(mix=(source,), **cut, **settings))
    return list(train), list(validation)


def mixed(data):
    """The tokenised mix of a recipe that has only this section."""
    return tokenized_mix(SimpleNamespace(data=data), tiny_tokenizer.make(), read_data(data)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_choices_in_every_kind_of_file(tmp_path, suffix):
    source = write(tmp_path / f"quiz{suffix}", [CHOICE, CHOICE | {"answer": 0, "question": "R?"}])
    first, second = load_source(SourceConfig(source=source))
    assert (first.prompt, first.choices, first.gold) == ("Question: Q?\nAnswer:", (" a", " b"), 1)
    assert (second.prompt, second.answer, second.task) == ("Question: R?\nAnswer:", " a", "quiz")


def test_json_lines_under_the_ending_json(tmp_path):
    path = tmp_path / "quiz.json"
    path.write_text("\ufeff" + json.dumps(PAIR) + "\n\n" + json.dumps(PAIR) + "\n", encoding="utf-8")
    assert len(load_source(SourceConfig(source=str(path)))) == 2


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", ["", "\ufeff\n"])
def test_a_json_list_under_the_ending_jsonl(tmp_path, indent, mark):
    path = tmp_path / "quiz.jsonl"
    path.write_text(f"{mark}{json.dumps([PAIR, PAIR | {'id': 7}], indent=indent)}\n\n", encoding="utf-8")
    assert [example.id for example in load_source(SourceConfig(source=str(path)))][1:] == ["7"]


def test_lists_in_the_lines_of_a_jsonl_file_are_faulty_rows(tmp_path):
    path = tmp_path / "quiz.jsonl"
    path.write_text(f"[{json.dumps(PAIR)}]\n{json.dumps(PAIR)}\n")
    with pytest.raises(UserError, match=r"line 1: must be an object \{column: value\}, got \["):
        load_source(SourceConfig(source=str(path)))


def test_unicode_line_ends_inside_a_string_do_not_cut_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n", encoding="utf-8")
    [example] = load_source(SourceConfig(source=str(path)))
    assert example.answer == "one\u2028two\u0085three"


def test_completion_is_joined_as_it_stands(tmp_path):
    [example] = load_source(SourceConfig(source=write(tmp_path / "a.jsonl", [PAIR | {"id": 5}])))
    assert (example.prompt, example.answer, example.choices, example.id) == ("1+1=", " 2", (), "5")


def test_messages(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        [example] = load_source(SourceConfig(source=write(tmp_path / f"a{suffix}", [CHAT])))
        assert example.messages == (Turn("user", "Hi"), Turn("assistant", "Hello"))
        assert example.prompt == example.answer == ""


def test_text_files_are_cut_at_blank_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\n\nOne.\r\nStill one.\r\n \t\r\nTwo.\n\n\n\nThree.")
    examples = load_source(SourceConfig(source=str(path)))
    assert [example.answer for example in examples] == ["One.\nStill one.", "Two.", "Three."]
    assert [example.id for example in examples] == ["3", "6", "10"]  # the lines where they start
    assert {example.prompt for example in examples} == {""}


def test_llm_adapters_rows_can_be_scored(tmp_path):
    arc = {
        "instruction": "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b Answer3: c "
        "Answer4: d\n\nAnswer format: answer1/answer2/answer3/answer4",
        "input": "",
        "output": "the correct answer is answer3",
        "answer": "answer3",
    }
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    source = write(tmp_path / "commonsense_170k.json", [BOOLQ170K, arc, alpaca])
    first, second, third = load_source(SourceConfig(source=source))
    assert first.task == "boolq"
    assert first.choices == ("the correct answer is true", "the correct answer is false")
    assert (first.gold, first.answer) == (0, "the correct answer is true")
    assert first.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{BOOLQ170K['instruction']}\n\n### Response:\n"
    )
    assert (second.task, second.gold, len(second.choices)) == ("arc_or_obqa", 2, 4)
    assert (third.task, third.choices, third.answer) == ("commonsense_170k", (), "3")
    assert "### Input:\n1 and 2\n\n### Response:\n" in third.prompt


@pytest.mark.parametrize(
    "names, task",
    [
        ("true/false", "boolq"),
        ("solution1/solution2", "piqa"),
        ("answer1/answer2/answer3", "siqa"),
        ("ending1/ending2/ending3/ending4", "hellaswag"),
        ("option1/option2", "winogrande"),
        ("answer1/answer2/answer3/answer4", "arc_or_obqa"),
        ("red/green", ""),
    ],
)
def test_the_wording_gives_the_task_away(names, task):
    assert commonsense_task(f"Please choose.\n\nAnswer format: {names}") == task
    assert commonsense_task(f"Answer format: {names}\n\nand more text") == ""


def test_names(tmp_path):
    rows = [CHOICE | {"task": "siqa", "context": "C."}, CHOICE | {"task": "mine"}, CHOICE]
    source = write(tmp_path / "quiz.v2.jsonl", rows)
    own = load_source(SourceConfig(source=source))
    assert [example.task for example in own] == ["siqa", "mine", "quiz"]
    assert own[0].prompt == "Question: C. Q?\nAnswer:"  # the template of its task
    named = load_source(SourceConfig(source=source, name="all"))
    assert {example.task for example in named} == {"all"}
    assert named[0].prompt == own[0].prompt


def test_rows_of_a_validation_file_have_the_name_of_the_source(tmp_path):
    rows = [CHOICE | {"task": "siqa", "context": "C."}, CHOICE]
    files = [write(tmp_path / f"{name}.jsonl", rows) for name in ("quiz", "valid")]
    source = SourceConfig(source=files[0], validation=files[1])
    for found in split_up(source):
        assert [example.task for example in found] == ["siqa", "quiz"]  # a row may name its own


def test_demo_tasks():
    task = f"demo/{next(iter(demo.FAMILIES))}"
    examples = load_source(SourceConfig(task=task), "validation")
    assert examples
    assert {example.task for example in examples} == {task}
    assert {example.task for example in load_source(SourceConfig(task=task, name="f"))} == {"f"}
    assert faults_of(SourceConfig(task=task), "trian") == (
        f"{task}: no split 'trian', must be one of train, validation, test. Did you mean 'train'?",
    )
    train, validation = split_up(SourceConfig(task=task, limit=10))
    assert (len(train), validation) == (10, examples)


def test_every_faulty_line_of_every_source_is_gathered(tmp_path):
    first = tmp_path / "a.jsonl"
    first.write_text(json.dumps(PAIR) + '\n{"prompt": \n[1]\n')
    second = write(tmp_path / "b.jsonl", [CHOICE, CHOICE | {"answer": 9}])
    good = write(tmp_path / "c.jsonl", [PAIR])
    mix = tuple(SourceConfig(source=source) for source in (str(first), good, second))
    data = DataConfig(mix=mix, validation_fraction=0.0)
    with pytest.raises(UserError) as error:
        mixed(data)
    assert error.value.faults == (
        f"data.mix[0]: {first}: line 2: not JSON (column 12: Expecting value)",
        f"data.mix[0]: {first}: line 3: must be an object {{column: value}}, got [1]",
        f"data.mix[2]: {second}: line 2: answer: must be the index of the right choice, 0 to 1, got 9",
    )
    # the same where a fault is met earlier, in the validation part at the end of the second file
    with pytest.raises(UserError) as early:
        read_data(DataConfig(mix=mix, validation_fraction=0.4))
    assert early.value.faults[-1:] == error.value.faults[-1:]
    assert early.value.faults[:2] == error.value.faults[:2]
    other = write(tmp_path / "d.jsonl", [PAIR] * 2)
    mix = (SourceConfig(source=good), SourceConfig(source=good, name="d", validation=other))
    train, validation = read_data(DataConfig(mix=mix, validation_fraction=0.0))
    assert [len(examples) for examples in train] == [1, 1]
    assert {name: len(examples) for name, examples in validation.items()} == {"d": 2}


@pytest.mark.parametrize("limit", [None, 18])
def test_faulty_rows_of_training_and_validation_are_one_list(tmp_path, limit):
    source = write(tmp_path / "a.jsonl", [{**PAIR, "completion": 1}] * 20)
    data = DataConfig(mix=(SourceConfig(source=source, limit=limit),), validation_fraction=0.1)
    with pytest.raises(UserError) as error:
        read_data(data)
    assert [fault.split(": ")[2] for fault in error.value.faults[:5]] == [f"line {line}" for line in range(1, 6)]
    assert error.value.faults[5:] == (f"data.mix[0]: {source}: 15 more faulty rows",)


def test_validating_on_what_is_trained_on_is_refused(tmp_path):
    source = write(tmp_path / "train.jsonl", [PAIR] * 3)
    with pytest.raises(UserError, match=rf"validation 'dev': {source} has no splits. Fix: name a file"):
        split_up(SourceConfig(source=source, validation="dev"))
    with pytest.raises(UserError, match=r"validation 'train': train is trained on"):
        split_up(SourceConfig(source=str(tmp_path), validation="train"))


def test_a_validation_file_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "holdout"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "One."}\n' * 3)
    held = str(tmp_path / "holdout.jsonl")
    (tmp_path / "link.jsonl").symlink_to(held)
    for source, fix in (
        (held, "name another file, or leave validation out"),
        (str(tmp_path / "link.jsonl"), "name another file, or leave validation out"),
        (str(tmp_path / "*.jsonl"), f"keep it out of {tmp_path}/*.jsonl"),
        (str(tmp_path), f"keep it out of {tmp_path}"),
    ):
        config = SourceConfig(source=source, validation=held)
        with pytest.raises(UserError) as caught:
            train_and_validation(config, DataConfig(mix=(config,)))
        assert caught.value.faults == (f"validation '{held}': {held} is trained on, too. Fix: {fix}.",)
    config = SourceConfig(source=str(tmp_path / "[ab].jsonl"), validation=held)
    train, validation = train_and_validation(config, DataConfig(mix=(config,)))
    assert train is not None
    assert validation is not None
    assert (len(train), len(validation)) == (6, 3)


def test_the_validation_file_of_a_task_is_that_file_alone(tmp_path: Path) -> None:
    row = {"context": "", "question": "Open it", "choices": ["pull", "push"], "answer": 0}
    for name, number in (("train", 4), ("dev", 2), ("dev-hard", 3)):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * number)
    config = SourceConfig(task="piqa", path=str(tmp_path), validation=str(tmp_path / "dev.jsonl"))
    _, validation = train_and_validation(config, DataConfig(mix=(config,)))
    assert validation is not None
    assert len(list(validation)) == 2


def test_with_loss_on_last_the_last_turn_alone_is_scored(tmp_path: Path) -> None:
    turns = [("user", "Hi"), ("assistant", "draft"), ("user", "Why?"), ("assistant", "yes"), ("user", "Bye")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "chat.jsonl").write_text((json.dumps(chat) + "\n") * 2)
    (tmp_path / "held.jsonl").write_text(json.dumps(chat) + "\n")
    config = SourceConfig(source=str(tmp_path / "chat.jsonl"), validation=str(tmp_path / "held.jsonl"))
    for loss_on, expected in (("last", [False, True]), ("answer", [True, True])):
        _, validation = read_data(DataConfig(mix=(config,), loss_on=loss_on))
        ((held,),) = validation.values()
        assert [turn.learnt for turn in held.messages if turn.role == "assistant"] == expected


def test_a_thousand_faulty_rows_are_not_a_thousand_lines(tmp_path):
    faults = faults_of(SourceConfig(source=write(tmp_path / "a.jsonl", [{"text": ""}] * 1000)))
    assert len(faults) == 6
    assert faults[-1] == f"{tmp_path}/a.jsonl: 995 more faulty rows"


def test_unknown_columns(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"promt": "x", "completion": "y"}])
    [fault] = faults_of(SourceConfig(source=source))
    assert fault.startswith(
        f"{source}: columns promt, completion fit no format, allowed: choices: question, choices, a"
    )
    assert fault.endswith("Did you mean 'prompt'?")
    [fault] = faults_of(SourceConfig(source=source, format="completion"))
    assert fault == (
        f"{source}: line 1: columns promt, completion; format completion needs prompt, completion. "
        "One file holds one format. Did you mean 'promt'?"
    )


def test_a_column_of_another_name_is_told_by_a_setting_that_reads_it(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"prompt": "x", "response": "y", "id": "1"}])
    [fault] = faults_of(SourceConfig(source=source))
    assert fault.endswith(". Fix: columns: {completion: response} in this source.")
    assert len(load_source(SourceConfig(source=source, columns={"completion": "response"}))) == 1
    source = write(tmp_path / "b.jsonl", [{"prompt": "x", "x1": "y", "x2": "z"}])
    [fault] = faults_of(SourceConfig(source=source))
    assert fault.endswith("text: text.")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": True, "completion": "y"}, "prompt: must be text, got true"),
        (
            {"prompt": [], "completion": "y"},
            "prompt: must be text (turns only if both are lists of turns), got []",
        ),
        ({"prompt": "x", "completion": " "}, "completion: must be text that is not empty, got ' '"),
        ({"text": None}, "text: must be text that is not empty, got null"),
        ({"text": ["hf_" + "a1B2" * 8]}, "text: must be text that is not empty, got [hf_***]"),
        ({"messages": []}, "messages: must be a list of turns {role, content}, got []"),
        ({"messages": ["Hi"]}, "messages[0]: must be an object with role and content, got 'Hi'"),
        (
            {"messages": [{"role": "asistant", "content": "x"}]},
            "messages[0].role: must be one of system, user, assistant, tool, got 'asistant'. Did you mean 'assistant'?",
        ),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content: must be text or a list of parts, got 1"),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "messages: no turn of role assistant with content, so there is nothing to learn",
        ),
    ],
)
def test_faulty_rows(tmp_path, row, message):
    source = write(tmp_path / "a.jsonl", [row])
    assert faults_of(SourceConfig(source=source)) == (f"{source}: line 1: {message}",)


@pytest.mark.parametrize("name, content", [("a.jsonl", b"\n"), ("a.json", b"[]"), ("a.json", b""), ("a.txt", b" \n")])
def test_an_empty_data_set(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert faults_of(SourceConfig(source=f"{tmp_path}/{name}")) == (
        f"{tmp_path}/{name}: the data set is empty, must have at least one row",
    )


def test_an_empty_parquet_file(tmp_path):
    pd.DataFrame({"prompt": [], "completion": []}).to_parquet(tmp_path / "a.parquet")
    assert "the data set is empty" in faults_of(SourceConfig(source=f"{tmp_path}/a.parquet"))[0]


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "9" * 5000])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_that_breaks_the_parser_is_one_line(tmp_path, value, suffix):
    text = f'{{"text": {value}}}\n'
    (tmp_path / f"a{suffix}").write_text(f"[{text}]" if suffix == ".json" else text)
    (fault,) = faults_of(SourceConfig(source=f"{tmp_path}/a{suffix}"))
    number = value.startswith("9")  # only deep nesting hides where an item of a list ends
    place = {".jsonl": "line 1: ", ".json": "row 0: " if number else ""}[suffix]
    assert fault.startswith(f"{tmp_path}/a{suffix}: {place}not JSON (")


def test_every_flipped_bit_in_the_pages_of_a_parquet_file_is_noticed(tmp_path):
    sink = BytesIO()
    rows = [{"text": f"row {index}"} for index in range(20)]
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.Table.from_pylist(rows), sink, write_page_checksum=True, **plain)
    whole = sink.getvalue()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    start = whole.index(b"row 0")  # the values; before them is the header of the page
    assert footer - start > 100
    for place in range(start, footer, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (tmp_path / "a.parquet").write_bytes(damaged)
        (fault,) = faults_of(SourceConfig(source=f"{tmp_path}/a.parquet"))
        assert fault.startswith(f"{tmp_path}/a.parquet: row group 0: damaged (")


def test_what_parquet_says_of_a_damaged_footer_is_one_line_without_control_characters(tmp_path):
    sink = BytesIO()
    pq.write_table(pa.Table.from_pylist([{"text": "x"}]), sink)
    whole = sink.getvalue()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    (tmp_path / "a.parquet").write_bytes(whole[:footer] + b"\x0f" * (len(whole) - 8 - footer) + whole[-8:])
    (fault,) = faults_of(SourceConfig(source=f"{tmp_path}/a.parquet"))
    assert fault.startswith(f"{tmp_path}/a.parquet: not a Parquet file (")
    assert fault.isprintable()


def test_a_name_in_a_parquet_footer_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"text": ["x"]}), file)
    whole = file.read_bytes()
    at = whole.index(b"text", len(whole) - 8 - int.from_bytes(whole[-8:-4], "little"))
    file.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    for options in ({}, {"stream": True}):
        with pytest.raises(UserError) as error:
            opened(SourceConfig(source=str(file), **options))
        [fault] = error.value.faults
        assert fault.startswith(f"{file}: not a Parquet file ('utf-8' codec can't decode byte 0xff")


def test_text_in_utf_16_without_its_mark_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("two words", encoding="utf-16-be")
    assert faults_of(SourceConfig(source=f"{tmp_path}/a.txt")) == (
        f"{tmp_path}/a.txt: line 1: holds null bytes, so it is not UTF-8 text. Fix: convert it, or remove them.",
    )


def test_damaged_files(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"nonsense")
    assert "a.parquet: not a Parquet file" in faults_of(SourceConfig(source=f"{tmp_path}/a.parquet"))[0]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
    assert faults_of(SourceConfig(source=f"{tmp_path}/a.jsonl")) == (
        f"{tmp_path}/a.jsonl: line 1: not UTF-8 text (byte 10 of the row)",
    )
    (tmp_path / "a.json").write_text('[{"text": "x"},]')
    assert "a.json: line 1: not JSON (column" in faults_of(SourceConfig(source=f"{tmp_path}/a.json"))[0]
    (tmp_path / "a.xls").write_text("x")
    [fault] = faults_of(SourceConfig(source=f"{tmp_path}/a.xls"))
    assert "unknown ending '.xls', allowed: .parquet, .jsonl, .json, .csv, .tsv, .txt, .md, .jsonl.gz, " in fault


def test_missing_files_name_the_nearest(tmp_path):
    write(tmp_path / "quiz.jsonl", [PAIR])
    assert faults_of(SourceConfig(source=f"{tmp_path}/quizz.jsonl")) == (
        f"{tmp_path}/quizz.jsonl: no such file. Did you mean 'quiz.jsonl'?",
    )
    assert faults_of(SourceConfig(source=f"{tmp_path}/no/such/dir")) == (f"{tmp_path}/no/such/dir: no such file.",)


def test_directories_of_splits(tmp_path):
    write(tmp_path / "train.jsonl", [PAIR] * 3)
    write(tmp_path / "test.parquet", [PAIR] * 2)
    source = str(tmp_path)
    assert len(load_source(SourceConfig(source=source))) == 3
    assert len(load_source(SourceConfig(source=source), "test")) == 2
    assert faults_of(SourceConfig(source=source), "tests") == (
        f"{source}: no file for split 'tests', looked for tests.*, tests-* and tests/*; there are test, train. "
        "Did you mean 'test'?",
    )
    write(tmp_path / "train.json", [PAIR])
    assert faults_of(SourceConfig(source=source)) == (
        f"{source}: train.jsonl, train.json all hold split 'train'. Fix: name one file as the source.",
    )


def test_a_task_from_a_directory(tmp_path):
    write(tmp_path / "train.parquet", [{"task": "obqa", "id": "7-1", "passage": None} | CHOICE] * 40)
    train, validation = split_up(SourceConfig(task="obqa", path=str(tmp_path)), 0.1)
    assert (len(train), len(validation), train[0].id) == (36, 4, "7-1")
    write(tmp_path / "validation.parquet", [CHOICE] * 2)
    train, validation = split_up(SourceConfig(task="obqa", path=str(tmp_path)), 0.1)
    assert (len(train), len(validation)) == (40, 2)
    write(tmp_path / "other.jsonl", [CHOICE] * 5)
    train, validation = split_up(SourceConfig(task="obqa", path=str(tmp_path), validation=f"{tmp_path}/other.jsonl"))
    assert (len(train), len(validation)) == (40, 5)


def test_limit_draws_after_the_validation_part_is_cut(tmp_path):
    source = write(tmp_path / "a.jsonl", [PAIR | {"id": str(number)} for number in range(100)])
    spec = SourceConfig(source=source, limit=20)
    train, validation = split_up(spec, 0.1, seed=3)
    assert [example.id for example in validation] == [str(number) for number in range(90, 100)]
    ids = [int(example.id) for example in train]
    assert len(set(ids)) == 20
    assert ids == sorted(ids)
    assert max(ids) < 90
    assert ids != list(range(20))  # drawn, not the head: files are often sorted
    assert split_up(spec, 0.1, seed=3)[0] == train


def test_split_off_and_draw():
    def letters(text):
        rows = Rows("x", "row", len(text), lambda indices: ((index, {"text": text[index]}) for index in indices))
        return SplitExamples(rows, lambda place, row: row["text"], range(len(text)))

    examples = letters("abcdefghij")
    assert tuple(map("".join, split_off(examples, 0.2, name="x"))) == ("abcdefgh", "ij")
    assert "".join(split_off(examples, 0.01, name="x")[1]) == "j"
    assert list(split_off(examples, 0.0, name="x")[1]) == []
    with pytest.raises(UserError, match=r"^x: 1 examples leave none to train on"):
        split_off(letters("a"), 0.05, name="x")
    assert list(draw(examples, 10, 0)) == list("abcdefghij")
    assert list(draw(examples, 5, 0)) != list(draw(examples, 5, 1))
    assert (examples[3], list(examples[2:4])) == ("d", ["c", "d"])


@pytest.mark.parametrize(
    "line, fault",
    [
        ('{"messages": "hi"}', "line 1: messages: must be a list of turns"),
        ('{"messages": [', "line 1: not JSON"),
        ('{"chat": [{"role": "user", "content": "hi"}]}', "columns chat fit no format"),
    ],
)
def test_of_a_single_row_in_a_wrong_layout_the_layout_is_told(tmp_path, line, fault):
    """And not that one row is too few to cut validation examples from."""
    file = tmp_path / "chat.jsonl"
    file.write_text(f"{line}\n")
    with pytest.raises(UserError) as error:
        split_up(SourceConfig(source=str(file)), 0.1)
    assert [each.startswith(f"{file}: {fault}") for each in error.value.faults] == [True]


# Columns that training does not read


def test_what_is_not_read_is_named_once_a_source(tmp_path):
    call = {
        "role": "assistant",
        "content": "Hello",
        "tool_calls": [{"name": "f"}],
        "weight": 1,
        "rating": 5,
        "reasoning_content": "",
    }
    chat = {"messages": [CHAT["messages"][0], call], "tools": "[]", "topic": "x", "task": "t", "empty": None}
    write(tmp_path / "chat.jsonl", [CHAT, chat, chat])
    write(tmp_path / "pairs.jsonl", [PAIR | {"id": 1, "source": "x"}] * 3)
    write(tmp_path / "all.jsonl", [PAIR] * 3)
    names = ("chat", "pairs", "all")
    mix = tuple(SourceConfig(source=f"{tmp_path}/{name}.jsonl") for name in names)
    found = mixed(DataConfig(mix=mix, validation_fraction=0.0))
    loader = StepLoader(found.sets, found.order, tokens_per_step=None, batch=2, batching=Batching(99, 0))
    plan = plan_mix(found, loader, 2)
    assert not [each for each in mix_warnings(plan) if "not used for training" in each]
    assert mix_facts(plan) == [
        "chat: not used for training: messages.rating, topic.",
        "pairs: not used for training: source.",
    ]
    assert [each.unused for each in plan.sources] == [("messages.rating", "topic"), ("source",), ()]


def test_unused_columns_that_look_meant_are_warned_of(tmp_path: Path) -> None:
    columns = ("category", "system", "Tools", "promt", "sample_weight", "rating", "split")
    write(tmp_path / "pairs.jsonl", [PAIR | dict.fromkeys(columns, "x")] * 3)
    found = mixed(DataConfig(mix=(SourceConfig(source=f"{tmp_path}/pairs.jsonl"),), validation_fraction=0.0))
    loader = StepLoader(found.sets, found.order, tokens_per_step=None, batch=1, batching=Batching(99, 0))
    plan = plan_mix(found, loader, 1)
    notes = tuple(TextNotes(num_texts=3, num_ended=2, num_glued=1, glued="'a' + 'b'").in_words())
    plan = replace(plan, sources=(replace(plan.sources[0], notes=notes),))
    assert "pairs: not used for training: Tools, promt, sample_weight, system." in mix_warnings(plan)
    unused, ended = mix_facts(plan)
    assert unused == "pairs: not used for training: category, rating, split."
    assert "end with a stop token: no second one is added" in ended
    assert [each for each in mix_warnings(plan) if "white space" in each] == [f"pairs: {notes[1]}"]


@pytest.mark.parametrize("in_turns", [True, False])
def test_tools_are_read_beside_a_prompt_of_turns_only(tmp_path: Path, in_turns: bool) -> None:
    asked, answer = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    row = {"prompt": asked, "completion": answer} if in_turns else {"prompt": "a", "completion": "b"}
    file = write(tmp_path / "a.jsonl", [row | {"tools": [{"name": "f"}]}])
    found = open_source(SourceConfig(source=file))
    [example] = found
    assert (len(example.tools), found.unused) == ((1, set()) if in_turns else (0, {"tools"}))


# Large files


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".jsonl.gz"])
def test_a_limit_reads_only_the_rows_that_it_draws(tmp_path, monkeypatch, suffix):
    rows = [PAIR | {"id": f"n{number}"} for number in range(3000)]
    path = tmp_path / f"big{suffix}"
    if suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    else:
        write(path, rows)
    source = SourceConfig(source=str(path), limit=20)
    # as of a list of all rows: the last 5 % are cut off, then 20 are drawn of the rest, by numpy's generator
    chosen = np.sort(np.random.default_rng([7, 2850]).permutation(2850)[:20])
    made = []
    example_of_format = row_examples.example_of_format

    def counted(row, *args, **options):
        made.append(row["id"])
        return example_of_format(row, *args, **options)

    monkeypatch.setattr(row_examples, "example_of_format", counted)
    train, validation = split_up(source, seed=7)
    assert [example.id for example in train] == [f"n{number}" for number in chosen]
    assert [example.id for example in validation] == [f"n{number}" for number in range(2850, 3000)]
    assert len(made) == 170


# CSV and compressed files


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    long = "x" * 200_000  # above the standard library's limit of 131,072
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        lines = csv.writer(file)
        lines.writerows([["prompt", "completion"], ["a, b", ' "yes"\nand no'], [], ["é", f" {long}"]])
    one, two = load_source(SourceConfig(source=str(path)))
    assert (one.prompt, one.answer, one.id) == ("a, b", ' "yes"\nand no', "2")
    assert (two.prompt, two.answer) == ("é", f" {long}")
    assert csv.field_size_limit() == 131_072
    path.write_text('question,choices,answer\nQ?,"[""a"", ""b""]",1\n')
    [choice] = load_source(SourceConfig(source=str(path)))
    assert (choice.choices, choice.gold) == ((" a", " b"), 1)
    path.write_text("prompt,completion\na,b\na\na,b,c\n")
    assert faults_of(SourceConfig(source=str(path))) == (
        f"{path}: line 3: has 1 cells, the first line names 2 columns",
        f"{path}: line 4: has 3 cells, the first line names 2 columns",
    )
    path.write_text('prompt,completion\na,"b\n')
    (fault,) = faults_of(SourceConfig(source=str(path)))
    assert fault == f"{path}: line 2: a quotation mark opens here and is never closed."
    path.write_text("prompt,completion\n")
    assert "the data set is empty" in faults_of(SourceConfig(source=str(path)))[0]


@pytest.mark.parametrize(
    "name, text", [("a.jsonl", json.dumps({"text": "One."})), ("a.json", '[{"text": "One."}]'), ("a.txt", "One.")]
)
def test_gzip(tmp_path, name, text):
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(text.encode()))
    [example] = load_source(SourceConfig(source=str(path)))
    assert (example.answer, example.task) == ("One.", "a")
    (tmp_path / f"train.{path.suffixes[0][1:]}.gz").write_bytes(path.read_bytes())
    assert len(load_source(SourceConfig(source=str(tmp_path)))) == 1
    assert "there are a, train." in faults_of(SourceConfig(source=str(tmp_path)), "trian")[0]
    path.write_bytes(path.read_bytes()[:-9])
    [fault] = faults_of(SourceConfig(source=str(path)))
    assert fault.startswith(f"{path}: damaged (")
    path.write_bytes(b"not gzip")
    assert faults_of(SourceConfig(source=str(path)))[0].startswith(f"{path}: damaged (Not a gzipped file")


def test_zstandard(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    lines = [json.dumps({"text": f"{number} " * 50}) + "\n" for number in range(2000)]
    halves = ["".join(lines[:1000]), "".join(lines[1000:])]
    whole = b"".join(pa.compress(half.encode(), codec="zstd", asbytes=True) for half in halves)  # two frames
    path.write_bytes(whole)
    train, _ = split_up(SourceConfig(source=str(path), limit=1500), 0.1)
    assert [example.answer for example in train] == [f"{int(example.id) - 1} " * 50 for example in train]
    assert len(load_source(SourceConfig(source=str(path)))) == 2000
    for cut in (whole[:-1], whole[: len(whole) // 4], b"no frame at all"):
        path.write_bytes(cut)
        [fault] = faults_of(SourceConfig(source=str(path)))
        assert fault.startswith(f"{path}: damaged (")
    # a window of 2 GiB, as `zstd --long=31` writes: magic number, descriptor, window
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + b"\x01\x00\x00")
    assert faults_of(SourceConfig(source=str(path)))[0].endswith("Fix: unpack it, zstd -d --long=31 a.jsonl.zst")


def test_what_json_can_hold_and_python_cannot(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' + "[" * 100_000 + "\n" + '{"text": ' + "9" * 5000 + "}\n")
    first, second = faults_of(SourceConfig(source=str(path)))
    assert first == f"{path}: line 1: not JSON (it is nested too deeply)"
    assert second.startswith(f"{path}: line 2: not JSON (Exceeds the limit (4300 digits)")


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"text": "a\ud800b"}, "not JSON (\\ud800 is half of a surrogate pair and no character)"),
        ({"text": "a", "\udfff": 1}, "not JSON (\\udfff is half of a surrogate pair and no character)"),
        (
            {"messages": [CHAT["messages"][0], {"role": "assistant", "tool_calls": [CALL]}]},
            "messages[1].tool_calls[0].arguments: is not JSON (\\udc00 is half of a surrogate pair and no character)",
        ),
        (CHAT | {"tools": '[{"name": "f", "description": "\\udc00"}]'}, "tools: is not JSON (\\udc00 is half of"),
        ({"question": "x?", "choices": '["a", "\\udc00"]', "answer": 0}, "choices: must be "),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_half_of_a_surrogate_pair_is_the_fault_of_its_row(
    tmp_path: Path, suffix: str, row: dict[str, Any], fault: str
) -> None:
    """JSON can write it (an emoji that was cut in two), and no tokenizer takes it."""
    source = write(tmp_path / f"a{suffix}", [row])
    [line] = faults_of(SourceConfig(source=source))
    assert line.startswith(f"{source}: {'line 1' if suffix == '.jsonl' else 'row 0'}: {fault}")


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00 \\\\ud800"}')
    [found] = load_source(SourceConfig(source=f"{tmp_path}/a.jsonl"))
    assert found.answer == "\U0001f600 \\ud800"
