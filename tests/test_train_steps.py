"""The gradient of a step against float64, example by example: micro-batches, packing, weights, routers, float16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional

from qdora.data.batches import Batching, Step
from qdora.data.tokenize import TokenizedExample
from qdora.errors import UserError
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapter_parameters, inject
from qdora.train.distributed import Processes
from qdora.train.loss import check_router_loss, load_balancing_loss
from qdora.train.passes import LossScale, batch_loss, even_passes, step_gradient
from tests import reference, support

WITH_LOSS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "qwen3_5_moe_text", "qwen3_next")


def model_of(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """With adapters off their start; in float64 for what is expected."""
    if name != "llama":
        return support.adapted_mixture(directory, name, dtype)[0]
    made = support.base_model("llama", dtype=dtype)
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    layers = inject(made, rank=3, alpha=6.0, dtype=adapter, generator=torch.Generator().manual_seed(1))
    support.move_adapters_(layers)
    return made


def forward(model: Any, example: TokenizedExample) -> tuple[Tensor, list[Tensor]]:
    """NLL of an example alone, and (tokens, experts) of each router from its inputs and weights."""
    routed: list[Tensor] = []

    def see(router: Any, args: tuple[Any, ...], _output: Any) -> None:
        bias = getattr(router, "bias", None)
        product = args[0].reshape(-1, args[0].shape[-1]) @ router.weight.T
        routed.append(product if bias is None else product + bias)

    hooks = [m.register_forward_hook(see) for m in model.modules() if type(m).__name__.endswith("Router")]
    ids = torch.from_numpy(example.input_ids).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    wanted = torch.from_numpy(example.loss_mask)[1:]
    return functional.cross_entropy(logits[:-1][wanted], ids[1:][wanted], reduction="sum"), routed


def expected(
    model: Any,
    step: Step,
    examples: list[TokenizedExample],
    weights: Mapping[str, float] | None = None,
    coefficient: float = 0.0,
) -> dict[str, Any]:
    """Each example by itself, without padding, in float64: NLL of each task, auxiliary loss, gradients.

    The auxiliary loss of the routers is the mean over the micro-batches by their tokens.
    """
    parameters, by_id = adapter_parameters(model), {each.id: each for each in examples}
    share_of = weights or dict.fromkeys(step.task_label_tokens, 1.0)
    total = sum(share_of[name] * count for name, count in step.task_label_tokens.items())
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    nll = dict.fromkeys(step.task_label_tokens, 0.0)
    aux = 0.0

    def add(found: Any) -> None:
        for gradient, each in zip(gradients.values(), found, strict=True):
            gradient += each

    for micro in step.micro_batches:
        routed = []
        for name in micro.example_ids:
            loss, routers = forward(model, by_id[name])
            routed.append(routers)
            nll[by_id[name].task] += float(loss.detach())
            objective = share_of[by_id[name].task] * loss / total
            add(torch.autograd.grad(objective, [*parameters.values()], retain_graph=bool(routers)))
        if not coefficient:
            continue
        layers = [torch.cat(each) for each in zip(*routed, strict=True)]
        value, upstream = reference.load_balancing([each.detach().numpy() for each in layers], 2)
        share = len(layers[0]) / step.num_tokens
        aux += share * value
        given = [torch.from_numpy(each) * (share * coefficient) for each in upstream]
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        add(torch.autograd.grad(layers, [*parameters.values()], given, **options))
    return {"nll": nll, "aux": aux, "gradients": gradients}


def flat(gradients: Any) -> Any:
    return torch.cat([each.flatten().double() for each in gradients]).numpy()


def gradient_of(model: Any) -> Any:
    return flat([p.grad for p in adapter_parameters(model).values() if p.grad is not None])


WEIGHTS = {"a": 2.0, "b": 0.25}
ROUTED = {"coefficient": 0.5}
CASES: dict[str, tuple[str, Batching, bool, bool, dict[str, Any]]] = {
    "one micro-batch": ("llama", Batching(200, 0), False, False, {}),
    "padded micro-batches": ("llama", Batching(24, 0), True, False, {}),
    "weights": ("llama", Batching(40, 0), False, False, {"weights": WEIGHTS}),
    "packed rows": ("llama", Batching(50, 0, "rows", 25), True, False, {"weights": WEIGHTS}),
    "one packed row": ("llama", Batching(50, 0, "single"), False, False, {}),
    "routers": ("qwen3_moe", Batching(40, 0), False, False, ROUTED),
    "packed routers": ("mixtral", Batching(40, 0, "rows", 20), True, True, ROUTED | {"weights": WEIGHTS}),
    "routers with a bias": ("gpt_oss", Batching(40, 0), True, False, ROUTED),
}


@pytest.mark.parametrize("case", [*[*CASES][:-1], pytest.param([*CASES][-1], marks=pytest.mark.slow)])
def test_a_step_is_a_ratio_of_sums_over_its_examples(tmp_path: Path, case: str) -> None:
    name, batching, checkpointing, scaled, settings = CASES[case]
    examples = support.examples()
    step = support.step_of(examples, batching)
    assert len(step.micro_batches) > 1 or case == "one micro-batch"
    wanted = expected(model_of(name, tmp_path, torch.float64), step, examples, **settings)
    model = model_of(name, tmp_path).train()
    if checkpointing:
        recompute_activations(model)
    options: dict[str, Any] = {"weights": settings.get("weights"), "loss_scale": LossScale() if scaled else None}
    coefficient = settings.get("coefficient", 0.0)
    metrics, example_nll = step_gradient(model, step, router_aux_loss=coefficient, **options)
    assert metrics["loss"] == pytest.approx(sum(wanted["nll"].values()) / step.num_label_tokens, rel=1e-5)
    assert metrics["tasks"].keys() == wanted["nll"].keys()
    for task, numbers in metrics["tasks"].items():
        assert numbers["nll_sum"] == pytest.approx(wanted["nll"][task], rel=1e-5)
        assert numbers["num_tokens"] == sum(int(each.loss_mask.sum()) for each in examples if each.task == task)
    assert sum(map(len, example_nll)) == metrics["num_examples"] == len(examples)
    assert float(sum(each.sum() for each in example_nll)) == pytest.approx(sum(wanted["nll"].values()), rel=1e-5)
    assert metrics["num_tokens"] == sum(map(len, examples))
    gradient = flat(wanted["gradients"].values())
    assert reference.relative_error(gradient_of(model), gradient) < 1e-4
    assert ("router_aux_loss" in metrics) == bool(coefficient)
    if coefficient:
        assert metrics["router_aux_loss"] == pytest.approx(wanted["aux"], rel=1e-5)
        plain = expected(model_of(name, tmp_path, torch.float64), step, examples, settings.get("weights"))
        plain = flat(plain["gradients"].values())
        assert reference.relative_error(plain, gradient) > 0.02, "the loss of the routers does not show"


def test_float16_keeps_the_gradients_of_a_step_of_many_tokens(tmp_path: Path) -> None:
    """This process holds a share of the step's 32,768 labelled tokens; without a loss scale the gradients underflow."""
    examples = support.examples([40, 33, 37, 28], tasks="a")
    step = support.step_of(examples, Batching(96, 0))
    step = replace(step, num_label_tokens=32_768, task_label_tokens={"a": 32_768})
    wanted = expected(model_of("llama", tmp_path, torch.float64), step, examples)["gradients"]
    assert len(wanted) == 42
    for scale in (LossScale(), None):
        model, worst = model_of("llama", tmp_path, torch.float16), 1.0
        step_gradient(model, step, loss_scale=scale)
        for name, parameter in adapter_parameters(model).items():
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            one, other = parameter.grad.double().flatten(), wanted[name].flatten()
            worst = min(worst, float(functional.cosine_similarity(one, other, dim=0)))
            assert scale is None or float(one.norm() / other.norm()) == pytest.approx(1, abs=5e-3)
        assert worst > 0.9999 if scale else worst < 0.99


def test_a_process_without_an_example_takes_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the base is divided it computes as many passes as the others, of which none counts."""
    step = replace(support.step_of(support.examples(), Batching(40, 0)), micro_batches=[])
    model = model_of("llama", tmp_path).train()
    metrics, example_nll = step_gradient(model, step, loss_scale=LossScale())
    tasks = {name: {"nll_sum": 0.0, "num_tokens": count} for name, count in step.task_label_tokens.items()}
    assert (metrics["loss"], metrics["tasks"], example_nll) == (0, tasks, [])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert even_passes(step, Processes(1, 2)) is step
    monkeypatch.setattr(Processes, "gather", lambda self, value: [2, value])
    step = even_passes(step, Processes(1, 2, shards=True))
    assert len(step.micro_batches) == 2
    metrics, example_nll = step_gradient(model, step, weights=WEIGHTS, router_aux_loss=0.0)
    assert (metrics["loss"], metrics["tasks"], example_nll) == (0, tasks, [])
    assert not gradient_of(model).any()
    assert len(gradient_of(model)) > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_of_router_logits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    routers = [(torch.randn(11, 7, generator=generator, dtype=torch.float64) * 3).to(dtype) for _ in range(3)]
    routers[1][:, 2] += 30.0  # for certain
    leaves = [each.clone().requires_grad_() for each in routers]
    real = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0])
    value = load_balancing_loss(leaves, 3, real)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    kept = real.bool()
    wanted, gradients = reference.load_balancing([each[kept].double().numpy() for each in routers], 3)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    assert float(value.detach()) == pytest.approx(wanted, rel=tolerance)
    found = torch.stack(torch.autograd.grad(value, leaves))
    assert not found[:, ~kept].any()
    # A gradient in bf16 is rounded once.
    most = 5e-3 if dtype == torch.bfloat16 else tolerance
    assert reference.relative_error(found[:, kept].double().numpy(), np.stack(gradients)) < most
    alike = torch.tensor([[40.0, 0.0, 0.0, 0.0]]).expand(5, 4)
    assert float(load_balancing_loss([alike], 1, torch.ones(5))) == pytest.approx(4.0)


def ids_and_mask(rows: int = 3, length: int = 9) -> tuple[Tensor, Tensor]:
    """The second row is padded after five tokens."""
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return ids, mask


@pytest.mark.parametrize("name", WITH_LOSS)
def test_it_is_the_loss_of_transformers(tmp_path: Path, name: str) -> None:
    model, _ = support.adapted_mixture(tmp_path, name, torch.float32, targets=["o_proj"])
    ids, mask = ids_and_mask()
    library = model(ids, attention_mask=mask, output_router_logits=True)
    found = batch_loss(model, ids, mask, ids.clone(), routers=True)
    assert found.router_loss is not None
    torch.testing.assert_close(found.router_loss, library.aux_loss, rtol=1e-5, atol=1e-6)
    assert batch_loss(model, ids, mask, ids.clone()).router_loss is None


def test_which_models_have_one(root: Path) -> None:
    recipe = support.tiny_recipe(root, train__router_aux_loss=0.05)
    for name in ("Qwen3VLMoeConfig", "Glm4vMoeConfig"):  # images and texts: the loss of the family
        check_router_loss(recipe, getattr(transformers, name)())
    for name in ("llama4_text", "deepseek_v3"):
        with pytest.raises(UserError, match=f"train.router_aux_loss: must be 0 with {name}, got 0.05"):
            check_router_loss(recipe, support.mixture(name).config)
    ids, mask = ids_and_mask(2, 7)
    with pytest.raises(UserError, match=r"router_aux_loss: must be 0 with this model: .* no logits of routers"):
        batch_loss(support.mixture("qwen3_moe", mlp_only_layers=[0, 1]), ids, mask, ids.clone(), routers=True)
