"""Tables of what is held in memory: one layer, a whole step, the loss."""

from __future__ import annotations

from typing import Any

from frame import table

from tables.table import CONTENDERS, GIB, MIB, gib, markdown, read


@table()
def layer_memory() -> str:
    """What each layer holds after forward, and its workspace in the first call and in later ones."""
    document = read("layer_memory")
    small, large = document["layer"], document["large_layer"]
    header = ["MiB", "held", "held without its output", "workspace forward", "backward", *_large_header(large)]
    rows = []
    for name, found in small["ranks"]["16"].items():
        first, later = found["first"], found["later"]
        row = [CONTENDERS[name], *(f"{later[what] / MIB:.1f}" for what in ("held_bytes", "saved_bytes"))]
        row += [f"{max(call[what] for call in (first, later)) / MIB:.0f}" for what in _TRANSIENTS]
        for each in large["ranks"].values():
            calls = [call[what] for call in each.get(name, {}).values() for what in _TRANSIENTS]
            row.append(f"{max(calls) / MIB:.0f}" if calls else "–")
        rows.append(row)
    note = (
        f"\n{document['num_tokens']:,} tokens. First four columns: {small['in_features']} → {small['out_features']}, "
        "rank 16. Last columns: largest workspace of a pass.\n"
    )
    return markdown(header, rows) + note


_TRANSIENTS = ("forward_transient_bytes", "backward_transient_bytes")


def _large_header(large: dict[str, Any]) -> list[str]:
    shape = f"{large['in_features']} → {large['out_features']}"
    return [f"{shape}, r {rank}" for rank in large["ranks"]]


@table()
def step_memory() -> str:
    """Peaks of whole steps, with the distance from weights and unavoidable activations, and the targets."""
    document = read("step_memory")
    cases = document["cases"]
    rows = [["weights and unavoidable activations", *(gib(case["floor"]["total_bytes"]) for case in cases.values())]]
    for name in next(iter(cases.values()))["arms"]:
        arms = [case["arms"][name] for case in cases.values()]
        rows.append([CONTENDERS[name], *(f"{gib(a['peak_bytes'])} (+{gib(a['above_floor_bytes'])})" for a in arms)])
    targets = [
        f"{name}, at most {bar:g} GiB ({'met' if document['passes'][name] else 'missed'})"
        for name, bar in document["bars_gib"].items()
    ]
    note = f"\nTargets for {CONTENDERS['own_dora']}: {'; '.join(targets)}.\n"
    return markdown(["GiB at the peak (above the first line)", *cases], rows) + note


@table()
def sharded_memory() -> str:
    """What each process holds of a divided base, and the largest that loading took in one of them."""
    document = read("sharded_memory")
    rows = []
    for size, each in document["processes"].items():
        planned, held, resident = each["planned_bytes"], max(each["held_bytes"]), max(each["resident_bytes"])
        rows.append(
            [
                size,
                f"{planned / GIB:.3f}",
                f"{held / GIB:.3f} ({held / planned - 1:+.1%})",
                f"{resident / GIB:.3f} ({resident / planned - 1:+.1%})",
                gib(max(each["peak_bytes"])),
                gib(each["allowed_peak_bytes"]),
            ]
        )
    header = ["processes", "planned", "counted", "resident after loading", "peak while loading", "limit"]
    more = [
        (resident - held) / 1e6
        for each in document["processes"].values()
        for resident, held in zip(each["resident_bytes"], each["held_bytes"], strict=True)
    ]
    note = f"\nResident minus counted: {min(more):.0f} to {max(more):.0f} MB. Tolerance: {document['bar']:.0%}.\n"
    return markdown([f"{header[0]}; GiB of each", *header[1:]], rows) + note


@table()
def chunked_loss() -> str:
    """Bytes and gradients of the chunked and the plain loss, and the ratio of their times."""
    document = read("chunked_loss")
    fake, real, gradients = document["bytes"]["fake"], document["bytes"]["real"], document["gradients"]
    header = ["loss", *(f"peak, hidden {each['hidden']}" for each in (fake, real)), "gradient error, bf16", "float32"]
    rows = [
        [
            name,
            *(f"{each['peak_bytes'][name] / MIB:,.0f} MiB" for each in (fake, real)),
            f"{gradients[f'{name}, bfloat16']:.1e}",
            f"{gradients[f'{name}, float32']:.1e}" if f"{name}, float32" in gradients else "reference",
        ]
        for name in ("plain", "chunked")
    ]
    time = document["time"]["chunked / plain"]
    note = (
        f"\n{document['num_tokens']:,} tokens, vocabulary {document['vocabulary']:,}, {document['chunk']} tokens a "
        f"chunk. Time of chunked over plain, hidden {document['time']['hidden']}: {time['median']:.2f} (quartiles "
        f"{time['lower']:.2f} to {time['upper']:.2f}).\n"
    )
    return markdown(header, rows) + note


@table()
def load_memory() -> str:
    """Bytes of the checkpoint, of the packed model, of the largest tensor, and the peak."""
    documents = {"Llama": read("load_memory"), "mixture of experts": read("load_memory_experts")}
    columns = {
        "checkpoint": "checkpoint_bytes",
        "packed model": "packed_model_bytes",
        "largest tensor": "largest_tensor_bytes",
        "peak over an empty process": "used_bytes",
        "limit": "allowed_bytes",
    }
    rows = [
        [what, *(f"{document[name] / GIB:.3f} GiB" for name in columns.values())]
        for what, document in documents.items()
    ]
    return markdown(["model", *columns], rows)
