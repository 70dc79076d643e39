"""How far a compressed model's hidden states are from those of the uncompressed one, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qdora.adapter.layer import evaluation_mode
from qdora.model.attention import context_length


@torch.no_grad()
def hidden_state_errors(model: nn.Module, reference: nn.Module, texts: Sequence[Sequence[int]]) -> list[float]:
    """Mean over all positions of all texts of ||h - h'|| / ||h'||, after each block in turn.

    h' are the hidden states of the reference on its own earlier ones, so the errors of earlier blocks are in h. Those
    of the last block are taken after the model's final norm. Every position counts the same: in the middle blocks of
    many models the first one is longer than all others together (massive activations, arXiv 2402.17762), so that an
    error of all positions as one vector would be its error alone.

    Args:
        model, reference: Causal language models of one architecture.
        texts: Token ids of each text; what is beyond the models' context is left out.
    """
    context, sums, number = context_length(model), torch.zeros(()), 0
    with evaluation_mode(model), evaluation_mode(reference):
        for ids in texts:
            tokens = torch.tensor([list(ids)[:context]])
            states, wanted = (
                torch.cat([state.cpu().float() for state in _states(each, tokens)]) for each in (model, reference)
            )
            errors = (states - wanted).norm(dim=-1) / wanted.norm(dim=-1)  # (blocks, positions)
            sums, number = sums + errors.double().sum(dim=1), number + tokens.shape[1]
    return [float(each) for each in sums / number]


def _states(model: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    """(1, positions, width) after each block."""
    found = model(input_ids=tokens.to(next(model.parameters()).device), output_hidden_states=True, use_cache=False)
    states: tuple[Tensor, ...] = found.hidden_states[1:]
    return states
