"""An injected model in transformers' Trainer, against the loop of qdora train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from qdora.adapter.layer import AdaptedLinear
from qdora.data.batches import IGNORED, Batching, StepLoader
from qdora.data.tokenize import TokenizedSet
from qdora.files.run_directory import RunDirectory
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import adapted_layers, adapter_parameters, inject
from qdora.recipe.recipe_file import recipe_from
from qdora.train import trainer
from qdora.train.optimizer import AdapterOptimizer
from tests import support
from tests.adapter_numbers import expected_weight
from tests.data_rows import mix_of

LR, STEPS, BATCH, MICRO = 0.02, 5, 4, 2
Trained = tuple[Any, list[float]]


def model() -> Any:
    """NF4, DoRA of rank 3 at its start: float32 adapters, since a plain optimizer loses updates of bf16 ones."""
    base = support.base_model("llama", quant="nf4")
    inject(base, rank=3, alpha=6.0, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    return base.train()


def loader() -> StepLoader:
    lengths = {"a": [5, 9, 7, 12, 6, 8, 11], "b": [20, 26, 17, 30, 23]}
    sets = [TokenizedSet(name, tuple(support.examples(each, tasks=name))) for name, each in lengths.items()]
    return StepLoader(mix_of(sets), Batching(64, 0), batch=BATCH)


class Examples(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        taken = loader()
        for _ in range(STEPS):
            for micro in taken.next_step().micro_batches:
                yield from ({"input_ids": ids, "labels": labels} for _, ids, labels in micro.examples())


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padded on the right."""
    columns = {"input_ids": 0, "labels": IGNORED}
    padded = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
        for name, fill in columns.items()
    }
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row["labels"])) for row in rows], batch_first=True).long()
    return {**padded, "attention_mask": mask}


@pytest.fixture(scope="module")
def ours() -> Trained:
    trained = model()
    optimizer = AdapterOptimizer(adapter_parameters(trained), name="adamw")
    train = {"steps": STEPS, "batch": 1, "lr": LR, "schedule": "constant", "warmup": 0, "clip": 1.0}
    recipe = recipe_from({"model": {"source": "builtin"}, "data": {"mix": [{"task": "demo/facts"}]}, "train": train})
    run = trainer.Trainer(recipe, RunDirectory(Path()), trained, None, loader(), STEPS, optimizer=optimizer)
    losses = [run.one_step()["loss"] for _ in range(STEPS)]
    return trained, losses


def by_trainer(optim: str, directory: Path, *, save_steps: int | None = None, resume: Path | None = None) -> Trained:
    trained = model()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim=optim,
        logging_steps=1,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or STEPS,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=trained, args=arguments, train_dataset=Examples(), data_collator=collate)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trained, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def assert_norms_are_fresh(trained: Any) -> None:
    """Every layer's output is that of the merged weight of its parameters as they are, by float64 loops."""
    layers: dict[str, AdaptedLinear] = adapted_layers(trained)
    assert len(layers) == 14
    for name, layer in layers.items():
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = x.double() @ torch.from_numpy(expected_weight(layer)).T
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "paged_adamw_32bit"])
def test_trainer_trains_what_our_loop_trains(ours: Trained, tmp_path: Path, optim: str) -> None:
    trained, losses = by_trainer(optim, tmp_path)
    assert losses == pytest.approx(ours[1], rel=2e-5)
    assert losses[-1] < losses[0] - 0.05
    expected = adapter_parameters(ours[0])
    for path, parameter in adapter_parameters(trained).items():
        torch.testing.assert_close(parameter, expected[path], rtol=1e-3, atol=2e-4, msg=path)
    assert_norms_are_fresh(trained)


def test_a_trainer_resumes_from_its_own_checkpoint_and_its_adapter_is_saved(tmp_path: Path) -> None:
    """The checkpoint holds the whole model, packed base included."""
    whole = by_trainer("adamw_torch_fused", tmp_path, save_steps=2)
    resumed = by_trainer("adamw_torch_fused", tmp_path, resume=tmp_path / "checkpoint-2")
    assert resumed[1] == whole[1]
    for name, parameter in adapter_parameters(whole[0]).items():
        assert torch.equal(adapter_parameters(resumed[0])[name], parameter), name
    assert_norms_are_fresh(resumed[0])
    save_adapter(whole[0], tmp_path / "adapter", base_name_or_path="tiny", revision=None, base_quant={"quant": "nf4"})
    again = support.base_model("llama", quant="nf4")
    assert not torch.equal(support.logits_of(again), support.logits_of(whole[0].eval()))
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(support.logits_of(again), support.logits_of(whole[0]))
