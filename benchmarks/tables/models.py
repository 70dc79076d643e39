"""Tables of the families of models: how each was checked, and which work."""

from __future__ import annotations

from frame import markdown, read, table

CHECKS = {
    "resumed": "resumed",
    "answered": "answer",
    "evaluated": "NLL",
    "merged": "merged",
    "nf4_lora": "nf4-lora",
    "gradients": "gradients",
    "packing": "packing",
    "nf4_skip": "nf4-lora, dense",
    "peft": "in PEFT",
    "peft_again": "from PEFT",
}
"""Check -> its name on the page; the last three are of mixtures of experts."""


@table()
def architectures() -> str:
    return _checks(is_mixture=False)


@table()
def mixtures() -> str:
    return _checks(is_mixture=True)


def _checks(*, is_mixture: bool) -> str:
    document = read("architectures")
    families = {name: row for name, row in document["families"].items() if bool(row.get("mixture")) == is_mixture}
    trained = {name: row for name, row in families.items() if "num_adapted" in row}
    rows, reasons = [], dict[str, list[str]]()
    for check, title in CHECKS.items():
        values = {name: row[check] for name, row in trained.items() if check in row and check not in row["failed"]}
        counts = [sum(check in row[what] for row in trained.values()) for what in ("refused", "failed")]
        if not any([values, *counts]):
            continue
        figures, asked = ["–", "–", "–"], document["asked"].get(check)
        if values and asked is not None:
            worst = max(values, key=lambda name: values[name])
            figures = [f"{values[worst]:.0e}", worst, f"{asked:.0e}"]
        rows.append([title, str(len(values)), *map(str, counts), *figures])
    for name, row in families.items():
        refused = [text for key, text in row["refused"].items() if key != "packing"]  # the page says why
        for text in dict.fromkeys([*refused, *row["failed"].values()]):
            reasons.setdefault(text, []).append(name)
    header = ["check", "families", "refused", "failed", "largest difference", "in", "allowed"]
    notes = "".join(f"- {', '.join(names)}: {text}\n" for text, names in reasons.items())
    told = (f"{name} (`{row['model_type']}`, {row['num_adapted']})" for name, row in trained.items())
    return f"{markdown(header, rows)}\nFamilies, with their adapted layers: {', '.join(told)}.\n\n{notes}"


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
