"""Plans of mixtures of experts: bytes against counted steps, routing, and no more work for more experts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from qdora.adapter import expert_product, expert_tokens
from qdora.adapter.prepared_gains import prepare_gains
from qdora.memory.allocator import keep_freed_memory
from qdora.model.adapter_file import save_adapter
from qdora.model.build_model import Compute, put_adapters
from qdora.model.experts import stacks, use_expert_layers_
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.model.source import resolve
from qdora.plan import memory_plan, plan_view
from qdora.plan.changes_to_fit import _candidates
from qdora.plan.live_bytes import LiveBytes
from qdora.plan.memory_plan import fit_recipe, plan
from qdora.plan.plan_contents import CONTEXT_BYTES, MicroBatchShape, Moment, Plan
from qdora.plan.public_shapes import public_shapes
from qdora.plan.step_time import Rates, Work, step_seconds
from qdora.plan.workload import assumed_workload
from qdora.quant.planned_device import planned_counts, planned_on
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.settings import Recipe
from qdora.run.base import load_base
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.passes import batch_loss
from tests import support
from tests.test_plan_memory import a_recipe as dense_recipe


def a_recipe(source: str = "org/model", **changes: Any) -> Recipe:
    own: dict[str, Any] = {"model__source": source, "adapter__rank": 8, "memory__loss_chunk": 64}
    own |= {"train": {"steps": 2, "batch": 2, "micro_batch_tokens": 64, "optimizer": "adamw"}}
    return dense_recipe(**own | changes)


def a_config(name: str, **changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(name, **(support.EXPERT_SIZES | support.MIXTURES[name] | changes))


def force_routing(model: Any, choose: Any) -> None:
    """Let `choose(tokens, k, experts)` say the experts of each token, (tokens, k), in place of the router."""

    def forced(experts: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, chosen, weights = inputs
        return hidden, choose(*chosen.shape, experts.down_proj.num_experts), weights

    for path in stacks(model):
        if path.endswith(".down_proj"):
            model.get_submodule(path.removesuffix(".down_proj")).register_forward_pre_hook(forced)


def evenly(tokens: int, k: int, experts: int) -> Tensor:
    return (torch.arange(tokens * k) % experts).view(tokens, k)


def all_alike(tokens: int, k: int, experts: int) -> Tensor:
    """Every token chooses the same k experts, which are not neighbours."""
    return (torch.arange(k) * 2).expand(tokens, k)


def counted_step(recipe: Recipe, choose: Any, length: int) -> int:
    """The most bytes alive in the second step of a real run on the CPU, of two micro-batches of one row."""
    keep_freed_memory()
    ids = torch.randint(3, 400, (1, length), generator=torch.Generator().manual_seed(7))
    with LiveBytes() as live:
        model = load_base(recipe, resolve(recipe.model.source), Compute(torch.device("cpu"), torch.bfloat16))
        put_adapters(model, recipe)
        force_routing(model, choose)
        optimizer = AdapterOptimizer(adapter_parameters(model), name=recipe.train.optimizer)
        model.train()
        for _ in range(2):
            live.reset_peak()
            prepare_gains(adapted_layers(model).values())
            for _ in range(2):
                routers = recipe.train.router_aux_loss > 0
                loss = batch_loss(model, ids, torch.ones_like(ids), ids.clone(), chunk=64, routers=routers)
                total = loss.nll_sum if loss.router_loss is None else loss.nll_sum + loss.router_loss
                del loss
                total.backward()  # type: ignore[no-untyped-call]
                del total
            optimizer.scale_gradients_(1.0 / optimizer.gradient_norm())
            optimizer.step(1e-4)
            optimizer.zero_grad()
    return live.peak_bytes


def check_bytes(directory: Path, name: str, length: int, sizes: dict[str, Any], **changes: Any) -> Plan:
    """Compare planned with counted bytes, evenly routed and skewed; returns the plan."""
    support.mixture(name, torch.bfloat16, **sizes).save_pretrained(directory)
    recipe = a_recipe(str(directory), **changes)
    shape = MicroBatchShape(1, length, length - 1, masked=False, accumulated=True)
    found = plan(recipe, device_kind="cpu", workload=lambda _recipe: ([shape], 2))
    assert found.even_routing_bytes is not None
    even = found.even_routing_bytes - CONTEXT_BYTES["cpu"]
    counted = [counted_step(recipe, choose, length) for choose in (evenly, all_alike)]
    ratios = [even / counted[0], found.tensor_bytes / counted[1]]
    assert ratios == [pytest.approx(1.0, abs=0.03)] * 2, ratios
    return found


def test_planned_bytes_are_those_of_a_counted_step(tmp_path: Path) -> None:
    """Half of the bytes are tensors of tokens, so that routing makes a difference of more than the tolerance."""
    sizes = {"num_local_experts": 8, "intermediate_size": 256, "num_hidden_layers": 1, "max_position_embeddings": 512}
    found = check_bytes(tmp_path, "mixtral", 512, sizes)
    assert found.even_routing_bytes is not None
    # The worst routing decides whether a run fits.
    between = (found.even_routing_bytes + found.peak_bytes) // 2
    assert found.peak_bytes - found.even_routing_bytes > 0.03 * found.tensor_bytes
    assert replace(found, budget_bytes=between).fits is False


MANY = {"qwen3_moe": "num_experts", "qwen3_next": "num_experts", "gpt_oss": "num_local_experts"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"adapter__dropout": 0.1, "memory__checkpointing": False}),
        ("qwen3_moe", {"adapter__experts": {"rank": 2, "share": "B"}, "base__quant": "int8"}),
        ("qwen3_moe", {"adapter__targets": ["q_proj", "v_proj"], "base__double_quant": False}),
        ("gpt_oss", {"adapter__kind": "lora"}),
        ("deepseek_v3", {"adapter__experts": {"rank": 4, "share": "A"}}),
        ("qwen3_next", {}),  # linear attention
        ("qwen3_next", {"memory__checkpointing": False, "adapter__kind": "lora"}),
    ],
)
def test_planned_bytes_of_other_mixtures(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    wide = "intermediate_size" if name == "gpt_oss" else "moe_intermediate_size"
    sizes = {wide: 256, MANY.get(name, "n_routed_experts"): 16, "max_position_embeddings": 2048}
    if name != "qwen3_next":
        sizes |= {"hidden_size": 128} | ({} if name == "deepseek_v3" else {"head_dim": 32})
    check_bytes(tmp_path, name, 1100 if name == "qwen3_next" else 768, sizes, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
def test_launches_that_a_plan_leaves_out_change_no_bytes(device_kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves out those like the ones before them, so that more experts take no longer."""
    monkeypatch.setattr(expert_product, "_RUN_BYTES", 3 * 128 * 64 * 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))  # a plan has grouped products
    options: dict[str, Any] = {"config": a_config("qwen3_moe", num_experts=24, num_hidden_layers=1)}
    options |= {"device_kind": device_kind}
    found = plan(a_recipe(adapter__experts={"rank": 8}), **options)
    for module in (expert_product, expert_tokens):
        monkeypatch.setattr(module, "is_planning", lambda: False)
    memory_plan._latest.clear()  # else it would be the same plan
    whole = plan(a_recipe(adapter__experts={"rank": 8}), **options)
    assert whole.moments == found.moments
    assert whole.even_routing_bytes == found.even_routing_bytes


def test_a_changed_recipe_is_planned_for_the_worse_routing_too() -> None:
    """Here tokens that divide evenly need more: a change judged by the other routing seems to save what it does not."""
    config = a_config("qwen3_moe", num_hidden_layers=1, num_experts=16, num_experts_per_tok=8)
    recipe = a_recipe(memory__keep_scales=False, train__batch=1, data__max_length=256, train__micro_batch_tokens=256)
    options: dict[str, Any] = {"config": config, "device_kind": "cuda", "workload": assumed_workload}
    _, first = fit_recipe(recipe, None, **options)
    changed, found = fit_recipe(recipe, first.peak_bytes - 1, **options)
    _, after = fit_recipe(changed, None, **options)
    assert first.peak_bytes == first.even_routing_bytes
    assert found.changes[-1].peak_bytes == after.peak_bytes == after.even_routing_bytes


def test_tokens_are_divided_evenly_or_nearly_all_alike() -> None:
    with planned_on("cuda"):
        assert planned_counts(10, 2, 6) == [4, 4, 3, 3, 3, 3]
    with planned_on("cuda", "skewed"):
        # Two experts have all tokens but one for each of the others, and no two of those reached are neighbours.
        assert planned_counts(10, 2, 8) == [9, 0, 9, 0, 1, 0, 1, 0]
        assert planned_counts(10, 2, 3) == [10, 0, 10]
        assert planned_counts(5, 1, 1) == [5]
        assert planned_counts(4, 3, 4) == [4, 4, 3, 1]  # too few experts to leave any out
        assert planned_counts(1, 2, 8) == [1, 0, 1, 0, 0, 0, 0, 0]
    counts = planned_counts(4096, 8, 128)
    assert (sum(counts), max(counts)) == (4096 * 8, 256)


def test_a_plan_says_what_routing_decides() -> None:
    shape, moments = MicroBatchShape(1, 64, 63, masked=False), [Moment("forward", 0, {"activations": 2**31})]
    close, apart = (
        Plan(device_kind="cpu", moments=moments, shape=shape, num_micro_batches=1, even_routing_bytes=share * 2**20)
        for share in (2640, 2000)
    )
    assert close.peak_bytes == 2**31 + CONTEXT_BYTES["cpu"]
    assert (close.depends_on_routing, apart.depends_on_routing) == (False, True)
    assert apart.to_dict()["even_routing_bytes"] == 2000 * 2**20
    (said,) = (line for line in plan_view.plan_lines(apart) if "Experts" in line)
    assert said.startswith("Experts: 2.59 GiB if nearly all tokens choose the same ones")
    assert "1.95 GiB if tokens divide evenly" in said
    assert not any("Experts" in line for line in plan_view.plan_lines(close))


def test_fewer_ranks_of_experts_are_proposed_and_a_token_meets_few_of_the_weights() -> None:
    halved, single, shared = (
        str(_candidates(a_recipe(adapter__experts=experts), "cuda"))
        for experts in ({"rank": 6}, {"rank": 1}, {"share": "A"})
    )
    assert "'adapter.experts.rank=3'" in halved
    assert "experts" not in single + shared
    rates, shape = Rates("round", 1e12, 1e30), MicroBatchShape(1, 100, 0, masked=False)
    work = Work(num_linear=1000, num_head=0, num_trainable=10, attention_width=0, quantised=True, checkpointing=True)
    dense, mixture = (step_seconds(each, shape, 1, rates) for each in (work, replace(work, share_met=0.25)))
    assert mixture == pytest.approx(dense / 4)


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("qwen3-30b-a3b-24gb", 24), ("gpt-oss-20b-24gb", 24), ("qwen3-30b-a3b-8gb", 8)])
def test_the_recipes_of_mixtures_fit_their_card(name: str, size: int) -> None:
    recipe = load_recipe(name)
    found = plan(recipe, config=public_shapes()[recipe.model.source].config())
    assert found.budget_bytes == size * 10**9
    assert found.peak_bytes < 0.95 * found.budget_bytes


@pytest.mark.parametrize("share", ["none", pytest.param("A", marks=pytest.mark.slow)])
def test_a_plan_has_the_adapters_of_experts_that_a_run_goes_on_from(tmp_path: Path, share: str) -> None:
    """They need what fresh ones of the same ranks need."""
    config = a_config("qwen3_moe", num_hidden_layers=1)
    fresh = a_recipe(adapter__experts={"rank": 2, "share": share}, base__quant="nf4")
    model = support.mixture("qwen3_moe", num_hidden_layers=1)
    use_expert_layers_(model)
    put_adapters(model, fresh)
    save_adapter(model, tmp_path / "adapter", base_name_or_path="x", revision=None, base_quant={"quant": "nf4"})
    again = a_recipe(base__quant="nf4", adapter__resume_from=str(tmp_path / "adapter"), adapter__rank=...)
    wanted, found = (plan(recipe, config=config, device_kind="cpu") for recipe in (fresh, again))
    assert found.num_trainable == wanted.num_trainable == sum(p.numel() for p in adapter_parameters(model).values())
    assert found.moments == wanted.moments
