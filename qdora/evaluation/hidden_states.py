"""How far a compressed model's hidden states are from those of the uncompressed one, block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from qdora.evaluation.forward_path import context_length, input_device
from qdora.nn.evaluation_mode import evaluation_mode


@torch.no_grad()
def hidden_state_errors(model: nn.Module, reference: nn.Module, texts: Sequence[Sequence[int]]) -> list[float]:
    """||h - h'|| / ||h'|| over all positions of all texts, after each block in turn.

    h' are the hidden states of the reference on its own earlier ones, so the errors of earlier blocks are in h. Those
    of the last block are taken after the model's final norm.

    Args:
        model, reference: Causal language models of one architecture.
        texts: Token ids of each text; what is beyond the models' context is left out.
    """
    context = context_length(model)
    squares: list[tuple[float, float]] = []
    with evaluation_mode(model), evaluation_mode(reference):
        for ids in texts:
            tokens = torch.tensor([list(ids)[:context]])
            states, wanted = (
                each(input_ids=tokens.to(input_device(each)), output_hidden_states=True, use_cache=False).hidden_states[
                    1:
                ]
                for each in (model, reference)
            )
            found = [
                (float((h.float() - w.to(h.device).float()).square().sum()), float(w.float().square().sum()))
                for h, w in zip(states, wanted, strict=True)
            ]
            known = squares or [(0.0, 0.0)] * len(found)
            squares = [(a + c, b + d) for (a, b), (c, d) in zip(known, found, strict=True)]
    return [math.sqrt(error / whole) for error, whole in squares]
