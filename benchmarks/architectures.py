"""Every family of models through the command line: train, kill, resume, evaluate, answer, export, reload.

A row of the result has what each check measured (see correctness.md), or the line with which it was refused or failed.
The merged weights are made by numpy in float64 from the adapter file and bitsandbytes' own dequantisation, or
transformers' of MXFP4. For a mixture of experts, whose DoRA PEFT does not compute, they take the place of PEFT. A later
call with --families 'NAME;NAME' replaces those rows.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from byte_tokenizer import byte_tokenizer
from contenders import on_linear4bit, plain, put_weight_
from export_exactness import bnb_weights, dense, merged_by_numpy, on_bnb, with_peft
from frame import bench, main
from peft import PeftModel
from tiny_families import MIXTURES, MODEL_TYPES, MXFP4, NUM_SUMS, write_family, write_random_sums
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from qdora.adapter.layer import AdaptedLinear
from qdora.cli import app
from qdora.data.batches import IGNORED
from qdora.errors import USER_MISTAKE
from qdora.files.run_directory import RunDirectory
from qdora.model.adapter_file import load_adapter
from qdora.model.build_model import recompute_activations
from qdora.model.experts import is_transposed, stacks
from qdora.model.inject import adapted_layers
from qdora.run.load_run import load_run
from qdora.train import passes

ASKED = dict.fromkeys(("evaluated", "packing"), 1e-5)
ASKED |= dict.fromkeys(("merged", "nf4_lora", "gradients", "nf4_skip", "peft", "peft_again"), 1e-4)
"""The most that a figure may be."""
PROMPT = "3 + 8 ="


@bench(smoke={"families": "Llama 3;Falcon 7B;Qwen2-MoE"}, rows="families", keep=True)
def architectures(families: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    for name in families.split(";") if families else MODEL_TYPES:
        yield name, checked(name)
    return {"asked": ASKED}


def checked(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"model_type": MODEL_TYPES[name], "mixture": name in MIXTURES}
    checks = [resumed, evaluated, answered, merged, nf4_lora, gradients, packing]
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder), is_mxfp4=name == MXFP4)
        write_family(name, case.model)
        return row | passed(case, [*checks, nf4_skip, peft] if name in MIXTURES else checks)


def passed(case: Any, checks: Sequence[Callable[[Any], dict[str, Any]]]) -> dict[str, Any]:
    """What the checks measured; why they were refused or failed. Nothing follows a run that is not resumed."""
    row: dict[str, Any] = {"refused": {}, "failed": {}}
    for check in checks:
        try:
            row |= check(case)
        except Refused as error:
            row["refused"][check.__name__] = str(error)
        except Exception as error:
            row["failed"][check.__name__] = f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"
        if "resumed" not in row:
            break
    for key, most in ASKED.items():
        if isinstance(row.get(key), float) and not row[key] <= most:  # NaN fails, too
            row["failed"][key] = f"{row[key]:.1e}, asked is at most {most:.0e}"
    return row


class Refused(Exception):
    """A command refuses a model; its message is the command's line."""


class Case:
    """A family's files, and what several checks compare with."""

    def __init__(self, folder: Path, *, is_mxfp4: bool) -> None:
        self.folder, self.model, self.run = folder, folder / "model", folder / "run"
        self.is_mxfp4, self.recipe = is_mxfp4, folder / "recipe.yaml"
        train, self.validation = folder / "train.jsonl", folder / "validation.jsonl"
        write_random_sums(train, 0)
        write_random_sums(self.validation, 1)
        document = {
            "model": {"source": str(self.model), "dtype": "float32"},
            "base": {"quant": "mxfp4" if is_mxfp4 else "nf4"},
            "adapter": {"kind": "dora", "rank": 4, "alpha": 8.0},
            "data": {"mix": [{"source": str(train), "validation": str(self.validation)}], "max_length": 64},
            "train": {"steps": 2, "batch": 4, "lr": 0.02, "optimizer": "adamw", "checkpoint_every": 1},
            "eval": {"at_start": False, "at_end": False},
        }
        self.recipe.write_text(json.dumps(document))  # JSON is YAML

    @cached_property
    def base(self) -> Any:
        return load_run(self.run, base_only=True).model

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Path -> dequantised weight (out, in) float32 of every layer that is quantised or adapted."""
        if not self.is_mxfp4:
            return bnb_weights(self.base)
        library = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        found = {}
        for path in adapted_layers(load_run(self.run).model):
            is_stack = path in stacks(self.base)
            weight = (library.get_parameter(path) if is_stack else library.get_submodule(path).weight).detach()
            found[path] = (weight.mT.flatten(0, 1) if is_transposed(self.base, path) else weight).contiguous()
        return found

    @cached_property
    def plain(self) -> Any:
        """Plain transformers with the merged weights, float32."""
        return dense(self.base, merged_by_numpy(self.weights, self.run / "adapter"))

    @cached_property
    def pairs(self) -> list[tuple[Tensor, int]]:
        """Ids (1, length) of each validation text, and where its answer begins."""
        rows = [json.loads(line) for line in self.validation.read_text().splitlines()]
        tokenizer = byte_tokenizer()
        texts = [(row["prompt"], row["prompt"] + row["completion"]) for row in rows]
        return [(tokenizer(text, return_tensors="pt")["input_ids"], len(prompt)) for prompt, text in texts]

    @cached_property
    def logits(self) -> list[Tensor]:
        """Of the adapter in PEFT on Linear4bit, in float32, or of a mixture with merged weights."""
        if stacks(self.base):
            return self.logits_of(self.plain)
        return self.logits_of(with_peft(on_linear4bit(self.base, torch.float32).eval(), self.run / "adapter"))

    @torch.no_grad()
    def logits_of(self, model: Any) -> list[Tensor]:
        """(length, vocabulary) float32 of each validation text."""
        return [model(input_ids=ids, use_cache=False).logits[0].float() for ids, _ in self.pairs]


def command(*words: str | Path) -> dict[str, Any]:
    """Run `qdora` and return the JSON that it prints. Refused or RuntimeError with its line if it fails."""
    found = CliRunner().invoke(app, ["--quiet", "--json", *map(str, words)])
    logging.getLogger().handlers.clear()  # those of the command write to its standard error, which is closed
    if found.exit_code != 0:
        line = (found.stderr.strip().splitlines() or [repr(found.exception)])[-1]
        raise (Refused if found.exit_code == USER_MISTAKE else RuntimeError)(line)
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def train(case: Case, run: Path, *words: str) -> list[dict[str, Any]]:
    command("train", case.recipe, "--run-dir", run, *words)
    return RunDirectory(run).metrics()


def resumed(case: Case) -> dict[str, Any]:
    """Kill a run in its second step and resume it."""
    real, calls = passes.batch_loss, []

    def killing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # a step is one micro-batch
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    def killed() -> None:
        passes.batch_loss = killing
        command("train", case.recipe, "--run-dir", case.run)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    if child.exitcode != -signal.SIGKILL:
        command("train", case.recipe, "--run-dir", case.folder / "again")  # says why
        raise RuntimeError(f"the run ended with {child.exitcode} before it was killed")
    assert (case.run / "checkpoints/step-1").is_dir()
    train(case, case.run, "--resume")
    train(case, case.folder / "whole")
    files = [folder / "adapter/adapter_model.safetensors" for folder in (case.run, case.folder / "whole")]
    if files[0].read_bytes() != files[1].read_bytes():
        raise RuntimeError("the resumed run has another adapter than an undisturbed one")
    return {"resumed": True, "num_adapted": len(adapted_layers(load_run(case.run).model))}


def evaluated(case: Case) -> dict[str, Any]:
    """The mean NLL of an answer, by the command and from the merged weights."""
    (found,) = command("eval", case.run)["evaluation"]["tasks"].values()
    expected = torch.stack([nll(case.plain, *pair) for pair in case.pairs]).mean()
    return {"evaluated": abs(found["nll"] / float(expected) - 1)}


def nll(model: Any, ids: Tensor, start: int) -> Tensor:
    """Summed NLL of ids[0, start:], differentiable."""
    logits = model(input_ids=ids, use_cache=False).logits[0].double()
    return nn.functional.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum")


def answered(case: Case) -> dict[str, Any]:
    found = command("generate", case.run, "--prompt", PROMPT, "--raw", "--max-new-tokens", "12")["text"]
    tokenizer = byte_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        tokens = case.plain.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(tokens, skip_special_tokens=True)
    if found != expected:
        raise RuntimeError(f"answers {found!r}, transformers {expected!r}")
    return {"answered": True}


def merged(case: Case) -> dict[str, Any]:
    out = case.folder / "merged"
    command("export", case.run, out, "--dtype", "float32")
    return {"merged": distance(case.logits_of(AutoModelForCausalLM.from_pretrained(out)), case.logits)}


def in_4_bits(case: Case, run: Path, *words: str) -> list[Tensor]:
    """Logits of the 4-bit export of a run in transformers, bitsandbytes and PEFT."""
    out = case.folder / f"nf4-of-{run.name}"
    command("export", run, out, "--format", "nf4-lora", *words)
    return case.logits_of(PeftModel.from_pretrained(on_bnb(out), str(out / "adapter")).eval())


def nf4_lora(case: Case) -> dict[str, Any]:
    return {"nf4_lora": distance(in_4_bits(case, case.run), case.logits)}


def nf4_skip(case: Case) -> dict[str, Any]:
    """The 4-bit export of a run on dense experts."""
    run = case.folder / "skip"
    train(case, run, "-s", "base.skip=[lm_head,experts]")
    found = in_4_bits(case, run, "--dtype", "float32")
    return {"nf4_skip": distance(found, case.logits_of(load_run(run).model))}


def peft(case: Case) -> dict[str, Any]:
    """A LoRA adapter in PEFT on the dequantised weights, and after PEFT has saved it, here again."""
    run, out, again = case.folder / "lora", case.folder / "peft", case.folder / "again"
    train(case, run, "-s", "adapter.kind=lora")
    command("export", run, out, "--format", "peft")
    expected = case.logits_of(load_run(run).model)
    theirs = with_peft(dense(case.base, case.weights), out)
    found = {"peft": distance(case.logits_of(theirs), expected)}
    theirs.save_pretrained(again)
    model = load_run(run, base_only=True).model
    load_adapter(model, again)
    return found | {"peft_again": distance(case.logits_of(model.eval()), expected)}


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of logits, in units of the standard deviation of those that are expected."""
    one, other = torch.cat(found), torch.cat(expected)
    return float((one - other).abs().max() / other.std())


class DoraWeight(nn.Module):
    """W -> W' = m (W + s B A) / ||W + s B A||, the norm held constant, in float64.

    W is (out, in), or a stack of experts, (experts, out, in), or `transposed`.
    """

    def __init__(self, layer: AdaptedLinear, *, transposed: bool) -> None:
        super().__init__()
        self.scaling, self.transposed = layer.scaling, transposed
        for name in ("lora_A", "lora_B", "magnitude"):
            self.register_parameter(name, nn.Parameter(getattr(layer, name).detach().double()))

    def forward(self, weight: Tensor) -> Tensor:
        total = (weight.mT if self.transposed else weight) + self.scaling * self.lora_B @ self.lora_A
        merged = (self.magnitude / total.detach().norm(dim=-1)).unsqueeze(-1) * total
        return merged.mT if self.transposed else merged


def gradients(case: Case) -> dict[str, Any]:
    """A padded micro-batch of the first texts, against the plain formula in float64 on one text after the other."""
    pairs, model = case.pairs[:4], load_run(case.run).model
    layers, reference = adapted_layers(model), plain(case.base, torch.float64)
    for path, weight in case.weights.items():
        put_weight_(reference, case.base, path, weight.double())  # those that are not adapted, too
    adapters = {path: DoraWeight(layer, transposed=is_transposed(case.base, path)) for path, layer in layers.items()}
    for path, adapter in adapters.items():
        owner, _, name = path.rpartition(".") if path in stacks(case.base) else (path, "", "weight")
        parametrize.register_parametrization(reference.get_submodule(owner), name, adapter)
    with parametrize.cached():
        sum(nll(reference.eval(), *pair) for pair in pairs).backward()  # type: ignore[union-attr]

    length = max(ids.shape[1] for ids, _ in pairs)
    tokens, mask = torch.zeros(2, len(pairs), length, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORED)
    for row, (ids, start) in enumerate(pairs):
        end = ids.shape[1]
        tokens[row, :end], mask[row, :end], labels[row, start:end] = ids[0], 1, ids[0, start:]
    recompute_activations(model)
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data = parameter.data.float()  # else torch rounds the gradients of bf16 factors
            parameter.requires_grad_()
    passes.batch_loss(model.train(), tokens, mask, labels).nll_sum.backward()  # type: ignore[no-untyped-call]
    worst = 0.0
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters():
            expected = getattr(adapters[path], name).grad
            assert float(expected.abs().max()) > 0, f"{path}.{name} has no gradient"
            error = float((parameter.grad.double() - expected).abs().max() / expected.abs().max())
            worst = max(worst, error) if error == error else float("nan")
    return {"gradients": worst}


def packing(case: Case) -> dict[str, Any]:
    """The loss of a step of all examples, with packed rows and without."""
    losses, shapes = [], []
    real = passes.batch_loss

    def noting(model: Any, ids: Tensor, *args: Any, **options: Any) -> Any:
        shapes.append((len(ids), options["packing"]))
        return real(model, ids, *args, **options)

    for packed in ("false", "true"):
        words = ("-s", f"data.packing={packed}", "-s", f"train.batch={NUM_SUMS}", "-s", "train.steps=1")
        with patch.object(passes, "batch_loss", noting):
            lines = train(case, case.folder / f"packing-{packed}", *words)
        losses += [line["loss"] for line in lines if "loss" in line]
    assert any(rows < int(found.example_index.max()) + 1 for rows, found in shapes if found is not None)
    return {"packing": abs(losses[1] / losses[0] - 1)}


if __name__ == "__main__":
    main()
