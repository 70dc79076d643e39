"""qdora export: a run's model in a form that can be deployed, checked against the running model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from qdora.errors import RunFailure, UserError
from qdora.export.audit import audit, audit_page
from qdora.export.directory import DTYPES
from qdora.export.gguf import export_gguf
from qdora.export.hub_push import push
from qdora.export.logit_comparison import held_out, texts_of
from qdora.export.merged import merge_of, open_merge, write_merge
from qdora.export.nf4_lora import export_nf4_lora
from qdora.export.options import ExportOptions, check_options
from qdora.export.targets import check_scalings, check_target
from qdora.export.verify import verify_merged
from qdora.export.verify_4bit import verify_nf4_lora, verify_requantized
from qdora.files.atomic import atomic_write_json, atomic_write_text
from qdora.files.console import bar, consoles
from qdora.files.run_directory import RunDirectory, open_run
from qdora.memory.allocator import keep_freed_memory
from qdora.model.adapter_file import describe_adapter
from qdora.model.build_model import write_adapter
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.stored_tensors import shorten
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import TrainedRun, load_run, trained_state
from qdora.run.model_card import card_files, run_card

logger = logging.getLogger("qdora")


def export_run(
    run: Path, out: Path, options: ExportOptions = ExportOptions(), *, console: Console | None = None
) -> dict[str, Any]:
    """Write a run's model to `out` and check it.

    Args:
        run: Run directory.
        out: New or empty directory.
        options: In which form.
        console: Where progress and the check are shown; standard error by default.
    Returns:
        What stands in `out`/export.json.
    Raises:
        UserError: Wrong arguments, or a run that the format cannot hold.
        RunFailure: The reloaded model differs from the running one; `out` is kept for inspection and named.
    """
    console, results = consoles(console)
    keep_freed_memory()
    check_options(options)
    if options.target is not None:
        _check_target(open_run(run), options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not empty, allowed: a new or empty directory.")
    writers = {
        "merged": _export_merged,
        "nf4-lora": _export_nf4_lora,
        "gguf": export_gguf,
        "peft": _export_adapter,
    }
    trained, result, check = writers[options.format](run, out, options, console)
    form = options.form
    zeros = _zeros(trained) if form == "merged" else None
    # Names without their paths: the file leaves this machine.
    named = {"format": options.format, "run": run.resolve().name, "state": trained.state}
    document = {**named, **result, "directory": out.resolve().name}
    if check is not None:
        document["verification"] = check
    if zeros is not None:
        document["zeros"] = zeros
    passed = check is None or check["passed"]
    if options.audit and passed and trained.recipe.adapter.kind in ("lora", "dora"):
        if options.base == "original":
            del trained
            trained = load_run(run, step=options.step)
        document["audit"] = _audit(trained, out, options, console)
    atomic_write_json(out / "export.json", document)
    card = run_card(trained.run, trained.recipe, trained.state, check, form=form)
    (out / "README.md").write_text(card, encoding="utf-8")
    if zeros is not None and zeros["kept"] < zeros["pruned"]:
        results.print(
            f"the merge is dense: {zeros['kept']:,} of {zeros['pruned']:,} pruned weights are still zero; "
            "adapter.mask: keep keeps them all",
            highlight=False,
            soft_wrap=True,
        )
    if check is not None:
        results.print(_verdict(check), markup=False, highlight=False, soft_wrap=True)
    if check is not None and not passed:
        raise RunFailure(
            f"{out}: the exported model is not the one that was trained: {'; '.join(check['faults'])}.",
            safe=[run, out],
        )
    results.print(f"exported model: {out}", markup=False, highlight=False, soft_wrap=True)
    return _pushed(document, out, options, results)


def _check_target(run: RunDirectory, options: ExportOptions) -> None:
    assert options.target is not None
    recipe = load_recipe(run.recipe_file)
    check_target(options.target, options.form, recipe)
    if options.form == "peft" and recipe.adapter.kind == "lora":
        where, _ = trained_state(run, recipe, options.step)
        check_scalings(options.target, describe_adapter(where if where == run.adapter else where / "adapter"))


def _pushed(document: dict[str, Any], out: Path, options: ExportOptions, console: Console) -> dict[str, Any]:
    if options.push is None:
        return document
    address = push(out, options.push, private=not options.public)
    console.print(f"uploaded: {address}", markup=False, highlight=False, soft_wrap=True)
    return document | {"pushed": address}


def _export_merged(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], dict[str, Any]]:
    written = write_merge(run, out, options, DTYPES[options.dtype or "float16"], console, with_card=True)
    trained = written.load()
    console.print("comparing the merged model with the running one", highlight=False)
    verify = verify_requantized if options.form == "requantized" else verify_merged
    check = verify(trained.model, out, trained.tokenizer, texts=texts_of(held_out(trained.recipe)))
    more = {"base": options.base or "dequantized", "requantized": options.requantize}
    return trained, written.result.to_dict() | more, check


def _audit(trained: TrainedRun, out: Path, options: ExportOptions, console: Console) -> dict[str, Any]:
    """Compare all forms, say which one to ship, and leave a page in the run."""
    opened = None
    if trained.recipe.base.prune is None:
        where, _ = trained_state(trained.run, trained.recipe, options.step)
        merge, _ = merge_of(trained.run, trained.recipe, where, ExportOptions())
        opened = open_merge(merge)
    examples = held_out(trained.recipe)
    found = audit(
        trained.model,
        trained.tokenizer,
        opened,
        texts=texts_of(examples),
        examples=examples,
        dtype=DTYPES[options.dtype or "float16"],
        console=console,
    )
    trained.run.write_json(f"exports/{out.name}.json", found)
    page = audit_page(out.name, found)
    atomic_write_text(trained.run.inside("exports", f"{out.name}.md"), page)
    console.print(found["verdict"], markup=False, highlight=False, soft_wrap=True)
    return found


def _export_nf4_lora(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], dict[str, Any]]:
    trained = load_run(run, step=options.step)
    published = options.push if options.push is not None and "/" in options.push else None
    with bar(console, "folding") as progress:
        result = export_nf4_lora(
            trained.model,
            trained.tokenizer,
            out,
            dtype=None if options.dtype is None else DTYPES[options.dtype],
            max_shard_bytes=options.shard_bytes,
            progress=progress,
            extra_files=card_files(trained.run, trained.recipe, trained.state, form="nf4-lora"),
            published_as=published,
        )
    lost = result.scale_error_if_double_quantised
    if lost:
        console.print(
            f"block scales kept in float32; double quantisation would change them by {lost['mean']:.2%} "
            f"(at most {lost['max']:.2%})",
            markup=False,
            highlight=False,
        )
    console.print("comparing the exported model with the running one", highlight=False)
    check = verify_nf4_lora(trained.model, out, trained.tokenizer, texts=texts_of(held_out(trained.recipe)))
    return trained, result.to_dict(), check


def _zeros(trained: TrainedRun) -> dict[str, int] | None:
    """How many weights of the base were pruned, and how many of these are zero after the merge; None: none were."""
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


def check_servable(model: PreTrainedModel) -> None:
    """Refuse a DoRA adapter for which PEFT computes NaN: it divides by the norm of each row, and some are 0.

    Raises:
        UserError: Naming the layers, and the formats to use instead.
    """
    faults = []
    for path, layer in adapted_layers(model).items():
        num_zero = 0 if layer.magnitude is None else int((layer.row_norm() == 0).sum())
        if num_zero:
            faults.append(
                f"--format peft: {path}: {num_zero} of {layer.out_features} rows of W + s B A are zero, and PEFT's "
                "DoRA gives NaN there; use --format merged or --format nf4-lora, which write zero rows."
            )
    if faults:
        raise UserError(*shorten(faults))


def _export_adapter(
    run: Path, out: Path, options: ExportOptions, console: Console
) -> tuple[TrainedRun, dict[str, Any], None]:
    """The adapter with the bytes that were trained: there is nothing to compare."""
    trained = load_run(run, step=options.step)
    recipe = trained.recipe
    if recipe.adapter.kind not in ("lora", "dora", "magnitude"):
        raise UserError(f"--format peft: the run has no adapter (adapter.kind {recipe.adapter.kind}).")
    if any(layer.masked for layer in adapted_layers(trained.model).values()):
        raise UserError("--format peft: adapter.mask keep: PEFT cannot mask B A, allowed: --format merged.")
    check_servable(trained.model)
    write_adapter(trained.model, recipe, out, shipped=True)
    for name, text in card_files(trained.run, recipe, trained.state, form="peft").items():
        (out / name).write_text(text, encoding="utf-8")
    return trained, {}, None


def _verdict(check: dict[str, Any]) -> str:
    """The check in words: the export against the adapter in float32, and how far bf16 arithmetic alone is from that."""
    exact, running = check["exported_vs_reference"], check["exported_vs_running"]
    word = "passed" if check["passed"] else "FAILED"
    explained = (
        f" (of this, {check['ill_conditioned']} position(s) at which the running model itself is off by more)"
        if check["ill_conditioned"]
        else ""
    )
    tensors = check.get("tensors", {})
    unchecked = (
        f"; layout unknown, not checked: {tensors['num_unchecked']} tensors that differ"
        if tensors.get("num_unchecked")
        else ""
    )
    return (
        f"{word} on {check['num_positions']:,} tokens: exported against the adapter in float32, largest logit "
        f"difference {exact['max_logit_difference']:.3g}{explained}, mean KL {exact['kl_mean']:.2g} nats, same next "
        f"token {exact['argmax_agreement']:.2%}; against the adapter as it runs ({check['running_dtype']}), "
        f"{running['max_logit_difference']:.3g}, {running['kl_mean']:.2g}, {running['argmax_agreement']:.2%}"
        f"{unchecked}"
    )
