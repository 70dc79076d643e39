"""Tables of bases that are not on the device: how much of the copying is hidden, and what a base on disk needs."""

from __future__ import annotations

from tables.table import gib, markdown, read


def stream_schedule() -> str:
    """Slowdown by the number of streamed blocks, interleaved and packed together."""
    document = read("stream_schedule")
    shares = sorted({each["share_of_break_even"] for each in document["by_streamed"]}, reverse=True)
    break_even = document["break_even_tokens"]
    header = [f"streamed of {document['num_blocks']} blocks"]
    for share in shares:
        header += [f"{share * break_even:,.0f} tokens: interleaved", "packed together"]
    rows: dict[int, list[str]] = {}
    for each in document["by_streamed"]:
        cells = rows.setdefault(each["num_streamed"], [str(each["num_streamed"])])
        cells += [f"{each[arm]['slowdown']:.2f}×" for arm in ("interleaved", "packed")]
    note = (
        f"\nBreak-even with all blocks streamed: {break_even:,.0f} tokens a micro-batch; with more tokens every copy "
        "is hidden.\n"
    )
    return markdown(header, list(rows.values())) + note


def disk_residency() -> str:
    """Peak resident memory of training with the base on disk, and what it is made of."""
    document = read("disk_residency")
    disk, nothing = document["arms"]["disk"], document["arms"]["nothing"]
    shape = document["shape"]
    rows = [
        ["packed base in its files", gib(document["packed_base_bytes"])],
        ["peak of the process that trains", f"**{gib(disk['peak_bytes'])}**"],
        ["imports alone", gib(nothing["peak_bytes"])],
        [
            "limit that was enforced",
            gib(document["bar_bytes"]) if document["held_by_control_group"] else "nothing",
        ],
    ]
    if "device" in document["arms"]:
        rows.append(["the same with the base in memory", gib(document["arms"]["device"]["peak_bytes"])])
    rows.append(["s a step", f"{disk['step_seconds']['median']:.0f}"])
    note = (
        f"\n{shape['num_hidden_layers']} blocks of {shape['hidden_size']:,} features, vocabulary "
        f"{shape['vocab_size']:,}, {document['num_tokens']} tokens a step, rank {document['rank']}.\n"
    )
    return markdown(["GiB", "base.residency: disk"], rows) + note
