"""Tables of what is timed: one layer, a whole step, packing."""

from __future__ import annotations

from frame import table

from tables.table import CONTENDERS, GIB, MIB, gib, markdown, percent, quartiles, read


@table()
def layer_time() -> str:
    """Ratios of one layer's time; medians over rounds, and the share of what was asked that is so."""
    document = read("layer_time")
    columns = {
        "QDoRA / QLoRA": "own_dora / own_lora",
        "norm computed": "own_dora_new_norm / own_lora",
        "dropout / none": "own_dora_dropout / own_dora",
        "QDoRA / PEFT QLoRA": "own_dora / peft_lora",
        "QDoRA / frozen": "own_dora / frozen",
        "PEFT QDoRA / its QLoRA": "peft_dora / peft_lora",
        "norm by addmm": "peft_dora_addmm / peft_lora",
        "its defaults": "peft_dora_defaults / peft_lora",
    }
    rows = []
    for case in document["cases"]:
        label = f"{case['in_features']} → {case['out_features']}, r {case['rank']}, {case['tokens']:,}"
        label += "" if case["allocator"] == "tuned" else ", default allocator"
        rows.append([label, *(f"{case['ratios'][name]['median']:.3f}" for name in columns.values())])
    bars = document["bars"]
    asked = {
        "QDoRA at most 1.03 times QLoRA in": "own_dora / own_lora",
        "QDoRA at most PEFT's QLoRA (1.03 times at 256 tokens) in": "own_dora / peft_lora",
        "dropout at most 1.05 times none in": "own_dora_dropout / own_dora",
    }
    counts = []
    for what, name in asked.items():
        found = [bar for bar in bars if bar["ratio"] == name]
        worst = max(found, key=lambda bar: bar["median"] / bar["limit"])
        counts.append(
            f"{what} {sum(bar['within'] for bar in found)} of {len(found)} cases "
            f"(worst: {worst['median']:.3f}, {worst['case'].split(',')[0]})"
        )
    return markdown(["layer, rank, tokens", *columns], rows) + f"\nTargets met: {'; '.join(counts)}.\n"


@table()
def peft_time() -> str:
    """Time and bytes of DoRA and LoRA on PEFT's interface, relative to PEFT's LoRA."""
    document = read("peft_time")
    cases = document["cases"]
    names = [name for name in next(iter(cases.values()))["ratios"] if name != "peft_lora"]
    header = ["", *(CONTENDERS[name] for name in names)]
    times = [[case, *(_quartiles(found["ratios"][name]) for name in names)] for case, found in cases.items()]
    sizes = [
        [case, *("{held:.2f}, {peak:.2f}".format_map(found["byte_ratios"][name]) for name in names)]
        for case, found in cases.items()
    ]
    bars = document["bars"]
    missed = [f"{bar['name']} ({bar['value']:.3f})" for bar in bars if not bar["holds"] and "bytes" not in bar["name"]]
    num_met = sum(bar["holds"] for bar in bars)
    text = f"{num_met} of {len(bars)} targets met. Of time missed: {'; '.join(missed) or '-'}.\n"
    between = "\nBytes held after the forward pass, and at the peak:\n\n"
    return f"{markdown(header, times)}{between}{markdown(header, sizes)}\n{text}"


@table()
def expert_cost() -> str:
    """Ratios of the time of a block's experts, bytes held for backward, growth of the peak."""
    document = read("expert_cost")
    columns = ("own_dora / own_lora", "own_dora / frozen", "own_dora / peft_lora")
    rows = []
    for case in document["cases"]:
        routing = f"skewed, {case['reached']} reached" if case["skewed"] else "even"
        peak, held = case.get("peak"), case["held"]
        rows.append(
            [
                f"{case['shape']}, {case['tokens']:,}, {routing}",
                *(f"{case['ratios'][name]['median']:.3f}" for name in columns),
                *(f"{held[name] / MIB:,.0f}" for name in ("own_dora", "own_lora", "peft_lora")),
                " / ".join(f"{peak[name] / MIB:,.0f}" for name in ("own_dora", "own_lora", "peft_lora"))
                if peak
                else "",
            ]
        )
    bar = document["bar"]
    head = ["shape, tokens, routing", "QDoRA / QLoRA", "QDoRA / frozen", "QDoRA / PEFT LoRA"]
    head += ["held, QDoRA", "QLoRA", "PEFT LoRA", "peak: QDoRA / QLoRA / PEFT LoRA"]
    within = f"Target met: QDoRA at most {bar['limit']} times QLoRA in {bar['within']} of {bar['of']} cases."
    text = f"\nMedians of rounds; bytes in MiB. {within}\n"
    return markdown(head, rows) + text


@table()
def expert_launches() -> str:
    """Launches and bytes of a block's experts on a GPU without a grouped product, before and after."""
    document, rows = read("expert_launches"), []
    for before, after in zip(document["before"], document["after"], strict=True):
        found = [(sum(each["launches"].values()), sum(each["bytes"].values())) for each in (before, after)]
        rows.append(
            [
                f"{after['tokens']:,}, {after['routing']}",
                f"{after['fewest_tokens']:,} to {after['most_tokens']:,}",
                *(f"{launches:,}" for launches, _ in found),
                *(f"{num_bytes / GIB:.1f}" for _, num_bytes in found),
                *(f"{each['peak_bytes'] / MIB:,.0f}" for each in (before, after)),
                " / ".join(str(each["waits"]) for each in (before, after)),
            ]
        )
    head = [f"{what}, {when}" for what in ("launches", "GiB moved", "peak, MiB") for when in ("before", "after")]
    return markdown(["tokens, routing", "tokens of an expert", *head, "waits"], rows)


@table()
def packing() -> str:
    """Padding, real tokens a second and time of each way to make micro-batches, and the losses' differences."""
    document = read("packing")
    labels = {
        "arrival": "padded, in order of arrival",
        "grouped": "padded, grouped by length",
        "packed": "packed",
        "packed_to_max_length": f"packed, rows always {document['max_length']} long",
    }
    found = document["time"]
    rows = []
    for way, label in labels.items():
        speed = found["tokens_per_second"][way]
        times = found["ratios"].get(f"{way} / packed")
        row = [label, percent(found["padding_share"][way]), f"{found['micro_batches_per_step'][way]:.1f}"]
        row.append(quartiles(speed, ".0f"))
        rows.append([*row, quartiles(times, ".2f") if times else "1"])
    losses = document["losses"]
    note = (
        f"\n{found['num_steps']} steps of {document['step_tokens']:,} tokens in turns, median and quartiles. Largest "
        "difference between an example's NLL in its micro-batch and alone (float32, "
        f"{losses['num_examples']} examples): packed {losses['packed']['max_difference']:.1e} nats (relative "
        f"{losses['packed']['max_relative_difference']:.1e}), grouped by length "
        f"{losses['grouped']['max_difference']:.1e} ({losses['grouped']['max_relative_difference']:.1e}).\n"
    )
    header = ["micro-batches", "padding %", "micro-batches a step", "real tokens/s", "time, packed = 1"]
    return markdown(header, rows) + note


@table()
def roofline() -> str:
    """Launches, bytes and estimated time of a layer of ours and of PEFT's, on a GPU that is not there."""
    document = read("roofline")
    rows = []
    for name, case in document["cases"].items():
        row = [name]
        for contender in ("own_dora", "peft_lora"):
            found = case[contender]
            moved = 2 * found["forward"]["bytes"] + found["backward"]["bytes"]
            row += [
                f"{found['forward']['launches']} + {found['backward']['launches']}",
                f"{moved / 1e6:,.0f}",
                f"{found['seconds'] * 1e6:,.0f}",
            ]
        rows.append([*row, f"{case['ratio']:.2f}", f"{case['bar']:.1f}"])
    header = ["layer"]
    for contender in ("QDoRA", "PEFT QLoRA"):
        header += [f"{contender}: launches", "MB", "µs"]
    met = sum(case["passes"] for case in document["cases"].values())
    note = (
        f"\nAn estimate, rank {document['rank']}: {document['launch_seconds'] * 1e6:.0f} µs a launch and the larger of "
        f"bytes / {document['bytes_per_second'] / 1e12:.2f} TB/s and FLOPs / "
        f"{document['flops_per_second']['2'] / 1e12:.0f} TFLOP/s (float32: "
        f"{document['flops_per_second']['4'] / 1e12:.1f}). Launches: forward + backward; MB and µs: two forward passes "
        f"and one backward pass. The target is met in {met} of {len(document['cases'])} cases.\n"
    )
    return markdown([*header, "QDoRA / PEFT QLoRA", "target: at most"], rows) + note


@table()
def step_time() -> str:
    """Tokens a second, own QDoRA's time relative to each contender, and peaks, by checkpointing; pairs below."""
    document = read("step_time")
    modes, peaks = document["time"], document.get("peaks", {})
    header = ["", *(f"{what}, checkpointing {mode}" for mode in modes for what in _STEP_COLUMNS)]
    header += [f"peak GiB, checkpointing {mode}" for mode in peaks]
    rows = []
    names = next(iter(modes.values()))["tokens_per_second"]
    for name in ("own_dora", *(name for name in names if name != "own_dora")):
        row = [CONTENDERS[name]]
        for found in modes.values():
            times = found["ratios"].get(f"own_dora / {name}")
            row.append(f"{found['tokens_per_second'][name]['median']:.0f}")
            row.append(_quartiles(times) if times else "1")
        row += [gib(found[name]["peak_bytes"]) if name in found else "–" for found in peaks.values()]
        rows.append(row)
    pairs = "; ".join(
        f"checkpointing {mode}, {batch} examples ({sum(found['tokens']) / len(found['tokens']):,.0f} tokens) a step: "
        f"{_quartiles(found['ratios']['own_dora / own_lora'])} in {len(found['tokens'])} rounds"
        for mode, batches in document["pairs"].items()
        for batch, found in batches.items()
    )
    rounds = ", ".join(f"{len(found['tokens'])} rounds with checkpointing {mode}" for mode, found in modes.items())
    alone = f"Time of qdora DoRA / qdora LoRA, without the others: {pairs}."
    note = f"\n{document['batch']} examples a step; {rounds}. {alone}\n"
    return markdown(header, rows) + note


@table()
def host_time() -> str:
    """Microseconds that the host takes to call a layer, and own QDoRA's time relative to each contender."""
    document = read("host_time")
    passes = document["passes"]
    header = ["", *(f"{name}, µs" for name in passes), *(f"{name}, qdora DoRA / this one" for name in passes)]
    rows = []
    for layer in passes["forward"]["seconds"]:
        ratios = [each["ratios"].get(f"own_dora / {layer}") for each in passes.values()]
        times = [f"{1e6 * each['seconds'][layer]['median']:.0f}" for each in passes.values()]
        rows.append([CONTENDERS[layer], *times, *(_quartiles(each) if each else "–" for each in ratios)])
    verdicts = ", ".join(f"{name} {'met' if within else 'missed'}" for name, within in document["within"].items())
    most = document["bar"]["own_dora / peft_lora"]
    note = (
        f"\n{document['size']} x {document['size']}, rank {document['rank']}, one token, {document['num_threads']} "
        f"thread, {document['num_rounds']} rounds. Target: qdora DoRA at most {most:g} times PEFT LoRA: {verdicts}.\n"
    )
    return markdown(header, rows) + note


_STEP_COLUMNS = ("tokens/s", "time of qdora DoRA / of this one")


@table()
def one_micro_batch() -> str:
    """Tokens a second where each step is one micro-batch, and own QDoRA's time relative to each contender."""
    document = read("one_micro_batch")
    rows = []
    for name, speed in document["tokens_per_second"].items():
        times = document["ratios"].get(f"own_dora / {name}")
        rows.append([CONTENDERS[name], f"{speed['median']:.0f}", _quartiles(times) if times else "1"])
    count, peer = len(document["seconds"]["own_dora"]), document["ratios"]["peft_dora / peft_lora"]
    targets = [
        f"at most {most:g} times that of {CONTENDERS[name.removeprefix('own_dora / ')]} "
        f"({'met' if document['passes'][name] else 'missed'})"
        for name, most in document["bars"].items()
    ]
    parts = ", ".join(f"{part} {100 * share['median']:.1f} %" for part, share in document["of_own_lora"].items())
    note = (
        f"\n{document['rows']} rows of {document['length']} tokens, {document['num_threads']} threads, {count} rounds. "
        f"PEFT DoRA / PEFT LoRA: {_quartiles(peer)}. Targets for the time of qdora DoRA: {', '.join(targets)}. "
        f"Time that qdora DoRA adds to a step of qdora LoRA (medians): {parts}.\n"
    )
    return markdown(["", *_STEP_COLUMNS], rows) + note


def _quartiles(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['lower']:.2f}–{ratio['upper']:.2f})"
