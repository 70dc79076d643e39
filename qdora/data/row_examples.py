"""What makes an Example of each row of a user's own data: renamed columns, a template, the layout of the first row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import StrictUndefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qdora.data.chat_template import RENDER_ERRORS
from qdora.data.example import Example
from qdora.data.row_formats import (
    CHAT_COLUMNS,
    check_no_media,
    choose_format,
    example_of_format,
    is_empty,
    read_columns,
    unused_columns,
)
from qdora.data.rows import Row, RowFault, check_encodable
from qdora.errors import UserError, first_line, nearest
from qdora.recipe.data_settings import CHAT_FORMATS, SourceConfig, TemplateConfig, no_chat

FIRST_ROWS = 64
"""Rows in which each column that `columns` names must be found once."""


class RowExamples:
    """Rows of a source -> Examples.

    Args:
        first: The first rows that can be read; with none, any layout will do.
        where: File, folder or Hub address, for error lines.
        named: Examples get the label of the source as their task, whatever a row says.

    Attributes:
        unused: Columns that rows had so far and that are not read.
    Raises: UserError if no layout fits, or a column that `columns` names is in none of the first rows.
    """

    def __init__(self, source: SourceConfig, first: Sequence[Row], where: str, *, named: bool) -> None:
        self.source, self.named = source, named
        self.unused: set[str] = set()
        self.template = None if source.template is None else _RowTemplate(source.template)
        _check_columns(source.columns or {}, first, where)
        self.format = "completion" if self.template else "text"
        if first and self.template is None:
            self.format = choose_format(list(self._renamed(first[0])), source.format, where)
            _check_read(source, self.format, where)
            if source.chat and self.format not in CHAT_FORMATS:
                raise UserError(f"{where}: chat: {no_chat(self.format)}. Fix: remove chat, or set columns or format.")

    def __call__(self, row: Row, id: str) -> Example:
        """The example of a row; `id` names it where the row does not.

        Raises: RowFault if a column is missing or holds the wrong thing.
        """
        named = self._renamed(row)
        made = named if self.template is None else self._chat_columns(named) | self.template.rendered(named)
        label, chat = self.source.label, self.source.chat
        example = example_of_format(made, self.format, label=label, named=self.named, id=id, chat=chat)
        check_no_media(row, (example.prompt, example.answer, *(turn.content for turn in example.messages)))
        self.unused.update(self._unused(row, named))
        return example

    def _chat_columns(self, row: Row) -> dict[str, Any]:
        return {name: row[name] for name in CHAT_COLUMNS if name in row and self.source.chat}

    def _renamed(self, row: Row) -> Row:
        columns = self.source.columns
        if not columns:
            return row
        gone = {*columns, *columns.values()}
        kept = {name: value for name, value in row.items() if name not in gone}
        return kept | {name: row[own] for name, own in columns.items() if own in row}

    def _unused(self, row: Row, named: Row) -> Iterator[str]:
        columns = self.source.columns or {}
        yield from (name for name in columns if name in row and name not in columns.values())
        if self.template is None:
            yield from unused_columns(named, self.format, self.source.chat)
        else:
            read = {*self.template.columns, *self._chat_columns(named), "id", "task"}
            yield from (name for name, value in named.items() if name not in read and not is_empty(value))


def _check_columns(columns: Mapping[str, str], first: Sequence[Row], where: str) -> None:
    there = list(dict.fromkeys(str(name) for row in first for name in row))
    absent = [own for own in columns.values() if own not in there] if first else []
    if absent:
        known = f"there are {', '.join(there)}"
        raise UserError(*(f"{where}: columns: no column {own!r}, {known}.{nearest(own, there)}" for own in absent))


def _check_read(source: SourceConfig, format: str, where: str) -> None:
    """Raise UserError if `columns` gives a column a name that the format does not read."""
    reads = read_columns(format, source.chat)
    faults = []
    for name in source.columns or {}:
        if name not in reads:
            hint = nearest(name, reads)
            if (format, name) == ("messages", "system"):
                hint = " Fix: set format: sharegpt, and conversations in place of messages in columns."
            faults.append(f"{where}: columns: format {format} reads no {name!r}, it reads {', '.join(reads)}.{hint}")
    if faults:
        raise UserError(*faults)


class _RowTemplate:
    """Prompt and completion of any row, by Jinja templates from the recipe that can reach nothing but the row."""

    def __init__(self, given: TemplateConfig) -> None:
        # null is written as nothing, not as None
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=lambda value: "" if value is None else value
        )
        texts = {"prompt": given.prompt, "completion": given.completion}
        self.parts = {name: environment.from_string(text) for name, text in texts.items()}
        self.columns = set[str]().union(
            *(meta.find_undeclared_variables(environment.parse(text)) for text in texts.values())
        )

    def rendered(self, row: Row) -> dict[str, Any]:
        """The row prompt, completion, and id and task where the row has them."""
        made = {name: row[name] for name in ("id", "task") if isinstance(row.get(name), str)}
        for name, template in self.parts.items():
            try:
                made[name] = template.render(row)
                check_encodable(made[name])
            except RENDER_ERRORS as error:
                raise RowFault(f"template.{name}: {first_line(error)}; the columns are {', '.join(row)}") from error
        return made
