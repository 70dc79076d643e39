"""Adapter files exchanged with PEFT: the same NF4 weights, the same adapter, whose logits?

    python benchmarks/peft_interop.py [--steps 8] [--out benchmarks/results/peft_interop.json]

SmolLM2-135M-Instruct (`builtin`) in NF4, block size 64, double quantisation. For LoRA and DoRA, with per-layer ranks:

    ours -> PEFT    an adapter with every parameter off its start (random B, magnitudes off by up to 10 %) is saved here
                    and loaded by peft.PeftModel
    PEFT -> ours    an adapter trained by PEFT (a few AdamW steps) is saved there and loaded here

and in both cases the logits of five models on the same tokens are compared with a reference: plain transformers in
float32 with weights merged by numpy in float64 from the adapter file and bitsandbytes' own dequantisation.

    ours, float32 and bfloat16          the adapted layers on packed NF4
    PEFT, float32                       on a dense model that holds the dequantised NF4 weights
    PEFT on Linear4bit, bfloat16        on the same packed bytes, with support_avx512bf16_for_cpu off: bitsandbytes
                                        repacks the bytes in place otherwise, and its dequantisation returns garbage
    PEFT on Linear4bit, float32         the same in float32

Floor: float32 sums in another order (about 1e-4 on logits with a spread of 3), and for bfloat16 its rounding.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import peft
import torch
from contenders import TARGETS, move_parameters_, on_linear4bit, packed_layers, plain, put_weight_, quant_state
from measure import facts, parser_of, write
from safetensors.torch import load_file
from torch import Tensor, nn

from qdora.export.logit_comparison import float32_arithmetic
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import inject
from qdora.model.load import load_model
from qdora.model.source import load_tokenizer, resolve

TEXTS = (
    "The lighthouse keeper climbed the stairs every evening to light the lamp. One day he found a letter on the step.",
    "Question: Which of these conducts electricity best: wood, glass, copper or rubber?\nAnswer: copper",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Water boils at a lower temperature on a mountain because the pressure of the air is lower there.",
)
RANK, ALPHA = 16, 32.0
RANK_PATTERN = {"v_proj": 8, "model.layers.3.*": 24}
PEFT_RANK_PATTERN = {r"layers\.3\..*": 24, "v_proj": 8}
# Largest float32 difference allowed, in units of the spread of the logits; 1e-5 to 8e-5 was seen, on either side.
_NOISE = 2e-4


def main() -> None:
    """Run all cases, write the figures, print them as the last line."""
    parser = parser_of(__doc__, "peft_interop")
    parser.add_argument("--steps", type=int, default=8)
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    source = resolve("builtin")
    tokenizer = load_tokenizer(source)
    tokens = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("lora", "dora"):
            for direction in ("ours -> PEFT", "PEFT -> ours"):
                start = time.perf_counter()
                directory = Path(folder) / f"{kind}-{direction[:4]}"
                base = load_model(source, quant="nf4", compute_dtype=torch.bfloat16)
                trained: dict[str, Any] = {}
                if direction == "ours -> PEFT":
                    write_ours(base, kind, directory)
                    base = load_model(source, quant="nf4", compute_dtype=torch.bfloat16)
                else:
                    trained["training_loss"] = write_peft(base, kind, directory, tokens, settings.steps)
                case = {"adapter": kind, "direction": direction, **trained, **compare(base, directory, tokens)}
                case["seconds"] = round(time.perf_counter() - start, 1)
                cases.append(case)
                print(json.dumps(case), flush=True)
                del base
                gc.collect()
    result = {
        **facts(f"python benchmarks/peft_interop.py --steps {settings.steps}"),
        "model": "SmolLM2-135M-Instruct (builtin), NF4, block size 64, double quantisation",
        "num_tokens": sum(ids.numel() for ids in tokens),
        "rank": RANK,
        "alpha": ALPHA,
        "cases": cases,
        "passes": all(passes(case) for case in cases),
    }
    write(settings.out, result)


def passes(case: dict[str, Any]) -> bool:
    """float32 against float32 within its noise; in bfloat16 ours no farther from the reference than twice PEFT's."""
    found = case["against_reference"]
    exact = max(found[name]["max"] for name in ("ours float32", "peft float32", "peft linear4bit float32"))
    exact = max(exact, case["ours_against_peft_float32"]["max"])
    return bool(
        exact <= _NOISE * case["logit_spread"]
        and found["ours bfloat16"]["mean"] <= 2 * found["peft linear4bit bfloat16"]["mean"]
        and case["adapter_effect"]["mean"] > 100 * found["ours float32"]["mean"]
        and case["same_dequantised_weights"]
    )


def write_ours(model: Any, kind: Any, directory: Path) -> None:
    """Adapters with per-layer ranks, moved, saved by qdora."""
    options: dict[str, Any] = {"rank": RANK, "alpha": ALPHA, "rank_pattern": RANK_PATTERN, "dtype": torch.bfloat16}
    inject(model, kind=kind, **options)
    move_parameters_(model)
    save_adapter(model, directory, base_name_or_path="builtin", revision=None, base_quant={"quant": "nf4"})


def write_peft(base: Any, kind: str, directory: Path, tokens: list[Tensor], steps: int) -> list[float]:
    """An adapter trained by PEFT on the dequantised weights in float32; returns the loss of each step in nats."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        use_dora=kind == "dora",
        rank_pattern=PEFT_RANK_PATTERN,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(dense(base, bnb_weights(base)), config).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    losses = []
    for step in range(steps):
        ids = tokens[step % len(tokens)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(float(loss), 4))
    model.save_pretrained(str(directory))
    return losses


@torch.no_grad()
def compare(base: Any, directory: Path, tokens: list[Tensor]) -> dict[str, Any]:
    """Logits of all models on the adapter in `directory`."""
    weights = bnb_weights(base)
    same = all(torch.equal(weights[path], layer.dequantized()) for path, layer in packed_layers(base).items())
    bare = logits(dense(base, weights), tokens)
    reference = logits(dense(base, merged_by_numpy(weights, directory)), tokens)
    found = {"peft float32": logits(with_peft(dense(base, weights), directory), tokens)}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"peft linear4bit {str(dtype).removeprefix('torch.')}"
        found[name] = logits(with_peft(on_linear4bit(base, dtype).eval(), directory), tokens)
    load_adapter(base, directory)
    found["ours bfloat16"] = logits(base, tokens)
    with float32_arithmetic(base):
        found["ours float32"] = logits(base, tokens)
    return {
        "num_tensors": len(load_file(directory / "adapter_model.safetensors")),
        "logit_spread": float(reference.std(dim=-1).mean()),
        "same_dequantised_weights": same,
        "adapter_effect": difference(reference, bare),
        "against_reference": {name: difference(value, reference) for name, value in sorted(found.items())},
        "ours_against_peft_float32": difference(found["ours float32"], found["peft float32"]),
        "ours_against_peft_bfloat16": difference(found["ours bfloat16"], found["peft linear4bit bfloat16"]),
    }


def difference(first: Tensor, second: Tensor) -> dict[str, float]:
    """Largest and mean |difference| of logits, and the share of positions with the same argmax."""
    gap = (first.double() - second.double()).abs()
    same = (first.argmax(dim=-1) == second.argmax(dim=-1)).double().mean()
    return {"max": float(gap.max()), "mean": float(gap.mean()), "argmax_agreement": float(same)}


@torch.no_grad()
def logits(model: Any, tokens: list[Tensor]) -> Tensor:
    """(positions of all texts, vocabulary) float32."""
    model.eval()
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float() for ids in tokens])


def bnb_weights(base: Any) -> dict[str, Tensor]:
    """Path -> dequantised weight (out, in) float32, by bitsandbytes."""
    result = {}
    for path, layer in packed_layers(base).items():
        packed = layer.packed_weight
        state = quant_state(packed, torch.float32)
        # As one row: on a CPU, bitsandbytes 0.50 gives blocks that cross rows the scales of others.
        state.shape = torch.Size((1, packed.shape[0] * packed.shape[1]))
        flat = bnb.functional.dequantize_4bit(packed.packed.view(-1, 1), quant_state=state)
        result[path] = flat.view(packed.shape)
    return result


def dense(base: Any, weights: dict[str, Tensor]) -> Any:
    """`plain` in float32 with the given linear weights."""
    model = plain(base, torch.float32)
    for path, weight in weights.items():
        put_weight_(model, base, path, weight)
    return model.eval()


def with_peft(model: nn.Module, directory: Path) -> Any:
    """The adapter loaded by PEFT, which must use every tensor of the file."""
    adapted = peft.PeftModel.from_pretrained(model, str(directory)).eval()
    stored = load_file(directory / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(adapted)
    assert held.keys() == stored.keys(), held.keys() ^ stored.keys()
    return adapted


def merged_by_numpy(weights: dict[str, Tensor], directory: Path, swapped: Collection[str] = ()) -> dict[str, Tensor]:
    """The merge by the formula in float64, from the files alone: g (W + s B A), s = alpha / rank.

    A stack of experts is (experts * out, in). PEFT has its tensors at the module of the experts, those of the first of
    two stacks one level further in: A (experts * rank, in), B (out, rank * experts) with the expert last. Where PEFT
    takes inputs for outputs, in the stacks `swapped`, they are those of the transposed update.
    """
    path_to_file = directory / "adapter_model.safetensors"
    config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    assert not config["use_rslora"]
    assert not config["alpha_pattern"]
    stored = {name: tensor.double().numpy() for name, tensor in load_file(path_to_file).items()}
    experts, merged = config.get("target_parameters") or [], {}
    for path, weight in weights.items():
        start = f"base_model.model.{path}"
        if path in experts:
            owner, _, name = path.rpartition(".")
            start = f"base_model.model.{owner}"
            if name != "down_proj" and f"{owner}.down_proj" in experts:
                start += ".base_layer"
        a, b = stored[f"{start}.lora_A.weight"], stored[f"{start}.lora_B.weight"]
        num_experts = weight.shape[0] // (a.shape[1] if path in swapped else b.shape[0])
        a = a.reshape(num_experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, num_experts).transpose(2, 0, 1)
        update = config["lora_alpha"] / a.shape[1] * (b @ a)
        update = update.transpose(0, 2, 1) if path in swapped else update
        total = weight.double().numpy() + update.reshape(weight.shape)
        if config["use_dora"]:
            gain = stored[f"{start}.lora_magnitude_vector"].reshape(-1) / np.sqrt((total**2).sum(axis=1))
            total = total * gain[:, None]
        merged[path] = torch.from_numpy(total).float()
    return merged


if __name__ == "__main__":
    main()
