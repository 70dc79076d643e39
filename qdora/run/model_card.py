"""The model card of a run or of an export: README.md with the Hub's front matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

import qdora
from qdora.data.commonsense_hub import HUB_TASKS
from qdora.errors import UserError
from qdora.evaluation.before_after import worse_than_before
from qdora.files.environment import package_versions
from qdora.files.json_file import read_json_object
from qdora.files.markdown_table import markdown_cell, markdown_table
from qdora.files.run_directory import PLAN_FILE, RunDirectory
from qdora.model.build_model import find_source
from qdora.model.licence import Licence, licence_files, licence_of
from qdora.model.peft_config import sizes_in_words
from qdora.model.source import BUILTIN, BUILTIN_HUB_ID, ModelSource, public_name
from qdora.recipe.byte_size import size_text
from qdora.recipe.data_settings import SourceConfig, is_path
from qdora.recipe.settings import Recipe
from qdora.run.adapter_step import adapter_in_words, state_step, stored_results
from qdora.run.task_conflicts import interference_in_words

Form = Literal["run", "merged", "original", "requantized", "nf4-lora", "gguf", "peft"]
"""What the directory of a card holds."""

_CONTENTS: dict[Form, str] = {
    "run": "This is a run directory. `adapter/` holds the trained adapter in PEFT's format, for the quantised base.",
    "merged": (
        "Base and adapter are merged into one dense weight per layer. The quantised base was dequantised, the adapter "
        "was applied in float32, and the result was rounded once."
    ),
    "original": (
        "The adapter is merged into the original weights of the base; there, DoRA's norms were computed again. The "
        "adapter was trained on the quantised base, so this is not exactly the trained model."
    ),
    "requantized": (
        "Base and adapter are merged in float32 and quantised to 4 bits again, as a bitsandbytes checkpoint. This "
        "second rounding was not part of the training, so this is not exactly the trained model."
    ),
    "peft": (
        "This is the trained adapter alone, in PEFT's format. Load it on the base named above, quantised by "
        "bitsandbytes as the table says; on others it gives other results. `qdora.json` holds the exact scale of "
        "every layer."
    ),
    "gguf": (
        "Base and adapter are merged in float32 into one dense weight per layer, and written by llama.cpp's own "
        "converter. Its tensors were compared with the merge; `export.json` counts those that could not be checked.\n\n"
        "```bash\n"
        "llama-server -m model-*.gguf\n"
        'echo "FROM ./$(ls model-*.gguf)" > Modelfile && ollama create my-model -f Modelfile\n'
        "```"
    ),
    "nf4-lora": (
        "The base is a bitsandbytes 4-bit checkpoint. Its block scales are multiplied by the gain of DoRA, and "
        "`adapter/` is the plain LoRA for it. Together they are the trained model, without another rounding to 4 bits. "
        "Do not double quantise the block scales: that rounds each of them to 8 bits. The base without the adapter is "
        "not the model that training started from.\n\n"
        "```python\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), f"{directory}/adapter")\n'
        "```"
    ),
}
_OWN_CODE = "The base has Python code of its own: load it with `trust_remote_code=True`, after reading that code."
_CHECKED: dict[Form, str] = {
    "merged": "merged",
    "original": "merged on the original weights",
    "requantized": "merged and quantised again",
    "nf4-lora": "4-bit base and LoRA",
    "gguf": "GGUF",
}


def card_files(run: RunDirectory, recipe: Recipe, state: str, *, form: Form) -> dict[str, str]:
    """Name -> text of the card of an export before its check, and of the licence files of its base.

    Args: As of `run_card`.
    """
    source = _source(recipe)
    files = {} if source is None else licence_files(source)
    return files | {"README.md": run_card(run, recipe, state, form=form)}


def run_card(
    run: RunDirectory, recipe: Recipe, state: str, check: dict[str, Any] | None = None, *, form: Form = "run"
) -> str:
    """README.md of a run or of an export.

    Args:
        run: For its name and the evaluations that it keeps.
        recipe: The recipe of the run.
        state: "final" or "step-N": the state of the adapter that the card describes.
        check: What the verification of an export returned.
        form: What the directory holds.
    """
    adapter, base = recipe.adapter, recipe.base
    source = _source(recipe)
    name = BUILTIN_HUB_ID if recipe.model.source == BUILTIN else public_name(recipe.model.source)
    adopted = run.adopted().get("adopted")
    data = () if adopted else recipe.data.mix  # nobody knows what an adopted adapter was trained on, and how
    ids = [_data_id(each) for each in data]
    mix, plan = _read(run, "mix.json"), _read(run, PLAN_FILE)
    step, num_steps = state_step(run, state), mix.get("num_steps")
    more_steps = None if step in (None, num_steps) else num_steps  # mix.json counts all steps of the run
    seen = {each["name"]: f" ({_seen(each, more_steps)})" for each in mix.get("sources", ())}
    results = stored_results(run, adapter.start_label, step)
    tasks = list(results["adapter"].tasks) if "adapter" in results else []
    worse = worse_than_before(*results.values()) if len(results) == 2 else []
    rank, alpha = sizes_in_words(run.adapter, adapter.rank, adapter.alpha)
    sizes = f", rank {rank}, alpha {alpha}" if adapter.kind in ("lora", "dora") else ""
    method: dict[str, Any] = {
        "adapter": adapter.kind + sizes,
        **({} if adapter.start_in_words is None else {"starts from": adapter.start_in_words}),
        "quantisation of the base": base.quant_in_words,
        "learning rate": recipe.train.lr,
        "state": adapter_in_words(run) if state == "final" else state,
    }
    if adopted:
        method = {key: method[key] for key in ("adapter", "quantisation of the base")}
        method["quantisation of the base"] += f" ({adopted['known']})"
    if adapter.also_train:
        rows = "rows of the new tokens" if adapter.also_train_rows == "new" else "whole"
        method["also trained"] = f"{', '.join(adapter.also_train)} ({rows})"
    if recipe.model.add_tokens:
        method["new tokens"] = ", ".join(f"`{token}`" for token in recipe.model.add_tokens)
    if mix:
        whole = f"{num_steps:,}, {mix['num_draws']:,} examples"
        method["steps"] = whole if more_steps is None else f"{step:,} of {more_steps:,}"
    trained_part = _read(run, "environment.json").get("trained_part")
    if trained_part is not None:
        method["trained part"] = trained_part
    if plan:
        method["planned peak"] = f"{size_text(plan['peak_bytes'])} on {plan['device']}"
    versions = package_versions(("torch", "transformers"))
    return model_card(
        CardFacts(
            base_name=name or Path(recipe.model.source).name,
            base_revision=recipe.model.revision if source is None else source.revision,
            title=run.path.resolve().name,
            form=form,
            by=", exported" if adopted else "",
            multimodal=trained_part is not None,
            has_own_code=form != "gguf" and recipe.model.trust_remote_code and _has_code(source),
            licence=None if source is None else licence_of(source),
            licence_files=() if source is None or form == "run" else list(licence_files(source)),
            method=method,
            data=[_data(each, id_) + seen.get(each.label, "") for each, id_ in zip(data, ids, strict=True)],
            data_ids=[id_ for id_ in ids if id_ is not None],
            metric_names=[f"answer NLL, {label}" for label in results] if tasks else [],
            metrics={task: [result.tasks[task].nll_per_token for result in results.values()] for task in tasks},
            notes=[f"{each.in_words()}." for each in worse],
            verification=check,
            interference=interference_in_words(run),
            versions={name: version for name, version in versions.items() if version},
        )
    )


def _seen(part: Mapping[str, Any], num_steps: int | None) -> str:
    """'28 examples, 86 draws (3.07 passes)', from a source of mix.json; of a stream '86 examples seen'.

    With `num_steps`, those of the run, for a state after fewer: '28 examples, 86 draws in all 8 steps (3.07 passes)',
    '86 examples in all 8 steps'.
    """
    number = f"{part['num_draws']:,}"
    if part["num_examples"] is None:
        return f"{number} examples seen" if num_steps is None else f"{number} examples in all {num_steps:,} steps"
    times = f"{number} draws" if num_steps is None else f"{number} draws in all {num_steps:,} steps"
    return f"{part['num_examples']:,} examples, {times} ({part['epochs']:.2f} passes)"


def _source(recipe: Recipe) -> ModelSource | None:
    try:
        return find_source(recipe, weights=False)
    except UserError:  # moved or not reachable: the card says less
        return None


def _has_code(source: ModelSource | None) -> bool:
    return source is not None and any(source.path.glob("*.py"))


def _data_id(source: SourceConfig) -> str | None:
    """The data set's id on the Hub; None for a file or a built-in demo."""
    if source.task in HUB_TASKS:
        return HUB_TASKS[source.task].id
    return None if source.source is None or is_path(source.source) else source.source


def _data(source: SourceConfig, id_: str | None) -> str:
    return source.label if id_ is None else f"{source.label}: [{id_}](https://huggingface.co/datasets/{id_})"


def _read(run: RunDirectory, name: str) -> dict[str, Any]:
    """A JSON file of the run; empty if there is none."""
    file = run.inside(name)
    return read_json_object(file) if file.is_file() else {}


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says. All but the base is optional: what is not known is left out, never guessed."""

    base_name: str
    base_revision: str | None = None
    title: str = "Merged model"
    form: Form = "merged"
    by: str = ""
    """What qdora did, if it did not train."""
    multimodal: bool = False
    """The base reads images, too."""
    has_own_code: bool = False
    """The classes of the base are in files of its publisher."""
    licence: Licence | None = None
    """Licence of the base."""
    licence_files: Sequence[str] = ()
    """Names of the base's licence files that are beside the card."""
    method: Mapping[str, Any] = field(default_factory=dict)
    """Setting -> value: adapter kind, rank, alpha, base quantisation, steps, learning rate."""
    data: Sequence[str] = ()
    data_ids: Sequence[str] = ()
    """Ids of the data sets that are on the Hub."""
    metric_names: Sequence[str] = ()
    """Columns of the table: "base" or "start", "adapter", "merged"."""
    metrics: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Row of the table -> one number a column."""
    notes: Sequence[str] = ()
    """Warnings below the table."""
    verification: Mapping[str, Any] | None = None
    """Result of the verification of the export."""
    interference: str = ""
    """How the tasks influence each other, in words."""
    versions: Mapping[str, str] = field(default_factory=dict)


def model_card(facts: CardFacts) -> str:
    """The text of README.md; the same facts give the same text.

    Raises:
        ValueError: A row of metrics has another number of values than there are columns.
    """
    library = facts.form if facts.form in ("gguf", "peft") else "transformers"
    pipeline = "image-text-to-text" if facts.multimodal else "text-generation"
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": pipeline, "tags": ["qdora"]}
    if not facts.base_name.startswith((".", "/")) and "/" in facts.base_name:
        front["base_model"] = facts.base_name
        front["base_model_relation"] = "adapter" if facts.form == "peft" else "finetune"
    if facts.data_ids:
        front["datasets"] = sorted(set(facts.data_ids))
    if facts.licence is not None:
        named = {"license": facts.licence.id, "license_name": facts.licence.name, "license_link": facts.licence.link}
        front |= {key: value for key, value in named.items() if value is not None}
    contents = _CONTENTS[facts.form]
    if facts.multimodal:
        contents = contents.replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    if facts.has_own_code:
        contents += f"\n\n{_OWN_CODE}"
    revision = f" at revision `{facts.base_revision}`" if facts.base_revision else ""
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---",
        f"# {facts.title}",
        f"Fine-tuned from `{facts.base_name}`{revision}{facts.by} with qdora {qdora.__version__}. {contents}",
    ]
    if facts.method:
        parts.append(
            "## Training\n\n" + markdown_table(("setting", "value"), [(k, str(v)) for k, v in facts.method.items()])
        )
    if facts.data:
        parts.append("## Data\n\n" + "\n".join(f"- {markdown_cell(name)}" for name in facts.data))
    if facts.metrics:
        parts += ["## Results", _metrics(facts), *(f"**{markdown_cell(note)}**" for note in facts.notes)]
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


def _licence(facts: CardFacts) -> str:
    licence = facts.licence
    if licence is None:
        text = "No licence of the base was found. If it has one, it also applies to this model."
    else:
        named = f"`{licence.name or licence.id}`"
        text = f"The base has the licence {f'[{named}]({licence.link})' if licence.link else named}, which also applies"
        text += " to this model."
    if facts.licence_files:
        text += f" Its texts are beside this card: {', '.join(f'`{name}`' for name in facts.licence_files)}."
    return text + " The data sets have their own licences."


def _metrics(facts: CardFacts) -> str:
    for name, values in facts.metrics.items():
        if len(values) != len(facts.metric_names):
            raise ValueError(f"metrics of {name!r}: {len(values)} values for {len(facts.metric_names)} columns.")
    rows = [(name, *("" if v is None else f"{v:.3f}" for v in values)) for name, values in facts.metrics.items()]
    return markdown_table(("", *facts.metric_names), rows)


def _verification(verification: Mapping[str, Any], form: str) -> str:
    result = "passed" if verification["passed"] else "FAILED"
    if not verification["num_positions"]:
        return f"{result} without a comparison of logits: the export did not fit in memory beside the trained model."
    running = f"adapter in {verification['running_dtype']}"
    compared = {
        "exported_vs_reference": f"{form}, adapter in float32",
        "exported_vs_running": f"{form}, {running}",
        "reference_vs_running": f"adapter in float32, {running}",
    }
    numbers = ("max_logit_difference", "mean_logit_difference", "kl_mean")
    rows = [
        (
            label,
            *(f"{verification[key][name]:.3g}" for name in numbers),
            f"{100 * verification[key]['argmax_agreement']:.2f} %",
        )
        for key, label in compared.items()
    ]
    table = markdown_table(("compared", "largest logit difference", "mean", "mean KL (nats)", "same argmax"), rows)
    return f"{result} on {verification['num_positions']} tokens.\n\n{table}"
