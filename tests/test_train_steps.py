"""The gradient of a step against float64, example by example: micro-batches, packing, weights, experts, float16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qdora.data.batches import Batching, Step
from qdora.data.tokenize import TokenizedExample
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapter_parameters, inject
from qdora.train.distributed import Processes
from qdora.train.passes import LossScale, even_passes, step_gradient
from tests import reference, support


def model_of(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """With adapters off their start; in float64 for what is expected."""
    if name != "llama":
        return support.adapted_mixture(directory, name, dtype)[0]
    made = support.base_model("llama", dtype=dtype)
    adapter = torch.float64 if dtype == torch.float64 else torch.float32
    layers = inject(made, rank=3, alpha=6.0, dtype=adapter, generator=torch.Generator().manual_seed(1))
    support.move_adapters_(layers)
    return made


def nll_of(model: Any, example: TokenizedExample) -> Tensor:
    """NLL of an example alone."""
    ids = torch.from_numpy(example.input_ids).long()
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    wanted = torch.from_numpy(example.loss_mask)[1:]
    return functional.cross_entropy(logits[:-1][wanted], ids[1:][wanted], reduction="sum")


def expected(
    model: Any, step: Step, examples: list[TokenizedExample], weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Each example by itself, without padding, in float64: NLL of each task, gradients."""
    parameters, by_id = adapter_parameters(model), {each.id: each for each in examples}
    share_of = weights or dict.fromkeys(step.task_label_tokens, 1.0)
    total = sum(share_of[name] * count for name, count in step.task_label_tokens.items())
    gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
    nll = dict.fromkeys(step.task_label_tokens, 0.0)
    for name in (name for micro in step.micro_batches for name in micro.example_ids):
        loss = nll_of(model, by_id[name])
        nll[by_id[name].task] += float(loss.detach())
        found = torch.autograd.grad(share_of[by_id[name].task] * loss / total, [*parameters.values()])
        for gradient, each in zip(gradients.values(), found, strict=True):
            gradient += each
    return {"nll": nll, "gradients": gradients}


def flat(gradients: Any) -> Any:
    return torch.cat([each.flatten().double() for each in gradients]).numpy()


def gradient_of(model: Any) -> Any:
    return flat([p.grad for p in adapter_parameters(model).values() if p.grad is not None])


WEIGHTS = {"a": 2.0, "b": 0.25}
CASES: dict[str, tuple[str, Batching, bool, bool, dict[str, Any]]] = {
    "one micro-batch": ("llama", Batching(200, 0), False, False, {}),
    "padded micro-batches": ("llama", Batching(24, 0), True, False, {}),
    "weights": ("llama", Batching(40, 0), False, False, {"weights": WEIGHTS}),
    "packed rows": ("llama", Batching(50, 0, "rows", 25), True, False, {"weights": WEIGHTS}),
    "one packed row": ("llama", Batching(50, 0, "single"), False, False, {}),
    "experts": ("qwen3_moe", Batching(40, 0), False, False, {}),
    "packed experts": ("mixtral", Batching(40, 0, "rows", 20), True, True, {"weights": WEIGHTS}),
    "routers with a bias": ("gpt_oss", Batching(40, 0), True, False, {}),
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
    metrics, example_nll = step_gradient(model, step, **options)
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
    metrics, example_nll = step_gradient(model, step, weights=WEIGHTS)
    assert (metrics["loss"], metrics["tasks"], example_nll) == (0, tasks, [])
    assert not gradient_of(model).any()
    assert len(gradient_of(model)) > 0
