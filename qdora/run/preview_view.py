"""A preview for people: in the terminal, and as a page that needs no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from qdora.data.mix_plan import unused_in_words
from qdora.files.atomic import atomic_write_text, disk_failures
from qdora.files.console import consoles
from qdora.files.html_page import render_page
from qdora.files.visible_text import visible
from qdora.run.preview import Preview, SourcePreview

_BAR = 30
_LOSS, _SPECIAL, _FAINT = "green underline", "bold magenta", "dim"  # told apart without colours, too
_REFUSED = "A run with this data is refused."


def show_preview(preview: Preview, console: Console | None = None) -> None:
    """Print every source: its numbers, lengths, warnings and examples. Without colours, marks stand for them.

    A terminal gets sentences that are wrapped between words; elsewhere each is one line.
    """
    _, results = consoles(console)
    marks = results.color_system is None or results.no_color

    def say(text: str | Text, style: str = "", indent: int = 0) -> None:
        line = Text(text, style) if isinstance(text, str) else text
        if results.is_terminal:
            results.print(Padding(line, (0, 0, 0, indent), expand=False))
        else:
            results.print(Text(" " * indent) + line, soft_wrap=True)

    say(_settings(preview))
    say(_legend(marks))
    if preview.is_refused:
        say(_REFUSED, "bold red")
    for source in preview.sources:
        results.print()
        say(visible(source.name), "bold")
        for text in source_lines(source, preview.too_long):
            say(visible(text), indent=2)
        for tokens, number, bar in _drawn(source, preview.max_length):
            say(f"{tokens}  {number}  {bar}", indent=2)
        for text in source_warnings(source):
            say(f"! {visible(text)}", "yellow", indent=2)
        for example in source.examples:
            numbers = f"{example['num_in_loss']} of {example['num_tokens']} tokens in the loss"
            results.print()
            say(f"example {visible(example['id'])}: {numbers}", "bold", indent=2)
            results.print(_tokens(example, marks), soft_wrap=True)


def write_preview(preview: Preview, file: Path) -> None:
    """Write the page, and print its path. Raises: RunFailure if the disk cannot be written."""
    sources = [
        {
            "name": source.name,
            "lines": source_lines(source, preview.too_long),
            "warnings": source_warnings(source),
            "bars": _bar_rows(source, preview.max_length),
            "examples": source.examples,
        }
        for source in preview.sources
    ]
    page = render_page(
        "qdora.run",
        "preview_page.html.j2",
        title=f"Preview of {preview.recipe}",
        settings=_settings(preview),
        refused=_REFUSED if preview.is_refused else "",
        sources=sources,
    )
    with disk_failures(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, page)
    consoles()[1].print(f"page: {file}", soft_wrap=True)


def source_lines(source: SourcePreview, too_long: str) -> list[str]:
    """The numbers of a source in words."""
    of = "" if source.num_rows is None else f" of {source.num_rows:,}"
    read = {
        "all": "the only training row" if source.num_rows_read == 1 else f"all {source.num_rows_read:,} training rows",
        "sample": f"a sample of {source.num_rows_read:,}{of} rows",
        "first": f"the first {source.num_rows_read:,}{of} rows of a stream",
    }
    lines = [
        f"{read[source.drawn]}: {source.num_examples:,} examples, {source.num_tokens:,} tokens, "
        f"{source.share_in_loss:.1%} of them in the loss"
    ]
    if source.lengths:
        sizes = (f"{name.replace('%', '% up to')} {size:,}" for name, size in source.lengths.items())
        lines.append(f"tokens of an example: {', '.join(sizes)}")
    if source.num_too_long:
        becomes = {
            "error": "a run is refused",
            "truncate": f"{source.num_cut:,} are cut (a prompt at its front, a chat behind its last answer that fits), "
            f"{source.num_dropped:,} dropped with nothing left to learn",
            "drop": "they are dropped",
            "split": "plain text is split, a run with others is refused",
        }
        lines.append(f"{source.num_too_long:,} longer than data.max_length: {becomes[too_long]} ({too_long})")
    return lines


def source_warnings(source: SourcePreview) -> list[str]:
    """Faults, notes, checks and unread columns of a source, one line each."""
    faults = [f"{each} (skipped)" for each in source.faults] if source.drawn == "first" else list(source.faults)
    unused = [unused_in_words(source.unused)] if source.unused else []
    return [*faults, *source.notes, *source.checks, *unused]


def _settings(preview: Preview) -> str:
    return visible(
        f"{preview.recipe}: tokens of {preview.model}, data.max_length {preview.max_length:,}, "
        f"data.too_long {preview.too_long}, data.loss_on {preview.loss_on}"
    )


def _bar_rows(source: SourcePreview, max_length: int) -> list[tuple[str, str, float]]:
    """(tokens, examples, length of the bar from 0 to 1) of the histogram."""
    most = max((bar.num_examples for bar in source.bars), default=0)
    rows = []
    for bar in source.bars:
        tokens = f"{bar.start:,}" if bar.start == bar.end else f"{bar.start:,} to {bar.end:,}"
        tokens += " (too long)" if bar.start > max_length else ""
        rows.append((tokens, f"{bar.num_examples:,}", bar.num_examples / max(most, 1)))
    return rows


def _drawn(source: SourcePreview, max_length: int) -> list[tuple[str, str, str]]:
    """The rows of the histogram in columns; one example has at least one block."""
    rows = _bar_rows(source, max_length)
    widths = [max((len(str(row[column])) for row in rows), default=0) for column in (0, 1)]
    return [
        (tokens.rjust(widths[0]), number.rjust(widths[1]), "█" * math.ceil(_BAR * share))
        for tokens, number, share in rows
    ]


def _legend(marks: bool) -> Text:
    if marks:
        return Text("│ ends a token, ⟦ ⟧ are around tokens in the loss, « » around special ones, ⏎ is a line end.")
    return Text.assemble(
        "│ ends a token: ", ("in the loss", _LOSS), ", only read, ", ("special", _SPECIAL), "; ⏎ is a line end."
    )


def _tokens(example: Mapping[str, Any], marks: bool) -> Text:
    """The tokens of an example, one behind the other."""
    text, pieces = Text(), example["pieces"]
    for number, piece in enumerate(pieces):
        if example["left_out"] and number == example["left_out_behind"]:
            text.append(f" … {example['left_out']} tokens … ", style=_FAINT)
        shown = visible(piece["text"])
        words = shown.removesuffix("\n")
        if marks:
            before = number > 0 and pieces[number - 1]["in_loss"]
            after = number + 1 < len(pieces) and pieces[number + 1]["in_loss"]
            words = f"«{words}»" if piece["is_special"] else words
            words = ("⟦" if piece["in_loss"] > before else "") + words + ("⟧" if piece["in_loss"] > after else "")
        styles = [name for name, key in ((_LOSS, "in_loss"), (_SPECIAL, "is_special")) if piece[key]]
        text.append(words, style=" ".join(styles))
        text.append("│", style=_FAINT)
        text.append("\n" if shown.endswith("\n") and number + 1 < len(pieces) else "")
    return text
