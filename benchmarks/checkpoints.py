"""Checkpoints that other programs quantised, as bases: against the formats' own libraries.

Each writer runs in an environment of its own, named by its Python (`--llmcompressor llmcompressor/bin/python`);
gptqmodel's has peft and optimum, too. See `checkpoint_writers.py`. With `--made FOLDER` the checkpoints stay there, and
those that are there are not written again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from architectures import Case, answered, command, distance, merged, nf4_lora, passed, peft, resumed
from byte_tokenizer import byte_tokenizer
from checkpoint_writers import TOKENS
from contenders import packed_layers
from export_exactness import bnb_weights
from frame import bench, main
from quantiser_peers import run_with
from quantisers import own_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_families import spread_
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.model.build_model import find_source
from qdora.model.inject import frozen_layers
from qdora.recipe.recipe_file import load_recipe, override
from qdora.run.load_run import load_run

Settings = dict[str, Any]
SCRIPT = Path(__file__).with_name("checkpoint_writers.py")


def llmcompressor(scheme: str = "", **weights: Any) -> tuple[str, Settings]:
    if scheme:
        return "llmcompressor", {"targets": ["Linear"], "scheme": scheme}
    return "llmcompressor", {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


def gptqmodel(bits: int, group_size: int, sym: str, **options: Any) -> tuple[str, Settings]:
    return "gptqmodel", {"bits": bits, "group_size": group_size, "sym": sym == "sym"} | options


def autoround(group_size: int, sort: str, *, sym: bool) -> tuple[str, Settings]:
    return "autoround", {"group_size": group_size, "sym": sym, "format": sort}


ZEROS = ("sym", "asym")
CASES: dict[str, tuple[str, Settings]] = {
    **{scheme: llmcompressor(scheme) for scheme in ("W4A16", "W4A16_ASYM", "W8A16", "NVFP4A16", "MXFP4A16")},
    "W4A16-64": llmcompressor(num_bits=4, symmetric=True, strategy="group", group_size=64),
    "W4A16_ASYM-64": llmcompressor(num_bits=4, symmetric=False, strategy="group", group_size=64),
    **{scheme: llmcompressor(scheme) for scheme in ("FP8_DYNAMIC", "FP8_BLOCK")},
    "FP8-tensor": llmcompressor(num_bits=8, type="float", symmetric=True, strategy="tensor"),
    "FP8-channel": llmcompressor(num_bits=8, type="float", symmetric=True, strategy="channel"),
    "fp8": ("transformers", {"modules_to_not_convert": ["lm_head"]}),
    **{f"GPTQ-4-bits-{sym}-{group}": gptqmodel(4, group, sym) for group in (128, 64) for sym in ZEROS},
    **{
        f"GPTQ_v2-4-bits-{sym}-{group}": gptqmodel(4, group, sym, format="gptq_v2")
        for group in (128, 64)
        for sym in ZEROS
    },
    **{f"GPTQ-{bits}-bits-{sym}-64": gptqmodel(bits, 64, sym) for bits in (2, 3) for sym in ZEROS},
    **{f"GPTQ-8-bits-{sym}-128": gptqmodel(8, 128, sym) for sym in ZEROS},
    "auto-round-GPTQ": autoround(128, "auto_gptq", sym=True),
    "AWQ-128": autoround(128, "auto_awq", sym=False),
    "AWQ-64": autoround(64, "auto_awq", sym=False),
    "AWQ-sym-128": autoround(128, "auto_awq", sym=True),
    "GPTQ-desc_act": gptqmodel(4, 128, "sym", desc_act=True),
    "W8A8": llmcompressor("W8A8"),
}
"""Name -> its writer and the writer's settings; the last two are refused."""


def write_source(folder: Path) -> None:
    """A random Llama in bf16, no part without effect; every size can be cut into 64 and 128."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    spread_(model)
    model.save_pretrained(folder)


@bench(smoke={"cases": ("fp8",)}, rows="checkpoints", keep=True)
def checkpoints(
    cases: tuple[str, ...] = tuple(CASES),
    made: str | None = None,
    llmcompressor: str | None = None,
    gptqmodel: str | None = None,
    autoround: str | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each checkpoint decoded, trained, killed, resumed, merged, exported; its adapter in PEFT on the same base."""
    pythons = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "autoround": autoround}
    pythons["transformers"] = sys.executable
    with tempfile.TemporaryDirectory() as place:
        folder = Path(made or place).absolute()
        if not (folder / "model").exists():
            write_source(folder / "model")
        for name in cases:
            writer, settings = CASES[name]
            tasks = [writer, "gptqmodel_reads"] if writer == "autoround" else [writer]
            for task in tasks if not (folder / f"{name}.reference.safetensors").exists() else ():
                python = pythons[task.partition("_")[0]]
                if python is None:
                    raise SystemExit(f"{name}: --{task.partition('_')[0]} PYTHON is missing")
                run_with(python, SCRIPT, task, name, str(folder), json.dumps(settings), cwd=folder)
            with tempfile.TemporaryDirectory() as scratch:
                case = Checkpoint(Path(scratch), folder, name, gptqmodel)
                row = {"writer": writer, "settings": settings, "versions": case.versions()}
                yield name, row | passed(case, [resumed, decoded, planned, answered, merged, nf4_lora, peft, in_peft])


class Checkpoint(Case):
    """A checkpoint of `made`, and what its library decodes."""

    def __init__(self, folder: Path, made: Path, name: str, python: str | None) -> None:
        super().__init__(folder, is_mxfp4=False)
        self.made, self.name, self.python = made, name, python
        self.model.symlink_to(made / name)
        document = json.loads(self.recipe.read_text())
        document.pop("base")
        self.recipe.write_text(json.dumps(document))
        self.reference = load_file(made / f"{name}.reference.safetensors")

    def versions(self) -> dict[str, str]:
        found = {}
        for file in self.model.glob("*.versions.json"):
            found |= json.loads(file.read_text())
        return found

    @property
    def is_kept(self) -> bool:
        """Whether the base keeps the checkpoint's format."""
        return not self.name.lower().startswith("fp8")

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        if not self.is_kept:
            return bnb_weights(self.base)
        return {path: self.reference[f"{path}.weight"].float() for path in packed_layers(self.base)}

    @cached_property
    def logits(self) -> list[Tensor]:
        """Of plain transformers with the merged weights, in float32."""
        return self.logits_of(self.plain)


@torch.no_grad()
def decoded(case: Checkpoint) -> dict[str, Any]:
    """Weights and logits in bf16 as the library decodes them; FP8 read into a 16-bit base."""
    recipe = override(load_recipe(str(case.recipe)), ["model.dtype=bfloat16"])
    recipe = recipe if case.is_kept else override(recipe, ["base.quant=none"])
    base = own_model(recipe, find_source(recipe), None)
    frozen, equal, reference = frozen_layers(base), [], case.reference
    for name, expected in reference.items():
        if "_proj" in name:
            path = name.removesuffix(".weight")
            weight = frozen[path].dequantized() if path in frozen else base.get_submodule(path).weight
            equal.append(torch.equal(weight.to(expected.dtype), expected))
    logits = base(input_ids=TOKENS, use_cache=False).logits
    found = {"layers": len(equal), "equal_layers": sum(equal), "equal_logits": torch.equal(logits, reference["logits"])}
    found["logits"] = distance([logits[0].float()], [reference["logits"][0].float()])
    if "as_it_runs" in reference:
        found["as_it_runs"] = distance([logits[0].float()], [reference["as_it_runs"][0].float()])
    return found


def planned(case: Checkpoint) -> dict[str, Any]:
    """Bytes of the linear layers in the file, in the plan, and in the run."""
    components = command("plan", case.recipe)["components"]
    file_bytes = 0
    for file in case.model.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if "_proj." in name]  # noqa: SIM118  (it has no other iterator)
            file_bytes += sum(tensors.get_tensor(name).nbytes for name in names)
    found = {"planned": components["packed base"] + components.get("block scales", 0)}
    found["held"] = sum(each.stored_weight.num_bytes for each in packed_layers(case.base).values())
    return {"bytes": {"file": file_bytes, **found}}


def in_peft(case: Checkpoint) -> dict[str, Any]:
    """The LoRA adapter of the check `peft` in PEFT on the GPTQ checkpoint itself, by gptqmodel, in float32."""
    if "GPTQ" not in case.name or case.python is None:
        return {}
    out = case.folder / "logits.safetensors"
    settings = {"adapter": str(case.folder / "peft"), "logits": str(out)}
    run_with(case.python, SCRIPT, "peft_on_gptq", case.name, str(case.made), json.dumps(settings), cwd=case.folder)
    with torch.no_grad():
        expected = load_run(case.folder / "lora").model(input_ids=TOKENS, use_cache=False).logits[0]
    return {"in_peft": distance([load_file(out)["logits"][0]], [expected])}


if __name__ == "__main__":
    main()
