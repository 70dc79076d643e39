"""A digest of samples of a file, for files that are too long to read whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10


def sampled_digest(path: Path) -> tuple[os.stat_result, str]:
    """Size and times of a file, and the SHA-256 of samples of it: all bytes of a 70B model would take minutes."""
    facts, digest = path.stat(), hashlib.sha256()
    with path.open("rb") as stream:
        for start in range(0, facts.st_size, max(facts.st_size // _SAMPLES, _SAMPLE_BYTES)):
            stream.seek(start)
            digest.update(stream.read(_SAMPLE_BYTES))
    return facts, digest.hexdigest()
