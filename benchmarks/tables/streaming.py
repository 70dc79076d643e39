"""Tables of bases that are not on the device: how much of the copying is hidden, and what a base on disk needs."""

from __future__ import annotations

from tables.table import markdown, read


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
        f"\nBreak-even with all blocks streamed: {break_even:,.0f} tokens a micro-batch; from there on every copy is "
        "hidden.\n"
    )
    return markdown(header, list(rows.values())) + note
