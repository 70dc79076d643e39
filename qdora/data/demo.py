"""The built-in demo data: five small multiple-choice task families that need no network.

Made from the tables in demo_tables/, written for this project (Apache-2.0). A 135M model learns them in minutes:

    demo/facts   yes or no, about a passage of invented facts
    demo/odd     which of four words does not belong
    demo/cause   which of two things a "because" refers to; sentences come as twins with opposite answers
    demo/howto   which of two things helps to reach a goal
    demo/next    which of four steps comes next in an everyday task

Train, validation and test share no prompt and no words. Chance is 1 / number of choices: gold positions are exactly
uniform, and a wrong choice is the right one of other examples.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qdora.data.example import Example
from qdora.errors import UserError, not_one_of

NUM_EXAMPLES = {"train": 400, "validation": 80, "test": 160}
SPLITS = tuple(NUM_EXAMPLES)

T = TypeVar("T")
Draft = tuple[str, str, tuple[str, ...]]  # prompt, maybe with {choices}; answer; wrong choices


def examples(family: str, split: str) -> list[Example]:
    """The examples of one split of one family (without the demo/), the same on every machine and Python."""
    if split not in SPLITS:
        raise UserError(not_one_of(f"demo/{family}: split", split, SPLITS))
    # The seed is from the order of FAMILIES: a new family goes to the end
    rng = random.Random(100 * list(FAMILIES).index(family) + SPLITS.index(split))
    drafts: dict[str, Draft] = {}
    for prompt, answer, wrong in FAMILIES[family](split, rng):
        drafts.setdefault(
            prompt.replace("{choices}", ", ".join(sorted((answer, *wrong)))), (prompt, answer, wrong)
        )
        if len(drafts) == NUM_EXAMPLES[split]:
            break
    made = list[Example]()
    for number, (prompt, answer, wrong) in enumerate(drafts.values()):
        choices = _shuffled(wrong, rng)
        # Counting through the positions makes them exactly uniform; "no, yes" keeps its order.
        gold = int(answer == "yes") if answer in ("no", "yes") else number % (len(choices) + 1)
        choices.insert(gold, answer)
        prompt = prompt.replace("{choices}", ", ".join(choices))
        spaced = tuple(f" {choice}" for choice in choices)
        made.append(Example(f"demo/{family}", "", prompt, spaced[gold], spaced, gold))
    shuffled = enumerate(_shuffled(made, rng))
    return [replace(example, id=f"{family}-{split}-{number:03d}") for number, example in shuffled]


def _facts(split: str, rng: random.Random) -> Iterator[Draft]:
    """Two people, one relation; each passage is asked twice, once with the answer yes and once no."""
    table = _table("facts")
    people = _part(table["people"], split, (12, 5, 7))
    passages: set[str] = set()
    while True:
        relation = _shuffled(table["relations"], rng)[0]
        one, other = _shuffled(people, rng)[:2]
        value, others, absent = _shuffled(_part(relation["values"], split, (6, 4, 4)), rng)[:3]
        told = [f"The {one} {relation['told']} {value}.", f"The {other} {relation['told']} {others}."]
        passage = " ".join(_shuffled(told, rng))
        if passage in passages:
            continue
        passages.add(passage)
        # Three of four "no" values are not in the passage, the fourth belongs to the other person
        for answer, wrong, asked in (
            ("yes", "no", value),
            ("no", "yes", absent if len(passages) % 4 else others),
        ):
            question = f"Does the {one} {relation['asked']} {asked}?"
            yield f"{passage}\nQuestion: {question}\nAnswer:", answer, (wrong,)


def _odd(split: str, rng: random.Random) -> Iterator[Draft]:
    """Three words of one kind and one of another."""
    kinds = [_part(words, split, (8, 4, 4)) for words in _table("kinds").values()]
    while True:
        many, single = _shuffled(kinds, rng)[:2]
        prompt = "Which one does not belong: {choices}?\nAnswer:"
        yield prompt, _shuffled(single, rng)[0], tuple(_shuffled(many, rng)[:3])


def _cause(split: str, rng: random.Random) -> Iterator[Draft]:
    """Twins: the same sentence with one word changed, so that it refers to the other noun."""
    table = _table("cause")
    pools = {name: _part(words, split, (6, 2, 4)) for name, words in table["pools"].items()}
    twins = [
        (sentence, first, second, a, b)
        for sentence in table["sentences"]
        for first, second in zip(sentence["first"], sentence["second"], strict=True)
        for a, b in itertools.product(pools[sentence["a"]], pools[sentence["b"]])
        if a != b
    ]
    for sentence, first, second, a, b in _shuffled(twins, rng):
        for word, answer, wrong in ((first, a, b), (second, b, a)):
            told = sentence["text"].format(a=a, b=b)
            yield f"{told} {word}.\nQuestion: What was {word}?\nAnswer:", f"the {answer}", (f"the {wrong}",)


def _howto(split: str, rng: random.Random) -> Iterator[Draft]:
    """A goal and two listed things; everything is the right thing for its own goals."""
    rows = _part(_table("howto"), split, (52, 11, 21))
    pairs = [(right, wrong) for right, wrong in itertools.product(rows, rows) if right[1] != wrong[1]]
    for right, wrong in _shuffled(pairs, rng):
        goal = _shuffled(right[2:], rng)[0]
        yield f"Goal: {goal}\nWhich helps: {{choices}}?\nAnswer:", right[0], (wrong[0],)


def _next(split: str, rng: random.Random) -> Iterator[Draft]:
    """Steps done so far. Wrong are a later step, one of another task, and one more of these two kinds or, in every
    second example, one done already: a base model likes to repeat, and would start far below chance.
    """
    tasks = _part(_table("next"), split, (40, 8, 16))
    windows = [(task, start, end) for task in tasks for end in range(1, 5) for start in range(end)]
    for number, (task, start, end) in enumerate(_shuffled(windows, rng)):
        goal, *steps = task
        done, later = steps[start:end], _shuffled(steps[end + 1 :], rng)
        strange = [_shuffled(other[1:], rng)[0] for other in _shuffled(tasks, rng) if other is not task]
        third = _shuffled(done, rng)[0] if number % 2 else (later[1:2] or strange[1:2])[0]
        yield f"Task: {goal}\nDone: {'; '.join(done)}\nNext:", steps[end], (later[0], strange[0], third)


FAMILIES = {"facts": _facts, "odd": _odd, "cause": _cause, "howto": _howto, "next": _next}


def _part(items: Sequence[T], split: str, sizes: tuple[int, int, int]) -> list[T]:
    """The items of a split: the first sizes[0] are train's, and so on."""
    start = sum(sizes[: SPLITS.index(split)])
    return list(items[start : start + sizes[SPLITS.index(split)]])


def _shuffled(items: Iterable[T], rng: random.Random) -> list[T]:
    """A shuffled copy. Only Random.random promises the same numbers in every Python."""
    return sorted(items, key=lambda _: rng.random())


@cache
def _table(family: str) -> Any:
    file = Path(__file__).with_name("demo_tables") / f"{family}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))
