"""Adapters on disk: our own round trip, PEFT reading ours, ours reading PEFT's, and everything that is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qdora.errors import UserError
from qdora.files.tensor_file import TensorSpec, plan_shards, write_safetensors
from qdora.model.adapter_file import describe_adapter, load_adapter, save_adapter
from qdora.model.inject import adapted_layers
from tests import tiny_adapted

QUANT = {"quant": "nf4", "block_size": 64, "double_quant": True}
KINDS = ["lora", "dora"]


def save(model: Any, directory: Path, **options: Any) -> Path:
    save_adapter(
        model, directory, **({"base_name_or_path": "org/base", "revision": None, "base_quant": QUANT} | options)
    )
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return value


def change_config(directory: Path, **changes: Any) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(config_of(directory) | changes))


def change_tensors(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


# --- our own round trip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_saved_and_loaded_is_the_same_adapter(tmp_path: Path, architecture: str, kind: str) -> None:
    model = tiny_adapted.adapted(
        architecture, quant="nf4", kind=kind, rank_pattern={"model.layers.1.*.q_proj": 5, "v_proj": 2}
    )
    save(model, tmp_path / "adapter")
    again = tiny_adapted.base(architecture, quant="nf4")
    loaded = load_adapter(again, tmp_path / "adapter")
    original = adapted_layers(model)
    assert list(loaded) == list(original)
    assert len(loaded) == 14
    assert loaded["model.layers.1.self_attn.q_proj"].rank == 5
    for path, layer in loaded.items():
        assert layer.lora_A.dtype == torch.bfloat16
        assert torch.equal(layer.lora_A, original[path].lora_A)
        assert torch.equal(layer.lora_B, original[path].lora_B)
        assert (layer.rank, layer.scaling, layer.kind) == (original[path].rank, original[path].scaling, kind)
        if kind == "dora":
            assert torch.equal(layer.magnitude, original[path].magnitude)  # type: ignore[arg-type]
    assert torch.equal(tiny_adapted.logits(again), tiny_adapted.logits(model))
    trainable = {name.rpartition(".")[2] for name, p in again.named_parameters() if p.requires_grad}
    assert trainable == ({"lora_A", "lora_B", "magnitude"} if kind == "dora" else {"lora_A", "lora_B"})


def test_names_dtypes_and_settings_of_the_file(tmp_path: Path) -> None:
    model = tiny_adapted.adapted("qwen2", targets=["q_proj", "down_proj"], alpha=6.0, dropout=0.05)
    save(model, tmp_path / "adapter", revision="0" * 40, extra={"step": 7})
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    found = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items() if ".layers.1." in name}
    start = "base_model.model.model.layers.1."
    assert found == {
        f"{start}self_attn.q_proj.lora_A.weight": ((3, 32), torch.bfloat16),
        f"{start}self_attn.q_proj.lora_B.weight": ((32, 3), torch.bfloat16),
        f"{start}self_attn.q_proj.lora_magnitude_vector": ((32,), torch.float32),
        f"{start}mlp.down_proj.lora_A.weight": ((3, 48), torch.bfloat16),
        f"{start}mlp.down_proj.lora_B.weight": ((32, 3), torch.bfloat16),
        f"{start}mlp.down_proj.lora_magnitude_vector": ((32,), torch.float32),
    }
    assert len(tensors) == 12
    config = config_of(tmp_path / "adapter")
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6, 0.05)
    assert (config["peft_type"], config["task_type"], config["bias"]) == ("LORA", "CAUSAL_LM", "none")
    assert (config["use_dora"], config["use_rslora"]) == (True, False)
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "0" * 40)
    record = json.loads((tmp_path / "adapter" / "qdora.json").read_text())
    assert record["layers"]["model.layers.0.self_attn.q_proj"] == {"rank": 3, "alpha": 6.0, "scaling": 2.0}
    assert record["base"]["quant"] == QUANT
    assert describe_adapter(tmp_path / "adapter").extra == {"step": 7}


def test_targets_that_a_short_name_would_widen_are_written_as_paths(tmp_path: Path) -> None:
    model = tiny_adapted.adapted(targets=["model.layers.1.self_attn.q_proj"])
    save(model, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    assert list(load_adapter(tiny_adapted.base(), tmp_path / "adapter")) == ["model.layers.1.self_attn.q_proj"]


def test_equal_adapters_give_equal_bytes_and_replace_each_other(tmp_path: Path) -> None:
    model = tiny_adapted.adapted()
    first, second = save(model, tmp_path / "first"), save(model, tmp_path / "second")
    save(model, second)
    names = sorted(path.name for path in first.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "qdora.json"]
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_loaded_and_saved_again_gives_the_same_bytes(tmp_path: Path) -> None:
    """PEFT writes alpha as an integer where it can; a resumed run must not write it in another way than a fresh one."""
    save(tiny_adapted.adapted("llama", quant="nf4", alpha=8.0), tmp_path / "first")
    model = tiny_adapted.base("llama", quant="nf4")
    load_adapter(model, tmp_path / "first")
    save(model, tmp_path / "second")
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert len(first) == 3
    assert first == second


def test_a_failing_save_leaves_the_old_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_adapted.adapted()
    directory = save(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qdora.model.adapter_file.write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        save(model, directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_other_peoples_directories_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no adapter"):
        save(tiny_adapted.adapted(), tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_the_storage_dtype_can_be_chosen_on_loading(tmp_path: Path) -> None:
    save(tiny_adapted.adapted(dtype=torch.bfloat16), tmp_path / "adapter")
    loaded = load_adapter(tiny_adapted.base(dtype=torch.bfloat16), tmp_path / "adapter", dtype=torch.float32)
    layer = next(iter(loaded.values()))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert layer.magnitude is not None
    assert layer.magnitude.dtype == torch.float32


def test_loading_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    save(tiny_adapted.adapted(), tmp_path / "adapter")
    model = tiny_adapted.base()
    before = torch.get_rng_state()
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(before, torch.get_rng_state())


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    model = tiny_adapted.adapted()
    save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="already carries adapters"):
        load_adapter(model, tmp_path / "adapter")


# --- PEFT reads ours


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])
def test_peft_computes_our_logits(tmp_path: Path, architecture: str, kind: str, rank_stabilized: bool) -> None:
    model = tiny_adapted.adapted(
        architecture,
        kind=kind,
        rank_stabilized=rank_stabilized,
        rank_pattern={"v_proj": 2, "model.layers.0.mlp.*": 5, "model.layers.1.self_attn.q_proj": 1},
    )
    save(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny_adapted.base(architecture), str(tmp_path / "adapter")).eval()
    ours = tiny_adapted.logits(model)
    bare = tiny_adapted.logits(tiny_adapted.base(architecture))
    assert (ours - bare).abs().max() > 0.05  # the adapter does something
    torch.testing.assert_close(tiny_adapted.logits(theirs), ours, rtol=1e-5, atol=2e-5)


# --- we read PEFT's


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
def test_an_adapter_of_peft_gives_its_logits_here(tmp_path: Path, case: str, use_dora: bool) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=10, task_type="CAUSAL_LM", use_dora=use_dora, lora_dropout=0.1, **PEFT_SETTINGS[case]
    )
    theirs = peft.get_peft_model(tiny_adapted.base("qwen2"), config)
    torch.manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            scale = 0.05 * parameter.abs().mean() if "magnitude" in name else 0.1
            parameter.data += scale * torch.randn_like(parameter)
    theirs.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    ours = tiny_adapted.base("qwen2")
    loaded = load_adapter(ours, tmp_path / "adapter")
    adapted = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(loaded) == adapted
    assert all(layer.dropout == 0.1 for layer in loaded.values())
    torch.testing.assert_close(tiny_adapted.logits(ours), tiny_adapted.logits(theirs.eval()), rtol=1e-5, atol=2e-5)


# --- what is refused


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save(tiny_adapted.adapted(), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("peft_type", "ADALORA"),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa_niter_4"),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("ensure_weight_tying", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 1]),
        ("a_setting_of_the_future", {"on": True}),
        ("a_setting_of_the_future", 0),
        ("r", 0),
        ("r", "16"),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_dropout", 1.0),
        ("use_dora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj(": 4}),
        ("alpha_pattern", [1]),
        ("target_modules", None),
        ("target_modules", "(q_proj"),
        ("layers_to_transform", ["1"]),
    ],
)
def test_a_setting_that_is_not_supported_is_named(directory: Path, setting: str, value: Any) -> None:
    change_config(directory, **{setting: value})
    model = tiny_adapted.base()
    with pytest.raises(UserError, match=rf"adapter_config.json: {setting}: ") as raised:
        load_adapter(model, directory)
    assert len(raised.value.faults) == 1
    assert not adapted_layers(model)
    assert any(parameter.requires_grad for parameter in model.parameters())  # untouched


def test_settings_that_are_off_or_without_effect_are_tolerated(directory: Path) -> None:
    """A name of the file's choosing is not imported: PEFT's `auto_mapping` would be."""
    values: dict[str, Any] = {"future_1": None, "future_2": False, "future_3": [], "future_4": {}, "future_5": ""}
    mapping = {"base_model_class": "Nothing", "parent_library": "no.such.module"}
    change_config(directory, **values, modules_to_save=[], peft_version="0.99", auto_mapping=mapping)
    assert len(load_adapter(tiny_adapted.base(), directory)) == 14


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR"])
def test_all_linear_leaves_the_head_out(directory: Path, targets: str) -> None:
    change_config(directory, target_modules=targets)
    assert "lm_head" not in load_adapter(tiny_adapted.base(), directory)


@pytest.mark.parametrize("init", [False, "eva"])
def test_starts_that_leave_the_base_alone_are_accepted(directory: Path, init: Any) -> None:
    change_config(directory, init_lora_weights=init, eva_config={"rho": 2.0} if init == "eva" else None)
    assert len(load_adapter(tiny_adapted.base(), directory)) == 14


def test_no_modules_are_named_where_parameters_are(directory: Path) -> None:
    change_config(directory, target_modules=None)
    with pytest.raises(UserError, match=r"target_modules: must name layers\. Fix: write the names"):
        load_adapter(tiny_adapted.base(), directory)
    weights = [f"{path}.weight" for path in adapted_layers(tiny_adapted.adapted())]
    change_config(directory, target_modules=None, target_parameters=weights)
    assert len(load_adapter(tiny_adapted.base(), directory)) == 14


def test_every_fault_is_reported_at_once(directory: Path) -> None:
    change_config(directory, bias="all", lora_bias=True, lora_dropout=2)
    with pytest.raises(UserError) as raised:
        load_adapter(tiny_adapted.base(), directory)
    named = [fault.partition("adapter_config.json: ")[2].partition(":")[0] for fault in raised.value.faults]
    assert named == ["bias", "lora_bias", "lora_dropout"]


def test_a_pickle_is_not_read(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: missing\. A pickle can run code"):
        load_adapter(tiny_adapted.base(), directory)


def test_settings_that_exclude_each_other_are_named(directory: Path) -> None:
    change_config(directory, target_modules=".*q_proj", layers_to_transform=[0])
    with pytest.raises(UserError, match=r"adapter_config\.json: `layers_to_transform` cannot be used when"):
        load_adapter(tiny_adapted.base(), directory)


def test_a_dora_adapter_without_magnitudes_is_an_error(directory: Path) -> None:
    names = [n for n in load_file(directory / "adapter_model.safetensors") if n.endswith("magnitude_vector")]
    assert len(names) == 14
    change_tensors(directory, **dict.fromkeys(names))
    model = tiny_adapted.base()
    with pytest.raises(UserError, match=r"14 tensors missing: .*and 9 more") as raised:
        load_adapter(model, directory)
    assert "has use_dora: true, but the magnitudes of DoRA are missing" in str(raised.value)
    assert not adapted_layers(model)


def test_magnitudes_of_a_lora_adapter_are_unexpected(directory: Path) -> None:
    change_config(directory, use_dora=False)
    with pytest.raises(UserError, match="14 tensors unexpected"):
        load_adapter(tiny_adapted.base(), directory)


def test_wrong_tensors_are_all_named(directory: Path) -> None:
    start = "base_model.model.model.layers.0."
    change_tensors(
        directory,
        **{
            f"{start}self_attn.q_proj.lora_A.weight": None,
            f"{start}self_attn.k_proj.lora_B.weight": torch.zeros(3, 16),
            f"{start}self_attn.v_proj.lora_A.weight": torch.full((3, 32), float("nan")),
            f"{start}mlp.up_proj.lora_A.weight": torch.zeros(3, 32, dtype=torch.int32),
            "base_model.model.model.embed_tokens.weight": torch.zeros(320, 32),
            "base_model.model.../../../../etc/passwd.lora_A.weight": torch.zeros(1, 1),
        },
    )
    with pytest.raises(UserError) as raised:
        load_adapter(tiny_adapted.base(), directory)
    faults = raised.value.faults
    assert len(faults) == 5
    assert any("1 tensor missing" in f and "q_proj.lora_A" in f for f in faults)
    assert any("2 tensors unexpected" in f and "embed_tokens" in f and "passwd" in f for f in faults)
    assert any("wrong shape" in f and "k_proj.lora_B.weight [3, 16] instead of [16, 3]" in f for f in faults)
    assert any("float dtype" in f and "up_proj" in f for f in faults)
    assert any("NaN" in f and "v_proj" in f for f in faults)


def test_magnitudes_may_carry_the_name_of_peft_s_modules(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    renamed = {f"{n}.weight" if n.endswith("vector") else n: t for n, t in load_file(path).items()}
    save_file(renamed, path)
    model = tiny_adapted.base()
    load_adapter(model, directory)
    assert torch.equal(tiny_adapted.logits(model), tiny_adapted.logits(tiny_adapted.adapted()))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"target_modules": ["embed_tokens", "q_proj"]},
            r"must select linear layers \(got model.embed_tokens",
        ),
        ({"target_modules": ["c_attn"]}, "matches no linear layer"),
        ({"r": 40}, r"too large for .*q_proj \(rank 40, at most 32\)"),
        ({"lora_alpha": 7}, "qdora.json: layers: scaling differs"),
    ],
)
def test_settings_that_do_not_fit_the_model(directory: Path, changes: dict[str, Any], match: str) -> None:
    change_config(directory, **changes)
    with pytest.raises(UserError, match=match):
        load_adapter(tiny_adapted.base(), directory)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", "[" * 100_000])
def test_broken_files_are_named(directory: Path, content: str) -> None:
    (directory / "adapter_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"adapter_config.json: (cannot be read as JSON|must be a JSON object \(got a list\))"
    ):
        load_adapter(tiny_adapted.base(), directory)


def test_broken_weights_and_foreign_versions_are_named(directory: Path, tmp_path: Path) -> None:
    (directory / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_adapter(tiny_adapted.base(), directory)
    (directory / "qdora.json").write_text('{"format": 2}')
    with pytest.raises(UserError, match=r"format: must be 1 \(got 2\)"):
        load_adapter(tiny_adapted.base(), directory)
    with pytest.raises(UserError, match="no such directory"):
        load_adapter(tiny_adapted.base(), tmp_path / "nowhere")


def test_a_run_in_place_of_its_adapter_is_told(directory: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    directory.rename(run / "adapter")
    with pytest.raises(UserError) as error:
        load_adapter(tiny_adapted.base(), run)
    assert error.value.faults == (
        f"adapter.resume_from: {run} is not an adapter but holds one. Fix: name {run / 'adapter'}.",
    )


def test_layers_that_one_file_cannot_hold(tmp_path: Path) -> None:
    model = tiny_adapted.adapted()
    next(iter(adapted_layers(model).values())).dropout = 0.5
    with pytest.raises(ValueError, match="differ in dropout"):
        save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="no adapters to save"):
        save(tiny_adapted.base(), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


# --- the file format

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=6),
    limit=st.integers(1, 400),
)
def test_what_is_written_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Any], limit: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{i}.ü": torch.randint(0, 2, shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(parts)
    }
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    shards = plan_shards(specs, limit)
    folder = tmp_path_factory.mktemp("shards")
    seen = []
    for file, group in shards.items():
        size = write_safetensors(folder / file, group, (tensors[spec.name] for spec in group))
        assert size == (folder / file).stat().st_size
        assert sum(spec.num_bytes for spec in group) <= limit or len(group) == 1
        with safe_open(folder / file, framework="pt") as stored:
            assert stored.metadata() == {"format": "pt"}
            for name in stored.keys():  # noqa: SIM118
                seen.append(name)
                found = stored.get_tensor(name)
                assert found.dtype == tensors[name].dtype
                assert torch.equal(found, tensors[name])
    assert sorted(seen) == sorted(tensors)


def test_the_header_in_bytes(tmp_path: Path) -> None:
    spec = TensorSpec("a", torch.bfloat16, (2,))
    write_safetensors(tmp_path / "f", [spec], [torch.tensor([1.0, -2.0], dtype=torch.bfloat16)])
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    padded = text + b" " * (88 - len(text))
    assert (tmp_path / "f").read_bytes() == (88).to_bytes(8, "little") + padded + b"\x80\x3f\x00\xc0"


@pytest.mark.parametrize(
    ("specs", "tensors", "match"),
    [
        ([("a", (2,))], [], "no tensor for 'a'"),
        ([("a", (2,))], [torch.zeros(2), torch.zeros(2)], "more tensors than the 1"),
        ([("a", (2,))], [torch.zeros(3)], "announced as torch.float32"),
        ([("a", (2,)), ("a", (2,))], [], "occurs twice"),
    ],
)
def test_a_tensor_that_was_not_announced(tmp_path: Path, specs: Any, tensors: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        write_safetensors(tmp_path / "f", [TensorSpec(n, torch.float32, s) for n, s in specs], tensors)


def test_a_tensor_that_would_be_unaligned(tmp_path: Path) -> None:
    specs = [TensorSpec("a", torch.uint8, (3,)), TensorSpec("b", torch.float32, (1,))]
    with pytest.raises(ValueError, match="'b' would start at byte 3"):
        write_safetensors(tmp_path / "f", specs, [])
