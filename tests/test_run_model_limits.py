"""What is refused or said before a run loads its model: unknown tokens, few positions, what nothing can score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import LlamaConfig, MambaConfig

from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.errors import UserError
from qdora.run.model_limits import context_warnings, vocabulary_faults
from qdora.run.train import train_run
from tests import tiny_run, tiny_tokenizer

QUIET = Console(quiet=True)


def tokens(name: str, *examples: list[int]) -> TokenizedSet:
    made = [TokenizedExample(name, "0", np.array(ids, np.int32), np.ones(len(ids), np.bool_)) for ids in examples]
    return TokenizedSet(name, tuple(made))


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_tokens_without_a_row_in_the_embedding_are_faults() -> None:
    sources = [tokens("fits", [0, 9]), tokens("beyond", [1], [10, 2]), tokens("empty")]
    config = LlamaConfig(vocab_size=10)
    (fault,) = vocabulary_faults(sources, config, 0)
    assert fault.startswith("model.tokenizer: source 'beyond' has token id 10, and the model's embedding has 10 rows.")
    assert vocabulary_faults(sources, config, 1) == []  # a token of model.add_tokens


def test_examples_longer_than_the_positions_are_told() -> None:
    sources = [tokens("fits", [0] * 8), tokens("long", [0] * 9, [0] * 12, [0])]
    (text,) = context_warnings(sources, LlamaConfig(max_position_embeddings=8))
    assert text.startswith("long: 2 of 3 examples are longer than the model has positions (up to 12 tokens, ")
    assert context_warnings(sources, LlamaConfig(max_position_embeddings=12)) == []
    assert context_warnings(sources, MambaConfig()) == []  # no limit


def test_a_run_tells_both_before_its_model_is_loaded(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path / "model", max_position_embeddings=16)
    source = write(tmp_path / "long.jsonl", *[{"prompt": f"{n} " * 20, "completion": " yes"} for n in range(20)])
    train_run(
        tiny_run.recipe(tmp_path, data__mix=[{"source": source}], train__steps=1), tmp_path / "run", console=QUIET
    )
    log = (tmp_path / "run/log.txt").read_text()
    assert "WARNING long: 19 of 19 examples are longer than the model has positions" in log
    assert log.index("has positions") < log.index("Training ")
    tiny_run.write_model(tmp_path / "small/model", vocab_size=100)
    with pytest.raises(UserError, match=r"source 'long' has token id .*embedding has 100 rows"):
        train_run(tiny_run.recipe(tmp_path / "small", data__mix=[{"source": source}]), tmp_path / "small/run")


@pytest.mark.parametrize("evaluates", [True, False])
def test_validation_data_that_cannot_be_scored_is_refused_before_the_first_step(
    tmp_path: Path, evaluates: bool
) -> None:
    tiny_tokenizer.make(
        chat_template="{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('never no') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ).save_pretrained(tiny_run.write_model(tmp_path / "model"))

    def chat(answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}

    mix = {
        "source": write(tmp_path / "chat.jsonl", *[chat("yes")] * 8),
        "validation": write(tmp_path / "held.jsonl", chat("yes"), chat("no")),
    }
    when = {"every": 2, "at_start": False} if evaluates else {"at_start": False, "at_end": False}
    changes = {f"eval__{name}": value for name, value in when.items()}
    recipe = tiny_run.recipe(tmp_path, data__mix=[mix], eval__limit=None, train__steps=2, **changes)
    if evaluates:
        with pytest.raises(UserError) as caught:
            train_run(recipe, tmp_path / "run", console=QUIET)
        assert caught.value.faults == (
            f"validation data ({tmp_path / 'held.jsonl'}): chat: example 2: the chat template refuses it: never no",
        )
        assert not (tmp_path / "run").exists()
    else:
        train_run(recipe, tmp_path / "run", console=QUIET)


def test_a_warmup_longer_than_the_epochs_is_refused(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path, train__steps=..., train__epochs=1, train__warmup=1000)
    with pytest.raises(UserError, match=r"train\.warmup: must be at most the \d+ steps of train\.epochs, got 1,000"):
        train_run(recipe, tmp_path / "run", console=QUIET)
