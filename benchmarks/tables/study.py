"""Tables of studies, from their reports: compressed bases (recompute_study.py finds each number again), and ranks."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import correlation, mean, stdev
from typing import Any

import yaml
from frame import markdown, read, table
from measure import RESULTS

from qdora.files.pages import svg_file
from qdora.study.statistics import t_interval

Row = Mapping[str, str]
MEASURES = {
    "nll_per_token": "NLL, nats per token",
    "nll_by_task": "NLL, each task counting once",
    "acc": "accuracy, points",
    "acc_norm": "accuracy by likelihood per character, points",
}
PRUNED = ("Wanda 50 %", "Wanda 2:4", "nf4, Wanda 2:4")
BASES = ("nf4", "nf3", *PRUNED)
SHORT, FAST, QUERY = "128 steps", "DoRA, magnitudes 100 times", "self_attn.q_proj"
ROUNDS = ((("0", "1", "2"), "seeds 0 to 2"), (("3", "4", "5"), "seeds 3 to 5"))
"""Seeds of the first round, which suggested that DoRA loses more, and of the second, which decides."""
PAPER = {"full": -0.62, "LoRA": 0.83, "DoRA": -0.31}
"""Correlations of the changes of magnitude and direction of query weights: DoRA, arXiv 2402.09353, sec. 3.2 and 4.2."""
# Name -> base and adapter of the cells that are better, of those that are worse, and the kind of the better ones.
CONTROLS = {
    "LoRA with LoftQ's start, LoRA; nf3": ("nf3", "LoRA, LoftQ", "nf3", "LoRA", "trained"),
    **{
        f"DoRA, magnitudes trained 100 times as fast; {base}": (base, "DoRA", base, FAST, "trained")
        for base in ("nf3", "Wanda 2:4")
    },
    **{
        f"SparseGPT, Wanda; LoRA, {size}": (f"SparseGPT {size}", "LoRA", f"Wanda {size}", "LoRA", "trained")
        for size in ("50 %", "70 %", "2:4")
    },
    "DoRA, LoRA; Wanda 2:4": ("Wanda 2:4", "DoRA", "Wanda 2:4", "LoRA", "trained"),
    **{
        f"DoRA with its magnitudes set back, DoRA; {base}": (base, "DoRA", base, "DoRA", "set_back")
        for base in ("16 bits", "nf3", "Wanda 2:4")
    },
}
METHODS = {
    "uniform": "the same rank everywhere",
    "l1": "gates, L1",
    "svd": "SVD of a trained update",
    "gradient": "gradient",
    "curvature": "curvature",
}


def rows_of(name: str, study: str = "study") -> list[dict[str, str]]:
    """A data file of a study's report: benchmarks/results/<study>/<name>.csv."""
    with (RESULTS / study / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_kind(name: str, kind: str, column: str = "kind", study: str = "study") -> list[dict[str, str]]:
    """The rows of a data file with this value in a column."""
    return [row for row in rows_of(name, study) if row[column] == kind]


def interval(value: float, lower: float, upper: float, form: str = "+.3f") -> str:
    """+0.020 (-0.001 to +0.150)."""
    return f"{value:{form}} ({lower:{form}} to {upper:{form}})"


def ends_of(row: Row, *names: str, scale: float = 1.0, form: str) -> str:
    """`interval` of three columns."""
    return interval(*(scale * float(row[name]) for name in names), form=form)


def over_seeds(values: Sequence[float], form: str) -> str:
    """`interval` of the mean, by Student's t; the first three seeds tell the spread."""
    found = t_interval(values, num_first=min(3, len(values)))
    return interval(found.value, found.lower, found.upper, form)


def with_band(row: Row | None, measure: str = "nll_per_token") -> str:
    """A measure of an arm of a report: 0.520 (0.490–0.550), or 0.520 where the report has no interval."""
    if row is None or not row.get(measure):
        return "–"
    value, lower, upper = (row[f"{measure}{end}"] for end in ("", "_lower", "_upper"))
    return f"{float(value):.3f}" + (f" ({float(lower):.3f}–{float(upper):.3f})" if lower and upper else "")


def improvement(pair: Row, *, as_rise: bool = False) -> str:
    """That of a comparison of a report: +0.020 (-0.001 to +0.150), +0.020 of one seed; with `as_rise` its negative."""
    sign = -1 if as_rise else 1
    value = sign * float(pair["improvement"])
    ends = sorted(sign * float(pair[end]) for end in ("lower", "upper")) if pair["lower"] else []
    return interval(value, *ends) if ends else f"{value:+.3f}"


def compared(pair: Row) -> str:
    """`improvement`, with the verdict of a primary comparison, or with what would have been seen if there is none."""
    said = improvement(pair)
    if pair["role"] != "primary":
        return said
    if pair["verdict"] != "not decided":
        return f"{said}, {pair['verdict']}"
    why = pair["reason"] or f"differences below {float(pair['smallest_detectable']):.2g} could not have been seen"
    return f"{said}, not decided: {why}"


def in_units(row: Row, measure: str) -> str:
    """An improvement with its interval: nats, or points of accuracy."""
    scale, form = (100.0, "+.2f") if measure.startswith("acc") else (1.0, "+.4f")
    return ends_of(row, "improvement", "lower", "upper", scale=scale, form=form)


def primary_rows() -> dict[str, dict[str, str]]:
    """Measure -> the row of the first primary comparison."""
    rows = [row for row in rows_of("comparisons") if row["family"]]
    return {row["measure"]: row for row in rows if row["comparison"] == rows[0]["comparison"]}


@table()
def study_primary() -> str:
    """The primary comparisons in every measure, with the p of the test that the arms are closer than the zone."""
    rows: dict[str, list[str]] = {}
    for pair in (row for row in rows_of("comparisons") if row["family"]):
        p = pair["p_equivalent_holm" if pair["role"] == "primary" else "p_equivalent"]
        row = rows.setdefault(pair["comparison"], [pair["comparison"]])
        row.append(f"{in_units(pair, pair['measure'])}, p {f'{float(p):.4f}' if p else '–'}")
    header = ["better by (in brackets, the zone); p of a difference of the zone or more, in the first column corrected"]
    header += [f"{text} ({'1' if name[:3] == 'acc' else '0.02'})" for name, text in MEASURES.items()]
    return markdown(header, rows.values()) + f"\n{' '.join(read('study/run')['answer'])}\n"


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
    left, sizes = (
        {row["base"]: row for row in rows_of(name) if (row["adapter"], row["length"]) == ("LoRA", SHORT)}
        for name in ("repair", "arms")
    )
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


@table()
def study_tasks() -> str:
    """The first primary comparison on each task."""
    name, found = primary_rows()["nll_per_token"]["comparison"], dict[str, dict[str, Row]]()
    for row in of_kind("tasks", name, "comparison"):
        found.setdefault(row["task"], {})[row["measure"]] = row
    lines = [
        [task, f"{100 * float(of['acc']['weight']):.1f}", *(in_units(of[each], each) for each in of)]
        for task, of in found.items()
    ]
    header = ["task", "% of the answer tokens", "NLL lower by", "accuracy higher by", "per character"]
    return markdown(header, lines)


@table("student_rerun")
def study_students(rerun: Any) -> str:
    """The accuracies of the rerun, beside the first primary comparison where it has the task."""
    lora, dora = rerun["accuracy"]["lora"], rerun["accuracy"]["dora"]
    own = {
        row["task"]: in_units(row, "acc")
        for row in of_kind("tasks", primary_rows()["acc"]["comparison"], "comparison")
        if row["measure"] == "acc"
    }
    rows = [
        [task, f"{lora[task]:.1f}", f"{dora[task]:.1f}", f"{dora[task] - lora[task]:+.1f}", own.get(task, "–")]
        for task in lora
    ]
    return markdown(["task", "rerun: LoRA", "DoRA", "DoRA higher by", "here: DoRA higher by"], rows)


@table()
def study() -> str:
    """Per base and length the damage without training, then for each adapter what is left and what was repaired."""
    arms, repairs = of_kind("arms", "trained"), rows_of("repair")
    pairs = of_kind("comparisons", "nll_per_token", "measure")
    damage = {row["base"]: row for row in repairs if row["adapter"] == "no adapter"}
    reference = yaml.safe_load((RESULTS / "study/grid.yaml").read_text())["compare"]["reference"]
    adapters = list(dict.fromkeys(row["adapter"] for row in repairs if row.get("left")))
    lines = []
    for context in dict.fromkeys((row["base"], row["length"]) for row in arms):

        def own(rows: Iterable[Row], context: tuple[str, str] = context) -> list[Row]:
            return [row for row in rows if (row["base"], row["length"]) == context]

        of_base = {row["adapter"]: row for row in own(repairs)}
        # An arm of which all runs diverged has no sizes
        sizes = next((row for row in own(arms) if row["bits_per_weight"]), None)
        line = [", ".join(context), "–", "–"]
        if sizes is not None:
            line[1:] = [f"{float(sizes['bits_per_weight']):.2f}", f"{100 * float(sizes['sparsity']):.0f}"]
        lost, names = damage.get(context[0], {}), [f"damage_choice{end}" for end in ("", "_lower", "_upper")]
        line.append(ends_of(lost, *names, scale=100, form=".1f") if lost.get("damage_choice") else "–")
        line += [with_band(of_base.get(name), "left") for name in adapters]
        line.append(with_band(of_base.get(reference), "repaired_share"))
        line.append("; ".join(f"{pair['arm']} {compared(pair)}" for pair in own(pairs)) or "–")
        lines.append(line)
    header = ["base", "bits", "zeros %", "accuracy lost", *(f"{name}: left" for name in adapters)]
    header += [f"share repaired by {reference}", f"against {reference}: NLL lower by"]
    done = read("study/run")
    partial = f"So far {done['cells_done']:,} of {done['cells']:,} cells are done. "
    note = (
        f"\n{partial if done.get('cells_done', 0) < done.get('cells', 0) else ''}NLL in nats per answer token of the "
        "test examples; 95 % t intervals over the seeds, not corrected for the number of bases. Accuracy lost: points "
        "of accuracy per character below the uncompressed base, both untrained; interval over the examples. Left: NLL "
        "minus that of the same arm trained on the uncompressed base. Share repaired: an adapter of the uncompressed "
        "base is worse on the compressed one; training there takes back this share of the loss. "
        f"`{done['command']}`; the whole report: [results/study/report.md](results/study/report.md).\n"
    )
    return markdown(header, lines) + note


@table()
def study_controls() -> str:
    """Differences that the same design finds, or fails to find, at this size."""
    rows = []
    for name, (base, adapter, other, worse_adapter, kind) in CONTROLS.items():
        better, worse = nll_of(kind, base, adapter), nll_of("trained", other, worse_adapter)
        found = [worse[seed] - better[seed] for seed in sorted(better.keys() & worse.keys(), key=int)]
        rows.append([name, str(len(found)), over_seeds(found, "+.4f")])
    return markdown(["better, than", "seeds", "NLL lower by"], rows)


def nll_of(*cells: str) -> dict[str, float]:
    """Seed -> NLL per token of the cells of a kind, base and adapter, with 128 steps."""
    names = ("kind", "base", "adapter", "length")
    own = (row for row in rows_of("cells") if tuple(row[name] for name in names) == (*cells, SHORT))
    return {row["seed"]: float(row["nll_per_token"]) for row in own if row["nll_per_token"]}


@table()
def study_transplants() -> str:
    """What adapters of the uncompressed base lose on each compressed one, and how much more with DoRA, by round."""
    rows, notes = [], []
    for seeds, title in ROUNDS:
        means: dict[str, list[list[float]]] = {"transplant": [], "rescaled": []}
        for base in BASES:
            moved = {arm: nll_of("transplant", base, arm) for arm in ("LoRA", "DoRA")}
            if seeds[0] not in moved["DoRA"]:
                continue
            row = [f"{base}, {title}"]
            for arm, values in moved.items():
                at_home = nll_of("trained", "16 bits", arm)
                row.append(over_seeds([values[seed] - at_home[seed] for seed in seeds], "+.3f"))
            for kind, of_bases in means.items():
                dora = nll_of(kind, base, "DoRA")
                more = [dora[seed] - moved["LoRA"][seed] for seed in seeds if seed in dora]
                row.append(over_seeds(more, "+.3f") if more else "–")
                if base in PRUNED and more:
                    of_bases.append(more)
            rows.append(row)
        of_seeds = [[mean(of_seed) for of_seed in zip(*of_bases, strict=True)] for of_bases in means.values()]
        told = (over_seeds(values, "+.3f") if values else "–" for values in of_seeds)
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
    rows = []
    steps = sorted({int(row["step"]) for row in rows_of("checkpoints")})
    for arm, paper in PAPER.items():
        own, line = of_kind("checkpoints", arm, "adapter"), [arm]
        for step in steps:
            values = list({row["seed"]: float(row["nll"]) for row in own if int(row["step"]) == step}.values())
            line.append(f"{mean(values):.3f} ± {stdev(values):.3f}")
        for names, first in ((QUERY, 0), ("", 0), (QUERY, steps[-1])):
            points: dict[str, list[tuple[float, float]]] = {}
            for row in (row for row in own if row["layer"].endswith(names) and int(row["step"]) >= first):
                points.setdefault(row["seed"], []).append((float(row["length_change"]), float(row["direction_change"])))
            found = [correlation(*zip(*each, strict=True)) for each in points.values()]
            line.append(f"{mean(found):+.2f} ({min(found):+.2f} to {max(found):+.2f})")
        rows.append([*line, f"{paper:+.2f}"])
    header = ["trained (±: standard deviation, in brackets: range)", *(f"NLL, step {each}" for each in steps)]
    header += ["correlation, query weights", "all weights", f"query, step {steps[-1]} only", "the paper's, query"]
    return markdown(header, rows)


def draw_checkpoints(out: Path) -> None:
    """A panel for full fine-tuning, LoRA and DoRA: change of length over that of direction of the query weights."""
    checkpoints = [row for row in rows_of("checkpoints") if row["layer"].endswith(QUERY)]
    with svg_file(out, 9.6, 3.4) as figure:
        for axis, arm in zip(figure.subplots(1, len(PAPER), sharex=True, sharey=True), PAPER, strict=True):
            for step in sorted({int(row["step"]) for row in checkpoints}):
                own = [row for row in checkpoints if row["adapter"] == arm and int(row["step"]) == step]
                turned, changed = ([float(row[f"{name}_change"]) for row in own] for name in ("direction", "length"))
                axis.plot(turned, changed, "o", ms=3, alpha=0.6, label=f"step {step}")
            axis.set(title=arm, xlabel="direction: 1 - cosine", xscale="log", yscale="log")
            axis.xaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.grid(alpha=0.3)
        figure.axes[0].set_ylabel("magnitude: change of the row's length")
        figure.axes[-1].legend(fontsize=8)


@table()
def study_changes() -> str:
    """Per base and adapter what training moved, and how much of the compression error it took back."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows_of("changes"):
        found.setdefault((row["base"], row["adapter"]), []).append(row)
    repairs = {(row["base"], row["adapter"]): row for row in rows_of("repair") if row.get("magnitudes")}
    lines = []
    for (base, adapter), rows in found.items():

        def average(column: str, rows: Sequence[Row] = rows) -> float | None:
            known = [float(row[column]) for row in rows if row[column]]
            return sum(known) / len(known) if known else None

        line = [f"{base}, {adapter}", str(len({row["seed"] for row in rows}))]
        line += [f"{average('direction_change'):.1e}", f"{average('magnitude_change'):.2%}"]
        undone = [average(column) for column in ("error_undone", "error_undone_best", "error_cosine")]
        line += ["–", "–"] if undone[0] is None else [f"{undone[0]:.2%} ({undone[1]:.0%})", f"{undone[2]:.4f}"]
        ends = [f"magnitudes{end}" for end in ("", "_lower", "_upper")]
        back = repairs.get((base, adapter))
        lines.append([*line, "–" if back is None else ends_of(back, *ends, form="+.4f")])
    header = ["base, adapter", "seeds", "rows turned", "magnitudes changed", "error taken back (best)", "cosine"]
    note = (
        "\nMeans over layers and seeds. Rows turned: 1 - cosine of the directions of a row before and after. Error "
        "taken back: by the update, of the compression error; best: by the nearest matrix of the same rank. Cosine: "
        "between the update and the negative error. Magnitudes set back: change of the NLL, 95 % t interval over the "
        "seeds; below 0 the trained magnitudes do harm.\n"
    )
    return markdown([*header, "magnitudes set back"], lines) + note


@table("rank_methods/run")
def rank_methods(run: Any) -> str:
    """Each way to choose ranks at equal trainable parameters: quality, the difference from uniform, and its cost."""
    arms, costs = of_kind("arms", "trained", study="rank_methods"), run["costs_in_seconds"]
    against = {pair["arm"]: pair for pair in rank_pairs()}
    rows = []
    for row in arms:
        name = row["ranks"]
        cells = of_kind("cells", name, "ranks", study="rank_methods")
        # A run that diverged has no size
        sizes = {int(float(row["num_trainable"])) for row in cells if row["kind"] == "trained" and row["num_trainable"]}
        size = " to ".join(f"{each:,}" for each in sorted({min(sizes), max(sizes)}))
        took = f"{1 + costs[name] / costs['scout']:.2f} runs" if name in costs else "0"
        said = compared(against[name]) if name in against else "–"
        rows.append([METHODS[name], size, row["rate"], with_band(row), said, took])
    header = ["ranks", "trained", "learning rate chosen", "NLL per answer token", "improvement over uniform"]
    seeds = ", ".join(sorted({row["num_seeds"] for row in arms}))
    note = (
        "\n95 % t intervals over the seeds; learning rates chosen on validation examples, arms compared on test "
        f"examples; number of seeds: {seeds}. *Cost of choosing* is in units of the scout run, a run at twice the rank "
        "that the methods read; gates choose during training. The whole report: "
        "[results/rank_methods/report.md](results/rank_methods/report.md).\n"
    )
    return markdown([*header, "cost of choosing"], rows) + note


def rank_pairs() -> list[dict[str, str]]:
    """The comparisons of ways to choose ranks, in NLL."""
    return of_kind("comparisons", "nll_per_token", "measure", study="rank_methods")


def ranks_that_did_not_help() -> list[str]:
    """A row of the table of what was tried, if no way measurably lowers the loss, and none can do so by the zone."""
    pairs = rank_pairs()
    ends = [(float(pair["lower"] or "nan"), float(pair["upper"] or "nan"), float(pair["zone"])) for pair in pairs]
    if not all(lower <= 0 and upper < zone for lower, upper, zone in ends):
        return []
    figures = ", ".join(f"{METHODS[pair['arm']]} {improvement(pair, as_rise=True)}" for pair in pairs)
    figures = f"change of the NLL of SmolLM2-135M at equal parameters: {figures} nats a token"
    return ["a rank for each layer", "one rank everywhere", figures]
