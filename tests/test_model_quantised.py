"""Checkpoints in the formats of other libraries: kept bit for bit, trained, resumed, merged; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdora.errors import UserError
from qdora.export.export import export_run
from qdora.memory.stream import HostResidency
from qdora.model.inject import frozen_layers
from qdora.model.load import stored_form
from qdora.model.quantised import left_dense
from qdora.model.source import resolve
from qdora.plan.fit import plan
from qdora.plan.plan import BASE, DENSE, SCALES
from qdora.quant.packed import dequantize, quantize
from qdora.recipe.options import ExportOptions
from qdora.recipe.recipe_file import load_recipe
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import reference_quant, support

INT4 = {"num_bits": 4, "type": "int", "group_size": 32}


def of_ct(layout: str, **weights: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "config_groups": {"0": {"format": layout, "weights": weights}}}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ | {"dynamic": {"-:.*down_proj": {}, "+:.*up_proj": {"bits": 4}}},
    "gptq_v2": GPTQ | {"checkpoint_format": "gptq_v2"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    "compressed": of_ct("pack-quantized", **INT4, symmetric=False) | {"ignore": ["lm_head", "re:.*layers.1.ml"]},
    "compressed symmetric": of_ct("pack-quantized", **INT4, symmetric=True),
    "nvfp4": of_ct("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16),
    "mxfp4": of_ct("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32),
    "fp8": {"quant_method": "fp8", "weight_block_size": [24, 48], "modules_to_not_convert": ["lm_head", "down_proj"]},
    "fp8 rows": of_ct("float-quantized", num_bits=8, type="float"),
    "fp8 tensor": of_ct("naive-quantized", num_bits=8, type="float"),
}
LEFT_DENSE = {"gptq": "down_proj", "compressed": "layers.1.mlp", "fp8": "down_proj"}
KINDS = {name: name if name in ("nvfp4", "mxfp4") else "int4-groups" for name in CONFIGS if "fp8" not in name}


def tensors_of(layout: str, shape: tuple[int, int], random: np.random.Generator) -> tuple[dict[str, Any], Tensor]:
    """The parts of a random layer in a checkpoint, and its weight by definition, float32."""
    rows, columns = shape
    if layout.startswith("fp8"):
        values = torch.from_numpy(random.normal(0, 20, shape)).to(torch.float8_e4m3fn)
        size = {"fp8": (24, 48), "fp8 rows": (1, columns), "fp8 tensor": shape}[layout]
        scales = random.uniform(1e-4, 3e-3, (-(-rows // size[0]), -(-columns // size[1]))).astype(np.float32)
        wide = np.array([[scales[i // size[0], j // size[1]] for j in range(columns)] for i in range(rows)])
        name = "weight_scale_inv" if layout == "fp8" else "weight_scale"
        scales = torch.from_numpy(scales.reshape(1) if layout == "fp8 tensor" else scales)
        return {"weight": values, name: scales}, values.float() * torch.from_numpy(wide)
    codes = random.integers(0, 16, shape).astype(np.uint8)
    if layout in ("nvfp4", "mxfp4"):
        size = {"nvfp4": 16, "mxfp4": 32}[layout]
        stored = random.integers(60, 100, (rows, columns // size)).astype(np.uint8)
        parts = {"weight_packed": torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4)}
        scales = torch.from_numpy(stored)
        if layout == "nvfp4":
            scales = scales.view(torch.float8_e4m3fn)
            parts["weight_global_scale"] = torch.tensor([300.7])
        parts["weight_scale"] = scales
        values = np.array([*reference_quant.E2M1, *(-v for v in reference_quant.E2M1)], np.float32)[codes]
        wide = (
            [reference_quant.E4M3[c] for c in range(127)]
            if layout == "nvfp4"
            else [2.0 ** (c - 127) for c in range(127)]
        )
        of_blocks = np.array(wide, np.float32)[stored]
        if layout == "nvfp4":
            of_blocks = of_blocks / np.float32(300.7)
        return parts, torch.from_numpy(values * of_blocks.repeat(size, 1))
    zeros = random.integers(0, 16, (rows, columns // 32)).astype(np.uint8)  # 0 too: GPTQ's borrows
    if layout == "compressed symmetric":
        zeros[:] = 8
    scales = random.uniform(0.001, 0.03, zeros.shape).astype(np.float16)
    exact = (codes.astype(np.float64) - zeros.repeat(32, 1)) * scales.astype(np.float64).repeat(32, 1)
    parts = reference_quant.stored_int4(layout, codes, zeros, scales)
    return {name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()}, torch.from_numpy(
        exact
    ).float()


def write(root: Path, layout: str) -> dict[str, Tensor]:
    """A tiny Llama under `root`/model in a layout; returns the weights of its quantised layers by definition."""
    directory, random = support.write_llama(root / "model", intermediate_size=96), np.random.default_rng(0)
    file, expected = directory / "model.safetensors", {}
    tensors = load_file(file)
    for name, value in list(tensors.items()):
        path = name.removesuffix(".weight")
        if name.endswith("proj.weight") and LEFT_DENSE.get(layout, "no layer") not in path:
            del tensors[name]
            parts, expected[path] = tensors_of(layout, tuple(value.shape), random)
            tensors |= {f"{path}.{part}": each for part, each in parts.items()}
            if layout == "fp8":
                tensors[f"{path}.activation_scale"] = torch.tensor(0.5)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[layout]}))
    return expected


@pytest.mark.parametrize("layout", CONFIGS)
def test_a_checkpoint_is_read_bit_for_bit_trained_resumed_and_merged(tmp_path, layout, caplog):
    expected = write(tmp_path, layout)
    recipe = support.tiny_recipe(tmp_path, train__steps=4)
    support.train_until(recipe, tmp_path / "run", 2)
    train_run(recipe, tmp_path / "run", resume=True)
    train_run(recipe, tmp_path / "whole")
    support.same_tensors(tmp_path / "run" / support.ADAPTER, tmp_path / "whole" / support.ADAPTER)
    model = load_run(tmp_path / "run").model
    for path, weight in expected.items():
        layer = model.get_submodule(path).base
        assert layer.kind == KINDS.get(layout, "nf4")
        held = layer.dequantized()
        assert torch.equal(held, weight if layout in KINDS else dequantize(quantize(weight, "nf4"))), path
    for path, layer in frozen_layers(model).items():  # what the checkpoint keeps dense stays dense
        assert (layer.kind == "dense") == (path.removesuffix(".base") not in expected)
    base = load_recipe(tmp_path / "run" / "recipe.yaml").base
    assert (base.quant, base.block_size) == (KINDS.get(layout, "nf4"), 32 if base.quant == "int4-groups" else 64)
    exported = export_run(tmp_path / "run", tmp_path / "merged")
    assert exported["verification"]["passed"]
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    if layout in KINDS:
        export_run(tmp_path / "run", tmp_path / "peft", ExportOptions(format="peft"))
        assert "only qdora loads this adapter" in caplog.text
        assert f"in {KINDS[layout]}" in (tmp_path / "peft/README.md").read_text()
        with pytest.raises(UserError, match=r"nf4-lora.* nf4 or fp4"):
            export_run(tmp_path / "run", tmp_path / "out", ExportOptions(format="nf4-lora"))


@pytest.mark.parametrize("layout", CONFIGS)
def test_a_plan_counts_the_bytes_as_they_are_read(tmp_path, layout):
    expected = write(tmp_path, layout)
    recipe = support.tiny_recipe(tmp_path)
    form = stored_form(resolve(str(tmp_path / "model")))
    model = support.load_checkpoint(tmp_path / "model", **form if layout in KINDS else {"quant": "nf4"})
    frozen, planned = frozen_layers(model), plan(recipe, device_kind="cpu").moments[0].by_component
    assert planned[BASE] + planned[SCALES] == sum(frozen[path].packed_form.num_bytes for path in expected)
    dense = [value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in expected]
    assert planned[DENSE] >= sum({value.data_ptr(): value.nbytes for value in dense}.values())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "awq", "modules_to_not_convert": ["layers.1.mlp.gate", "model.layers.1"]}, "1.gate 1.up"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["up_proj"]}, "1.up 10.up"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*mlp.gate"]}, "1.gate 10.gate"),  # no end is asked for
        ({"quant_method": "compressed-tensors", "ignore": [r"re:model\.layers\.1", "lm_head"]}, "all"),
        ({"quant_method": "compressed-tensors", "ignore": ["re:.*mlp.gate$"]}, ""),
        ({"quant_method": "gptq", "dynamic": {r"-:model\.layers\.1": {}}}, "all"),
        ({"quant_method": "gptq", "dynamic": {r"+:.*\.10\..*up.*": {"bits": 4}, "-:.*up.*": {}}}, "1.up"),
        ({"quant_method": "gptq", "dynamic": {"lm_head": {}, "-:.*gate.*": {}}}, "1.gate 10.gate"),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp"]}, ""),
    ],
)
def test_what_a_config_leaves_dense_is_as_its_library_reads_it(settings, expected):
    layers = {f"{n}.{part}": f"model.layers.{n}.mlp.{part}_proj" for n in (1, 10) for part in ("gate", "up")}
    names = layers.keys() if expected == "all" else expected.split()
    assert left_dense(settings, layers.values()) == {layers[name] for name in names}


def divided(rank: int, source: Path) -> None:
    with support.dividing_processes() as processes:
        sharded, whole = (support.load_sharded(source, each, quant="int4-groups") for each in (processes, None))
        for model in (sharded, whole):
            support.adapt_sharded(model)
            model.eval()
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            assert torch.equal(sharded(input_ids=ids).logits, whole(input_ids=ids).logits)


def test_streamed_and_divided_it_is_the_same_model(tmp_path):
    write(tmp_path, "awq")
    assert support.run_processes(2, divided, tmp_path / "model") == ["", ""]
    load = {"quant": "int4-groups", "block_size": 32, "double_quant": False}
    streamed, resident = (
        support.adapt_streamed(support.load_checkpoint(tmp_path / "model", placer=placer, **load))
        for placer in (HostResidency(copies=support.LateCopies), None)
    )
    support.assert_equal_tensors(support.streamed_gradients(streamed), support.streamed_gradients(resident))


ORDER = torch.arange(64, dtype=torch.int32).flip(0) // 32
FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Tensor], str]] = {
    "order": ("gptq", {}, {"model.layers.1.mlp.up_proj.g_idx": ORDER}, r"layers\.1\.mlp\.up_proj.*desc_act"),
    "bits": ("gptq", {"bits": 3}, {}, "gptq must have 4 bits"),
    "group": ("awq", {"group_size": 100}, {}, "groups of 16, .* got 4 bits and groups of 100"),
    "layout": ("awq", {"version": "gemv"}, {}, "layout gemm, got gemv"),
    "plain weights": ("gptq", of_ct("int-quantized", num_bits=8, type="int"), {}, "int-quantized .* cannot be read"),
    "method": ("gptq", {"quant_method": "quanto"}, {}, "'quanto' cannot be read"),
    "shape": ("gptq", {}, {"model.layers.0.mlp.up_proj.scales": torch.ones(3, 2)}, "up_proj.* does not fit"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_cannot_be_read_is_refused_before_anything_loads(tmp_path, case):
    layout, settings, changed, words = FAULTS[case]
    write(tmp_path, layout)
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["quantization_config"] |= settings
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model/model.safetensors") | changed
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        support.load_checkpoint(tmp_path / "model", quant="int4-groups")


def test_formats_that_only_checkpoints_hold_and_rows_of_no_whole_blocks(tmp_path):
    support.write_llama(tmp_path / "model", intermediate_size=72)
    support.assert_refused(
        ["int4-groups needs a checkpoint"], support.load_checkpoint, tmp_path / "model", quant="int4-groups"
    )
    for kind in ("nvfp4", "mxfp4"):
        model = support.load_checkpoint(tmp_path / "model", quant=kind, skip=["lm_head", "down_proj"])
        stored = load_file(tmp_path / "model/model.safetensors")
        for path, layer in frozen_layers(model).items():
            assert torch.equal(layer.dequantized(), dequantize(quantize(stored[f"{path}.weight"], kind)))
    faults = [rf"layers\.{layer}\.mlp\.down_proj.* whole blocks of 16" for layer in range(2)]
    support.assert_refused(faults, support.load_checkpoint, tmp_path / "model", quant="nvfp4")
