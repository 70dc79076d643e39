"""Training steps of real, mixed data, and the builtin model they are for: shared by the benchmarks of whole steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import small_config
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from qdora.adapter.layer import FrozenLinear
from qdora.data.batches import IGNORED, Batching, MicroBatch, Step
from qdora.data.sources import make_loader, read_data, tokenized_mix
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import choose_compute, find_model
from qdora.model.inject import replace_module
from qdora.quant.packed import quantize
from qdora.recipe.data_settings import COMMONSENSE_TASKS
from qdora.recipe.recipe_file import recipe_from
from qdora.recipe.settings import Recipe, TrainConfig
from qdora.run.base import load_base
from qdora.train.logs import TrainingProgress
from qdora.train.trainer import Trainer


def recipe(data: Path, *, batch: int = 1, quant: str = "nf4") -> Recipe:
    """The eight commonsense tasks in equal shares on SmolLM2-135M; `data` holds <task>/<split>.parquet."""
    mix = [{"task": task, "path": str(data / task), "limit": 400} for task in COMMONSENSE_TASKS]
    return recipe_from(
        {
            "model": {"source": "builtin"},
            "base": {"quant": quant},
            "data": {"mix": mix, "strategy": "equal", "max_length": 512, "too_long": "drop"},
            "train": {"steps": 1, "batch": batch},
            "memory": {"checkpointing": False},
        }
    )


def base_model(*, smoke: bool, quant: str = "nf4") -> Any:
    """The frozen builtin model in bf16; with `smoke` a random Llama of two small blocks, never in 16 bits."""
    if not smoke:
        settings = recipe(Path(), quant=quant)
        return load_base(settings, find_model(settings)[0], choose_compute("bfloat16"))
    kind = "nf4" if quant == "none" else quant
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small_config(128), dtype=torch.bfloat16)
    for path, module in list(model.named_modules()):
        if path.endswith("_proj"):
            replace_module(model, path, FrozenLinear(quantize(module.weight.detach(), kind)))
    return model.requires_grad_(False)


def first_steps(data: Path | str | None, batch: int, num_steps: int) -> list[Step]:
    """The first steps of a run of the recipe; without data, steps of eight examples of 5 to 12 random tokens each."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        return [random_step(((12, 11, 9), (8, 7, 7, 6, 5)), generator, num_prompt=4) for _ in range(num_steps)]
    loader = loader_of(recipe(Path(data).resolve(), batch=batch))
    return [loader.next_step() for _ in range(num_steps)]


def loader_of(recipe: Recipe) -> Any:
    _, tokenizer = find_model(recipe)
    return make_loader(recipe, tokenized_mix(recipe, tokenizer, read_data(recipe.data)[0]), tokenizer)


def in_one_batch(step: Step) -> dict[str, Tensor]:
    """All examples padded to the longest, as transformers' trainer gives them to a model."""

    def joined(name: str, value: int) -> Tensor:
        rows = [row for part in step.micro_batches for row in getattr(part, name)]
        return pad_sequence(rows, batch_first=True, padding_value=value)

    return {name: joined(name, value) for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED))}


class FixedStep:
    """A step that is there already, again and again, for `fitted`."""

    batching = Batching(1, pad_id=0)  # a shortage of memory ends the benchmark: its step cannot be cut smaller

    def __init__(self, step: Step) -> None:
        self.step = step

    def next_step(self) -> Step:
        return self.step

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """It has no state."""


def fitted(model: Any, optimizer: Any, loader: Any, train: TrainConfig, *, quiet: bool = False) -> list[dict[str, Any]]:
    """qdora's training loop without a run directory; its lines of metrics. `loader` may be a `FixedStep`."""
    lines: list[dict[str, Any]] = []
    data, length = {"mix": [{"task": "demo/facts"}]}, {"steps": 1, "batch": 1}
    settings = recipe_from({"model": {"source": "builtin"}, "data": data, "train": length})
    settings = settings.model_copy(update={"train": train})
    run = RunDirectory(Path(tempfile.gettempdir()))
    trainer = Trainer(settings, run, model, None, loader, train.steps, optimizer=optimizer)
    with TrainingProgress(train.steps, console=Console(quiet=True) if quiet else None) as progress:
        model.train()
        for _ in range(train.steps):
            lines.append(trainer.one_step())
            progress.step(lines[-1])
    return lines


def torch_trainer(model: Any) -> Callable[..., None]:
    """Makes an optimizer step of micro-batches as transformers' trainer does; each is what the model is called with.
    The second argument of what it returns is called after each forward pass."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0, fused=True)

    def train(batches: Sequence[dict[str, Tensor]], after_forward: Callable[[], None] = lambda: None) -> None:
        for batch in batches:
            loss = model(**batch, use_cache=False).loss / len(batches)
            after_forward()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return train


def random_step(lengths: Sequence[Sequence[int]], generator: torch.Generator, *, num_prompt: int = 1) -> Step:
    """Random tokens, right-padded: the lengths of the rows of each micro-batch, the longest first; the first
    `num_prompt` tokens of a row are not labelled."""
    parts = []
    for rows in lengths:
        ids = torch.randint(1, 128, (len(rows), rows[0]), generator=generator)
        mask = (torch.arange(rows[0]) < torch.tensor(rows)[:, None]).long()
        labels = torch.where((mask == 1) & (torch.arange(rows[0]) >= num_prompt), ids, IGNORED)
        names = [f"random {row}" for row in range(len(rows))]
        parts.append(MicroBatch(ids, mask, labels, torch.zeros(len(rows), dtype=torch.int64), ["random"], names))
    num_labels = sum(int((part.labels != IGNORED).sum()) for part in parts)
    return Step(parts, num_labels, sum(map(sum, lengths)), sum(map(len, lengths)))
