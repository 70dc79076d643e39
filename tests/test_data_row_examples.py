"""Columns, templates and layouts of a user's rows; settings of data sets on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import yaml

from qdora.data.build_data import read_data, tokenized_mix
from qdora.data.example import Example
from qdora.data.sources import load_source, open_shards, open_source
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import tokenize_all
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig, SourceConfig
from qdora.recipe.recipe_file import apply_overrides, recipe_from, resolved_yaml, settings
from tests import tiny_tokenizer

TURN = {"role": "assistant", "content": "b"}
QUESTION = {"question": "1+1?", "answer": "2", "note": "x"}


def source(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> SourceConfig:
    """A source of these rows, one a line."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceConfig.model_validate({"source": str(file)} | options)


def example(tmp_path: Path, row: dict[str, Any], **options: Any) -> Example:
    [found] = load_source(source(tmp_path, row, **options))
    return found


def fault(tmp_path: Path, *rows: dict[str, Any], **options: Any) -> str:
    """The fault of the rows, without the name of the file."""
    with pytest.raises(UserError) as error:
        load_source(source(tmp_path, *rows, **options))
    [line] = error.value.faults
    return line.removeprefix(f"{tmp_path}/rows.jsonl: ")


# Columns


def test_renamed_columns(tmp_path: Path) -> None:
    columns = {"prompt": "question", "completion": "answer"}
    found = example(tmp_path, QUESTION, columns=columns)
    assert (found.prompt, found.answer) == ("1+1?", "2")
    swapped = example(
        tmp_path, {"prompt": "a", "completion": "b"}, columns={"prompt": "completion", "completion": "prompt"}
    )
    assert (swapped.prompt, swapped.answer) == ("b", "a")
    # the new name wins, and what had it is not read
    opened = open_source(source(tmp_path, {"text": "old", "body": "new", "more": 1}, columns={"text": "body"}))
    assert [each.answer for each in opened] == ["new"]
    assert opened.unused == {"text", "more"}


def test_a_column_that_is_renamed_must_be_there(tmp_path: Path) -> None:
    line = fault(tmp_path, QUESTION, columns={"prompt": "qestion", "completion": "answer"})
    assert line == "columns: no column 'qestion', there are question, answer, note. Did you mean 'question'?"
    # one that only later rows have is there; a row without it lacks what the format needs
    rows = [{"text": "x"}] * 9 + [{"text": "x", "kind": "y"}]
    assert [each.task for each in load_source(source(tmp_path, *rows, columns={"task": "kind"}))] == ["rows"] * 9 + [
        "y"
    ]
    line = fault(tmp_path, {"body": "x"}, {"other": "x"}, columns={"text": "body"})
    assert line.startswith("line 2: columns other; format text needs text.")


# Templates


def test_a_template_makes_prompt_and_completion(tmp_path: Path) -> None:
    template = {
        "prompt": "{% if context %}{{ context }}\n{% endif %}Q: {{ question | upper }}\nA:\n",
        "completion": "{% for part in parts %} {{ part['text'] }}{% endfor %}",
    }
    row = {"context": None, "question": "is it?", "parts": [{"text": "yes"}, {"text": "it is"}], "id": "n7", "left": 1}
    opened = open_source(source(tmp_path, row, template=template))
    [found] = opened
    assert (found.prompt, found.answer, found.id) == ("Q: IS IT?\nA:\n", " yes it is", "n7")
    assert opened.unused == {"left"}
    plain = example(tmp_path, {"a": "x", "n": None}, template={"prompt": "", "completion": "{{ a }}{{ n }}!"})
    assert (plain.prompt, plain.answer) == ("", "x!")
    renamed = example(
        tmp_path, {"Your Name": "x"}, columns={"who": "Your Name"}, template={"prompt": "", "completion": "{{ who }}"}
    )
    assert renamed.answer == "x"


@pytest.mark.parametrize(
    "completion, message",
    [
        ("{{ anwser }}", "template.completion: 'anwser' is undefined; the columns are question, answer, note"),
        ("{{ answer + 1 }}", "template.completion: can only concatenate str"),
        ("{{ 1 // 0 }}", "template.completion: integer division or modulo by zero"),
        (
            "{{ ''.__class__.__mro__ }}",
            "template.completion: access to attribute '__class__' of 'str' object is unsafe.",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "template.completion: maximum recursion depth exceeded"),
        ("{{ '%c' | format(55296) }}", "template.completion: \\ud800 is half of a surrogate pair and no character"),
        ("{{ question.append(1) }}", "template.completion: 'str object' has no attribute 'append'"),
        ("{{ range(10**9) | list }}", "template.completion: Range too big."),
        ("{{ note | trim('x') }}", "completion: must be text that is not empty, got ''"),
    ],
)
def test_what_a_template_cannot_do_is_the_fault_of_a_row(tmp_path: Path, completion: str, message: str) -> None:
    line = fault(tmp_path, QUESTION, template={"prompt": "{{ question }}", "completion": completion})
    assert line.startswith(f"line 1: {message}")


def document(**more: Any) -> dict[str, Any]:
    mix = [{"source": "/x.jsonl"} | more]
    return {"model": {"source": "builtin"}, "data": {"mix": mix}, "train": {"steps": 1, "batch": 1}}


@pytest.mark.parametrize(
    "given, message",
    [
        (
            {"template": {"prompt": "{{ a", "completion": "b"}},
            "data.mix[0].template.prompt: not a Jinja template (unexpected end of template",
        ),
        ({"template": {"prompt": "{{ a | nofilter }}", "completion": "b"}}, "No filter named 'nofilter'"),
        ({"template": {"prompt": "a"}}, "data.mix[0].template.completion"),
        ({"columns": {}}, "data.mix[0].columns"),
        ({"source": "org/name", "data_files": 3}, "data.mix[0].data_files"),
    ],
)
def test_what_the_settings_refuse(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_from(document(**given))
    [line] = error.value.faults
    assert message in line


def test_settings_as_text_and_overrides() -> None:
    given = {
        "source": "org/name",
        "columns": {"a": "b"},
        "template": {"prompt": "{{ a }}\n", "completion": "c"},
        "config": "main",
        "data_files": {"train": ["x-*.csv", "y.csv"], "test": "z.csv"},
        "validation": "test",
    }
    recipe = recipe_from(document(**given))
    assert recipe_from(settings(recipe)) == recipe
    assert "    - x-*.csv\n" in resolved_yaml(recipe)
    changed = apply_overrides(settings(recipe), ["data.mix[0].columns.a=d", "data.mix[0].template.prompt=e"])
    [source] = recipe_from(changed).data.mix
    assert (source.columns, source.template.prompt) == ({"a": "d"}, "e")


def test_paths_with_patterns(tmp_path: Path) -> None:
    from qdora.recipe.recipe_file import load_recipe, missing_files

    (tmp_path / "rows").mkdir()
    (tmp_path / "r.yaml").write_text(json.dumps(document(source="rows/*.jsonl")))
    recipe = load_recipe(str(tmp_path / "r.yaml"))
    assert recipe.data.mix[0].source == f"{tmp_path}/rows/*.jsonl"
    assert len(missing_files(recipe, "r.yaml")) == 1
    (tmp_path / "rows/a.jsonl").touch()
    assert missing_files(recipe, "r.yaml") == []


# Layouts

CALL = {"from": "function_call", "value": "f()"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"conversations": "x"}, "conversations: must be a list of turns {from, value}, got 'x'"),
        ({"conversations": [{"from": "human"}]}, "conversations[0]: must be an object with from and value, got"),
        (
            {"conversations": [{"from": "humam", "value": "x"}]},
            "conversations[0].from: must be one of human, user, gpt, chatgpt, assistant, system, developer, tool, "
            "observation, function_call, got 'humam'. Did you mean 'human'?",
        ),
        ({"conversations": [{"from": "human", "value": "x"}]}, "messages: no turn of role assistant"),
        (
            {"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]},
            "completion: must be text (turns only if",
        ),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "completion": [{"role": "user", "content": "y"}]},
            "completion: no turn of role assistant with content, so there is nothing to learn",
        ),
        ({"instruction": "x", "output": ""}, "output: must be text that is not empty, got ''"),
        ({"messages": '[{"role": "user", "role": "user"}]'}, "has the key 'role' twice in one object"),
    ],
)
def test_faulty_rows_of_the_layouts(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    assert fault(tmp_path, row).startswith(f"line 1: {message}")


def test_calls_in_the_layout_of_llama_factory(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "12"},
        {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'},
        {"from": "gpt", "value": "b"},
    ]
    found = example(tmp_path, {"conversations": turns, "tools": '[{"name": "f"}, {"name": "g"}]'}).messages
    assert [turn.role for turn in found] == ["user", "assistant", "tool", "assistant", "assistant"]
    assert [[call["function"]["name"] for call in turn.tool_calls] for turn in found] == [[], ["f"], [], ["f", "g"], []]
    assert found[1].tool_calls[0]["function"]["arguments"] == {"x": 1}


IMAGE_TURNS = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}]


@pytest.mark.parametrize(
    "row, options",
    [
        ({"conversations": IMAGE_TURNS, "images": ["a.png"]}, {}),
        ({"prompt": "<image>\nWhat is it?", "completion": " A cat.", "image": "a.png"}, {}),
        (
            {"q": "<image> What?", "a": "A cat.", "image": {"path": "a.png"}},
            {"template": {"prompt": "{{ q }}\n", "completion": "{{ a }}"}},
        ),
    ],
)
def test_text_that_belongs_to_images_is_a_fault(tmp_path: Path, row: dict[str, Any], options: dict[str, Any]) -> None:
    line = fault(tmp_path, row, **options)
    media = "images" if "images" in row else "image"
    assert line == f"line 1: {media}: <image> in the text stands for it, and only text is supported"
    # without an image, or without its place in the text, the text is a text
    assert example(tmp_path, row | {media: []}, **options)
    plain = json.loads(json.dumps(row).replace("<image>", ""))
    assert example(tmp_path, plain, **options)


def test_layouts_and_what_they_leave(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a", "mood": 3}, {"role": "assistant", "content": "b"}]
    opened = open_source(source(tmp_path, {"conversations": turns, "system": "s", "id": 1, "rating": 2}))
    [found] = opened
    same = zip(("system", "user", "assistant"), "sab", strict=True)
    plain = example(tmp_path, {"messages": [{"role": role, "content": text} for role, text in same]})
    assert found.messages == plain.messages
    assert opened.unused == {"conversations.mood", "rating"}
    alpaca = example(tmp_path, {"instruction": "Add.", "input": "1 and 2", "output": "3", "task": "sums"})
    assert alpaca.prompt.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert (alpaca.task, alpaca.choices) == ("sums", ())
    # with an answer it is LLM-Adapters' layout, which alone has choices
    row = {"instruction": "Choose.\n\nAnswer format: true/false", "output": "it is true", "answer": "true"}
    assert example(tmp_path, row).choices == ("it is true", "it is false")
    assert example(tmp_path, row, format="alpaca").choices == ()


@pytest.mark.parametrize(
    "row, options",
    [
        ({"prompt": "Why?\n", "completion": " the cat", "system": "Be kind."}, {}),
        ({"instruction": "Why?", "output": "the cat", "system": "Be kind.", "input": ""}, {}),
        (
            {"q": "Why?", "a": "the cat", "s": "Be kind."},
            {"columns": {"prompt": "q", "completion": "a", "system": "s"}},
        ),
        (
            {"q": "Why", "a": "the cat", "system": "Be kind."},
            {"template": {"prompt": "{{ q }}?\n", "completion": "{{ a }}"}},
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_question_and_its_answer_become_a_chat(
    tmp_path: Path, row: dict[str, Any], options: dict[str, Any], stream: bool
) -> None:
    data = DataConfig(mix=(source(tmp_path, row, chat=True, stream=stream, **options),), max_length=99)
    tokenizer, [given] = tiny_tokenizer.make(), data.mix
    if stream:
        found = ExampleStream(open_shards(given), data, 0, tokenizer)
        done = found.next()
        unused = found.unused
    else:
        opened = open_source(given)
        [done] = tokenize_all(opened, tokenizer, name="x", max_length=99).examples
        unused = opened.unused
    marks = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(done.input_ids[~done.loss_mask]) == marks
    assert tokenizer.decode(done.input_ids[done.loss_mask]) == "the cat<|im_end|>\n"
    assert unused == set()


def test_instruction_and_input_are_one_turn(tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3", "tools": [{"name": "f"}], "topic": "sums"}
    opened = open_source(source(tmp_path, row, chat=True))
    [found] = opened
    assert [(turn.role, turn.content) for turn in found.messages] == [("user", "Add.\n\n1 and 2"), ("assistant", "3")]
    assert (len(found.tools), opened.unused) == (1, {"topic"})


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {"messages": []},
            "chat: rows of format messages are chats already. Fix: remove chat, or set columns or format.",
        ),
        ({"text": "x"}, "chat: chats are made of the formats completion and alpaca and with template, not of format t"),
        ({"prompt": [], "completion": []}, "line 1: prompt: is a list of turns, and chat: true makes turns of text."),
        ({"prompt": "a", "completion": " "}, "line 1: completion: must be text that is not empty, got ' '"),
    ],
)
def test_what_cannot_become_a_chat(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    assert fault(tmp_path, row, chat=True).startswith(message)


def test_of_a_prompt_of_turns_nothing_is_learnt(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = example(tmp_path, {"prompt": asked, "completion": [{"role": "assistant", "content": "d"}]})
    assert [(turn.content, turn.in_prompt) for turn in found.messages if turn.role == "assistant"] == [
        ("b", True),
        ("d", False),
    ]
    tokenizer = tiny_tokenizer.make()
    learnt = {"answer": "d<|im_end|>", "last": "d<|im_end|>"}
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    learnt["all"] = f"{text}<|im_start|>assistant\nd<|im_end|>".removeprefix("<|im_start|>")  # the first token
    for loss_on, expected in learnt.items():
        [done] = tokenize_all([found], tokenizer, name="x", max_length=99, loss_on=loss_on).examples
        assert tokenizer.decode(done.input_ids[done.loss_mask]).rstrip("\n") == expected, loss_on
    asked[1]["weight"] = 0
    weighted = example(tmp_path, {"prompt": asked, "completion": [{"role": "assistant", "content": "d"}]})
    with pytest.raises(UserError, match=r"messages\[1\]: weight and train are not used with data.loss_on all"):
        tokenize_all([weighted], tokenizer, name="x", max_length=99, loss_on="all")


def test_columns_that_fit_no_layout_name_all_of_them(tmp_path: Path) -> None:
    line = fault(tmp_path, {"conversation": [], "kind": 1})
    assert line.startswith(
        "columns conversation, kind fit no format, allowed: choices: question, choices, answer; messages"
    )
    assert (
        "sharegpt: conversations; completion: prompt, completion; commonsense170k: instruction, output, answer; "
        in line
    )
    assert line.endswith("alpaca: instruction, output; text: text. Did you mean 'conversations'?")


@pytest.mark.parametrize(
    "columns, hint",
    [
        ("question answer", "Fix: columns: {prompt: question, completion: answer} in this source."),
        ("Question Answer topic", "Fix: columns: {prompt: Question, completion: Answer} in this source."),
        ("query response type", "Fix: columns: {prompt: query, completion: response} in this source."),
        ("problem solution answer", "Fix: columns: {prompt: problem, completion: solution} in this source."),
        (
            "instruction context response category",
            "Fix: columns: {output: response, input: context} in this source.",
        ),
        ("instruction input answer", "Fix: columns: {output: answer} in this source."),
        ("question choises answer", "Did you mean 'choices'?"),
        ("context title", "Did you mean 'text'?"),
        ("prompt;completion", "The columns seem to be separated by ';'. Fix: a .csv file needs commas."),
        (
            "prompt chosen rejected",
            "Pairs of preferences are not trained. Fix: to learn the chosen answers, set columns: {completion: chosen} "
            "in this source, or columns: {messages: chosen} if they are lists of turns.",
        ),
        (
            "chosen rejected",
            "Pairs of preferences are not trained. Fix: to learn the chosen answers, set columns: {text: chosen} in "
            "this source, or columns: {messages: chosen} if they are lists of turns.",
        ),
    ],
)
def test_columns_of_usual_data_sets_are_told_the_setting_that_reads_them(
    tmp_path: Path, columns: str, hint: str
) -> None:
    row = {name: f"{name}." for name in columns.split()}
    assert fault(tmp_path, row).endswith(f". {hint}")
    for setting in re.findall(r"columns: (\{.*?\})", hint):
        texts = "messages" not in setting
        named = row if texts else row | {"chosen": [{"role": "user", "content": "a"}, TURN]}
        assert example(tmp_path, named, columns=yaml.safe_load(setting)).task == "rows"


@pytest.mark.parametrize(
    "row, start, fix",
    [
        (
            {"prompt": "1 + 1 =", "completion": 2},
            "completion: must be text, got 2.",
            r"template: (\{.*\}) in this source",
        ),
        (
            {"prompt": "a", "completion": "b", "label": False},
            "label: false marks an",
            r"template: (\{.*\}) in this source",
        ),
    ],
)
def test_rows_of_another_kind_are_told_the_setting_that_reads_them(
    tmp_path: Path, row: dict[str, Any], start: str, fix: str
) -> None:
    line = fault(tmp_path, row)
    assert start in line
    setting = re.search(fix, line)
    assert setting is not None
    found = example(tmp_path, row, **yaml.safe_load(setting[0].removesuffix(" in this source")))
    assert (found.prompt, found.answer.strip()) == (row["prompt"], str(row["completion"]))
    assert example(tmp_path, row | {"completion": "b", "label": True}).answer == "b"


def test_a_column_that_the_format_does_not_read_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, TURN]
    row = {"dialog": turns, "sys": "Be brief.", "fns": None}
    line = fault(tmp_path, row, columns={"messages": "dialog", "system": "sys"}, format="messages")
    assert line.startswith("columns: format messages reads no 'system', it reads messages, tools, task, id. Fix: ")
    found = example(tmp_path, row, columns={"conversations": "dialog", "system": "sys"}, format="sharegpt")
    assert [turn.role for turn in found.messages] == ["system", "user", "assistant"]
    line = fault(
        tmp_path, row | {"p": "a", "c": "b"}, columns={"prompt": "p", "completion": "c", "sistem": "sys"}, chat=True
    )
    assert line.endswith("Did you mean 'system'?")
    assert example(tmp_path, row | {"p": "a", "c": "b"}, columns={"prompt": "p", "completion": "c", "id": "sys"})


def test_unwanted_answers_are_refused_in_chats_and_as_text_too(tmp_path: Path) -> None:
    row = {"prompt": "a", "completion": "b", "label": False}
    assert "label: false marks" in fault(tmp_path, row, chat=True)
    assert "label: false marks" in fault(tmp_path, row | {"label": "False"})
    assert example(tmp_path, row | {"label": 0}).answer == "b"


# The Hub


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(source: str, **options: Any) -> Any:
        asked.append((source, options))
        table = datasets.Dataset.from_list([QUESTION] * 3)
        return table.to_iterable_dataset() if options.get("streaming") else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    template = {"prompt": "{{ question }}", "completion": " {{ answer }}"}
    given = {"source": "openai/gsm8k", "template": template, "revision": "abc"}
    [first, *_] = load_source(SourceConfig(**given, config="main"))
    assert (first.prompt, first.answer) == ("1+1?", " 2")
    files = {"train": ["a-*.jsonl", "b.jsonl"], "test": "c.jsonl"}
    load_source(SourceConfig(**given, data_files=files, validation="test"), "test")
    load_source(SourceConfig(**given, data_files="a.jsonl"))
    load_source(SourceConfig(**given, data_files="a.jsonl", split="train[:9]", validation="train[9:]"), "train[9:]")
    shards = open_shards(SourceConfig(**given, config="main", data_files=("a.jsonl", "b.jsonl"), stream=True))
    common = {"revision": "abc"}
    assert asked == [
        ("openai/gsm8k", common | {"split": "train", "name": "main"}),
        ("openai/gsm8k", common | {"split": "test", "data_files": files}),
        ("openai/gsm8k", common | {"split": "train", "data_files": {"train": "a.jsonl"}}),
        ("openai/gsm8k", common | {"split": "train[9:]", "data_files": {"train": "a.jsonl"}}),
        (
            "openai/gsm8k",
            common
            | {"split": "train", "name": "main", "data_files": {"train": ["a.jsonl", "b.jsonl"]}, "streaming": True},
        ),
    ]
    assert shards.num_rows is None
    [name] = shards.names
    assert "abc main" in name
    plain = open_shards(SourceConfig(**given, stream=True))
    assert plain.names[0].startswith("openai/gsm8k@abc train 0")


class _Counted:
    """A data set on the Hub of many rows, which says how often a row of it was read."""

    num_shards, info, _fingerprint = 1, datasets.DatasetInfo(), "abc"

    def __init__(self, num_rows: int) -> None:
        self.indices, self.reads = range(num_rows), list[int]()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return iter(self.select(self.indices))

    def select(self, indices: Iterable[int]) -> Iterable[dict[str, str]]:
        for index in indices:
            self.reads.append(int(index))
            yield {"prompt": f"{index}:", "completion": " yes"}

    def shard(self, *_: int) -> _Counted:
        return self

    def skip(self, num: int) -> Iterable[dict[str, str]]:
        return self.select(self.indices[num:])


@pytest.mark.parametrize("options", [{"limit": 100}, {"stream": True, "shuffle_window": 100}], ids=str)
def test_few_rows_of_a_large_data_set_on_the_hub_are_read(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """What is drawn, and at the beginning the rows that show the layout and the lengths."""
    hub = _Counted(200_000)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    fraction = {} if "stream" in options else {"validation_fraction": 0.0}
    data = DataConfig(mix=(SourceConfig(source="org/name", **options),), max_length=99, **fraction)
    [found] = tokenized_mix(SimpleNamespace(data=data), tiny_tokenizer.make(), read_data(data)[0]).sets
    if isinstance(found, ExampleStream):
        drawn = [found.next() for _ in range(100)]
        assert {int(each.id.rpartition(" ")[2]) for each in drawn} == set(range(100))
    else:
        assert len(found) == 100
        assert len(set(hub.reads[64:])) == 100
        assert max(hub.reads) > 100_000
    assert len(hub.reads) <= 100 + 2 * 64 + 1


def test_a_stream_with_columns_and_a_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer.make()

    def stream(**options: Any) -> ExampleStream:
        config = source(tmp_path, *[QUESTION] * 3, stream=True, **options)
        data = DataConfig(mix=(config,), max_length=99)
        [made] = tokenized_mix(SimpleNamespace(data=data), tokenizer, [()]).sets
        return made

    templated = stream(template={"prompt": "{{ question }}", "completion": " {{ answer }}"})
    renamed = stream(columns={"prompt": "question", "completion": "answer"})
    assert tokenizer.decode(templated.next().input_ids) == "1+1? 2<|im_end|>"
    assert tokenizer.decode(renamed.next().input_ids) == "1+1?2<|im_end|>"
    assert templated.unused == renamed.unused == {"note"}
    other = stream(template={"prompt": "{{ question }} ", "completion": "{{ answer }}"})
    assert len({json.dumps(each.fingerprint()["settings"]) for each in (templated, renamed, other)}) == 3
