"""Tiny random models of many families, with a byte tokenizer: what a family's code does, without a download."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer, write_sums
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests import tiny_experts

Settings = dict[str, Any]

# Heads of 16 and widths of 64 and 128: a row is a whole number of NF4 blocks.
SIZES: Settings = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED: Settings = SIZES | {"num_key_value_heads": 2}
HEADS: Settings = GROUPED | {"head_dim": 16}
WINDOW: Settings = {"sliding_window": 8}
TIED: Settings = {"tie_word_embeddings": True}
UNTIED: Settings = {"tie_word_embeddings": False}
LLAMA3_ROPE: Settings = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ALTERNATING = ["sliding_attention", "full_attention"]
LINEAR: Settings = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA: Settings = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
GPT2_SIZES: Settings = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
NO_DROPOUT: Settings = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}

FAMILIES: dict[str, tuple[str, Settings]] = {
    "Llama 3": ("llama", GROUPED | UNTIED | {"rope_parameters": LLAMA3_ROPE}),
    "Llama 3.2": ("llama", GROUPED | TIED | {"rope_parameters": LLAMA3_ROPE}),
    "Mistral": ("mistral", HEADS | UNTIED | WINDOW),
    "Ministral": ("ministral", HEADS | UNTIED | WINDOW | {"layer_types": ALTERNATING}),
    "Ministral 3": ("ministral3", HEADS | TIED),
    "Qwen2, Qwen2.5": ("qwen2", GROUPED | TIED),
    "Qwen3": ("qwen3", HEADS | TIED),
    "Qwen3.5 (text)": ("qwen3_5_text", HEADS | TIED | LINEAR),
    "Gemma": ("gemma", HEADS | TIED),
    "Gemma 2": ("gemma2", HEADS | TIED | WINDOW | {"query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0}),
    "Gemma 3 (text)": ("gemma3_text", HEADS | TIED | WINDOW | {"layer_types": ALTERNATING}),
    "Phi-3, Phi-4": ("phi3", GROUPED | UNTIED | {"pad_token_id": 0}),
    "Phi": ("phi", SIZES | UNTIED | {"partial_rotary_factor": 0.5}),
    "OLMo": ("olmo", SIZES | UNTIED | {"clip_qkv": 0.5}),
    "OLMo 2": ("olmo2", SIZES | UNTIED),
    "OLMo 3": ("olmo3", SIZES | UNTIED | WINDOW | {"layer_types": ALTERNATING}),
    "Granite": (
        "granite",
        GROUPED
        | TIED
        | {
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625,
        },
    ),
    "SmolLM3": ("smollm3", GROUPED | TIED | {"no_rope_layers": [1, 0]}),
    "Cohere (Command R)": ("cohere", GROUPED | TIED | {"use_qk_norm": True}),
    "Cohere 2": ("cohere2", HEADS | TIED | WINDOW | {"layer_types": ALTERNATING}),
    "StableLM": ("stablelm", GROUPED | UNTIED | {"use_qkv_bias": True}),
    "StableLM 2 12B": ("stablelm", GROUPED | UNTIED | {"qk_layernorm": True, "use_parallel_residual": True}),
    "StarCoder 2": ("starcoder2", GROUPED | TIED | WINDOW),
    "GLM": ("glm", HEADS | UNTIED),
    "GLM-4": ("glm4", HEADS | UNTIED),
    "EXAONE 4": ("exaone4", HEADS | TIED | WINDOW | {"layer_types": ALTERNATING}),
    "Nemotron": ("nemotron", HEADS | UNTIED),
    "GPT-NeoX": ("gpt_neox", SIZES | UNTIED),
    "Falcon 7B": ("falcon", SIZES | TIED | {"multi_query": True, "parallel_attn": True, "alibi": False}),
    "Falcon 40B": ("falcon", GROUPED | TIED | {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "Falcon RW": (
        "falcon",
        SIZES | TIED | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "BLOOM": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4} | TIED),
    "OPT": ("opt", SIZES | TIED | {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}),
    "OPT 350M": (
        "opt",
        SIZES | TIED | {"ffn_dim": 128, "word_embed_proj_dim": 128, "dropout": 0.0, "do_layer_norm_before": False},
    ),
    "LFM2": (
        "lfm2",
        GROUPED | TIED | {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
    ),
    "Seed-OSS": ("seed_oss", HEADS | UNTIED | {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "Hunyuan (dense)": ("hunyuan_v1_dense", HEADS | TIED),
    "ERNIE 4.5": ("ernie4_5", HEADS | TIED),
    "Arcee": ("arcee", HEADS | UNTIED),
    "Apertus": ("apertus", GROUPED | UNTIED),
    "Helium": ("helium", HEADS | UNTIED),
    "VaultGemma": ("vaultgemma", HEADS | TIED | WINDOW | {"layer_types": ALTERNATING}),
    "MiniCPM 3": (
        "minicpm3",
        SIZES
        | TIED
        | {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    ),
    "InternLM 3": ("internlm3", HEADS | UNTIED),
    "Jais 2": ("jais2", HEADS | UNTIED),
    "nanochat": ("nanochat", GROUPED | UNTIED),
    "CWM": ("cwm", HEADS | UNTIED | WINDOW | {"layer_types": ALTERNATING}),
    "BitNet": ("bitnet", GROUPED | TIED),
    "GPT-J": ("gptj", GPT2_SIZES | NO_DROPOUT | UNTIED | {"rotary_dim": 8, "n_inner": 128}),
    "CodeGen": ("codegen", GPT2_SIZES | NO_DROPOUT | UNTIED | {"rotary_dim": 8, "n_inner": 128}),
    "GPT-Neo": (
        "gpt_neo",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "max_position_embeddings": 128}
        | TIED
        | {"attention_types": [[["global", "local"], 1]], "window_size": 8}
        | {"embed_dropout": 0.0, "resid_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "StarCoder, SantaCoder": ("gpt_bigcode", GPT2_SIZES | NO_DROPOUT | TIED | {"n_inner": 128}),
    "MPT": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2} | TIED),
    "Persimmon": ("persimmon", SIZES | UNTIED),
    "BioGPT": ("biogpt", SIZES | TIED | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "GPT-2": ("gpt2", GPT2_SIZES | NO_DROPOUT | TIED),
    "Mamba": ("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 64} | TIED),
    "Mamba 2": (
        "mamba2",
        {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "num_heads": 4, "head_dim": 32, "n_groups": 1}
        | {"chunk_size": 16}
        | UNTIED,
    ),
    "Falcon Mamba": ("falcon_mamba", {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8} | UNTIED),
    "Falcon-H1": (
        "falcon_h1",
        HEADS
        | UNTIED
        | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
        | {"mamba_d_state": 16, "mamba_chunk_size": 16},
    ),
    "RecurrentGemma": ("recurrent_gemma", GROUPED | TIED | {"attention_window_size": 8, "num_hidden_layers": 3}),
    "Granite 4 (hybrid, dense)": (
        "granitemoehybrid",
        GROUPED
        | TIED
        | MAMBA
        | {"num_local_experts": 0, "shared_intermediate_size": 128}
        | {"layer_types": ["mamba", "attention"]},
    ),
    "Bamba": ("bamba", GROUPED | UNTIED | MAMBA | {"attn_layer_indices": [1]}),
    "Nemotron-H (dense)": (
        "nemotron_h",
        HEADS
        | UNTIED
        | {"layers_block_type": ["linear_attention", "mlp", "full_attention"], "n_groups": 1}
        | {"ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "chunk_size": 16},
    ),
    "OLMo hybrid": ("olmo_hybrid", HEADS | UNTIED | LINEAR | {"num_key_value_heads": 4}),
    "LFM3": ("lfm3", HEADS | TIED | WINDOW),
    "Gemma 3n (text)": (
        "gemma3n_text",
        HEADS
        | TIED
        | WINDOW
        | {"layer_types": ALTERNATING, "num_kv_shared_layers": 0, "laurel_rank": 64}
        | {
            "hidden_size_per_layer_input": 64,
            "vocab_size_per_layer_input": 258,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "Gemma 4 (text)": (
        "gemma4_text",
        HEADS
        | TIED
        | WINDOW
        | {"layer_types": ALTERNATING, "global_head_dim": 16}
        | {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 258},
    ),
    "HyperCLOVA X": ("hyperclovax", HEADS | UNTIED),
    "EXAONE 3": ("exaone", HEADS | UNTIED),
    "Granite (sliding window)": ("granite_swa", GROUPED | TIED | WINDOW),
    "Youtu": (
        "youtu",
        SIZES
        | TIED
        | {"num_key_value_heads": 4, "pad_token_id": None}  # its code zeroes that row on loading
        | {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    ),
    "DiffLlama": ("diffllama", GROUPED | UNTIED),
    "Doge": ("doge", SIZES | UNTIED | {"num_key_value_heads": 4, "keep_window_size": 64}),
    "ModernBERT decoder": ("modernbert-decoder", SIZES | TIED | {"local_attention": 16}),
}
"""Name -> model type of transformers, and what its config gets beside tokens and vocabulary."""

MXFP4 = "GPT-OSS (MXFP4)"
"""A family whose checkpoint holds its experts in 4 bits, as the published ones do."""
MIXTURES: dict[str, str] = {
    "Mixtral": "mixtral",
    "Qwen2-MoE": "qwen2_moe",
    "Qwen3-MoE": "qwen3_moe",
    "Qwen3.5-MoE (text)": "qwen3_5_moe_text",
    "Qwen3-Next": "qwen3_next",
    "OLMoE": "olmoe",
    "GPT-OSS": "gpt_oss",
    MXFP4: "gpt_oss",
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V3": "deepseek_v3",
    "GLM-4-MoE": "glm4_moe",
    "GLM-4-MoE-Lite": "glm4_moe_lite",
    "Granite-MoE": "granitemoe",
    "Llama 4 (text)": "llama4_text",
    "LFM2-MoE": "lfm2_moe",
}
"""Name -> model type, of mixtures of experts; tests/tiny_experts.py has their configs."""
MODEL_TYPES = {name: kind for name, (kind, _) in FAMILIES.items()} | MIXTURES

NUM_SUMS = 20


def write_family(name: str, directory: Path) -> None:
    """The model of a family in safetensors with its tokenizer; no part is without effect."""
    tokenizer = byte_tokenizer()
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "vocab_size": len(tokenizer)}
    if name == MXFP4:
        tiny_experts.write_mxfp4(directory, **tokens)
        tokenizer.save_pretrained(directory)
        return
    kind = MODEL_TYPES[name]
    if name in MIXTURES:
        settings = tiny_experts.SIZES | tiny_experts.MODELS[kind] | tokens
    else:
        settings = tokens | FAMILIES[name][1]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.float32)
    spread_(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@torch.no_grad()
def spread_(model: nn.Module) -> None:
    """Weights N(0, 1 / in), which make attention and activations far from linear; everything else off its start."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        else:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):  # of DeepSeek's routers
            buffer.add_(0.1 * torch.randn_like(buffer))


def write_random_sums(file: Path, seed: int) -> None:
    """Sums of many lengths."""
    draw = random.Random(seed)
    write_sums(file, [(draw.randrange(10), draw.randrange(10 ** (1 + index % 7))) for index in range(NUM_SUMS)])
