"""The packed base on disk: the same model from it as from its source, and every way in which it can be a wrong one."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qdora.errors import DiskFull, UserError
from qdora.model import load as load_module
from qdora.model import packed_base
from qdora.model.load import Quantization, load_model
from qdora.model.packed_base import CACHE_RECORD_FILE, BaseCache, open_cached_base
from qdora.model.source import resolve
from qdora.ops import blockwise
from qdora.recipe.recipe_file import recipe_from
from tests.checkpoints import CONFIGS, checkpoint, load, logits, one_file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source"), CONFIGS["llama-tied-biased"])


def cached(
    source: Path, root: Path, quant: str = "nf4", block_size: int = 64, double_quant: bool = True, **settings: Any
) -> tuple[PreTrainedModel, BaseCache]:
    wanted = Quantization(quant, block_size, double_quant, ("lm_head",))
    cache = BaseCache(root, wanted, torch.device("cpu"), mapped=settings.pop("mapped", False))
    model = load_model(
        resolve(str(source)),
        quant=quant,
        block_size=block_size,
        double_quant=double_quant,
        compute_dtype=torch.float32,
        reader=cache,
    )
    return model, cache


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (first, second))
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def num_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("quant", "double_quant"), [("nf4", True), ("nf4", False), ("fp4", True), ("int8", True), ("nf3", True)]
)
def test_second_start_reads_no_weight_of_the_source(
    source: Path, tmp_path: Path, quant: str, double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(source, quant=quant, double_quant=double_quant)
    first, cache = cached(source, tmp_path, quant, double_quant=double_quant)
    assert same(first, plain)
    monkeypatch.setattr(packed_base, "tensors_of_source", None)
    second, again = cached(source, tmp_path, quant, double_quant=double_quant)
    assert again.base is not None
    assert cache.base is not None
    assert again.base.directory == cache.base.directory
    assert same(second, plain)
    assert torch.equal(logits(second), logits(plain))
    # What is loaded holds no mapping of the files.
    shutil.rmtree(again.base.directory)
    assert torch.equal(logits(second), logits(plain))


def test_a_base_of_an_earlier_version_is_read_as_it_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions stored another offset of double quantisation, ulps away: no base changes under a run."""

    def earlier(absmax: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, ...]:
        offset = torch.nextafter(absmax.mean(), torch.tensor(1.0))
        return *blockwise.quantize_8bit(absmax - offset, code, 256), offset

    with monkeypatch.context() as patch:
        patch.setattr(blockwise, "quantize_scales", earlier)
        before, written = cached(source, tmp_path)
    assert written.base is not None
    record = written.base.directory / CACHE_RECORD_FILE
    known = json.loads(record.read_text())
    for form in known["weights"].values():  # which their records said as well
        form |= {"double_quant": form.get("kind") == "nf4", "file": "00000.safetensors"}
    record.write_text(json.dumps(known))
    after, read = cached(source, tmp_path)
    assert read.base is not None
    assert read.base.directory == written.base.directory
    assert same(after, before)
    assert not same(after, load(source, quant="nf4"))


@pytest.mark.parametrize("config", ["qwen2", "gemma3"])
def test_other_models(config: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", CONFIGS[config])
    plain = load(source, quant="nf4")
    for _ in range(2):
        assert same(cached(source, tmp_path / "cache")[0], plain)


def test_files_are_cut_and_all_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_base, "_FILE_BYTES", 20_000)
    model, cache = cached(source, tmp_path)
    assert cache.base is not None
    files = open_cached_base(cache.base.directory)[0].files
    assert len(files) > 3
    assert sorted(file.name for file in cache.base.directory.iterdir()) == [
        *sorted(files),
        "base.json",
    ]
    assert same(model, load(source, quant="nf4"))


def test_other_settings_and_other_weights_have_a_place_of_their_own(source: Path, tmp_path: Path) -> None:
    found = {cached(source, tmp_path)[1].base.directory}  # type: ignore[union-attr]
    found.add(cached(source, tmp_path, block_size=32)[1].base.directory)  # type: ignore[union-attr]
    found.add(cached(source, tmp_path, double_quant=False)[1].base.directory)  # type: ignore[union-attr]
    changed = tmp_path / "changed"
    shutil.copytree(source, changed)
    shard = sorted(changed.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    tensors[next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    model, cache = cached(changed, tmp_path)
    assert cache.base is not None
    found.add(cache.base.directory)
    assert len(found) == 4
    assert same(model, load(changed, quant="nf4"))


def test_equally_large_change_of_a_weight_is_seen_by_its_bytes(tmp_path: Path) -> None:
    file, tensors = one_file(tmp_path / "source")
    first = cached(tmp_path / "source", tmp_path)[1].base
    times = file.stat()
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] + 1}, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = cached(tmp_path / "source", tmp_path)[1].base
    assert first is not None
    assert second is not None
    assert first.directory != second.directory


def damage(directory: Path, how: str) -> None:
    file, record = directory / "00000.safetensors", directory / CACHE_RECORD_FILE
    known = json.loads(record.read_text())
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "missing":
        file.unlink()
    elif how == "header":
        file.write_bytes(b"\xff" * file.stat().st_size)
    elif how == "no record":
        record.unlink()
    elif how == "no JSON":
        record.write_text("{")
    else:
        changes: dict[str, Any] = {"unknown key": {"extra": 1}, "format": {"format": 99}, "outside": {}}
        known |= changes[how]
        if how == "outside":
            known["files"] = {"../00000.safetensors": 1}
        record.write_text(json.dumps(known))


@pytest.mark.parametrize(
    "how", ["cut", "missing", "header", "no record", "no JSON", "unknown key", "format", "outside"]
)
def test_damaged_base_is_reported_and_made_again(
    source: Path, tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, cache = cached(source, tmp_path)
    assert cache.base is not None
    damage(cache.base.directory, how)
    with caplog.at_level(logging.WARNING, "qdora"):
        again, _ = cached(source, tmp_path)
    assert same(again, model)
    (said,) = [record.getMessage() for record in caplog.records if "quantised again" in record.getMessage()]
    assert str(cache.base.directory) in said
    assert len(said.splitlines()) == 1


def test_base_of_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    own, other = cached(source, tmp_path)[1].base, cached(source, tmp_path, block_size=32)[1].base
    assert own is not None
    assert other is not None
    shutil.rmtree(own.directory)
    shutil.copytree(other.directory, own.directory)
    with pytest.raises(UserError, match=r"holds the packed base of .* not the one that belongs here") as caught:
        cached(source, tmp_path)
    assert len(caught.value.faults) == 1


def test_record_that_does_not_fit_the_tensors_is_one_line(source: Path, tmp_path: Path) -> None:
    _, cache = cached(source, tmp_path)
    assert cache.base is not None
    record = cache.base.directory / CACHE_RECORD_FILE
    known = json.loads(record.read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    known["weights"][name]["kind"] = "int8"
    record.write_text(json.dumps(known))
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight: cannot be read") as caught:
        open_cached_base(cache.base.directory)[1].stored()[name].read()
    assert len(str(caught.value).splitlines()) == 1


def test_full_disk_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packed_base, "write_tensors", no_room)
    with pytest.raises(DiskFull, match=r"base\.cache: .* cannot be written: the disk is full"):
        cached(source, tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").iterdir() if not file.name.endswith(".lock")] == []


def test_too_little_room_is_said_before_a_weight_is_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_base.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    monkeypatch.setattr(load_module, "quantize", None)
    with pytest.raises(UserError, match=r"the disk is full: 0\.0 GiB are free, the packed base needs"):
        cached(source, tmp_path / "cache")


def test_what_a_killed_write_left_does_not_count(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache = cached(source, tmp_path)
    assert cache.base is not None
    made = cache.base.directory
    total = int(1.3 * num_bytes(made))
    made.rename(tmp_path / f".{made.name}.partial")

    def usage(_: Any) -> Any:
        used = num_bytes(tmp_path)
        return shutil._ntuple_diskusage(total, used, total - used)  # type: ignore[attr-defined]

    monkeypatch.setattr(packed_base.shutil, "disk_usage", usage)
    cached(source, tmp_path)
    assert made.is_dir()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_room_asked_for_is_what_is_taken(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint(tmp_path / "source", CONFIGS["llama-tied-biased"], dtype=dtype)
    _, cache = cached(model, tmp_path / "one")
    assert cache.base is not None
    files = [load_file(file) for file in cache.base.directory.glob("*.safetensors")]
    taken = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    free = [taken - 1, taken]
    monkeypatch.setattr(
        packed_base.shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(taken, 0, free[0]),  # type: ignore[attr-defined]
    )
    with pytest.raises(UserError, match="the disk is full"):
        cached(model, tmp_path / "two")
    free.pop(0)
    cached(model, tmp_path / "two")


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_base_that_may_only_be_read(
    source: Path, tmp_path: Path, has_lock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = cached(source, tmp_path)
    if not has_lock:
        for lock in tmp_path.glob(".*.lock"):
            lock.unlink()
    real = os.open

    def read_only(path: Any, flags: int, *mode: Any, **options: Any) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, *mode, **options)

    monkeypatch.setattr("os.open", read_only)
    found, _ = cached(source, tmp_path)
    assert same(found, expected)
    with pytest.raises(UserError, match=r"base\.cache: .* cannot be written: .*Read-only file system"):
        cached(source, tmp_path, quant="fp4")


def test_place_that_cannot_be_written_to_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"base\.cache: .*file"):
        cached(source, tmp_path / "file")


def test_recipe_setting_that_would_be_ignored() -> None:
    document: dict[str, Any] = {
        "model": {"source": "some/model"},
        "base": {"cache": "auto", "quant": "none"},
        "data": {"mix": [{"source": "some/data"}]},
        "train": {"steps": 1, "batch": 1},
    }
    with pytest.raises(UserError, match=r"base\.cache: would be ignored because base\.quant none packs nothing"):
        recipe_from(document)
    document["base"] = {"cache": "auto"}
    assert recipe_from(document).base.cache == "auto"
