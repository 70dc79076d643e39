"""The state of torch's generators, to go back to: a retried or resumed step draws what it would have drawn.

What a checkpoint of a run holds, and taking it back: safetensors and JSON, no pickle.

adapter/                  the adapter in PEFT's format, usable by itself (full fine-tuning: parameters.safetensors)
optimizer.safetensors     optimizer states and the low bits of bf16 parameters
random.safetensors        state of torch's generators, of every process
state.json                step, data position, what the run has found out about itself (policies)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdora.errors import UserError
from qdora.train.distributed import Processes, seed_of
from qdora.train.optimizer import AdapterOptimizer


def random_state() -> dict[str, Tensor]:
    """Generator ("cpu", and "cuda", this process's GPU, where there is one) -> its state, uint8."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Take back `random_state`; a state of a GPU that is not there is left out."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


FORMAT = 2
PARAMETERS_FILE = "parameters.safetensors"

logger = logging.getLogger("qdora")


def write_state(
    directory: Path,
    *,
    step: int,
    optimizer: AdapterOptimizer,
    loader_state: Mapping[str, Any],
    random: Sequence[Mapping[str, str]],
    policies: Mapping[str, Any],
) -> None:
    """Write everything but the parameters themselves into an existing directory.

    Args:
        directory: Where to.
        step: Steps done.
        optimizer, loader_state: Equal in all processes.
        random: `random_text` of every process, in the order of ranks.
        policies: JSON values by name: what the run has found out and a resumed one goes on with.
    """
    _save(optimizer.state_tensors(), directory / "optimizer.safetensors")
    _save(_random_tensors(random), directory / "random.safetensors")
    state = {"format": FORMAT, "step": step, "loader": dict(loader_state), "policies": dict(policies)}
    (directory / "state.json").write_text(json.dumps(state, indent=2, allow_nan=False) + "\n")


def write_parameters(file: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Write the trainable parameters by their path (full fine-tuning)."""
    _save({key: parameter.detach() for key, parameter in parameters.items()}, file)


@torch.no_grad()
def copy_parameters(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], where: Path) -> None:
    """Copy tensors into the trainable parameters of the same path.

    Raises:
        UserError: For every missing, unknown or mis-shaped tensor.
    """
    faults = [f"{where}: parameter {key} is missing" for key in parameters if key not in tensors]
    faults += [f"{where}: {key} belongs to no trainable parameter" for key in tensors if key not in parameters]
    for key in tensors.keys() & parameters.keys():
        if tensors[key].shape != parameters[key].shape:
            got, wanted = tuple(tensors[key].shape), tuple(parameters[key].shape)
            faults.append(f"{where}: {key} is {got}, this run has {wanted}")
    if faults:
        raise UserError(*sorted(faults)[:10])
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def read_state(
    directory: Path,
    *,
    optimizer: AdapterOptimizer,
    load_loader: Callable[[dict[str, Any]], None],
    processes: Processes,
    seed: int,
) -> tuple[int, dict[str, Any]]:
    """Take back `write_state`; the parameters must be in place already.

    A process that the checkpoint does not know (there are more now) starts its random numbers anew, from `seed`.

    Returns:
        The number of steps done, and the policies.
    Raises:
        UserError: If the checkpoint belongs to another run or format.
    """
    state = json.loads((directory / "state.json").read_text())
    if state.get("format") != FORMAT:
        raise UserError(f"{directory / 'state.json'}: format {state.get('format')}, allowed: {FORMAT}.")
    load_loader(state["loader"])
    try:
        optimizer.load_state_tensors(load_file(directory / "optimizer.safetensors"))
    except ValueError as error:
        raise UserError(f"{directory / 'optimizer.safetensors'}: {error}") from error
    step = int(state["step"])
    with safe_open(directory / "random.safetensors", framework="pt") as file:
        names = set(file.keys())
        before = sum(name.startswith("cpu") for name in names)
        if before != processes.size:
            logger.warning(
                "The checkpoint is of %d processes, this is %d: the same data, another dropout.", before, processes.size
            )
        places = {kind: _numbered(kind, processes.rank) for kind in ("cpu", "cuda")}
        mine = {kind: file.get_tensor(name) for kind, name in places.items() if name in names}
    if mine:
        set_random_state(mine)
    else:
        torch.manual_seed(seed_of(seed, processes.rank, step))
    return step, dict(state["policies"])


def read_policies(directory: Path) -> dict[str, Any]:
    """The policies of a whole checkpoint, without anything else of it."""
    return dict(json.loads((directory / "state.json").read_text())["policies"])


def random_text() -> dict[str, str]:
    """The state of this process's generators in hexadecimal: JSON, for the process that writes it."""
    return {kind: state.numpy().tobytes().hex() for kind, state in random_state().items()}


def _random_tensors(random: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
    return {
        _numbered(kind, rank): torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
        for rank, states in enumerate(random)
        for kind, state in states.items()
    }


def _numbered(kind: str, rank: int) -> str:
    return kind if rank == 0 else f"{kind}.{rank}"


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
