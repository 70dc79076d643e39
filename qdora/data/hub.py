"""Data sets on the Hub, read by `datasets`: whole, or a file at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from qdora.data.files import PlacedRow, Shards
from qdora.data.rows import Entry, Rows, empty_data_set
from qdora.errors import HubFailure, UserError, nearest_path
from qdora.files.console import OF_THIS_PROCESS
from qdora.recipe.data_settings import SourceConfig, split_names
from qdora.recipe.section import reason_of

logger = logging.getLogger("qdora")

_WAITS = (1.0, 5.0, 25.0)
"""Seconds before each new attempt to read a row from the Hub."""


def hub_rows(source: SourceConfig, split: str) -> Rows:
    """The rows of a split of a data set on the Hub; of a streamed one they are in memory."""
    place = str(source.source)
    if source.stream:  # to prepare one split, `datasets` downloads and converts all of them
        rows = [row for reader in hub_shards(source, split).readers for _, row in reader(0)]
        made = Rows(place, "row", len(rows), lambda indices: ((int(index), rows[index]) for index in indices))
    else:
        loaded = _load_dataset(source, split)

        def chosen(indices: Sequence[int]) -> Iterator[tuple[int, Entry]]:
            return zip(map(int, indices), map(dict, loaded.select(indices)), strict=True)

        # The fingerprint of a data set that `datasets` has prepared follows its files' check sums.
        made = Rows(place, "row", len(loaded), chosen, f"{place} {source.config} {loaded._fingerprint}")
    if not made.num_rows:
        raise UserError(empty_data_set(place))
    return made


def hub_shards(source: SourceConfig, split: str | None = None) -> Shards:
    """The files of a split (None: the training split) of a data set on the Hub, streamed by `datasets`."""
    place, split = str(source.source), split or source.split
    stream = _load_dataset(source, split, streaming=True)
    num_shards = stream.num_shards
    # What is known of the whole data set says nothing of some of its files
    splits = (stream.info.splits or {}) if source.data_files is None else {}
    num_rows = splits[split].num_examples if split in splits else None
    readers = tuple(partial(_shard, place, stream, number) for number in range(num_shards))
    parts = f" {source.config or ''} {source.data_files or ''}".rstrip()
    names = tuple(f"{place}@{source.revision}{parts} {split} {number} of {num_shards}" for number in range(num_shards))
    return Shards(place, names, readers, num_rows or None)


def _load_dataset(source: SourceConfig, split: str, **options: Any) -> Any:
    import datasets  # takes a second; only needed for data from the Hub

    if source.config is not None:
        options["name"] = source.config
    if source.data_files is not None:
        files: Any = source.data_files
        options["data_files"] = {
            name: list(some) if isinstance(some, tuple) else some
            for name, some in (files if isinstance(files, Mapping) else {split_names(source.split)[0]: files}).items()
        }
    try:
        return datasets.load_dataset(source.source, split=split, revision=source.revision, **options)
    except Exception as error:  # what `datasets`, fsspec and the clients of the Hub raise has no base class in common
        path, reason = Path(str(source.source)), reason_of(error)
        what = f"cannot be read from the Hub ({reason})."
        is_here = path.exists()
        hint = f" Fix: for the folder on this machine write ./{path}" if is_here else ""
        is_missing = isinstance(error, datasets.exceptions.DatasetNotFoundError)  # or it is private or gated
        if "Config name is missing" in reason:
            hint = " Fix: name one of these as config of the source."
        elif is_missing and "is a gated dataset" in reason:
            what = "the data set is gated. Fix: accept its terms on its page on the Hub, then run: hf auth login"
        elif is_missing and not is_here and not str(error).startswith("Revision"):
            what = "no such file or directory, and no data set of that name on the Hub."
            hint = f"{nearest_path(path)} If it is private, run: hf auth login"
        elif isinstance(error, ConnectionError) and not is_here:
            hint = nearest_path(path)
        raise HubFailure(f"{source.source}: {what}{hint}") from error


def _shard(place: str, stream: Any, number: int, skip: int) -> Iterator[PlacedRow]:
    """The rows of a file on the Hub from `skip` on. A lost connection is opened again, three times for a row."""
    shard, row, waits = stream.shard(stream.num_shards, number), skip, iter(_WAITS)
    while True:
        try:
            for values in shard.skip(row) if row else shard:
                yield f"{place}: shard {number}: row {row}", dict(values)
                row, waits = row + 1, iter(_WAITS)
            return
        except Exception as error:  # as above
            wait = next(waits, None)
            if wait is None:
                where = f"{place}: shard {number}: row {row}"
                raise UserError(f"{where}: cannot be read from the Hub ({reason_of(error)})") from error
            text = "%s: shard %d: %s. Trying again in %g s."
            logger.warning(text, place, number, reason_of(error), wait, extra=OF_THIS_PROCESS)
            time.sleep(wait)
