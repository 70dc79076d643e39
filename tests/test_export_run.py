"""qdora export of a whole run, in every format."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, LlamaConfig

from qdora.errors import RunFailure, UserError
from qdora.export import checkpoint_writer
from qdora.export import export_run as export_module
from qdora.export.export_run import check_servable, export_run
from qdora.export.options import ExportOptions, check_options
from qdora.files.work_lock import work_lock
from qdora.model.inject import adapted_layers
from qdora.run.load_run import load_target
from qdora.run.train import train_run
from tests import tiny_adapted, tiny_run, tiny_tokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of DoRA on a model whose rows are whole blocks of 64."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(0)
    sizes = tiny_adapted.SIZES | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 400}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(root / "model")
    tiny_tokenizer.make().save_pretrained(root / "model")
    train_run(tiny_run.recipe(root, train__steps=3, train__lr=0.02), root / "run")
    return root / "run"


def test_nf4_lora(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    exported = export_run(run, out, ExportOptions(format_="nf4-lora"))
    check = exported["verification"]
    assert check["passed"], check["faults"]
    assert check["exported_vs_reference"]["max_logit_difference"] < 1e-5
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(exported))
    assert exported["directory"] == "out"
    assert exported["dtype"] == "float32"
    assert exported["scale_error_if_double_quantised"]["mean"] > 1e-4
    card = (out / "README.md").read_text()
    assert "PeftModel.from_pretrained" in card
    assert "Against the adapter in float32: largest logit difference" in card
    assert json.loads((out / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] is None
    nothing_local(out, tmp_path, run)


def nothing_local(directory: Path, *places: Path) -> None:
    """No text file of an export tells where it was made."""
    texts = [path for path in directory.rglob("*") if path.suffix in (".json", ".md", ".jinja")]
    assert len(texts) > 1
    for path in texts:
        for place in (*places, *(place.parent for place in places)):
            assert str(place) not in path.read_text(), path


def test_a_moved_nf4_lora_directory_is_the_same_model(run: Path, tmp_path: Path) -> None:
    export_run(run, tmp_path / "out", ExportOptions(format_="nf4-lora"))
    before = with_adapter(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere/model")
    after = with_adapter(tmp_path / "elsewhere/model")
    assert torch.equal(before, after)
    target = load_target(str(tmp_path / "elsewhere/model"), verb="eval")
    assert adapted_layers(target.model)


def with_adapter(directory: Path) -> Tensor:
    """Logits of base and adapter as the card says to load them."""
    base = AutoModelForCausalLM.from_pretrained(directory)
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    model = peft.PeftModel.from_pretrained(base, str(directory / "adapter")).eval()
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.arange(5, 25).unsqueeze(0)).logits
    return logits


def test_an_export_that_is_pushed_names_itself_as_the_base(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "push", lambda directory, name, private: f"https://hub/{name}")
    options = ExportOptions(format_="nf4-lora", push="me/mine")
    assert export_run(run, tmp_path / "out", options)["pushed"] == "https://hub/me/mine"
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/mine"


def test_the_adapter_alone(run: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out", ExportOptions(format_="peft", audit=True))
    assert exported["audit"]["forms"]["merged"]["logits"]["kl_mean"] < 1e-5
    assert json.loads((tmp_path / "out/export.json").read_text()) == json.loads(json.dumps(exported))
    assert "\nlibrary_name: peft\n" in (tmp_path / "out/README.md").read_text()
    nothing_local(tmp_path / "out", tmp_path, run)


@pytest.mark.parametrize("setting", ["data__chat_template", "model__tokenizer", None])
def test_an_adapter_has_the_tokenizer_if_it_is_not_that_of_the_base(tmp_path: Path, setting: str | None) -> None:
    template = tiny_tokenizer.CHATML + "{# own #}"
    (tmp_path / "own.jinja").write_text(template)
    tiny_tokenizer.make(chat_template=template).save_pretrained(tmp_path / "own")
    chat = {"messages": [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 8)
    values = {"data__chat_template": str(tmp_path / "own.jinja"), "model__tokenizer": str(tmp_path / "own")}
    changes: dict[str, Any] = {"data__mix": [{"source": str(tmp_path / "chats.jsonl"), "format": "messages"}]}
    changes |= {"train__steps": 1, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    if setting is not None:
        changes[setting] = values[setting]
    train_run(tiny_run.recipe(tmp_path, **changes), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", ExportOptions(format_="peft"))
    if setting is None:
        assert not list((tmp_path / "out").glob("tokenizer*"))
    else:
        assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == template


def test_the_licence_of_the_base_goes_with_the_model(run: Path, tmp_path: Path) -> None:
    model = run.parent / "model"
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    (model / "LICENSE").write_text("Permission is hereby granted")
    try:
        export_run(run, tmp_path / "out", ExportOptions())
    finally:
        (model / "README.md").unlink()
        (model / "LICENSE").unlink()
    assert (tmp_path / "out/LICENSE").read_text() == "Permission is hereby granted"
    card = (tmp_path / "out/README.md").read_text()
    assert "\nlicense: mit\n" in card
    assert "Its texts are beside this card: `LICENSE`." in card
    assert "Fine-tuned from `model` with" in card
    assert "| steps | 3 of 3 |" in card
    assert re.search(r"^- sums \(\d draws of 28 examples in all steps\)$", card, re.MULTILINE)
    nothing_local(tmp_path / "out", tmp_path, run)


def test_options_without_effect_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype: has no effect on --format peft"):
        export_run(run, tmp_path / "out", ExportOptions(format_="peft", dtype="float16"))
    with pytest.raises(
        UserError, match=r"got 'nf4lora', must be one of merged, peft, nf4-lora, gguf\. Did you mean 'nf4-lora'\?"
    ):
        export_run(run, tmp_path / "out", ExportOptions(format_="nf4lora"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (ExportOptions(dtype="bfloat16", shard_size="30KB"), "merged into one dense weight per layer"),
        (ExportOptions(dtype="float32", base="original"), "merged into the original weights"),
        (ExportOptions(requantize=True), "quantised to 4 bits again"),
    ],
)
def test_the_merges(run: Path, tmp_path: Path, options: ExportOptions, words: str) -> None:
    out = tmp_path / "out"
    exported = export_run(run, out, options)
    check = exported["verification"]
    assert check["passed"], check["faults"]
    assert words in (out / "README.md").read_text()
    assert (len(exported["files"]) > 3) == (options.shard_size is not None)
    assert (exported["base"], exported["requantized"]) == (options.base or "dequantized", options.requantize)
    difference = check["exported_vs_reference"]["mean_logit_difference"]
    if options.requantize:
        assert difference > 1e-3
        assert "quantization_config" in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("dtype, written", [(None, "bfloat16"), ("float16", "float16")])
def test_a_model_that_overflows_in_float16_is_merged_in_bfloat16(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: str | None, written: str
) -> None:
    sizes = tiny_adapted.SIZES | {"hidden_size": 64, "vocab_size": 400, "head_dim": 16, "num_hidden_layers": 1}
    AutoModelForCausalLM.from_config(Gemma2Config(**sizes)).save_pretrained(tmp_path / "model")
    tiny_tokenizer.make().save_pretrained(tmp_path / "model")
    changes: dict[str, Any] = {"train__steps": 1, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
    train_run(tiny_run.recipe(tmp_path, **changes), tmp_path / "run")
    shown = io.StringIO()
    exported = export_run(
        tmp_path / "run", tmp_path / "out", ExportOptions(dtype=dtype), console=Console(file=shown, width=200)
    )
    assert exported["dtype"] == written
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == written
    said = "the export is in bfloat16: activations of gemma2 models can overflow in float16"
    assert (said in shown.getvalue()) == (dtype is None)
    warned = "--dtype float16: activations of gemma2 models can overflow in it, and vLLM refuses it"
    assert (warned in caplog.text) == (dtype == "float16")


def test_an_export_that_does_not_fit_beside_the_model_says_that_logits_were_not_compared(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdora.export.verify.get_max_memory", lambda: {"cpu": 70_000})
    shown = io.StringIO()
    exported = export_run(run, tmp_path / "out", ExportOptions(requantize=True), console=Console(file=shown, width=200))
    assert exported["verification"]["passed"]
    assert "passed without a comparison of logits" in shown.getvalue()
    assert "passed without a comparison of logits" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    "options, broken",
    [
        (ExportOptions(requantize=True), "verify_requantized"),
        (ExportOptions(format_="nf4-lora"), "verify_nf4_lora"),
        (ExportOptions(format_="peft", audit=True), "_audit"),
    ],
    ids=["requantized", "nf4-lora", "peft"],
)
def test_a_check_that_crashes_leaves_the_finished_files(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    options: ExportOptions,
    broken: str,
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")

    monkeypatch.setattr(export_module, broken, crash)
    with pytest.raises(torch.OutOfMemoryError):
        export_run(run, tmp_path / "out", options)
    assert (
        f"{tmp_path / 'out'}: the weights are complete and kept, but the export stopped before its check" in caplog.text
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").glob("*.safetensors"))
    assert not (tmp_path / "out/export.json").exists()


def test_an_export_whose_last_file_finds_a_full_disk_can_be_repeated(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "atomic_write_json", full)
        with pytest.raises(RunFailure, match=r"out: cannot be written: the disk is full\."):
            export_run(run, tmp_path / "out", ExportOptions(format_="peft"))
    assert list(tmp_path.iterdir()) == []
    export_run(run, tmp_path / "out", ExportOptions(format_="peft"))
    assert (tmp_path / "out/export.json").is_file()


@pytest.mark.parametrize("name", ["file/out", "n" * 250, "n" * 300, "/proc/x/y"])
def test_a_place_where_nothing_can_be_made(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"{name}: .* Fix: name another directory"):
        export_run(run, tmp_path / name)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("out", [".", "{here}", "../here"])
def test_the_working_directory_is_refused_before_the_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    """It would be replaced under the feet of whoever stands in it."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with pytest.raises(UserError, match=r"is the working directory\. Fix: name a directory inside it"):
        export_run(run, Path(out.format(here=here)), ExportOptions(format_="peft"))
    assert not list(here.iterdir())


def test_a_mount_point_is_refused_before_the_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be renamed over, not even if it is empty."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(UserError, match=r"disk: is a mount point\. Fix: name a directory inside it"):
        export_run(run, tmp_path / "disk", ExportOptions(format_="peft"))
    assert not list((tmp_path / "disk").iterdir())
    export_run(run, tmp_path / "disk/out", ExportOptions(format_="peft"))


@pytest.mark.parametrize("format_", ["merged", "nf4-lora", "peft"])
def test_an_export_that_is_stopped_before_its_end_can_be_made_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    """A directory of that name holds a checked model or does not exist."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out, options = tmp_path / "out", ExportOptions(format_=format_)
    monkeypatch.setattr(export_module, "run_card", stop)  # after the weights and their check
    with pytest.raises(KeyboardInterrupt):
        export_run(run, out, options)
    assert not out.exists()
    monkeypatch.undo()
    exported = export_run(run, out, options)
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(exported))
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_named_and_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(checkpoint_writer, "write_safetensors", full)
    with pytest.raises(RunFailure, match=r"out: cannot be written: the disk is full\. Nothing is left there\."):
        export_run(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_second_export_to_one_directory_is_refused(run: Path, tmp_path: Path) -> None:
    with (
        work_lock(tmp_path / ".out.lock", "first"),
        pytest.raises(UserError, match="out: another process works on it"),
    ):
        export_run(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text, size", [("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("2TB", 2 * 10**12)])
def test_shard_sizes(text: str, size: int) -> None:
    assert ExportOptions(shard_size=text).shard_bytes == size


@pytest.mark.parametrize("text", ["", "2", "5000", "GB", "-1GB", "0GB", "2 shards"])
def test_what_is_no_shard_size(text: str) -> None:
    with pytest.raises(
        UserError, match=r"--shard-size: (must be a size such as 40GiB .*, got|must be at least 1KB and have a unit)"
    ):
        check_options(ExportOptions(shard_size=text))


def test_bases_and_requantisation_are_of_the_merge_alone(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        export_run(run, tmp_path / "out", ExportOptions(format_="nf4-lora", base="original", requantize=True))
    assert raised.value.faults[:2] == (
        "--base: has no effect on --format nf4-lora. Fix: remove --base.",
        "--requantize: has no effect on --format nf4-lora. Fix: remove --requantize.",
    )
    with pytest.raises(
        UserError, match=r"--base: got 'orignal', must be one of dequantized, original\. Did you mean 'orig"
    ):
        export_run(run, tmp_path / "out", ExportOptions(base="orignal"))


def test_zero_rows_are_refused_for_peft_which_would_compute_nan() -> None:
    model = tiny_adapted.adapted()
    check_servable(model)
    layer = adapted_layers(model)["model.layers.1.mlp.up_proj"]
    layer.base.stored_weight[3] = 0.0  # type: ignore[index]
    with torch.no_grad():
        layer.lora_B[3] = 0.0
    layer.base_squared[3] = 0.0  # type: ignore[index]
    with pytest.raises(UserError, match=r"up_proj: 1 of 48 rows .* Fix: use --format merged or --format nf4-lora"):
        check_servable(model)


def test_a_tokenizer_keeps_what_llama_cpp_needs(tmp_path: Path) -> None:
    tiny_tokenizer.make().save_pretrained(tmp_path / "source")
    (tmp_path / "source/tokenizer.model").write_bytes(b"pieces")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.add_tokens(["<new>"])
    checkpoint_writer.save_tokenizer(tokenizer, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "out/added_tokens.json").read_text())["<new>"] == len(tokenizer) - 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a <new>").input_ids == tokenizer("a <new>").input_ids
