"""The auxiliary loss of a mixture's routers: which models have one, and its value in a forward pass of training."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

from qdora.errors import UserError
from qdora.recipe.settings import Recipe
from qdora.train.load_balance import load_balancing_loss

_PARAMETERS = ["gate_logits", "num_experts", "top_k", "attention_mask"]
"""Those of transformers' function; a family whose function has others computes another loss."""


def check_router_loss(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise UserError if `train.router_aux_loss` is on and the recipe's model has no such loss."""
    asked = recipe.train.router_aux_loss
    if asked and not _has_router_loss(config):
        raise UserError(
            f"train.router_aux_loss: must be 0 with {config.model_type}, got {asked:g}; it needs a causal model for "
            "which transformers has an auxiliary loss of routers."
        )


def _has_router_loss(config: PreTrainedConfig) -> bool:
    """Whether the model of a config, its text model, or the whole of images and texts computes such a loss."""
    text = config.get_text_config()
    if getattr(text, "router_aux_loss_coef", None) is None:
        return False
    families = [MODEL_FOR_CAUSAL_LM_MAPPING.get(type(each), None) for each in (config, text)]
    families.append(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None))
    modules = {sys.modules[family.__module__] for family in families if family is not None}
    functions = [getattr(module, "load_balancing_loss_func", None) for module in modules]
    return any(each is not None and list(inspect.signature(each).parameters) == _PARAMETERS for each in functions)


@dataclass
class RouterTap:
    """The logits of all routers in the latest forward pass, (tokens, experts) each, with their graph."""

    top_k: int
    logits: tuple[Tensor, ...] = ()

    def loss(self, real: Tensor) -> Tensor:
        """`load_balancing_loss` of a micro-batch; `real` is (rows, length), 1 on tokens that are not padding.

        UserError if transformers gives no logits of routers: not every config shows that no block has one.
        """
        if not self.logits:
            raise UserError(
                "train.router_aux_loss: must be 0 with this model: transformers gives no logits of routers."
            )
        return load_balancing_loss(self.logits, self.top_k, real.reshape(-1))


@contextmanager
def tapped_routers(model: Any) -> Iterator[RouterTap]:
    """Record what the routers of a model compute inside the block; for models that pass `check_router_loss`.

    The decoder is asked, not the model, which would also compute the loss itself and count the padding of packed rows.
    """
    tap = RouterTap(model.config.get_text_config().num_experts_per_tok)

    def ask(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"output_router_logits": True}

    def take(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        tap.logits = getattr(output, "router_logits", None) or ()

    decoder: nn.Module = model.get_decoder()
    with decoder.register_forward_pre_hook(ask, with_kwargs=True), decoder.register_forward_hook(take):
        yield tap
