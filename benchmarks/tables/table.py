"""What all tables are made of: markdown, result files, percentages."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdora.files.markdown_table import markdown_table

RESULTS = Path(__file__).resolve().parent.parent / "results"
MIB, GIB = 2**20, 2**30

CONTENDERS = {
    "own_lora": "qdora LoRA",
    "own_dora": "qdora DoRA",
    "own_lora_dropout": "qdora LoRA, dropout",
    "own_dora_dropout": "qdora DoRA, dropout",
    "peft_lora": "PEFT LoRA",
    "peft_dora": "PEFT DoRA",
    "peft_dora_addmm": "PEFT DoRA, norm by one addmm",
    "qdora_peft_lora": "qdora.peft LoRA",
    "qdora_peft_dora": "qdora.peft DoRA",
    "axolotl_dora": "axolotl's DoRA algorithm",
    "axolotl_dora_uncached": "the same without its cache",
    "frozen": "frozen NF4 model, no adapter",
    "dense": "frozen 16-bit model, no adapter",
    "own_lora_8bit": "qdora LoRA, 8-bit AdamW",
    "own_dora_8bit": "qdora DoRA, 8-bit AdamW",
    "peft_lora_8bit": "PEFT LoRA, 8-bit AdamW",
    "peft_dora_8bit": "PEFT DoRA, 8-bit AdamW",
    "peft_lora_bf16_adam": "PEFT LoRA, AdamW in bf16",
    "peft_dora_bf16_adam": "PEFT DoRA, AdamW in bf16",
    "peft_lora_defaults": "PEFT LoRA, float32, dropout",
    "peft_dora_defaults": "PEFT DoRA, float32, dropout",
    "peft_lora_prepared": "PEFT LoRA, float32, dropout, head float32",
    "peft_dora_prepared": "PEFT DoRA, float32, dropout, head float32",
    "peft_lora_same_loop": "PEFT LoRA in qdora's loop",
}
"""What the arms of the benchmarks against PEFT are called in the tables."""


def gib(num_bytes: int) -> str:
    """GiB in two decimals, without the unit."""
    return f"{num_bytes / GIB:.2f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, all columns but the first to the right."""
    return markdown_table(header, rows, right=[False] + [True] * (len(header) - 1)) + "\n"


def read(name: str) -> Any:
    """benchmarks/results/<name>.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def report_rows(study: str, name: str) -> list[dict[str, str]]:
    """A data file of a study's report: benchmarks/results/<study>/<name>.csv."""
    with (RESULTS / study / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def quartiles(found: Mapping[str, float], form: str) -> str:
    """Median and quartiles: 1.03 (1.02–1.05)."""
    return f"{found['median']:{form}} ({found['lower']:{form}}–{found['upper']:{form}})"


def interval(value: float, lower: float, upper: float, form: str = "+.3f") -> str:
    """+0.020 (-0.001 to +0.150)."""
    return f"{value:{form}} ({lower:{form}} to {upper:{form}})"


def with_band(row: Mapping[str, str] | None, measure: str = "nll_per_token") -> str:
    """A measure of an arm of a report: 0.520 (0.490–0.550), or 0.520 where the report has no interval."""
    if row is None:
        return "–"
    value, lower, upper = (row[f"{measure}{end}"] for end in ("", "_lower", "_upper"))
    return f"{float(value):.3f}" + (f" ({float(lower):.3f}–{float(upper):.3f})" if lower and upper else "")


def trained(arms: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The arms that were trained."""
    return [row for row in arms if row["kind"] == "trained"]


def of_metric(pairs: Sequence[Mapping[str, str]], metric: str = "nll_per_token") -> list[Mapping[str, str]]:
    """The comparisons in one metric."""
    return [row for row in pairs if row["measure"] == metric]


def improvement(pair: Mapping[str, Any], *, as_rise: bool = False) -> str:
    """That of a comparison of a report: +0.020 (-0.001 to +0.150), +0.020 of one seed; with `as_rise` its negative."""
    sign = -1 if as_rise else 1
    value = sign * float(pair["improvement"])
    ends = sorted(sign * float(pair[end]) for end in ("lower", "upper")) if pair["lower"] else []
    return interval(value, *ends) if ends else f"{value:+.3f}"


def compared(pair: Mapping[str, Any]) -> str:
    """`improvement`, with the verdict of a primary comparison, or with what would have been seen if there is none."""
    said = improvement(pair)
    if pair["role"] != "primary":
        return said
    if pair["verdict"] != "not decided":
        return f"{said}, {pair['verdict']}"
    why = pair["reason"] or f"differences below {float(pair['smallest_detectable']):.2g} could not have been seen"
    return f"{said}, not decided: {why}"


def percent(value: float | None, error: float | None = None) -> str:
    """0.512, 0.03 -> '51.2 ± 3.0'."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
