"""Grouped heads on a GPU without a flash kernel: keys and values are repeated, so that attention keeps a fast kernel.

Where there is no mask, transformers leaves the repeating to torch (`enable_gqa`). On CUDA only torch's flash kernel and
its math kernel do that, and the math kernel holds all scores: 512 MiB a copy for 32 heads and a text of 2,048 tokens in
float32. The memory-efficient kernel holds none, but needs as many heads of keys as of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import sdpa_attention

from qdora.model.replaced_function import replaced
from qdora.quant.planned_device import device_kind

_ASKS = "use_gqa_in_sdpa"
FLASH_DTYPES = (torch.float16, torch.bfloat16)
FLASH_CAPABILITY = (8, 0)  # Ampere
"""What kernels of flash attention need, torch's and those of flash-attn."""


def fast_grouped_attention() -> AbstractContextManager[None]:
    """Inside, sdpa repeats keys and values where torch's flash kernel does not run.

    That is on CUDA in float32, and on CUDA devices of a compute capability below 8.0 in any dtype; a plan for a GPU
    counts the same, for this machine's GPU if it has one, else for one of 8.0 or more. Elsewhere nothing changes.
    """
    is_old = torch.cuda.is_available() and torch.cuda.get_device_capability(None) < FLASH_CAPABILITY
    dtypes = () if is_old else FLASH_DTYPES
    return replaced(sdpa_attention, _ASKS, lambda ask: partial(_leaves_to_torch, ask, dtypes))


def _leaves_to_torch(
    ask: Callable[..., bool], dtypes: tuple[torch.dtype, ...], mask: Tensor | None, key: Tensor, *rest: Any
) -> bool:
    """Whether torch repeats the keys: where transformers says so, but on CUDA only in `dtypes`, which the flash kernel
    takes."""
    return (device_kind(key.device) != "cuda" or key.dtype in dtypes) and ask(mask, key, *rest)
