"""The model card of an exported model: README.md with the Hub's front matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

import qdora
from qdora.model.licence import Licence

Form = Literal["run", "merged", "original", "requantized", "nf4-lora", "gguf", "peft"]

_CONTENTS: dict[Form, str] = {
    "run": "This directory is the run: `adapter/` is what was trained, in PEFT's format, on the quantised base.",
    "merged": (
        "Base and adapter are merged into one dense weight per layer: the quantised base was dequantised and the "
        "adapter applied in float32, and the result rounded once."
    ),
    "original": (
        "The adapter is merged on the original weights of the base, with the norm of DoRA taken anew there; it was "
        "trained on the quantised base, so this is a relative of the trained model and not that model."
    ),
    "requantized": (
        "Base and adapter are merged in float32 and quantised again to 4 bits, as a bitsandbytes checkpoint: a second "
        "rounding on top of the one that the adapter was trained on."
    ),
    "peft": (
        "This is the adapter alone, in PEFT's format, as it was trained. It belongs on the base quantised as the table "
        "says, by bitsandbytes: on other weights it is another model. `qdora.json` has the exact scale of every layer."
    ),
    "gguf": (
        "Base and adapter are merged into one dense weight per layer in float32, and written by llama.cpp's own "
        "converter. Every tensor was compared with the merge.\n\n"
        "```bash\n"
        "llama-server -m model-*.gguf\n"
        'echo "FROM ./$(ls model-*.gguf)" > Modelfile && ollama create my-model -f Modelfile\n'
        "```"
    ),
    "nf4-lora": (
        "The base is a bitsandbytes 4-bit checkpoint into whose block scales the gain of DoRA is multiplied; "
        "`adapter/` is the plain LoRA that belongs on it. Together they are the trained model without a further "
        "rounding to 4 bits. The block scales are not double quantised, and must not be: that rounds each of them to "
        "8 bits. The base without the adapter is not the model that training started from.\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), f"{directory}/adapter")\n'
        "```"
    ),
}
_CHECKED: dict[Form, str] = {
    "run": "",
    "merged": "merged",
    "original": "merged on the original weights",
    "requantized": "merged and quantised again",
    "nf4-lora": "4-bit base and LoRA",
    "gguf": "GGUF",
    "peft": "",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says. Everything is optional but the base; what is not known is left out, never guessed."""

    base_name: str
    base_revision: str | None = None
    title: str = "Merged model"
    form: Form = "merged"
    """What the directory holds."""
    licence: Licence | None = None
    """Of the base; the data's licences are the reader's to check."""
    licence_files: Sequence[str] = ()
    """Names of the base's licence texts that lie beside the card."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """Setting -> value: adapter kind, rank, alpha, base quantisation, steps, learning rate."""
    data: Sequence[str] = ()
    data_ids: Sequence[str] = ()
    """Those of the data sets that are on the Hub."""
    metric_names: Sequence[str] = ()
    """Columns of the table: "base", "adapter", "merged"."""
    metrics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Row of the table -> one number a column."""
    notes: Sequence[str] = ()
    """Sentences that a reader of the table has to know, below it."""
    verification: Mapping[str, Any] | None = None
    """From the verification of the export."""
    interference: str = ""
    """What the tasks do to each other, in words."""
    versions: Mapping[str, str] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The text of README.md; the same facts give the same text.

    Raises:
        ValueError: A row of metrics with another number of values than there are columns.
    """
    library = facts.form if facts.form in ("gguf", "peft") else "transformers"
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": ["qdora"]}
    if not facts.base_name.startswith((".", "/")) and "/" in facts.base_name:
        front["base_model"] = facts.base_name
        front["base_model_relation"] = "adapter" if facts.form == "peft" else "finetune"
    if facts.data_ids:
        front["datasets"] = sorted(set(facts.data_ids))
    if facts.licence is not None:
        front["license"] = facts.licence.id
        front |= {key: value for key, value in _licence_details(facts.licence).items() if value is not None}
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---", f"# {facts.title}"]
    revision = f" at revision `{facts.base_revision}`" if facts.base_revision else ""
    parts.append(
        f"Fine-tuned from `{facts.base_name}`{revision} with qdora {qdora.__version__}. " + _CONTENTS[facts.form]
    )
    if facts.method:
        parts.append("## Training\n\n" + _table(("setting", "value"), [(k, str(v)) for k, v in facts.method.items()]))
    if facts.data:
        parts.append("## Data\n\n" + "\n".join(f"- {_plain(name)}" for name in facts.data))
    if facts.metrics:
        parts.append("\n\n".join(["## Results", _metrics(facts), *(f"**{_plain(note)}**" for note in facts.notes)]))
    if facts.interference:
        parts.append("## Interference\n\n" + facts.interference)
    if facts.verification is not None:
        parts.append("## Verification\n\n" + _verification(facts.verification, _CHECKED[facts.form]))
    if facts.versions:
        parts.append("## Versions\n\n" + ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in facts.versions.items()))
    parts.append("## Licence\n\n" + _licence(facts))
    return "\n\n".join(parts) + "\n"


def _licence_details(licence: Licence) -> dict[str, str | None]:
    return {"license_name": licence.name, "license_link": licence.link}


def _licence(facts: CardFacts) -> str:
    licence = facts.licence
    if licence is None:
        text = "The licence of the base applies to this model, too; its files do not name it."
    else:
        named = f"`{licence.name or licence.id}`"
        text = f"The base is licensed as {f'[{named}]({licence.link})' if licence.link else named}"
        text += ", which applies to this model, too."
    if facts.licence_files:
        text += f" Its own texts are beside this card: {', '.join(f'`{name}`' for name in facts.licence_files)}."
    return text + " The data sets carry licences of their own."


def _metrics(facts: CardFacts) -> str:
    for name, values in facts.metrics.items():
        if len(values) != len(facts.metric_names):
            raise ValueError(f"metrics of {name!r}: {len(values)} values for {len(facts.metric_names)} columns.")
    rows = [(name, *("" if v is None else f"{v:.4g}" for v in values)) for name, values in facts.metrics.items()]
    return _table(("", *facts.metric_names), rows)


def _verification(verification: Mapping[str, Any], name: str) -> str:
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
            ("exported_vs_reference", f"{name}, adapter in float32"),
            ("exported_vs_running", f"{name}, adapter in {verification['running_dtype']}"),
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
