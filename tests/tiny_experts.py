"""Tiny random mixtures of experts of many architectures, as transformers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qdora.model.inject import inject
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.nn.adapted_linear import AdaptedLinear
from tests import tiny_adapted, tiny_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 400,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {"intermediate_size": 128}
SMALL = {"moe_intermediate_size": 64}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
SHARED = {"shared_expert_intermediate_size": 64}
LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
GROUPS = {"n_group": 2, "topk_group": 1}
LINEAR = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": DENSE | SMALL | FOUR | SHARED,
    "qwen3_moe": DENSE | SMALL | FOUR | {"head_dim": 16},
    "olmoe": FOUR | {"intermediate_size": 64},
    "gpt_oss": {
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    "deepseek_v2": DENSE | SMALL | ROUTED | LATENT | {"q_lora_rank": None, "topk_method": "greedy", "head_dim": 8},
    "deepseek_v3": DENSE | SMALL | ROUTED | LATENT | GROUPS | {"q_lora_rank": 32},
    "glm4_moe": DENSE | SMALL | ROUTED | GROUPS | {"head_dim": 16},
    "granitemoe": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        "intermediate_size": 64,
        "intermediate_size_mlp": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "interleave_moe_layer_step": 1,
    },
    "qwen3_5_moe_text": SMALL | FOUR | SHARED | LINEAR,
    "lfm2_moe": DENSE | SMALL | FOUR | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "qwen3_next": DENSE | SMALL | FOUR | SHARED | LINEAR,
    "minimax_m2": {"intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "glm4_moe_lite": DENSE | SMALL | ROUTED | LATENT | GROUPS | {"q_lora_rank": 32},
}


def make(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of an architecture in eval mode, every parameter random, so that no two experts are alike."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | MODELS[name] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.15 if parameter.ndim > 1 else 0.05
            parameter.add_(torch.randn_like(parameter) * spread)
    return model


def write_mxfp4(directory: Path, **changes: Any) -> Path:
    """A gpt-oss whose experts are stored in MXFP4, as the published checkpoints are."""
    generator = torch.Generator().manual_seed(5)
    model = make("gpt_oss", torch.bfloat16, **changes)
    tensors = {}
    for name, value in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = value.contiguous()
            continue
        experts, columns, rows = value.shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{name}_scales"] = torch.randint(120, 125, shape, dtype=torch.uint8, generator=generator)
    model.config.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer.make().save_pretrained(directory)
    return directory


def write(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """The checkpoint of `make` with a tokenizer, in the form in which such models are published."""
    make(name, dtype).save_pretrained(directory, max_shard_size="150KB")
    tiny_tokenizer.make().save_pretrained(directory)
    return directory


def adapted(
    directory: Path, name: str = "qwen3_moe", dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Any, dict[str, AdaptedLinear]]:
    """A dense mixture in float64 with adapters off their start."""
    if not (directory / "config.json").exists():
        write(directory, name)
    model = load_model(resolve(str(directory)), quant="none", compute_dtype=dtype)
    options = {"rank": 3, "alpha": 6.0, "dtype": dtype, "targets": ["v_proj", "experts"]} | options
    layers = inject(model, generator=torch.Generator().manual_seed(1), **options)
    tiny_adapted.move(layers)
    return model.eval(), layers


def parts_of(matrix: torch.Tensor, num_experts: int, share: str) -> list[torch.Tensor]:
    """(experts * out, in) as the matrices that have components of their own."""
    experts = list(matrix.view(num_experts, -1, matrix.shape[1]))
    return {"none": experts, "A": [torch.cat(experts, dim=0)], "B": [torch.cat(experts, dim=1)]}[share]
