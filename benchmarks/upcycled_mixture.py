"""A mixture of experts from a dense Llama: each MLP is divided into a shared part and four experts, then trained.

The half of the neurons that contributes most becomes a shared expert, which every token uses. The other half is divided
into experts of equal size, with neurons together that are active together. A router is fitted to say which experts
contribute most to a token. A token uses the shared expert and two of four experts: 3/4 of the dense MLP.

Source: CMoE, arXiv 2502.04416, sec. 3; its router is another one. The model is a Qwen2-MoE, whose shared expert is
multiplied by a gate (1/2 here), and whose chosen experts have weights that sum to 1 (about 1/2 each): both are undone
in `down_proj`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qdora.data.example import Example
from qdora.data.tokenize import encode_batch

NUM_EXPERTS, TOP_K = 4, 2
ROUNDS = 5
"""Of the clustering of neurons."""
LOGIT_STD = 0.2
"""Of the fitted router: small, so that the two chosen experts have nearly equal weights."""
RIDGE = 0.1
"""Damping of the router's fit, as a share of the mean of the diagonal."""
BALANCE = 0.01
"""Weight of the loss that balances the load of the experts. Switch Transformer, arXiv 2101.03961, sec. 2.2."""
BETAS = (0.9, 0.95)
_SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act")
_SAME += ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "pad_token_id")
_SAME += ("bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class Division:
    """How an MLP is divided.

    Attributes:
        shared: Neurons of the shared expert, (inner / 2,).
        experts: Neurons of each expert, (experts, inner / 2 / experts).
        router: (experts, hidden).
    """

    shared: Tensor
    experts: Tensor
    router: Tensor


@torch.no_grad()
def upcycled(dense: PreTrainedModel, rows: Tensor) -> Qwen2MoeForCausalLM:
    """The untrained mixture of a dense Llama in its dtype, on the CPU; it shares no tensor with the dense model.

    Args:
        rows: Tokens, (rows, length), on which the activations of the neurons are measured.
    """
    inner = dense.config.intermediate_size
    config = Qwen2MoeConfig(
        **{name: getattr(dense.config, name) for name in _SAME},
        intermediate_size=inner,
        shared_expert_intermediate_size=inner // 2,
        moe_intermediate_size=inner // 2 // NUM_EXPERTS,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        qkv_bias=False,
        router_aux_loss_coef=BALANCE,
    )
    mixture: Qwen2MoeForCausalLM = Qwen2MoeForCausalLM._from_config(config, dtype=dense.dtype)
    own = dense.state_dict()
    for name, parameter in mixture.named_parameters():
        if ".mlp." not in name:
            parameter.copy_(own[name])
    for number, inputs in enumerate(mlp_inputs(dense, rows)):
        mlp, block = dense.model.layers[number].mlp, mixture.model.layers[number].mlp
        parts = divided(mlp, inputs)
        block.gate.weight.copy_(parts.router)
        block.shared_expert_gate.weight.zero_()
        block.shared_expert.gate_proj.weight.copy_(mlp.gate_proj.weight[parts.shared])
        block.shared_expert.up_proj.weight.copy_(mlp.up_proj.weight[parts.shared])
        block.shared_expert.down_proj.weight.copy_(2 * mlp.down_proj.weight[:, parts.shared])
        both = [each.weight[parts.experts] for each in (mlp.gate_proj, mlp.up_proj)]  # (experts, inner, hidden)
        block.experts.gate_up_proj.copy_(torch.cat(both, dim=1))
        block.experts.down_proj.copy_(TOP_K * mlp.down_proj.weight[:, parts.experts].transpose(0, 1))
    return mixture


def mlp_inputs(dense: PreTrainedModel, rows: Tensor) -> list[Tensor]:
    """What the MLP of each block reads, (tokens, hidden)."""
    found: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].flatten(0, 1)))
        for layer in dense.model.layers
    ]
    dense(input_ids=rows, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return found


def divided(mlp: Any, inputs: Tensor) -> Division:
    """Divide an MLP by what its neurons contribute to the output, |activation| times the norm of their column."""
    active = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    worth = active.abs() * mlp.down_proj.weight.norm(dim=0)  # (tokens, inner)
    order = worth.mean(dim=0).argsort(descending=True)
    shared, rest = order.tensor_split(2)
    experts = rest[balanced_groups(nn.functional.normalize(worth[:, rest].T, dim=1))]
    share = torch.stack([worth[:, group].square().sum(dim=1) for group in experts], dim=1)  # (tokens, experts)
    share = share / share.sum(dim=1, keepdim=True)
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    # Centred, so that all experts are chosen about equally often
    router = torch.linalg.solve(gram, inputs.T @ (share - share.mean(dim=0))).T
    return Division(shared, experts, router * LOGIT_STD / (inputs @ router.T).std())


def balanced_groups(points: Tensor) -> Tensor:
    """(experts, points / experts): indices of points (n, tokens) of unit length in groups of one size, by k-means."""
    size = len(points) // NUM_EXPERTS
    groups = torch.arange(len(points)).view(NUM_EXPERTS, size)
    for _ in range(ROUNDS):
        likeness = points @ nn.functional.normalize(points[groups].sum(dim=1), dim=1).T
        _, places = linear_sum_assignment(-likeness.repeat_interleave(size, dim=1).double().numpy())
        groups = torch.from_numpy(np.argsort(places // size, kind="stable")).view(NUM_EXPERTS, size)
    return groups


def rows_of_text(tokenizer: Any, examples: Sequence[Example], length: int, seed: int) -> Tensor:
    """(rows, length) int64: the texts in random order, joined by the end token and cut into rows; the rest is left."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [f"{examples[index].prompt}{examples[index].answer}" for index in order]
    ids = [token for text in encode_batch(tokenizer, texts) for token in [*text, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length], dtype=torch.int64).view(-1, length)


def unbound_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an expert module; see transformers' `integrations/moe.py`.

    transformers' own indexes the stacks, and the gradient of an indexed expert is a whole stack of zeros around it.
    """
    out = torch.zeros_like(hidden_states)
    experts = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
    for expert, (gate_up, down) in enumerate(experts):
        tokens, place = torch.where(top_k_index == expert)
        inner = self._apply_gate(nn.functional.linear(hidden_states[tokens], gate_up))
        weighted = nn.functional.linear(inner, down) * top_k_weights[tokens, place, None]
        out = out.index_add(0, tokens, weighted.to(out.dtype))
    return out


def trained(mixture: Qwen2MoeForCausalLM, rows: Tensor, *, steps: int, rows_per_step: int, lr: float) -> list[float]:
    """Train MLPs and routers in place on the next token of `rows`, (rows, length), which begin anew at their end.

    AdamW with float32 weights and states, products in bfloat16; the rate rises over a tenth of the steps, then falls
    linearly to 0. Attention, embeddings and norms stay as they are.

    Returns: Nats per token of each step, without the balancing loss.
    """
    ALL_EXPERTS_FUNCTIONS.register("unbound", unbound_forward)
    mixture.config._experts_implementation = "unbound"
    mixture.train().requires_grad_(False)
    parameters = [each.requires_grad_(True) for name, each in mixture.named_parameters() if ".mlp." in name]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    losses = []
    for step in track(range(steps), "mixture", console=Console(stderr=True)):
        first = step * rows_per_step
        ids = rows[torch.arange(first, first + rows_per_step) % len(rows)]
        with torch.autocast("cpu", torch.bfloat16):
            out = mixture(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        out.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach() - BALANCE * out.aux_loss.detach()))
    mixture.eval().requires_grad_(False)
    return losses


@torch.no_grad()
def expert_load(mixture: Qwen2MoeForCausalLM, rows: Tensor) -> list[list[float]]:
    """Of each block, the share of the choices of its router that fell on each expert, over `rows` of tokens."""
    counts = torch.zeros(mixture.config.num_hidden_layers, NUM_EXPERTS)
    for ids in rows.split(4):
        logits = mixture(input_ids=ids, output_router_logits=True, use_cache=False, logits_to_keep=1).router_logits
        for block, found in enumerate(logits):
            counts[block] += torch.bincount(found.topk(TOP_K).indices.flatten(), minlength=NUM_EXPERTS)
    return (counts / counts.sum(dim=1, keepdim=True)).tolist()
