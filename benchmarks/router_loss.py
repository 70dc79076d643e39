"""What does the auxiliary loss of routers do to an adapter, whose routers are frozen?

    python benchmarks/router_loss.py DATA --out benchmarks/results/router_loss.json [--smoke]

DATA holds <task>/<split>.parquet. A small mixture (4 blocks, 8 experts, 2 for each token) is trained whole on four
tasks, its routers with the auxiliary loss, as published mixtures are. Then DoRA adapts it in NF4 to a fifth task with
several factors of that loss. Stated for each: NLL on validation examples; how even the experts' load is in the last
steps, E sum_e share_e^2 over the blocks (1 is even); the share of tokens that training moved to other experts. The base
is the same for all; a seed is another start of lora_A and another order of the data.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer, write_sums
from measure import facts, parsed, parser_of, write
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.files.run_directory import RunDirectory
from qdora.memory.allocator import keep_freed_memory
from qdora.recipe.recipe_file import recipe_from
from qdora.run.train import train_run

FACTORS = (0.0, 0.001, 0.01, 0.1, 1.0)
BASE_TASKS, TASK = ("obqa", "arc_e", "siqa", "piqa"), "winogrande"
BASE_FACTOR = 0.01


def write_mixture(directory: Path) -> None:
    """A random Qwen3-MoE that reads bytes."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def document(model: Path, mix: list[dict[str, Any]], args: argparse.Namespace, **sections: Any) -> dict[str, Any]:
    """What the recipes of base and adapters share."""
    train = {"batch": args.batch, "lr": 1e-3, "optimizer": "adamw", "checkpoint_every": None}
    return {
        "model": {"source": str(model), "dtype": "float32"},
        "data": {"mix": mix, "strategy": "equal", "max_length": 512, "too_long": "drop", "loss_on": "all"},
        **sections,
        "train": train | sections["train"],
    }


def trained_base(folder: Path, data: Path | None, args: argparse.Namespace) -> Path:
    """The mixture after training of all its parameters, as a directory of transformers."""
    write_mixture(folder / "random")
    recipe = document(
        folder / "random",
        mix_of(BASE_TASKS, folder, data),
        args,
        adapter={"kind": "full"},
        base={"quant": "none"},
        train={"steps": args.base_steps, "router_aux_loss": BASE_FACTOR},
        eval={"at_start": False, "at_end": False},
    )
    train_run(recipe_from(recipe), folder / "base-run")
    export_run(folder / "base-run", folder / "base", ExportOptions(dtype="float32"))
    return folder / "base"


def mix_of(tasks: tuple[str, ...], folder: Path, data: Path | None) -> list[dict[str, Any]]:
    """Sources of the tasks; without data sums."""
    if data is not None:
        return [{"task": task, "path": str(data / task)} for task in tasks]
    write_sums(folder / "sums.jsonl")
    return [{"source": str(folder / "sums.jsonl")}]


def adapted(base: Path, folder: Path, factor: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one adapter; its numbers."""
    recipe = document(
        base,
        mix_of((TASK,), folder, args.data),
        args,
        adapter={"rank": 8, "experts": {"rank": 4}, "same_scaling": True},
        train={"steps": args.steps, "seed": seed, "router_aux_loss": factor},
        eval={"at_start": False, "limit": args.limit},
    )
    recipe["data"]["seed"] = seed
    run = folder / f"{factor}-{seed}"
    train_run(recipe_from(recipe), run)
    return {"factor": factor, "seed": seed, **numbers_of(run)}


def numbers_of(run: Path) -> dict[str, Any]:
    """What a finished adapter run came to."""
    lines = RunDirectory(run).metrics()
    (evaluated,) = (line for line in lines if "eval" in line)
    load = json.loads((run / "expert_load.json").read_text())["blocks"].values()
    return {
        "nll_per_token": evaluated["average"]["nll_per_token"],
        "load": {when: sum(unevenness(block[when]) for block in load) / len(load) for when in ("first", "last")},
        "moved": sum(block["moved"] for block in load) / len(load),
        "router_aux_loss": [line.get("router_aux_loss") for line in lines if "loss" in line],
    }


def unevenness(shares: list[float]) -> float:
    """E sum share^2: 1 for an even load, E if one expert has all tokens."""
    return len(shares) * sum(share**2 for share in shares)


def main() -> None:
    """Train the base, then an adapter for each factor and seed."""
    parser = parser_of(__doc__, "router_loss", smoke="sums and a few steps", data=True)
    parser.add_argument("--base-steps", type=int, default=400)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=200, help="validation examples")
    args = parsed(parser)
    if args.smoke:
        args.data, args.base_steps, args.steps, args.batch, args.seeds, args.limit = None, 2, 2, 2, 1, 2
    keep_freed_memory()
    asked = f"--base-steps {args.base_steps} --steps {args.steps} --batch {args.batch} --seeds {args.seeds}"
    result = facts(f"python benchmarks/router_loss.py DATA {asked} --limit {args.limit}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = trained_base(folder, args.data, args)
        result["runs"] = [adapted(base, folder, factor, seed, args) for seed in range(args.seeds) for factor in FACTORS]
    write(args.out, result)


if __name__ == "__main__":
    main()
