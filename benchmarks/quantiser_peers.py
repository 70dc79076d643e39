"""HQQ, gptqmodel and llm-compressor: weights and inputs in, what the dequantised weights are out.

    PYTHON benchmarks/quantiser_peers.py hqq | gptqmodel | gptqmodel_layer | llmcompressor_layer FOLDER

PYTHON is that of an environment in which the program is installed; nothing of qdora is imported. FOLDER has
settings.json, model/ (a 16-bit checkpoint) or layer.safetensors, and gets weights.safetensors and result.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


def by_program(python: str, task: str, folder: Path, settings: dict[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """Run this file with another Python: the dequantised weights, and what is known of them."""
    (folder / "settings.json").write_text(json.dumps(settings))
    run_with(python, Path(__file__), task, str(folder), cwd=folder)
    return load_file(folder / "weights.safetensors"), json.loads((folder / "result.json").read_text())


def run_with(python: str, script: Path, *words: str, cwd: Path) -> None:
    """Run a script with another Python."""
    call = [str(Path(python).absolute()), str(script.absolute()), *words]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # cwd: gptqmodel writes logs/ where it runs
    run = subprocess.run(call, capture_output=True, text=True, check=False, env=variables, cwd=cwd)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(call)}: exit {run.returncode}\n{run.stderr[-4000:]}")


def hqq(folder: Path, settings: dict[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """Its own optimisation of scale and zero, on the weights alone; the bits are those of what it holds."""
    from hqq.core.quantize import Quantizer

    dense, found, num_bits, num_weights = load_file(folder / "model/model.safetensors"), {}, 0, 0
    options = {"nbits": settings["bits"], "group_size": 64, "axis": int(settings["option"]), "optimize": True}
    options |= {"round_zero": settings["bits"] == 4, "device": "cpu", "compute_dtype": torch.float32}
    for path in settings["layers"]:
        codes, meta = Quantizer.quantize(dense[f"{path}.weight"], **options)
        num_bits += 8 * codes.nbytes + 16 * (meta["scale"].numel() + meta["zero"].numel())
        num_weights += dense[f"{path}.weight"].numel()
        in_16_bits = {name: meta[name].half().float() for name in ("scale", "zero")}
        found[path] = Quantizer.dequantize(codes, meta | in_16_bits).float()
    return found, {"bits": num_bits / num_weights}


def gptqmodel(folder: Path, settings: dict[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """A whole model, with the settings that are used here."""
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(**_gptqmodel_options(settings, equal=True))
    model = GPTQModel.load(str(folder / "model"), config, dtype=torch.float32)  # unasked, bfloat16 on a CPU
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in settings["calibration"]]
    model.quantize(rows, batch_size=1)
    model.save(str(folder / "quantised"))
    stored: Weights = {}
    for file in (folder / "quantised").glob("*.safetensors"):
        stored |= load_file(file)
    bits = settings["bits"]
    found = {path: _of_words(path, stored, bits) for path in settings["layers"]}
    return found, {"bits": bits + (16 + bits) / settings["group"]}


def _gptqmodel_options(settings: dict[str, Any], *, equal: bool) -> dict[str, Any]:
    """Equal: scales before the sweep, columns in descending order of diag(H), damping 0.01."""
    options = {"bits": settings["bits"], "group_size": settings["group"], "fallback": None, "device": "cpu"}
    same = {"desc_act": True, "act_group_aware": False, "static_groups": True, "damp_percent": 0.01}
    return options | (same if equal else {})


def _of_words(path: str, stored: Weights, bits: int) -> torch.Tensor:
    """(q - 2^(bits - 1)) s, (out, in) float32: codes are a stream of bits along the inputs, the lowest first."""
    words, scales, groups = (stored[f"{path}.{name}"] for name in ("qweight", "scales", "g_idx"))
    stream = (words[:, None, :] >> torch.arange(32, dtype=torch.int32)[:, None]) & 1
    parts = stream.reshape(-1, bits, words.shape[1])
    codes = (parts << torch.arange(bits, dtype=torch.int32)[:, None]).sum(dim=1)
    return ((codes - 2 ** (bits - 1)) * scales[groups.long()].float()).T.contiguous()


def gptqmodel_layer(folder: Path, settings: dict[str, Any]) -> tuple[Weights, dict[str, Any]]:
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    given = load_file(folder / "layer.safetensors")
    linear = torch.nn.Linear(*reversed(given["weight"].shape), bias=False)
    linear.weight.data = given["weight"].clone()
    quantiser = GPTQ(linear, QuantizeConfig(**_gptqmodel_options(settings, equal=settings["equal"])))
    quantiser.quantizer.configure(perchannel=True)
    quantiser.add_batch(given["inputs"][None], linear(given["inputs"][None]))
    return {"weight": quantiser.quantize()[0].float()}, {}


def llmcompressor_layer(folder: Path, settings: dict[str, Any]) -> tuple[Weights, dict[str, Any]]:
    """One layer; the order of GPTQModifier's default is ours."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    given, bits = load_file(folder / "layer.safetensors"), settings["bits"]
    weight = given["weight"]
    options = {"num_bits": bits, "symmetric": True, "strategy": "group", "group_size": settings["group"]}
    scale = weight.unflatten(1, (-1, settings["group"])).abs().amax(dim=2) / ((2**bits - 1) / 2)
    batch = [each[None] for each in (weight, given["products"], scale, torch.zeros_like(scale))]
    args = QuantizationArgs(**options, actorder="static")
    return {"weight": quantize_weight(*batch, None, args, blocksize=128, percdamp=0.01)[0][0].float()}, {}


PACKAGES = {"gptqmodel_layer": "gptqmodel", "llmcompressor_layer": "llmcompressor"}

if __name__ == "__main__":
    name, place = sys.argv[1], Path(sys.argv[2])
    asked = json.loads((place / "settings.json").read_text())
    began = time.perf_counter()
    weights, facts = globals()[name](place, asked)
    facts |= {"seconds": time.perf_counter() - began}
    facts |= {"versions": {each: version(each) for each in (PACKAGES.get(name, name), "torch")}}
    save_file({path: weight.detach().contiguous() for path, weight in weights.items()}, place / "weights.safetensors")
    (place / "result.json").write_text(json.dumps(facts))
