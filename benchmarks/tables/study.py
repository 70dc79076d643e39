"""Tables of compressed bases: perplexities by pruning method, and the study, from its report's own data files."""

from __future__ import annotations

from tables.table import compared, markdown, read, report_rows, with_band


def pruning() -> str:
    """Perplexity by method and pattern, dense below."""
    document = read("pruning")
    cases = {(case["method"], case["pattern"]): case for case in document["cases"]}
    patterns = list(dict.fromkeys(case["pattern"] for case in document["cases"] if case["pattern"]))
    methods = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
    rows = []
    for method, label in methods.items():
        found = [cases[method, pattern] for pattern in patterns]
        rows.append([label, *(f"{case['perplexity']:,.1f}" for case in found)])
    header = ["perplexity", *(pattern if ":" in pattern else f"{pattern} %" for pattern in patterns)]
    dense, size = cases["dense", ""], document["calibration"]
    off = [pattern for pattern, ordered in document["ordered"].items() if not ordered]
    order = "SparseGPT ≤ Wanda ≤ magnitude in every column" if not off else f"the usual order fails at {', '.join(off)}"
    note = (
        f"\nDense: {dense['perplexity']:.1f}, on {dense['num_tokens']:,} tokens of validation examples; inputs "
        f"measured on {size['sequences']} pieces of {size['length']} tokens of training examples; {order}.\n"
    )
    return markdown(header, rows) + note


def study_nulls() -> str:
    """How many intervals hold the truth, what is called falsely, and what is found by the number of seeds."""
    document = read("study_nulls")
    names = {"difference": "difference", "primary": "mean of bases", "score": "score"}
    names |= {"left": "left", "repaired": "repaired", "repaired_share": "share", "damage_choice": "damage"}
    rows = []
    for name, each in document["scenarios"].items():
        shares = each["shares"]
        number = f"{each['seeds']}, {each['bases']}, {each['tasks']} × {each['examples']}"
        covered = [f"{shares[what]:.1%}" if what in shares else "–" for what in names]
        rows.append([name, number, *covered, f"{shares['winner']:.1%}", f"{shares['equivalent']:.1%}"])
    header = ["simulated study", "seeds, bases, tasks × examples", *names.values(), "a winner", "an equivalence"]
    note = (
        f"\n{document['studies']:,} studies in each row. From the third column: intervals that hold the truth (95 % is "
        "right); then studies without a difference that call a winner, and studies whose arms differ by just the zone "
        f"of {document['zone']:g} that call an equivalence (at most 5 % is right). `{document['command']}`\n"
    )
    effects = list(dict.fromkeys(each["effect"] for each in document["power"]))
    power = []
    for seeds in dict.fromkeys(each["seeds"] for each in document["power"]):
        own = {each["effect"]: each for each in document["power"] if each["seeds"] == seeds}
        found = [f"{own[effect]['better']:.0%}" for effect in effects if effect]
        promised = next(each for each in document["promised"] if each["seeds"] == seeds)
        reached = f"{promised['effect']:.3f}: {promised['found']:.0%}"
        power.append([str(seeds), *found, f"{own[0.0]['equivalent']:.0%}", reached])
    told = [f"better by {effect:g}" for effect in effects if effect]
    more = markdown(["seeds", *told, "equivalent at 0", "promised to be seen by 80 %"], power)
    return markdown(header, rows) + note + "\n" + more


def study() -> str:
    """Each base by itself and with each adapter, and what the tests say of the difference."""
    arms, pairs, facts = (report_rows("study", name) for name in ("arms", "comparisons", "facts"))
    adapters = list(dict.fromkeys(row["adapter"] for row in arms if row["is_trained"] == "True"))
    bases = list(dict.fromkeys(row["base"] for row in arms if row["is_trained"] == "True"))
    lines = []
    for base in bases:
        own = {row["adapter"] if row["is_trained"] == "True" else "": row for row in arms if row["base"] == base}
        first = next(iter(own.values()))
        line = [base, f"{float(first['bits_per_weight']):.2f}", f"{100 * float(first['sparsity']):.0f}"]
        line += [with_band(own.get(name)) for name in ("", *adapters)]
        line.append("; ".join(f"{pair['arm']}: {compared(pair)}" for pair in pairs if pair["base"] == base) or "–")
        lines.append(line)
    reference = next((row["text"] for row in facts if row["fact"] == "reference"), "")
    header = ["base", "bits", "zeros %", "no adapter", *adapters, f"against {reference}: NLL lower by"]
    won = [f"{pair['winner']} on {pair['base']}" for pair in pairs if pair["winner"]]
    repaired = [
        f"{row['base']} {float(row['repair']):.2f} ({row['adapter']})" for row in arms if row["repair"] not in ("", "–")
    ]
    done = read("study/run")
    seeds = sorted({row["num_seeds"] for row in arms if row["is_trained"] == "True"})
    note = (
        "\nNLL per answer token on one half of the validation examples, averaged over the tasks; differences with 95 % "
        f"t intervals over examples and seeds; learning rates chosen on the other half; seeds: {', '.join(seeds)}. "
        f"Winners: {', '.join(won) or 'none'}. "
        f"Repair ratio (share of the compression loss that the adapter recovers): {', '.join(repaired)}. "
        f"`{done['command']}`; the whole report: "
        "[results/study/report.md](results/study/report.md).\n"
    )
    return markdown(header, lines) + note
