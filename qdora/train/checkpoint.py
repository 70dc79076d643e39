"""What a checkpoint of a run holds, which `Trainer` writes and restores: safetensors and JSON, no pickle.

adapter/                  the adapter in PEFT's format, usable by itself (full fine-tuning: parameters.safetensors)
optimizer.safetensors     optimizer states and the low bits of bf16 parameters
gates.safetensors         the gates, their Adam, and lora_B without them, if the adapter has gates
random.safetensors        state of torch's generators in every process, so that a resumed step draws the same numbers
state.json                step, data position, and what the run has learnt about itself (policies)
complete.json             size and CRC of every file, written last
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdora.files.atomic import read_json_object

FORMAT = 3
PARAMETERS_FILE = "parameters.safetensors"


@torch.no_grad()
def copy_parameters(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy tensors into the trainable parameters of the same path."""
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def state_of(policy: Any) -> dict[str, Any]:
    """The JSON values of a policy that its `STATE` names."""
    return {name: getattr(policy, name) for name in policy.STATE}


def best_step_in(directory: Path) -> int | None:
    """The best step that a checkpoint records, or None: a run that continues from it may end with that step."""
    step: int | None = read_json_object(directory / "state.json")["policies"].get("best", {}).get("step")
    return step


def random_state() -> dict[str, Tensor]:
    """Generator ("cpu", and "cuda" for this process's GPU, if any) -> its state, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Restore `random_state`; a GPU's state is skipped on a machine without one."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
