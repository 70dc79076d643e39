"""The guide of all settings, from the recipe's own schema: names, defaults, allowed values and meaning."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from qdora.recipe.settings import Recipe

_HEAD = """# Settings

All settings of a recipe, by section. After each name stands its default; `null` means not set. On the command line
`-s SECTION.NAME=VALUE` sets one. The value is YAML, and an entry of a list has its number in brackets; quotes keep both
from the shell: `-s 'adapter.targets=[q_proj, v_proj]' -s 'data.mix[0].limit=100'`. The value `null` removes what the
recipe sets, so that the default holds; only for `train.clip` and `train.checkpoint_every` it is a value: off. A setting
that would have no effect beside the others is an error.

```bash
qdora train mine.yaml -s adapter.rank=32 -s adapter.alpha=64 -s train.steps=100
qdora validate mine.yaml    # checks a recipe and prints it with its defaults
qdora schema > recipe.json  # the same as this guide, for an editor
```"""


def settings() -> str:
    schema = Recipe.model_json_schema()
    top = "\n".join(_entry(name, field) for name, field in schema["properties"].items() if not _section(field))
    parts = [_HEAD, *_sections(schema, "", schema), f"## Outside the sections\n\n{top}"]
    return "\n\n".join(parts) + "\n"


def _sections(schema: dict[str, Any], path: str, section: dict[str, Any]) -> Iterator[str]:
    """The sections below one, each followed by its own."""
    for name, field in section["properties"].items():
        found = _section(field)
        if found:
            inner = schema["$defs"][found]
            here = f"{path}.{name}".lstrip(".") + ("[]" if field.get("type") == "array" else "")
            # A section that is always there has a heading of its own
            entries = [_entry(key, each, inner) for key, each in inner["properties"].items() if "$ref" not in each]
            yield f"## {here}\n\n{_wrapped(inner['description'])}\n\n" + "\n".join(entries)
            yield from _sections(schema, here, inner)


def _section(field: dict[str, Any]) -> str | None:
    """The name of the section that a field holds, or whose list it is."""
    options = [field, field.get("items", {}), *field.get("anyOf", ())]
    return next((each["$ref"].rpartition("/")[2] for each in options if "$ref" in each), None)


def _entry(name: str, field: dict[str, Any], section: dict[str, Any] | None = None) -> str:
    value = field.get("default", {})  # as YAML writes it
    default = f"`{value if isinstance(value, str) else json.dumps(value)}`"
    if section is not None and name in section.get("required", ()):
        default = "required"
    text = f"- `{name}` ({default}): {field['description']}"
    # The names or numbers of which the field, or each item of it, must be one
    allowed = [str(each) for each in field.get("enum") or field.get("items", {}).get("enum") or []]
    if any(each not in field["description"] for each in allowed):
        text += f" One of: {', '.join(allowed)}."
    return _wrapped(text, "  ")


def _wrapped(text: str, indent: str = "") -> str:
    # A name in angle brackets would be HTML.
    words = [re.sub(r"^(.*>[.\w]*?)([.,]?)$", r"`\1`\2", word) if "<" in word else word for word in text.split()]
    return textwrap.fill(" ".join(words), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
