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
from importlib import resources
from typing import Any

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
    ("facts", "train"): "eeda64fff4ded04d",
    ("facts", "validation"): "bb72c5c99eaec718",
    ("facts", "test"): "37c0f4f6667ee85e",
    ("odd", "train"): "9e197210a178d02d",
    ("odd", "validation"): "80a34d7511cb6513",
    ("odd", "test"): "179f7d26f47661c1",
    ("cause", "train"): "a37bd0bc93fdcddd",
    ("cause", "validation"): "c7c80a18b43e5d6e",
    ("cause", "test"): "485dada4ba43cf57",
    ("howto", "train"): "3cff6972ed8c85e0",
    ("howto", "validation"): "4275f7555b4a18ff",
    ("howto", "test"): "f57d13050d4dd654",
    ("next", "train"): "a17d405bb2b89565",
    ("next", "validation"): "1d1d1d06470a8e36",
    ("next", "test"): "7dc6a211517ac2a9",
}


def read_table(name: str) -> Any:
    return yaml.safe_load((resources.files("qdora.data") / "demo_tables" / f"{name}.yaml").read_text(encoding="utf-8"))


def digest(items: list[Example]) -> str:
    rows = [[item.task, item.id, item.prompt, item.answer, list(item.choices), item.gold] for item in items]
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_families_and_counts():
    assert tuple(demo.FAMILIES) == FAMILIES
    assert {(family, split): len(demo.examples(family, split)) for family, split in LISTS} == {
        (family, split): SIZES[split] for family, split in LISTS
    }


@pytest.mark.parametrize(("family", "split"), LISTS)
def test_content_is_fixed(family, split):
    assert digest(demo.examples(family, split)) == DIGESTS[family, split]


def test_content_does_not_depend_on_the_hash_seed_or_on_the_order_of_calls():
    program = (
        "from qdora.data import demo\n"
        "for family in reversed(demo.FAMILIES):\n"
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


def test_facts_of_different_splits_share_no_person_and_no_value():
    def words(split):
        told = [item.prompt.split("\n")[0].rstrip(".").split(". ") for item in demo.examples("facts", split)]
        sentences = [sentence.split() for sentences in told for sentence in sentences]
        return {sentence[1] for sentence in sentences}, {" ".join(sentence[-2:]) for sentence in sentences}

    for one, other in itertools.combinations(SIZES, 2):
        for mine, theirs in zip(words(one), words(other), strict=True):
            assert mine
            assert not mine & theirs


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


@pytest.mark.parametrize("split", SIZES)
def test_causes_come_as_twins(split):
    """Nothing but the word that is asked for tells which noun is meant: each frame is as often the one as the other."""
    frames = Counter()
    for item in demo.examples("cause", split):
        sentence = item.prompt.split(" it was ")[0]
        first = min(item.choices, key=lambda choice: sentence.lower().index(choice.strip()))
        frames[sentence, item.answer == first] += 1
    assert len(frames) > SIZES[split] // 4
    assert all(frames[frame, True] == frames[frame, False] for frame, _ in frames)


@pytest.mark.parametrize("split", SIZES)
def test_facts_are_told_of_the_person_exactly_when_the_answer_is_yes(split):
    table = read_table("facts")
    told_as = {relation["asked"]: relation["told"] for relation in table["relations"]}
    unmentioned = 0
    for item in demo.examples("facts", split):
        passage, question, _ = item.prompt.split("\n")
        words = question.removeprefix("Question: Does the ").rstrip("?")
        person, claim = words.split(" ", 1)
        asked = next(asked for asked in told_as if claim.startswith(asked + " "))
        value = claim.removeprefix(asked + " ")
        assert item.answer == (" yes" if f"The {person} {told_as[asked]} {value}." in passage else " no")
        assert passage.count("The ") == 2
        unmentioned += f" {value}." not in passage
    # Three of four "no": who only looks for the value is right in 7 of 8.
    assert unmentioned == 3 * SIZES[split] // 8


@pytest.mark.parametrize("split", SIZES)
def test_the_odd_one_is_of_another_kind(split):
    table = read_table("kinds")
    kind_of = {word: kind for kind, words in table.items() for word in words}
    assert len(kind_of) == sum(map(len, table.values())), "a word stands under two kinds"
    for item in demo.examples("odd", split):
        kinds = [kind_of[choice.strip()] for choice in item.choices]
        assert kinds.count(kinds[item.gold]) == 1
        assert len(set(kinds)) == 2
        assert f": {','.join(item.choices).strip()}?" in item.prompt


@pytest.mark.parametrize("split", SIZES)
def test_the_thing_that_helps_is_the_one_of_the_goal(split):
    thing_of = {goal: thing for thing, _, *goals in read_table("howto") for goal in goals}
    area_of = {thing: area for thing, area, *_ in read_table("howto")}
    assert len(thing_of) == 3 * len(area_of), "a goal stands under two things"
    for item in demo.examples("howto", split):
        goal, listed, _ = item.prompt.split("\n")
        assert item.answer == " " + thing_of[goal.removeprefix("Goal: ")]
        assert listed == f"Which helps:{','.join(item.choices)}?"
        assert len({area_of[choice.strip()] for choice in item.choices}) == 2


def test_the_next_step_follows_the_last_one_done():
    steps_of = {goal: steps for goal, *steps in read_table("next")}
    assert len(steps_of) == 64
    assert all(len(set(steps)) == 6 for steps in steps_of.values())
    for split in SIZES:
        repeats = 0
        for item in demo.examples("next", split):
            goal, done, _ = item.prompt.split("\n")
            steps = steps_of[goal.removeprefix("Task: ")]
            done = done.removeprefix("Done: ").split("; ")
            assert item.answer == " " + steps[steps.index(done[-1]) + 1]
            repeats += any(choice[1:] in done for choice in item.choices)
            assert any(choice[1:] not in steps for choice in item.choices)
        assert repeats == SIZES[split] // 2


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
