"""Training steps of real, mixed data, and the builtin model they are for: shared by the benchmarks of whole steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import small_config
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from qdora.adapter.frozen_linear import FrozenLinear
from qdora.data.batching import IGNORED, Batching, MicroBatch
from qdora.data.build_data import make_loader, read_data, tokenized_mix
from qdora.data.loader import Step
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import choose_compute, find_model
from qdora.model.inject import replace_module
from qdora.quant.packed import quantize
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe
from qdora.recipe.train_settings import TrainConfig
from qdora.run.base import load_base
from qdora.train.logs import TrainingProgress
from qdora.train.trainer import Trainer


def recipe(data: Path, *, batch: int, checkpointing: bool, seed: int = 0, quant: str = "nf4") -> Recipe:
    """The eight commonsense tasks in equal shares on SmolLM2-135M.

    `data` holds <task>/<split>.parquet in the schema of `qdora guide own-data`; any path if only the model is read.
    """
    return recipe_from(
        {
            "model": {"source": "builtin"},
            "base": {"quant": quant},
            "data": {
                "mix": [{"task": task, "path": str(data / task), "limit": 400} for task in COMMONSENSE_TASKS],
                "strategy": "equal",
                "max_length": 512,
                "too_long": "drop",
                "seed": seed,
            },
            "train": {"steps": 1, "batch": batch},
            "memory": {"checkpointing": checkpointing},
        }
    )


def base_model(settings: Recipe, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The frozen base of the recipe, computing in `dtype`."""
    source, _ = find_model(settings)
    return load_base(settings, source, choose_compute(str(dtype).removeprefix("torch.")))


def real_steps(settings: Recipe, num_steps: int) -> list[Step]:
    """The first steps of a run of the recipe."""
    _, tokenizer = find_model(settings)
    loader = make_loader(settings, tokenized_mix(settings, tokenizer, read_data(settings.data)[0]), tokenizer)
    return [loader.next_step() for _ in range(num_steps)]


def in_one_batch(step: Step) -> Step:
    """The same examples as one micro-batch, padded to the longest."""
    parts = step.micro_batches
    width = max(part.input_ids.shape[1] for part in parts)

    def joined(tensors: Iterable[Tensor], value: int) -> Tensor:
        return torch.cat([pad(each, (0, width - each.shape[1]), value=value) for each in tensors])

    whole = MicroBatch(
        input_ids=joined((part.input_ids for part in parts), 0),
        attention_mask=joined((part.attention_mask for part in parts), 0),
        labels=joined((part.labels for part in parts), IGNORED),
        task_ids=torch.cat([part.task_ids for part in parts]),
        task_names=parts[0].task_names,
        example_ids=[name for part in parts for name in part.example_ids],
    )
    return replace(step, micro_batches=[whole])


class FixedSteps:
    """Steps that are there already, one after the other, for `qdora.train.loop.fit`."""

    batching = Batching(1, pad_id=0)  # a shortage of memory ends the benchmark: its steps cannot be cut smaller

    def __init__(self, steps: list[Step]) -> None:
        self.steps, self.position = steps, 0

    def next_step(self) -> Step:
        """The next one; after the last one the first again."""
        self.position += 1
        return self.steps[(self.position - 1) % len(self.steps)]

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to a position."""
        self.position = state["position"]


def fitted(
    model: Any,
    optimizer: Any,
    loader: Any,
    train: TrainConfig,
    *,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """qdora's training loop without a run directory; its lines of metrics. `loader` may be `FixedSteps`."""
    assert train.steps is not None
    lines: list[dict[str, Any]] = []
    data, length = {"mix": [{"task": "demo/facts"}]}, {"steps": 1, "batch": 1}
    settings = recipe_from({"model": {"source": "builtin"}, "data": data, "train": length})
    settings = settings.model_copy(update={"train": train})
    run = RunDirectory(Path(tempfile.gettempdir()))
    trainer = Trainer(settings, run, model, None, loader, train.steps, optimizer=optimizer)
    with TrainingProgress(train.steps, console=console) as progress:
        model.train()
        for _ in range(train.steps):
            lines.append(trainer.one_step())
            progress.step(lines[-1])
    return lines


def smoke_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    """A random Llama of two small blocks in NF4, in place of the builtin model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(128), dtype=dtype)
    for path, module in list(model.named_modules()):
        if path.endswith("_proj"):
            replace_module(model, path, FrozenLinear(quantize(module.weight.detach(), "nf4", 64, double_quant=True)))
    return model.requires_grad_(False)


def smoke_steps(num_steps: int) -> list[Step]:
    """Steps of eight examples of random tokens, of 5 to 12 tokens each, in two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    return [random_step(((12, 11, 9), (8, 7, 7, 6, 5)), generator, num_prompt=4) for _ in range(num_steps)]


def random_step(lengths: Sequence[Sequence[int]], generator: torch.Generator, *, num_prompt: int = 1) -> Step:
    """A step of random tokens, right-padded.

    Args:
        lengths: Of the rows of each micro-batch, the longest first.
        num_prompt: Tokens at the start of each row that are not labelled.
    """
    parts = []
    for rows in lengths:
        ids = torch.randint(1, 128, (len(rows), rows[0]), generator=generator)
        mask = (torch.arange(rows[0]) < torch.tensor(rows)[:, None]).long()
        labels = torch.where((mask == 1) & (torch.arange(rows[0]) >= num_prompt), ids, IGNORED)
        names = [f"random {row}" for row in range(len(rows))]
        parts.append(MicroBatch(ids, mask, labels, torch.zeros(len(rows), dtype=torch.int64), ["random"], names))
    num_labels = sum(int((part.labels != IGNORED).sum()) for part in parts)
    return Step(parts, num_labels, sum(map(sum, lengths)), sum(map(len, lengths)))
