"""The auxiliary loss of routers: against float64 and transformers, in steps and whole runs, planned, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from qdora.data.batching import Batching, micro_batches
from qdora.data.loader import Step
from qdora.errors import Interrupted, UserError
from qdora.model.build_model import recompute_activations
from qdora.model.experts import stacks
from qdora.model.inject import adapter_parameters
from qdora.ops.load_balance import load_balancing_loss
from qdora.plan.memory_plan import plan
from qdora.plan.plan_contents import MicroBatchShape
from qdora.run.train import train_run
from qdora.train.loss_scale import LossScale
from qdora.train.packed_attention import packed_layout
from qdora.train.passes import batch_loss, step_gradient
from qdora.train.router_loss import check_router_loss
from tests import launched, reference, tiny_experts, tiny_multimodal, tiny_run
from tests.run_files import assert_same_run, stop_after, timeless, trained
from tests.test_data_batching import examples_of
from tests.test_plan_experts import a_recipe, counted_step, evenly
from tests.test_train_distributed import assert_close_runs

WITH_LOSS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "qwen3_5_moe_text", "qwen3_next")
LENGTHS = (17, 12, 9, 9, 8, 5, 3, 1, 6, 2)
CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"train__steps": 4, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}


def a_step(packed: Any, micro: int = 40) -> Step:
    batches = micro_batches(examples_of(LENGTHS), Batching(micro, 0, packed, 20), ["a", "b"])
    labels = sum(int(each.loss_mask.sum()) for each in examples_of(LENGTHS))
    counts = {name: sum(int(e.loss_mask.sum()) for e in examples_of(LENGTHS) if e.task == name) for name in "ab"}
    return Step(batches, labels, sum(LENGTHS), 10, counts)


def gradient_of(model: Any) -> Any:
    return torch.cat([p.grad.flatten().double() for p in adapter_parameters(model).values()]).numpy()


def router_logits(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of one example alone, (tokens, experts) each, from the inputs and weights of the routers."""
    found = []

    def see(router: Any, args: tuple[Any, ...], _output: Any) -> None:
        bias = getattr(router, "bias", None)
        product = args[0].reshape(-1, args[0].shape[-1]) @ router.weight.T
        found.append(product if bias is None else product + bias)

    routers = [each for each in model.modules() if type(each).__name__.endswith("Router")]
    assert len(routers) == 2
    hooks = [each.register_forward_hook(see) for each in routers]
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return [logits, *found]


def expected(model: Any, step: Step, coefficient: float) -> tuple[float, float, Any, Any]:
    """NLL a label, auxiliary loss, the gradient of their sum with the coefficient, and that of the first alone.

    Each example runs by itself, without padding. The auxiliary loss and its gradient are those of the reference.
    """
    by_id = {each.id: each for each in examples_of(LENGTHS)}
    parameters = list(adapter_parameters(model).values())
    nll, aux, both, alone = 0.0, 0.0, 0.0, 0.0

    def flat(gradients: Any) -> Any:
        return torch.cat([grad.flatten() for grad in gradients]).numpy()

    for micro in step.micro_batches:
        routed: list[list[torch.Tensor]] = []
        for name in micro.example_ids:
            example = by_id[name]
            ids = torch.from_numpy(example.input_ids).long()
            logits, *of_routers = router_logits(model, ids)
            routed.append(of_routers)
            wanted = torch.from_numpy(example.loss_mask)[1:]
            loss = torch.nn.functional.cross_entropy(logits[:-1][wanted], ids[1:][wanted], reduction="sum")
            nll += float(loss.detach())
            grads = flat(torch.autograd.grad(loss / step.num_label_tokens, parameters, retain_graph=True))
            both, alone = both + grads, alone + grads
        layers = [torch.cat(each) for each in zip(*routed, strict=True)]
        value, upstream = reference.load_balancing([each.detach().numpy() for each in layers], 2)
        share = len(layers[0]) / step.num_tokens
        aux += share * value
        given = [torch.from_numpy(each) * (share * coefficient) for each in upstream]
        found = torch.autograd.grad(layers, parameters, given, allow_unused=True, materialize_grads=True)
        both = both + flat(found)
    return nll / step.num_label_tokens, aux, both, alone


@pytest.mark.parametrize(
    ("name", "packed", "checkpointing", "scaled"),
    [
        ("qwen3_moe", None, False, False),
        ("mixtral", "rows", True, True),
        pytest.param("mixtral", None, True, False, marks=pytest.mark.slow),
        pytest.param("gpt_oss", None, True, False, marks=pytest.mark.slow),
    ],
)
def test_a_step_adds_the_mean_of_its_micro_batches_by_tokens(
    tmp_path: Path, name: str, packed: Any, checkpointing: bool, scaled: bool
) -> None:
    step, coefficient = a_step(packed), 0.5
    assert len({int(micro.attention_mask.sum()) for micro in step.micro_batches}) > 1
    assert any(bool((micro.attention_mask == 0).any()) for micro in step.micro_batches)
    nll, aux, gradient, of_nll = expected(tiny_experts.adapted(tmp_path, name)[0], step, coefficient)
    model, _ = tiny_experts.adapted(tmp_path, name, torch.float32)
    assert packed is None or packed_layout(model)[0] is not None
    model.train()
    if checkpointing:
        recompute_activations(model)
    scale = LossScale() if scaled else None
    metrics, _ = step_gradient(model, step, device=CPU, router_aux_loss=coefficient, loss_scale=scale)
    assert metrics["loss"] == pytest.approx(nll, rel=1e-5)
    assert metrics["router_aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert reference.relative_error(gradient_of(model), gradient) < 1e-4
    assert reference.relative_error(of_nll, gradient) > 0.02, "the loss of the routers does not show"


def test_it_is_off_by_default_and_beside_weights_of_tasks(tmp_path: Path) -> None:
    step = a_step(None)

    def gradient(**settings: Any) -> Any:
        model, _ = tiny_experts.adapted(tmp_path, "mixtral", torch.float32)
        metrics, _ = step_gradient(model.train(), step, device=CPU, **settings)
        assert ("router_aux_loss" in metrics) == bool(settings.get("router_aux_loss"))
        return gradient_of(model)

    off = gradient()
    assert np.array_equal(off, gradient(router_aux_loss=0.0))
    plain = gradient(router_aux_loss=0.5) - off
    weights = {"a": 3.0, "b": 0.5}
    weighted = gradient(router_aux_loss=0.5, weights=weights) - gradient(weights=weights)
    assert reference.relative_error(weighted, plain) < 1e-4, "the weights of tasks are those of their NLL"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_of_router_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    routers = [(torch.randn(11, 7, generator=generator, dtype=torch.float64) * 3).to(dtype) for _ in range(3)]
    routers[1][:, 2] += 30.0  # for certain
    leaves = [each.clone().requires_grad_() for each in routers]
    real = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0])
    value = load_balancing_loss(leaves, 3, real)
    wide = torch.promote_types(dtype, torch.float32)
    assert value.dtype == wide
    kept = real.bool()
    wanted, gradients = reference.load_balancing([each[kept].double().numpy() for each in routers], 3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    assert float(value.detach()) == pytest.approx(wanted, rel=tolerance)
    found = torch.stack(torch.autograd.grad(value, leaves))
    assert not found[:, ~kept].any()
    # A gradient in bf16 is rounded once.
    most = 5e-3 if dtype == torch.bfloat16 else tolerance
    assert reference.relative_error(found[:, kept].double().numpy(), np.stack(gradients)) < most
    assert float(load_balancing_loss([torch.zeros(4, 8)], 2, torch.ones(4))) == pytest.approx(2.0)
    alike = torch.tensor([[40.0, 0.0, 0.0, 0.0]]).expand(5, 4)
    assert float(load_balancing_loss([alike], 1, torch.ones(5))) == pytest.approx(4.0)


@pytest.mark.parametrize("name", WITH_LOSS)
def test_it_is_the_loss_of_transformers(tmp_path: Path, name: str) -> None:
    model, _ = tiny_experts.adapted(tmp_path, name, torch.float32, targets=["o_proj"])
    if name == "granitemoe" and not stacks(model):
        pytest.skip("this release of transformers has no interface for Granite's experts")
    ids = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    library = model(ids, attention_mask=mask, output_router_logits=True)
    if name == "granitemoe" and not library.router_logits:
        pytest.skip("this release of transformers gives no logits of Granite's routers")
    wanted = library.aux_loss
    found = batch_loss(model, ids, mask, ids.clone(), routers=True)
    assert found.router_loss is not None
    torch.testing.assert_close(found.router_loss, wanted, rtol=1e-5, atol=1e-6)
    assert batch_loss(model, ids, mask, ids.clone()).router_loss is None


def recipe(root: Path, name: str = "qwen3_moe", **changes: Any) -> Any:
    folder = root / name
    if not (folder / "model").exists():
        tiny_experts.write(folder / "model", name)
    return tiny_run.recipe(
        folder, **({"adapter__experts": {"rank": 2}, "train__router_aux_loss": 0.05} | SHORT | changes)
    )


def test_a_resumed_run_equals_an_uninterrupted_one(root: Path, tmp_path: Path, monkeypatch: Any) -> None:
    asked = recipe(root, data__packing=True)
    train_run(asked, tmp_path / "whole")
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train_run(asked, tmp_path / "run")
    monkeypatch.undo()
    train_run(asked, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run", step=4)
    lines = trained(tmp_path / "whole")
    assert all(0.5 < line["router_aux_loss"] < 4.0 for line in lines)
    for line in lines:
        nll = sum(task["nll_sum"] for task in line["tasks"].values()) / line["num_label_tokens"]
        assert line["loss"] == pytest.approx(nll)
    train_run(recipe(root, data__packing=True, train__router_aux_loss=0.0), tmp_path / "off")
    assert not any("router_aux_loss" in line for line in timeless(tmp_path / "off"))
    assert trained(tmp_path / "off")[-1]["loss"] != lines[-1]["loss"]
    assert trained(tmp_path / "off")[0]["loss"] == lines[0]["loss"]


def run(rank: int, settings: Any, directory: Path) -> None:
    train_run(settings, directory)


@pytest.mark.slow
def test_two_processes_train_what_one_does(root: Path, tmp_path: Path) -> None:
    """Where their micro-batches are the same ones: two examples a step, each its own micro-batch."""
    exact = {"adapter__dropout": 0.0, "adapter__dtype": "float32", "train__batch": 2}
    recipe(root)  # writes the data
    own = {"data__mix": [{"source": str(root / "qwen3_moe/data/sums.jsonl")}], "data__max_length": 12}
    asked = recipe(root, train__micro_batch_tokens=12, **own, **exact)
    assert launched.run(2, run, asked, tmp_path / "two") == ["", ""]
    train_run(asked, tmp_path / "one")
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    for one, two in zip(trained(tmp_path / "one"), trained(tmp_path / "two"), strict=True):
        assert one["num_tokens"] > 12, "both examples fit into a micro-batch"
        assert one["router_aux_loss"] == pytest.approx(two["router_aux_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["llama4_text", "deepseek_v3", "lfm2_moe"])
def test_a_model_without_one_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    said = f"train.router_aux_loss: must be 0 with {name}, got 0.05; it needs a causal model for "
    asked = recipe(root, name)
    with pytest.raises(UserError) as error:
        train_run(asked, tmp_path / "run")
    assert str(error.value) == said + "which transformers has an auxiliary loss of routers."
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="router_aux_loss: must be 0 with"):
        plan(asked)


@pytest.mark.parametrize("name", ["Qwen3VLMoeConfig", "Qwen3_5MoeConfig", "Glm4vMoeConfig"])
def test_a_mixture_of_images_and_texts_has_the_loss_of_its_family(root: Path, name: str) -> None:
    check_router_loss(recipe(root), getattr(transformers, name)())


def test_a_mixture_of_images_and_texts_has_the_loss_of_its_text_model(root: Path) -> None:
    text = tiny_multimodal.TEXT | {"model_type": "mixtral", "head_dim": 16, "sliding_window": None}
    text |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    vision = tiny_multimodal.TOWER | {"model_type": "pixtral", "head_dim": 16}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_id=396)
    check_router_loss(recipe(root), config)
    torch.manual_seed(0)
    whole = transformers.AutoModelForImageTextToText.from_config(config)
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = batch_loss(whole, ids, mask, ids.clone(), routers=True).router_loss
    alone = transformers.MixtralForCausalLM(config.get_text_config())
    alone.model.load_state_dict(whole.get_decoder().state_dict())
    theirs = alone(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    assert found is not None
    assert found.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_a_mixture_without_routers_is_refused() -> None:
    model = tiny_experts.make("qwen3_moe", mlp_only_layers=[0, 1])
    ids = torch.randint(3, 300, (2, 5), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"router_aux_loss: must be 0 with this model: .* no logits of routers"):
        batch_loss(model, ids, torch.ones_like(ids), ids.clone(), routers=True)


@pytest.mark.slow
def test_a_plan_has_what_it_keeps(tmp_path: Path) -> None:
    sizes = {"num_experts": 128, "num_hidden_layers": 1, "moe_intermediate_size": 16, "max_position_embeddings": 512}
    tiny_experts.make("qwen3_moe", torch.bfloat16, **sizes).save_pretrained(tmp_path)
    shape = MicroBatchShape(1, 512, 511, masked=False, accumulated=True)
    counted_step(a_recipe(str(tmp_path), adapter__targets=["q_proj"]), evenly, 512)  # leaves tables that others find
    planned, counted = [], []
    for factor in (0.0, 0.01):
        asked = a_recipe(str(tmp_path), train__router_aux_loss=factor, adapter__targets=["q_proj"])
        found = plan(asked, device_kind="cpu", workload=lambda _recipe: ([shape], 2)).even_routing_bytes
        assert found is not None
        planned.append(found)
        counted.append(counted_step(asked, evenly, 512))
    logits_of_router = 512 * 128 * 2
    assert counted[1] - counted[0] >= logits_of_router
    assert planned[1] - planned[0] == pytest.approx(counted[1] - counted[0], rel=0.1)
