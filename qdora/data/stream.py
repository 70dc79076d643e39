"""Examples of a source larger than memory: read, shuffled and tokenised while training, resumed exactly anywhere."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from qdora.data.example import Example, RowFault, made_from
from qdora.data.files import PlacedRow, Rows
from qdora.data.formats import FIRST_ROWS, RowExamples
from qdora.data.tokenize import ExampleTally, Outcome, TokenizedExample
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig

_TOKENIZED_AT_ONCE = 64  # rows for one call of the tokenizer: done again on resume
_SAMPLE = FIRST_ROWS  # that tell one stream from another
_MOST_NAMED = 5  # faulty rows
# `data.max_bad_rows` by default: the larger of a number and a share of the rows
_LEAST_BAD_ROWS, _BAD_SHARE = 10, 0.001

logger = logging.getLogger("qdora")


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where a stream stands."""

    epoch: int = 0  # passes over the shards that are done
    window: int = 0  # windows of this pass that are done
    shard: int = 0  # where the present window begins: index in the pass's order of the shards,
    row: int = 0  # and row of that shard
    taken: int = 0  # rows of the present window that are used up
    num_drawn: int = 0  # examples given, in all passes
    num_truncated: int = 0
    num_dropped: int = 0
    num_drawn_before: int = 0  # examples given before this pass
    num_bad: int = 0  # faulty rows skipped, in all passes
    num_bad_before: int = 0
    bad_rows: tuple[str, ...] = ()  # place and fault of the first of them
    part: int = 0  # examples of the next row that are given


class ExampleStream:
    """An endless stream of tokenised examples, pass after pass over the shards, a pure function of data and settings.

    Each pass takes the shards in a new order, reads them one after the other, and gives every run of `shuffle_window`
    rows in a shuffled order. At most a window of rows is in memory, and only that is read again on resume.

    `data.mix[number]` is the source.
    """

    def __init__(self, shards: Rows, data: DataConfig, number: int, tokenizer: Any) -> None:
        self.shards = shards
        self.data, self.source, self.number = data, data.mix[number], number
        self.name = self.source.label
        self.task_names = [self.name]
        self.tokenizer = tokenizer
        self.position = StreamPosition()
        self._rows: Iterator[tuple[int, int, PlacedRow]] | None = None  # (index of the shard, row of it, row)
        self._window: list[PlacedRow] = []  # shuffled
        self._next_window: tuple[int, int] = (0, 0)  # (shard, row) behind the present one
        # Of the window, the next one last; whether it ends its row
        self._ready: list[tuple[Outcome, bool]] = []
        self.first_tally = ExampleTally(self.name, data, tokenizer)

    # What is known of it

    @property
    def num_examples(self) -> int | None:
        """`size`, else the number of rows times the examples of one of the first; None where it is not known."""
        if self.source.size or not self.shards.num_rows:
            return self.source.size
        return round(self.shards.num_rows * sum(map(len, self.first_rows)) / max(len(self.first_rows), 1))

    @property
    def examples(self) -> list[TokenizedExample]:
        """Those of the first rows."""
        return [part for row in self.first_rows for part in row if isinstance(part, TokenizedExample)]

    @cached_property
    def first_rows(self) -> list[list[Outcome]]:
        """What became of the first rows of the first shard."""
        rows = self._tokenized(self._sample, self.first_tally)
        faults = [fault for row in rows for fault in row if isinstance(fault, str)]
        self._check_bad(faults, 0, len(faults))
        return rows

    @cached_property
    def _sample(self) -> list[PlacedRow]:
        return list(islice(self.shards.readers[0](0), _SAMPLE))

    def _check_bad(self, shown: Sequence[str], num_rows: int, num_bad: int) -> None:
        """UserError if a pass has too many faulty rows among its first `num_rows`."""
        most = self.data.max_bad_rows
        if most is None:
            most = max(
                _LEAST_BAD_ROWS, int(_BAD_SHARE * max(num_rows, self.source.size or self.shards.num_rows))
            )
        if num_bad > most:
            raise UserError(
                f"{self.name}: {num_bad} rows are faulty, data.max_bad_rows allows {most}. The first: "
                f"{'; '.join(shown[:_MOST_NAMED])}. Fix: mend them in place, or raise it (with --resume)."
            )

    # The next example

    def next(self) -> TokenizedExample:
        """The next example. UserError if a pass has too many faulty rows, or no example at all."""
        while True:
            if not self._ready:
                self._tokenize_more()
            example, is_last = self._ready.pop()
            here, is_example = self.position, isinstance(example, TokenizedExample)
            self.position = replace(
                here,
                taken=here.taken + is_last,
                part=0 if is_last else here.part + 1,
                num_drawn=here.num_drawn + is_example,
                num_truncated=here.num_truncated + getattr(example, "is_cut", False),
                num_dropped=here.num_dropped + (example is None),
                num_bad=here.num_bad + isinstance(example, str),
            )
            if isinstance(example, TokenizedExample):
                return example
            if isinstance(example, str):
                here = self.position
                if example not in here.bad_rows and len(here.bad_rows) < _MOST_NAMED:
                    self.position = here = replace(here, bad_rows=(*here.bad_rows, example))
                    logger.warning("%s: skipped a faulty row. %s", self.name, example)
                num_rows = here.window * self.source.shuffle_window + here.taken
                self._check_bad(here.bad_rows, num_rows, here.num_bad - here.num_bad_before)

    def _tokenize_more(self) -> None:
        if not self._window:
            self._read_window()
        if self.position.taken >= len(self._window):
            shard, row = self._next_window
            here = self.position
            self.position = replace(here, window=here.window + 1, shard=shard, row=row, taken=0, part=0)
            self._read_window()
        taken = self.position.taken
        tally = ExampleTally(self.name, self.data, self.tokenizer)
        rows = self._tokenized(self._window[taken : taken + _TOKENIZED_AT_ONCE], tally)
        if self.position.part >= len(rows[0]):  # the row was changed since the checkpoint: it comes whole
            self.position = replace(self.position, part=0)
        rows[0] = rows[0][self.position.part :]
        self._ready = [(each, place == len(row)) for row in rows for place, each in enumerate(row, 1)][::-1]

    def _read_window(self) -> None:
        here = self.position
        self._window = []  # free before the next one is read
        if self._rows is None:
            self._rows = self._rest_of_pass()
        read = list(islice(self._rows, self.source.shuffle_window))
        if read:
            self._next_window = (read[-1][0], read[-1][1] + 1)
            order = self._generator(3, here.window).permutation(len(read))
            self._window = [read[index][2] for index in order.tolist()]
            return
        if here.num_drawn == here.num_drawn_before:
            long = f"({here.num_dropped:,} examples are longer than data.max_length, {self.data.max_length})"
            raise UserError(
                f"{self.name}: {self.shards.where} gives no example {'; '.join([long, *here.bad_rows])}"
            )
        start = replace(here, epoch=here.epoch + 1, window=0, shard=0, row=0, taken=0)
        self.position = replace(start, num_drawn_before=here.num_drawn, num_bad_before=here.num_bad)
        self._rows = None
        self._read_window()

    def _rest_of_pass(self) -> Iterator[tuple[int, int, PlacedRow]]:
        begin, order = self.position, self._generator(2).permutation(len(self.shards.readers))
        for shard in range(begin.shard, len(order)):
            first = begin.row if shard == begin.shard else 0
            for row, placed in enumerate(self.shards.readers[order[shard]](first), start=first):
                yield shard, row, placed

    def _generator(self, purpose: int, *part: int) -> np.random.Generator:
        """Purposes 2 and 3; 1 is that of the shuffles of `MixOrder`."""
        return np.random.default_rng([self.data.seed, purpose, self.number, self.position.epoch, *part])

    # Rows to examples

    @cached_property
    def make(self) -> RowExamples:
        """The layout of all rows, found from the first ones that can be read."""
        first = [row for _, row in self._sample if not isinstance(row, RowFault)]
        if not first:
            raise UserError(f"{self.shards.where}: the data set is empty")
        return RowExamples(self.source, first, self.shards.where, named=True)

    def _tokenized(self, rows: list[PlacedRow], tally: ExampleTally) -> list[list[Outcome]]:
        """What becomes of each row. A faulty one is left out as a whole."""
        made = [made_from(row, self.make, place) for place, row in rows]
        examples = [example for example in made if isinstance(example, Example)]
        done = iter(tally.add(examples))
        outcomes: list[list[Outcome]] = []
        for (place, _), example in zip(rows, made, strict=True):
            parts: list[Outcome] = next(done) if isinstance(example, Example) else [str(example)]
            wrong = next((part for part in parts if isinstance(part, str)), None)
            outcomes.append(parts if wrong is None else [f"{place}: {wrong}"])
        return outcomes

    # State

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.position) | {"bad_rows": list(self.position.bad_rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = StreamPosition(**state | {"bad_rows": tuple(state["bad_rows"])})
        self._rows, self._window, self._ready = None, [], []

    def fingerprint(self) -> dict[str, Any]:
        """What tells one stream from another; JSON types."""
        data, source = self.data, self.source
        # Checkpoints hold its digest
        settings = (
            f"StreamSettings(name={self.name!r}, format={source.format!r}, max_length={data.max_length!r}, "
            f"loss_on={data.loss_on!r}, too_long={data.too_long!r}, window={source.shuffle_window!r}, "
            f"size={source.size!r}, seed={data.seed!r}, number={self.number!r})"
        )
        settings += f" {source.columns} {source.template}" if source.columns or source.template else ""
        settings += " chat" if source.chat else ""
        return {
            "settings": hashlib.sha256(f"{self.shards.names} {settings}".encode()).hexdigest()[:16],
            "rows": [_row_digest(row) for row in self.first_rows],
        }

    def has_changed(self, before: dict[str, Any] | None) -> bool:
        """Whether it differs from an earlier `fingerprint`. Faulty rows that are mended are no difference."""
        now = self.fingerprint()
        if before is None or before["settings"] != now["settings"] or len(before["rows"]) != len(now["rows"]):
            return True
        return any(then not in (None, row) for then, row in zip(before["rows"], now["rows"], strict=True))


def _row_digest(row: list[Outcome]) -> str | None:
    """8 hex digits of the examples of a row; None for a faulty one."""
    if any(isinstance(part, str) for part in row):
        return None
    done = [part for part in row if isinstance(part, TokenizedExample)]
    content = b"".join(example.input_ids.tobytes() + example.loss_mask.tobytes() for example in done)
    return hashlib.sha256(content).hexdigest()[:8]
