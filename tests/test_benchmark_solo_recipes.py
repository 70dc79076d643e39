"""Solo and leave-one-out recipes: the same steps, the same examples of each source, and nothing else changed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from qdora.data.build_data import make_loader, read_data, tokenized_mix
from qdora.errors import UserError
from qdora.recipe.recipe_file import recipe_from, settings
from qdora.recipe.settings import Recipe
from tests import tiny_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from solo_recipes import leave_one_out_recipes, solo_recipes


def combined(root: Path, *, train: dict[str, Any] | None = None, **data: Any) -> Recipe:
    """Three sources of 40 sums; of each 12 examples, so that six steps of two see every one once."""
    mix = []
    for number, name in enumerate(("a", "b", "c")):
        file = root / f"{name}.jsonl"
        rows = [{"prompt": f"{name} {index} +", "completion": f" {index + number}"} for index in range(40)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        mix.append({"source": str(file), "limit": 12})
    document = {
        "model": {"source": "builtin"},
        "data": {"mix": mix, "strategy": "equal", "seed": 3} | data,
        "train": train or {"steps": 6, "batch": 6},
    }
    return recipe_from(document)


def seen(recipe: Recipe) -> list[Counter[str]]:
    """The examples of each step."""
    tokenizer = tiny_tokenizer.make()
    loader = make_loader(recipe, tokenized_mix(recipe, tokenizer, read_data(recipe.data)[0]), tokenizer)
    assert recipe.train.steps is not None
    steps = [loader.next_step() for _ in range(recipe.train.steps)]
    return [
        Counter(tokenizer.decode(ids) for micro in step.micro_batches for _, ids, _ in micro.examples())
        for step in steps
    ]


def test_solo_runs_together_see_what_the_combined_run_sees(tmp_path: Path) -> None:
    recipe = combined(tmp_path)
    solo = {label: seen(part) for label, part in solo_recipes(recipe, [1, 1, 1]).items()}
    whole = seen(recipe)
    assert list(solo) == ["a", "b", "c"]
    assert all(len(steps) == len(whole) == 6 for steps in solo.values())
    assert all(step.total() == 2 for steps in solo.values() for step in steps)
    assert sum((step for steps in solo.values() for step in steps), Counter()) == sum(whole, Counter())
    assert max(sum(whole, Counter()).values()) == 1


def test_without_a_source_the_others_see_what_they_saw(tmp_path: Path) -> None:
    recipe = combined(tmp_path)
    for label, part in leave_one_out_recipes(recipe, [1, 1, 1]).items():
        steps = seen(part)
        assert len(steps) == 6
        assert all(step.total() == 4 for step in steps)
        others = Counter(text for text in sum(seen(recipe), Counter()) if not text.startswith(label))
        assert sum(steps, Counter()) == others


def test_only_sources_and_the_size_of_a_step_change(tmp_path: Path) -> None:
    recipe = combined(tmp_path)
    (first, *_) = solo_recipes(recipe, [1, 1, 1]).values()
    expected = settings(recipe)
    expected["data"]["mix"] = expected["data"]["mix"][:1]
    expected["train"]["batch"] = 2
    assert settings(first) == expected


def test_settings_that_mean_nothing_in_a_part_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text('{"prompt": "a 1 +", "completion": " 1"}\n')
    plain = settings(combined(tmp_path))
    plain["data"]["mix"][0]["validation"] = str(tmp_path / "held.jsonl")
    plain["data"]["validation_fraction"] = 0.2
    plain["eval"] = {"tasks": ["b"], "limit": 3}
    solo = solo_recipes(recipe_from(plain), [1, 1, 1])
    assert solo["a"].eval.tasks == ()
    assert solo["b"].eval.limit == 3
    assert "validation_fraction" not in settings(solo["a"])["data"]
    assert settings(solo["b"])["data"]["validation_fraction"] == 0.2


def test_steps_of_tokens_are_shared_out(tmp_path: Path) -> None:
    train = {"steps": 5, "tokens_per_step": 1000, "micro_batch_tokens": 600}
    recipe = combined(tmp_path, train=train, strategy="proportional", max_length=64)
    solo = solo_recipes(recipe, [0.5, 0.3, 0.2])
    assert [part.train.tokens_per_step for part in solo.values()] == [500, 300, 200]
    assert {part.train.micro_batch_tokens for part in solo.values()} == {"auto"}
    without = leave_one_out_recipes(recipe, [0.5, 0.3, 0.2])
    assert [part.train.tokens_per_step for part in without.values()] == [500, 700, 800]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        solo_recipes(combined(tmp_path), [0.5, 0.3, 0.2])
    assert [fault.split(":")[1].split(" has")[0] for fault in error.value.faults] == [" b", " c"]
    assert "c has 1.2 of 6 examples in a step, allowed: a batch that gives every source a whole" in str(error.value)
    with pytest.raises(UserError, match=r"train\.steps: .*got train\.epochs"):
        solo_recipes(combined(tmp_path, train={"epochs": 1, "batch": 6}), [1, 1, 1])
    (alone, *_) = solo_recipes(combined(tmp_path), [1, 1, 1]).values()
    with pytest.raises(UserError, match=r"data\.mix: nothing is left without a"):
        leave_one_out_recipes(alone, [1])


def test_remedies_go_with_the_other_tasks(tmp_path: Path) -> None:
    plain = settings(combined(tmp_path))
    plain["data"]["mix"][1]["loss_weight"] = 2.0
    plain["interference"] = {"every": 5}
    recipe = recipe_from(plain)
    solo, without = solo_recipes(recipe, [1, 1, 1]), leave_one_out_recipes(recipe, [1, 1, 1])
    assert all(part.data.mix[0].loss_weight is None for part in solo.values())
    assert all(part.interference.every is None for part in solo.values())
    assert without["a"].data.mix[0].loss_weight == 2.0
    assert without["a"].interference == recipe.interference
