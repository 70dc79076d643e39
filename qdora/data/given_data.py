"""Data that is scored beside a run's own: read as a source of the run is, and compared with what the run trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qdora.data.data_file import readable
from qdora.data.source_files import files_of
from qdora.errors import UserError
from qdora.files.sampled_digest import sampled_digest
from qdora.files.user_paths import user_path
from qdora.recipe.data_settings import SourceConfig, absolute_pattern, is_path, names_files

logger = logging.getLogger(__name__)


def place_of(given: str) -> str:
    """A file, folder or pattern as an absolute path; the id of a Hub data set as it is.

    Unlike in a recipe, the name of a folder alone means that folder if there is one.
    """
    path = user_path(given)
    return absolute_pattern(given, Path.cwd()) if path.exists() or is_path(given) else given


def has_splits(place: str) -> bool:
    """Whether a place of `place_of` has splits: a folder and a Hub data set have, a file and a pattern have not."""
    return not is_path(place) or Path(place).is_dir()


def given_source(
    place: str, mix: Sequence[SourceConfig], like: str | None = None, split: str = "train"
) -> SourceConfig:
    """A split of a place of `place_of` as a source, with the format, chat, columns and template of a source of the run.

    That source is the one called `like`, else the one of the same Hub id or of a file of the same content, else any if
    all of the mix are read the same way. Otherwise the format follows from the columns, after a warning if some source
    has settings of its own.
    """
    own = [source for source in mix if source.source is not None]
    same = [source for source in own if (source.label == like if like is not None else source.source == place)]
    if not same and not _all_alike(mix):
        files = _contents(SourceConfig.model_construct(source=place), split)
        same = [source for source in own if files & _known_contents(source)]
    plain = SourceConfig.model_construct()
    if own and _all_alike(same or mix):
        layout = (same or own)[0]
    else:
        layout = plain
        if set_up := [source.label for source in own if _reading(source) != _reading(plain)]:
            logger.warning(
                "%s is read by the names of its columns alone, since the sources of the run are read in different "
                "ways. To read it like one of them, name that one with --tasks: %s.",
                place,
                ", ".join(set_up),
            )
    if layout.source != place:
        layout = layout.model_copy(update={"revision": None, "config": None, "data_files": None})
    return layout.model_copy(update={"source": place, "name": None})


def _all_alike(sources: Sequence[SourceConfig]) -> bool:
    return len({repr(_reading(source)) for source in sources}) == 1


def _reading(source: SourceConfig) -> tuple[object, ...]:
    """What decides how the rows of a source become text."""
    return source.task, source.format, source.chat, source.columns, source.template


def trained_on(given: SourceConfig, split: str, mix: Sequence[SourceConfig]) -> list[str]:
    """The sources that train on the given data: on a file of the same content, or on the same split on the Hub."""
    files = _contents(given, split)
    hub = (given.source, given.config, split)
    return [
        source.label
        for source in mix
        if files & _contents(source, source.split) or hub == (source.source, source.config, source.split)
    ]


def _known_contents(source: SourceConfig) -> set[tuple[int, str]]:
    """`_contents` of the training and the validation data of a source."""
    validation = source.validation or "validation"
    if names_files(validation):
        held_out = _contents(source.model_copy(update={"source": validation}), source.split)
    else:
        held_out = _contents(source, validation)
    return _contents(source, source.split) | held_out


def _contents(source: SourceConfig, split: str) -> set[tuple[int, str]]:
    """Size and digest of each file of a split; of none that is on the Hub or missing by now."""
    found: set[tuple[int, str]] = set()
    place = source.path or source.source
    if place is not None and source.is_local:
        with suppress(UserError):
            for file in files_of(user_path(place), split):
                with readable(file):
                    facts, digest = sampled_digest(file)
                found.add((facts.st_size, digest))
    return found
