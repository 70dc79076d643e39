"""Bytes of a whole training step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import peft
import torch
from contenders import CONTENDERS, TITLES, adapt
from frame import GIB, bench, cell, main, markdown, table
from gpu.models import build
from gpu.plan import FULL, SMOKE
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qdora.files.pages import svg_file
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.plan.live_bytes import LiveBytes
from qdora.quant.packed import PackedWeight, empty_packed
from qdora.train.loss import LogitForm, head_nll, tapped
from qdora.train.optimizer import AdapterOptimizer

RANK, STEP_TOKENS = 16, 2048
LEAN = ("own_lora", "own_dora", "peft_lora", "peft_dora")
EIGHT_BIT, BF16_ADAM, PREPARED, DEFAULTS = "_8bit", "_bf16_adam", "_prepared", "_defaults"
PEFT = LEAN[2:]
ARMS = (*LEAN, *(f"{name}{EIGHT_BIT}" for name in LEAN))
ARMS += tuple(f"{name}{ending}" for ending in (BF16_ADAM, DEFAULTS, PREPARED) for name in PEFT)
# Llama-2-7b-hf, config.json of the checkpoint.
_7B = FULL.middle | {"vocab_size": 32_000, "intermediate_size": 11_008, "num_key_value_heads": 32}
_7B |= {"max_position_embeddings": 4096, "rope_theta": 10_000.0}
CASES = {
    "7B, checkpointing": (_7B, True),
    "8B, checkpointing": (FULL.middle, True),
    "7B, no checkpointing": (_7B, False),
}
TARGETS = {"7B, checkpointing": 4.95, "8B, checkpointing": 6.75, "7B, no checkpointing": 17.0}
"""GiB, of own_dora."""
LABELS = ("packed base", "embeddings, head, norms", "adapters", "optimizer", "gradients", "block inputs")
LABELS += ("forward", "backward", "other")
"""Labels of `LiveBytes` in the order of the figure."""
DRAWN = ("own_lora", "own_dora", f"own_dora{EIGHT_BIT}", *PEFT, *(f"{name}{DEFAULTS}" for name in PEFT))


class EmptyWeights:
    """In place of `gpu.models.Weights`: tensors without values, each labelled by what it is."""

    device = torch.device("cpu")

    def __init__(self, live: LiveBytes) -> None:
        self.live = live

    def packed(self, _path: str, shape: tuple[int, int]) -> PackedWeight:
        with self.live.label("packed base"):
            return empty_packed("nf4", shape)

    def dense(self, _path: str, shape: tuple[int, ...]) -> Tensor:
        with self.live.label("embeddings, head, norms"):
            return torch.empty(shape, dtype=torch.bfloat16)


@bench(smoke={"tokens": 32})
def step_memory(tokens: int = STEP_TOKENS, *, smoke: bool, out: Path) -> dict[str, Any]:
    """Peak memory of a step of 7B and 8B models, by what holds the bytes: QDoRA, QLoRA, ours and PEFT's; and a figure.

    Nothing is computed: fake CPU tensors of the full shapes go through the real code, and `LiveBytes` counts the second
    step, when the optimizer's states exist. One sequence, all of it labelled, NF4 with double quantisation.

        own_*, peft_*     bf16 adapters, logits in chunks, AdapterOptimizer (float32 states): what differs is the layer
        *_8bit            these four with paged_adamw_8bit, as in the shipped recipes for 40 GB; the pages count
        peft_*_bf16_adam  torch's AdamW in bf16: half the bytes, but magnitudes that never move
        peft_*_defaults   float32 adapters, dropout 0.05, all logits at once (the model's loss), torch's AdamW
        peft_*_prepared   and norms, embeddings and head in float32 (prepare_model_for_kbit_training)

    The floor: all weights, and what the frozen model holds after its forward pass. Tiles and loss slices are those of a
    CPU (8 to 16 MiB in place of 128, 4 in place of 32). What a kernel allocates in one operation is not seen, and under
    the counter autograd sums two gradients of one tensor into a third: up to one block input (16 MiB) more.
    """
    cases = {}
    for name, (settings, checkpointing) in CASES.items():
        settings = SMOKE.middle if smoke else settings
        floor = _floor(settings, tokens, checkpointing)
        arms = {arm: _arm(arm, settings, tokens, checkpointing) for arm in ARMS}
        for each in arms.values():
            each["above_floor_bytes"] = each["peak_bytes"] - floor["total_bytes"]
        cases[name] = {"checkpointing": checkpointing, "floor": floor, "arms": arms}
    _draw(cases, tokens, out.with_suffix(".svg"))
    return {"num_tokens": tokens, "rank": RANK, "cases": cases}


def _draw(cases: dict[str, Any], tokens: int, out: Path) -> None:
    with svg_file(out, 4.6 * len(cases), 4.2) as figure:
        axes = figure.subplots(1, len(cases), sharey=True)
        for axis, (name, case) in zip(axes, cases.items(), strict=True):
            left = [0.0] * len(DRAWN)
            for label in LABELS:
                widths = [case["arms"][arm]["peak_by_label"].get(label, 0) / GIB for arm in DRAWN]
                axis.barh([TITLES[arm] for arm in DRAWN], widths, left=left, label=label)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            for row, total in enumerate(left):
                axis.text(total, row, f" {total:.1f}", va="center", fontsize=8)
            axis.axvline(case["floor"]["total_bytes"] / GIB, color="black", ls="--", lw=1, label="floor")
            axis.set(xlabel="GiB at the peak", title=f"{name}, {tokens:,} tokens", xlim=(0, 1.12 * max(left)))
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)


def _floor(settings: dict[str, Any], num_tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Weights, and what the frozen model holds between its forward and its backward pass."""
    with FakeTensorMode(), LiveBytes() as live:
        model = build(settings, EmptyWeights(live), "own")
        model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_())
        if checkpointing:
            recompute_activations(model)
        model.train()
        weights = live.live_bytes
        loss = _head_loss(model, torch.zeros(1, num_tokens, dtype=torch.int64))
        held = live.live_bytes - weights
        del loss
    return {"held_bytes": held, "total_bytes": weights + held}


def _arm(name: str, settings: dict[str, Any], num_tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Peak of the second step of a contender, by label."""
    gc.collect()
    with FakeTensorMode(), LiveBytes() as live:
        model = _arm_model(name, settings, live, checkpointing)
        parameters = adapter_parameters(model)
        for parameter in parameters.values():
            parameter.register_post_accumulate_grad_hook(lambda each: live.register(each.grad, "gradients"))
        for module in model.modules():
            if type(module).__name__ == "LlamaDecoderLayer":
                module.register_forward_pre_hook(lambda _module, args: live.register(args[0], "block inputs"))
        optimizer = _arm_optimizer(name, parameters)
        ids = torch.zeros(1, num_tokens, dtype=torch.int64)
        loss_of = _head_loss
        if name.endswith((DEFAULTS, PREPARED)):  # as transformers' trainer takes it
            loss_of = lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
        _train(model, ids, loss_of, optimizer, live)
        if isinstance(optimizer, AdapterOptimizer):
            states = list(optimizer.state_tensors().values())
        else:
            states = [tensor for of_one in optimizer.state.values() for tensor in of_one.values()]
        live.register(states, "optimizer")
        gc.collect()
        before = live.live_bytes
        live.reset_peak()
        _train(model, ids, loss_of, optimizer, live)
        peak = {"peak_bytes": live.peak_bytes, "peak_by_label": live.peak_by_label}
        gc.collect()
        assert live.live_bytes == before, "a step left something behind"
    return peak


def _arm_model(name: str, settings: dict[str, Any], live: LiveBytes, checkpointing: bool) -> Any:
    """A contender's model in training mode, its adapters labelled."""
    contender = CONTENDERS[name.removesuffix(BF16_ADAM).removesuffix(EIGHT_BIT).replace(PREPARED, DEFAULTS)]
    model = build(settings, EmptyWeights(live), contender.engine)
    if name.endswith(PREPARED):
        model.is_loaded_in_4bit = True
        with live.label("embeddings, head, norms"):
            peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        recompute_activations(model)
    # PEFT moves modules to the device where they are, which torch refuses for fake parameters that its mode remembers.
    stays = mock.patch.object(nn.Module, "to", lambda module, *_args, **_kwargs: module)
    with live.label("adapters"), stays:
        model = adapt(model, contender, RANK)
        # Fake tensors have no versions, so the layers keep no norm of them: the place of what they would keep.
        layers = adapted_layers(model).values()
        model.norms = [torch.empty(3, each.out_features) for each in layers if each.kind == "dora"]
    return model.train()


def _arm_optimizer(name: str, parameters: dict[str, nn.Parameter]) -> Any:
    if name.endswith(EIGHT_BIT):
        # The code book of the states is computed from its own values, which a fake tensor has not.
        with mock.patch.object(bnb.functional, "create_dynamic_map", side_effect=lambda *_, **__: torch.empty(256)):
            return AdapterOptimizer(parameters, name="paged_adamw_8bit")
    if name in LEAN:
        return AdapterOptimizer(parameters, name="adamw")
    return torch.optim.AdamW(parameters.values(), weight_decay=0.0, fused=True)


def _train(model: Any, ids: Tensor, loss_of: Callable[[Any, Tensor], Tensor], optimizer: Any, live: LiveBytes) -> None:
    """One step, its tensors labelled by its parts."""
    with live.label("forward"):
        loss = loss_of(model, ids)
    with live.label("backward"):
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
    with live.label("update"):
        if isinstance(optimizer, AdapterOptimizer):
            optimizer.scale_gradients_(optimizer.gradient_norm())
            optimizer.step(1e-4)
        else:
            trainable = [each for group in optimizer.param_groups for each in group["params"]]
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
        optimizer.zero_grad()


def _head_loss(model: Any, ids: Tensor) -> Tensor:
    """As qdora's loop takes it: the head is given one position, and the loss is made of what was meant for it."""
    columns = torch.arange(ids.shape[1] - 1)
    head = model.get_output_embeddings()
    with tapped(head, torch.zeros_like(columns), columns, probing=False) as tap:
        model(input_ids=ids, use_cache=False)
    return head_nll(head, tap.hidden, ids[0, 1:], LogitForm(), None).sum() / len(columns)


@table("step_memory")
def step_memory_table(result: Any) -> str:
    cases = result["cases"]
    floors = [cell("{total_bytes:.2fGiB}", case["floor"]) for case in cases.values()]
    rows = [["weights and unavoidable activations", *floors]]
    for name in next(iter(cases.values()))["arms"]:
        arms = [case["arms"][name] for case in cases.values()]
        rows.append([TITLES[name], *(cell("{peak_bytes:.2fGiB} (+{above_floor_bytes:.2fGiB})", arm) for arm in arms)])
    peaks = {name: cases[name]["arms"]["own_dora"]["peak_bytes"] / GIB for name in TARGETS}
    targets = [f"{n}, at most {most:g} GiB ({'met' if peaks[n] <= most else 'missed'})" for n, most in TARGETS.items()]
    note = f"\nTargets for {TITLES['own_dora']}: {'; '.join(targets)}.\n"
    return markdown(["GiB at the peak (above the first line)", *cases], rows) + note


if __name__ == "__main__":
    main()
