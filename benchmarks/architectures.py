"""Every family of dense models through the command line: train, kill, resume, evaluate, answer, export, reload.

    python benchmarks/architectures.py [--families 'NAME;NAME'] [--out benchmarks/results/architectures.json]

The models are tiny and random (tiny_families.py), the base NF4, the adapter DoRA on all linear layers, computed in
float32. A row of the result has what each check measured, or the line with which it was refused or failed:

    resumed     the run is killed (SIGKILL) in step 2 and resumed: are the adapter files those of an undisturbed run?
    evaluated   `qdora eval`: relative difference of its NLL from that of the merged weights, one text at a time
    answered    `qdora generate`: the same answer as by transformers' `generate` with the merged weights?
    merged      `qdora export`, loaded by plain transformers: largest difference of its logits from those of the
                adapter in PEFT on bitsandbytes' Linear4bit, in units of their standard deviation
    nf4_lora    the same for `qdora export --format nf4-lora`, loaded by transformers, bitsandbytes and PEFT
    gradients   largest difference of a gradient (A, B, magnitude of every layer) from that of the plain formula in
                float64, over the largest entry of that gradient; the step is checkpointed and padded
    packing     training with packed rows: relative difference of the first loss from that of rows of their own

The merged weights are made by numpy in float64 from the adapter file and bitsandbytes' own dequantisation.
A later call with --families replaces those rows and keeps the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from byte_tokenizer import byte_tokenizer
from contenders import on_linear4bit, packed_layers, plain
from export_exactness import on_bnb
from measure import RESULTS, facts, write
from peft import PeftModel
from peft_interop import bnb_weights, dense, merged_by_numpy, with_peft
from tiny_families import FAMILIES, NUM_SUMS, write_family, write_sums
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from qdora.cli import app
from qdora.cli.verb import USER_MISTAKE
from qdora.model.build_model import recompute_activations
from qdora.model.inject import adapted_layers, replace_module
from qdora.model.written_outputs import keep_written_outputs_
from qdora.nn.adapted_linear import AdaptedLinear
from qdora.run.load_run import load_run
from qdora.train import loop

ASKED = {"evaluated": 1e-5, "merged": 1e-4, "nf4_lora": 1e-4, "gradients": 1e-4, "packing": 1e-5}
"""The most that a figure may be."""
PROMPT = "3 + 8 ="


def main() -> None:
    """Check the families one after the other, and write after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", help="Names, separated by semicolons; default: all.")
    parser.add_argument("--smoke", action="store_true", help="Two families.")
    parser.add_argument("--out", type=Path, default=RESULTS / "architectures.json")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    names = ["Llama 3", "Falcon 7B"] if settings.smoke else list(FAMILIES)
    if settings.families:
        names = settings.families.split(";")
    known = json.loads(settings.out.read_text())["families"] if settings.out.is_file() else {}
    for name in names:
        known[name] = checked(name)
        rows = {name: known[name] for name in FAMILIES if name in known}
        write(settings.out, {**facts("python benchmarks/architectures.py"), "asked": ASKED, "families": rows})


def checked(name: str) -> dict[str, Any]:
    """The row of a family."""
    began = time.perf_counter()
    row: dict[str, Any] = {"model_type": FAMILIES[name][0], "refused": {}, "failed": {}}
    with tempfile.TemporaryDirectory() as folder:
        case = Case(Path(folder))
        write_family(name, case.model)
        for check in (resumed, shape, evaluated, answered, merged, nf4_lora, gradients, packing):
            try:
                row |= check(case)
            except Refused as error:
                row["refused"][check.__name__] = str(error)
            except Exception as error:
                row["failed"][check.__name__] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            if "resumed" not in row:
                break
    for key, most in ASKED.items():
        if isinstance(row.get(key), float) and not row[key] <= most:  # NaN fails, too
            row["failed"][key] = f"{row[key]:.1e}, asked is at most {most:.0e}"
    return row | {"seconds": round(time.perf_counter() - began, 1)}


class Refused(Exception):
    """A command refuses a model; its message is the command's line."""


class Case:
    """A family's files, and what several checks compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.run = folder, folder / "model", folder / "run"
        self.recipe = folder / "recipe.yaml"
        train, self.validation = folder / "train.jsonl", folder / "validation.jsonl"
        write_sums(train, 0)
        write_sums(self.validation, 1)
        document = {
            "model": {"source": str(self.model), "dtype": "float32"},
            "adapter": {"kind": "dora", "rank": 4, "alpha": 8.0},
            "data": {"mix": [{"source": str(train), "validation": str(self.validation)}], "max_length": 64},
            "train": {"steps": 2, "batch": 4, "lr": 0.02, "optimizer": "adamw", "checkpoint_every": 1},
            "eval": {"at_start": False, "at_end": False},
        }
        self.recipe.write_text(json.dumps(document))  # JSON is YAML

    @cached_property
    def base(self) -> Any:
        """The run's base without its adapter."""
        return load_run(self.run, base_only=True).model

    @cached_property
    def plain(self) -> Any:
        """Plain transformers with the merged weights, float32."""
        return dense(self.base, merged_by_numpy(bnb_weights(self.base), self.run / "adapter"))

    @cached_property
    def pairs(self) -> list[tuple[Tensor, int]]:
        """Ids (1, length) of each validation text, and where its answer begins."""
        rows = [json.loads(line) for line in self.validation.read_text().splitlines()]
        tokenizer = byte_tokenizer()
        texts = [(row["prompt"], row["prompt"] + row["completion"]) for row in rows]
        return [(tokenizer(text, return_tensors="pt")["input_ids"], len(prompt)) for prompt, text in texts]

    @cached_property
    def logits(self) -> list[Tensor]:
        """Of the adapter in PEFT on Linear4bit, in float32."""
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
    """Train and return the lines of metrics."""
    command("train", case.recipe, "--run-dir", run, *words)
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def resumed(case: Case) -> dict[str, Any]:
    """Kill a run in its second step and resume it."""
    child = multiprocessing.get_context("fork").Process(target=_killed_in_step_2, args=(case,))
    child.start()
    child.join()
    if child.exitcode != -signal.SIGKILL:
        command("train", case.recipe, "--run-dir", case.folder / "again")  # says why
        raise RuntimeError(f"the run ended with {child.exitcode} before it was killed")
    assert (case.run / "checkpoints/step-1").is_dir()
    assert not (case.run / "adapter").exists()
    train(case, case.run, "--resume")
    train(case, case.folder / "whole")
    if digest(case.run / "adapter") != digest(case.folder / "whole/adapter"):
        raise RuntimeError("the resumed run has another adapter than an undisturbed one")
    return {"resumed": True}


def _killed_in_step_2(case: Case) -> None:
    real, calls = loop.batch_loss, []

    def killing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # a step is one micro-batch
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    with patch.object(loop, "batch_loss", killing):
        command("train", case.recipe, "--run-dir", case.run)


def digest(directory: Path) -> str:
    """Of the weights of an adapter."""
    return hashlib.sha256((directory / "adapter_model.safetensors").read_bytes()).hexdigest()


def shape(case: Case) -> dict[str, Any]:
    """What was adapted, and which layers of the blocks hold no packed weight."""
    base, model = case.base, load_run(case.run).model
    return {
        "num_parameters": sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(case.model).parameters()
        ),
        "num_adapted": len(adapted_layers(model)),
        "num_quantised": len(packed_layers(base)),
        "targets": sorted({path.rpartition(".")[2] for path in adapted_layers(model)}),
        "attention": str(model.config._attn_implementation),
    }


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
    """Greedy answers of 12 tokens."""
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
    """The merged export in plain transformers."""
    out = case.folder / "merged"
    command("export", case.run, out, "--dtype", "float32")
    return {"merged": distance(case, AutoModelForCausalLM.from_pretrained(out))}


def nf4_lora(case: Case) -> dict[str, Any]:
    """The 4-bit export in transformers, bitsandbytes and PEFT."""
    out = case.folder / "nf4-lora"
    command("export", case.run, out, "--format", "nf4-lora")
    return {"nf4_lora": distance(case, PeftModel.from_pretrained(on_bnb(out), str(out / "adapter")).eval())}


def distance(case: Case, model: Any) -> float:
    """Largest difference of logits from those of PEFT on Linear4bit, in units of their standard deviation."""
    found, expected = torch.cat(case.logits_of(model)), torch.cat(case.logits)
    return float((found - expected).abs().max() / expected.std())


class PlainDora(nn.Module):
    """x W'^T + bias with W' = m (W + s B A) / ||W + s B A||, the norm held constant, in float64."""

    def __init__(self, layer: AdaptedLinear, weight: Tensor) -> None:
        super().__init__()
        assert layer.magnitude is not None
        self.weight, self.bias, self.scaling = weight.double(), layer.base.bias, layer.scaling
        for name in ("lora_A", "lora_B", "magnitude"):
            self.register_parameter(name, nn.Parameter(getattr(layer, name).detach().double()))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        total = self.weight + self.scaling * self.lora_B @ self.lora_A
        weight = (self.magnitude / total.detach().norm(dim=1)).unsqueeze(1) * total
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.double())


def gradients(case: Case) -> dict[str, Any]:
    """A padded micro-batch of the first texts, against the plain formula on one text after the other."""
    pairs = case.pairs[:4]
    model = load_run(case.run).model
    layers = adapted_layers(model)
    reference = plain(case.base, torch.float64)
    for path, weight in bnb_weights(case.base).items():
        reference.get_submodule(path).weight.data = weight.double()  # those that are not adapted
        if path in layers:
            replace_module(reference, path, PlainDora(layers[path], weight))
    sum(nll(reference.eval(), *pair) for pair in pairs).backward()  # type: ignore[union-attr]

    length = max(ids.shape[1] for ids, _ in pairs)
    tokens, mask = torch.zeros(2, len(pairs), length, dtype=torch.int64)
    labels = torch.full_like(tokens, loop.IGNORED)
    for row, (ids, start) in enumerate(pairs):
        end = ids.shape[1]
        tokens[row, :end], mask[row, :end], labels[row, start:end] = ids[0], 1, ids[0, start:]
    recompute_activations(model)
    keep_written_outputs_(model)
    for layer in layers.values():
        for parameter in layer.parameters():
            parameter.data = parameter.data.float()  # else torch rounds the gradients of bf16 factors
            parameter.requires_grad_()
    loop.batch_loss(model.train(), tokens, mask, labels).nll_sum.backward()  # type: ignore[no-untyped-call]
    worst = 0.0
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters():
            expected = getattr(reference.get_submodule(path), name).grad
            assert float(expected.abs().max()) > 0, f"{path}.{name} has no gradient"
            error = float((parameter.grad.double() - expected).abs().max() / expected.abs().max())
            worst = max(worst, error) if error == error else float("nan")
    return {"gradients": worst}


def packing(case: Case) -> dict[str, Any]:
    """The loss of a step of all examples, with packed rows and without."""
    losses, shapes = [], []
    real = loop.batch_loss

    def noting(model: Any, ids: Tensor, *args: Any, **options: Any) -> Any:
        shapes.append((len(ids), options["packing"]))
        return real(model, ids, *args, **options)

    for packed in ("false", "true"):
        words = ("-s", f"data.packing={packed}", "-s", f"train.batch={NUM_SUMS}", "-s", "train.steps=1")
        with patch.object(loop, "batch_loss", noting):
            lines = train(case, case.folder / f"packing-{packed}", *words)
        losses += [line["loss"] for line in lines if "loss" in line]
    assert any(rows < int(found.example_index.max()) + 1 for rows, found in shapes if found is not None)
    return {"packing": abs(losses[1] / losses[0] - 1)}


if __name__ == "__main__":
    main()
