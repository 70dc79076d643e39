"""A wheel built from this checkout has the files of `qdora.peft`, and the README's lines run with it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import support

ROOT = Path(__file__).parent.parent
BEFORE = """
import json, sys, torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=nf4, dtype=torch.float32)
texts = Dataset.from_list([{"text": "2 + 2 = 4"}] * 8)
pairs = Dataset.from_list([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}] * 8)
"""
WITHOUT_TRL = """
class trainer:
    model = get_peft_model(model, config)
trainer.model(input_ids=torch.ones(2, 9).long(), labels=torch.ones(2, 9).long()).loss.backward()
"""
AFTER = """
ways = [*qdora.peft.report(trainer.model).values()]
print(json.dumps({"file": qdora.peft.__file__, "ways": ways}))
"""
PATCHED = "from peft.tuners.lora.bnb import Linear4bit; print(Linear4bit.forward.__module__)"


def python(*arguments: Any, **options: Any) -> str:
    return subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True, **options).stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_readmes_lines_run_with_a_wheel(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("qdora-*.whl")
    site = tmp_path / "site"
    python("-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    assert (site / "qdora/peft.py").read_text() == (ROOT / "qdora/peft.py").read_text()
    assert (site / "qdora/peft_launcher/sitecustomize.py").is_file()

    section = (ROOT / "README.md").read_text().split("## In your own trainer")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    if importlib.util.find_spec("trl") is None:
        block = "".join(line for line in block.splitlines(True) if not re.search("trl|rainer", line)) + WITHOUT_TRL
    else:
        short = r'\1, max_steps=2, use_cpu=True, bf16=False, report_to="none"'
        block, num_configs = re.subn(r'(Config\("\w+")', short, block)
        assert num_configs == 2
    model = support.write_llama(tmp_path / "model", intermediate_size=128)
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}}
    found = json.loads(python("-c", BEFORE + block + AFTER, model, **elsewhere).splitlines()[-1])
    assert Path(found["file"]) == site / "qdora/peft.py"
    assert found["ways"] == ["fast"] * 14
    launched = python("-m", "qdora.peft", sys.executable, "-c", PATCHED, **elsewhere)
    assert launched.split() == ["qdora.peft"]
