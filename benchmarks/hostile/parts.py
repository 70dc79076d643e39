"""The parts of the harness that read mutated files, and how their cases are run one after the other."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path

from hostile import data_files, recipes, stored_files
from hostile.judge import Outcome, judged
from hostile.material import make

COUNTS = {"recipes": 1000, "data": 300, "stored": 200}
_CASES = {"recipes": recipes.cases, "data": data_files.cases, "stored": stored_files.cases}


def run(part: str, seed: int, count: int | None, folder: Path, *, only: int | None = None) -> list[Outcome]:
    """The outcomes of a part's cases, or of the case `only`; `folder` is for their files."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    material = make(folder / part)
    outcomes = []
    total = COUNTS[part] if count is None else count
    for case in _CASES[part](seed, total if only is None else only + 1, material):
        if only is not None and case.number != only:
            continue
        outcome = judged(case, folder / part / "judged")
        outcomes.append(outcome)
        if only is not None:
            sys.stderr.write((folder / part / "output.txt").read_text(errors="replace"))
            print(outcome, file=sys.stderr)
        elif outcome.verdict == "fault":
            print(f"{part} {case.number}: {case.what}: {outcome.happened}"[:600], file=sys.stderr, flush=True)
        elif case.number % 100 == 99:
            print(
                f"{part} {case.number + 1}: {dict(Counter(each.verdict for each in outcomes))}",
                file=sys.stderr,
                flush=True,
            )
    return outcomes
