"""Checkpoints that other programs quantised, as bases: against the formats' own libraries.

Writers run in two environments, named by their Pythons: --llmcompressor, which brings auto-round, and --gptqmodel, with
peft and optimum. See `checkpoint_writers.py`. With --made FOLDER the checkpoints stay there, and those that are there
are not written again.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import checkpoint_writers
import torch
from architectures import Case, answered, command, distance, merged, nf4_lora, passed, peft, resumed
from byte_tokenizer import byte_tokenizer
from checkpoint_writers import TOKENS, Settings
from contenders import packed_layers
from frame import bench, main, table, tabulated
from host_memory import MODEL, SMALL, write_checkpoint
from measure import alone
from quantiser_peers import run_with
from quantisers import loaded, own_model
from safetensors.torch import load_file
from tiny_families import spread_
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qdora.model.build_model import find_source
from qdora.model.inject import frozen_layers
from qdora.model.load import stored_form
from qdora.plan.plan import public_shapes
from qdora.recipe.recipe_file import load_recipe, override
from qdora.recipe.section import with_settings
from qdora.run.load_run import load_run

SCRIPT = Path(__file__).with_name("checkpoint_writers.py")
_GPTQ = ((4, 128, ""), (4, 64, ""), (4, 128, "_v2"), (4, 64, "_v2"), (3, 64, ""), (2, 64, ""), (8, 128, ""))
_AWQ = {"sym": False, "format": "auto_awq"}
CASES: dict[str, tuple[str, Settings]] = {
    **{
        scheme: ("llmcompressor", {"scheme": scheme})
        for scheme in ("W4A16", "W4A16_ASYM", "NVFP4A16", "MXFP4A16", "FP8_DYNAMIC", "FP8_BLOCK", "W8A16", "W8A8")
    },
    "W4A16-64": ("llmcompressor", {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}),
    "W4A16_ASYM-64": ("llmcompressor", {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 64}),
    "FP8-tensor": ("llmcompressor", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "FP8-channel": ("llmcompressor", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8": ("transformers", {"modules_to_not_convert": ["lm_head"]}),
    **{
        f"GPTQ{version}-{bits}-bits-{'sym' if sym else 'asym'}-{size}": (
            "gptqmodel",
            {"bits": bits, "group_size": size, "sym": sym, "format": f"gptq{version}"},
        )
        for bits, size, version in _GPTQ
        for sym in (True, False)
    },
    "GPTQ-desc_act": ("gptqmodel", {"bits": 4, "group_size": 128, "desc_act": True}),
    "auto-round-GPTQ": ("autoround", {"group_size": 128, "sym": True, "format": "auto_gptq"}),
    "AWQ-128": ("autoround", _AWQ | {"group_size": 128}),
    "AWQ-64": ("autoround", _AWQ | {"group_size": 64}),
    "AWQ-sym-128": ("autoround", _AWQ | {"group_size": 128, "sym": True}),
}
"""Name -> its writer and the writer's settings."""


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
    llmcompressor: str = "llmcompressor/bin/python",
    gptqmodel: str = "gptqmodel/bin/python",
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each checkpoint decoded, trained, killed, resumed, merged, exported; its adapter in PEFT on the same base."""
    checks = [resumed, decoded, planned, answered, merged, nf4_lora, peft, in_peft]
    pythons = {"llmcompressor": llmcompressor, "autoround": llmcompressor, "transformers": sys.executable}
    pythons |= {"gptqmodel": gptqmodel, "gptqmodel_reads": gptqmodel}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(made or place).absolute()
        if not (folder / "model").exists():
            write_source(folder / "model")
        for name in cases:
            writer, settings = CASES[name]
            if not (folder / f"{name}.reference.safetensors").exists():
                for task in (writer, "gptqmodel_reads") if writer == "autoround" else (writer,):
                    run_with(pythons[task], SCRIPT, task, name, str(folder), json.dumps(settings), cwd=folder)
            with tempfile.TemporaryDirectory() as scratch:
                case = Checkpoint(Path(scratch), folder, name, gptqmodel)
                yield name, {"writer": writer, "settings": settings, "versions": case.versions} | passed(case, checks)


class Checkpoint(Case):
    """A checkpoint of `made`, and what its library decodes."""

    def __init__(self, folder: Path, made: Path, name: str, python: str) -> None:
        super().__init__(folder, is_mxfp4=False)
        self.made, self.name, self.python = made, name, python
        self.model.symlink_to(made / name)
        document = json.loads(self.recipe.read_text())
        document.pop("base")
        self.recipe.write_text(json.dumps(document))
        self.versions = {
            file.stem.partition(".")[0]: json.loads(file.read_text()) for file in self.model.glob("*.versions.json")
        }

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """As the layers hold them, which `decoded` compares: compressed-tensors itself rounds to the model's dtype."""
        return {path: layer.dequantized() for path, layer in packed_layers(self.base).items()}

    @cached_property
    def logits(self) -> list[Tensor]:
        """Of plain transformers with the merged weights, in float32."""
        return self.logits_of(self.plain)


@torch.no_grad()
def decoded(case: Checkpoint) -> dict[str, Any]:
    """Weights and logits in bf16 of the base in the checkpoint's form; FP8 in 16 bits."""
    recipe = override(load_recipe(str(case.recipe)), ["model.dtype=bfloat16"])
    source, reference = find_source(recipe), load_file(case.made / f"{case.name}.reference.safetensors")
    base = own_model(with_settings(recipe, base=stored_form(source)), source, None)
    expected, as_it_runs = reference.pop("logits"), reference.pop("as_it_runs")
    frozen, equal = frozen_layers(base), 0
    for name, theirs in reference.items():
        path = name.removesuffix(".weight")
        ours = frozen[path].dequantized() if path in frozen else base.get_submodule(path).weight
        equal += torch.equal(ours.to(theirs.dtype), theirs)
    logits = base(input_ids=TOKENS, use_cache=False).logits
    found = {"layers": len(reference), "equal_layers": equal, "equal_logits": torch.equal(logits, expected)}
    return found | {"as_it_runs": distance([as_it_runs[0].float()], [logits[0].float()])}


def planned(case: Checkpoint) -> dict[str, Any]:
    """Bytes of the linear layers in the file, in the plan, and in the run."""
    components = command("plan", case.recipe)["memory"]["components"]
    tensors = chain(*(load_file(file).items() for file in case.model.glob("*.safetensors")))
    found = {"file": sum(tensor.nbytes for name, tensor in tensors if "_proj." in name)}
    found["planned"] = components["packed base"] + components["block scales"]
    found["held"] = sum(each.stored_weight.num_bytes for each in packed_layers(case.base).values())
    return {"bytes": found}


def in_peft(case: Checkpoint) -> dict[str, Any]:
    """The LoRA adapter of the check `peft` in PEFT on the GPTQ checkpoint itself, by gptqmodel, in float32."""
    if "GPTQ" not in case.name:
        return {}
    out = case.folder / "logits.safetensors"
    settings = {"adapter": str(case.folder / "peft"), "logits": str(out)}
    run_with(case.python, SCRIPT, "peft_on_gptq", case.name, str(case.made), json.dumps(settings), cwd=case.folder)
    with torch.no_grad():
        expected = load_run(case.folder / "lora").model(input_ids=TOKENS, use_cache=False).logits[0]
    return {"in_peft": distance([load_file(out)["logits"][0]], [expected])}


@table("checkpoints")
def checkpoints_table(result: Any) -> str:
    rows, lines = result["checkpoints"], dict[str, list[str]]()
    columns: dict[str, Any] = {"checkpoint": "{0}", "weights equal": "{1[equal_layers]} of {1[layers]}"}
    columns["logits equal"] = lambda row: "yes" if row[1]["equal_logits"] else "no"
    columns["as the library runs it"] = "{1[as_it_runs]:.0e}"
    columns |= {f"bytes, {name}": f"{{1[bytes][{name}]:,}}" for name in ("file", "planned", "held")}
    columns |= {"merged": "{1[merged]:.0e}", "PEFT": "{1[peft]:.0e}"}
    columns["PEFT on it"] = lambda row: f"{row[1]['in_peft']:.0e}" if "in_peft" in row[1] else "–"
    for name, row in rows.items():
        if "resumed" not in row or row["failed"]:
            line = "; ".join([*row["refused"].values(), *row["failed"].values()])
            lines.setdefault(line, []).append(name)
    listed = "".join(f"- {', '.join(names)}: {line}\n" for line, names in lines.items())
    return tabulated([pair for pair in rows.items() if "resumed" in pair[1]], columns) + "\n" + listed


@bench(smoke={"layers": 1})
def fp8_memory(layers: int = 2, *, smoke: bool) -> dict[str, Any]:
    """Peak of loading blocks of Llama-3-8B's shape into NF4 from FP8 and from bf16, each in a process of its own."""
    shape = {name: value for name, value in public_shapes()[MODEL].values.items() if name != "model_type"}
    shape |= SMALL if smoke else {"vocab_size": 32_768}
    with tempfile.TemporaryDirectory() as name:
        folders = {form: Path(name, form) for form in ("bf16", "fp8")}
        _, largest = write_checkpoint(folders["bf16"], shape | {"num_hidden_layers": layers})
        checkpoint_writers.transformers(*folders.values(), CASES["fp8"][1])
        peaks = {form: alone(loaded, folder, "nf4", "round", 1)["peak_bytes"] for form, folder in folders.items()}
    more = peaks["fp8"] - peaks["bf16"]
    return {"peak_bytes": peaks, "more_bytes": more, "tensor_bytes": largest, "passes": more <= largest}


@table("fp8_memory")
def fp8_memory_table(result: Any) -> str:
    columns = {"peak from bf16": "{peak_bytes[bf16]:.1fMiB} MiB", "from FP8": "{peak_bytes[fp8]:.1fMiB} MiB"}
    columns |= {"more": "{more_bytes:.1fMiB} MiB", "largest tensor in bf16": "{tensor_bytes:.1fMiB} MiB"}
    return tabulated([result], columns)


if __name__ == "__main__":
    main()
