"""The Triton kernels without a GPU: in the interpreter, and compiled for every card. Skipped without Triton."""

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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import triton_kernels as benchmark  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason='Triton is not installed: pip install "qdora[triton]"'
)
TILES = ("tile", "tile, float16", "tile, float32", "tile, scales at hand", "tile of experts")
MOST_TELLING = ("tile", "factor sums, rank 128")


@pytest.fixture(scope="module")
def launches() -> dict[str, Any]:
    return benchmark.launches()


def interpreted(*files: str, selection: str = "not slow and not gpu") -> None:
    """Run test files in Triton's interpreter, which must be chosen before Triton is imported."""
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", selection, *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "QDORA_KERNELS": "triton"}
    run = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]


def test_decoding_bit_for_bit_and_sums_in_the_interpreter():
    interpreted("tests/interpreted_triton.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_section_of_the_gpu_suite_in_the_interpreter():
    interpreted("tests/interpreted_triton.py", selection="slow")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_layers_by_triton_pass_the_tests_of_layers():
    """Against float64, as they do without Triton."""
    interpreted("tests/test_ops_tiles.py", "tests/test_nn_expert_linear.py", "tests/test_ops_adapted_product.py")


@pytest.mark.parametrize("name", MOST_TELLING)
def test_no_kernel_spills(launches, name):
    for capability in (80, 120):
        assert benchmark.usage(benchmark.compiled(launches[name], capability))["spilled_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("capability", benchmark.CAPABILITIES)
def test_no_kernel_spills_on_any_card(launches, capability):
    assert len(launches) > 10
    for name, launch in launches.items():
        assert benchmark.usage(benchmark.compiled(launch, capability))["spilled_bytes"] == 0, name


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    script, out = ROOT / "benchmarks/triton_kernels.py", tmp_path / "out.json"
    subprocess.run([sys.executable, str(script), "--smoke", "--out", str(out)], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["no_spill"]
    for paths in found["estimate"]["of"].values():
        assert paths["triton"]["launches"] <= paths["bitsandbytes"]["launches"]


@pytest.mark.parametrize("name", TILES)
def test_a_tile_is_rounded_as_torch_rounds_and_written_16_bytes_at_a_time(launches, name):
    """No fused product and sum, rounding to the nearest, and no store of single weights."""
    code = benchmark.compiled(launches[name], 80).asm["ptx"]
    assert "fma.rn.f32" not in code
    assert len(re.findall(r"mul(?:\.rn)?\.f32", code)) > 0
    if name != "tile, float32":
        kind = "f16" if "float16" in name else "bf16"
        assert re.findall(r"cvt\.(\w+)\.\w+\.f32", code) == re.findall(r"cvt\.(rn)\." + kind + r"(?:x2)?\.f32", code)
        assert "cvt.rn." + kind in code
    assert "st.global.v4.b32" in code
    assert "st.global.b16" not in code
