"""What a checkpoint of a run holds, written and restored: safetensors and JSON, no pickle.

adapter/                  the adapter in PEFT's format, usable by itself (full fine-tuning: parameters.safetensors)
optimizer.safetensors     optimizer states and the low bits of bf16 parameters
gates.safetensors         the gates, their Adam, and lora_B without them, if the adapter has gates
random.safetensors        state of torch's generators in every process, so that a resumed step draws the same numbers
state.json                step, data position, and what the run has learnt about itself (policies)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdora.data.batches import StepLoader
from qdora.errors import RunFailure, UserError
from qdora.files.json_file import read_json_object
from qdora.files.tensor_file import write_tensors
from qdora.memory.oom import is_out_of_memory
from qdora.recipe.section import reason_of
from qdora.recipe.settings import Recipe
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
    random: Sequence[Mapping[str, str]],
    policies: Mapping[str, Any],
) -> None:
    """Write everything but the parameters into an existing directory; `step` steps are done.

    `random` is the `random_text` of every process, in the order of ranks; `policies` are JSON values by name.
    """
    write_tensors(directory / "optimizer.safetensors", optimizer.state_tensors())
    tensors = {
        _numbered(kind, rank): torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        for rank, states in enumerate(random)
        for kind, text in states.items()
    }
    write_tensors(directory / "random.safetensors", tensors)
    state = {"format": FORMAT, "step": step, "loader": dict(loader_state), "policies": dict(policies)}
    (directory / "state.json").write_text(json.dumps(state, indent=2, allow_nan=False) + "\n")


@torch.no_grad()
def copy_parameters(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], where: Path) -> None:
    """Copy tensors into the trainable parameters of the same path. UserError if they do not fit."""
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
    directory: Path, *, optimizer: AdapterOptimizer, loader: StepLoader, processes: Processes, seed: int, draws: bool
) -> tuple[int, dict[str, Any]]:
    """Restore `write_state`, after the parameters; returns the number of steps done, and the policies.

    A process without a random state in the checkpoint (there are more processes now) seeds its generators from `seed`.
    `draws`: whether the steps draw random numbers, as dropout does; another number of processes draws others.
    UserError if the checkpoint belongs to another run or format.
    """
    state = read_json_object(directory / "state.json")
    if state.get("format") != FORMAT:
        raise UserError(f"{directory / 'state.json'}: format must be {FORMAT} (got {state.get('format')}).")
    loader.load_state_dict(state["loader"])
    try:
        optimizer.load_state_tensors(load_file(directory / "optimizer.safetensors"))
    except ValueError as error:
        raise UserError(f"{directory / 'optimizer.safetensors'}: {error}") from error
    step = int(state["step"])
    tensors = load_file(directory / "random.safetensors")
    before = sum(name.startswith("cpu") for name in tensors)
    if draws and before != processes.size:
        text = "The checkpoint is from %d processes, this run has %d: same data, different dropout."
        logger.warning(text, before, processes.size)
    names = {kind: _numbered(kind, processes.rank) for kind in ("cpu", "cuda")}
    mine = {kind: tensors[name] for kind, name in names.items() if name in tensors}
    if mine:
        set_random_state(mine)
    else:
        torch.manual_seed(seed_of(seed, processes.rank, step))
    return step, dict(state["policies"])


def draws_numbers(recipe: Recipe, model: PreTrainedModel) -> bool:
    """Whether a step draws random numbers, for the adapter or in a base with dropout of its own."""
    adapter = recipe.adapter
    of_base = getattr(model.config.get_text_config(), "attention_dropout", 0.0) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )
    of_gates = adapter.gates is not None and adapter.gates.mode == "hard_concrete"
    return bool(adapter.dropout > 0 or of_gates or of_base)


@contextmanager
def unreadable(directory: Path) -> Iterator[None]:
    """Turn what restoring a checkpoint raises into a UserError of one line.

    The check sums of its files were right, so it is not damaged: another version or another program wrote it.
    """
    try:
        yield
    except (UserError, RunFailure):
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = reason_of(error)
        raise UserError(f"{directory}: is no checkpoint of this version of qdora: {reason}.") from error


def best_step_in(directory: Path) -> int | None:
    """The best step that a checkpoint records, or None: a run that continues from it may end with that step."""
    found: int | None = read_json_object(directory / "state.json")["policies"].get("best", {}).get("step")
    return found


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


def random_text() -> dict[str, str]:
    """The state of this process's generators in hexadecimal, as JSON for the process that writes the checkpoint."""
    return {kind: state.numpy().tobytes().hex() for kind, state in random_state().items()}


def _numbered(kind: str, rank: int) -> str:
    return kind if rank == 0 else f"{kind}.{rank}"
