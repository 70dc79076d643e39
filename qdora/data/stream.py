"""Examples of a source larger than memory: read, shuffled and tokenised while training, resumed exactly anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdora.data.readers import PlacedRow, Shards
from qdora.data.row_formats import choose_format, example_of_format
from qdora.data.rows import MAX_SHOWN_FAULTS, RowFault
from qdora.data.tokenize import ExampleTally, TokenizedExample
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig

_TOKENIZED_AT_ONCE = 64
"""Rows for one call of the tokenizer: few, so that little is done again on resume and the first example comes soon."""
_SAMPLE = 64
"""Rows from the beginning that tell one stream from another and give a first guess of the length."""


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream stands. To resume, one window of rows is read again.

    Attributes:
        epoch: Passes over the shards that are done.
        window: Windows of this pass that are done.
        shard, row: Where the present window begins: place in the pass's order of the shards, row of that shard.
        taken: Rows of the present window that are used up.
        num_drawn: Examples given, in all passes.
        num_truncated, num_dropped: Rows used up that were cut, or left out, because they are too long.
        num_drawn_before: Examples given before this pass.
    """

    epoch: int = 0
    window: int = 0
    shard: int = 0
    row: int = 0
    taken: int = 0
    num_drawn: int = 0
    num_truncated: int = 0
    num_dropped: int = 0
    num_drawn_before: int = 0


class ExampleStream:
    """An endless stream of tokenised examples, pass after pass over the shards, a pure function of data and settings.

    Each pass takes the shards in a new order, reads them one after the other, and gives every run of `shuffle_window`
    rows in a shuffled order. At most a window of rows is in memory. A buffer whose places are refilled one by one could
    not be entered anywhere; here the position says where the window begins, and only that window is read again.

    Args:
        data: Settings; `data.mix[number]` is the source. All examples have its name as their task.
        number: Place of the source in the mix. Two sources have different orders.
    """

    def __init__(self, shards: Shards, data: DataConfig, number: int, tokenizer: Any) -> None:
        self.shards = shards
        self.data, self.source, self.number = data, data.mix[number], number
        self.name = self.source.label
        self.task_names = [self.name]
        self.tokenizer = tokenizer
        self.position = StreamPosition()
        self._rows: Iterator[tuple[int, int, PlacedRow]] | None = None  # (place of the shard, row of it, row)
        self._window: list[PlacedRow] = []  # shuffled
        self._next_window: tuple[int, int] = (0, 0)  # (shard, row) behind the present one
        self._ready: list[tuple[TokenizedExample | None, bool]] = []  # tokenised rows of the window, the next one last

    @property
    def num_examples(self) -> int | None:
        """`size` of the source, else the number of rows; None where it is not known. Only the mix looks at it."""
        return self.source.size or self.shards.num_rows

    def next(self) -> TokenizedExample:
        """The next example.

        Raises: UserError if a row is faulty, or a whole pass has no example.
        """
        while True:
            if not self._ready:
                self._tokenize_more()
            example, cut = self._ready.pop()
            here = self.position
            self.position = replace(
                here,
                taken=here.taken + 1,
                num_drawn=here.num_drawn + (example is not None),
                num_truncated=here.num_truncated + (cut and example is not None),
                num_dropped=here.num_dropped + (example is None),
            )
            if example is not None:
                return example

    def state_dict(self) -> dict[str, int]:
        """The position; JSON types only."""
        return asdict(self.position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken, in a stream of the same data and settings."""
        self.position = StreamPosition(**state)
        self._rows, self._window, self._ready = None, [], []

    def fingerprint(self) -> str:
        """16 hex digits over the shards, the settings and the first rows as they are tokenised."""
        data, source = self.data, self.source
        # Checkpoints hold the fingerprint, so this text must not change.
        settings = (
            f"StreamSettings(name={self.name!r}, format={source.format!r}, max_length={data.max_length!r}, "
            f"loss_on={data.loss_on!r}, too_long={data.too_long!r}, window={source.shuffle_window!r}, "
            f"size={source.size!r}, seed={data.seed!r}, number={self.number!r})"
        )
        digest = hashlib.sha256(f"{self.shards.names} {settings}".encode())
        for example in self._sample:
            digest.update(example.input_ids.tobytes() + example.loss_mask.tobytes())
        return digest.hexdigest()[:16]

    @property
    def mean_length(self) -> float:
        """Tokens of an example, estimated from the first rows."""
        lengths = [len(example) for example in self._sample]
        return sum(lengths) / len(lengths) if lengths else float(self.data.max_length)

    @cached_property
    def _sample(self) -> list[TokenizedExample]:
        """The first rows of the first shard as examples, without those that are dropped."""
        rows = [row for row, _ in zip(self.shards.readers[0](0), range(_SAMPLE), strict=False)]
        return [example for example, _ in self._tokenized(rows) if example is not None]

    @cached_property
    def _format(self) -> str:
        """The layout of all rows, found from the first row."""
        for reader in self.shards.readers:
            for _, row in reader(0):
                return choose_format(list(row), self.source.format, self.shards.where)
        raise UserError(f"{self.shards.where}: the data set is empty, allowed: at least one row")

    def _tokenize_more(self) -> None:
        """Fill `_ready` from the window, or from the next one if it is used up."""
        if not self._window:
            self._read_window()
        if self.position.taken == len(self._window):
            shard, row = self._next_window
            self.position = replace(self.position, window=self.position.window + 1, shard=shard, row=row, taken=0)
            self._read_window()
        taken = self.position.taken
        self._ready = self._tokenized(self._window[taken : taken + _TOKENIZED_AT_ONCE])[::-1]

    def _read_window(self) -> None:
        """The rows of the window that begins at the position, shuffled. After the last window the next pass begins."""
        rows = self._window_rows()
        if not rows:
            here = self.position
            if here.num_drawn == here.num_drawn_before:
                raise UserError(
                    f"{self.name}: {self.shards.where} gives no example ({here.num_dropped:,} rows are longer than "
                    f"data.max_length, {self.data.max_length})."
                )
            begin = {"window": 0, "shard": 0, "row": 0, "taken": 0}
            self.position = replace(here, epoch=here.epoch + 1, num_drawn_before=here.num_drawn, **begin)
            self._rows = None
            rows = self._window_rows()
        order = self._generator(3, self.position.window).permutation(len(rows))
        self._window = [rows[index] for index in order.tolist()]

    def _window_rows(self) -> list[PlacedRow]:
        if self._rows is None:
            self._rows = self._pass_from(self.position.shard, self.position.row)
        rows = []
        for shard, row, placed in self._rows:
            rows.append(placed)
            self._next_window = (shard, row + 1)
            if len(rows) == self.source.shuffle_window:
                break
        return rows

    def _pass_from(self, place: int, skip: int) -> Iterator[tuple[int, int, PlacedRow]]:
        """(place of the shard, row of it, row) of this pass from a place on."""
        order: NDArray[np.int64] = self._generator(2).permutation(len(self.shards.readers))
        for shard in range(place, len(order)):
            first = skip if shard == place else 0
            for row, placed in enumerate(self.shards.readers[order[shard]](first), start=first):
                yield shard, row, placed

    def _generator(self, purpose: int, *part: int) -> np.random.Generator:
        """The purposes 2 and 3 are those of this file; 1 is that of the shuffles of `MixOrder`."""
        entropy = [self.data.seed, purpose, self.number, self.position.epoch, *part]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    def _tokenized(self, rows: list[PlacedRow]) -> list[tuple[TokenizedExample | None, bool]]:
        examples, faults = [], []
        for place, row in rows:
            try:
                examples.append(example_of_format(row, self._format, label=self.name, named=True, id=place))
            except RowFault as fault:
                faults.append(f"{place}: {fault}")
        if faults:
            raise UserError(*faults[:MAX_SHOWN_FAULTS])
        tally = ExampleTally(self.name, self.data.max_length, self.data.too_long)
        done = tally.add(examples, self.tokenizer, self.data.loss_on)
        tally.check(len(examples))
        return done
