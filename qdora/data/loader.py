"""Optimizer steps: which examples each takes, the share of each process, and the position for resuming."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qdora.data.batching import Batching, MicroBatch, micro_batches
from qdora.data.mix import Draws, MixOrder, Source
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.errors import UserError

_MOST_DRAWS = 10**10
"""Most examples of a run, far beyond any that ends: the order of 10^15 is not exact in float64."""


def share_of(examples: Sequence[TokenizedExample], rank: int, size: int) -> list[TokenizedExample]:
    """The share of process `rank` out of `size`, in the step's order.

    Longest first, each example goes to the process with the fewest tokens so far, so that none waits long for another:
    their sums differ by at most one example. With fewer examples than processes some get none.
    """
    tokens, owner = [0] * size, [0] * len(examples)
    for index in sorted(range(len(examples)), key=lambda index: len(examples[index]), reverse=True):
        owner[index] = tokens.index(min(tokens))
        tokens[owner[index]] += len(examples[index])
    return [example for example, each in zip(examples, owner, strict=True) if each == rank]


@dataclass(frozen=True)
class Step:
    """What one optimizer step learns from. Counts are those of the whole step, over all processes.

    Attributes:
        micro_batches: This process's share, perhaps none. Longest examples first, so that a step that does not fit into
            memory fails at once.
        num_label_tokens: Labels, at least 1: the denominator of the loss.
        num_tokens: Real tokens, padding not counted.
    """

    micro_batches: list[MicroBatch]
    num_label_tokens: int
    num_tokens: int
    num_examples: int
    task_label_tokens: Mapping[str, int] = field(default_factory=dict)


class StepSize(NamedTuple):
    """A step that may be taken: the position where it begins, its tokens, and those of its longest example."""

    position: int
    num_examples: int
    num_tokens: int
    longest: int


class StepLoader:
    """Optimizer steps from a position in an order; the position is all of its state.

    Args:
        tokens_per_step: A step takes examples until it has at least so many real tokens (at most one example more).
            Exactly one of this and `batch`.
        batching: How the next step's examples become micro-batches. It has no influence on which examples a step
            contains, and may be changed between steps.
        rank, num_processes: Number of this process, and of all. All draw the same steps; each pads its share.
    """

    def __init__(
        self,
        tokenised: Sequence[Source],
        order: MixOrder,
        *,
        tokens_per_step: int | None,
        batch: int | None,
        batching: Batching,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        assert (tokens_per_step is None) != (batch is None), (tokens_per_step, batch)
        assert (tokens_per_step or batch or 0) > 0, (tokens_per_step, batch)
        assert batching.max_tokens > 0, batching
        known = tuple(len(part) if isinstance(part, TokenizedSet) else None for part in tokenised)
        assert known == order.sizes, "sources and order differ"
        self.streams = [part for part in tokenised if isinstance(part, ExampleStream)]
        self.tokenised = tuple(tokenised)
        self.order = order
        self.tokens_per_step = tokens_per_step
        self.batch = batch
        self.batching = batching
        self.position = 0
        self.rank, self.num_processes = rank, num_processes
        self.task_names = list(dict.fromkeys(name for part in self.tokenised for name in part.task_names))

    @cached_property
    def _lengths(self) -> list[NDArray[np.int64]]:
        """The tokens of each example of each source; of a stream, which is not read, only their mean."""
        lengths = (
            [round(part.mean_length)] if isinstance(part, ExampleStream) else map(len, part.examples)
            for part in self.tokenised
        )
        return [np.fromiter(each, dtype=np.int64) for each in lengths]

    def next_step(self) -> Step:
        """Take the next step's examples and move the position behind them."""
        examples: list[TokenizedExample] = []
        num_tokens = 0
        assert self.position != self.order.length, "no example is left"
        while not self._is_full(len(examples), num_tokens) and self.position + len(examples) != self.order.length:
            source, index = self.order[self.position + len(examples)]
            part = self.tokenised[source]
            if isinstance(part, ExampleStream):
                assert part.position.num_drawn == index, (part.name, part.position, index)
            examples.append(part.next() if isinstance(part, ExampleStream) else part.examples[index])
            num_tokens += len(examples[-1])
        self.position += len(examples)
        mine = share_of(examples, self.rank, self.num_processes)
        labels: dict[str, int] = {}
        for example in examples:
            labels[example.task] = labels.get(example.task, 0) + int(example.loss_mask.sum())
        return Step(
            micro_batches=micro_batches(mine, self.batching, self.task_names),
            num_label_tokens=sum(labels.values()),
            num_tokens=num_tokens,
            num_examples=len(examples),
            task_label_tokens=labels,
        )

    def steps_for_epochs(self, epochs: float) -> int:
        """Steps from position 0 until `epochs` * (examples of all sources) draws are used, at least 1.

        Steps do not stop at the end of an epoch: the last one may take its first examples from the next.

        Raises: UserError if the order ends before, because all sources have a cap, or it is more than a run takes.
        """
        num_draws = max(1, round(min(epochs * self.order.epoch_length, 2.0**62)))
        length = self.order.length
        if length is not None and num_draws > length:
            # Each cap is rounded down, the epochs of the whole are not
            if num_draws - length >= len(self.order.sizes):
                raise UserError(
                    f"train.epochs: {epochs:g} of {self.order.epoch_length:,} examples are {num_draws:,}, but "
                    f"max_epochs of the sources leaves {length:,}. Fix: raise it for one source, or lower train.epochs."
                )
            num_draws = length
        _check_draws(num_draws)
        if self.batch is not None:
            return -(-num_draws // self.batch)
        return sum(1 for _ in self._step_sizes(num_draws))

    @property
    def counts_draws(self) -> bool:
        """Whether the draws of a step are known beforehand: not for a number of tokens, some of them from a stream."""
        return self.batch is not None or not self.streams

    def draws_for_steps(self, num_steps: int) -> int:
        """Draws that the first `num_steps` steps use; a guess where `counts_draws` is False.

        Raises: UserError if the order ends before, because all sources have a cap, or it is more than a run takes.
        """
        length = self.order.length
        if length is not None and not self.counts_draws:
            raise UserError(
                "train.tokens_per_step: with max_epochs for every source and a stream among them the number of steps "
                "is not known. Fix: use train.batch, or remove max_epochs from one source."
            )
        if self.batch is not None:
            num_draws, possible = num_steps * self.batch, None if length is None else -(-length // self.batch)
        else:
            longest = max(int(lengths.max()) for lengths in self._lengths)
            at_least = num_steps * -(-(self.tokens_per_step or 1) // longest)
            _check_draws(at_least if length is None else min(at_least, length))
            num_draws, possible = self._draws_of_token_steps(num_steps)
        if possible is not None and num_steps > possible:
            raise UserError(
                f"train.steps: must be at most {possible:,}, because max_epochs of the sources leaves {length:,} "
                f"examples, got {num_steps:,}. Fix: raise or remove max_epochs of one source."
            )
        num_draws = num_draws if length is None else min(num_draws, length)
        _check_draws(num_draws)
        return num_draws

    def state_dict(self) -> dict[str, Any]:
        """Position, where the streams stand, and what these are positions in; JSON types only."""
        streams = {part.name: part.state_dict() for part in self.streams}
        state = {"position": self.position, "fingerprint": dict(self.fingerprint)}
        return state | ({"streams": streams} if streams else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. UserError as `check_state`."""
        self.check_state(state)
        self.position = int(state["position"])
        for part in self.streams:
            part.load_state_dict(state["streams"][part.name])

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that the loader can continue where `state` was taken.

        Raises: UserError if the data, the mix or the size of a step differ from those of the state: other examples
            would follow, and some would be seen twice.
        """
        stored, now = dict(state["fingerprint"]), self.fingerprint
        faults = []
        if stored.get("data") != now["data"]:
            what = self._changed_source(stored.get("sets", []))
            faults.append(
                f"--resume: {what} differs from the data of the checkpoint (a file, a setting, the tokenizer or the "
                f"chat template has changed). {_FIX}"
            )
        elif stored.get("mix") != now["mix"]:  # other numbers of examples alone change it, too
            faults.append(
                "--resume: the mix differs from that of the checkpoint (its strategy, weights, max_epochs or "
                f"data.seed). {_FIX}"
            )
        if stored.get("step") != now["step"]:
            faults.append(
                "--resume: train.tokens_per_step or train.batch differs from that of the checkpoint (then "
                f"{stored.get('step')} in a step, now {now['step']}). {_FIX}"
            )
        before = stored.get("streams", {})
        changes = {part.name: part.change_since(before.get(part.name)) for part in self.streams}
        faults += [
            f"--resume: source {name} differs from the data of the checkpoint ({what}). {_FIX}"
            for name, what in changes.items()
            if what is not None
        ]
        if faults:
            raise UserError(*faults)

    def _changed_source(self, before: Sequence[str]) -> str:
        """'source chats', the first one that differs; `before` are the checkpoint's "sets", which old ones lack."""
        pairs = zip(self.tokenised, self.fingerprint["sets"], before, strict=False)
        return next((f"source {part.name}" for part, now, then in pairs if now != then), "a source")

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What decides which examples follow a position: a part for each thing that a user can change; JSON types."""
        # The first draws stand for the shuffling itself, which numpy may change between versions
        first = np.concatenate(self.order.draws(0, min(256, self.order.length or 256)))
        shares = self.order.shares.tolist(), self.order.caps
        streams = {part.name: part.fingerprint() for part in self.streams}
        sets = _hash_sets(self.tokenised)
        return ({"streams": streams} if streams else {}) | {
            "data": sets[-1],
            "sets": sets,
            "mix": hashlib.sha256(f"{shares} {self.order.seed} {first.tolist()}".encode()).hexdigest()[:16],
            "step": f"{self.tokens_per_step} tokens" if self.batch is None else f"{self.batch} examples",
        }

    def _is_full(self, num_examples: int, num_tokens: int) -> bool:
        if self.batch is not None:
            return num_examples >= self.batch
        return num_tokens >= (self.tokens_per_step or 0)

    def tokens_of_draws(self, num_draws: int) -> NDArray[np.int64]:
        """Tokens that the first draws take from each source, (sources,); estimated from the first rows of a stream."""
        tokens = []
        for source, count in enumerate(self.order.counts(num_draws).tolist()):
            lengths = self._lengths[source]
            num_passes, rest = divmod(count, len(lengths))
            last = self.order.shuffle(source, num_passes, len(lengths))[:rest]
            tokens.append(num_passes * lengths.sum() + lengths[last].sum())
        return np.array(tokens, dtype=np.int64)

    def _draws_of_token_steps(self, num_steps: int) -> tuple[int, int | None]:
        """(draws of so many steps of `tokens_per_step`, steps that there are if they are fewer)."""
        found, num_draws = 0, 0
        for size in islice(self._step_sizes(self.order.length), num_steps):
            found, num_draws = found + 1, size.position + size.num_examples
        return num_draws, found if found < num_steps else None

    def step_sizes(self, num_steps: int) -> list[StepSize]:
        """The first steps of the order, fewer if it ends before. Of a stream's examples the mean length."""
        return list(islice(self._step_sizes(self.order.length), num_steps))

    def _step_sizes(self, num_draws: int | None) -> Iterator[StepSize]:
        """The steps of the first draws, without an end for None; the last one may be smaller."""
        position = num_examples = num_tokens = longest = 0
        for length in chain.from_iterable(lengths.tolist() for _, lengths in self._drawn(num_draws)):
            num_examples, num_tokens, longest = num_examples + 1, num_tokens + length, max(longest, length)
            if self._is_full(num_examples, num_tokens):
                yield StepSize(position, num_examples, num_tokens, longest)
                position, num_examples, num_tokens, longest = position + num_examples, 0, 0, 0
        if num_examples:
            yield StepSize(position, num_examples, num_tokens, longest)

    def _drawn(self, num_draws: int | None) -> Iterator[Draws]:
        """(sources, tokens) of the first draws, a part at a time, without an end for None. Streams: the mean length."""
        start = 0
        while num_draws is None or start < num_draws:
            stop = start + 65536 if num_draws is None else min(start + 65536, num_draws)
            sources, indices = self.order.draws(start, stop)
            lengths = np.empty_like(indices)
            for source, known in enumerate(self._lengths):
                here = sources == source
                lengths[here] = known[indices[here] % len(known)]  # the draws of a stream are numbered on and on
            yield sources, lengths
            start = stop


def _check_draws(num_draws: int) -> None:
    if num_draws > _MOST_DRAWS:
        raise UserError(
            f"train: the run would take more than {_MOST_DRAWS:,} examples. Fix: lower train.steps, train.epochs, "
            "train.batch or train.tokens_per_step."
        )


_FIX = "Fix: put the old one back, or start with another --run-dir."


def _hash_sets(tokenised: Sequence[Source]) -> list[str]:
    """SHA-256 over names, tasks, ids and labels (a stream: its name) up to the end of each source, 16 hex digits."""
    digest, found = hashlib.sha256(), []
    for part in tokenised:
        if isinstance(part, ExampleStream):
            digest.update(f"{part.name} stream".encode())
        else:
            digest.update(f"{part.name} {len(part)}".encode())
            for example in part.examples:
                digest.update(f"\n{example.task} {len(example)} ".encode())
                digest.update(example.input_ids.tobytes() + example.loss_mask.tobytes())
        found.append(digest.hexdigest()[:16])
    return found
