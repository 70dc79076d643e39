"""What all tables are made of: markdown, result files, percentages."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from frame import GIB, MIB, markdown, read
from measure import RESULTS

__all__ = ["GIB", "MIB", "compared", "gib", "improvement", "interval", "markdown", "of_metric", "percent", "read"]
__all__ += ["report_rows", "trained", "with_band"]


def gib(num_bytes: int) -> str:
    """GiB in two decimals, without the unit."""
    return f"{num_bytes / GIB:.2f}"


def report_rows(study: str, name: str) -> list[dict[str, str]]:
    """A data file of a study's report: benchmarks/results/<study>/<name>.csv."""
    with (RESULTS / study / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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
