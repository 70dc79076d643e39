"""Tokens a second at batch 1: the quantised base, LoRA and DoRA on it, and the merged model, in turns in one process.

SmolLM2-135M-Instruct (`builtin`) in NF4, r16 on every linear layer, every adapter parameter off its start; with --smoke
a small random model. Greedy decoding with the key-value cache of transformers, the end mark ignored. DoRA keeps
the norm of its rows while the parameters do not change; both keep the block scales of their base decoded, as
`qdora generate` has them, DoRA's times the gain, so the two do the same work for each token.
Asked: DoRA at least 0.97 of LoRA.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from contenders import CONTENDERS, adapt, move_parameters_
from frame import bench, cell, main, table, tabulated
from measure import alternating, ratio, spread
from mixed_data import smoke_model

from qdora.memory.allocator import keep_freed_memory
from qdora.model.build_model import choose_compute
from qdora.model.inject import adapted_layers, replace_module
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.nn.adapted_linear import drop_scales_without_room
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.frozen_product import decoding

ASKED = 0.97


@bench(smoke={"tokens": 4, "rounds": 2})
def decode_speed(tokens: int = 48, rounds: int = 7, *, smoke: bool) -> dict[str, Any]:
    """Tokens a second at batch 1: base, LoRA, DoRA, merged."""
    keep_freed_memory()
    models = {kind: contender(kind, smoke) for kind in ("base", "lora", "dora", "merged")}
    prompt = torch.arange(5, 37).unsqueeze(0)
    found = alternating({kind: partial(rate, model, prompt, tokens) for kind, model in models.items()}, rounds)
    share = ratio(found["dora"], found["lora"])
    return {
        "prompt_tokens": prompt.shape[1],
        "new_tokens": tokens,
        "tokens_per_second": {kind: spread(values) for kind, values in found.items()},
        "dora / lora": share,
        "lora / base": ratio(found["lora"], found["base"]),
        "dora / merged": ratio(found["dora"], found["merged"]),
        "asked": ASKED,
        "passes": share["median"] >= ASKED,
    }


@table("decode_speed")
def decode_speed_table(result: Any) -> str:
    """Tokens a second at batch 1, and the ratios of the same round."""
    columns = {
        "tokens/s at batch 1": lambda _: "SmolLM2-135M",
        "NF4 base": "{base:.1f}",
        "LoRA on it": "{lora:.1f}",
        "DoRA on it": "{dora:.1f}",
        "merged, 16 bits": "{merged:.1f}",
    }
    note = (
        "\n{new_tokens} new tokens after a prompt of {prompt_tokens}, median and quartiles. "
        "DoRA / LoRA of the same round: {dora / lora:.3f}, target: at least {asked}.\n"
    )
    return tabulated([result["tokens_per_second"]], columns) + cell(note, result)


def contender(kind: str, smoke: bool) -> Any:
    """A model in eval mode; `merged` holds dense weights in the compute dtype."""
    quantised = {"quant": "nf4", "compute_dtype": choose_compute("auto").dtype}
    model = smoke_model().eval() if smoke else load_model(resolve("builtin"), **quantised)
    if kind == "base":
        return model
    adapt(model, CONTENDERS["own_lora" if kind == "lora" else "own_dora"], 16)
    move_parameters_(model)
    if kind == "merged":
        for path, layer in adapted_layers(model).items():
            replace_module(model, path, FrozenLinear(layer.merged_weight(model.dtype), layer.base.bias))
    drop_scales_without_room(adapted_layers(model).values())
    return model.eval()


@decoding()
@torch.inference_mode()
def rate(model: Any, prompt: torch.Tensor, num_tokens: int) -> float:
    """New tokens a second, the prompt's own pass left out."""
    cache = None
    ids = prompt
    began = 0.0
    for step in range(num_tokens + 1):
        if step == 1:
            began = time.perf_counter()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(dim=-1, keepdim=True)
    return num_tokens / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
