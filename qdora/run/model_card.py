"""The model card of a run or of an export: README.md with the Hub's front matter, from model_card.md.j2."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load

import qdora
from qdora.data.commonsense import HUB_TASKS
from qdora.errors import UserError
from qdora.evaluate.suite import LossOrAccuracy, task_changes
from qdora.files.environment import package_versions
from qdora.files.json_file import read_json_object
from qdora.files.markdown_table import markdown_cell, markdown_table
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import find_source
from qdora.model.gguf import read_header
from qdora.model.peft_config import sizes_in_words
from qdora.model.source import BUILTIN, BUILTIN_HUB_ID, LICENCE_FILES, ModelSource, public_name
from qdora.recipe.data_settings import SourceConfig, is_path
from qdora.recipe.options import Form
from qdora.recipe.settings import Recipe
from qdora.train.evals import adapter_in_words, state_step

"""What the directory of a card holds."""

EVALUATION_COLUMNS = ("data", "task", "metric", "examples", "before", "after", "change", "95 % interval")
_METRICS: tuple[LossOrAccuracy, ...] = ("nll_per_token", "acc")
_LARGEST_LICENCE = 1 << 20


def card_files(run: RunDirectory, recipe: Recipe, state: str, *, form: Form) -> dict[str, str]:
    """Name -> text of the card of an export before its check, and of the licence files of its base."""
    return {**_licence_files(_source(recipe)), "README.md": run_card(run, recipe, state, form=form)}


def run_card(
    run: RunDirectory,
    recipe: Recipe,
    state: str,
    check: dict[str, Any] | None = None,
    *,
    form: Form | Literal["run"] = "run",
) -> str:
    """README.md of a run or of an export.

    Args:
        run: For its name and the evaluations that it keeps.
        recipe: The recipe of the run.
        state: "final" or "step-N": the state of the adapter that the card describes.
        check: What the verification of an export returned.
        form: What the directory holds.
    """
    source, is_adopted, mix = _source(recipe), bool(run.adopted()), read_record(run, "mix.json")
    name = BUILTIN_HUB_ID if recipe.model.source == BUILTIN else public_name(recipe.model.source)
    hub_id = name if name is not None and "/" in name else None
    data = () if is_adopted else recipe.data.mix  # nobody knows what an adopted adapter was trained on
    step, training = state_step(run, state), training_facts(run, recipe)
    if not is_adopted:
        training["state"] = adapter_in_words(run) if state == "final" else state
    if mix:
        training["steps"] = f"{mix['num_steps'] if step is None else step:,} of {mix['num_steps']:,}"
    seen = {
        each["name"]: f" ({each['num_draws']:,} draws of {each['num_examples'] or 'streamed'} examples in all steps)"
        for each in mix.get("sources", ())
    }
    is_multimodal = "trained part" in training
    metadata = ModelCardData(
        base_model=hub_id,
        base_model_relation=hub_id and ("adapter" if form == "peft" else "finetune"),
        datasets=sorted({id_ for each in data if (id_ := _data_id(each)) is not None}) or None,
        library_name=form if form in ("gguf", "peft") else "transformers",
        pipeline_tag="image-text-to-text" if is_multimodal else "text-generation",
        tags=["qdora"],
        **_licence(source),
    )
    has_code = recipe.model.trust_remote_code and source is not None and any(source.path.glob("*.py"))
    rows = [[each["data"], *row] for each in evaluations(run, step) for row in each["rows"]]
    card = ModelCard.from_template(
        metadata,
        template_path=str(Path(__file__).with_name("model_card.md.j2")),
        title=run.path.resolve().name,
        base=name or Path(recipe.model.source).name,
        revision=recipe.model.revision if source is None else source.revision,
        how=", exported" if is_adopted else "",
        versions={"qdora": qdora.__version__, **package_versions(("torch", "transformers"))},
        form=form,
        model_class="AutoModelForImageTextToText" if is_multimodal else "AutoModelForCausalLM",
        has_own_code=form != "gguf" and has_code,
        training=markdown_table(("setting", "value"), [*training.items()]),
        data=[markdown_cell(_data(each) + seen.get(each.label, "")) for each in data],
        results=markdown_table(EVALUATION_COLUMNS, rows) if rows else "",
        check=check,
        texts=[] if form == "run" else [*_licence_files(source)],
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def training_facts(run: RunDirectory, recipe: Recipe) -> dict[str, str]:
    """Setting -> value: what was trained on which base, and how; without what is not known."""
    adapter, adopted = recipe.adapter, run.adopted().get("adopted")
    sizes = ", rank {}, alpha {}".format(*sizes_in_words(run.adapter, adapter.rank, adapter.alpha))
    rows = "rows of the new tokens" if adapter.also_train_rows == "new" else "whole"
    found = {
        "adapter": adapter.kind + (sizes if adapter.kind in ("lora", "dora") else ""),
        "starts from": adapter.start_in_words,
        "quantisation of the base": recipe.base.quant_in_words + (f" ({adopted['known']})" if adopted else ""),
        "optimizer": None if adopted else f"{recipe.train.optimizer}, learning rate {recipe.train.lr:g}",
        "also trained": f"{', '.join(adapter.also_train)} ({rows})" if adapter.also_train else None,
        "new tokens": ", ".join(f"`{token}`" for token in recipe.model.add_tokens),
        "trained part": read_record(run, "environment.json").get("trained_part"),
    }
    return {setting: value for setting, value in found.items() if value}


def evaluations(run: RunDirectory, step: int | None) -> list[dict[str, Any]]:
    """Each evaluation of the state after `step` steps, with that of the base on the same data, and the changes.

    First that of the run itself, then those of `qdora eval` (eval/final-NAME.json or step-N-NAME.json, and
    base-NAME.json). Answers in words are evaluations of their own. `rows` are the cells of a table, from "task" on.
    """
    named = [(f"validation{end}", f"step-0{end}", f"step-{step}{end}") for end in ("", "-generated")]
    for file in sorted((run.path / "eval").glob("*.json")):
        name = re.sub(r"^(final|step-\d+)-(?!generated$)", "", file.stem)
        if name != file.stem and read_record(run, f"eval/{file.name}").get("step") == step:
            named.append((name, f"base-{name}", file.stem))
    found = []
    for data, *names in named:
        both = [read_record(run, f"eval/{name}.json") for name in names]
        known = [each if "per_example" in each else dict[str, Any]() for each in both]  # lm-evaluation-harness has none
        before, after = known if step else (known[0], dict[str, Any]())
        for record in (*before.get("per_example", ()), *after.get("per_example", ())):
            if "outcome" in record:  # a generated answer
                record["acc"] = float(record["outcome"] == "right")
        changes: dict[str, Any] = {
            metric: [asdict(each) for each in task_changes(before, after, metric)] for metric in _METRICS
        }
        rows = [_cells(change, metric) for metric in _METRICS for change in changes[metric]]
        if rows:
            found.append({"data": data, "step": step if after else 0, **changes, "rows": rows})
    return found


def _cells(change: Mapping[str, Any], metric: str) -> list[str]:
    label, factor, digits = ("NLL, nats a token", 1, 4) if metric == "nll_per_token" else ("accuracy, %", 100, 1)

    def shown(key: str, sign: str = "") -> str:
        return "" if change[key] is None else f"{factor * change[key]:{sign}.{digits}f}"

    ends = " to ".join(filter(None, (shown("lower", "+"), shown("upper", "+"))))
    values = (shown("before"), shown("after"), shown("difference", "+"), ends)
    return [change["task"], label, f"{change['num_examples']:,}", *values]


def read_record(run: RunDirectory, name: str) -> dict[str, Any]:
    """A JSON file of the run; empty if there is none."""
    file = run.inside(name)
    return read_json_object(file) if file.is_file() else {}


def _source(recipe: Recipe) -> ModelSource | None:
    try:
        return find_source(recipe, weights=False)
    except UserError:  # moved or not reachable: the card says less
        return None


def _licence(source: ModelSource | None) -> dict[str, Any]:
    """license, license_name and license_link, as the card or the GGUF header of the base states them."""
    stated: Mapping[str, Any] = {}
    if source is not None and source.is_gguf:
        settings = read_header(source.path).settings
        stated = {key.removeprefix("general.").replace(".", "_"): value for key, value in settings.items()}
    elif source is not None:
        try:
            stated = metadata_load(source.path / "README.md") or {}
        except (OSError, ValueError, yaml.YAMLError):
            stated = {}
    names = ("license", "license_name", "license_link")
    found = {name: value for name in names if isinstance(value := stated.get(name), str) and value}
    link = found.get("license_link", "://")
    if source is not None and source.kind == "hub" and "://" not in link:
        found["license_link"] = f"https://huggingface.co/{source.name}/blob/{source.revision or 'main'}/{link}"
    return found if "license" in found else {}


def _licence_files(source: ModelSource | None) -> dict[str, str]:
    """Name -> text of the licence files in the directory of a base."""
    if source is None or source.is_gguf:
        return {}
    files = sorted({file for pattern in LICENCE_FILES for file in source.path.glob(pattern)})
    texts = [file for file in files if file.is_file() and file.stat().st_size <= _LARGEST_LICENCE]
    return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in texts}


def _data_id(source: SourceConfig) -> str | None:
    """The data set's id on the Hub; None for a file or a built-in demo."""
    if source.task in HUB_TASKS:
        return HUB_TASKS[source.task].id
    return None if source.source is None or is_path(source.source) else source.source


def _data(source: SourceConfig) -> str:
    id_ = _data_id(source)
    return source.label if id_ is None else f"{source.label}: [{id_}](https://huggingface.co/datasets/{id_})"
