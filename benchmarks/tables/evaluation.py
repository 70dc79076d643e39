"""Tables of evaluation: the output head's share."""

from __future__ import annotations

from tables.table import markdown, percent, quartiles, read


def output_head() -> str:
    """The head's share of an evaluation and the time, given a slice of the hidden state and given a flat copy."""
    document = read("output_head")
    rows = []
    for case in document["cases"]:
        whole, head = case["sliced / flat"], case["head, sliced / flat"]
        share = {arm: percent(case["head_share"][arm]["median"]) for arm in ("sliced", "flat")}
        rows.append(
            [
                f"{case['model']}, {case['case']}, {case['dtype']}",
                f"{case['head'][0]:,} x {case['head'][1]:,}",
                share["sliced"],
                share["flat"],
                quartiles(head, ".1f"),
                quartiles(whole, ".2f"),
                f"{case['equal_scores']} of {document['examples']}",
            ]
        )
    header = ["evaluation", "head", "head %, slice", "head %, flat", "head, ratio", "whole, ratio", "equal"]
    largest = max(case["largest_difference"] for case in document["cases"])
    note = (
        f"\n{document['examples']} examples of the demo tasks, in turns. Ratios: slice / flat, median and quartiles. "
        f"*Equal*: examples with the same NLL; the largest difference is {largest:.1g} nats.\n"
    )
    return markdown(header, rows) + note
