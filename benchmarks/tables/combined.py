"""Tables of one combined adapter against one for each data set, and of PCGrad, which was tried on the combined one."""

from __future__ import annotations

from typing import Any

from frame import table

from tables.table import compared, interval, markdown, read

KINDS = {"lora": "QLoRA", "dora": "QDoRA"}
_WHOLE, _SIDES = "all tasks", ("alone", "combined")


@table()
def combined_vs_solo() -> str:
    """NLL and accuracy of both on each task, and what the combined adapter gains."""
    document = read("combined_vs_solo/run")
    rows = []
    for task in (*document["tasks"], _WHOLE):
        scores, of_task = document["scores"][task], document["comparisons"][task]
        gains = {row["measure"]: row for row in of_task}
        cells = [f"{scores[side]['nll_per_token']:.3f}" for side in _SIDES]
        cells += [_interval(gains["nll_per_token"], 1.0, 3)]
        cells += [f"{100 * scores[side]['acc']:.1f}" for side in _SIDES]
        cells += [_interval(gains["acc"], 100.0, 1)]
        rows.append([task, *cells, document["rates"][task]["rate"] if task in document["rates"] else "–"])
    header = ["task", "NLL alone", "combined", "lower by", "accuracy % alone", "combined", "higher by", "rate alone"]
    return markdown(header, rows) + f"\n{_said(document)}\n"


def _said(document: dict[str, Any]) -> str:
    """The verdict, and what the runs had."""
    (row,) = (each for each in document["comparisons"][_WHOLE] if each["role"] == "primary")
    together = document["rates"]["combined"]
    text = f"The combined adapter against those of single tasks, NLL of all tasks lower by {compared(row)}"
    text += f" ({row['num_seeds']} seeds). A difference of less than {row['zone']:g} counts as none. "
    (norm,) = (each for each in document["comparisons"][_WHOLE] if each["measure"] == "acc_norm")
    text += f"Accuracy of all tasks by likelihood per character: higher by {_interval(norm, 100.0, 1)} points. "
    text += f"Learning rate of the combined runs: {together['rate']}. "
    if document["cells_done"] < document["cells"]:
        text += f"So far {document['cells_done']} of {document['cells']} runs are done. "
    seconds = {name: sum(each["seconds"] for each in runs) / len(runs) for name, runs in document["costs"].items()}
    solo = sum(seconds[task] for task in document["tasks"])
    return text + f"All runs of single tasks of a seed together took {solo / seconds['combined']:.1f} times as long."


def pcgrad_did_not_help() -> list[str]:
    """A row of the table of what was tried, lower NLL being better; nothing where the figures say otherwise.

    The file has the NLL of the combined run without PCGrad minus that with it.
    """
    found = {KINDS[kind]: each["nll"]["average"] for kind, each in read("pcgrad")["kinds"].items()}
    if any(each["lower"] > 0 for each in found.values()):
        return []
    swapped = {
        kind: {"improvement": -each["value"], "lower": -each["upper"], "upper": -each["lower"]}
        for kind, each in found.items()
    }
    figures = ", ".join(f"{kind} {_interval(each, 1.0, 3)}" for kind, each in swapped.items())
    return [
        "PCGrad on the adapter's gradients",
        "the plain mix of tasks",
        f"change of the average NLL: {figures} nats a token",
    ]


def _interval(each: dict[str, Any], scale: float, digits: int) -> str:
    return interval(*(scale * each[name] for name in ("improvement", "lower", "upper")), form=f"+.{digits}f")
