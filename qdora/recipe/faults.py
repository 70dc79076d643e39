"""The faults of a recipe, one line each: `path.to.key: what is wrong, got ..., allowed: ..., nearest name`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qdora.errors import nearest
from qdora.files.access_tokens import masked
from qdora.recipe.data_settings import TASKS, SourceConfig
from qdora.recipe.section import Section, in_yaml
from qdora.recipe.settings import Recipe

_MAX_SHOWN = 60  # characters of a given value that a fault repeats
PEER_NAMES = {
    **dict.fromkeys(("base_model", "model_name_or_path"), "source"),
    **dict.fromkeys(("attn_implementation", "flash_attention"), "attention"),
    **dict.fromkeys(("torch_dtype", "bf16"), "dtype"),
    "add_new_tokens": "add_tokens",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "quantization_bit"), "quant"),
    "bnb_4bit_use_double_quant": "double_quant",
    **dict.fromkeys(("use_dora", "peft_use_dora", "finetuning_type", "fine_tune_type"), "kind"),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "rank"),
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target", "lora_target_linear"), "targets"),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), "rank_stabilized"),
    "init_lora_weights": "init",
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save", "additional_target"), "also_train"),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), "resume_from"),
    **dict.fromkeys(("dataset", "datasets"), "mix"),
    "max_samples": "data.mix[].limit",
    **dict.fromkeys(("max_seq_length", "sequence_len", "cutoff_len"), "max_length"),
    "sample_packing": "packing",
    **dict.fromkeys(("assistant_only_loss", "completion_only_loss", "train_on_inputs", "train_on_prompt"), "loss_on"),
    "mask_prompt": "loss_on",
    **dict.fromkeys(("val_set_size", "val_size"), "validation_fraction"),
    "learning_rate": "lr",
    "loraplus_lr_ratio": "lr_ratio_B",
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "epochs"),
    **dict.fromkeys(("max_steps", "iters"), "steps"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"), "batch"),
    "micro_batch_size": "micro_batch_tokens",
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type"), "schedule"),
    "cosine_min_lr_ratio": "lr_end",
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "warmup"),
    "max_grad_norm": "clip",
    "optim": "optimizer",
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "betas"),
    "adam_epsilon": "eps",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), "parallel"),
    "seed": "train.seed",
    **dict.fromkeys(("logging_steps", "steps_per_report"), "log_every"),
    **dict.fromkeys(("save_steps", "save_every"), "checkpoint_every"),
    "save_total_limit": "keep_checkpoints",
    **dict.fromkeys(("eval_steps", "eval_strategy", "evals_per_epoch", "steps_per_eval"), "every"),
    "load_best_model_at_end": "best_by",
    "metric_for_best_model": "best_metric",
    "early_stopping_patience": "patience",
    **dict.fromkeys(("gradient_checkpointing", "grad_checkpoint"), "checkpointing"),
    "report_to": "trackers",
}
"""What transformers, TRL, PEFT, axolotl, LLaMA-Factory and mlx-lm call a setting -> its key here, or its whole path
where several sections have the key."""
PEER_OPTIONS = {
    **dict.fromkeys(("output_dir", "adapter_path"), "--run-dir"),
    "resume_from_checkpoint": "--resume",
}
"""What they call something that is here an option of `qdora train`."""
_PEER_VALUES = {"constant_with_warmup": "constant"}
_PLAIN_TYPES = {"tuple_type": "a list", "dict_type": "a table of name: value"}


def dotted(steps: Sequence[int | str]) -> str:
    """('data', 'mix', 0, 'limit') -> 'data.mix[0].limit', on one line and without access tokens."""
    names = [step if isinstance(step, int) or step.isprintable() else repr(step) for step in steps]
    return masked("".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).removeprefix("."))


def one_line(text: str) -> str:
    """Text from a library in a fault: on one line, without access tokens."""
    return masked(" ".join(text.split()))


def reason_of(error: Exception) -> str:
    """The message of somebody else's error in one line."""
    return one_line(f"{type(error).__name__}: {error}")[:300]


def shown(value: Any) -> str:
    """A given value in a fault: as in YAML, short, on one line, without access tokens."""
    try:
        text = masked(in_yaml(value))
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def fault_lines(error: ValidationError, root: type[Section] = Recipe) -> list[tuple[str, str]]:
    """(path, 'path: what is wrong, ...') for every error that pydantic found in a document of type `root`."""
    return [line for detail in error.errors(include_url=False) for line in _lines(detail, root)]


def unknown_key(section: type[Section], key: str, root: type[Section] = Recipe) -> str:
    """'unknown key, allowed: ...' with the key of this section that is meant or nearest, or the section that has it."""
    names, meant = list(section.model_fields), PEER_NAMES.get(key, key)
    last = meant.rpartition(".")[2]
    close = nearest(last, names) if last == key or last in names else ""
    if key in PEER_OPTIONS:
        close = f" Did you mean the option {PEER_OPTIONS[key]} of qdora train?"
    elif not close:
        path = path_of(meant, root)
        close = f" Did you mean '{path}'?" if path else ""
    return masked(f"unknown key, allowed: {', '.join(names)}.{close}")


def path_of(key: str, root: type[Section] = Recipe) -> str | None:
    """The first setting of this name: 'lr' -> 'train.lr'; a path stays as it is. None if no section has it."""
    if key.partition(".")[0] in root.model_fields:
        return key
    sections = (name for name, field in root.model_fields.items() if key in _keys(field.annotation))
    return next((f"{name}.{key}" for name in sections), None)


def container(annotation: Any, step: int | str = "") -> Any:
    """The section, `tuple[...]` or `dict[...]` within a field's type, if possible one that `step` leads into (an index
    into a tuple, a name into the others); the type itself if it has none."""
    if get_origin(annotation) is Annotated:
        return container(get_args(annotation)[0], step)
    if get_origin(annotation) in (Union, UnionType):
        parts = [container(part, step) for part in get_args(annotation)]
        found = [part for part in parts if get_origin(part) in (tuple, dict) or _keys(part)]
        fitting = (part for part in found if (get_origin(part) is tuple) == isinstance(step, int))
        return next(fitting, found[0] if found else annotation)
    return annotation


def is_section(annotation: Any) -> TypeGuard[type[Section]]:
    """Whether a field's type is a section."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _keys(annotation: Any) -> list[str]:
    return list(annotation.model_fields) if is_section(annotation) else []


def _section_at(steps: Sequence[int | str], root: type[Section]) -> type[Section]:
    """The section that a path of keys leads to."""
    found: Any = root
    for step in steps:
        inner = get_args(found)[0] if isinstance(step, int) else found.model_fields[step].annotation
        found = container(inner)
    assert is_section(found), f"{steps} leads to {found}"
    return found


def _lines(detail: ErrorDetails, root: type[Section]) -> Iterator[tuple[str, str]]:
    steps, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    if steps[-1:] == ("[key]",):  # pydantic's mark for the key of a table
        steps = steps[:-1]
    path, got = dotted(steps), f"got {shown(detail['input'])}"
    if kind == "faults":  # from Section._check
        for key, what in context["faults"]:
            inner = f"{path}.{key}".strip(".")
            yield inner, f"{inner}: {masked(what)}"
        return
    if kind == "extra_forbidden":
        text = unknown_key(_section_at(steps[:-1], root), str(steps[-1]), root)
    elif kind == "missing":
        text = f"missing, allowed: {_wanted(steps, root)}"
    elif kind == "allowed":
        text = f"not valid, {got}, allowed: {context['allowed']}.{masked(context['nearest'])}"
    elif kind == "literal_error":
        names = re.findall(r"'([^']*)'", context["expected"])
        given = detail["input"]
        close = nearest(_PEER_VALUES.get(given, given), names) if isinstance(given, str) else ""
        text = f"not valid, {got}, allowed: {', '.join(names) or context['expected']}.{close}"
    elif kind == "model_type":
        section, given = _section_at(steps, root), detail["input"]
        is_source = section is SourceConfig and isinstance(given, str)
        key = "task" if given in TASKS else "source"
        fix = f" Fix: write {{{key}: {masked(in_yaml(given))}}}." if is_source else ""
        text = f"not a section, {got}, allowed: {', '.join(section.model_fields)}.{fix}"
    elif kind == "too_short":
        least = context["min_length"]
        text = f"not valid, {got}, allowed: at least {'one entry' if least == 1 else f'{least} entries'}."
    elif kind in _PLAIN_TYPES:
        text = f"not valid, {got}, allowed: {_PLAIN_TYPES[kind]}."
    else:
        text = f"{one_line(detail['msg'])}, {got}."
    yield path, f"{path}: {text}" if path else text


def _wanted(steps: Sequence[int | str], root: type[Section]) -> str:
    """What is missing at a path."""
    field = _section_at(steps[:-1], root).model_fields[str(steps[-1])]
    keys = _keys(field.annotation)
    return f"a section of {', '.join(keys)}." if keys else str(field.description)
