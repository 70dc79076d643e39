"""Which kernels decode packed weights: bitsandbytes', Triton's or plain torch, by the variable QDORA_KERNELS.

bitsandbytes is the default. "triton" makes the tiles and the sums of the norms on a GPU by `triton_kernels`; what those
do not have (int8, float64, a CPU, a plan) goes by bitsandbytes as before. "torch" is the definition of the formats.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from qdora.errors import UserError, not_one_of
from qdora.ops.planned_device import is_planning

VARIABLE = "QDORA_KERNELS"
KERNELS = ("bitsandbytes", "triton", "torch")


@functools.cache
def chosen_kernels() -> str:
    """One of `KERNELS`, read once in a process.

    Raises UserError: If the variable names none of them, or Triton, which is not installed.
    """
    name = os.environ.get(VARIABLE) or KERNELS[0]
    if name not in KERNELS:
        raise UserError(not_one_of(VARIABLE, name, KERNELS))
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError(
            f"{VARIABLE}: got 'triton', but the package triton is not installed. Fix: pip install \"qdora[triton]\", "
            f"or unset {VARIABLE}."
        )
    return name


def check_kernels(device: torch.device) -> None:
    """Before a model is loaded. Raises UserError: As `chosen_kernels`, and for Triton without a GPU."""
    if chosen_kernels() == "triton" and not runs_triton(device):
        raise UserError(
            f"{VARIABLE}: got 'triton', whose kernels run on CUDA devices; the device is {device.type}. Fix: unset "
            f"{VARIABLE}."
        )


def runs_triton(device: torch.device) -> bool:
    """Whether `triton_kernels` are chosen and run on a device. They do not run on the fake tensors of a plan."""
    if chosen_kernels() != "triton" or is_planning():
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
