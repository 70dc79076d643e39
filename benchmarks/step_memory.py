"""Peak memory of the whole training step of 7B and 8B models, by what holds the bytes: QDoRA, QLoRA, ours and PEFT's.

    python benchmarks/step_memory.py [--out benchmarks/results/step_memory.json] [--smoke]

Beside the file it draws a figure of the same name.

Nothing is computed: fake CPU tensors of the full shapes go through the real code, and
`qdora.plan.live_bytes.LiveBytes` counts. One sequence of 2,048 tokens, all of them labelled, bf16, NF4 in blocks of 64
with double quantisation, rank 16 on all linear layers, the output head and the embeddings in 16 bits. The second step
is counted, when the optimizer's states exist.

    own_*             bf16 adapters, the logits made in chunks, AdapterOptimizer (float32 states and gradients)
    peft_*            "lean": bf16 adapters, the same chunked loss and the same optimizer; what differs is the layer
    *_8bit            these four with paged_adamw_8bit, as in the shipped recipes for 40 GB; the pages count
    peft_*_bf16_adam  "lean", with torch's AdamW in bf16: half the bytes, but magnitudes that never move
    peft_*_defaults   "usual": float32 adapters, dropout 0.05, all logits at once (the model's own loss), torch's AdamW
    peft_*_prepared   "usual", and the norms, embeddings and head in float32 (prepare_model_for_kbit_training)
    frozen            the base without adapters or optimizer, whose embeddings' gradient is asked for

The floor of a mode: all weights and what `frozen` holds after its forward pass. With checkpointing that is the inputs
of the blocks; without, what the model's own operations save.

As on a GPU but for: the tiles and loss slices of a CPU (8 to 16 MiB in place of 128, 4 in place of 32), an attention
kernel that saves the same tensors, no context, workspaces or fragmentation. Within one operation nothing is seen:
bitsandbytes' product with a packed weight dequantises inside its kernel on a CPU. Under the counter autograd sums two
gradients of one tensor into a third: up to one block input (16 MiB) more, for everyone.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import bitsandbytes as bnb
import peft
import torch
from contenders import CONTENDERS, adapt
from gpu.plan import FULL, SMOKE
from gpu.shaped_model import build
from measure import facts, parser_of, write
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama import modeling_llama

from qdora.files.svg_figure import svg_file
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, adapter_parameters
from qdora.ops.packed import PackedWeight, empty_packed
from qdora.plan.live_bytes import LiveBytes
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.output_head import LogitForm, head_nll, tapped

GIB = 2**30
RANK, NUM_TOKENS = 16, 2048
LEAN = ("own_lora", "own_dora", "peft_lora", "peft_dora")
EIGHT_BIT, BF16_ADAM, PREPARED = "_8bit", "_bf16_adam", "_prepared"
ARMS = (
    *LEAN,
    *(f"{name}{EIGHT_BIT}" for name in LEAN),
    f"peft_lora{BF16_ADAM}",
    f"peft_dora{BF16_ADAM}",
    "peft_lora_defaults",
    "peft_dora_defaults",
    f"peft_lora{PREPARED}",
    f"peft_dora{PREPARED}",
)
# Llama-2-7b-hf, config.json of the checkpoint.
_7B = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
CASES = {
    "7B, checkpointing": (_7B, True),
    "8B, checkpointing": (FULL.middle, True),
    "7B, no checkpointing": (_7B, False),
}
LABELS = {
    "packed base": "packed base",
    "embeddings, head, norms": "embeddings, head, norms",
    "adapters": "adapters",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "block inputs": "inputs of blocks",
    "forward": "made in the forward pass",
    "backward": "made in the backward pass, recompute included",
    "other": "other",
}
"""Labels of `LiveBytes` in the order of the figure, and their names there."""
DRAWN = {
    "own_lora": "qdora QLoRA",
    "own_dora": "qdora QDoRA",
    f"own_dora{EIGHT_BIT}": "qdora QDoRA, 8-bit AdamW",
    "peft_lora": "PEFT QLoRA, lean",
    "peft_dora": "PEFT QDoRA, lean",
    "peft_lora_defaults": "PEFT QLoRA, usual",
    "peft_dora_defaults": "PEFT QDoRA, usual",
}
BARS = {"7B, checkpointing": 4.95, "8B, checkpointing": 6.75, "7B, no checkpointing": 17.0}
"""GiB, of own_dora."""


class EmptyWeights:
    """In place of `shaped_model.Weights`: tensors without values, each labelled by what it is."""

    def __init__(self, live: LiveBytes) -> None:
        self.device = torch.device("cpu")
        self.live = live

    def packed(self, _path: str, shape: tuple[int, int]) -> PackedWeight:
        """NF4 with double quantisation, (out, in)."""
        with self.live.label("packed base"):
            return empty_packed("nf4", shape)

    def dense(self, _path: str, shape: tuple[int, ...]) -> Tensor:
        """bf16."""
        with self.live.label("embeddings, head, norms"):
            return torch.empty(shape, dtype=torch.bfloat16)


def main() -> None:
    """All arms of all cases, then the bars."""
    args = parser_of(__doc__, "step_memory", smoke="a tiny model").parse_args()
    cases = {"tiny, checkpointing": (SMOKE.middle, True), "tiny, no checkpointing": (SMOKE.middle, False)}
    num_tokens = 32 if args.smoke else NUM_TOKENS
    # A real sequence without padding gets no mask; of a fake one transformers cannot see that, and would make it.
    with patch.object(modeling_llama, "create_causal_mask", lambda *_args, **_kwargs: None):
        found = {
            name: case_result(settings, num_tokens, checkpointing)
            for name, (settings, checkpointing) in (cases if args.smoke else CASES).items()
        }
    result: dict[str, Any] = {
        **facts("python benchmarks/step_memory.py"),
        "num_tokens": num_tokens,
        "rank": RANK,
        "cases": found,
    }
    draw(result, args.out.with_suffix(".svg"))
    write(args.out, result if args.smoke else {**result, "bars_gib": BARS, "passes": verdict(result)})


def case_result(settings: dict[str, Any], num_tokens: int, checkpointing: bool) -> dict[str, Any]:
    """The floor and all arms."""
    floor = floor_of(settings, num_tokens, checkpointing)
    arms = {name: arm_result(name, settings, num_tokens, checkpointing) for name in ARMS}
    for arm in arms.values():
        arm["above_floor_bytes"] = arm["peak_bytes"] - floor["total_bytes"]
    return {"checkpointing": checkpointing, "floor": floor, "arms": arms}


def floor_of(settings: dict[str, Any], num_tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Weights, and what the frozen model holds between its forward and its backward pass."""
    with FakeTensorMode(), LiveBytes() as live:
        model = build(settings, EmptyWeights(live), "own")  # type: ignore[arg-type]
        model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_())
        if checkpointing:
            recompute_activations(model)
        model.train()
        weights = live.live_bytes
        ids = torch.zeros(1, num_tokens, dtype=torch.int64)
        loss = chunked_loss(model, ids)
        held = live.live_bytes - weights
        del loss
    return {"weight_bytes": weights, "held_bytes": held, "total_bytes": weights + held}


def arm_result(name: str, settings: dict[str, Any], num_tokens: int, checkpointing: bool) -> dict[str, Any]:
    """Peak of the second step of a contender, by label, and of each of its parts."""
    gc.collect()
    with FakeTensorMode(), LiveBytes() as live:
        model = make_model(name, settings, live, checkpointing)
        parameters = adapter_parameters(model)
        watch(model, parameters, live)
        optimizer = make_optimizer(name, parameters)
        ids = torch.zeros(1, num_tokens, dtype=torch.int64)
        loss_of = own_loss if name.endswith(("_defaults", PREPARED)) else chunked_loss
        train(model, ids, loss_of, optimizer, live)
        live.register(optimizer_tensors(optimizer), "optimizer")
        gc.collect()
        before = live.live_by_label
        phases = train(model, ids, loss_of, optimizer, live)
        gc.collect()
        assert sum(live.live_by_label.values()) == sum(before.values()), "a step left something behind"
    largest = max(phases, key=lambda phase: phases[phase]["peak_bytes"])
    return {
        "num_trainable": sum(each.numel() for each in parameters.values()),
        "peak_bytes": phases[largest]["peak_bytes"],
        "peak_in": largest,
        "peak_by_label": phases[largest]["by_label"],
        "phase_peak_bytes": {phase: found["peak_bytes"] for phase, found in phases.items()},
    }


def make_model(name: str, settings: dict[str, Any], live: LiveBytes, checkpointing: bool) -> Any:
    """A contender's model in training mode, its adapters labelled."""
    prepared = name.endswith(PREPARED)
    contender = CONTENDERS[name.removesuffix(BF16_ADAM).removesuffix(EIGHT_BIT).replace(PREPARED, "_defaults")]
    model = build(settings, EmptyWeights(live), contender.engine)  # type: ignore[arg-type]
    if prepared:
        model.is_loaded_in_4bit = True
        with live.label("embeddings, head, norms"):
            peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        recompute_activations(model)
    # PEFT moves modules to the device where they are, which torch refuses for fake parameters that its mode remembers.
    stays = patch.object(nn.Module, "to", lambda module, *_args, **_kwargs: module)
    with live.label("adapters"), stays:
        model = adapt(model, contender, RANK)
        # Fake tensors have no versions to be told by, so the layers keep no norm of them: the place of what they would.
        layers = adapted_layers(model).values()
        model.norms = [torch.empty(3, each.out_features) for each in layers if each.kind == "dora"]
    return model.train()


def watch(model: Any, parameters: dict[str, nn.Parameter], live: LiveBytes) -> None:
    """Label the gradients of parameters and the inputs of blocks as they appear."""
    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(lambda each: live.register(each.grad, "gradients"))
    for module in model.modules():
        if type(module).__name__ == "LlamaDecoderLayer":
            module.register_forward_pre_hook(lambda _module, args: live.register(args[0], "block inputs"))


def make_optimizer(name: str, parameters: dict[str, nn.Parameter]) -> Any:
    """qdora's own, or torch's AdamW in the adapters' dtype."""
    if name.endswith(EIGHT_BIT):
        # The code book of the states is computed from its own values, which a fake tensor has not.
        with patch.object(bnb.functional, "create_dynamic_map", lambda *_args, **_kwargs: torch.empty(256)):
            return AdapterOptimizer(parameters, name="paged_adamw_8bit")
    if name in LEAN:
        return AdapterOptimizer(parameters, name="adamw")
    return torch.optim.AdamW(parameters.values(), weight_decay=0.0, fused=True)


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """All states."""
    if isinstance(optimizer, AdapterOptimizer):
        return list(optimizer.state_tensors().values())
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


def train(
    model: Any, ids: Tensor, loss_of: Callable[[Any, Tensor], Tensor], optimizer: Any, live: LiveBytes
) -> dict[str, dict[str, Any]]:
    """One step; the peak of each part, with its labels."""
    phases: dict[str, dict[str, Any]] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        live.reset_peak()
        with live.label(name):
            yield
        phases[name] = {"peak_bytes": live.peak_bytes, "by_label": dict(live.peak_by_label)}

    with phase("forward"):
        loss = loss_of(model, ids)
    with phase("backward"):
        loss.backward()
        del loss
    with phase("update"):
        if isinstance(optimizer, AdapterOptimizer):
            optimizer.scale_gradients_(optimizer.gradient_norm())
            optimizer.step(1e-4)
        else:
            trainable = [each for group in optimizer.param_groups for each in group["params"]]
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
        optimizer.zero_grad()
    return phases


def chunked_loss(model: Any, ids: Tensor) -> Tensor:
    """As qdora's loop takes it: the head is given one position, and the loss is made of what was meant for it."""
    columns = torch.arange(ids.shape[1] - 1)
    head = model.get_output_embeddings()
    with tapped(head, torch.zeros_like(columns), columns, probing=False) as tap:
        model(input_ids=ids, use_cache=False)
    return head_nll(head, tap.hidden, ids[0, 1:], LogitForm(), None).sum() / len(columns)


def own_loss(model: Any, ids: Tensor) -> Tensor:
    """As transformers' trainer takes it."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def draw(result: dict[str, Any], out: Path) -> None:
    """Stacked bars of what is alive at the peak, a panel for each case, its floor as a line."""
    cases = result["cases"]
    with svg_file(out, 4.6 * len(cases), 4.2) as figure:
        axes = figure.subplots(1, len(cases), sharey=True)
        for axis, (name, case) in zip(axes, cases.items(), strict=True):
            left = [0.0] * len(DRAWN)
            for label, shown in LABELS.items():
                widths = [case["arms"][arm]["peak_by_label"].get(label, 0) / GIB for arm in DRAWN]
                axis.barh(list(DRAWN.values()), widths, left=left, label=shown)
                left = [start + width for start, width in zip(left, widths, strict=True)]
            for row, total in enumerate(left):
                axis.text(total, row, f" {total:.1f}", va="center", fontsize=8)
            axis.axvline(case["floor"]["total_bytes"] / GIB, color="black", ls="--", lw=1, label="floor")
            axis.set(xlabel="GiB at the peak", title=f"{name}, {result['num_tokens']:,} tokens")
            axis.set_xlim(0, 1.12 * max(left))
        axes[0].invert_yaxis()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """Whether own QDoRA keeps to the bars."""
    return {name: result["cases"][name]["arms"]["own_dora"]["peak_bytes"] <= bar * GIB for name, bar in BARS.items()}


if __name__ == "__main__":
    main()
