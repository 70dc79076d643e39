"""qdora export of a whole run in every format, its upload, and what is left where it stops."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from huggingface_hub.errors import HTTPError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from qdora.errors import RunFailure, UserError
from qdora.export import export as export_module
from qdora.export import write
from qdora.export.export import check_servable, export_run, push
from qdora.files.atomic import work_lock
from qdora.model.adapter_file import load_adapter
from qdora.model.inject import adapted_layers
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.recipe.options import ExportOptions
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from tests import support

IDS = torch.tensor([[1, 17, 30, 5, 44, 26, 9, 120, 3, 3, 77]])
PEFT, NF4 = ExportOptions(format="peft"), ExportOptions(format="nf4-lora")
ADAPTER_CONFIG = "adapter/adapter_config.json"
ONE_STEP: dict[str, Any] = {"train__steps": 1, "train__checkpoint_every": ..., "eval__limit": ...}
ONE_STEP |= {"eval__at_start": False, "eval__at_end": False}


class FakeHub:
    """Repositories by name, with their visibility and files."""

    def __init__(self, patch: pytest.MonkeyPatch, **private: bool) -> None:
        self.private = private
        self.files: dict[str, list[str]] = {}
        for name in ("create_repo", "repo_info", "upload_folder"):
            patch.setattr(export_module, name, getattr(self, name))

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        self.private.setdefault(name, private)
        return SimpleNamespace(repo_id=f"me/{name}")

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private[name.removeprefix("me/")])

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        assert commit_message
        self.files[repo_id] = sorted(path.name for path in folder_path.iterdir())
        return f"https://hub/{repo_id}/commit/1"


def nothing_local(directory: Path, *places: Path) -> None:
    """No text file of an export tells where it was made."""
    texts = [path for path in directory.rglob("*") if path.suffix in (".json", ".md", ".jinja")]
    assert len(texts) > 1
    for place in (*places, *(place.parent for place in places)):
        assert not [path for path in texts if str(place) in path.read_text()]


def with_adapter(directory: Path) -> Tensor:
    """Logits of base and adapter as the card says to load them."""
    base = AutoModelForCausalLM.from_pretrained(directory)
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return support.logits_of(peft.PeftModel.from_pretrained(base, str(directory / "adapter")).eval(), IDS)


def test_nf4_lora_is_moved_and_uploaded(dora_run, tmp_path, monkeypatch):
    out, hub = tmp_path / "out", FakeHub(monkeypatch)
    exported = export_run(dora_run, out, ExportOptions(format="nf4-lora", push="mine"))
    assert exported.pop("pushed") == "https://hub/me/mine/commit/1"
    assert hub.private == {"mine": True}
    assert hub.files == {"me/mine": sorted(path.name for path in out.iterdir())}
    assert exported["verification"]["exported_vs_reference"]["max_logit_difference"] < 1e-5
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(exported))
    assert (exported["directory"], exported["dtype"]) == ("out", "float32")
    assert "Against the adapter in float32: largest logit difference" in (out / "README.md").read_text()
    assert json.loads((out / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] is None
    before, moved = with_adapter(out), tmp_path / "elsewhere/model"
    moved.parent.mkdir()
    out.rename(moved)
    assert torch.equal(before, with_adapter(moved))
    # With the name of its owner the adapter's file can name its base.
    export_run(dora_run, out, ExportOptions(format="nf4-lora", push="me/mine", public=True))
    assert json.loads((out / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == "me/mine"
    assert hub.private["me/mine"] is False


def test_an_adapter_has_the_tokenizer_if_it_is_not_that_of_the_base(tmp_path):
    support.tokenizer(chat_template="own").save_pretrained(tmp_path / "own")
    train_run(support.tiny_recipe(tmp_path, **ONE_STEP, model__tokenizer=str(tmp_path / "own")), tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", PEFT)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "own"


@pytest.mark.parametrize(
    "form, options, words",
    [
        ("merged", ExportOptions(dtype="float16", shard_size="30KB"), "merged into one dense weight per layer"),
        ("original", ExportOptions(dtype="float16", base="original"), "merged into the original weights"),
        ("requantized", ExportOptions(dtype="float32", requantize=True), "quantised to 4 bits again"),
        ("nf4-lora", NF4, "PeftModel.from_pretrained"),
    ],
)
def test_each_form_with_its_card_is_the_model_that_was_trained(dora_run, tmp_path, form, options, words):
    out, beside = tmp_path / "out", {"README.md": "---\nlicense: mit\n---\n", "LICENSE": "Permission is granted"}
    for name, text in beside.items():
        (dora_run.parent / "model" / name).write_text(text)
    try:
        exported = export_run(dora_run, out, options)
    finally:
        for name in beside:
            (dora_run.parent / "model" / name).unlink()
    check, card = exported["verification"], (out / "README.md").read_text()
    assert check["passed"], check["faults"]
    assert (len(exported["files"]) > 3) == (options.has("shard_size"))
    if form != "nf4-lora":
        assert (exported["base"], exported["requantized"]) == (options.base or "dequantized", options.requantize)
    if options.requantize:
        assert check["exported_vs_reference"]["mean_logit_difference"] > 1e-3
    assert (out / "LICENSE").read_text() == "Permission is granted"
    said = (words, "\nlicense: mit\n", "Its texts are beside this card: `LICENSE`.", "Fine-tuned from `model` with")
    assert all(each in card for each in (*said, "| steps | 3 of 3 |"))
    assert re.search(r"^- sums$", card, re.MULTILINE)
    nothing_local(out, tmp_path, dora_run)
    is_dense = form in ("merged", "original")
    how: Any = {"quant": "none"} if is_dense else {"quant": "nf4", "double_quant": form != "nf4-lora"}
    reloaded = load_model(resolve(str(out)), compute_dtype=torch.float32, **how)
    if form == "nf4-lora":
        load_adapter(reloaded, out / "adapter")
    running = load_run(dora_run, original=form == "original").model
    gap = support.logits_of(running, IDS) - support.logits_of(reloaded, IDS)
    assert options.requantize or gap.abs().max() < (5e-3 if is_dense else 2e-5)  # float16, or float32


def test_a_model_that_overflows_in_float16_is_merged_in_bfloat16(tmp_path):
    config = Gemma2Config(**support.LM_SIZES | {"vocab_size": 400, "head_dim": 16, "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    train_run(support.tiny_recipe(tmp_path, **ONE_STEP), tmp_path / "run")
    for dtype, written in ((None, "bfloat16"), ("float16", "float16")):
        export_run(tmp_path / "run", tmp_path / written, ExportOptions(dtype=dtype))
        assert json.loads((tmp_path / written / "config.json").read_text())["dtype"] == written


def test_zero_rows_are_refused_for_peft_which_would_compute_nan():
    model = support.adapted_model()
    check_servable(model)
    layer = adapted_layers(model)["model.layers.1.mlp.up_proj"]
    layer.base.stored_weight[3] = layer.lora_B.data[3] = layer.base_squared[3] = 0.0
    with pytest.raises(UserError, match=r"up_proj: PEFT gives NaN .* Fix: use --format merged"):
        check_servable(model)


def test_a_tokenizer_keeps_what_llama_cpp_needs(tmp_path):
    support.tokenizer().save_pretrained(tmp_path / "source")
    (tmp_path / "source/tokenizer.model").write_bytes(b"pieces")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    tokenizer.add_tokens(["<new>"])
    write.save_tokenizer(tokenizer, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "out/added_tokens.json").read_text())["<new>"] == len(tokenizer) - 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a <new>").input_ids == tokenizer("a <new>").input_ids


def test_a_public_repository_is_not_written_to_by_accident(tmp_path, monkeypatch):
    hub = FakeHub(monkeypatch, shown=False)
    with pytest.raises(UserError, match=r"shown is public.*hf upload OTHER_NAME .* --private$"):
        push(tmp_path, "shown")
    assert hub.files == {}
    push(tmp_path, "shown", private=False)
    push(tmp_path, "new", private=False)
    assert hub.files.keys() == {"me/shown", "me/new"}
    assert hub.private == {"shown": False, "new": False}

    def offline(*_: Any, **__: Any) -> Any:
        client: Any = sys.modules[HTTPError.__module__.partition(".")[0]]  # httpx2, or httpx
        raise client.ConnectError("no route to host")

    monkeypatch.setattr(export_module, "create_repo", offline)
    with pytest.raises(RunFailure, match=r"no route to host .*hf upload mine .* --private$"):
        push(tmp_path, "mine")


REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"format": "peft", "dtype": "float16"}, ["--dtype: .*--format merged or nf4-lora or base, got peft"]),
    ({"format": "nf4lora"}, [r"--format: .*'merged'.*got 'nf4lora'"]),
    (
        {"format": "nf4-lora", "base": "original", "requantize": True},
        ["--base: .*--format merged or gguf, got nf4-lora", "--requantize: .*merged", "--requantize: .*dequantized"],
    ),
    ({"base": "orignal"}, [r"--base: .*'original', got 'orignal'"]),
    (
        {"format": "gguf", "dtype": "float16", "shard_size": "1GB", "requantize": True},
        [f"{name}: .*got gguf" for name in ("--requantize", "--dtype", "--shard-size")],
    ),
    ({"gguf_type": "q8_0"}, ["--gguf-type: .*--format gguf or gguf-lora, got merged"]),
    ({"format": "gguf", "gguf_type": "q8"}, [r"--gguf-type: .*'q8_0', .*got 'q8'"]),
    *(({"shard_size": text}, ["--shard-size: must be"]) for text in ("", "2", "GB", "-1GB", "0GB")),
    *(({"push": name}, ["--push: got "]) for name in ("", "a/b/c", "../x", "a b", "my--model", 97 * "a")),
]


@pytest.mark.parametrize("options, words", REFUSED)
def test_options_without_effect_are_refused_and_others_are_not(options, words):
    support.assert_refused(words, ExportOptions, **options)
    ExportOptions(format="gguf", gguf_type="q4_k_m", base="original")
    ExportOptions(shard_size="2TB")


def test_places_where_nothing_can_be_made_are_refused_before_the_export(dora_run, tmp_path, monkeypatch):
    """The working directory would be replaced under the feet of whoever stands in it."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("here", "disk"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    for place, words in (
        *((tmp_path / name, "Fix: name another directory") for name in ("file/out", "n" * 250, "n" * 300)),
        (Path("/proc/x/y"), "/proc/x/y: .* Fix: name another directory"),
        (tmp_path / "file", "must be a new or empty directory"),
        (tmp_path / "link", "must be a new or empty directory"),
        (tmp_path, "must be a new or empty directory"),
        (Path(), r"\.: .*not the working directory"),
        (tmp_path / "disk", "no mount point"),
    ):
        with pytest.raises(UserError, match=words):
            export_run(dora_run, place, PEFT)
    with work_lock(tmp_path / ".out.lock", "first"), pytest.raises(UserError, match="out: another process works on it"):
        export_run(dora_run, tmp_path / "out")
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: SimpleNamespace(free=1024))
    with pytest.raises(UserError, match=r"the checkpoint needs \d+ KiB, and its disk has 1 KiB free"):
        export_run(dora_run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "file", "here", "link"]


@pytest.mark.parametrize(
    "options, at, error",
    [
        (PEFT, "json_bytes", OSError(errno.ENOSPC, "No space left on device")),  # the last file
        (ExportOptions(), "run_card", KeyboardInterrupt()),  # after the check
        (NF4, "verify_packed", torch.OutOfMemoryError("20 GiB")),
    ],
)
def test_a_directory_of_that_name_holds_a_checked_export_or_does_not_exist(
    dora_run, tmp_path, monkeypatch, options, at, error
):
    def fails(*_: object, **__: object) -> Any:
        raise error

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(export_module, at, fails)
        with pytest.raises(RunFailure if isinstance(error, OSError) else type(error)) as raised:
            export_run(dora_run, out, options)
    assert not isinstance(error, OSError) or "out: cannot be written: the disk is full." in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    export_run(dora_run, out, options)  # the same again
    with pytest.raises(UserError, match="out: holds a finished export"):
        export_run(dora_run, out, options)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
