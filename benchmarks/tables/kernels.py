"""Tables of the Triton kernels: what the compilers make of them, and an estimate of what they would move."""

from __future__ import annotations

from tables.table import markdown, read


def triton_kernels() -> str:
    """Registers of a thread and shared memory of a program by architecture, and the most bytes that a thread spills."""
    document = read("triton_kernels")
    capabilities = sorted({each["capability"] for each in document["kernels"]})
    by_name: dict[str, dict[int, dict[str, int]]] = {}
    for each in document["kernels"]:
        by_name.setdefault(each["kernel"], {})[each["capability"]] = each
    rows = [
        [
            name,
            *(f"{found[one]['registers']} / {found[one]['shared_bytes'] / 1024:.1f}" for one in capabilities),
            str(max(each["spilled_bytes"] for each in found.values())),
        ]
        for name, found in by_name.items()
    ]
    versions = document["versions"]
    note = f"\nRegisters / KiB of shared memory, 4 warps. Compiled by Triton {versions['triton']}; no kernel was run.\n"
    return markdown(["kernel", *(f"sm_{one}" for one in capabilities), "spilled bytes"], rows) + note


def triton_estimate() -> str:
    """Launches, bytes a weight and time at a stated rate, by bitsandbytes and by Triton: an estimate."""
    found = read("triton_kernels")["estimate"]
    rows = []
    for name, ways in found["of"].items():
        bnb, own = ways["bitsandbytes"], ways["triton"]
        rows.append(
            [
                name,
                *(f"{one['launches']}" for one in (bnb, own)),
                *(f"{one['bytes_per_weight']:.2f}" for one in (bnb, own)),
                *(f"{1e6 * one['seconds']:.0f}" for one in (bnb, own)),
            ]
        )
    ways = ("bitsandbytes", "Triton")
    header = [f"{what}, {way}" for what in ("launches", "bytes a weight", "µs") for way in ways]
    shape, rate = " × ".join(map(str, found["shape"])), f"{found['bytes_per_second'] / 1e12:.1f} TB/s"
    note = f"\nAn estimate for a weight of {shape} in NF4 at {rate}, {found['rate']}; launches cost no time.\n"
    return markdown(["", *header], rows) + note
