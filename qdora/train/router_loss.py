"""The auxiliary loss of a mixture's routers: which models have one, and its value in a forward pass of training."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

from qdora.errors import UserError
from qdora.recipe.settings import Recipe

_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""Those of transformers' function; a family whose function has others computes another loss."""


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, real: Tensor) -> Tensor:
    """E sum_e f_e P_e over the real tokens of all routers together; f is counted and has no gradient.

    f_e is how often expert e is among the `top_k` most probable ones, for each token; P_e its mean probability. It is
    `top_k` where all experts have the same probability, and E where all tokens choose the same experts for certain.

    Source: Switch Transformer, arXiv 2101.03961, eq. 4 to 6, for several choices as in transformers.

    Args:
        router_logits: Of each router, (tokens, E), any float dtype; the softmax runs in float32 (float64 for float64).
        real: (tokens,), 1 or True for tokens that are not padding; at least one.
    Returns: Scalar, float32 or float64.
    """
    num_experts = router_logits[0].shape[-1]
    wide = torch.promote_types(router_logits[0].dtype, torch.float32)
    device = router_logits[0].device
    weights = real.to(device, wide)
    chosen_by = real.to(device, torch.int64).unsqueeze(1).expand(-1, top_k).reshape(-1)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=device)  # integers: no order of sums
    probability = torch.zeros(num_experts, dtype=wide, device=device)
    for logits in router_logits:
        own = logits.to(device, wide)
        counts.scatter_add_(0, own.topk(top_k, dim=-1).indices.reshape(-1), chosen_by)
        probability = probability + weights @ torch.softmax(own, dim=-1)
    num_routed = weights.sum() * len(router_logits)
    return num_experts * (counts / num_routed * (probability / num_routed)).sum()


def check_router_loss(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise UserError if `train.router_aux_loss` is on and the recipe's model has no such loss.

    The model of the config, its text model, or the whole of images and texts may have one.
    """
    asked, text = recipe.train.router_aux_loss, config.get_text_config()
    if not asked:
        return
    if getattr(text, "router_aux_loss_coef", None) is not None:
        families = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(each), None) for each in (config, text)]
        families.append(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None))
        modules = {sys.modules[family.__module__] for family in families if family is not None}
        functions = filter(None, (getattr(module, "load_balancing_loss_func", None) for module in modules))
        if any(list(inspect.signature(function).parameters) == _PARAMETERS for function in functions):
            return
    raise UserError(
        f"train.router_aux_loss: must be 0 with {config.model_type}, got {asked:g}; it needs a causal model for "
        "which transformers has an auxiliary loss of routers."
    )


@dataclass
class RouterTap:
    """The logits of all routers in the latest forward pass, (tokens, experts) each, with their graph."""

    top_k: int
    logits: tuple[Tensor, ...] = ()

    def loss(self, real: Tensor) -> Tensor:
        """`load_balancing_loss` of a micro-batch; `real` is (rows, length), 1 on tokens that are not padding."""
        if not self.logits:  # not every config shows that no block has a router
            text = "must be 0 with this model: transformers gives no logits of routers"
            raise UserError(f"train.router_aux_loss: {text}.")
        return load_balancing_loss(self.logits, self.top_k, real.reshape(-1))


@contextmanager
def tapped_routers(model: Any) -> Iterator[RouterTap]:
    """Record what the routers of a model compute inside the block; for models that pass `check_router_loss`.

    The decoder is asked, not the model, which would also compute the loss itself and count the padding of packed rows.
    """
    tap = RouterTap(model.config.get_text_config().num_experts_per_tok)

    def ask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return args, kwargs | {"output_router_logits": True}

    def take(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        tap.logits = getattr(output, "router_logits", None) or ()

    decoder: nn.Module = model.get_decoder()
    with decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(take):
        yield tap
