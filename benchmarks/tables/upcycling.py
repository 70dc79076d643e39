"""Tables of a mixture made from a dense model, and of adapters on its parts."""

from __future__ import annotations

from typing import Any

from frame import table

from tables.table import interval, markdown, read

MODELS = {
    "dense": "SmolLM2-135M",
    "untrained": "mixture, untrained",
    "trained": "mixture, trained",
    "trained_nf4": "mixture, trained, NF4",
}


@table()
def upcycled_mixture() -> str:
    """NLL of text of the dense model and of the mixture on its way, and how evenly its experts are used."""
    document = read("expert_upcycling")
    mixture, sizes = document["mixture"], document["settings"]
    rows = []
    for name, label in MODELS.items():
        load = mixture["load"].get(name)
        shares = [share for block in load for share in block] if load else []
        used = [f"{min(shares):.1%}", f"{max(shares):.1%}"] if load else ["–", "–"]
        rows.append([label, f"{mixture['nll'][name]:.3f}", *used])
    header = ["model", "NLL per token of text", "least used expert of a block", "most used"]
    note = (
        f"\nNLL of {mixture['num_validation_texts']} validation examples, prompt and answer; bf16 except in the last "
        "row. Use: share of the routing choices in a block, 25% if even. "
        f"{mixture['num_parameters'] / 1e6:.0f} M parameters, {sizes['mixture_steps']} steps of "
        f"{sizes['rows'] * sizes['row_tokens']} tokens, {mixture['passes']:.1f} epochs, "
        f"peak learning rate {sizes['mixture_lr']:g}.\n"
    )
    return markdown(header, rows) + note


@table()
def expert_upcycling() -> str:
    """Answer NLL of each arm and task, and the differences between the arms."""
    document = read("expert_upcycling")
    arms, differences, sizes = document["arms"], document["differences"], document["settings"]
    pairs = [name for name in differences if not name.endswith("base")]
    rows = []
    for task, base in document["base"]["nll"].items():
        row = [task, f"{base:.3f}", *(f"{found['nll'][task]:.3f}" for found in arms.values())]
        rows.append([*row, *(_interval(differences[pair][task]) for pair in pairs)])
    header = ["task", "NF4 base", *arms, *(pair.replace(" - ", " − ") for pair in pairs)]
    counts = "; ".join(
        f"{arm}: {found['num_trainable']:,} parameters, learning rate {found['lr']}" for arm, found in arms.items()
    )
    alone = "; ".join(f"{pair.replace(' - ', ' − ')} {_seeds(differences[pair]['average'])}" for pair in pairs)
    gains = "; ".join(f"{arm} {_interval(differences[f'{arm} - base']['average'])}" for arm in arms)
    note = (
        f"\nChosen: {counts}. {sizes['steps']} steps of {sizes['batch']} examples, seeds "
        f"{', '.join(map(str, document['seeds']))}; {sizes['test_limit']} test examples of each task. Learning rates "
        f"tried with the first seed: {sizes['rates']}. {_verdict(differences)} Average of each arm minus that of "
        f"the NF4 base: {gains}. Intervals of the average with the test examples fixed: {alone}. "
        f"`{document['command']}`\n"
    )
    return markdown(header, rows) + note


def _interval(each: dict[str, Any]) -> str:
    return interval(each["value"], each["lower"], each["upper"])


def _seeds(each: dict[str, Any]) -> str:
    return f"{each['seeds_lower']:+.3f} to {each['seeds_upper']:+.3f}"


def _verdict(differences: dict[str, Any]) -> str:
    """What the intervals of the average over seeds and examples allow to say."""
    said = []
    for pair, found in differences.items():
        first, second = pair.split(" - ")
        average = found["average"]
        if average["lower"] > 0:
            first, second = second, first
        if average["lower"] > 0 or average["upper"] < 0:
            said.append(f"{first} is better than {second}")
    nothing = "nothing differs significantly, neither two arms nor an arm and the base"
    return f"On the average over tasks, {'; '.join(said) or nothing}."
