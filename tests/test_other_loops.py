"""An injected model in other people's loops, transformers' Trainer and one by hand, against the loop of qdora train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from qdora.data.batching import IGNORED, Batching, MicroBatch
from qdora.data.loader import StepLoader
from qdora.data.mix import make_mix
from qdora.model.adapter_file import load_adapter, save_adapter
from qdora.model.inject import adapted_layers, adapter_parameters, inject
from qdora.nn import adapted_linear
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.recipe.train_settings import TrainConfig
from qdora.train.hooks import Hooks
from qdora.train.interrupt import StopRequest
from qdora.train.loop import fit
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.progress import TrainingProgress
from tests import tiny_adapted
from tests.test_data_loader import tokenised

LR, STEPS, BATCH, MICRO = 0.02, 5, 4, 2


def model(dtype: torch.dtype = torch.float32) -> Any:
    """NF4, DoRA of rank 3 at its start: float32 adapters, since a plain optimizer loses updates of bf16 ones."""
    base = tiny_adapted.base("llama", quant="nf4")
    inject(base, rank=3, alpha=6.0, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return base.train()


def loader() -> StepLoader:
    sets = [tokenised("short", [5, 9, 7, 12, 6, 8, 11]), tokenised("long", [20, 26, 17, 30, 23])]
    mix = make_mix(sets, strategy="proportional", seed=0)
    return StepLoader(sets, mix.order, tokens_per_step=None, batch=BATCH, batching=Batching(64, 0))


def examples() -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) of the steps' examples."""
    steps = loader()
    for _ in range(STEPS):
        for micro in steps.next_step().micro_batches:
            yield from ((ids, labels) for _, ids, labels in micro.examples())


class Examples(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter({"input_ids": ids, "labels": labels} for ids, labels in examples())


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padded on the right."""

    def padded(name: str, fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)

    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row["labels"])) for row in rows], batch_first=True).long()
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def by_our_loop() -> tuple[Any, list[float]]:
    trained, losses = model(), []
    optimizer = AdapterOptimizer(adapter_parameters(trained), name="adamw")
    nowhere = Path("nowhere")
    keep = {"save": lambda _step: nowhere, "keep_batch": lambda _bad: nowhere}
    hooks = Hooks(write_metrics=lambda line: losses.append(line["loss"]), **keep)
    fit(
        trained,
        optimizer,
        loader(),
        TrainConfig(steps=STEPS, batch=1, lr=LR, schedule="constant", warmup=0, clip=1.0),
        hooks,
        num_steps=STEPS,
        device=torch.device("cpu"),
        progress=TrainingProgress(STEPS),
        stop=StopRequest(),
    )
    return trained, losses


def by_trainer(
    optim: str, directory: Path, *, forget: bool = False, save_steps: int | None = None, resume: Path | None = None
) -> tuple[Any, list[float]]:
    """`forget`: every layer computes its norm anew at every forward pass."""
    trained = model()
    if forget:
        for layer in adapted_layers(trained).values():
            layer.register_forward_pre_hook(lambda each, _args: each.parameters_changed())
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


def by_hand(
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    each_time: Callable[[nn.Module], object] = lambda _model: None,
) -> tuple[Any, list[float]]:
    """The model's own loss, which is a mean over the labels of its batch; `each_time` before each micro-batch."""
    trained, losses = model(), []
    parameters = list(adapter_parameters(trained).values())
    optimizer, steps = optimizer_of(parameters), loader()
    for _ in range(STEPS):
        step = steps.next_step()
        total = 0.0
        for micro in step.micro_batches:
            each_time(trained)
            inputs = {"input_ids": micro.input_ids, "attention_mask": micro.attention_mask, "labels": micro.labels}
            share = trained(**inputs).loss * int((micro.labels != IGNORED).sum()) / step.num_label_tokens
            share.backward()
            total += float(share.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return trained, losses


@pytest.fixture(scope="module")
def ours() -> tuple[Any, list[float]]:
    return by_our_loop()


def assert_same_training(theirs: tuple[Any, list[float]], ours: tuple[Any, list[float]]) -> None:
    assert theirs[1] == pytest.approx(ours[1], rel=2e-5)
    assert ours[1][-1] < ours[1][0] - 0.1
    expected = adapter_parameters(ours[0])
    assert any(name.endswith("magnitude") for name in expected)
    for name, parameter in adapter_parameters(theirs[0]).items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-3, atol=2e-4, msg=name)


def assert_norms_are_fresh(trained: Any) -> None:
    """Every layer's output is that of the merged weight of its parameters as they are, by float64 loops."""
    layers: dict[str, AdaptedLinear] = adapted_layers(trained)
    assert len(layers) == 14
    for name, layer in layers.items():
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = x.double() @ torch.from_numpy(tiny_adapted.expected_weight(layer)).T
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "paged_adamw_32bit"])
def test_trainer_trains_what_our_loop_trains(ours: tuple[Any, list[float]], tmp_path: Path, optim: str) -> None:
    theirs = by_trainer(optim, tmp_path)
    assert_same_training(theirs, ours)
    assert_norms_are_fresh(theirs[0])


SLOW_OPTIMIZERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("lion_32bit", "sgd")]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bnb_8bit", "adafactor", *SLOW_OPTIMIZERS])
def test_trainer_never_meets_an_old_norm(tmp_path: Path, optim: str) -> None:
    """As with norms that are computed anew in every forward pass, to the last bit."""
    kept, anew = by_trainer(optim, tmp_path / "kept"), by_trainer(optim, tmp_path / "anew", forget=True)
    assert kept[1] == anew[1]
    assert all(math.isfinite(loss) for loss in kept[1])
    for name, parameter in adapter_parameters(anew[0]).items():
        assert torch.equal(adapter_parameters(kept[0])[name], parameter), name
    assert_norms_are_fresh(kept[0])


@pytest.mark.parametrize("loop", ["trainer", "by hand"])
def test_norms_are_computed_once_a_step_by_loops_that_call_train_in_every_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loop: str
) -> None:
    compute, calls = adapted_linear.row_norm, []

    def counting(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return compute(*args, **options)

    monkeypatch.setattr(adapted_linear, "row_norm", counting)
    train, modes = AdaptedLinear.train, []
    monkeypatch.setattr(AdaptedLinear, "train", lambda each, mode=True: modes.append(mode) or train(each, mode))
    if loop == "trainer":
        trained, _ = by_trainer("adamw_torch_fused", tmp_path)
    else:
        trained, _ = by_hand(OPTIMIZERS["fused"], each_time=lambda model: model.train())
    num_layers = len(adapted_layers(trained))
    assert len(modes) >= num_layers * STEPS * BATCH // MICRO, "the loop did not call train()"
    assert len(calls) == num_layers * STEPS
    assert_norms_are_fresh(trained)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, foreach=True),
    "loop": lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, foreach=False, fused=False),
    "bitsandbytes": lambda parameters: bnb.optim.AdamW32bit(parameters, lr=LR, weight_decay=0.0),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_a_loop_by_hand_trains_what_our_loop_trains(ours: tuple[Any, list[float]], name: str) -> None:
    theirs = by_hand(OPTIMIZERS[name])
    assert_same_training(theirs, ours)
    assert_norms_are_fresh(theirs[0])


def test_the_adapter_of_a_trainer_is_saved_and_loaded(tmp_path: Path) -> None:
    trained, _ = by_trainer("adamw_torch_fused", tmp_path)
    save_adapter(trained, tmp_path / "adapter", base_name_or_path="tiny", revision=None, base_quant={"quant": "nf4"})
    again = tiny_adapted.base("llama", quant="nf4")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(tiny_adapted.logits(again), tiny_adapted.logits(trained.eval()))
    assert not torch.equal(tiny_adapted.logits(again), tiny_adapted.logits(tiny_adapted.base("llama", quant="nf4")))


def test_a_trainer_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    """Which holds the whole model, packed base included."""
    whole = by_trainer("adamw_torch_fused", tmp_path, save_steps=2)
    again = by_trainer("adamw_torch_fused", tmp_path, resume=tmp_path / "checkpoint-2")
    assert again[1] == whole[1]
    for name, parameter in adapter_parameters(whole[0]).items():
        assert torch.equal(adapter_parameters(again[0])[name], parameter), name
    assert_norms_are_fresh(again[0])


def test_batches_are_those_of_our_loop() -> None:
    """What the tests above compare: the same examples, four a step."""
    micro: MicroBatch = loader().next_step().micro_batches[0]
    assert micro.input_ids.ndim == 2
    assert len(list(examples())) == STEPS * BATCH
