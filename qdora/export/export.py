"""qdora export: write a run's model in a form that can be deployed, and check it against the running model."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import create_repo, repo_info, upload_folder
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx2's or httpx's
from rich.console import Console
from transformers import PreTrainedModel

from qdora.adapter.experts import AdaptedExperts
from qdora.errors import RunFailure, UserError, first_line
from qdora.export.checkpoints import check_loadable, export_bnb, export_nf4_lora, write_form, write_merge
from qdora.export.gguf import export_gguf
from qdora.export.gguf_lora import export_gguf_lora
from qdora.export.verify import Check, comparison_text, validation_examples, verify_merged, verify_packed
from qdora.export.write import check_room, save_tokenizer
from qdora.files.atomic import (
    atomic_directory,
    atomic_write_text,
    disk_failures,
    json_bytes,
    remove_directory,
    work_lock,
)
from qdora.files.console import bar, consoles
from qdora.files.run_directory import LOCK, RunDirectory, open_run
from qdora.memory.oom import keep_freed_memory
from qdora.model.build_model import DTYPES, choose_compute, find_model, find_source, write_adapter
from qdora.model.checkpoint import taken_for_experts
from qdora.model.inject import adapted_layers
from qdora.model.load import load_config
from qdora.model.multimodal import TRAINED_PART, is_multimodal
from qdora.quant.bnb import BNB_KINDS
from qdora.quant.codebooks import INT4_GROUPS
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import recipe_from, recipe_of_run, resolved_yaml, with_overrides
from qdora.recipe.section import with_settings
from qdora.run.base import FOLDER, calibration_tokens, compress_base, compression_key
from qdora.run.load_run import NOT_TRAINED, TrainedRun, adopted_run, is_adapter, load_run
from qdora.run.report import Form, known_source, licence_files, run_card

logger = logging.getLogger("qdora")

_TOO_WIDE_FOR_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
"""Types of models whose activations leave the range of float16: vLLM refuses to run them in it."""

Written = tuple[TrainedRun, dict[str, Any], Check | None, Form]
"""The running model, what was written, its check, and what the card says of it."""


def export_run(
    run: Path, out: Path, options: ExportOptions = ExportOptions(), *, console: Console | None = None
) -> dict[str, Any]:
    """Write a run's model to the new or empty directory `out`, check it, and return the content of `out`/export.json.

    `run` may also be an adapter in PEFT's format. The directory appears when all is written and checked. RunFailure if
    the reloaded model differs from the running one; `out` is then kept for inspection.
    """
    console, results = consoles(console)
    keep_freed_memory()
    place = out.absolute()
    with ExitStack() as stack:
        adopts = is_adapter(run)
        of_adapters = {"--base-model": options.base_model, "--quant": options.quant}
        for name, value in ({"--step": options.step} if adopts else of_adapters).items():
            if value is not None:
                raise UserError(f"{name}: used only with {'a run' if adopts else 'an adapter'}.")
        path = stack.enter_context(adopted_run(run, options.base_model, options.quant)) if adopts else run
        with disk_failures(out, "name another directory"):
            place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(work_lock(place.with_name(f".{place.name}.lock"), str(out)))
            is_new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
            if (out / "export.json").is_file():
                raise UserError(
                    f"{out}: holds a finished export (see export.json). Fix: name another directory."
                )
            if out.is_symlink() or os.path.ismount(out) or not is_new or place == Path.cwd():
                raise UserError(
                    f"{out}: must be a new or empty directory, no mount point and not the working directory."
                )
        stack.enter_context(disk_failures(out))
        folder = stack.enter_context(atomic_directory(place))
        writers = {
            "merged": _merged,
            "nf4-lora": _nf4_lora,
            "gguf": export_gguf,
            "gguf-lora": export_gguf_lora,
            "peft": _adapter,
            "base": _base,
        }
        trained, written, verify, form = writers[options.format](path, folder, options, console)
        check = None
        if verify is not None:
            console.print("comparing the export with the running model")
            check = verify(comparison_text(trained.tokenizer, validation_examples(trained.recipe)))
        # Names without their paths: the file leaves this machine.
        document = {"format": options.format, "run": path.resolve().name, "state": trained.state, **written}
        document |= {"directory": place.name, **trained.run.adopted()}
        if check is not None:
            document["verification"] = check
        card = run_card(trained.run, trained.recipe, trained.state, check, form)
        files = licence_files(known_source(trained.recipe))
        for name, text in (files | {"README.md": card}).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "export.json").write_bytes(json_bytes(document, indent=2))
    if check is not None:
        note = "check passed" if check["passed"] else "check FAILED"
        if check["num_positions"]:
            exact = check["exported_vs_reference"]
            note += (
                f" on {check['num_positions']:,} tokens; largest logit difference {exact['max_logit_difference']:.3g}, "
                f"mean KL {exact['kl_mean']:.2g} nats, same next token {exact['argmax_agreement']:.2%}"
            )
        results.print(note, soft_wrap=True)
        if not check["passed"]:
            faults = "; ".join(check["faults"])
            raise RunFailure(f"{out}: do not use it, it is not the trained model: {faults}", safe=[run])
    results.print(f"exported model: {out}", soft_wrap=True)
    if form.serve:
        console.print(f"serve it: cd {shlex.quote(str(out))} && {form.serve}", soft_wrap=True, markup=False)
    if options.push is not None:
        document["pushed"] = push(out, options.push, private=not options.public)
        results.print(f"uploaded: {document['pushed']}", soft_wrap=True)
    return document


_MERGED = """Base and adapter are merged into one dense weight per layer: the quantised base was dequantised, the \
adapter applied in float32, and the result rounded once."""
_ORIGINAL = """The adapter is merged into the original weights of the base, with DoRA's norms computed again. It was \
trained on the quantised base, so this is not exactly the trained model."""
_REQUANTIZED = """Base and adapter are merged in float32 and quantised to 4 bits again, as a bitsandbytes checkpoint. \
This second rounding was not part of the training, so this is not exactly the trained model."""


def _merged(run: Path, folder: Path, options: ExportOptions, console: Console) -> Written:
    kind = load_config(find_source(recipe_of_run(run), weights=False)).model_type
    dtype = DTYPES[options.dtype or ("bfloat16" if kind in _TOO_WIDE_FOR_FLOAT16 else "float16")]
    trained, written = write_merge(run, folder, options, dtype, console)
    verify: Any = partial(verify_packed, lossy=True) if options.requantize else verify_merged
    written |= {"base": options.base, "requantized": options.requantize}
    text = _ORIGINAL if options.base == "original" else _REQUANTIZED if options.requantize else _MERGED
    form = Form(text, serve="" if options.requantize else "vllm serve .")
    return trained, written, partial(verify, trained.model, folder), form


_NF4_LORA = """The base is a bitsandbytes 4-bit checkpoint whose block scales are multiplied by the gain of DoRA; \
`adapter/` is the plain LoRA for it. Together they are the trained model, without another rounding to 4 bits. The base \
alone is not the model that training started from. Do not double quantise the block scales.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), f"{directory}/adapter")
```"""


def _nf4_lora(run: Path, folder: Path, options: ExportOptions, console: Console) -> Written:
    trained = load_run(run, step=options.step)
    name = options.push if options.push is not None and "/" in options.push else None
    dtype = DTYPES.get(options.dtype or "")
    written = write_form(export_nf4_lora, trained, folder, options, console, dtype=dtype, published_as=name)
    largest = max(layer.rank for layer in adapted_layers(trained.model).values())
    rank = next(
        (rank for rank in (8, 16, 32, 64, 128, 256, 320) if rank >= largest), 512
    )  # vLLM 0.34's choices
    serve = f"vllm serve . --enable-lora --max-lora-rank {rank} --lora-modules tuned=adapter"
    return trained, written, partial(verify_packed, trained.model, folder), Form(_NF4_LORA, serve=serve)


_PEFT = """This is the trained adapter in PEFT's format. Load it on {}; on others it gives other results. `qdora.json` \
holds the exact scale of every layer."""


def _adapter(run: Path, folder: Path, options: ExportOptions, console: Console) -> Written:
    """The adapter with the bytes that were trained: there is nothing to compare."""
    trained = load_run(run, step=options.step)
    recipe, layers = trained.recipe, adapted_layers(trained.model)
    if recipe.adapter.kind not in ("lora", "dora", "magnitude"):
        raise UserError(f"--format peft: the run has no adapter (adapter.kind: {recipe.adapter.kind}).")
    if any(layer.masked for layer in layers.values()):
        raise UserError("--format peft: PEFT cannot mask B A (adapter.mask: keep). Fix: use --format merged.")
    check_servable(trained.model)
    dora = [path for path, layer in layers.items() if layer.magnitude is not None]
    if any(isinstance(layers[path], AdaptedExperts) for path in dora) or taken_for_experts(trained.model, dora):
        logger.warning(
            "PEFT has no DoRA for experts, so only qdora loads this adapter. Fix: use --format merged."
        )
    quant = recipe.base.quant
    is_peft_base = quant in (*BNB_KINDS, "none")
    if not is_peft_base and (dora or quant != INT4_GROUPS):
        what = "has no DoRA on a base in" if quant == INT4_GROUPS else "has no base in"
        logger.warning("PEFT %s %s, so only qdora loads this adapter. Fix: use --format merged.", what, quant)
    write_adapter(trained.model, recipe, folder, shipped=True, extra=trained.run.adopted())
    if recipe.model.add_tokens or recipe.model.tokenizer or recipe.data.chat_template:  # not the base's
        save_tokenizer(trained.tokenizer, folder)
    how = "quantised by bitsandbytes as the table says" if is_peft_base else f"in {quant}"
    base = f"the base named above, {how}"
    if recipe.base.method == "gptq":
        base = "what `qdora export --format base` writes of its run"
    return trained, {}, None, Form(_PEFT.format(base), relation="adapter", library="peft")


_BASE = """This is a frozen base to train adapters on, as a bitsandbytes checkpoint: its linear layers are quantised \
as the table says. transformers, PEFT and TRL load it like any model, without a quantisation config.

```python
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

model = prepare_model_for_kbit_training(AutoModelForCausalLM.from_pretrained(directory))
model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
```"""


def _base(path: Path, folder: Path, options: ExportOptions, console: Console) -> Written:
    run = open_run(path)
    recipe = recipe_of_run(path)
    base, source = recipe.base, find_source(recipe, weights=False)
    config, file = load_config(source), run.inside(FOLDER, "compressed.json")
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    dtype = DTYPES.get(options.dtype or "", dtype)
    packed, dense = check_loadable(recipe, source, dtype)
    # GPTQ writes its layers twice: first into base/, where an interrupted command has left some.
    there = sum(each.stat().st_size for each in file.parent.glob("*"))
    check_room(folder, packed + dense + packed * base.is_made_once - there)
    if base.is_made_once and not file.is_file():  # of `quantize_model`
        source, tokenizer = find_model(recipe)
        what = (
            recipe,
            source,
            choose_compute(recipe.model.dtype),
            calibration_tokens(recipe, tokenizer, None, config),
        )
        with bar(console, "compressing the base") as progress:
            compress_base(*what, file.parent, key=compression_key(*what), progress=progress)
    trained = load_run(path, base_only=True)
    facts = {"format": base.quant_in_words, "skipped": ", ".join(base.skip)}
    if base.measured is not None:
        _, asked = base.measured
        facts["calibration"] = f"{asked.sequences} pieces of {asked.length} tokens of {Path(asked.text).name}"
    written = write_form(export_bnb, trained, folder, options, console, dtype=dtype)
    verify = partial(verify_packed, trained.model, folder, lossy=base.quant == "int8")
    return trained, written | {"base": facts}, verify, Form(_BASE, relation="quantized", facts=facts)


def quantize_model(
    name: str, out: Path, base: dict[str, Any], overrides: Sequence[str] = (), *, console: Console | None = None
) -> dict[str, Any]:
    """Quantise a model as the section `base` of a recipe says, and write it as a bitsandbytes checkpoint to the new or
    empty directory `out`, as `export_run`. `name` is as model.source; `overrides` are of the sections model and base.
    """
    if others := [item for item in overrides if not item.strip().startswith(("model.", "base."))]:
        raise UserError(f"-s {others[0]}: must be a setting of model or base.")
    document = {"model": {"source": name}, "base": base, "adapter": {"kind": "none"}, **NOT_TRAINED}
    document = with_overrides(document, overrides, logging.INFO)
    recipe = recipe_from(document, "quantize", overrides)
    config = load_config(find_source(recipe, weights=False))
    # bfloat16 would round them
    if recipe.model.dtype == "auto" and config.dtype in (torch.float16, torch.float32):
        recipe = with_settings(recipe, model={"dtype": str(config.dtype).removeprefix("torch.")})
    work = out.absolute().with_name(f".{out.absolute().name}.quantize")
    run = RunDirectory(work / f"{Path(os.path.abspath(name)).name}-{recipe.base.quant}")
    with disk_failures(out, "name another directory"):
        run.path.mkdir(parents=True, exist_ok=True)
    with work_lock(work / LOCK, str(out)):
        try:
            run.inside(FOLDER, "compressed.json").unlink(missing_ok=True)  # it may be that of another recipe
            atomic_write_text(run.recipe_file, resolved_yaml(recipe))
            run.write_json(
                run.environment_file.name, {"trained_part": TRAINED_PART} if is_multimodal(config) else {}
            )
            return export_run(run.path, out, ExportOptions(format="base"), console=console)
        finally:
            if not run.inside(FOLDER, "unfinished.json").is_file():  # else the same command goes on there
                remove_directory(work)


def check_servable(model: PreTrainedModel) -> None:
    """Refuse a DoRA adapter with zero rows of W + s B A: PEFT divides by their norm and computes NaN."""
    for path, layer in adapted_layers(model).items():
        if layer.magnitude is not None and (layer.row_norm() == 0).any():
            raise UserError(
                f"--format peft: {path}: PEFT gives NaN for its zero rows. Fix: use --format merged."
            )


def push(directory: Path, name: str, *, private: bool = True) -> str:
    """Upload every file as one commit; returns its address.

    A missing repository (NAME or ORGANISATION/NAME) is created; a private upload to a public one is refused.
    """
    again = f"{shlex.quote(str(directory))}{' --private' if private else ''}"
    try:
        repository = create_repo(name, private=private, exist_ok=True).repo_id
        if private and not repo_info(repository).private:
            raise UserError(f"--push: {name} is public. Fix: hf upload OTHER_NAME {again}")
        return str(
            upload_folder(repo_id=repository, folder_path=directory, commit_message="Model exported by qdora")
        )
    except (HTTPError, OSError) as error:
        raise RunFailure(f"--push: {name}: {first_line(error)} Fix: hf upload {name} {again}") from error
