"""Peak memory of training on a base that stays on disk: the shape of Llama-3-8B in less than 2.5 GB.

    python benchmarks/disk_residency.py [--out benchmarks/results/disk_residency.json] [--smoke]

Writes a packed base with random weights (NF4 in blocks of 64, double quantisation; embeddings and head in bfloat16) to
a temporary directory, 6 GB, and trains QDoRA of rank 16 on it in fresh processes: with `base.residency: disk` and with
everything in memory. The figure is VmHWM, the largest resident set, in which the pages of mapped files count. Where the
machine lets a control group be made, the process on disk is held to the bar by one, and the system's cache of its files
with it: what it drops it then reads from the disk again.

Bars: the process on disk peaks below 2.5 GB; its losses are those of the one in memory, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu.plan import FULL
from measure import facts, fresh, parser_of, peak_rss_bytes, spread, status_bytes, write

BAR_BYTES = 2_500_000_000
NUM_STEPS, NUM_TOKENS, RANK = 2, 128, 16
LLAMA_3_8B: dict[str, Any] = FULL.middle | {"tie_word_embeddings": False}
SMOKE = LLAMA_3_8B | {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
SMOKE |= {"num_key_value_heads": 2, "intermediate_size": 512}
GROUPS = Path("/sys/fs/cgroup/memory")


def main() -> None:
    """Both residencies, each in a process of its own."""
    parser = parser_of(__doc__, "disk_residency", smoke="a tiny shape")
    parser.add_argument(
        "--disk-alone", action="store_true", help="leave out the run in memory: 10 GB, and the time of one"
    )
    parser.add_argument("--train", nargs=3, metavar=("FOLDER", "RESIDENCY", "GROUP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train is not None:
        trained(Path(args.train[0]), args.train[1], args.train[2])
        return
    shape = SMOKE if args.smoke else LLAMA_3_8B
    with tempfile.TemporaryDirectory() as name, control_group(BAR_BYTES) as group:
        packed_bytes = write_model(Path(name), shape)
        arms = {
            residency: fresh(__file__, "--train", name, residency, held)
            for residency, held in (("nothing", ""), ("disk", group), ("device", ""))
            if residency != "device" or not args.disk_alone
        }
    passes = {"below the bar": arms["disk"]["peak_bytes"] < BAR_BYTES}
    if "device" in arms:
        passes["losses are the same"] = arms["disk"]["losses"] == arms["device"]["losses"]
    result = {
        **facts("python benchmarks/disk_residency.py"),
        "shape": shape,
        "num_tokens": NUM_TOKENS,
        "rank": RANK,
        "packed_base_bytes": packed_bytes,
        "bar_bytes": BAR_BYTES,
        "held_by_control_group": bool(group),
        "arms": arms,
        "passes": passes,
    }
    write(args.out, result)


@contextmanager
def control_group(limit: int) -> Iterator[str]:
    """The file in which a process writes its number to be held to a limit; empty where none can be made."""
    group = GROUPS / f"qdora-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(limit))
    except OSError:
        yield ""
        return
    try:
        yield str(group / "cgroup.procs")
    finally:
        group.rmdir()


def write_model(folder: Path, shape: dict[str, Any]) -> int:
    """A config, and the packed base that belongs to it; returns the bytes of the base."""
    import torch
    from random_weights import QUANTIZATION, random_checkpoint
    from transformers import LlamaConfig

    from qdora.model.load import load_config, skeleton
    from qdora.model.packed_base import write_base
    from qdora.model.source import ModelSource

    cpu = torch.device("cpu")
    LlamaConfig(**shape, dtype="bfloat16").save_pretrained(folder)
    source = ModelSource("directory", folder, "random")
    stored = random_checkpoint(skeleton(load_config(source), source, torch.bfloat16, "sdpa", cpu), cpu)
    made_from = {"key": "0" * 64, "source": "random"}
    write_base(folder / "base", stored, set(), QUANTIZATION, made_from, device=cpu)
    return sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))


def trained(folder: Path, residency: str, group: str) -> None:
    """Run in a fresh process: prints what training took, or with "nothing" what the imports alone take."""
    if group:
        Path(group).write_text(str(os.getpid()))
    import bitsandbytes  # noqa: F401  (imported at the first use by the kernels; the baseline must have it, too)
    import torch

    from qdora.memory.allocator import keep_freed_memory
    from qdora.memory.disk_residency import DiskResidency
    from qdora.model.build_model import recompute_activations
    from qdora.model.inject import adapter_parameters, inject
    from qdora.model.load import Quantization, load_model
    from qdora.model.packed_base import BaseCache, open_cached_base
    from qdora.model.source import ModelSource
    from qdora.model.stored_tensors import match_to_model
    from qdora.train.optimizer import AdapterOptimizer
    from qdora.train.passes import batch_loss

    keep_freed_memory()
    if residency == "nothing":
        print(json.dumps({"peak_bytes": peak_rss_bytes()}))
        return
    on_disk = residency == "disk"
    cache = BaseCache(folder, Quantization("nf4", 64, True, ("lm_head",)), torch.device("cpu"), mapped=on_disk)
    _, base = open_cached_base(folder / "base")
    cache.base = base
    began = time.perf_counter()
    model: Any = load_model(
        ModelSource("directory", folder, "random"),
        quant="nf4",
        compute_dtype=torch.bfloat16,
        reader=lambda _source, skeleton: match_to_model(base.stored(mapped=on_disk), skeleton),
        placer=DiskResidency(cache) if on_disk else None,
    )
    inject(model, rank=RANK, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    recompute_activations(model)
    model.train()
    load_seconds, load_peak = time.perf_counter() - began, peak_rss_bytes()
    optimizer = AdapterOptimizer(adapter_parameters(model), name="paged_adamw_8bit")
    generator = torch.Generator().manual_seed(1)
    losses, seconds = [], []
    for _ in range(NUM_STEPS):
        began = time.perf_counter()
        ids = torch.randint(0, model.config.vocab_size, (1, NUM_TOKENS), generator=generator)
        nll = batch_loss(model, ids, torch.ones_like(ids), ids).nll_sum / NUM_TOKENS
        nll.backward()  # type: ignore[no-untyped-call]
        losses.append(float(nll.detach()))
        optimizer.scale_gradients_(1 / max(1.0, float(optimizer.gradient_norm())))
        optimizer.step(1e-4)
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    print(
        json.dumps(
            {
                "peak_bytes": peak_rss_bytes(),
                "load_peak_bytes": load_peak,
                "load_seconds": load_seconds,
                "losses": losses,
                "seconds": seconds,
                "step_seconds": spread(seconds[1:]),
                "resident_at_end": {name: status_bytes(name) for name in ("RssAnon", "RssFile", "RssShmem")},
            }
        )
    )


if __name__ == "__main__":
    main()
