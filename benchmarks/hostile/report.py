"""The counts of a part, and its faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hostile.judge import Outcome

# What the cases of seed 0 found before it was mended: part, case, what happened, and the test that holds it now. The
# numbers are those of the first version of the operators.
MENDED: list[tuple[str, int, str, str]] = [
    ("recipes", 6, "2 MiB of YAML take minutes", "test_a_recipe_that_is_too_long_is_refused_before_it_is_parsed"),
    ("recipes", 21, "aliases to aliases hang", "test_aliases_to_aliases_are_counted_before_they_are_written_out"),
    ("recipes", 31, "KeyError of !!bool maybe", "test_yaml_that_cannot_be_read_is_one_line"),
    ("recipes", 86, "OSError of a path of 4,000 letters", "test_paths_that_no_system_has_are_missing_files"),
    ("recipes", 504, "RuntimeError of ~name without such a user", "test_paths_that_no_system_has_are_missing_files"),
    ("recipes", 556, "a line for each of 14 layers", "test_all_faults_are_told_at_once"),
    ("data", 4, "control characters of a Parquet footer", "test_what_parquet_says_of_a_damaged_footer_is_one_line_..."),
    ("data", 12, "UTF-16 read as text with null bytes", "test_text_in_utf_16_without_its_mark_is_refused"),
    ("data", 21, "RecursionError of nested JSON", "test_json_that_breaks_the_parser_is_one_line"),
    (
        "data",
        109,
        "a text of 50 MB takes more than 4 GiB",
        "test_a_text_of_megabytes_is_shortened_before_it_is_encoded_...",
    ),
    ("stored", 3, "FileNotFoundError of a checkpoint", "test_a_checkpoint_that_another_program_wrote_is_one_line"),
    ("stored", 28, "MemoryError of a GGUF string", "test_a_damaged_header_is_one_line_and_takes_no_memory"),
    ("stored", 29, "a line of 630,007 characters", "test_a_failure_is_one_line_and_its_traceback_is_in_the_log"),
    ("stored", 30, "another tensor at an unaligned place", "test_a_damaged_header_is_one_line_and_takes_no_memory"),
    ("stored", 37, "RecursionError of qdora.json", "test_broken_files_are_named"),
    ("stored", 45, "SafetensorError of optimizer states", "test_a_checkpoint_that_another_program_wrote_is_one_line"),
    ("stored", 52, "ValueError of a tensor type", "test_a_damaged_header_is_one_line_and_takes_no_memory"),
    ("stored", 75, "RuntimeError of a vocabulary of 10^9", "test_a_config_with_values_that_no_model_has_is_one_line"),
    ("stored", 95, "AttributeError of a dtype", "test_a_config_with_values_that_no_model_has_is_one_line"),
    ("stored", 133, "StrictDataclassError of head_dim", "test_a_config_with_values_that_no_model_has_is_one_line"),
    (
        "stored",
        146,
        "control characters of a tensor's name",
        "test_a_failure_is_one_line_and_its_traceback_is_in_the_log",
    ),
    ("stored", 194, "ValueError of a weight of integers", "test_a_weight_of_integers_is_one_line"),
    ("stored", 160, "TypeError of the policies", "test_a_checkpoint_that_another_program_wrote_is_one_line"),
    ("stored", 166, "MemoryError of 2^32 dimensions", "test_a_damaged_header_is_one_line_and_takes_no_memory"),
]


def mended(part: str) -> list[dict[str, Any]]:
    """The faults that a part found and that are mended, as JSON values."""
    return [
        {"seed": 0, "case": case, "happened": happened, "test": test}
        for where, case, happened, test in MENDED
        if where == part
    ]


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
        "mended": mended(outcomes[0].part) if outcomes else [],
        "new_faults": len(faults),
        "slowest_seconds": max((outcome.seconds for outcome in outcomes), default=0.0),
        "most_memory": _most_memory(outcomes),
    }


def _most_memory(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    if not outcomes:
        return None
    most = asdict(max(outcomes, key=lambda outcome: outcome.memory_bytes - 2 * outcome.file_bytes))
    return {name: most[name] for name in ("number", "what", "memory_bytes", "file_bytes")}
