"""Tables of the families of models: which work, and how each was checked."""

from __future__ import annotations

from typing import Any

from frame import table

from tables.table import markdown, read

FIGURES = ("evaluated", "merged", "nf4_lora", "gradients")
_TITLES = {"evaluated": "NLL", "nf4_lora": "nf4-lora"}
"""Key of a figure -> its column, where the two differ."""
HEADER = ("resumed", "answer", "NLL", "merged", "nf4-lora", "gradients", "packing")


@table()
def architectures() -> str:
    """A row for each family of dense models: what its tiny model measured, or that it is refused; below, why."""
    dense = {name: row for name, row in read("architectures")["families"].items() if not row.get("mixture")}
    return _families(dense, {})


@table()
def mixtures() -> str:
    """The same of mixtures of experts, with what PEFT computes."""
    mixed = {name: row for name, row in read("architectures")["families"].items() if row.get("mixture")}
    return _families(mixed, {"nf4-lora, dense": "nf4_skip", "in PEFT": "peft", "from PEFT": "peft_again"})


def _families(families: dict[str, Any], more: dict[str, str]) -> str:
    """A row for each family; `more` is header -> key of further figures."""
    rows, reasons = [], dict[str, list[str]]()
    for name, row in families.items():
        cells = [_cell(row, key) for key in ("resumed", "answered", *FIGURES, "packing", *more.values())]
        adapted = f"{row['num_adapted']}" if "num_adapted" in row else "–"
        rows.append([name, f"`{row['model_type']}`", adapted, *cells, f"{row['seconds']:.0f}"])
        refused = [text for key, text in row["refused"].items() if key != "packing"]  # the page says why
        for text in dict.fromkeys([*refused, *row["failed"].values()]):
            reasons.setdefault(text, []).append(name)
    allowed = read("architectures")["asked"]
    keys = [key for key in allowed if key in (*FIGURES, "packing", *more.values())]
    titles = {key: key for key in keys} | _TITLES | {key: title for title, key in more.items()}
    asked = "; ".join(f"{titles[key]} {allowed[key]:.0e}" for key in keys)
    notes = "".join(f"- {', '.join(names)}: {text}\n" for text, names in reasons.items())
    table = markdown(["family", "model type", "adapted layers", *HEADER, *more, "s"], rows)
    return f"{table}\nLargest difference allowed: {asked}.\n\n{notes}"


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
