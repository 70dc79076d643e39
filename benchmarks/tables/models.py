"""Tables of the families of models: which work, and how each was checked."""

from __future__ import annotations

from typing import Any

from frame import markdown, read, table

FIGURES = {
    "resumed": "resumed",
    "answered": "answer",
    "evaluated": "NLL",
    "merged": "merged",
    "nf4_lora": "nf4-lora",
    "gradients": "gradients",
    "packing": "packing",
}
"""Check -> its column."""
OF_MIXTURES = {"nf4_skip": "nf4-lora, dense", "peft": "in PEFT", "peft_again": "from PEFT"}


@table()
def architectures() -> str:
    """A row for each family of dense models; below, which are refused and why."""
    return _families(FIGURES, is_mixture=False)


@table()
def mixtures() -> str:
    """The same of mixtures of experts, with what PEFT computes."""
    return _families(FIGURES | OF_MIXTURES, is_mixture=True)


def _families(columns: dict[str, str], *, is_mixture: bool) -> str:
    document = read("architectures")
    families = {name: row for name, row in document["families"].items() if bool(row.get("mixture")) == is_mixture}
    rows, reasons = [], dict[str, list[str]]()
    for name, row in families.items():
        refused = [text for key, text in row["refused"].items() if key != "packing"]  # the page says why
        for text in dict.fromkeys([*refused, *row["failed"].values()]):
            reasons.setdefault(text, []).append(name)
        if "num_adapted" in row:
            cells = [_cell(row, key) for key in columns]
            rows.append([name, f"`{row['model_type']}`", str(row["num_adapted"]), *cells, f"{row['seconds']:.0f}"])
    asked = "; ".join(f"{columns[key]} {most:.0e}" for key, most in document["asked"].items() if key in columns)
    header = ["family", "model type", "adapted layers", *columns.values(), "s"]
    notes = "".join(f"- {', '.join(names)}: {text}\n" for text, names in reasons.items())
    return f"{markdown(header, rows)}\nLargest difference allowed: {asked}.\n\n{notes}"


def models_short() -> str:
    """Which families train with packed rows and leave in 4 bits, one line for each combination."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, row in read("architectures")["families"].items():
        works = not row["failed"] and "merged" in row
        packing, four_bit = ("yes" if key in row else "no" for key in ("packing", "nf4_lora"))
        if "nf4_skip" in row and four_bit == "no":
            four_bit = "with dense experts"
        groups.setdefault((packing, four_bit) if works else ("not supported",) * 2, []).append(name)
    rows = [[", ".join(names), *forms] for forms, names in groups.items()]
    return markdown(["families", "`data.packing`", "`--format nf4-lora`"], rows)


def _cell(row: dict[str, Any], key: str) -> str:
    if key in row["failed"]:
        return "**fails**"
    if key in row["refused"]:
        return "refused"
    value = row.get(key, "–")
    return "yes" if value is True else f"{value:.0e}" if value and isinstance(value, float) else str(value or 0)
