"""The model card of an exported model: README.md with the Hub's front matter.

The model card of a run and of what is exported from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

import qdora
from qdora.data.commonsense import HUB_TASKS
from qdora.errors import UserError
from qdora.evaluation.suite import worse_than_base
from qdora.files.environment import package_versions
from qdora.files.markdown_table import markdown_cell, markdown_table
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import find_source
from qdora.model.licence import Licence, licence_files, licence_of
from qdora.model.source import BUILTIN, BUILTIN_HUB_ID, ModelSource, public_name
from qdora.recipe.byte_size import size_text
from qdora.recipe.data_settings import SourceConfig, is_path
from qdora.recipe.settings import Recipe
from qdora.run.task_conflicts import interference_in_words
from qdora.run.validation import adapter_in_words, stored_results

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
        parts.append(
            "## Training\n\n" + markdown_table(("setting", "value"), [(k, str(v)) for k, v in facts.method.items()])
        )
    if facts.data:
        parts.append("## Data\n\n" + "\n".join(f"- {markdown_cell(name)}" for name in facts.data))
    if facts.metrics:
        parts.append(
            "\n\n".join(["## Results", _metrics(facts), *(f"**{markdown_cell(note)}**" for note in facts.notes)])
        )
    if facts.interference:
        parts.append("## Interference\n\n" + facts.interference)
    if facts.verification is not None:
        parts.append("## Verification\n\n" + _verification(facts.verification, _CHECKED[facts.form]))
    if facts.versions:
        parts.append(
            "## Versions\n\n" + ", ".join(f"{markdown_cell(k)} {markdown_cell(v)}" for k, v in facts.versions.items())
        )
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
    return markdown_table(("", *facts.metric_names), rows)


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
    table = markdown_table(("compared", "largest logit difference", "mean", "mean KL (nats)", "same argmax"), rows)
    result = "passed" if verification["passed"] else "FAILED"
    return f"{result} on {verification['num_positions']} tokens.\n\n{table}"


def run_card(
    run: RunDirectory, recipe: Recipe, state: str, check: dict[str, Any] | None = None, *, form: Form = "run"
) -> str:
    """README.md of a run or of an export.

    Args:
        run: For the name and the kept evaluations.
        recipe: Of the run.
        state: "final" or "step-N": which evaluation stands for the adapter.
        form: What the directory holds: the run, or one of the export formats.
        check: What the verification of an export returned.
    """
    adapter, base = recipe.adapter, recipe.base
    versions = package_versions(("torch", "transformers"))
    source = _source(recipe)
    ids = [_data_id(each) for each in recipe.data.mix]
    seen = _seen(run)
    step = int(state.removeprefix("step-")) if state.startswith("step-") else None
    results = stored_results(run, step)
    tasks = list(results["adapter"].tasks) if "adapter" in results else []
    worse = worse_than_base(results["base"], results["adapter"]) if len(results) == 2 else []
    sizes = f", rank {adapter.rank}, alpha {adapter.alpha:g}" if adapter.kind in ("lora", "dora") else ""
    return model_card(
        CardFacts(
            base_name=base_name(recipe),
            base_revision=recipe.model.revision if source is None else source.revision,
            title=run.path.resolve().name,
            form=form,
            licence=None if source is None else licence_of(source),
            licence_files=() if source is None or form == "run" else list(licence_files(source)),
            method={
                "adapter": adapter.kind + sizes,
                "base": base.quant if base.quant in ("none", "int8") else f"{base.quant}, block size {base.block_size}",
                "learning rate": recipe.train.lr,
                "state": adapter_in_words(run) if state == "final" else state,
                **_planned(run),
            },
            data=[_data(each, id_) + seen.get(each.label, "") for each, id_ in zip(recipe.data.mix, ids, strict=True)],
            data_ids=[id_ for id_ in ids if id_ is not None],
            metric_names=[f"answer NLL, {label}" for label in results] if tasks else [],
            metrics={task: [result.tasks[task].nll_per_token for result in results.values()] for task in tasks},
            notes=[f"{each.in_words()}." for each in worse],
            verification=check,
            interference=interference_in_words(run),
            versions={name: version for name, version in versions.items() if version},
        )
    )


def card_files(
    run: RunDirectory, recipe: Recipe, state: str, check: dict[str, Any] | None = None, *, form: Form
) -> dict[str, str]:
    """Name -> text of the card of an export and of the licence files of its base."""
    source = _source(recipe)
    files = {} if source is None else licence_files(source)
    return files | {"README.md": run_card(run, recipe, state, check, form=form)}


def base_name(recipe: Recipe) -> str:
    """The base as strangers know it: its Hub id, or the last part of its path here."""
    source = recipe.model.source
    if source == BUILTIN:
        return BUILTIN_HUB_ID
    return public_name(source) or Path(source).name


def _source(recipe: Recipe) -> ModelSource | None:
    try:
        return find_source(recipe, weights=False)
    except UserError:  # moved, or not to be reached: the card says less
        return None


def _data_id(source: SourceConfig) -> str | None:
    if source.task in HUB_TASKS:
        return HUB_TASKS[source.task].id
    return None if source.source is None or is_path(source.source) else source.source


def _data(source: SourceConfig, id_: str | None) -> str:
    return source.label if id_ is None else f"{source.label}: [{id_}](https://huggingface.co/datasets/{id_})"


def _planned(run: RunDirectory) -> dict[str, str]:
    """Of the run's plans: its steps, and its peak of memory where it was planned."""
    mix, plan = _read(run, "mix.json"), _read(run, "plan.json")
    found = {"steps": f"{mix['num_steps']:,}, {mix['num_draws']:,} examples"} if mix else {}
    if plan:
        found["planned peak"] = f"{size_text(plan['peak_bytes'])} on {plan['device']}"
    return found


def _seen(run: RunDirectory) -> dict[str, str]:
    """Source -> how much of it the run has seen."""
    return {
        each["name"]: f" ({each['num_draws']:,} examples, {each['share_seen']:.1%} of all)"
        for each in (_read(run, "mix.json") or {}).get("sources", ())
    }


def _read(run: RunDirectory, name: str) -> dict[str, Any] | None:
    file = run.inside(name)
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
