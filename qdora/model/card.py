"""The model card of an exported model: README.md with the Hub's front matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

import qdora

_MERGED = (
    "Base and adapter are merged into one dense weight per layer: the quantised base was dequantised and the adapter "
    "applied in float32, and the result rounded once."
)
_RUN = "This directory is the run: `adapter/` is what was trained, in PEFT's format, on the quantised base."


@dataclass(frozen=True)
class CardFacts:
    """What a card says. Everything is optional but the base; what is not known is left out, never guessed."""

    base_name: str
    base_revision: str | None = None
    title: str = "Merged model"
    merged: bool = True
    """Whether the directory holds the merged model, or a run with its adapter."""
    licence: str | None = None
    """Hub licence id of the base ("apache-2.0"); the data's licences are the reader's to check."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """Setting -> value: adapter kind, rank, alpha, base quantisation, steps, learning rate."""
    data: Sequence[str] = ()
    metric_names: Sequence[str] = ()
    """Columns of the table: "base", "adapter", "merged"."""
    metrics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Row of the table -> one number a column."""
    verification: Mapping[str, Any] | None = None
    """From `verify_merged`."""
    interference: str = ""
    """What the tasks do to each other, in words."""
    versions: Mapping[str, str] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The text of README.md; the same facts give the same text.

    Raises:
        ValueError: A row of metrics with another number of values than there are columns.
    """
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["qdora"]}
    if not facts.base_name.startswith((".", "/")) and "/" in facts.base_name:
        front["base_model"] = facts.base_name
        front["base_model_relation"] = "finetune"
    if facts.licence:
        front["license"] = facts.licence
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---", f"# {facts.title}"]
    revision = f" at revision `{facts.base_revision}`" if facts.base_revision else ""
    parts.append(
        f"Fine-tuned from `{facts.base_name}`{revision} with qdora "
        f"{qdora.__version__}. " + (_MERGED if facts.merged else _RUN)
    )
    if facts.method:
        parts.append("## Training\n\n" + _table(("setting", "value"), [(k, str(v)) for k, v in facts.method.items()]))
    if facts.data:
        parts.append("## Data\n\n" + "\n".join(f"- {_plain(name)}" for name in facts.data))
    if facts.metrics:
        parts.append("## Results\n\n" + _metrics(facts))
    if facts.interference:
        parts.append("## Interference\n\n" + facts.interference)
    if facts.verification is not None:
        parts.append("## Verification of the merge\n\n" + _verification(facts.verification))
    if facts.versions:
        parts.append("## Versions\n\n" + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in facts.versions.items()))
    licence = f"The base is licensed as `{facts.licence}`." if facts.licence else "The licence of the base applies."
    parts.append(f"## Licence\n\n{licence} Data sets carry licences of their own.")
    return "\n\n".join(parts) + "\n"


def _metrics(facts: CardFacts) -> str:
    for name, values in facts.metrics.items():
        if len(values) != len(facts.metric_names):
            raise ValueError(f"metrics of {name!r}: {len(values)} values for {len(facts.metric_names)} columns.")
    rows = [(name, *("" if v is None else f"{v:.4g}" for v in values)) for name, values in facts.metrics.items()]
    return _table(("", *facts.metric_names), rows)


def _verification(verification: Mapping[str, Any]) -> str:
    rows = [
        (
            label,
            *(
                f"{verification[key][name]:.3g}"
                for name in ("max_logit_difference", "mean_logit_difference", "kl_mean")
            ),
            f"{100 * verification[key]['argmax_agreement']:.2f} %",
        )
        for key, label in (
            ("merged_vs_reference", "merged, adapter in float32"),
            ("merged_vs_running", f"merged, adapter in {verification['running_dtype']}"),
            ("reference_vs_running", f"adapter in float32, adapter in {verification['running_dtype']}"),
        )
    ]
    table = _table(("compared", "largest logit difference", "mean", "mean KL (nats)", "same argmax"), rows)
    result = "passed" if verification["passed"] else "FAILED"
    return f"{result} on {verification['num_positions']} tokens.\n\n{table}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """A table's cell or list item: one line, no cell borders."""
    return " ".join(str(text).split()).replace("|", "\\|")
