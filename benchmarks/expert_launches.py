"""Launches, waits and bytes of the experts of a block on a GPU for which torch has no grouped product.

    python benchmarks/expert_launches.py [--before COMMIT] [--out FILE] [--smoke]

Such are an A100, an RTX 4090 and an RTX 5090. A later micro-batch of a step with checkpointing, forward, recompute and
backward, QDoRA of rank 8 in the shape of a block of Qwen3-30B-A3B, on the false GPU of the tests: which operations a
GPU would be sent, and the bytes of all tensors that they read or write. Large products and dequantised weights have no
values. Tokens choose 8 experts: evenly, or with weights 1 / rank (Zipf), ranks in random order.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from expert_cost import CHOICES, RANK, TINY, bare_experts, put_packed_, sizes_of
from measure import facts, fresh, parser_of, write
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for the false GPU of the tests
from qdora.ops.packed import empty_packed
from tests.false_gpu import FalseGpu

ROOT = Path(__file__).resolve().parent.parent
NUM_TOKENS = (2048,)
ROUTINGS = ("even", "zipf")
PHASES = ("forward", "recompute", "backward")


class WithoutValues(FalseGpu):
    """A false GPU that does not compute products and dequantised weights."""

    def kernel(self, func: Any) -> Callable[..., Any]:
        """What makes the result of an operation, whose values may be any."""
        name = func._schema.name
        if name in ("aten::mm", "aten::bmm"):
            return lambda a, b, *_, out=None: a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out
        if name == "bitsandbytes::dequantize_4bit":
            return lambda codes, absmax, block, quant, shape, dtype: codes.new_zeros(shape, dtype=dtype)
        return super().kernel(func)


def main() -> None:
    """This code and, if asked, that of an earlier commit."""
    parser = parser_of(__doc__, "expert_launches", smoke="four tiny experts")
    parser.add_argument("--before", metavar="COMMIT", help="also count what an earlier commit launches")
    args = parser.parse_args()
    shape = "tiny" if args.smoke else "Qwen3-30B-A3B"
    command = "python benchmarks/expert_launches.py" + (f" --before {args.before}" if args.before else "")
    document = facts(command) | {"shape": shape, "rank": RANK, "choices": CHOICES}
    document["after"] = [
        counted(shape, tokens, routing) for tokens in ([64] if args.smoke else NUM_TOKENS) for routing in ROUTINGS
    ]
    if args.before:
        with tempfile.TemporaryDirectory() as directory:
            archive = ["git", "-C", str(ROOT), "archive", args.before]
            tree = subprocess.run(archive, check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", directory], input=tree, check=True)
            script, gpu = Path(directory, "benchmarks", Path(__file__).name), "tests/false_gpu.py"
            script.write_text(Path(__file__).read_text())
            Path(directory, gpu).write_text((ROOT / gpu).read_text())  # counts both alike
            options = ["--out", str(Path(directory, "found.json")), *(["--smoke"] if args.smoke else [])]
            document["before"] = fresh(str(script), *options, variables={"PYTHONPATH": directory})["after"]
    write(args.out, document)


def counted(shape: str, num_tokens: int, routing: str) -> dict[str, Any]:
    """Launches and bytes by phase, waits and the peak of live bytes of one micro-batch."""
    sizes = TINY if shape == "tiny" else sizes_of(shape)
    num_experts, generator = sizes["num_experts"], torch.Generator().manual_seed(1)
    weights = torch.ones(num_experts)
    if routing == "zipf":
        weights = 1 / torch.arange(1.0, num_experts + 1)[torch.randperm(num_experts, generator=generator)]
    choices = min(CHOICES, num_experts)
    index = torch.multinomial(weights.expand(num_tokens, -1), choices, generator=generator)
    with WithoutValues() as gpu:
        holder = nn.ModuleDict({"experts": bare_experts(sizes)})
        put_packed_(holder, "own_dora", lambda rows: filled(rows, gpu.device))
        holder.to(gpu.device)
        x = torch.zeros(num_tokens, sizes["hidden_size"], dtype=torch.bfloat16, device=gpu.device).requires_grad_()
        share = torch.zeros(num_tokens, choices, dtype=torch.bfloat16, device=gpu.device)
        where = index.to(gpu.device)
        for _ in range(2):  # the first computes the norms, which the micro-batches of a step share
            gpu.clear()
            with gpu.phase("forward"):
                out: Tensor = checkpoint(holder["experts"], x, where, share, use_reentrant=False)  # type: ignore[assignment]
            out.backward(torch.zeros_like(out))
        counts = torch.bincount(index.reshape(-1), minlength=num_experts)
        launched = [event for event in gpu.events if event.kind == "launch"]
        return {
            "tokens": num_tokens,
            "routing": routing,
            "most_tokens": int(counts.max()),
            "fewest_tokens": int(counts.min()),
            "launches": {phase: gpu.count("launch", phase) for phase in PHASES},
            "bytes": {phase: sum(each.num_bytes for each in launched if each.phase == phase) for phase in PHASES},
            "waits": gpu.count("wait"),
            "peak_bytes": gpu.peak_bytes,
        }


def filled(shape: tuple[int, int], device: torch.device) -> Any:
    """A stack of experts in NF4 on the device."""
    packed = empty_packed("nf4", shape, device=device)
    for tensor in packed.tensors().values():
        tensor.fill_(1)
    return packed


if __name__ == "__main__":
    main()
