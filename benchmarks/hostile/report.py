"""The counts of a part, and its faults."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hostile.judge import Outcome

# What a fault of an item of issue 17 that is mended elsewhere looks like.
KNOWN: dict[str, int] = {}


def of_cases(outcomes: Sequence[Outcome], seed: int) -> dict[str, Any]:
    """JSON values: what was tried, how it ended, the largest costs, and every fault with what repeats it."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    faults = [
        {
            "seed": seed,
            "case": outcome.number,
            "what": outcome.what,
            "happened": outcome.happened,
            "item": known(outcome),
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
        "new_faults": sum(fault["item"] is None for fault in faults),
        "slowest_seconds": max((outcome.seconds for outcome in outcomes), default=0.0),
        "most_memory": _most_memory(outcomes),
    }


def known(outcome: Outcome) -> int | None:
    """The item of issue 17 that a fault belongs to."""
    return next((item for pattern, item in KNOWN.items() if re.search(pattern, outcome.happened)), None)


def _most_memory(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    if not outcomes:
        return None
    most = asdict(max(outcomes, key=lambda outcome: outcome.memory_bytes - 2 * outcome.file_bytes))
    return {name: most[name] for name in ("number", "what", "memory_bytes", "file_bytes")}
