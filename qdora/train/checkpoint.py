"""What a checkpoint of a run holds, written and restored: safetensors and JSON, no pickle.

adapter/                  the adapter in PEFT's format, usable by itself (full fine-tuning: parameters.safetensors)
optimizer.safetensors     optimizer states and the low bits of bf16 parameters
gates.safetensors         the gates, their Adam, and lora_B without them, if the adapter has gates
random.safetensors        state of torch's generators in every process, so that a resumed step draws the same numbers
state.json                step, data position, and what the run has learnt about itself (policies)
complete.json             size and CRC of every file, written last
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qdora.data.batches import StepLoader
from qdora.errors import UserError
from qdora.files.atomic import read_json_object
from qdora.files.tensor_file import write_tensors
from qdora.train.distributed import Processes, seed_of
from qdora.train.optimizer import AdapterOptimizer

FORMAT = 3
PARAMETERS_FILE = "parameters.safetensors"

logger = logging.getLogger("qdora")


def write_state(
    directory: Path,
    *,
    step: int,
    optimizer: AdapterOptimizer,
    loader_state: Mapping[str, Any],
    random: Sequence[Mapping[str, Tensor]],
    policies: Mapping[str, Any],
) -> None:
    """Write everything but the parameters; `random` is the `random_state` of every process."""
    write_tensors(directory / "optimizer.safetensors", optimizer.state_tensors())
    tensors = {_numbered(kind, rank): state for rank, states in enumerate(random) for kind, state in states.items()}
    write_tensors(directory / "random.safetensors", tensors)
    state = {"format": FORMAT, "step": step, "loader": dict(loader_state), "policies": dict(policies)}
    (directory / "state.json").write_text(json.dumps(state, allow_nan=False) + "\n")


@torch.no_grad()
def copy_parameters(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy tensors into the trainable parameters of the same path."""
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def read_state(
    directory: Path, *, optimizer: AdapterOptimizer, loader: StepLoader, processes: Processes, seed: int
) -> tuple[int, dict[str, Any]]:
    """Restore `write_state`, after the parameters; returns the number of steps done, and the policies.

    A process without a random state in the checkpoint seeds its generators from `seed`.
    """
    state = read_json_object(directory / "state.json")
    if state.get("format") != FORMAT:
        raise UserError(f"{directory}: is no checkpoint of this version of qdora (format {state.get('format')}).")
    loader.load_state_dict(state["loader"])
    optimizer.load_state_tensors(load_file(directory / "optimizer.safetensors"))
    step = int(state["step"])
    tensors = load_file(directory / "random.safetensors")
    before = sum(name.startswith("cpu") for name in tensors)
    if before != processes.size:
        text = "The checkpoint is from %d processes, this run has %d: same data, different dropout."
        logger.warning(text, before, processes.size)
    names = {kind: _numbered(kind, processes.rank) for kind in ("cpu", "cuda")}
    mine = {kind: tensors[name] for kind, name in names.items() if name in tensors}
    if mine:
        set_random_state(mine)
    else:
        torch.manual_seed(seed_of(seed, processes.rank, step))
    return step, dict(state["policies"])


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


def _numbered(kind: str, rank: int) -> str:
    return kind if rank == 0 else f"{kind}.{rank}"
