"""The sections of the suite, the most important first, and how long each may take on a GPU."""

from __future__ import annotations

import functools
import gc
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu import plan as plans
from gpu.device import CARD_8GB_BYTES, CARD_40GB_BYTES
from gpu.part import Part


@dataclass(frozen=True)
class Section:
    """One part of the suite, run in a process of its own.

    Attributes:
        place: "module:function" under gpu; called with (part, plan, device) and `arguments`.
        seconds: After these it starts no new case; the process is ended `GRACE_SECONDS` later.
        arguments: Further keyword arguments.
    """

    place: str
    seconds: int
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def function(self) -> Callable[[Part, plans.Plan, torch.device], None]:
        """Imported when it is needed: some sections need packages that others do without."""
        module, _, name = self.place.partition(":")
        return functools.partial(getattr(importlib.import_module(f"gpu.{module}"), name), **self.arguments)


GRACE_SECONDS = 45
"""For the start of a process, and for its last case."""

SECTIONS: dict[str, Section] = {
    "card": Section("card:run", 60),
    "numerics_layer": Section("numerics_layer:run", 90),
    "numerics_formats": Section("numerics_formats:run", 60),
    "host_syncs": Section("host_syncs:run", 60),
    "step_in_turns": Section("model_step:in_turns", 240),
    "compiled_step": Section("compiled_step:run", 180),
    "layer_time_1": Section("layer_cost:time_shape", 90, {"index": 0}),
    "layer_memory": Section("layer_cost:memory", 60),
    "step_own_dora": Section("model_step:alone", 60, {"name": "own_dora"}),
    "step_peft_lora": Section("model_step:alone", 60, {"name": "peft_lora"}),
    "step_own_lora": Section("model_step:alone", 60, {"name": "own_lora"}),
    "step_peft_dora": Section("model_step:alone", 60, {"name": "peft_dora"}),
    "profile": Section("kernel_profile:run", 60),
    "triton": Section("kernels_compared:run", 90),
    "layer_time_2": Section("layer_cost:time_shape", 120, {"index": 1}),
    "step_large": Section("model_step:large", 240),
    "step_streamed_8gb": Section(
        "streamed_step:run", 120, {"size": "middle", "limit": CARD_8GB_BYTES, "num_streamed": 8}
    ),
    "step_streamed_40gb": Section(
        "streamed_step:run", 240, {"size": "large", "limit": CARD_40GB_BYTES, "num_streamed": 20}
    ),
    "step_offloaded": Section("offloaded_step:run", 120),
    "layer_time_3": Section("layer_cost:time_shape", 60, {"index": 2}),
    "optimizer": Section("optimizer_step:run", 60),
    "untested_choices": Section("untested_choices:run", 90),
}


def run_here(name: str, part: Part, device: torch.device, *, smoke: bool) -> None:
    """Run a section in this process."""
    torch.manual_seed(0)
    function = SECTIONS[name].function()
    gc.freeze()  # of all that was imported: collecting garbage then takes no time to speak of
    function(part, plans.SMOKE if smoke else plans.FULL, device)
