"""A budget: a run over it does not start unless forced, or changes what leaves its numbers alone."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig

from qdora.data.build_data import read_data, tokenized_mix
from qdora.errors import UserError
from qdora.model.build_model import Compute, find_model
from qdora.plan import budget, memory_plan, plan_view, step_time
from qdora.plan import plan_contents as parts
from qdora.plan.changes_to_fit import _candidates, with_changes
from qdora.plan.plan_contents import Change, MicroBatchShape, Moment, Plan
from qdora.plan.plan_view import plan_run
from qdora.plan.workload import assumed_workload, workload_of_data
from qdora.recipe.byte_size import parse_size, size_text
from qdora.recipe.recipe_file import override
from qdora.recipe.settings import Recipe
from qdora.run import load_base
from qdora.run.train import train_run
from qdora.train.distributed import Processes, processes_of_launch
from tests import launched, tiny_run, tiny_sharded


def test_over_budget_does_not_start_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_evaluation = {"eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    recipe = tiny_run.one_layer_recipe(tmp_path, memory__budget="100MiB", train__steps=1, **no_evaluation)
    with monkeypatch.context() as patched:
        patched.setattr(load_base, "load_model", None)  # nothing may call it
        with pytest.raises(UserError, match=r"^memory.budget: 100.0 MiB, but the run needs about 60\d"):
            train_run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train_run(recipe, tmp_path / "run", force=True)
    kept = json.loads((tmp_path / "run/plan.json").read_text())
    assert kept["fits"] is False
    assert kept["device"] == "cpu"


def test_a_run_killed_after_its_plan_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    recipe = tiny_run.one_layer_recipe(tmp_path, memory__budget="10GiB", train__steps=1, eval__at_start=False)
    with monkeypatch.context() as patched:
        patched.setattr("qdora.run.train.base_of_run", killed)
        with pytest.raises(KeyboardInterrupt):
            train_run(recipe, tmp_path / "run")
    assert (tmp_path / "run/plan.json").is_file()
    assert train_run(recipe, tmp_path / "run")["num_steps"] == 1


def test_auto_changes_what_leaves_the_numbers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_run.one_layer_recipe(
        tmp_path, memory__budget="auto", memory__checkpointing=False, train__batch=24, train__steps=1
    )
    compute = Compute(torch.device("cpu"), torch.float32)

    def within(free: int):  # type: ignore[no-untyped-def]
        monkeypatch.setattr(budget, "available_memory_bytes", lambda: free)
        monkeypatch.setattr(budget, "held_memory_bytes", lambda: 0)
        _, tokenizer = find_model(recipe)
        train, _ = read_data(recipe.data)
        mix = tokenized_mix(recipe, tokenizer, train)
        return budget.within_budget(recipe, compute, workload_of_data(recipe, mix, tokenizer))

    changed, plan = within(10 * 2**30)
    assert changed == recipe
    assert plan is not None
    assert plan.fits
    changed, tight = within(plan.peak_bytes - 1000)
    assert tight is not None
    # The plan is that of the changed recipe, which runs
    assert (tight.fits, tight.changes) == (True, ())
    assert tight.peak_bytes < plan.peak_bytes
    assert changed != recipe
    assert changed.adapter == recipe.adapter
    assert changed.train.optimizer == recipe.train.optimizer
    with pytest.raises(UserError, match="Fix: change, cheapest first"):
        within(plan.peak_bytes // 2)


def test_a_gpu_without_bfloat16_is_planned_in_float32(tmp_path: Path) -> None:
    peaks = {}
    for asked in ("auto", "bfloat16", "float32"):
        recipe = tiny_run.one_layer_recipe(tmp_path, memory__budget="10GiB", model__dtype=asked)
        dtype = torch.bfloat16 if asked == "bfloat16" else torch.float32
        same, plan = budget.within_budget(recipe, Compute(torch.device("cuda"), dtype), assumed_workload)
        assert plan is not None
        assert same == recipe
        peaks[asked] = plan.peak_bytes
    assert peaks["auto"] == peaks["float32"] > peaks["bfloat16"]


@tiny_sharded.needs_division
@pytest.mark.slow
def test_auto_divides_a_base_that_does_not_fit_whole(tmp_path: Path) -> None:
    """Eight blocks: divided among four, a process holds two, and three while they are gathered."""
    tiny_run.write_model(tmp_path / "model", num_hidden_layers=8, tie_word_embeddings=False)
    compute = Compute(torch.device("cpu"), torch.float32)

    def within(num_bytes: int, num_processes: int = 4, **changes: Any) -> tuple[Recipe, Plan]:
        given = tiny_run.recipe(tmp_path, memory__budget=f"{num_bytes}B", adapter__targets=["q_proj"], **changes)
        found, plan = budget.within_budget(given, compute, assumed_workload, processes=Processes(size=num_processes))
        assert plan is not None
        return found, plan

    same, whole = within(2**30)
    assert same.train.parallel == "auto"
    changed, plan = within(whole.peak_bytes - 1)
    assert changed.train.parallel == "shard"
    assert plan.peak_bytes < whole.peak_bytes
    assert parts.GATHERED in plan.components
    assert within(plan.peak_bytes, train__parallel="shard")[1].fits
    for refused in ({"train__parallel": "replicate"}, {"adapter__init": "loftq"}, {"num_processes": 1}):
        with pytest.raises(UserError, match=r"memory\.budget"):
            within(whole.peak_bytes - 1, **refused)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"memory\.budget"):
        within(plan.peak_bytes - 1, train__parallel="shard")


def test_what_the_process_holds_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has the whole process in it, but the system's available memory has not what it holds already."""
    monkeypatch.setattr(budget, "available_memory_bytes", lambda: 2**30)
    before = budget.held_memory_bytes()
    kept = torch.ones(2**24)
    assert budget.held_memory_bytes() - before == pytest.approx(kept.nbytes, rel=0.1)
    for held, counted in ((5, 5), (2**33, parts.CONTEXT_BYTES["cpu"])):
        monkeypatch.setattr(budget, "held_memory_bytes", lambda held=held: held)
        assert budget.free_bytes(torch.device("cpu")) == 2**30 + counted


def test_buffers_that_nccl_has_taken_count_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of several processes has them in it, and the free memory has not."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (5 * 2**30, 8 * 2**30))
    assert [budget.free_bytes(torch.device("cuda"), count) // 2**30 for count in (1, 2)] == [5, 6]


def first_has_less(rank: int, recipe: Recipe) -> None:
    asked: list[tuple[int, int]] = []

    def fit_recipe(given: Recipe, num_bytes: int, *, num_processes: int, **_: Any) -> tuple[Recipe, Any]:
        asked.append((num_bytes, num_processes))
        return given, SimpleNamespace(fits=True)

    with processes_of_launch() as processes, pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "free_bytes", lambda _device, num_processes: 1000 * num_processes + rank)
        patch.setattr(budget, "fit_recipe", fit_recipe)
        compute = Compute(torch.device("cpu"), torch.float32)
        budget.within_budget(recipe, compute, assumed_workload, processes=processes)
    assert asked == [(2000, 2)]


def test_budget_auto_is_the_same_for_all_processes(tmp_path: Path) -> None:
    """Else one could divide the base that another one holds whole, and wait for it for ever."""
    recipe = tiny_run.recipe(tmp_path, memory__budget="auto")
    assert launched.run(2, first_has_less, recipe) == ["", ""]


def test_a_refusal_says_where_the_peak_is_and_whether_the_changes_are_enough() -> None:
    shape, moments = MicroBatchShape(1, 64, 63, masked=False), [Moment("update", None, {parts.OPTIMIZER: 2**30})]
    options: dict[str, Any] = {"shape": shape, "num_micro_batches": 1, "budget_bytes": 2**30}
    found = Plan(device_kind="cpu", moments=moments, **options)
    size = "the run needs about 1.59 GiB in the update (optimizer state 1.00 GiB, context and libraries 600.0 MiB)"
    assert parts.over_budget(found) == f"memory.budget: 1.00 GiB, but {size}. Fix: start anyway with --force."
    for peak, verdict in ((2**30, ""), (2**30 + 1, " (even all of these are not enough)")):
        changes = [Change("a.b=1", 2**31, 1.0, neutral=True), Change("c.d=2, e.f=3", peak, 1.0, neutral=False)]
        fix = f"Fix: change, cheapest first: a.b=1; c.d=2, e.f=3{verdict}; or start anyway with --force."
        assert parts.over_budget(replace(found, changes=changes)).endswith(fix)
        forced = fix.replace("; or start anyway with --force", "") + " It starts all the same (--force)."
        assert parts.over_budget(replace(found, changes=changes), forced=True).endswith(forced)


def test_a_plan_is_shown(tmp_path: Path) -> None:
    recipe = tiny_run.one_layer_recipe(tmp_path, train__steps=2, train__batch=24)
    shown = io.StringIO()
    console = Console(file=shown, width=130)
    found = plan_run(recipe, "r.yaml", budget="1GiB", console=console)["memory"]
    for part in ("packed base", "total", "fits in 1.00 GiB", "Estimated time: ", "A100 40GB (assumed)"):
        assert part in shown.getvalue()
    assert sum(found["components"].values()) == found["peak_bytes"]
    shown.truncate(0)
    tight = plan_run(recipe, "r.yaml", budget="1MiB", console=console)["memory"]
    assert tight["fits"] is False
    assert tight["changes"]
    for part in ("does not fit in 1.0 MiB", "cheapest first", "Even with all of these it does not fit"):
        assert part in shown.getvalue()
    with pytest.raises(UserError, match=r"^--budget: must be a size .*, got 'much'"):
        plan_run(recipe, "r.yaml", budget="much")


def test_proposed_changes_are_options_of_the_command_line(tmp_path: Path) -> None:
    recipe, shown = tiny_run.one_layer_recipe(tmp_path, adapter__rank=16), io.StringIO()
    plan_run(recipe, "r.yaml", budget="1MiB", console=Console(file=shown))
    proposed = [line.partition(": ")[0] for line in shown.getvalue().splitlines() if line.startswith("  -s ")]
    [rank] = [line for line in proposed if "adapter.rank" in line]
    words = rank.split()
    assert words[::2] == ["-s", "-s"]
    adapter = override(recipe, words[1::2]).adapter
    assert (adapter.rank, adapter.alpha) == (8, recipe.adapter.alpha / 2)


def proposed(recipe: Recipe) -> list[str]:
    """All changes that are proposed if each saves a little and none is enough."""
    shape = MicroBatchShape(1, 64, 63, masked=False)
    options: dict[str, Any] = {"shape": shape, "num_micro_batches": 1, "block_bytes": 1000, "num_blocks": 4}
    first = Plan(device_kind="cuda", moments=[], budget_bytes=1, **options)
    sizes = (round(1e9 * 0.9**count) for count in itertools.count())

    def plan_of(_recipe: Recipe) -> Plan:
        return replace(first, moments=[Moment("forward", 0, {parts.OTHER: next(sizes)})])

    _, found = with_changes(recipe, plan_of(recipe), plan_of, lambda _recipe: 1.0)
    return [change.setting for change in found.changes]


def test_only_changes_that_go_together_are_proposed(tmp_path: Path) -> None:
    def ranks(mean_rank: float, **adapter: Any) -> list[str]:
        recipe = tiny_run.recipe(tmp_path, adapter__rank=16, adapter__gates={"mean_rank": mean_rank}, **adapter)
        return [setting for setting in proposed(recipe) if "rank" in setting]

    assert ranks(7.5) == ["adapter.rank=8, adapter.alpha=4"]
    assert ranks(8) == []
    # Either may be halved, since the gates have more components to remove in the other layers, but not both.
    assert len(ranks(7.5, adapter__experts={"rank": 16})) == 2
    assert len(ranks(8, adapter__experts={"rank": 16})) == 1

    def streamed(**changes: Any) -> bool:
        return any("residency" in setting for setting in proposed(tiny_run.recipe(tmp_path, **changes)))

    whole = {"adapter__also_train": ["embed_tokens"], "adapter__also_train_rows": "all"}
    assert streamed()
    assert streamed(**whole)
    assert not streamed(train__parallel="shard")


def test_shorter_examples_come_with_smaller_micro_batches(tmp_path: Path) -> None:
    """Else a micro-batch of 2,048 tokens would have two rows in place of one, and a mask."""
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    recipe = tiny_run.one_layer_recipe(tmp_path, data__max_length=2048, train__batch=2)
    found = memory_plan.plan(recipe, 1, config=config)
    [shorter] = [change.setting for change in found.changes if "max_length" in change.setting]
    assert shorter == "data.max_length=1024, train.micro_batch_tokens=1024, data.too_long=truncate"
    small = override(recipe, ["train.batch=null", "train.tokens_per_step=1000"])
    [alone] = [each for each in _candidates(small, "cuda")[1] if "data.max_length=1024" in each]
    assert alone == ("data.max_length=1024", "data.too_long=truncate")


def test_a_plan_does_without_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    recipe = tiny_run.one_layer_recipe(tmp_path, data__mix=[{"source": "nobody/has-this"}])
    found = plan_run(recipe, "r.yaml", console=Console(file=io.StringIO()))
    assert found["mix"] is None
    assert found["memory"]["micro_batch"]["length"] == recipe.data.max_length
    assert "cannot be read" in found["memory"]["assumptions"][0]


def test_a_plan_says_that_it_looked_at_the_first_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_view, "MOST_STEPS", 3)
    for steps, expected in ((3, []), (4, ["no micro-batch is larger than the largest of the first 3 steps"])):
        recipe = tiny_run.one_layer_recipe(tmp_path, train__steps=steps)
        found = plan_run(recipe, "r.yaml", console=Console(file=io.StringIO()))
        assert found["memory"]["assumptions"] == expected


def test_time_of_a_step_by_hand() -> None:
    work = step_time.Work(
        num_linear=1000, num_head=500, num_trainable=10, attention_width=0, quantised=True, checkpointing=True
    )
    rates = step_time.Rates("x", flops=1e3, bytes=1e6, link=1e3)
    shape = MicroBatchShape(2, 5, 8, masked=False)
    # Three passes over the base, four over the adapters; the head twice forward and backward.
    flops = 10 * 2 * (3 * 1000 + 4 * 10) + 4 * 500 * 8
    num_bytes = 3 * 4.6 * 1000
    expected = 3 * (flops / 1e3 + num_bytes / 1e6) + 300 / 1e6
    assert step_time.step_seconds(work, shape, 3, rates) == pytest.approx(expected, rel=1e-12)
    # Each of the two passes over the blocks takes as long as its computing or its copies: 30 s are hidden by the
    # backward pass (two forward passes of 20 s and what decodes), not by the forward pass.
    forward = 10 * 2 * 1000 / 1e3 + 4.6 * 1000 / 1e6
    assert step_time.forward_seconds(work, shape, rates) == pytest.approx(forward, rel=1e-12)
    away = replace(work, streamed_bytes=30_000)
    waiting = step_time.step_seconds(away, shape, 3, rates) - step_time.step_seconds(work, shape, 3, rates)
    assert waiting == pytest.approx(3 * (30 - forward), rel=1e-9)
    away = replace(work, streamed_bytes=100_000)
    waiting = step_time.step_seconds(away, shape, 3, rates) - step_time.step_seconds(work, shape, 3, rates)
    assert waiting == pytest.approx(3 * (100 - forward + 100 - 2 * forward), rel=1e-9)


def test_short_chunks_of_the_loss_read_the_head_more_often() -> None:
    work = step_time.Work(
        num_linear=0, num_head=10**6, num_trainable=0, attention_width=0, quantised=True, checkpointing=False
    )
    rates, shape = step_time.Rates("x", flops=1e9, bytes=1e7), MicroBatchShape(1, 1001, 1000, masked=False)

    def seconds(chunk: int | None) -> float:
        return step_time.step_seconds(replace(work, head_chunk=chunk), shape, 1, rates)

    # Two products of 2 * 10^6 FLOPs a token take 4 ms; two readings of 2 * 10^6 bytes take 0.4 s, as 100 tokens do.
    assert [seconds(None), seconds(100), seconds(250)] == pytest.approx([4.0, 4.0, 4.0])
    assert seconds(64) == pytest.approx(16 * 0.4)
    assert seconds(300) == pytest.approx(4.0)


@pytest.mark.slow
def test_a_change_that_computes_the_same_is_never_faster(tmp_path: Path) -> None:
    """With shorter chunks of the loss another micro-batch has the peak."""
    recipe = tiny_run.one_layer_recipe(tmp_path, data__max_length=512, train__tokens_per_step=1024, train__batch=...)
    shapes = [MicroBatchShape(16, 256, 8, masked=True), MicroBatchShape(1, 256, 255, masked=False)]
    sizes = {"vocab_size": 32_000, "hidden_size": 64, "intermediate_size": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    found = memory_plan.plan(recipe, 1, config=config, device_kind="cpu", workload=lambda _: (shapes, 2))
    assert found.shape == shapes[1]
    neutral = [change for change in found.changes if change.neutral]
    assert found.step_seconds is not None
    assert any("loss_chunk" in change.setting for change in neutral)
    assert all(change.step_seconds >= found.step_seconds for change in neutral)


@pytest.mark.parametrize(
    "text, expected",
    [("40GiB", 40 * 2**30), ("1.5 gb", 1_500_000_000), ("512 MiB", 2**29), ("2TB", 2 * 10**12)],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1 XB", "nan", "1e999"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be a size such as 40GiB"):
        parse_size(text)


def test_sizes_are_shown() -> None:
    assert [size_text(n) for n in (2048, 3 * 2**20, 5 * 2**30)] == ["2 KiB", "3.0 MiB", "5.00 GiB"]
