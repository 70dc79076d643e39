"""The Triton kernels compiled for every card, without one: registers, spills and shared memory; bytes they would move.

    python benchmarks/triton_kernels.py [--out benchmarks/results/triton_kernels.json] [--smoke]

Needs `pip install "qdora[triton]"`. The kernels are compiled through the calls that qdora makes, with a driver that
stands for the card; cuobjdump, which Triton brings, reads the binaries. No kernel may spill.

The bytes are an estimate: every tensor of an operation is read or written once, and the time is that at a stated rate,
without what launches cost.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from measure import facts, parser_of, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdora.files.environment import package_versions
from qdora.ops import dora, tiles
from qdora.ops.packed import empty_packed
from qdora.ops.planned_device import planned_on
from qdora.plan.step_time import STATED

CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""A100, RTX 3090 and A10, RTX 4090 and L4, H100, B200, RTX 5090."""
_SHAPE = (4096, 4096)  # one tile
_SMOKE_SHAPE = (256, 192)
_EXPERTS, _REACHED = 8, (0, 2, 3)


def main() -> int:
    """0 when no kernel spills."""
    args = parser_of(__doc__, "triton_kernels", smoke="one architecture and a small weight").parse_args()
    capabilities = CAPABILITIES[:1] if args.smoke else CAPABILITIES
    kernels = [
        {"kernel": name, "capability": capability, **usage(compiled(launch, capability))}
        for name, launch in launches().items()
        for capability in capabilities
    ]
    head = facts("python benchmarks/triton_kernels.py" + (" --smoke" if args.smoke else ""))
    head["versions"] |= package_versions(("triton",))
    spilling = [each for each in kernels if each["spilled_bytes"]]
    result = {
        **head,
        "kernels": kernels,
        "no_spill": not spilling,
        "estimate": estimate(_SMOKE_SHAPE if args.smoke else _SHAPE),
    }
    write(args.out, result)
    return 1 if spilling else 0


def launches() -> dict[str, Callable[[], Any]]:
    """Calls of qdora's functions, each of which launches one kernel on a weight without content."""
    from qdora.ops import triton_kernels as own

    bf16 = torch.bfloat16
    weight, plain = (empty_packed("nf4", (4096, 4096), double_quant=double) for double in (True, False))
    crossing = empty_packed("nf4", (4096, 4128))
    gain = torch.empty(4096)
    experts = own.Experts(torch.tensor(_REACHED), 4096 // _EXPERTS)

    def factors(rank: int, some: own.Experts | None = None) -> Callable[[], Tensor]:
        rows, shape = (4096, ()) if some is None else (some.rows_each, (len(_REACHED),))
        a, b = torch.empty(*shape, rank, 4096, dtype=bf16), torch.empty(*shape, rows, rank)
        return partial(own.factor_dots, weight, a, b, some)

    return {
        "tile": partial(own.decode, weight, bf16, gain=gain),
        "tile, float16": partial(own.decode, weight, torch.float16, gain=gain),
        "tile, float32": partial(own.decode, weight, torch.float32, gain=gain),
        "tile, scales at hand": partial(own.decode, plain, bf16),
        "tile, blocks cross rows": partial(own.decode, crossing, bf16, gain=gain),
        "tile of experts": partial(own.decode, weight, bf16, gain=gain, experts=experts),
        "row norms": partial(own.squared_row_norm, weight),
        "factor sums, rank 16": factors(16),
        "factor sums, rank 64": factors(64),
        "factor sums, rank 128": factors(128),
        "factor sums of experts, rank 16": factors(16, experts),
    }


class _Card:
    """What Triton asks of a driver to compile for a card. Each architecture is a device of its own in its caches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


class Launch(NamedTuple):
    """A kernel that was compiled in place of a launch, and the bytes of the tensors it would have been given."""

    kernel: Any
    num_bytes: int


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Launch]]:
    """Inside, a launch compiles its kernel and leaves it in the list."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []
    run = JITFunction.run

    def only_compiled(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        # A tensor stands in for those that a kernel does not read: each counts once.
        tensors = {each.data_ptr(): each.numel() * each.itemsize for each in args if isinstance(each, Tensor)}
        found.append(Launch(run(self, *args, warmup=True, **kwargs), sum(tensors.values())))

    driver.set_active(_Card(capability))
    try:
        with mock.patch.object(JITFunction, "run", only_compiled):
            yield found
    finally:
        driver.set_active(None)


def compiled(launch: Callable[[], Any], capability: int) -> Any:
    """The kernel that a call launches."""
    with compiling_for(capability) as found:
        launch()
    (made,) = found
    return made.kernel


def usage(kernel: Any) -> dict[str, int]:
    """Registers of a thread, bytes that it spills, bytes of shared memory of a program, by cuobjdump."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        call = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": found["REG"],
        "spilled_bytes": found["STACK"] + found["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
    }


_NO_LAUNCH = ("empty", "_unsafe_view")


class Traffic(TorchDispatchMode):
    """Counts operations that are no views, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.num_bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        is_view = any(argument.alias_info and not argument.alias_info.is_write for argument in func._schema.returns)
        if not is_view and not any(name in func.__name__ for name in _NO_LAUNCH):
            given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
            self.launches += 1
            self.num_bytes += sum(each.numel() * each.itemsize for each in (*given, *made))
        return out


def estimate(shape: tuple[int, int]) -> dict[str, Any]:
    """Launches and bytes of what a layer needs of its base, on a GPU, with bitsandbytes' kernels and with Triton's."""
    weight = empty_packed("nf4", shape)
    for each in weight.tensors().values():
        each.zero_()
    gain = torch.ones(shape[0])
    scales = tiles.own_scales(weight, gain)
    assert scales is not None
    at_hand = tiles.with_scales(weight, scales)
    a, b = torch.zeros(16, shape[1], dtype=torch.bfloat16), torch.zeros(shape[0], 16)
    paths: dict[str, Callable[[], Any]] = {
        "tiles of rows": lambda: list(tiles.row_tiles(weight, torch.bfloat16, gain)),
        "tiles of columns": lambda: list(tiles.column_tiles(weight, torch.bfloat16, gain)),
        "tiles of rows, scales at hand": lambda: list(tiles.row_tiles(at_hand, torch.bfloat16)),
        "norm, rank 16": partial(dora.factored_norm, weight, a, b, 1.0, base_squared=gain, dtype=torch.bfloat16),
    }
    found: dict[str, Any] = {}
    for name, path in paths.items():
        with planned_on("cuda"), Traffic() as traffic:
            path()
        found[name] = {"bitsandbytes": _per_weight(shape, traffic.launches, traffic.num_bytes)}
        with planned_on("cuda"), mock.patch.object(tiles, "runs_triton", return_value=True):
            with compiling_for(CAPABILITIES[0]):
                path()  # sends the code table, which stays
            with compiling_for(CAPABILITIES[0]) as kernels, Traffic() as traffic:
                path()
        num_bytes = traffic.num_bytes + sum(each.num_bytes for each in kernels)
        found[name]["triton"] = _per_weight(shape, traffic.launches + len(kernels), num_bytes)
    return {"shape": list(shape), "rate": STATED["cuda"].name, "bytes_per_second": STATED["cuda"].bytes, "of": found}


def _per_weight(shape: tuple[int, int], num_launches: int, num_bytes: int) -> dict[str, float]:
    seconds = num_bytes / STATED["cuda"].bytes
    return {"launches": num_launches, "bytes_per_weight": num_bytes / (shape[0] * shape[1]), "seconds": seconds}


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
