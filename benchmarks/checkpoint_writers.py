"""Programs that quantise a model, and the dense weights and logits that the formats' own libraries make of it.

    PYTHON benchmarks/checkpoint_writers.py TASK NAME FOLDER SETTINGS

PYTHON is that of an environment in which the program is installed; nothing of qdora is imported. FOLDER/model is the
16-bit model and FOLDER/NAME becomes the checkpoint. FOLDER/NAME.reference.safetensors has its linear weights as the
library decodes them, the logits of `TOKENS` by transformers with these weights, and `as_it_runs` those by the library,
which may quantise activations or round products to float16. SETTINGS is JSON.
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
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

Settings = dict[str, Any]
PACKAGES = ("llmcompressor", "compressed-tensors", "gptqmodel", "auto-round", "peft", "transformers", "torch")
TOKENS = torch.arange(2, 66)[None]


def model_of(folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def llmcompressor(source: Path, out: Path, settings: Settings) -> Any:
    """A scheme by its name, or settings of the weights."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers.utils.quantization_config import CompressedTensorsConfig

    model, targets = model_of(source), {"targets": ["Linear"]}
    how = settings | targets if "scheme" in settings else {"config_groups": {"all": targets | {"weights": settings}}}
    oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **how))
    model.save_pretrained(out, save_compressed=True)
    return model_of(out, quantization_config=CompressedTensorsConfig(dequantize=True))


def transformers(source: Path, out: Path, settings: Settings) -> Any:
    """FP8 by its own quantiser, which it runs by itself only on a GPU."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    model, config, state = model_of(source), FineGrainedFP8Config(**settings), {}
    quantiser = Fp8Quantize(SimpleNamespace(quantization_config=config))
    for name, tensor in model.state_dict().items():
        state |= quantiser.convert({name: tensor}) if "_proj" in name else {name: tensor}
    model.config.quantization_config = config.to_dict()
    model.config.save_pretrained(out)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return model_of(out)


def gptqmodel(source: Path, out: Path, settings: Settings) -> Any:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one it does not start
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(source), QuantizeConfig(device="cpu", **settings), dtype=torch.bfloat16)
    ids = torch.randint(2, 258, (16, 64), generator=torch.Generator().manual_seed(0)).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    model.save(str(out))
    return gptqmodel_reads(source, out, settings)


def autoround(source: Path, out: Path, settings: Settings) -> None:
    """What it writes is read by gptqmodel, in another environment."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    form = settings.pop("format")
    how = {"iters": 0, "disable_opt_rtn": True} | settings
    AutoRound(model_of(source), AutoTokenizer.from_pretrained(source), **how).quantize_and_save(str(out), format=form)
    for file in [*out.glob("model-*/*")]:
        file.rename(out / file.name)


def gptqmodel_reads(_source: Path, out: Path, _settings: Settings, dtype: torch.dtype = torch.bfloat16) -> Any:
    """GPTQ and AWQ. Its default kernel on a CPU is off by tenths of a logit."""
    from transformers import AwqConfig, GPTQConfig

    torch._dynamo.config.disable = True
    method = json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"]
    config = AwqConfig(backend="torch_awq") if method == "awq" else GPTQConfig(bits=4, backend="torch")
    return model_of(out, dtype, quantization_config=config, device_map="cpu")


def peft_on_gptq(source: Path, out: Path, settings: Settings) -> None:
    """Logits of an adapter on a GPTQ checkpoint, in float32."""
    from peft import PeftModel

    model = gptqmodel_reads(source, out, settings, torch.float32)
    for layer in model.modules():
        if hasattr(layer, "qweight"):
            layer.scales.data = layer.scales.float()
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, settings["adapter"]).eval()(input_ids=TOKENS, use_cache=False).logits
    save_file({"logits": logits}, settings["logits"])


def dense_weight(layer: Any) -> torch.Tensor:
    """(out, in); of GPTQ and AWQ in float32, which a layer of theirs rounds to the dtype of its scales, float16."""
    if not hasattr(layer, "qweight"):
        return layer.weight.detach()
    layer.scales.data = layer.scales.float()
    if hasattr(layer, "dequantize_weight"):
        return layer.dequantize_weight().T.contiguous()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, layer.group_size).T.contiguous()


@torch.no_grad()
def main(task: str, name: str, folder: str, settings: str) -> None:
    source, out = Path(folder, "model"), Path(folder, name)
    library = globals()[task](source, out, json.loads(settings))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, out)
    packages = [each for each in PACKAGES if find_spec(each.replace("-", "_"))]
    (out / f"{task}.versions.json").write_text(json.dumps({each: version(each) for each in packages}))
    if library is None:
        return
    model, found = model_of(source), {"as_it_runs": library(input_ids=TOKENS, use_cache=False).logits}
    for path, layer in library.named_modules():
        if path.endswith("_proj"):
            found[f"{path}.weight"] = dense_weight(layer)
            model.get_submodule(path).weight.copy_(found[f"{path}.weight"])
    found["logits"] = model(input_ids=TOKENS, use_cache=False).logits
    save_file(found, out.with_name(f"{name}.reference.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
