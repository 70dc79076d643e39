"""Text of a model's tokens with every character visible, for pages and terminals."""

from __future__ import annotations

_SHOWN = {"\n": "⏎\n", "\t": "⇥\t"}


def visible(text: str) -> str:
    """Text in which no character hides: a line end and a tab have a mark, others that print nothing are escaped.

    Escaped are control, format and bidirectional characters, half surrogate pairs and blanks other than the space:
    U+200B becomes \\u200b. So no text of a data set can reorder or hide what stands around it.
    """
    if text.isprintable():
        return text
    return "".join(_SHOWN.get(each) or (each if each.isprintable() else _escaped(each)) for each in text)


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
