"""The section base.prune of a recipe: which weights of the base are removed, and how that is decided."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from qdora.errors import nearest
from qdora.section import Fault, Positive, Section, Seed, Share, Text, Whole

PATTERNS = ("unstructured", "2:4", "4:8", "rows", "columns")
"""Patterns by name; any other n:m is allowed, too."""

_N_OF_M = re.compile(r"([1-9]\d{0,2}):([1-9]\d{0,2})")


class CalibrationConfig(Section):
    """Text on which the inputs of each layer are measured. The sizes are those of Wanda, arXiv 2306.11695, sec. 4."""

    text: Text = "mix"
    """UTF-8 text file, or mix: the run's own training examples, prompts and answers, one after the other."""
    sequences: Whole = 128
    """Pieces of text, taken from random places."""
    length: Whole = 2048
    """Tokens of a piece. At most the model's context."""
    seed: Seed = 0
    """Decides the places."""


class PruneConfig(Section):
    """How the base is pruned while it is loaded: block by block, each measured behind the compressed ones before it."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "wanda"
    """What a weight is worth. Wanda: arXiv 2306.11695; SparseGPT: arXiv 2301.00774, which corrects what stays."""
    pattern: Text = "unstructured"
    """unstructured, n:m (n of m neighbours are kept, such as 2:4), rows or columns."""
    sparsity: Share | None = None
    """Share of zeros; n:m has its own."""
    group: Literal["auto", "tensor", "row"] = "auto"
    """What an unstructured pattern compares. auto: the tensor for magnitude, rows for Wanda (its paper, sec. 3)."""
    order: Literal["prune_first", "quantize_first"] = "prune_first"
    """Quantise what pruning left, or prune what quantisation made, its scales kept."""
    damping: Positive = 0.01
    """Of sparsegpt, a share of the mean of the Hessian's diagonal. 0.01: arXiv 2301.00774, sec. 4."""
    calibration: CalibrationConfig = CalibrationConfig()
    """Text on which the inputs of each layer are measured."""

    def unused(self) -> dict[str, str]:
        found = {}
        if self.method != "sparsegpt":
            found["damping"] = f"base.prune.method {self.method} has none"
        if self.method == "magnitude":
            found["calibration"] = "base.prune.method magnitude measures no inputs"
        if self.method == "sparsegpt":
            found["group"] = "base.prune.method sparsegpt compares within blocks of columns"
        elif self.pattern != "unstructured":
            found["group"] = f"base.prune.pattern {self.pattern} compares only within itself"
        if ":" in self.pattern:
            found["sparsity"] = f"base.prune.pattern {self.pattern} has its own"
        return found

    def faults(self) -> Iterator[Fault]:
        match = _N_OF_M.fullmatch(self.pattern)
        if match is None and self.pattern not in PATTERNS:
            names = ", ".join(PATTERNS)
            yield (
                "pattern",
                f"not valid, got {self.pattern!r}, allowed: {names}, or another n:m.{nearest(self.pattern, PATTERNS)}",
            )
        elif match and int(match[1]) >= int(match[2]):
            yield "pattern", f"keeps n of m weights, got {self.pattern!r}, allowed: n below m."
        elif match is None and self.sparsity is None:
            yield "sparsity", f"missing, allowed: a share of zeros below 1 for pattern {self.pattern}."
        if self.method == "sparsegpt" and self.order == "quantize_first":
            yield (
                "order",
                "sparsegpt changes the weights that stay, which would have to be quantised again, got "
                "quantize_first, allowed: prune_first.",
            )
