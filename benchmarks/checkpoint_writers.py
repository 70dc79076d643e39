"""Programs that quantise a model, and the dense weights and logits that the formats' own libraries make of it.

    PYTHON benchmarks/checkpoint_writers.py TASK NAME FOLDER SETTINGS

PYTHON is that of an environment in which the program is installed; nothing of qdora is imported. FOLDER/model is the
16-bit model; FOLDER/NAME becomes the checkpoint, FOLDER/NAME.reference.safetensors what a library decodes: the model's
state, and the logits of `TOKENS`. SETTINGS is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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


def main(task: str, name: str, folder: str, settings: str) -> None:
    out = Path(folder, name)
    model = globals()[task](Path(folder, "model"), out, json.loads(settings))
    with torch.no_grad():
        found = {"logits": model(input_ids=TOKENS, use_cache=False).logits}
    names = load_file(Path(folder, "model/model.safetensors"))
    found |= {name: model.state_dict()[name].contiguous() for name in names}
    save_file(found, out.with_name(f"{name}.reference.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
