"""Tokens a second at batch 1: the quantised base, LoRA and DoRA on it, and the merged model, in turns in one process.

    python benchmarks/decode_speed.py [--tokens 48] [--rounds 7] [--out benchmarks/results/decode_speed.json]

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
from measure import alternating, facts, parser_of, ratio, spread, write
from mixed_data import smoke_model

from qdora.memory.allocator import keep_freed_memory
from qdora.model.inject import adapted_layers, replace_module
from qdora.nn.adapted_linear import drop_scales_without_room
from qdora.nn.frozen_linear import FrozenLinear
from qdora.ops.frozen_product import decoding

ASKED = 0.97


def main() -> None:
    """Measure in turns, write the figures."""
    parser = parser_of(__doc__, "decode_speed", smoke="a random model and two rounds")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    settings = parser.parse_args()
    if settings.smoke:
        settings.tokens, settings.rounds = 4, 2
    keep_freed_memory()
    models = {kind: contender(kind, settings.smoke) for kind in ("base", "lora", "dora", "merged")}
    prompt = torch.arange(5, 37).unsqueeze(0)
    readings = {kind: partial(rate, model, prompt, settings.tokens) for kind, model in models.items()}
    found = alternating(readings, settings.rounds)
    share = ratio(found["dora"], found["lora"])
    write(
        settings.out,
        {
            **facts(f"python benchmarks/decode_speed.py --tokens {settings.tokens} --rounds {settings.rounds}"),
            "prompt_tokens": prompt.shape[1],
            "new_tokens": settings.tokens,
            "tokens_per_second": {kind: spread(values) for kind, values in found.items()},
            "dora / lora": share,
            "lora / base": ratio(found["lora"], found["base"]),
            "dora / merged": ratio(found["dora"], found["merged"]),
            "asked": ASKED,
            "passes": share["median"] >= ASKED,
        },
    )


def contender(kind: str, smoke: bool) -> Any:
    """A model in eval mode; `merged` holds dense weights in the compute dtype."""
    model = smoke_model().eval() if smoke else load()
    if kind == "base":
        return model
    adapt(model, CONTENDERS["own_lora" if kind == "lora" else "own_dora"], 16)
    move_parameters_(model)
    if kind == "merged":
        for path, layer in adapted_layers(model).items():
            replace_module(model, path, FrozenLinear(layer.merged_weight(model.dtype), layer.base.bias))
    drop_scales_without_room(adapted_layers(model).values())
    return model.eval()


def load() -> Any:
    """The builtin model in NF4."""
    from qdora.model.build_model import choose_compute
    from qdora.model.load import load_model
    from qdora.model.source import resolve

    return load_model(resolve("builtin"), quant="nf4", compute_dtype=choose_compute("auto").dtype)


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
