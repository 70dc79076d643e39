"""Sizes as people write them: 40GiB, 500 MB, 2.5e9."""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*")


_LEAST_WITHOUT_UNIT = 2**20


def parse_size(text: str) -> int:
    """Bytes of a size such as '40GiB', '40 GB' or '512MiB'; upper case is optional.

    A number without a unit is bytes, if it is at least 1 MiB: who writes 40 means something else.

    ValueError: The text is not a size, or less than a byte.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else ""
    size = float(match[1]) * UNITS[unit] if match and unit in UNITS else 0.0
    if not 0.5 < size < 1e30 or (unit == "" and size < _LEAST_WITHOUT_UNIT):
        raise ValueError(f"must be a number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 40GiB, got {text!r}.")
    return round(size)


def size_text(num_bytes: int) -> str:
    """12.3 GiB, 45 MiB, 3 KiB."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:.2f} GiB"
    return f"{num_bytes / 2**20:.1f} MiB" if num_bytes >= 2**20 else f"{num_bytes / 2**10:.0f} KiB"
