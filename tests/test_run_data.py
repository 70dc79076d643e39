"""What is said of a run's data before it trains: preview, checks of the start, limits of the model."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from qdora.cli import app
from qdora.data.chats import set_chat_settings
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig, SourceConfig
from qdora.recipe.recipe_file import load_recipe, resolved_yaml
from qdora.recipe.settings import Recipe
from qdora.run import preview as preview_file
from qdora.run.prepare import example_checks, repeated_checks
from qdora.run.preview import visible
from qdora.run.run import train_run
from tests import support
from tests.data_rows import load_source, mixed, says, write

QUIET = Console(quiet=True)
NOT_EVALUATED: dict[str, Any] = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
# Only the last answer keeps its thinking, so that a chat of two answers gives two examples.
FORGETTING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat(*turns: str, **more: Any) -> dict[str, Any]:
    """Turns of the user and of the assistant, which have `more`."""
    kinds: list[dict[str, Any]] = [{"role": "user"}, {"role": "assistant", **more}]
    return {"messages": [kinds[number % 2] | {"content": text} for number, text in enumerate(turns)]}


def recipe_file(root: Path, tmp_path: Path, **changes: Any) -> Path:
    file = tmp_path / "r.yaml"
    file.write_text(resolved_yaml(support.tiny_recipe(root, **changes)))
    return file


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


def train(root: Path, run: Path, *, resume: bool = False, **changes: Any) -> str:
    """Train, and return the log."""
    train_run(support.tiny_recipe(root, **changes), run, resume=resume, console=QUIET)
    return (run / "log.txt").read_text()


def refusal(recipe: Recipe, run: Path) -> list[str]:
    with pytest.raises(UserError) as error:
        train_run(recipe, run, console=QUIET)
    assert not run.exists()
    return list(error.value.faults)


DAMAGE: dict[str, Callable[[int, str], str]] = {
    "not JSON": lambda index, line: line + "}" if index % 4 == 0 else line,
    "other columns": lambda _, line: line.replace("completion", "reply"),
    "other content": lambda _, line: line.replace('": " ', '": 1, "x": "'),
    "too long": lambda _, line: line,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_faulty_and_long_rows_are_refused(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"data__max_length": 8} if kind == "too long" else {"data__validation_fraction": 0.2}
    file, sums = recipe_file(tmp_path, tmp_path, **changes), tmp_path / "data/sums.jsonl"
    sums.write_text("\n".join(DAMAGE[kind](*each) for each in enumerate(sums.read_text().splitlines())))
    faults = refusal(load_recipe(file), tmp_path / "run")
    if kind == "too long":
        assert [fault.split(": ")[:2] for fault in faults] == [["data.mix[0]", "sums"]]
    else:
        assert all("data/sums.jsonl: " in line or line.endswith(" more") for line in faults)
    found = invoke("preview", file)
    assert (found.exit_code, found.stderr == "") == ((1, True) if kind == "too long" else (2, False))


@pytest.mark.parametrize("verb", ["preview", "plan", "train"])
def test_a_model_is_refused_before_the_data_is_read(tmp_path: Path, verb: str) -> None:
    file, config = recipe_file(tmp_path, tmp_path, data__max_length=8), tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    found = invoke(verb, file, *(["-d", tmp_path / "run"] if verb == "train" else []))
    assert (found.exit_code, "data.max_length" in found.stderr) == (2, False)
    assert says(found.stderr, "model.source: awq ... 4 bits ... got None")


EVIL = "<script>alert('x')</script>"
CHAT = chat("Is the sky blue?", "yes", "no\u200b", EVIL)["messages"]
CHAT[1]["train"] = False
ROWS = [{"prompt": f"{number}:", "completion": " yes" * number} for number in range(1, 31)]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights."""
    root = tmp_path_factory.mktemp("preview")
    for weights in support.write_llama(root / "model").glob("*.safetensors"):
        weights.unlink()
    return root


def shown(bare: Path, tmp_path: Path, rows: Sequence[dict[str, Any]], *options: str, code: int = 0, **changes: Any):  # type: ignore[no-untyped-def]
    """What preview prints of one source of these rows, and its document of the source."""
    changes = {"data__mix": [{"source": write(tmp_path / "own.jsonl", list(rows))}]} | changes
    file = recipe_file(bare, tmp_path, **{"data__validation_fraction": 0.0} | changes)
    plain, document = invoke("preview", file, *options), invoke("preview", file, *options, "--json")
    assert plain.exit_code == document.exit_code == code, document.stderr
    return plain.stdout, json.loads(document.stdout)["sources"][0]


@cache
def sizes() -> np.ndarray[Any, Any]:
    """(rows, 2): tokens of ROWS, and tokens in the loss; an end mark follows the completion."""
    tokenizer = support.tokenizer()
    texts = [(row["prompt"], row["prompt"] + row["completion"]) for row in ROWS]
    counts = [[len(tokenizer(text)["input_ids"]) for text in pair] for pair in texts]
    return np.array([(whole + 1, whole + 1 - prompt) for prompt, whole in counts])


def test_the_numbers_are_those_of_the_data(bare: Path, tmp_path: Path) -> None:
    _, source = shown(bare, tmp_path, ROWS, "-n", "2")
    assert (source["num_rows"], source["num_rows_read"], source["drawn"], source["num_examples"]) == (30, 30, "all", 30)
    assert [source["num_tokens"], source["num_in_loss"]] == sizes().sum(axis=0).tolist()
    lengths, named = sizes()[:, 0].tolist(), source["lengths"]
    assert [named[each] for each in ("shortest", "median", "longest")] == [sorted(lengths)[n] for n in (0, 14, 29)]
    examples = [(example["id"], example["num_tokens"]) for example in source["examples"]]
    assert examples == [("1", lengths[0]), ("2", lengths[1])]
    limit = int(np.median(lengths))
    num_long = int((sizes()[:, 0] > limit).sum())
    for too_long, num_examples, num_cut, num_dropped in (
        ("error", 30 - num_long, 0, 0),
        ("truncate", 30, num_long, 0),
        ("drop", 30 - num_long, 0, num_long),
    ):
        changes, is_refused = {"data__max_length": limit, "data__too_long": too_long}, too_long == "error"
        text, source = shown(bare, tmp_path, ROWS, code=int(is_refused), **changes)
        assert (source["num_too_long"], source["lengths"]["longest"]) == (num_long, max(lengths))
        counts = source["num_examples"], source["num_cut"], source["num_dropped"]
        assert counts == (num_examples, num_cut, num_dropped)
        assert f"{num_long} longer than data.max_length" in text
        assert ("A run with this data is refused." in text) == bool(source["faults"]) == is_refused
    shown(bare, tmp_path, ROWS, code=1, data__max_length=2, data__too_long="drop")  # nothing is left
    mix = [{"source": write(tmp_path / "own.jsonl", [{"prompt": 1}, {"messages": "no"}])}]
    faulty = invoke("preview", recipe_file(bare, tmp_path, data__mix=mix), "--json")
    assert (faulty.exit_code, faulty.stdout) == (2, "")
    assert all(line.startswith("data.mix[0]: ") for line in faulty.stderr.splitlines())


def test_a_chat_with_a_turn_that_is_not_learnt(bare: Path, tmp_path: Path) -> None:
    shown_text, source = shown(bare, tmp_path, [{"messages": CHAT, "id": EVIL, "more": 1}])
    pieces = source["examples"][0]["pieces"]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in CHAT)
    assert "".join(piece["text"] for piece in pieces) == text
    learnt = "".join(piece["text"] for piece in pieces if piece["in_loss"])
    assert learnt.rstrip("\n") == f"{EVIL}<|im_end|>"
    assert {piece["text"] for piece in pieces if piece["is_special"]} == {"<|im_start|>", "<|im_end|>"}
    assert source["warnings"][-1] == "not used for training: more."
    for words in ("⟦<│", "«<|im_end|>»", "\\u200b", "not used for training: more."):
        assert words in shown_text
    assert not {"\u200b", "\x1b"} & set(shown_text)


def test_large_sources(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_file, "MOST_ROWS", 10)
    text, source = shown(bare, tmp_path, ROWS)
    assert (source["num_rows"], source["num_rows_read"], source["drawn"]) == (30, 10, "sample")
    assert "sample rows: 10 of 30; " in text
    own = tmp_path / "streamed.jsonl"
    own.write_text("not json\n" + (tmp_path / "own.jsonl").read_text())
    mix = [{"source": str(own), "stream": True}]
    _, source = shown(bare, tmp_path, ROWS, data__mix=mix, data__too_long="truncate", data__validation_fraction=...)
    assert (source["num_rows_read"], source["num_examples"], source["drawn"]) == (31, 30, "first")
    assert (source["num_tokens"], source["lengths"]["longest"]) == (sizes()[:, 0].sum(), sizes()[-1, 0])
    assert len(source["faults"]) == 1
    (tmp_path / "chat.jinja").write_text(FORGETTING)  # of two answers it makes two examples, of which one is shown
    rows = [chat(*["Why?", "yes"] * number, reasoning_content="the cat") for number in (2, 1)]
    _, source = shown(bare, tmp_path, rows, "-n", "2", data__chat_template=f"{tmp_path}/chat.jinja")
    assert source["num_examples"] == 3
    assert [example["id"].partition("[")[0] for example in source["examples"]] == ["1", "2"]


FAQ = "Question,Answer,note\nWhy?,So.,\nHow?,Thus.,\n"
# Text of a file, its ending, --columns, the format that is found, and its columns.
FOUND: list[tuple[str, str, str, str, dict[str, str] | None]] = [
    (FAQ, "csv", "", "completion", {"prompt": "Question", "completion": "Answer"}),
    (FAQ.replace("Answer", "xyz"), "csv", "prompt=Question,completion=xyz", "completion",
     {"prompt": "Question", "completion": "xyz"}),
    ("body\none text\nanother\n", "csv", "", "text", {"text": "body"}),
    ("prompt\tcompletion\na\tb\nc\td\n", "tsv", "", "completion", None),
    (json.dumps([{"instruction": "a", "output": "b"}] * 2), "json", "", "alpaca", None),
    ("One.\n\nTwo.\n", "txt", "", "text", None),
    ('{"question": "?", "choices": ["a", "b"], "answer": 1}\n' * 2, "jsonl", "", "choices", None),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(FOUND)))
def test_init_writes_a_recipe_that_previews_and_trains(bare: Path, tmp_path: Path, case: int) -> None:
    text, ending, given_columns, expected, columns = FOUND[case]
    (tmp_path / f"own.{ending}").write_text(text)
    model = str(support.write_llama(tmp_path / "model") if case == 0 else bare / "model")
    out = tmp_path / "deep" / "mine.yaml"
    options = ["--columns", given_columns] if given_columns else []
    done = invoke("init", str(tmp_path / f"own.{ending}"), "--model", model, "-o", str(out), "--json", *options)
    assert done.exit_code == 0, done.stderr
    (source,) = json.loads(done.stdout)["sources"]
    assert (source["format"], source["settings"].get("columns"), source["rows"]) == (expected, columns, 2)
    recipe = load_recipe(str(out))
    assert recipe.data.mix[0].chat == (expected in ("completion", "alpaca"))
    assert source["longest"] <= recipe.data.max_length == 128
    if case == 0:
        train_run(load_recipe(str(out), ["train.steps=2", "eval.at_start=false"]), tmp_path / "run")
    assert invoke("init", "x.csv", "-o", str(out)).exit_code == 2


def test_init_without_a_tokenizer_and_with_columns_that_it_cannot_read(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("a,b\none,two\nx,y\n")
    refused = invoke("init", str(tmp_path / "own.csv"), "--model", str(bare / "model"), "-o", str(tmp_path / "a.yaml"))
    assert (refused.exit_code, "--columns prompt=a,completion=b" in refused.stderr) == (2, True)
    (tmp_path / "semi.csv").write_text("a;b\none;two\n")
    refused = invoke("init", str(tmp_path / "semi.csv"), "--model", str(bare / "model"), "-o", str(tmp_path / "a.yaml"))
    assert (refused.exit_code, "semicolons" in refused.stderr) == (2, True)
    (tmp_path / "faq.csv").write_text(FAQ)
    done = invoke("init", str(tmp_path / "faq.csv"), "--model", "org/none", "-o", str(tmp_path / "a.yaml"))
    assert (done.exit_code, "third of the characters" in done.stdout) == (0, True)


@settings(max_examples=40)
@given(st.text())
def test_no_character_of_a_visible_text_hides(text: str) -> None:
    for character in visible(text):
        assert character in " \n\t" or unicodedata.category(character)[0] not in "CZ"
    assert visible(text).count("⏎\n") >= text.count("\n")
    assert visible("a b\n\té") == "a b⏎\n⇥\té"
    assert visible("\u202eabc\u200b\x00\ud800\U000e0001\xa0") == "\\u202eabc\\u200b\\x00\\ud800\\U000e0001\\xa0"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = support.tokenizer(more=["<think>"] * 50)
    set_chat_settings(made, stop_ids=frozenset({made.eos_token_id}))
    return made


def said(tokenizer: Any, *examples: str, **data: Any) -> list[str]:
    """state: text of the checks of one source. Every second part of an example is learnt; # is the end of a turn."""
    made = []
    for example in examples:
        ids: list[int] = []
        mask: list[bool] = []
        for number, text in enumerate(example.replace("#", "<|im_end|>").split("^")):
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            mask += [number % 2 == 1] * (len(ids) - len(mask))
        made.append(TokenizedExample("t", "0", np.array(ids, dtype=np.int32), np.array(mask, dtype=np.bool_)))
    part = TokenizedSet("s", tuple(made))
    config = DataConfig.model_validate({"mix": [{"source": "x.jsonl"}], **data})
    checks = example_checks([part], tokenizer, config)
    return [f"{check.state}: {check.text}" for check in checks]


def test_answers_that_end_and_say_something(tokenizer: Any) -> None:
    why, ends, cut = "Why did the dog sit?^", "Why?^the three answers#", "Why?^the three answers"
    two = f"{why}yes#\n^{why}a long answer#"
    assert said(tokenizer, ends, two) == [
        "passed: s: 0 of 3 answers do not end with a stop token (<|im_end|>).",
        "passed: s: 0 of 2 examples have no token in the loss.",
    ]
    few = "passed: s: 1 of 3 answers do not end with a stop token (<|im_end|>)."
    assert few in said(tokenizer, ends, ends, cut)
    early, asked = f"{why}no#and then the dog sat on the cat", "Why#^the cat"
    most = "warning: s: 3 of 4 answers do not end with a stop token (<|im_end|>)."
    assert said(tokenizer, ends, cut, early, asked)[0] == most
    plain = "^the cat sat on the mat"  # plain text may end anywhere
    assert not [text for text in said(tokenizer, plain) if "stop token" in text]
    assert said(tokenizer, plain, loss_on="all")[0].startswith("warning: s: 1 of 1 answers do not end")
    assert "warning: s: 2 of 3 examples have no token in the loss." in said(tokenizer, "Why?", ends, "Why?")
    first, *_ = said(support.tokenizer(), cut)
    assert first == "warning: s: 1 of 1 answers do not end with a stop token (the model names none)."


def test_a_run_tells_what_it_checked_once(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changes: dict[str, Any] = {"data__packing": True}
    log = train(root, run, train__steps=1, **changes)
    starts = ("sums: 0 of", "letters: 0 of", "packed examples stay apart")
    assert [log.count(f" Checked: {start}") for start in starts] == [2, 2, 1]
    log = train(root, run, resume=True, train__steps=4, **changes)


def test_tokens_that_the_base_never_learnt(tmp_path: Path) -> None:
    model = support.write_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    ids = support.tokenizer().convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<s>"])
    weights["model.embed_tokens.weight"][ids] = 0.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    source = write(tmp_path / "c.jsonl", [chat("2 + 2?", "4")])
    data = {"data__mix": [{"source": source}], "data__validation_fraction": 0, "train__steps": 1}
    log = train(tmp_path, tmp_path / "run", **data | NOT_EVALUATED)
    text = "the training data has tokens that the base never learnt: <|im_start|>, <|im_end|>. Their rows"
    assert f" {text}" in log


def test_a_run_that_evaluates_nothing_says_so(root: Path, tmp_path: Path) -> None:
    words = "no source has validation data, so nothing is evaluated."
    for tasks, is_told in ((None, True), ([], False)):
        changes: dict[str, Any] = {"eval__tasks": tasks, "data__validation_fraction": 0, "train__steps": 1}
        log = train(root, tmp_path / f"run {tasks}", **changes | ({} if is_told else {"eval__limit": ...}))
        assert (words in log) == is_told


def repeated(
    folder: Path, tokenizer: Any, trained: list[Any], held: dict[str, list[Any]], look_up: Any = None, **data: Any
) -> list[str]:
    """Each row of `trained` is a source; which sources of `held` have how many copies of them, "name: n of m"."""

    def sources(where: str, rows: list[Any]) -> list[SourceConfig]:
        files = (write(folder / where / f"{number}.jsonl", [row]) for number, row in enumerate(rows))
        return [SourceConfig(source=file) for file in files]

    config = DataConfig.model_validate(
        {"mix": sources("trained", trained), "validation_fraction": 0.0, "cache": "off", **data}
    )
    sets = mixed(config, tokenizer).sets
    scored = {name: [each for s in sources(name, rows) for each in load_source(s)] for name, rows in held.items()}
    checks = repeated_checks(sets, scored, look_up or tokenizer, config)
    assert all(check.state == "warning" for check in checks)
    return [check.text.partition(" are")[0] for check in checks]


def test_validation_examples_that_are_trained_on_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    """Whichever source trains on them. What is cut or cannot be encoded is no copy; a chat in parts is if all are."""
    texts = [{"prompt": f"the dog {word}", "completion": " sat"} for word in ("a", "b", "c")]
    chats = [chat(word, "sat") for word in ("a", "b", "c")]
    choices = [{"question": "the dog?", "choices": ["sat", "b"], "answer": right} for right in (0, 1)]
    held = {
        "texts": [*texts[1:], texts[0], {"prompt": "the dog b", "completion": " ran"}],
        "chats": chats[2:],
        "choices": [choices[0], choices[0], chats[0], choices[1]],
    }
    found = repeated(tmp_path / "a", tokenizer, [*texts[1:], *chats[:2], choices[0]], held)
    looked = "of 4 validation examples looked up"
    assert found == [f"texts: {looked}, 2", f"choices: {looked}, 3"]
    long, short, cut = "the dog " * 20, {"text": "the dog"}, {"max_length": 16, "too_long": "truncate"}
    trained = [{"text": f"{long}sat"}, short]
    held = {"texts": [{"text": f"{long}ran"}], "chats": [chat("a", "b")], "short": [short]}
    plain = support.tokenizer(chat_template=None, more=["<think>"] * 50)
    found = repeated(tmp_path / "b", tokenizer, trained, held, look_up=plain, **cut)
    assert found == ["short: of 1 validation examples looked up, 1"]
    one, two = (chat("a", "b", *more, reasoning_content="c") for more in ((), ("d", "e")))
    made = support.tokenizer(chat_template=FORGETTING)
    found = repeated(tmp_path / "d", made, [one], {"one": [one], "two": [two]})
    assert found == ["one: of 1 validation examples looked up, 1"]


def test_limits_of_the_model_and_of_the_steps(tmp_path: Path) -> None:
    source = write(tmp_path / "long.jsonl", [{"prompt": f"{n} " * 20, "completion": " yes"} for n in range(20)])
    support.write_llama(tmp_path / "small/model", vocab_size=100)
    (fault,) = refusal(support.tiny_recipe(tmp_path / "small", data__mix=[{"source": source}]), tmp_path / "small/run")
    assert says(fault, "model.tokenizer: source 'long' has token id ... and the model's embedding has 100 rows.")
    epochs: dict[str, Any] = NOT_EVALUATED | {"train__steps": ..., "train__epochs": 1}
    (fault,) = refusal(support.tiny_recipe(tmp_path, **epochs, train__warmup=14), tmp_path / "other")
    assert says(fault, "train.warmup: must be at most the 13 steps ... got 14")  # 50 examples, 4 at a time
    train(tmp_path, tmp_path / "longest", **epochs, train__warmup=13)


@pytest.mark.parametrize("evaluates", [True, False])
def test_validation_data_that_cannot_be_scored_is_refused(tmp_path: Path, evaluates: bool) -> None:
    never = "{% for m in messages if m.content == 'no' %}{{ raise_exception('never no') }}{% endfor %}"
    tokenizer = support.tokenizer(chat_template=never + support.CHATML)
    tokenizer.save_pretrained(support.write_llama(tmp_path / "model"))
    source = write(tmp_path / "chat.jsonl", [chat("Hi", "yes")] * 8)
    held = write(tmp_path / "held.jsonl", [chat("Hi", "yes"), chat("Hi", "no")])
    when = {"eval__every": 2, "eval__at_start": False} if evaluates else NOT_EVALUATED
    changes = {"data__mix": [{"source": source, "validation": held}], "train__steps": 2, **when, "eval__limit": None}
    if evaluates:
        text = "validation data: chat: example 2: the chat template refuses it: never no"
        assert refusal(support.tiny_recipe(tmp_path, **changes), tmp_path / "run") == [text]
    else:
        train(tmp_path, tmp_path / "run", **changes)
