"""Adapters on disk: our own round trip, PEFT reading ours, ours reading PEFT's, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qdora.errors import UserError
from qdora.files.tensor_file import TensorSpec, write_safetensors
from qdora.model.adapter_file import describe_adapter, load_adapter, save_adapter
from qdora.model.inject import adapted_layers
from tests import support

QUANT = {"quant": "nf4", "block_size": 64, "double_quant": True}
CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "qdora.json"
START = "base_model.model.model.layers."


def save(model: Any, directory: Path, **options: Any) -> Path:
    save_adapter(
        model, directory, **({"base_name_or_path": "org/base", "revision": None, "base_quant": QUANT} | options)
    )
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    return value


def change_config(directory: Path, **changes: Any) -> None:
    (directory / CONFIG).write_text(json.dumps(config_of(directory) | changes))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "dora"), ("qwen2", "lora"), ("gemma2", "dora")])
def test_saved_and_loaded_is_the_same_adapter(tmp_path, architecture, kind):
    ranks = {"model.layers.1.*.q_proj": 5, "v_proj": 2}
    model = support.adapted_model(architecture, quant="nf4", kind=kind, rank_pattern=ranks, alpha=8.0)
    save(model, tmp_path / "adapter")
    again = support.base_model(architecture, quant="nf4")
    before = torch.get_rng_state()
    loaded, original = load_adapter(again, tmp_path / "adapter"), adapted_layers(model)
    assert torch.equal(before, torch.get_rng_state())
    assert list(loaded) == list(original)
    assert len(loaded) == 14
    assert loaded["model.layers.1.self_attn.q_proj"].rank == 5
    for path, layer in loaded.items():
        assert (layer.rank, layer.scaling, layer.kind) == (original[path].rank, original[path].scaling, kind)
        theirs = dict(original[path].named_parameters())
        for name, parameter in layer.named_parameters():
            assert parameter.dtype == (torch.float32 if name == "magnitude" else torch.bfloat16)
            assert torch.equal(parameter, theirs[name])
    assert torch.equal(support.logits_of(again), support.logits_of(model))
    trainable = {name.rpartition(".")[2] for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == ({"lora_A", "lora_B", "magnitude"} if kind == "dora" else {"lora_A", "lora_B"})
    # PEFT writes alpha as an integer where it can; a resumed run must not write it in another way than a fresh one.
    save(again, tmp_path / "again")
    save(again, tmp_path / "again")  # replaces the first
    assert contents(tmp_path / "again") == contents(tmp_path / "adapter")
    assert sorted(contents(tmp_path / "again")) == [CONFIG, WEIGHTS, RECORD]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "again"]


def test_names_dtypes_and_settings_of_the_file(tmp_path):
    model = support.adapted_model("qwen2", targets=["q_proj", "down_proj"], alpha=6.0, dropout=0.05)
    save(model, tmp_path / "adapter", revision="0" * 40, extra={"step": 7})
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if ".layers.1." in name}
    assert found == {
        f"{START}1.self_attn.q_proj.lora_A.weight": ((3, 32), torch.bfloat16),
        f"{START}1.self_attn.q_proj.lora_B.weight": ((32, 3), torch.bfloat16),
        f"{START}1.self_attn.q_proj.lora_magnitude_vector": ((32,), torch.float32),
        f"{START}1.mlp.down_proj.lora_A.weight": ((3, 48), torch.bfloat16),
        f"{START}1.mlp.down_proj.lora_B.weight": ((32, 3), torch.bfloat16),
        f"{START}1.mlp.down_proj.lora_magnitude_vector": ((32,), torch.float32),
    }
    assert len(tensors) == 12
    config = config_of(tmp_path / "adapter")
    expected = {"target_modules": ["down_proj", "q_proj"], "r": 3, "lora_alpha": 6, "lora_dropout": 0.05}
    expected |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "use_dora": True, "use_rslora": False}
    expected |= {"base_model_name_or_path": "org/base", "revision": "0" * 40}
    assert config | expected == config
    record = json.loads((tmp_path / "adapter" / RECORD).read_text())
    assert record["layers"]["model.layers.0.self_attn.q_proj"] == {"rank": 3, "alpha": 6.0, "scaling": 2.0}
    assert record["base"]["quant"] == QUANT
    assert describe_adapter(tmp_path / "adapter").extra == {"step": 7}


def test_a_target_that_a_short_name_would_widen_is_a_path_and_the_dtype_can_be_chosen(tmp_path):
    path = "model.layers.1.self_attn.q_proj"
    save(support.adapted_model(targets=[path], dtype=torch.bfloat16), tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["target_modules"] == [path]
    loaded = load_adapter(support.base_model(dtype=torch.bfloat16), tmp_path / "adapter", dtype=torch.float32)
    assert list(loaded) == [path]
    assert {parameter.dtype for parameter in loaded[path].parameters()} == {torch.float32}


def test_what_cannot_be_saved_leaves_what_is_there(tmp_path):
    model = support.adapted_model()
    directory = save(model, tmp_path / "adapter")
    before = contents(directory)
    with pytest.raises(UserError, match="is not empty and holds no adapter"):
        save(model, tmp_path)
    assert contents(directory) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("architecture", "kind", "rank_stabilized"),
    [("llama", "dora", False), ("qwen2", "lora", True), ("qwen2", "dora", True), ("gemma2", "lora", False)],
)
def test_peft_computes_our_logits(tmp_path, architecture, kind, rank_stabilized):
    ranks = {"v_proj": 2, "model.layers.0.mlp.*": 5, "model.layers.1.self_attn.q_proj": 1}
    model = support.adapted_model(architecture, kind=kind, rank_stabilized=rank_stabilized, rank_pattern=ranks)
    save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(support.base_model(architecture), str(tmp_path / "adapter")).eval()
    ours = support.logits_of(model)
    bare = support.logits_of(support.base_model(architecture))
    assert (ours - bare).abs().max() > 0.05  # the adapter does something
    torch.testing.assert_close(support.logits_of(theirs), ours, rtol=1e-5, atol=2e-5)


PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "regex": {"target_modules": r".*\.layers\.[01]\.(self_attn\.[qv]_proj|mlp\.up_proj)", "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"],
        # the first matching key wins; keys are regular expressions and may match the end of the path
        "rank_pattern": {r"layers\.1\..*_proj": 6, "q_proj": 3},
        "alpha_pattern": {"self_attn.q": 99, "^model.layers.0.self_attn.q_proj": 7, "down_proj": 1.5},
    },
    "one layer": {
        "target_modules": ["q_proj", "gate_proj", "model.layers.0.self_attn.v_proj"],  # a whole path is of any layer
        "exclude_modules": ["mlp.gate_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "head": {"target_modules": ["lm_head", "o_proj"]},
}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("case", PEFT_SETTINGS)
def test_an_adapter_of_peft_gives_its_logits_here(tmp_path, case, use_dora):
    config = peft.LoraConfig(
        r=4, lora_alpha=10, task_type="CAUSAL_LM", use_dora=use_dora, lora_dropout=0.1, **PEFT_SETTINGS[case]
    )
    theirs = peft.get_peft_model(support.base_model("qwen2"), config)
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            scale = 0.05 * parameter.abs().mean() if "magnitude" in name else 0.1
            parameter.data += scale * torch.randn_like(parameter)
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    ours = support.base_model("qwen2")
    loaded = load_adapter(ours, tmp_path / "adapter")
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(loaded) == adapted
    assert all(layer.dropout == 0.1 for layer in loaded.values())
    torch.testing.assert_close(support.logits_of(ours), support.logits_of(theirs.eval()), rtol=1e-5, atol=2e-5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(support.adapted_model(), tmp_path / "adapter")


def test_settings_that_are_not_supported_are_named_all_at_once(directory):
    wrong = {"peft_type": "ADALORA", "init_lora_weights": "pissa_niter_4", "bias": "lora_only", "target_modules": None}
    wrong |= {"lora_bias": True, "layer_replication": [[0, 2]]}
    wrong |= {"future_1": {"on": True}, "future_2": 0.5}
    change_config(directory, **wrong)
    model = support.base_model()
    with pytest.raises(UserError) as raised:
        load_adapter(model, directory)
    named = [fault.partition("adapter_config.json: ")[2].partition(":")[0] for fault in raised.value.faults]
    assert sorted(named) == sorted(wrong)
    assert not adapted_layers(model)
    assert any(parameter.requires_grad for parameter in model.parameters())  # untouched


Damage = Callable[[Path], object]


def settings_of(**changes: Any) -> Damage:
    return lambda directory: change_config(directory, **changes)


def tensors_of(change: Callable[[dict[str, Tensor]], dict[str, Any]]) -> Damage:
    """Tensors that are changed to None are left out."""

    def damage(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        changed = tensors | change(tensors)
        save_file({name: each for name, each in changed.items() if each is not None}, directory / WEIGHTS)

    return damage


def text_of(file: str, content: bytes) -> Damage:
    return lambda directory: (directory / file).write_bytes(content)


WRONG: dict[str, Any] = {
    f"{START}0.self_attn.q_proj.lora_A.weight": None,
    f"{START}0.self_attn.k_proj.lora_B.weight": torch.zeros(3, 16),
    f"{START}0.self_attn.v_proj.lora_A.weight": torch.full((3, 32), float("nan")),
    f"{START}0.mlp.up_proj.lora_A.weight": torch.zeros(3, 32, dtype=torch.int32),
    "base_model.model.model.embed_tokens.weight": torch.zeros(320, 32),
    "base_model.model.../../../../etc/passwd.lora_A.weight": torch.zeros(1, 1),
}
WRONG_WORDS = [r"q_proj\.lora_A\.weight must hold finite numbers \[3, 32\], .*k_proj\.lora_B.*embed_tokens"]
NO_LINEAR = [r"must select linear layers \(got model\.embed_tokens"]
NO_MAGNITUDES = [r"magnitude_vector must hold .*and 9 more\."]
REFUSED: dict[str, tuple[Damage, list[str]]] = {
    "head": (settings_of(modules_to_save=["lm_head"]), ["unties the model's head"]),
    "no linear layers": (settings_of(target_modules=["embed_tokens", "q_proj"]), NO_LINEAR),
    "no layer": (settings_of(target_modules=["c_attn"]), ["must select linear layers"]),
    "rank": (settings_of(r=40), [r"\[40, 32\].*and 23 more"]),
    "no magnitudes": (tensors_of(lambda t: dict.fromkeys(n for n in t if n.endswith("vector"))), NO_MAGNITUDES),
    "magnitudes of LoRA": (settings_of(use_dora=False), ["has no place, .*and 9 more"]),
    "tensors": (tensors_of(lambda _: WRONG), WRONG_WORDS),
    "deep": (text_of(CONFIG, b"[" * 100_000), [r"adapter_config\.json: (cannot be read|must be a JSON object)"]),
    "weights": (text_of(WEIGHTS, b"\xff" * 64), ["cannot be used: "]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_and_leaves_the_model_alone(directory, case):
    damage, words = REFUSED[case]
    damage(directory)
    model = support.base_model()
    support.assert_refused(words, load_adapter, model, directory)
    assert not adapted_layers(model)


OFF: dict[str, Any] = {"future_1": None, "future_2": False, "future_3": [], "future_4": {}, "future_5": ""}
# A name of the file's choosing is not imported: PEFT would.
OFF |= {"auto_mapping": {"base_model_class": "Nothing", "parent_library": "no.such.module"}, "peft_version": "0.99"}
OFF |= {"modules_to_save": [], "init_lora_weights": "eva", "eva_config": {"rho": 2.0}}
PARTS = (*(f"self_attn.{part}_proj" for part in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PARAMETERS = [f"model.layers.{index}.{part}.weight" for index in (0, 1) for part in PARTS]


def renamed(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Magnitudes under the names of PEFT's modules."""
    of_modules = {f"{name}.weight": each for name, each in tensors.items() if name.endswith("vector")}
    return dict.fromkeys(name.removesuffix(".weight") for name in of_modules) | of_modules


@pytest.mark.parametrize(
    "change",
    [
        settings_of(**OFF),
        settings_of(target_modules="ALL-LINEAR", init_lora_weights=False),
        settings_of(target_modules=None, target_parameters=PARAMETERS),
        tensors_of(renamed),
    ],
)
def test_what_leaves_the_base_alone_is_tolerated(directory, change):
    change(directory)
    model = support.base_model()
    assert len(load_adapter(model, directory)) == 14
    assert torch.equal(support.logits_of(model), support.logits_of(support.adapted_model()))


def test_the_header_in_bytes(tmp_path):
    spec = TensorSpec("a", torch.bfloat16, (2,))
    write_safetensors(tmp_path / "f", [spec], [torch.tensor([1.0, -2.0], dtype=torch.bfloat16)])
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    padded = text + b" " * (88 - len(text))
    assert (tmp_path / "f").read_bytes() == (88).to_bytes(8, "little") + padded + b"\x80\x3f\x00\xc0"
