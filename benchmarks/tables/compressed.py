"""What the study of compressed bases says: its answer in nats, points, bits and zeros, by task, and what it does find.

Every number comes from the data files of the report; recompute_study.py computes each of them again from the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import correlation, mean, stdev

from frame import table

from qdora.evaluate.example_intervals import Interval
from qdora.files.svg_figure import svg_file
from qdora.study.statistics import t_interval
from tables.table import RESULTS, interval, markdown, percent, read, report_rows

MEASURES = {
    "nll_per_token": "NLL, nats per token",
    "nll_by_task": "NLL, each task counting once",
    "acc": "accuracy, points",
    "acc_norm": "accuracy by likelihood per character, points",
}
PRUNED = ("Wanda 50 %", "Wanda 2:4", "nf4, Wanda 2:4")
BASES = ("nf4", "nf3", *PRUNED)
SHORT = "128 steps"
ROUNDS = ((("0", "1", "2"), "seeds 0 to 2"), (("3", "4", "5"), "seeds 3 to 5"))
"""Seeds of the first round, which suggested that DoRA loses more, and of the second, which decides."""
QUERY = "self_attn.q_proj"
PAPER = {"full": -0.62, "LoRA": 0.83, "DoRA": -0.31}
"""Correlations of the changes of magnitude and direction of query weights: DoRA, arXiv 2402.09353, sec. 3.2 and 4.2."""
Cells = tuple[str, str, str, str]
"""Kind, base, adapter and length of the cells of an arm."""


@table()
def study_primary() -> str:
    """The primary comparisons in every measure, with the test that the arms are closer than the zone."""
    rows = []
    for pair in (row for row in report_rows("study", "comparisons") if row["family"]):
        is_primary = pair["role"] == "primary"
        p = pair["p_equivalent_holm" if is_primary else "p_equivalent"]
        zone = f"{float(pair['zone']):g}" if pair["measure"].startswith("nll") else "1 point"
        row = [pair["comparison"], MEASURES[pair["measure"]], _told(pair, pair["measure"])]
        rows.append([*row, zone, (f"{float(p):.4f}" if p else "–") + (" (corrected)" if is_primary else "")])
    header = ["comparison", "measure", "better by", "zone", "p of a difference of the zone or more"]
    note = f"\n{' '.join(read('study/run')['answer'])}\n"
    return markdown(header, rows) + note


@table()
def study_units() -> str:
    """What the gain and the zone are worth in bits per weight and in zeros."""
    rows = [
        [unit, bases, f"{worth:.4f}", *(f"{value / worth:.3f}" for value in values)]
        for unit, bases, worth, *values in worths()
    ]
    header = ["unit", "measured from", "nats per unit, LoRA", "DoRA's gain in units", "at most", "the zone in units"]
    return markdown(header, rows)


def worths() -> list[tuple[str, str, float, float, float, float]]:
    """(unit, bases, nats that it is worth to LoRA, gain of DoRA, upper end of its interval, zone), these in nats."""
    left = {row["base"]: row for row in report_rows("study", "repair") if (row["adapter"], row["length"]) == _LORA}
    sizes = {row["base"]: row for row in report_rows("study", "arms") if (row["adapter"], row["length"]) == _LORA}
    gain = primary_rows()["nll_per_token"]
    found = []
    for unit, column, scale, mild, strong in (
        ("bit per weight", "bits_per_weight", -1, "nf4", "nf3"),
        ("percentage point of zeros", "sparsity", 100, "Wanda 30 %", "Wanda 50 %"),
    ):
        between = scale * (float(sizes[strong][column]) - float(sizes[mild][column]))
        worth = (float(left[strong]["left"]) - float(left[mild]["left"])) / between
        ends = (float(gain[name]) for name in ("improvement", "upper", "zone"))
        found.append((unit, f"{mild} to {strong}", worth, *ends))
    return found


def primary_rows() -> dict[str, dict[str, str]]:
    """Measure -> the row of the first primary comparison."""
    rows = [row for row in report_rows("study", "comparisons") if row["family"]]
    return {row["measure"]: row for row in rows if row["comparison"] == rows[0]["comparison"]}


@table()
def study_tasks() -> str:
    """The first primary comparison on each task."""
    rows = report_rows("study", "tasks")
    name = primary_rows()["nll_per_token"]["comparison"]
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["comparison"] == name:
            found.setdefault(row["task"], {})[row["measure"]] = row
    lines = [
        [task, f"{100 * float(of['acc']['weight']):.1f}", *(_told(of[each], each) for each in of)]
        for task, of in found.items()
    ]
    header = ["task", "% of the answer tokens", "NLL lower by", "accuracy higher by", "per character"]
    return markdown(header, lines)


@table()
def study_transplants() -> str:
    """What adapters of the uncompressed base lose on each compressed one, and how much more with DoRA, by round."""
    rows, notes = [], []
    for seeds, title in ROUNDS:
        means: dict[str, list[list[float]]] = {"transplant": [], "rescaled": []}
        for base in BASES:
            moved = {arm: _nll(("transplant", base, arm, SHORT)) for arm in ("LoRA", "DoRA")}
            if not moved["DoRA"].keys() & seeds:
                continue
            row = [f"{base}, {title}"]
            for arm, values in moved.items():
                at_home = _nll(("trained", "16 bits", arm, SHORT))
                row.append(_shown(t_interval([values[seed] - at_home[seed] for seed in seeds]), "+.3f"))
            for kind, of_bases in means.items():
                dora = _nll((kind, base, "DoRA", SHORT))
                more = [dora[seed] - moved["LoRA"][seed] for seed in seeds if seed in dora]
                row.append(_shown(t_interval(more), "+.3f") if more else "–")
                if base in PRUNED and more:
                    of_bases.append(more)
            rows.append(row)
        if not means["transplant"]:  # the round has not begun
            continue
        of_seeds = [_of_each_seed(of_bases) for of_bases in means.values()]
        told = (_shown(t_interval(values), "+.3f") if values else "–" for values in of_seeds)
        rows.append([f"mean of the pruned bases, {title}", "–", "–", *told])
        pairs = [value for of_base in means["transplant"] for value in of_base]
        notes.append(f"With {title}, DoRA is worse in {sum(value > 0 for value in pairs)} of {len(pairs)} pairs.")
        if of_seeds[1]:
            share = 1 - sum(of_seeds[1]) / sum(of_seeds[0])
            notes.append(f"Rescaled magnitudes take back {share:.0%} of the mean difference.")
    header = ["base", "LoRA loses", "DoRA loses", "DoRA minus LoRA", "DoRA, magnitudes rescaled, minus LoRA"]
    return markdown(header, rows) + f"\n{' '.join(notes)}\n"


@table()
def study_checkpoints() -> str:
    """The NLL after 16 to 128 steps, and how the changes of magnitude and of direction go together."""
    if not (RESULTS / "study" / "checkpoints.csv").is_file():
        return "The checkpoints of the second round are not measured yet.\n"
    rows, checkpoints = [], report_rows("study", "checkpoints")
    steps = sorted({int(row["step"]) for row in checkpoints})
    for arm, paper in PAPER.items():
        own = [row for row in checkpoints if row["adapter"] == arm]
        line = [arm]
        for step in steps:
            values = list({row["seed"]: float(row["nll"]) for row in own if int(row["step"]) == step}.values())
            line.append(f"{mean(values):.3f} ± {stdev(values):.3f}")
        for names in (QUERY, ""):
            found = correlations([row for row in own if row["layer"].endswith(names)])
            line.append(f"{mean(found):+.2f} ({min(found):+.2f} to {max(found):+.2f})")
        rows.append([*line, f"{paper:+.2f}"])
    header = ["trained", *(f"NLL at step {step}" for step in steps), "query weights: correlation", "all weights"]
    return markdown([*header, "the paper's, query weights"], rows)


def correlations(rows: Sequence[Mapping[str, str]]) -> list[float]:
    """Pearson's, of the change of length and of direction over layers and checkpoints, of each seed."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        found.setdefault(row["seed"], []).append((float(row["length_change"]), float(row["direction_change"])))
    return [correlation(*zip(*points, strict=True)) for points in found.values()]


def draw_checkpoints(out: Path) -> None:
    """A panel for full fine-tuning, LoRA and DoRA: change of length over that of direction of the query weights."""
    checkpoints = [row for row in report_rows("study", "checkpoints") if row["layer"].endswith(QUERY)]
    with svg_file(out, 9.6, 3.4) as figure:
        for axis, arm in zip(figure.subplots(1, len(PAPER)), PAPER, strict=True):
            for step in sorted({int(row["step"]) for row in checkpoints}):
                own = [row for row in checkpoints if row["adapter"] == arm and int(row["step"]) == step]
                turned, changed = ([float(row[f"{name}_change"]) for row in own] for name in ("direction", "length"))
                axis.plot(turned, changed, "o", ms=3, alpha=0.6, label=f"step {step}")
            axis.set(title=arm, xlabel="direction: 1 - cosine", xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        figure.axes[0].set_ylabel("magnitude: change of the row's length")
        figure.axes[-1].legend(fontsize=8)


@table()
def study_controls() -> str:
    """Differences that the same design finds, or fails to find, at this size."""
    rows = []
    for name, better, worse in _CONTROLS:
        found = _differences(worse, better)
        rows.append([name, str(len(found)), _shown(t_interval(found, num_first=min(3, len(found))), "+.4f")])
    return markdown(["better, than", "seeds", "NLL lower by"], rows)


@table()
def study_students() -> str:
    """Accuracies of a rerun of the paper's task by students, beside ours on the same tasks."""
    students, arms = read("student_rerun")["accuracy"], read("real_data")["arms"]
    own = {arm["kind"]: arm["test"]["adapter"] for arm in arms}
    rows = []
    for task in students["lora"]:
        row = [task, *(f"{students[kind][task]:.1f}" for kind in ("lora", "dora"))]
        row.append(f"{students['dora'][task] - students['lora'][task]:+.1f}")
        row += [percent(own[kind][task]["acc"], own[kind][task]["acc_stderr"]) for kind in ("lora", "dora")]
        row.append(f"{100 * (own['dora'][task]['acc'] - own['lora'][task]['acc']):+.1f}")
        rows.append([*row, percent(own["lora"][task]["chance"])])
    header = ["task", "students: LoRA", "DoRA", "difference", "here: LoRA", "DoRA", "difference", "chance"]
    return markdown(header, rows)


_LORA = ("LoRA", SHORT)
_CONTROLS: Sequence[tuple[str, Cells, Cells]] = (
    ("LoRA with LoftQ's start, LoRA; nf3", ("trained", "nf3", "LoRA, LoftQ", SHORT), ("trained", "nf3", *_LORA)),
    (
        "DoRA, magnitudes trained 100 times as fast; nf3",
        ("trained", "nf3", "DoRA", SHORT),
        ("trained", "nf3", "DoRA, magnitudes 100 times", SHORT),
    ),
    (
        "DoRA, magnitudes trained 100 times as fast; Wanda 2:4",
        ("trained", "Wanda 2:4", "DoRA", SHORT),
        ("trained", "Wanda 2:4", "DoRA, magnitudes 100 times", SHORT),
    ),
    *(
        (
            f"SparseGPT, Wanda; LoRA, {size}",
            ("trained", f"SparseGPT {size}", *_LORA),
            ("trained", f"Wanda {size}", *_LORA),
        )
        for size in ("50 %", "70 %", "2:4")
    ),
    ("DoRA, LoRA; Wanda 2:4", ("trained", "Wanda 2:4", "DoRA", SHORT), ("trained", "Wanda 2:4", *_LORA)),
    *(
        (
            f"DoRA with its magnitudes set back, DoRA; {base}",
            ("set_back", base, "DoRA", SHORT),
            ("trained", base, "DoRA", SHORT),
        )
        for base in ("16 bits", "nf3", "Wanda 2:4")
    ),
)
"""Name, the cells that are better, the cells that they are compared with."""


def _differences(cells: Cells, other: Cells) -> list[float]:
    """NLL of the first cells minus that of the others, of each seed that both have, in the order of the seeds."""
    one, two = _nll(cells), _nll(other)
    return [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys(), key=int)]


def _nll(cells: Cells) -> dict[str, float]:
    rows = report_rows("study", "cells")
    names = ("kind", "base", "adapter", "length")
    own = (row for row in rows if row["nll_per_token"] and tuple(row[name] for name in names) == cells)
    return {row["seed"]: float(row["nll_per_token"]) for row in own}


def _of_each_seed(of_bases: Sequence[Sequence[float]]) -> list[float]:
    """The mean over the bases of each seed."""
    return [mean(of_seed) for of_seed in zip(*of_bases, strict=True)]


def _told(row: dict[str, str], measure: str) -> str:
    """An improvement with its interval: nats, or points of accuracy."""
    scale, form = (100, "+.2f") if measure.startswith("acc") else (1, "+.4f")
    return interval(*(scale * float(row[name]) for name in ("improvement", "lower", "upper")), form=form)


def _shown(found: Interval, form: str) -> str:
    return interval(found.value, found.lower, found.upper, form=form)
