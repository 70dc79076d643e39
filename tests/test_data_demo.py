"""The built-in demo data: the same everywhere, disjoint splits, and nothing to win by a trick."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from qdora.data import demo
from qdora.data.example import Example
from qdora.errors import UserError

FAMILIES = ("facts", "odd", "cause", "howto", "next")
SIZES = {"train": 400, "validation": 80, "test": 160}
NUM_CHOICES = {"facts": 2, "odd": 4, "cause": 2, "howto": 2, "next": 4}
LISTS = [(family, split) for family in FAMILIES for split in SIZES]

# Fixed on purpose: a changed table changes every published number on the demo data. Say so in the changelog.
DIGESTS = {
    ("facts", "train"): "ef50eaf17a42132b",
    ("facts", "validation"): "3429ab219b1ab8b7",
    ("facts", "test"): "3df6ed9307e15ebb",
    ("odd", "train"): "9e197210a178d02d",
    ("odd", "validation"): "80a34d7511cb6513",
    ("odd", "test"): "179f7d26f47661c1",
    ("cause", "train"): "28075d43d30a29ab",
    ("cause", "validation"): "3309c385636c96ac",
    ("cause", "test"): "fc78c3bbed6889d7",
    ("howto", "train"): "3cff6972ed8c85e0",
    ("howto", "validation"): "4275f7555b4a18ff",
    ("howto", "test"): "f57d13050d4dd654",
    ("next", "train"): "a17d405bb2b89565",
    ("next", "validation"): "1d1d1d06470a8e36",
    ("next", "test"): "7dc6a211517ac2a9",
}


def digest(items: list[Example]) -> str:
    rows = [[item.task, item.id, item.prompt, item.answer, list(item.choices), item.gold] for item in items]
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_families_and_counts():
    assert demo.families() == FAMILIES
    assert {(family, split): len(demo.examples(family, split)) for family, split in LISTS} == {
        (family, split): SIZES[split] for family, split in LISTS
    }


@pytest.mark.parametrize(("family", "split"), LISTS)
def test_content_is_fixed(family, split):
    assert digest(demo.examples(family, split)) == DIGESTS[family, split]


def test_content_does_not_depend_on_the_hash_seed_or_on_the_order_of_calls():
    program = (
        "from qdora.data import demo\n"
        "for family in reversed(demo.families()):\n"
        "    for split in ('test', 'validation', 'train'):\n"
        "        for e in demo.examples(family, split): print(e.id, e.prompt, e.choices, e.gold)\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    expected = {(e.id, e.prompt, str(e.gold)) for f, s in LISTS for e in demo.examples(f, s)}
    (text,) = outputs
    assert all(f"{e_id} {prompt} " in text for e_id, prompt, _ in expected)


@pytest.mark.parametrize(("family", "split"), LISTS)
def test_every_example_is_well_formed(family, split):
    items = demo.examples(family, split)
    assert len({item.id for item in items}) == len(items)
    for item in items:
        assert item.task == f"demo/{family}"
        assert item.messages == ()
        assert len(item.choices) == len(set(item.choices)) == NUM_CHOICES[family]
        assert item.gold is not None
        assert item.choices[item.gold] == item.answer
        assert all(choice[0] == " " and choice.strip() == choice[1:] for choice in item.choices)
        assert item.prompt == item.prompt.strip()
        assert item.prompt.endswith(":")
        assert "{" not in item.prompt + "".join(item.choices)
        assert (item.prompt + item.answer).isascii()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_prompt_occurs_twice_within_or_across_splits(family):
    prompts = [item.prompt for split in SIZES for item in demo.examples(family, split)]
    assert len(prompts) == sum(SIZES.values())
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("family", ["odd", "cause", "howto", "next"])
def test_no_choice_of_one_split_occurs_in_another(family):
    seen = {split: {choice for item in demo.examples(family, split) for choice in item.choices} for split in SIZES}
    for one, other in itertools.combinations(SIZES, 2):
        assert not seen[one] & seen[other]


def test_notes_of_different_splits_share_no_word():
    def words(split):
        notes = [item.prompt.split("\n")[0].removeprefix("The note says ") for item in demo.examples("facts", split)]
        return {word for note in notes for word in note.rstrip(".").replace(" and ", ", ").split(", ")}

    for one, other in itertools.combinations(SIZES, 2):
        assert not words(one) & words(other)


@pytest.mark.parametrize(("family", "split"), LISTS)
def test_gold_positions_are_exactly_uniform(family, split):
    counts = Counter(item.gold for item in demo.examples(family, split))
    assert set(counts.values()) == {SIZES[split] // NUM_CHOICES[family]}
    assert len(counts) == NUM_CHOICES[family]


@pytest.mark.parametrize(("family", "split"), LISTS)
@pytest.mark.parametrize("extreme", [max, min])
def test_length_of_a_choice_does_not_give_the_answer_away(family, split, extreme):
    """Ties count their share. 0.08 is two standard errors of a fair guess among 160 with two choices."""
    items = demo.examples(family, split)
    score = 0.0
    for item in items:
        bound = extreme(map(len, item.choices))
        tied = [choice for choice in item.choices if len(choice) == bound]
        score += (item.answer in tied) / len(tied)
    assert abs(score / len(items) - 1 / NUM_CHOICES[family]) < 0.08


@pytest.mark.parametrize("family", ["odd", "cause", "howto", "next"])
def test_frequent_answers_of_train_do_not_answer_test(family):
    """Choosing what was the answer most often in train is no better than chance on test, where nothing recurs."""
    counts = Counter(item.answer for item in demo.examples(family, "train"))
    items = demo.examples(family, "test")
    hits = sum(max(item.choices, key=lambda choice: counts[choice]) == item.answer for item in items)
    assert hits / len(items) <= 1 / NUM_CHOICES[family] + 0.08


def test_half_of_the_words_of_a_cause_point_either_way():
    """Twins: the first and the second noun are the answer equally often, and so is every sentence frame."""
    for split in SIZES:
        first = 0
        frames = Counter()
        for item in demo.examples("cause", split):
            sentence = item.prompt.split("\n")[0]
            a, b = sorted(item.choices, key=lambda choice: sentence.index(choice.removeprefix(" the ")))
            first += item.answer == a
            frames[sentence.split(" because ")[0], item.answer == a] += 1
            assert b in item.choices
        assert first == SIZES[split] // 2
        assert all(frames[frame, True] == frames[frame, False] for frame, _ in frames)


def test_notes_name_the_kind_asked_for_exactly_when_the_answer_is_yes():
    """From the table itself: kinds that a question names, looked up word by word."""
    table = yaml.safe_load((demo.resources.files("qdora.data") / "demo_tables/kinds.yaml").read_text(encoding="utf-8"))
    kind_of = {word: kind for kind, words in table.items() for word in words}
    assert len(kind_of) == sum(map(len, table.values())), "a word stands under two kinds"
    for split in SIZES:
        for item in demo.examples("facts", split):
            note, question, _ = item.prompt.split("\n")
            words = note.removeprefix("The note says ").rstrip(".").replace(" and ", ", ").split(", ")
            asked = question.removeprefix("Question: Does the note name ").rstrip("?")
            assert len(words) == 3
            assert item.answer == (" yes" if asked in {kind_of[word] for word in words} else " no")
        for item in demo.examples("odd", split):
            kinds = [kind_of[choice.strip()] for choice in item.choices]
            assert kinds.count(kinds[item.gold]) == 1
            assert len(set(kinds)) == 2


def test_the_next_step_follows_the_last_one_done():
    table = yaml.safe_load((demo.resources.files("qdora.data") / "demo_tables/next.yaml").read_text(encoding="utf-8"))
    steps_of = {goal: steps for goal, *steps in table}
    assert len(steps_of) == 64
    assert all(len(set(steps)) == 6 for steps in steps_of.values())
    for split in SIZES:
        for item in demo.examples("next", split):
            goal, done, _ = item.prompt.split("\n")
            steps = steps_of[goal.removeprefix("Task: ")]
            last = done.removeprefix("Done: ").split("; ")[-1]
            assert item.answer == " " + steps[steps.index(last) + 1]


def test_callers_cannot_change_the_data():
    demo.examples("odd", "test").clear()
    assert len(demo.examples("odd", "test")) == SIZES["test"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        demo.examples("odd", "test")[0].prompt = ""


def test_wrong_names_are_refused_together():
    with pytest.raises(UserError) as caught:
        demo.examples("od", "tests")
    assert len(caught.value.faults) == 2
    assert "Did you mean 'odd'?" in caught.value.faults[0]
    assert "Did you mean 'test'?" in caught.value.faults[1]
