"""Run by torchrun in two processes: DDP and FSDP2, each with PEFT's layer and with qdora's; the losses on stdout."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qdora.peft
from tests.test_peft_layer import make, trainable, unpatch


def trained(wrap: str) -> tuple[list[float], list[str]]:
    """Mean losses of both processes over four steps, and the ways of the layers."""
    model: Any = make({"quant_storage": torch.float32}).train()
    wrapped = model
    if wrap == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        frozen = {p for p in model.parameters() if not p.requires_grad} if wrap == "base ignored" else None
        for part in (*model.base_model.model.model.layers, model):
            fully_shard(part, ignored_params=frozen)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(4):
        ids = torch.randint(0, 97, (2, 2, 12), generator=generator)[distributed.get_rank()]
        optimizer.zero_grad()
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(float(mean) / 2)
    return losses, sorted({row.way for row in qdora.peft.report(model).values()})


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    found = {}
    for wrap in ("ddp", "base ignored", "base sharded"):
        found[f"{wrap}, peft"] = trained(wrap)
        qdora.peft.patch()
        found[f"{wrap}, qdora"] = trained(wrap)
        unpatch()
    if distributed.get_rank() == 0:
        print(json.dumps(found))
    distributed.destroy_process_group()
