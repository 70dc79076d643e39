"""Sizes as people write them: 40GiB, 500 MB."""

from __future__ import annotations

from pydantic import ByteSize, TypeAdapter, ValidationError


def parse_size(text: str) -> int:
    """Bytes of a size such as '40GiB', '40 GB' or '512MiB'; ValueError if it is none."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ValueError(f"must be a size such as 40GiB or 500 MB, got {text!r}") from None


def size_text(num_bytes: int) -> str:
    """12.3 GiB, 45 MiB, 3 KiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"
