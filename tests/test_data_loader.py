"""Optimizer steps: what is in them, padding, resuming."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data.batching import GROUP_COST, Batching, micro_groups
from qdora.data.loader import StepLoader
from qdora.data.mix import make_mix
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.errors import UserError

PAD = 0


def tokenised(name, lengths, seed=0):
    """Random ids (never PAD) and label masks with at least one label."""
    rng = np.random.default_rng([seed, len(lengths)])
    examples = []
    for number, length in enumerate(lengths):
        mask = rng.random(length) < 0.4
        mask[0], mask[-1] = False, True
        ids = rng.integers(1, 50, length).astype(np.int32)
        examples.append(TokenizedExample(name, f"{name}-{number}", ids, mask))
    return TokenizedSet(name, tuple(examples))


def loader(sets, *, tokens=None, batch=None, micro=64, strategy="proportional", seed=0, position=0, max_epochs=None):
    mix = make_mix(sets, strategy=strategy, seed=seed, max_epochs=max_epochs)
    made = StepLoader(sets, mix.order, tokens_per_step=tokens, batch=batch, batching=Batching(micro, PAD))
    made.position = position
    return made


LENGTHS = st.lists(st.integers(2, 30), min_size=1, max_size=30)
SIZE = st.one_of(st.tuples(st.integers(1, 150), st.none()), st.tuples(st.none(), st.integers(1, 20)))


def content(step):
    """(task, id, ids, labels) of every example of a step, padding removed."""
    found = []
    for micro in step.micro_batches:
        for row in range(len(micro.input_ids)):
            real = micro.attention_mask[row].bool()
            found.append(
                (
                    micro.task_names[int(micro.task_ids[row])],
                    micro.example_ids[row],
                    micro.input_ids[row][real].tolist(),
                    micro.labels[row][real].tolist(),
                )
            )
    return found


@settings(max_examples=30, deadline=None)
@given(first=LENGTHS, second=LENGTHS, size=SIZE, micro=st.integers(1, 200), seed=st.integers(0, 999))
def test_a_step(first, second, size, micro, seed):
    sets = [tokenised("a", first), tokenised("b", second, seed=1)]
    by_id = {example.id: example for part in sets for example in part.examples}
    steps = loader(sets, tokens=size[0], batch=size[1], micro=micro, seed=seed)
    position = 0
    for _ in range(4):
        step = steps.next_step()
        drawn = content(step)
        for task, id, ids, labels in drawn:
            example = by_id[id]
            assert task == example.task
            assert ids == example.input_ids.tolist()
            expected = [token if wanted else -100 for token, wanted in zip(ids, example.loss_mask, strict=True)]
            assert labels == expected
        lengths = [len(ids) for _, _, ids, _ in drawn]
        assert (step.num_examples, step.num_tokens) == (len(drawn), sum(lengths))
        assert step.num_label_tokens == sum(label != -100 for *_, labels in drawn for label in labels) >= 1
        position += len(drawn)
        assert steps.position == position
        if size[1] is not None:
            assert len(drawn) == size[1]
        else:  # full, and not before its last example
            last = steps.order[position - 1]
            assert size[0] <= sum(lengths) < size[0] + len(sets[last[0]].examples[last[1]])
        for batch in step.micro_batches:
            rows, width = batch.input_ids.shape
            assert rows == 1 or rows * width <= micro
            assert width == batch.attention_mask.sum(dim=1).max()
            padded = batch.attention_mask == 0
            assert (batch.input_ids[padded] == PAD).all()
            assert (batch.labels[padded] == -100).all()
            assert (batch.attention_mask.diff(dim=1) <= 0).all()  # padding on the right
            for tensor in (batch.input_ids, batch.attention_mask, batch.labels, batch.task_ids):
                assert tensor.dtype == torch.int64


@settings(max_examples=25, deadline=None)
@given(first=LENGTHS, second=LENGTHS, batch=st.integers(1, 20), seed=st.integers(0, 999))
def test_an_epoch_of_steps_has_every_example_once(first, second, batch, seed):
    sets = [tokenised("a", first), tokenised("b", second, seed=1)]
    total = len(first) + len(second)
    steps = loader(sets, batch=batch, seed=seed)
    ids = []
    while steps.position < total:
        micro = steps.next_step().micro_batches
        ids += [id for one in micro for id in one.example_ids]
    # a step reorders its examples by length, so only steps inside the epoch count as a whole
    whole = (total // batch) * batch
    assert len(set(ids[:whole])) == whole
    if total % batch == 0:
        assert sorted(ids) == sorted(example.id for part in sets for example in part.examples)


@settings(max_examples=15, deadline=None)
@given(
    lengths=LENGTHS,
    size=SIZE,
    strategy=st.sampled_from(["proportional", "equal"]),
    cut=st.integers(0, 5),
    micro=st.integers(1, 200),
)
def test_resumed_is_uninterrupted(lengths, size, strategy, cut, micro):
    sets = [tokenised("a", lengths), tokenised("b", [5, 9, 7], seed=1)]
    options = {"tokens": size[0], "batch": size[1], "strategy": strategy}
    steps = loader(sets, **options)
    for _ in range(cut):
        steps.next_step()
    state = json.loads(json.dumps(steps.state_dict()))
    expected = [steps.next_step() for _ in range(4)]
    resumed = loader(sets, **options)
    resumed.load_state_dict(state)
    found = [resumed.next_step() for _ in range(4)]
    assert resumed.position == steps.position
    for one, other in zip(expected, found, strict=True):
        assert (one.num_tokens, one.num_label_tokens, one.num_examples) == (
            other.num_tokens,
            other.num_label_tokens,
            other.num_examples,
        )
        for mine, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
            for name in ("input_ids", "attention_mask", "labels", "task_ids"):
                assert torch.equal(getattr(mine, name), getattr(theirs, name))
    # the size of micro-batches is free to change: the same examples in the same step
    changed = loader(sets, **options, micro=micro)
    changed.load_state_dict(state)
    assert [sorted(content(changed.next_step())) for _ in range(4)] == [sorted(content(step)) for step in expected]


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, size=SIZE, epochs=st.floats(0.1, 3))
def test_steps_for_epochs_counts_what_a_run_takes(lengths, size, epochs):
    sets = [tokenised("a", lengths), tokenised("b", [5, 9, 7], seed=1)]
    steps = loader(sets, tokens=size[0], batch=size[1])
    num_steps = steps.steps_for_epochs(epochs)
    assert steps.position == 0
    wanted = max(1, round(epochs * (len(lengths) + 3)))
    counted = 0
    while steps.position < wanted:
        steps.next_step()
        counted += 1
    assert counted == num_steps


@settings(max_examples=15, deadline=None)
@given(
    lengths=LENGTHS,
    size=SIZE,
    most=st.lists(st.floats(0.2, 2.5), min_size=2, max_size=2),
    num_steps=st.integers(0, 30),
)
def test_an_order_that_ends_and_what_steps_take_of_it(lengths, size, most, num_steps):
    sets = [tokenised("a", lengths), tokenised("b", [5, 9, 7], seed=1)]
    most = [most[0], None] if num_steps % 2 else most
    steps = loader(sets, tokens=size[0], batch=size[1], strategy="equal", max_epochs=most)
    ids, ends = [], [0]
    while len(ends) <= num_steps and steps.position != steps.order.length:
        ids += [id for micro in steps.next_step().micro_batches for id in micro.example_ids]
        ends.append(steps.position)
    if len(ends) <= num_steps:
        with pytest.raises(UserError, match=f"must be at most {len(ends) - 1:,}, because max_epochs"):
            steps.draws_for_steps(num_steps)
        assert len(ids) == sum(max(1, int(each * len(part) + 1e-6)) for each, part in zip(most, sets, strict=True))
        return
    assert steps.draws_for_steps(num_steps) == ends[-1]
    by_id = {example.id: len(example) for part in sets for example in part.examples}
    tokens = [sum(by_id[id] for id in ids if id.startswith(name)) for name in "ab"]
    assert steps.tokens_of_draws(ends[-1]).tolist() == tokens


@pytest.mark.parametrize("most", [None, 1e300])
@pytest.mark.parametrize("num_steps, size", [(10**23, 4), (4, 10**23), (10**12, 1), (1, 10**400), (2**63, 2**63)])
def test_more_examples_than_any_run_takes_are_refused_at_once(num_steps, size, most):
    sets = [tokenised("a", [5, 6] * 20), tokenised("b", [7] * 3, seed=1)]
    for steps in (
        loader(sets, batch=size, max_epochs=[most] * 2),
        loader(sets, tokens=7 * size, max_epochs=[most] * 2),
    ):
        with pytest.raises(UserError, match=r"^train(: the run would take|\.steps: must be at most)"):
            steps.draws_for_steps(num_steps)
        for epochs in (1e15, 1e300, 1.7e308):
            with pytest.raises(UserError, match=r"^train: the run would take more than 10,000,000,000 examples"):
                steps.steps_for_epochs(epochs)


def test_the_tokens_of_billions_of_draws_are_counted_by_passes():
    steps = loader([tokenised("a", [5, 6, 7] * 20), tokenised("b", [9] * 3, seed=1)], batch=4)
    assert steps.draws_for_steps(2 * 10**9) == 8 * 10**9
    counts = steps.order.counts(8 * 10**9 // 63 * 63).tolist()
    assert steps.tokens_of_draws(8 * 10**9 // 63 * 63).tolist() == [6 * counts[0], 9 * counts[1]]


def test_more_epochs_than_the_caps_leave_are_refused():
    sets = [tokenised("a", [5] * 20), tokenised("b", [7] * 3, seed=1)]
    assert loader(sets, batch=4, max_epochs=[1.5, 1.5]).steps_for_epochs(1.5) == 9  # 30 + 4 examples, not 34.5
    with pytest.raises(
        UserError, match=r"^train.epochs: 2 of 23 examples are 46, but max_epochs .* leaves 34\. Fix: raise"
    ):
        loader(sets, batch=4, max_epochs=[1.5, 1.5]).steps_for_epochs(2)


def test_other_data_mix_or_step_size_is_refused():
    sets = [tokenised("a", [5] * 20), tokenised("b", [7] * 10, seed=1)]
    state = loader(sets, batch=4).state_dict()
    changed = TokenizedExample("a", "a-0", sets[0].examples[0].input_ids, ~sets[0].examples[0].loss_mask)
    other_mask = [TokenizedSet("a", (changed, *sets[0].examples[1:])), sets[1]]
    cases = {
        "source a differs from the data of the checkpoint": [
            loader([tokenised("a", [5] * 20, seed=5), sets[1]], batch=4),
            loader([tokenised("a", [5] * 21), sets[1]], batch=4),
            loader(other_mask, batch=4),
        ],
        "source b differs from the data": [loader([sets[0], tokenised("b", [7] * 10, seed=5)], batch=4)],
        "source c differs from the data": [loader([TokenizedSet("c", sets[0].examples), sets[1]], batch=4)],
        r"the mix differs from that of the checkpoint \(its strategy, weights, max_epochs or data.seed\)": [
            loader(sets, batch=4, seed=1),
            loader(sets, batch=4, strategy="equal"),
            loader(sets, batch=4, max_epochs=[None, 1]),
        ],
        "train.tokens_per_step or train.batch differs from that": [
            loader(sets, batch=5),
            loader(sets, tokens=4),
        ],
    }
    for what, loaders in cases.items():
        for one in loaders:
            with pytest.raises(UserError, match=f"^--resume: {what}.* another --run-dir") as error:
                one.load_state_dict(state)
            assert len(error.value.faults) == 1
    same = loader(sets, batch=4, micro=7)
    same.load_state_dict(state | {"position": 12})
    assert same.position == 12
    assert "then 4 examples in a step, now 5 examples" in _message(loader(sets, batch=5), state)


def test_a_checkpoint_without_a_mark_for_each_source_resumes():
    sets = [tokenised("a", [5] * 20), tokenised("b", [7] * 10, seed=1)]
    state = loader(sets, batch=4).state_dict()
    del state["fingerprint"]["sets"]
    loader(sets, batch=4).load_state_dict(state)
    other = loader([sets[0], tokenised("b", [7] * 10, seed=5)], batch=4)
    assert _message(other, state).startswith("--resume: a source differs from the data of the checkpoint")


def _message(one, state):
    with pytest.raises(UserError) as error:
        one.load_state_dict(state)
    return str(error.value)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=9), max_tokens=st.integers(1, 1500))
def test_groups_cost_the_least(lengths, max_tokens):
    """Against every way to cut the sorted lengths."""
    examples = [TokenizedExample("a", str(n), np.ones(k, np.int32), np.ones(k, bool)) for n, k in enumerate(lengths)]
    groups = micro_groups(examples, max_tokens)
    ordered = sorted(lengths, reverse=True)
    assert [len(example) for group in groups for example in group] == ordered
    assert sorted(int(example.id) for group in groups for example in group) == list(range(len(lengths)))

    def cost(sizes):
        total, start = 0, 0
        for size in sizes:
            width = ordered[start]
            if size > 1 and size * width > max_tokens:
                return float("inf")
            total, start = total + size * width + GROUP_COST, start + size
        return total

    def ways(rest):
        if rest == 0:
            yield []
        for size in range(1, rest + 1):
            for more in ways(rest - size):
                yield [size, *more]

    assert cost([len(group) for group in groups]) == min(map(cost, ways(len(ordered))))


def test_equal_lengths_keep_their_order():
    examples = [TokenizedExample("a", str(n), np.ones(4, np.int32), np.ones(4, bool)) for n in range(6)]
    assert [[one.id for one in group] for group in micro_groups(examples, 8)] == [["0", "1"], ["2", "3"], ["4", "5"]]


def test_task_ids_name_tasks_not_sources():
    """A source may hold several tasks, and two sources the same one."""
    mixed = TokenizedSet("mixed", (*tokenised("x", [3, 4]).examples, *tokenised("y", [5]).examples))
    sets = [mixed, tokenised("x", [6], seed=2)]
    steps = loader(sets, batch=4)
    assert steps.task_names == ["x", "y"]
    assert sorted((task, len(ids)) for task, _, ids, _ in content(steps.next_step())) == [
        ("x", 3),
        ("x", 4),
        ("x", 6),
        ("y", 5),
    ]
