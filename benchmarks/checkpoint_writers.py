"""Programs that quantise a model, and the dense weights and logits that the formats' own libraries make of it.

    PYTHON benchmarks/checkpoint_writers.py TASK NAME FOLDER SETTINGS

PYTHON is that of an environment in which the program is installed; nothing of qdora is imported. FOLDER/model is the
16-bit model; FOLDER/NAME becomes the checkpoint, FOLDER/NAME.reference.safetensors what a library decodes: the model's
state, and the logits of `TOKENS`. SETTINGS is JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

PACKAGES = ("llmcompressor", "compressed-tensors", "gptqmodel", "auto-round", "peft", "transformers", "torch")
TOKENS = torch.arange(2, 66)[None]


def model_of(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def llmcompressor(source: Path, out: Path, settings: dict[str, Any]) -> Any:
    """A scheme by name, or a `format` of the weights alone."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers.utils.quantization_config import CompressedTensorsConfig

    model = model_of(source)
    oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **settings))
    model.save_pretrained(out, save_compressed=True)
    return model_of(out, quantization_config=CompressedTensorsConfig(dequantize=True))


def transformers(source: Path, out: Path, settings: dict[str, Any]) -> Any:
    """FP8 by its own quantiser, which it runs by itself only on a GPU."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    config = FineGrainedFP8Config(**settings)
    quantiser = Fp8Quantize(SimpleNamespace(quantization_config=config))  # type: ignore[no-untyped-call]
    model = model_of(source)
    state = {}
    for name, tensor in model.state_dict().items():
        state |= quantiser.convert({name: tensor}) if "_proj" in name else {name: tensor}
    model.config.quantization_config = config.to_dict()
    model.config.save_pretrained(out)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return model_of(out)


def gptqmodel(source: Path, out: Path, settings: dict[str, Any]) -> Any:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one it does not start
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(device="cpu", **settings), dtype=torch.bfloat16)
    ids = torch.randint(2, 258, (16, 64), generator=torch.Generator().manual_seed(0)).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    model.save(str(out))
    return gptqmodel_reads(source, out, settings)


def autoround(source: Path, out: Path, settings: dict[str, Any]) -> None:
    """What it writes is read by gptqmodel, in another environment."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    sort, rest = settings["format"], {name: each for name, each in settings.items() if name != "format"}
    program = AutoRound(model_of(source), AutoTokenizer.from_pretrained(source), iters=0, disable_opt_rtn=True, **rest)
    program.quantize_and_save(str(out), format=sort)
    for file in [*out.glob("*/*")]:
        file.rename(out / file.name)


def gptqmodel_reads(source: Path, out: Path, settings: dict[str, Any]) -> Any:
    """GPTQ and AWQ: (q - z) s in float32, which its layers compute in the dtype of the scales."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    library, model = gptq_model(out, torch.bfloat16), model_of(source)
    with torch.no_grad():
        model.as_it_runs = library(input_ids=TOKENS, use_cache=False).logits
        for path, layer in library.named_modules():
            if hasattr(layer, "qweight"):
                layer.scales.data = layer.scales.float()
                if settings.get("format") == "auto_awq":
                    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size).T
                else:
                    weight = layer.dequantize_weight().T
                linear = model.get_submodule(path)
                linear.exact = weight
                linear.weight.copy_(weight)
    return model


def gptq_model(folder: Path, dtype: torch.dtype) -> Any:
    """Its CPU kernel is off by tenths of a logit, its plain one is not."""
    from transformers import AwqConfig, GPTQConfig

    torch._dynamo.config.disable = True
    is_awq = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    config = AwqConfig(backend="torch_awq") if is_awq else GPTQConfig(bits=4, backend="torch")
    return model_of(folder, dtype, quantization_config=config, device_map="cpu")


def peft_on_gptq(_source: Path, out: Path, settings: dict[str, Any]) -> None:
    """Logits of the adapter in a folder on a checkpoint, in float32."""
    from peft import PeftModel

    model = gptq_model(out, torch.float32)
    for layer in model.modules():
        if hasattr(layer, "qweight"):
            layer.scales.data = layer.scales.float()
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, settings["adapter"]).eval()(input_ids=TOKENS, use_cache=False).logits
    save_file({"logits": logits}, settings["logits"])


def main(task: str, name: str, folder: str, settings: str) -> None:
    source, out = Path(folder, "model"), Path(folder, name)
    model = globals()[task](source, out, json.loads(settings))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, out)
    packages = [each for each in PACKAGES if find_spec(each.replace("-", "_"))]
    (out / f"{task}.versions.json").write_text(json.dumps({each: version(each) for each in packages}))
    if model is None:
        return
    with torch.no_grad():
        found = {"logits": model(input_ids=TOKENS, use_cache=False).logits}
    if hasattr(model, "as_it_runs"):
        found["as_it_runs"] = model.as_it_runs
    for key in load_file(source / "model.safetensors"):
        layer = model.get_submodule(key.rpartition(".")[0])
        found[key] = getattr(layer, "exact", layer.weight).detach().contiguous()
    save_file(found, out.with_name(f"{name}.reference.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
