"""`qdora.peft`: norms that are never stale, exact merges, float32 magnitudes, reports, the launcher; and our runs that
go on from an adapter of PEFT."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu as rewrite
from peft import PeftModel, get_peft_model
from peft.tuners.lora import bnb as peft_bnb
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

import qdora.peft
from qdora.errors import UserError
from qdora.quant.packed import dequantize, quantize
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import reference, support
from tests.test_peft_layer import (
    BOTH,
    LAYER,
    base_model,
    layer_of,
    lora_config,
    loss,
    make,
    moved,
    noise,
    out,
    part_of,
    quantized,
    trainable,
    unpatch,
)

ROOT = Path(__file__).parent.parent
X = noise(5, 64, seed=8)
BITS = ("", "8bit", "32bit")
NAMES = ("AdamW", "Adam", "Lion", "PagedAdamW", "PagedAdam", "PagedLion", "RMSprop", "Adagrad", "LAMB", "LARS", "SGD")
# Not AdEMAMix32bit, which fails on a CPU by itself.
BNB = [f"{name}{bits}" for name in NAMES for bits in BITS] + ["AdEMAMix", "AdEMAMix8bit"]
TORCH = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"]
OPTIMIZERS = [*((bnb.optim, name) for name in BNB), *((torch.optim, name) for name in TORCH)]


@pytest.fixture(autouse=True)
def in_place() -> Iterator[None]:
    qdora.peft.patch()
    yield
    unpatch()


def numpy(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


def dense_of(weight: Any) -> Tensor:
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)


def expected(layer: Any, x: Tensor = X, weight: Tensor | None = None) -> Tensor:
    """The float64 formula with the present parameters, on the base as bitsandbytes dequantises it."""
    dense = dense_of(layer.base_layer.weight) if weight is None else weight
    factors = numpy(layer.lora_A["default"].weight), numpy(layer.lora_B["default"].weight)
    m = numpy(layer.lora_magnitude_vector["default"].weight) if "default" in layer.lora_magnitude_vector else None
    return torch.from_numpy(reference.forward(numpy(x), numpy(dense), *factors, layer.scaling["default"], m))


def error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())


def one_layer(dora: bool = True, out_features: int = 128, zero_row: int | None = None) -> Any:
    linear = nn.Linear(64, out_features, bias=False)
    linear.weight.data = 0.1 * noise(out_features, 64)
    if zero_row is not None:
        linear.weight.data[zero_row] = 0.0
    return adapted(quantized(linear, torch.float32, {"quant_type": "nf4"}), use_dora=dora)


def adapted(base: Any, **options: Any) -> Any:
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = True
    torch.manual_seed(1)
    return get_peft_model(model, lora_config(target_modules=["0"], task_type=None, **options)).base_model.model[0]


@pytest.mark.parametrize("library, name", OPTIMIZERS)
def test_the_norm_is_that_of_the_present_values_after_steps_of(library, name):
    """Without a backward pass or a change of mode, which would end what is kept, too."""
    model, generator = one_layer(), torch.Generator().manual_seed(9)
    parameters = trainable(model)
    assert len(parameters) == 3
    momentum = {"momentum": 0.9} if name.rstrip("bit832") in ("SGD", "LARS") else {}
    optimizer = getattr(library, name)(parameters, lr=0.02, **momentum)
    for _ in range(5):
        before = model(X)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    wanted = expected(model)
    assert error(model(X), wanted) < 1e-5
    assert error(before, wanted) > 1e-4


def step_by_hand(model: nn.Module) -> None:
    for parameter in trainable(model):
        parameter.data -= 2e-3 * parameter.grad
        parameter.grad = None


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_the_norm_is_that_of_the_present_values_after_steps_by_hand(reentrant):
    """Nothing but the layer's own backward pass ends what is kept; a checkpoint computes the layer again in it."""
    model, x = one_layer(), X.clone().requires_grad_()
    for _ in range(5):
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        y.square().sum().backward()
        step_by_hand(model)
    assert error(model(X), expected(model)) < 1e-5


@pytest.mark.parametrize("dora", [True, False])
def test_merges_leave_the_packed_base_bit_for_bit(dora):
    model = moved(one_layer(dora))
    base = model.base_layer
    packed, absmax, y = base.weight.data.clone(), base.weight.quant_state.absmax.clone(), model(X)
    for _ in range(5):
        model.merge()
        assert not torch.equal(base.weight.data, packed)
        model.unmerge()
        assert torch.equal(base.weight.data, packed)
    assert torch.equal(base.weight.quant_state.absmax, absmax)
    assert torch.equal(model(X), y)
    assert base.weight.to("cpu").bnb_quantized
    assert base.quant_state is base.weight.quant_state


@pytest.mark.parametrize("safely", [True, False])
def test_a_zero_row_stays_zero(safely):
    model = one_layer(zero_row=3)
    model.lora_B["default"].weight.data[:3] = 0.2
    x = X.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    assert error(y, expected(model)) < 1e-5
    assert not y[:, 3].any()
    assert all(tensor.isfinite().all() for tensor in (x.grad, *(p.grad for p in trainable(model))))
    model.merge(safe_merge=safely)
    assert model(X).isfinite().all()
    assert error(model(X), y) < 0.15  # one quantisation to 4 bits


def test_a_start_is_the_base_a_disabled_adapter_is_bit_for_bit_and_plain_peft_loads_what_is_saved(tmp_path):
    model = get_peft_model(base_model(), qdora.peft.use(lora_config()))
    base = out(base_model())
    assert error(out(model), base) < 1e-5
    qdora.peft.changed(moved(model))
    found = out(model)
    assert error(found, base) > 1e-2
    with model.disable_adapter():
        assert torch.equal(out(model), base)
    model.save_pretrained(tmp_path)
    assert "custom" not in (tmp_path / "adapter_config.json").read_text()
    unpatch()
    assert error(out(PeftModel.from_pretrained(base_model(), tmp_path)), found) < 1e-5


@pytest.mark.parametrize("way", ["use", "accelerate", "patch"])
def test_each_way_in_makes_every_layer_fast(way):
    unpatch()
    config = qdora.peft.use(lora_config()) if way == "use" else lora_config()
    torch.manual_seed(1)
    model = moved(get_peft_model(base_model(), config))
    if way != "use":
        assert all("accelerate" in way for way in qdora.peft.report(model).values())
        before = out(model)
        if way == "patch":
            qdora.peft.patch()
        else:
            assert qdora.peft.accelerate(model) == qdora.peft.accelerate(model) == 7
        assert error(out(model), before) < 1e-5
    loss(model).backward()
    rows = qdora.peft.report(model)
    assert len(rows) == 7
    assert set(rows.values()) == {"fast"}
    assert all(isinstance(layer_of(model, path), peft_bnb.Linear4bit) for path in rows)


CASTS: dict[str, Callable[[Any], Any]] = {
    "to": lambda layer: layer.to(torch.bfloat16),
    "half": lambda layer: layer.half(),
    "back": lambda layer: layer.to(torch.bfloat16).float(),
    "data": lambda layer: [setattr(p, "data", p.data.bfloat16()) for p in trainable(layer)],
}


@pytest.mark.parametrize("cast", CASTS)
def test_magnitudes_stay_float32_and_lose_no_digit(cast):
    layer = moved(one_layer())
    layer(X)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data.mul_(1.0001)
    before = magnitude.data.clone()
    CASTS[cast](layer)
    layer(X)
    assert layer.lora_magnitude_vector["default"].weight is magnitude
    assert torch.equal(magnitude, before)
    assert error(layer(X.to(layer.lora_A["default"].weight.dtype)).float(), expected(layer)) < 2e-2
    magnitude.data = magnitude.data.bfloat16() * 2  # other values than those that were cast
    layer(X)
    assert magnitude.dtype == torch.float32
    assert error(magnitude, 2 * before) < 1e-2


def test_8_bit_optimizers_keep_32_bit_states_of_magnitudes():
    layer = one_layer(out_features=4096)
    optimizer = bnb.optim.AdamW8bit(trainable(layer), lr=1e-3)
    layer(X).square().sum().backward()
    optimizer.step()
    for part, dtype in (("lora_magnitude_vector", torch.float32), ("lora_B", torch.uint8)):
        assert optimizer.state[getattr(layer, part)["default"].weight]["state1"].dtype == dtype


@pytest.mark.parametrize("nested", [True, False])
def test_a_base_that_bitsandbytes_has_rewritten_is_read_right(nested):
    """On a CPU with AVX512-BF16 it does so in an evaluation; the scales are rounded to bfloat16 then."""
    packing = {"quant_type": "nf4", "compress_statistics": nested}
    base = quantized(nn.Linear(64, 128, bias=False), torch.float32, packing)
    weight, dense = base.weight, dense_of(base.weight)
    weight.data, weight.quant_state = rewrite(weight.data, weight.quant_state)
    base.support_avx512bf16_for_cpu = True
    layer = adapted(base).eval()
    with torch.no_grad():
        assert error(layer(X), X @ dense.T) < 1e-2
        qdora.peft.changed(moved(layer))
        assert error(layer(X), expected(layer, weight=dense)) < 1e-2
        layer._disable_adapters = True
        assert error(layer(X), X @ dense.T) < 1e-2
    assert not getattr(weight.quant_state, "packing_format_for_cpu", False)


def test_dropout_acts_on_the_adapters_input_alone():
    torch.manual_seed(1)
    model = get_peft_model(base_model(), lora_config(lora_dropout=0.5)).train()
    layer = layer_of(model)
    assert error(layer(X), X @ dense_of(layer.base_layer.weight).T) < 1e-5
    moved(model)
    assert error(layer(X), expected(layer)) > 1e-3
    model.eval()
    assert error(layer(X), expected(layer)) < 1e-5


def changed_part(name: str, attribute: str, value: Any) -> Callable[[Any], Any]:
    return lambda model: setattr(part_of(model, name), attribute, value)


def hooked(name: str, method: str) -> Callable[[Any], Any]:
    return lambda model: getattr(part_of(model, name), method)(lambda *_: None)


Sharded = type("FullyShardedDataParallel", (nn.Linear,), {})
REASONS: dict[str, Callable[[Any], Any]] = {
    "a hook on base_layer": hooked("base_layer", "register_forward_pre_hook"),
    "a hook on lora_A": hooked("lora_A", "register_full_backward_pre_hook"),
    "a hook on lora_dropout": hooked("lora_dropout", "register_full_backward_hook"),
    "a hook on lora_magnitude_vector": hooked("lora_magnitude_vector", "register_forward_hook"),
    "2 active adapters": lambda m: [m.add_adapter("second", lora_config()), m.base_model.set_adapter(BOTH)],
    "lora_A is sharded": lambda m: setattr(part_of(m, "lora_A").weight, "ds_id", 1),
    "lora_B is a FullyShardedDataParallel": changed_part("lora_B", "__class__", Sharded),
    "no quant_state": changed_part("base_layer", "weight", nn.Parameter(torch.ones(128, 64))),
    "forward of its own on lora_A": changed_part("lora_A", "forward", torch.clone),
    "lora_bias": changed_part("lora_B", "bias", nn.Parameter(torch.ones(128))),
    "bias is trained": changed_part("base_layer", "bias", nn.Parameter(torch.ones(128))),
}


@pytest.mark.parametrize("words", REASONS)
def test_the_report_says_why_pefts_own_forward_runs(words):
    model = make()
    REASONS[words](model)
    assert words in qdora.peft.report(model)[LAYER]
    assert all(way == "fast" for path, way in qdora.peft.report(model).items() if path != LAYER) or "2" in words


def python(*arguments: str, paths: str = str(ROOT), cwd: Path = ROOT) -> Any:
    environment = {"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    output: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "timeout": 200}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, **output)


LLAMA_FACTORY = """
from enum import Enum
import peft
class QuantizationMethod(str, Enum):
    BNB = "bnb"
def accepts(method):
    return method == QuantizationMethod.BNB
"""
AXOLOTL = """
def prepare_plugins(cfg):
    print("plugins", *cfg["plugins"])
def load_cfg(cfg):
    prepare_plugins(cfg)
"""
GRANDCHILD = """
import importlib.util
importlib.util.find_spec("peft")  # as transformers asks
import axolotl.cli.config
import llamafactory.model.adapter as adapter
from peft.tuners.lora.bnb import Linear4bit
print("method of", Linear4bit.forward.__module__, adapter.accepts("bitsandbytes"))
axolotl.cli.config.load_cfg({"plugins": ["users.Plugin"]})
axolotl.cli.config.load_cfg({})
"""
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {GRANDCHILD!r}], check=True)"


def test_the_launcher_patches_a_child_of_a_child(tmp_path):
    for name, source in (("llamafactory/model/adapter", LLAMA_FACTORY), ("axolotl/cli/config", AXOLOTL)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "sitecustomize.py").write_text("print('the existing sitecustomize')")
    ran = python("-m", "qdora.peft", sys.executable, "-c", CHILD, paths=f"{tmp_path}:{ROOT}", cwd=tmp_path)
    assert "method of qdora.peft True" in ran.stdout
    assert "plugins users.Plugin qdora.peft.AxolotlPlugin\nplugins qdora.peft.AxolotlPlugin\n" in ran.stdout
    assert ran.stdout.count("the existing sitecustomize") == 2  # of the child and of its child
    said = [line for line in ran.stderr.splitlines() if line.startswith("qdora.peft:")]
    assert len(said) == 2
    assert "PEFT" in said[0]
    assert "LLaMA-Factory" in said[1]


def test_the_launcher_says_what_is_wrong():
    for arguments, words in (([], "usage"), (["no-such-command"], "no-such-command: No such file")):
        with pytest.raises(subprocess.CalledProcessError) as failed:
            python("-m", "qdora.peft", *arguments)
        assert words in failed.value.stderr
        assert "Traceback" not in failed.value.stderr


def losses_of_two(rank: int, wrap: str) -> tuple[list[float], set[str]]:
    """Mean losses of both processes over four steps, and the ways of the layers."""
    model: Any = make({"quant_storage": torch.float32}).train()
    wrapped = DistributedDataParallel(model) if wrap == "ddp" else model
    frozen = {p for p in model.parameters() if not p.requires_grad} if wrap == "base ignored" else None
    for part in () if wrap == "ddp" else (*model.base_model.model.model.layers, model):
        fully_shard(part, ignored_params=frozen)
    optimizer, losses = torch.optim.AdamW(trainable(model), lr=1e-2), []
    for step in range(4):
        ids = torch.randint(0, 97, (2, 2, 12), generator=torch.Generator().manual_seed(step))[rank]
        optimizer.zero_grad()
        value = wrapped(input_ids=ids, labels=ids).loss
        value.backward()
        optimizer.step()
        distributed.all_reduce(mean := value.detach() / 2)
        losses.append(float(mean))
    return losses, set(qdora.peft.report(model).values())


def train_with_both(rank: int, wrap: str, way: str) -> None:
    distributed.init_process_group("gloo")
    unpatch()
    theirs, _ = losses_of_two(rank, wrap)
    qdora.peft.patch()
    ours, ways = losses_of_two(rank, wrap)
    assert len(ways) == 1
    assert way in ways.pop()
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert len(set(ours)) > 1


@pytest.mark.parametrize(
    ("wrap", "way"), [("ddp", "fast"), ("base ignored", "fast"), ("base sharded", "no quant_state")]
)
def test_two_processes_train_as_with_pefts_layer(wrap, way):
    """FSDP2 gives the layer plain parameters where it shards the base, and PEFT's own forward runs."""
    assert support.run_processes(2, train_with_both, wrap, way) == ["", ""]


def test_axolotls_plugin_patches_and_turns_fused_kernels_off(monkeypatch):
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = type("BasePlugin", (), {})
    plugin = qdora.peft.AxolotlPlugin()
    config = {"lora_qkv_kernel": True}
    plugin.register(config)
    assert config == {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
    unpatch()
    plugin.pre_model_load({})
    assert peft_bnb.Linear4bit.forward is qdora.peft.Linear4bit.forward
    assert type(plugin).__mro__[1].__name__ == "BasePlugin"


def test_magnitudes_start_at_the_float32_norm_and_those_of_models_made_before_are_widened():
    layer = layer_of(get_peft_model(base_model(torch.bfloat16), lora_config(), autocast_adapter_dtype=False))
    base, state = layer.base_layer.weight, copy.copy(layer.base_layer.weight.quant_state)
    state.dtype = torch.float32
    norm = bnb.functional.dequantize_4bit(base.data, state).double().norm(dim=1)
    assert error(layer.lora_magnitude_vector["default"].weight, norm) < 1e-6
    unpatch()
    model = moved(get_peft_model(base_model(torch.bfloat16), lora_config())).to(torch.bfloat16)
    magnitude = layer_of(model).lora_magnitude_vector["default"]
    assert type(magnitude) is DoraLinearLayer
    assert magnitude.weight.dtype == torch.bfloat16
    qdora.peft.patch()
    loss(model).backward()
    assert magnitude.weight.dtype == magnitude.weight.grad.dtype == torch.float32
    assert magnitude.weight.grad.isfinite().all()


# --- runs that go on from an adapter that PEFT trained and wrote

TEXT = torch.arange(5, 45).reshape(2, 20)


def dense_model(root: Path) -> Any:
    """The model of the recipe, its linear layers the dequantised NF4 weights that qdora trains on."""
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = dequantize(quantize(module.weight.data, "nf4", 64, True), torch.float32)
    return model


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=TEXT).logits
    return found


def test_a_run_goes_on_where_peft_stopped(root, tmp_path):
    """Its first step moves nothing that float32 could hold: the run is PEFT's model. And PEFT loads what it leaves."""
    support.tiny_recipe(root)
    options = {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"model.layers.1.mlp.down_proj": 3}}
    theirs = moved(get_peft_model(dense_model(root), lora_config(**options)))
    theirs.save_pretrained(tmp_path / "peft")
    changes: dict[str, Any] = {"adapter__rank": ..., "adapter__alpha": ..., "adapter__dtype": "float32"}
    changes |= {"adapter__resume_from": str(tmp_path / "peft"), "train__checkpoint_every": ...}
    changes |= support.UNEVALUATED
    for name, steps, lr in (("still", 1, 1e-12), ("on", 3, 0.01)):
        train_run(support.tiny_recipe(root, **changes, train__steps=steps, train__lr=lr), tmp_path / name)
        ours = logits(load_run(tmp_path / name).model)
        again = PeftModel.from_pretrained(dense_model(root), str(tmp_path / name / "adapter"))
        torch.testing.assert_close(logits(again), ours, rtol=1e-4, atol=1e-4)
        assert torch.allclose(logits(theirs), ours, rtol=1e-4, atol=1e-4) == (name == "still")
    found = json.loads((tmp_path / "on/adapter/adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"], found["use_dora"]) == (4, 8, True)
    with pytest.raises(UserError, match=r"adapter\.kind: must be dora, as in"):
        train_run(support.tiny_recipe(root, **changes | {"adapter__kind": "lora"}), tmp_path / "run")
