"""Float32 products in full precision, whatever the caller lets torch do with them.

`torch.set_float32_matmul_precision("high")` and its relatives let a GPU round the factors of float32 products to TF32,
and a CPU to bfloat16. In a row norm or a merged weight that is an error of 5e-4 and more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32 in the block (or in the function that it decorates); then the caller's
    settings are back."""
    backends: Any = torch.backends
    backends = backends.cuda.matmul, backends.mkldnn.matmul
    before = [each.fp32_precision for each in backends]
    try:
        named = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by torch.backends alone, about which torch refuses to answer here
        named = None
    # It sets all backends and the older flags: torch refuses to compute where the two disagree.
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if named is not None:
            torch.set_float32_matmul_precision(named)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
