"""Export a run's model in a form that can be deployed, and check it against the running model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from qdora.adapter.expert_linear import AdaptedExperts
from qdora.errors import DiskFull, RunFailure, UserError
from qdora.export.audit import audit, audit_table
from qdora.export.checkpoint_writer import UNFINISHED, check_new_directory, save_tokenizer
from qdora.export.gguf import export_gguf
from qdora.export.hub_push import push
from qdora.export.logit_comparison import comparison_text, validation_examples
from qdora.export.merged import merge_of, open_merge, write_merge
from qdora.export.nf4_lora import export_nf4_lora
from qdora.export.verify import verify_merged, verify_nf4_lora, verify_requantized
from qdora.files.atomic import (
    atomic_directory,
    atomic_write_json,
    atomic_write_text,
    disk_failures,
    remove_directory,
    sync,
    work_lock,
)
from qdora.files.console import bar, consoles
from qdora.files.run_directory import open_run
from qdora.memory.oom import keep_freed_memory
from qdora.model.build_model import DTYPES, find_source, write_adapter
from qdora.model.checkpoint import shorten
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import load_config
from qdora.model.names import taken_for_experts
from qdora.recipe.byte_size import parse_size
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import load_recipe, recipe_of_run
from qdora.run.load_run import TrainedRun, adopted_run, is_adapter, load_run, trained_state
from qdora.run.model_card import card_files, run_card

logger = logging.getLogger("qdora")

_TOO_WIDE_FOR_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Types of models whose activations leave the range of float16: vLLM refuses to run them in it."""


def export_run(
    run: Path, out: Path, options: ExportOptions = ExportOptions(), *, console: Console | None = None
) -> dict[str, Any]:
    """Write a run's model to the new or empty directory `out`, check it, and return the content of `out`/export.json.

    `run` may also be an adapter of any trainer in PEFT's format.

    Progress goes to standard error and results to standard output, or both to `console`.

    Raises:
        UserError: Wrong arguments, or a run that the format cannot hold.
        RunFailure: The reloaded model differs from the running one; `out` is kept for inspection. It is also kept, with
            a warning, if the check itself or what follows it raises, but not if the disk is full at its last files.
    """
    console, results = consoles(console)
    keep_freed_memory()
    with _opened(run, options) as opened:
        kind = recipe_of_run(open_run(opened).recipe_file).adapter.kind
        if options.audit and kind not in ("lora", "dora"):
            raise UserError(f"--audit: needs a LoRA or DoRA adapter, got adapter.kind: {kind}. Fix: remove --audit.")
        with disk_failures(out), _unfinished(out) as place:
            document, sentences = _export(opened, place, options, console)
    for sentence in sentences:
        _say(results, sentence)
    check = document.get("verification")
    if check is not None:
        _say(results, _check_in_words(check))
        if not check["passed"]:
            why = "; ".join(check["faults"])
            raise RunFailure(
                f"{out}: do not use this export, its model is not the one that was trained: {why}. Its files are kept "
                "for inspection. Fix: delete it and export again; if that gives the same, please report it.",
                safe=[run],
            )
    _say(results, f"exported model: {out}")
    if options.push is None:
        return document
    address = push(out, options.push, private=not options.public)
    _say(results, f"uploaded: {address}")
    return document | {"pushed": address}


@contextmanager
def _opened(run: Path, options: ExportOptions) -> Iterator[Path]:
    """A run as it is, or an adapter as a run. Raises UserError for options that do not fit."""
    adopts = is_adapter(run)
    of_others = {"--step": options.step} if adopts else {"--base-model": options.base_model, "--quant": options.quant}
    used_with, got = ("a run", "an adapter") if adopts else ("an adapter", "a run")
    if given := [name for name, value in of_others.items() if value is not None]:
        raise UserError(f"{' and '.join(given)}: used only with {used_with}, got {got}. Fix: remove {given[0]}.")
    if not adopts:
        yield run
        return
    with adopted_run(run, options.base_model, options.quant) as path:
        yield path


@contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """Where an export is made and checked before it gets its name: a directory of the same name in a hidden one.

    The directory in it must appear whole. After an error in the block it gets its name all the same if it is there (its
    check failed, say), but not after DiskFull; after an interrupt nothing is left. UserError if another process is
    exporting to `out`, or nothing can be made there.
    """
    with ExitStack() as stack:
        with disk_failures(out, "name another directory"):
            check_new_directory(out)
            out = out.absolute()
            out.parent.mkdir(parents=True, exist_ok=True)
            hidden = out.with_name(f".{out.name}{UNFINISHED}")
            place = hidden / out.name
            stack.enter_context(work_lock(out.with_name(f".{out.name}.lock"), str(out)))
            check_new_directory(out)  # another process may just have finished it
            remove_directory(hidden)  # of a killed export
            hidden.mkdir()
        try:
            yield place
        except Exception as error:
            if place.exists() and not isinstance(error, DiskFull):
                os.rename(place, out)
                text = (
                    "%s: the weights are complete and kept, but the export stopped before its check or audit was done."
                )
                logger.warning(f"{text} Fix: delete it and export again.", out)
            raise
        else:
            os.rename(place, out)  # over an empty directory, too
            sync(out.parent)
        finally:
            remove_directory(hidden)


def _export(run: Path, out: Path, options: ExportOptions, console: Console) -> tuple[dict[str, Any], list[str]]:
    """Write all files of an export; returns the content of export.json, and what else to say."""
    writers = {"merged": _export_merged, "nf4-lora": _export_nf4_lora, "gguf": export_gguf, "peft": _export_adapter}
    trained, result, check = writers[options.format](run, out, options, console)
    zeros = _pruned_zeros(trained) if options.form == "merged" else None
    # Names without their paths: the file leaves this machine.
    named = {"format": options.format, "run": run.resolve().name, "state": trained.state}
    document, sentences = {**named, **result, "directory": out.name} | trained.run.adopted(), []
    if check is not None:
        document["verification"] = check
    if zeros is not None:
        document["zeros"] = zeros
    passed = check is None or check["passed"]
    if options.audit and passed:
        if options.base == "original":
            del trained
            trained = load_run(run, step=options.step)
        document["audit"] = _audit(trained, options, console)
        sentences.append(audit_table(document["audit"]))
    card = run_card(trained.run, trained.recipe, trained.state, check, form=options.form)
    with disk_failures(out):  # then nothing is left, so that the same command can be repeated
        atomic_write_text(out / "README.md", card)
        atomic_write_json(out / "export.json", document)
    layers = adapted_layers(trained.model) if options.form == "peft" else {}
    dora = [path for path, layer in layers.items() if layer.magnitude is not None]
    if any(isinstance(layers[path], AdaptedExperts) for path in dora) or taken_for_experts(trained.model, dora):
        sentences.append("PEFT has no DoRA for experts, so only qdora loads this adapter. Fix: use --format merged")
    if zeros is not None and zeros["kept"] < zeros["pruned"]:
        still = f"{zeros['kept']:,} of {zeros['pruned']:,} pruned weights are still zero"
        sentences.append(f"the merge is dense: {still}; adapter.mask: keep keeps them all")
    return document, sentences


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True)


def _export_merged(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], dict[str, Any]]:
    kind = load_config(find_source(load_recipe(open_run(run).recipe_file), weights=False)).model_type
    dtype = _merged_dtype(kind, options)
    if kind in _TOO_WIDE_FOR_FLOAT16 and options.dtype == "float16":
        said = "--dtype float16: activations of %s models can overflow in it, and vLLM refuses it. Fix: use bfloat16."
        logger.warning(said, kind)
    elif kind in _TOO_WIDE_FOR_FLOAT16 and options.dtype is None:
        _say(console, f"the export is in bfloat16: activations of {kind} models can overflow in float16")
    written, load_trained = write_merge(run, out, options, dtype, console, with_card=True)
    trained = load_trained()
    _say(console, "comparing the merged model with the running one")
    verify = verify_requantized if options.form == "requantized" else verify_merged
    text = comparison_text(trained.tokenizer, validation_examples(trained.recipe))
    check = verify(trained.model, out, text)
    more = {"base": options.base, "requantized": options.requantize}
    return trained, written | more, check


def _merged_dtype(kind: str, options: ExportOptions) -> torch.dtype:
    """The dtype of a merge; `kind` is the type of the model."""
    return DTYPES[options.dtype or ("bfloat16" if kind in _TOO_WIDE_FOR_FLOAT16 else "float16")]


def _export_nf4_lora(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], dict[str, Any]]:
    trained = load_run(run, step=options.step)
    published = options.push if options.push is not None and "/" in options.push else None
    with bar(console, "writing the 4-bit base and its LoRA") as progress:
        result = export_nf4_lora(
            trained.model,
            trained.tokenizer,
            out,
            dtype=None if options.dtype is None else DTYPES[options.dtype],
            max_shard_bytes=parse_size(options.shard_size),
            progress=progress,
            extra_files=card_files(trained.run, trained.recipe, trained.state, form="nf4-lora"),
            published_as=published,
        )
    if lost := result["scale_error_if_double_quantised"]:
        change = f"{lost['mean']:.2%} (at most {lost['max']:.2%})"
        _say(console, f"block scales kept in float32; double quantisation would change them by {change}")
    _say(console, "comparing the exported model with the running one")
    text = comparison_text(trained.tokenizer, validation_examples(trained.recipe))
    check = verify_nf4_lora(trained.model, out, text)
    return trained, result, check


def _export_adapter(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], None]:
    """The adapter with the bytes that were trained: there is nothing to compare."""
    trained = load_run(run, step=options.step)
    recipe = trained.recipe
    if recipe.adapter.kind not in ("lora", "dora", "magnitude"):
        raise UserError(f"--format peft: the run has no adapter (adapter.kind: {recipe.adapter.kind}).")
    if any(layer.masked for layer in adapted_layers(trained.model).values()):
        raise UserError("--format peft: PEFT cannot mask B A (adapter.mask: keep). Fix: use --format merged.")
    check_servable(trained.model)
    with atomic_directory(out) as partial:
        write_adapter(trained.model, recipe, partial, shipped=True, extra=trained.run.adopted())
        if recipe.model.add_tokens or recipe.model.tokenizer or recipe.data.chat_template:  # not the base's
            save_tokenizer(trained.tokenizer, partial)
        for name, text in card_files(trained.run, recipe, trained.state, form="peft").items():
            (partial / name).write_text(text, encoding="utf-8")
    return trained, {}, None


def check_servable(model: PreTrainedModel) -> None:
    """Refuse a DoRA adapter with zero rows of W + s B A: PEFT divides by their norm and computes NaN."""
    faults = []
    for path, layer in adapted_layers(model).items():
        num_zero = 0 if layer.magnitude is None else int((layer.row_norm() == 0).sum())
        if num_zero:
            faults.append(
                f"--format peft: {path}: {num_zero} of {layer.out_features} rows of W + s B A are zero, and PEFT's "
                "DoRA gives NaN there. Fix: use --format merged or --format nf4-lora, which write zero rows."
            )
    if faults:
        raise UserError(*shorten(faults))


def _pruned_zeros(trained: TrainedRun) -> dict[str, int] | None:
    """Number of pruned weights of the base, and of those that are zero after the merge; None for an unpruned base."""
    pruned = kept = 0
    adapted = adapted_layers(trained.model)
    for path, frozen in frozen_layers(trained.model).items():
        keep = frozen.keep_mask()
        if keep is not None:
            owner = adapted.get(path.removesuffix(".base"))
            weight = frozen.dequantized() if owner is None else owner.merged_weight()
            pruned += int((~keep).sum())
            kept += int((weight[~keep] == 0).sum())
    return {"pruned": pruned, "kept": kept} if pruned else None


def _audit(trained: TrainedRun, options: ExportOptions, console: Console) -> dict[str, Any]:
    opened = None
    if trained.recipe.base.prune is None:
        where, _ = trained_state(trained.run, trained.recipe, options.step)
        merge, _ = merge_of(trained.run, trained.recipe, where, ExportOptions())
        opened = open_merge(merge)
    return audit(
        trained.model,
        trained.tokenizer,
        opened,
        examples=validation_examples(trained.recipe),
        dtype=_merged_dtype(trained.model.config.model_type, options),
        console=console,
    )


def _check_in_words(check: dict[str, Any]) -> str:
    """The export against the adapter in float32, and against the adapter as it runs, which shows what bf16 costs."""
    result = "passed" if check["passed"] else "FAILED"
    if not check["num_positions"]:
        return f"{result} without a comparison of logits: the export did not fit in memory beside the running model"
    exact, running = check["exported_vs_reference"], check["exported_vs_running"]
    explained = unchecked = ""
    if check["ill_conditioned"]:
        positions = "position" if check["ill_conditioned"] == 1 else "positions"
        explained = f" (including {check['ill_conditioned']} {positions} where the running model itself errs more)"
    if num_unchecked := check.get("tensors", {}).get("num_unchecked"):
        unchecked = f"; layout unknown: {num_unchecked} tensors of the file were not compared with the merge"
    return (
        f"{result} on {check['num_positions']:,} tokens: exported against the "
        f"adapter in float32, largest logit difference {exact['max_logit_difference']:.3g}{explained}, mean KL "
        f"{exact['kl_mean']:.2g} nats, same next token {exact['argmax_agreement']:.2%}; against the adapter as it runs "
        f"({check['running_dtype']}), {running['max_logit_difference']:.3g}, {running['kl_mean']:.2g}, "
        f"{running['argmax_agreement']:.2%}{unchecked}"
    )
