"""The counts of a part, and its faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hostile.judge import Outcome

NUM_MENDED = {"recipes": 6, "data": 4, "stored": 14}
"""Faults that the cases of seed 0 found in each part and that are mended; tests hold them."""


def of_cases(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """JSON values: what was tried, how it ended, the largest costs, and every fault with what repeats it."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    faults = [
        {
            "seed": seed,
            "case": outcome.number,
            "what": outcome.what,
            "happened": outcome.happened,
        }
        for outcome in outcomes
        if outcome.verdict == "fault"
    ]
    return {
        "tried": len(outcomes),
        "clear_lines": counts["clear"],
        "right_results": counts["right"],
        "undetectable": counts["undetectable"],
        "faults": faults,
        "num_mended": NUM_MENDED[outcomes[0].part] if outcomes else 0,
        "new_faults": len(faults),
        "slowest_seconds": max((outcome.seconds for outcome in outcomes), default=0.0),
        "most_memory": _most_memory(outcomes),
    }


def _most_memory(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    if not outcomes:
        return None
    most = asdict(max(outcomes, key=lambda outcome: outcome.memory_bytes - 2 * outcome.file_bytes))
    return {name: most[name] for name in ("number", "what", "memory_bytes", "file_bytes")}
