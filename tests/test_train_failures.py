"""Runs whose memory is short, whose loss is bad, whose gradient is missing: nothing is lost, a resume is exact."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qdora.data.build_data import make_loader, read_data, tokenized_mix
from qdora.data.loader import StepLoader
from qdora.errors import RunFailure, UserError
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import find_model
from qdora.recipe.settings import Recipe
from qdora.run.run import train_run
from qdora.train import checkpoint as loop
from qdora.train import flat_group, trainer
from qdora.train import policies as loss_scale
from qdora.train import policies as out_of_memory
from qdora.train.evals import StepEvaluations
from qdora.train.policies import LossScale
from tests import support
from tests.support import (
    ADAPTER,
    UNEVALUATED,
    assert_resumes,
    assert_same_run,
    in_batches,
    make_gradients_nan,
    same_tensors,
    stream_on_cpu,
    timeless,
    train_until,
    training_lines,
)

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."
PINNED = "memory.offload_activations: the system refuses 64 MiB of pinned host memory (CUDA error: out of memory)."
FULL: dict[str, Any] = {f"adapter__{key}": ... for key in ("rank", "alpha", "dropout")}
FULL |= {"adapter__kind": "full", "base__quant": "none"}


def on_cpu() -> BaseException:
    return RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")


def on_cuda() -> BaseException:
    return torch.OutOfMemoryError(CUDA)


def eights(root: Path, **changes: Any) -> Recipe:
    return support.tiny_recipe(root, train__batch=8, **UNEVALUATED, **changes)


def small_memory(
    patch: pytest.MonkeyPatch, most_tokens: int, error: Callable[[], BaseException] = on_cuda, *, backward: bool = False
) -> list[int]:
    """An allocator that fails for micro-batches of more tokens; the tokens of those that it let pass come back."""
    passed = []

    def fail(_gradient: Any) -> None:
        raise error()

    def hungry(_number: int, loss: Any, ids: torch.Tensor, _options: Any) -> None:
        if ids.numel() <= most_tokens:
            passed.append(ids.numel())
        elif backward:
            loss.nll_sum.register_hook(fail)
        else:
            fail(None)

    in_batches(patch, hungry)
    return passed


@pytest.mark.parametrize("error, backward", [(on_cuda, False), (on_cpu, True), (MemoryError, False)])
def test_losses_are_those_of_enough_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, backward: bool
) -> None:
    """Without dropout, of which micro-batches of another size draw other numbers."""
    settings, whole = eights(root, adapter__dropout=0.0), root / "undropped"
    if not whole.exists():
        train_run(settings, whole)
    passed = small_memory(monkeypatch, 40, error, backward=backward)
    train_run(settings, tmp_path)
    shrunk = [line["out_of_memory"] for line in timeless(tmp_path) if "out_of_memory" in line]
    assert shrunk[0]["tokens_before"] == 2048
    assert all(each["tokens_after"] < each["tokens_before"] for each in shrunk)
    assert [each["tokens_before"] for each in shrunk[1:]] == [each["tokens_after"] for each in shrunk[:-1]]
    assert max(passed) <= 40
    assert len(training_lines(tmp_path)) == 6
    for one, other in zip(training_lines(tmp_path), training_lines(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
        for key in ("num_tokens", "num_label_tokens", "num_examples", "lr"):
            assert one[key] == other[key]
    said = f"Step 1: out of memory. Micro-batches shrink from 2048 to {shrunk[0]['tokens_after']} tokens"
    assert said in (tmp_path / "log.txt").read_text()


def test_a_retried_step_draws_as_a_first_try(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: the run equals, bit for bit, one whose micro-batches were as small from that step on."""
    with monkeypatch.context() as patch:
        small_memory(patch, 80)
        train_run(eights(root), tmp_path / "run")
    lines = timeless(tmp_path / "run")
    sizes = {line["step"]: line["out_of_memory"]["tokens_after"] for line in lines if "lr" not in line}
    assert sizes
    next_step, numbers = StepLoader.next_step, itertools.count(1)

    def sized(loader: StepLoader) -> Any:
        loader.batching.max_tokens = sizes.get(next(numbers), loader.batching.max_tokens)
        return next_step(loader)

    monkeypatch.setattr(StepLoader, "next_step", sized)
    train_run(eights(root), tmp_path / "known")
    assert [line for line in lines if "lr" in line] == timeless(tmp_path / "known")


def test_micro_batches_grow_back_also_resumed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is short in the first step only."""
    monkeypatch.setattr(out_of_memory, "_FIRST_WAIT", 2)

    def short(number: int, *_: Any) -> None:
        if number <= 2:
            raise on_cuda()

    def run(directory: Path, stop_at: int | None = None) -> None:
        with monkeypatch.context() as patched:
            in_batches(patched, short)
            if stop_at is None:
                train_run(eights(root), directory)
            else:
                train_until(eights(root), directory, stop_at)

    run(tmp_path / "whole")
    lines = [line for line in timeless(tmp_path / "whole") if "micro_batches_grow" in line]
    assert [line["step"] for line in lines] == [2, 4, 6][: len(lines)]
    sizes = [line["micro_batches_grow"]["tokens_after"] for line in lines]
    assert sizes[1] == 2 * sizes[0]
    for stop_at in (1, 3):
        run(tmp_path / f"run-{stop_at}", stop_at)
        state = json.loads((tmp_path / f"run-{stop_at}/checkpoints/step-{stop_at}/state.json").read_text())
        assert state["policies"]["micro_batch_tokens"]["used"] == {1: sizes[0] // 2, 3: sizes[0]}[stop_at]
        train_run(eights(root), tmp_path / f"run-{stop_at}", resume=True)
        assert_same_run(tmp_path / f"run-{stop_at}", tmp_path / "whole")


@pytest.mark.parametrize(
    "error, said",
    [
        (on_cpu(), r"out of memory with one example of \d+ tokens"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "cannot be computed: mat1 and mat2"),
        (RunFailure(PINNED), "cannot be computed: memory.offload_activations: the system refuses 64 MiB of pinned"),
    ],
    ids=["one example", "shapes", "pinned"],
)
def test_what_no_smaller_micro_batch_helps_stops_with_the_state_before_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    train_until(eights(root), tmp_path, 3)
    small_memory(monkeypatch, 3, lambda: error)
    with pytest.raises(RunFailure, match=rf"step 4: {said}.*Safe on disk: .*step-3"):
        train_run(eights(root), tmp_path, resume=True)
    shrunk = any("out_of_memory" in line for line in timeless(tmp_path))
    assert shrunk == ("one example" in said)


def joins_fail(patch: pytest.MonkeyPatch, step: int, *, once: bool) -> None:
    """Memory runs out in the update of `step`, at its matrices, which are joined in one call, and then one by one."""
    real, calls = flat_group.join_float32, itertools.count(1)

    def join(*args: Any) -> Any:
        number = next(calls)
        if number == step or (number > step and not once):
            raise on_cuda()
        return real(*args)

    patch.setattr(flat_group, "join_float32", join)


def test_an_update_without_memory_keeps_a_state(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits in parts changes no bit. The magnitudes of DoRA, stored in float32, need no memory: such a run can
    continue from there."""
    lora, dora = eights(root, adapter__kind="lora"), eights(root)
    train_run(lora, tmp_path / "whole")
    with monkeypatch.context() as patch:
        joins_fail(patch, 4, once=True)
        train_run(lora, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    text = r"step 4: out of memory in the update of 28 of "
    none = rf"{text}28 trainable tensors, e.g. \S+ \({re.escape(CUDA[:-1])}\)\. Fix: .*--resume.*/step-3\."
    some = rf"{text}42 trainable tensors.*14 others are updated, .*/step-4\."
    for settings, said, run in ((lora, none, tmp_path / "lora"), (dora, some, tmp_path / "dora")):
        with monkeypatch.context() as patch:
            joins_fail(patch, 4, once=False)
            with pytest.raises(RunFailure, match=said):
                train_run(settings, run)
        assert train_run(settings, run, resume=True)["num_steps"] == 6
    assert_same_run(tmp_path / "lora", tmp_path / "whole")


STICKY = "CUDA error: device-side assert triggered"
SECOND = RuntimeError("CUDA error: the second one, which every call raises from then on")


@pytest.mark.parametrize("broken", ["generators", "checkpoint", "evaluation"])
def test_after_a_sticky_error_the_first_one_is_reported_with_the_batch_that_caused_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise SECOND

    def first(*_args: Any, **_options: Any) -> Any:
        if broken == "generators":
            monkeypatch.setattr(loop, "set_random_state", fail)
        else:
            monkeypatch.setattr(RunDirectory, "checkpoint_directory", fail)
        raise RuntimeError(STICKY)

    said = rf"^step 1: cannot be computed: {STICKY}.*could not be saved \(CUDA error: the second.*bad-steps/step-1\.$"
    if broken == "evaluation":
        monkeypatch.setattr(StepEvaluations, "measure", first)
        with pytest.raises(RuntimeError, match=f"^{STICKY}$"):
            train_run(support.tiny_recipe(root, eval__every=3, eval__at_start=False), tmp_path)
        assert f"Step 3 is not saved either ({SECOND}) after: {STICKY}" in caplog.text
    else:
        in_batches(monkeypatch, first)
        with pytest.raises(RunFailure, match=said):
            train_run(support.tiny_recipe(root, **UNEVALUATED), tmp_path)
        assert (tmp_path / "bad-steps/step-1/batch.json").is_file()


STEPS, BAD = 11, 10
CASES: dict[str, tuple[float, dict[str, Any], str]] = {
    "nan": (math.nan, {}, "loss nan is not finite"),
    "spike": (60.0, {"train__spike": 3}, "loss .* is more than 3 times .*, the median of the last 9 steps"),
}


def plain(root: Path, **changes: Any) -> Recipe:
    """A checkpoint at the end only."""
    return support.tiny_recipe(
        root, **(UNEVALUATED | {"train__checkpoint_every": None, "train__steps": STEPS} | changes)
    )


def longest_of_step(settings: Recipe, step: int) -> tuple[str, list[int]]:
    """(id, token ids) of an example that the step takes and no other one of the run."""
    _, tokenizer = find_model(settings)
    loader = make_loader(settings, tokenized_mix(settings, tokenizer, read_data(settings.data)[0]), tokenizer)
    batch = [loader.next_step() for _ in range(step)][-1]
    name, ids, _ = max(batch.micro_batches[0].examples(), key=lambda example: len(example[1]))
    return name, ids.tolist()


def scale_loss(patch: pytest.MonkeyPatch, wanted: list[int], factor: float) -> None:
    """The loss of the example with these tokens is `factor` times what it is, and its gradient."""

    def scaled(_number: int, loss: Any, ids: torch.Tensor, _options: Any) -> Any:
        rows = [row[: len(wanted)] == wanted for row in ids.tolist()]
        example_nll = loss.example_nll * torch.where(torch.tensor(rows), factor, 1.0)
        whole = float(example_nll.sum() / loss.example_nll.sum()) if any(rows) else 1.0
        return type(loss)(loss.nll_sum * whole, example_nll, loss.example_tokens)

    in_batches(patch, scaled)


@pytest.fixture(scope="module")
def bad(root: Path) -> tuple[str, list[int]]:
    """An example of step `BAD`."""
    return longest_of_step(plain(root), BAD)


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> Path:
    train_run(plain(root), root / "undisturbed")
    return root / "undisturbed"


@pytest.fixture(scope="module")
def skipping(root: Path, bad: tuple[str, list[int]]) -> dict[str, Path]:
    """Case -> a run that skipped step `BAD`, with a checkpoint of every step."""
    every = {"train__checkpoint_every": 1, "train__keep_checkpoints": 20, "train__on_bad_step": "skip"}
    for case, (factor, changes, _) in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            scale_loss(patch, bad[1], factor)
            summary = train_run(plain(root, **every, **changes), root / case)
        assert (summary["num_skipped"], summary["num_steps"]) == (1, STEPS)
    return {case: root / case for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_step_is_skipped_and_changes_nothing(
    undisturbed: Path, skipping: dict[str, Path], bad: tuple[str, list[int]], case: str
) -> None:
    factor, _, reason = CASES[case]
    run = skipping[case]
    for file in (ADAPTER, "optimizer.safetensors"):
        same_tensors(run / f"checkpoints/step-{BAD}" / file, run / f"checkpoints/step-{BAD - 1}" / file)
    after = [load_file(run / f"checkpoints/step-{step}" / ADAPTER) for step in (BAD, STEPS)]
    assert any(not torch.equal(after[0][name], after[1][name]) for name in after[0]), "the run did not go on"
    expected, lines = timeless(undisturbed), timeless(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[: BAD - 1] == expected[: BAD - 1]
    assert lines[-1]["tasks"].keys() == expected[-1]["tasks"].keys()
    assert (lines[-1]["num_tokens"], lines[-1]["lr"]) == (expected[-1]["num_tokens"], expected[-1]["lr"])
    assert set(lines[BAD - 1]) == {"step", "skipped"}
    assert f"Step {BAD} is skipped: loss" in (run / "log.txt").read_text()
    (kept,) = (run / "bad-steps").iterdir()
    document = json.loads((kept / "batch.json").read_text())
    assert document["step"] == BAD
    assert re.fullmatch(reason, document["reason"])
    # The batch's two files agree with each other and with the line of the same step of an undisturbed run
    examples, tensors, line = document["examples"], load_file(kept / "batch.safetensors"), expected[BAD - 1]
    assert len(examples) == line["num_examples"] == len(tensors["input_ids"])
    assert int(tensors["attention_mask"].sum()) == line["num_tokens"]
    assert int((tensors["labels"] != -100).sum()) == line["num_label_tokens"]
    for index, each in enumerate(examples):
        length = len(each["input_ids"])
        for name in ("input_ids", "labels"):
            assert tensors[name][index, :length].tolist() == each[name]
        assert tensors["attention_mask"][index].sum() == length
        assert each["num_label_tokens"] == sum(label != -100 for label in each["labels"])
        assert ("=" in each["text"]) == (each["task"] == "sums")
    (found,) = [each for each in examples if each["input_ids"] == bad[1]]
    assert found["id"] == bad[0]
    whole = sum(task["nll_sum"] for task in line["tasks"].values())
    others = sum(each["nll_sum"] for each in examples if each is not found)
    if math.isnan(factor):
        assert found["nll_sum"] is document["loss"] is None
        assert 0 < others < whole
    else:
        assert others + found["nll_sum"] / factor == pytest.approx(whole, rel=1e-5)
        assert document["loss"] == pytest.approx((others + found["nll_sum"]) / line["num_label_tokens"], rel=1e-5)


@pytest.mark.parametrize("stop_at", [BAD - 2, BAD])
def test_interrupted_and_resumed_decides_alike(
    root: Path,
    skipping: dict[str, Path],
    bad: tuple[str, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    scale_loss(monkeypatch, bad[1], 60.0)
    settings = plain(root, train__on_bad_step="skip", train__spike=3)
    assert_resumes(settings, skipping["spike"], tmp_path, stop_at=stop_at, step=STEPS)


def test_a_bad_step_stops_the_run_with_the_state_before_it(
    root: Path, undisturbed: Path, skipping: dict[str, Path], bad: tuple[str, list[int]], tmp_path: Path
) -> None:
    """A spike may be skipped on a resume; a NaN of the machine may be gone."""
    advice = rf"batch in bad-steps/step-{BAD}, .* -s train.on_bad_step=skip.*step-{BAD - 1}, .*step-{BAD}"
    for case, change, whole in (("spike", {"train__on_bad_step": "skip"}, skipping["spike"]), ("nan", {}, undisturbed)):
        factor, changes, reason = CASES[case]
        with pytest.MonkeyPatch.context() as patch:
            scale_loss(patch, bad[1], factor)
            with pytest.raises(RunFailure, match=rf"step {BAD}: {reason}.*{advice}"):
                train_run(plain(root, **changes), tmp_path / case)
            if change:
                train_run(plain(root, **changes, **change), tmp_path / case, resume=True)
        if not change:
            train_run(plain(root, **changes), tmp_path / case, resume=True)
        assert_same_run(tmp_path / case, whole, step=STEPS)


def test_too_many_in_a_row_stop_the_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {"train__on_bad_step": "skip", "train__max_skips": 2, "train__steps": 6}
    said = r"step 3: gradient norm nan is not finite.*The 2 steps before it were skipped.*step-2, .*bad-steps/step-3"
    with monkeypatch.context() as patch:
        make_gradients_nan(patch)
        for resume in (False, True):
            with pytest.raises(RunFailure, match=said):
                train_run(plain(root, **changes), tmp_path, resume=resume)
    assert [line["step"] for line in timeless(tmp_path)] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "bad-steps").iterdir()) == ["step-1", "step-2", "step-3"]
    kept = json.loads((tmp_path / "bad-steps/step-3/batch.json").read_text())["examples"]
    assert all(each["nll_sum"] > 0 for each in kept)
    again = train_run(plain(root, **changes, train__lr=1e-4), tmp_path, resume=True)  # the rate may be lowered
    assert (again["num_skipped"], again["num_steps"]) == (2, 6)


def half(root: Path, dtype: str = "float16", **changes: Any) -> Recipe:
    return support.tiny_recipe(root, model__dtype=dtype, **UNEVALUATED, **changes)


def test_an_overflow_costs_no_step(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a scale that overflows, the run finds the largest that does not; all steps are those of a run from there."""
    with monkeypatch.context() as patched:
        patched.setattr(loss_scale, "_START", 2.0**40)
        train_run(half(root), tmp_path / "high")
        train_until(half(root), tmp_path / "resumed", 3)
    train_run(half(root), tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "high")
    lines = training_lines(tmp_path / "high")
    assert len(lines) == 6
    assert max(line["loss_scale"] for line in lines) < 2.0**40
    monkeypatch.setattr(loss_scale, "_START", lines[0]["loss_scale"])
    train_run(half(root), tmp_path / "found")
    assert training_lines(tmp_path / "found") == lines


def test_a_bad_batch_leaves_the_scale_as_it_was(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is NaN with any scale; it is skipped, and the next step starts with the scale of the one before."""
    make_gradients_nan(monkeypatch)
    with pytest.raises(RunFailure, match="step 6: gradient norm nan is not finite"):
        train_run(half(root, train__on_bad_step="skip", train__checkpoint_every=1), tmp_path)
    state = json.loads((tmp_path / "checkpoints/step-5/state.json").read_text())
    assert state["policies"]["loss_scale"]["value"] == LossScale().value


@pytest.mark.parametrize("residency", ["device", "host"])
def test_a_matrix_that_gets_no_gradient_is_found_wherever_the_base_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, residency: str
) -> None:
    """With a streamed base it ends the run, whose backward pass may read wrong bytes."""
    real = trainer.Trainer.__init__

    def cut_off(self: Any, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.optimizer.parameters["model.layers.1.mlp.up_proj.lora_B"].register_hook(lambda grad: grad * 0)

    monkeypatch.setattr(trainer.Trainer, "__init__", cut_off)
    recipe = support.tiny_recipe(root, **UNEVALUATED, train__steps=5, base__residency=residency)
    said = "in 3 updates 2 of 42 trainable tensors had no gradient, e.g. model.layers.1.mlp.up_proj.lora_"
    if residency == "host":
        stream_on_cpu(monkeypatch)
        with pytest.raises(RunFailure, match=rf"step 3: {said}.*on disk: .*step-3"):
            train_run(recipe, tmp_path)
        return
    assert train_run(recipe, tmp_path)["num_steps"] == 5
    assert f"WARNING {said}" in (tmp_path / "log.txt").read_text()
    (found,) = json.loads((tmp_path / "checks.json").read_text())["gradients"]
    assert found["state"] == "warning"


@pytest.mark.parametrize(
    "changes, fault",
    [
        ({"train__max_skips": 3}, "train.max_skips: would be ignored because train.on_bad_step stop skips no step"),
        ({"base__residency": "host"}, "base.residency: got host, must be device .*without a GPU"),
        ({"memory__offload_activations": True}, "memory.offload_activations: got true, must be false .*without a GPU"),
        ({"memory__offload_activations": True, "memory__checkpointing": False}, "would be ignored because memory"),
        (FULL | {"model__dtype": "float16"}, "model.dtype: got float16, must be bfloat16 or float32 with adapter.kind"),
    ],
)
def test_what_is_refused(root: Path, tmp_path: Path, changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        train_run(support.tiny_recipe(root, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
