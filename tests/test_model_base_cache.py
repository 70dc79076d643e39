"""The packed base on disk: the same model from it as from its source, and every way in which it can be a wrong one."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qdora.errors import DiskFull, UserError
from qdora.model import packed_base
from qdora.model.load import Quantization
from qdora.model.packed_base import CACHE_RECORD_FILE, BaseCache, open_cached_base
from tests.support import CHECKPOINT_CONFIGS, checkpoint, checkpoint_logits, load_checkpoint, one_file_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("source"), CHECKPOINT_CONFIGS["llama-tied-biased"])


def cached(
    source: Path, root: Path, quant: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> tuple[PreTrainedModel, Path]:
    """A model by way of the cache in `root`, and the directory of its base."""
    cache = BaseCache(root, Quantization(quant, block_size, double_quant, ("lm_head",)), torch.device("cpu"))
    model = load_checkpoint(source, quant=quant, block_size=block_size, double_quant=double_quant, reader=cache)
    assert cache.base is not None
    return model, cache.base.directory


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (first, second))
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)


def change_record(directory: Path, **changes: Any) -> None:
    record = directory / CACHE_RECORD_FILE
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


@pytest.mark.parametrize(
    ("config", "quant", "double_quant"),
    [("llama-tied-biased", quant, True) for quant in ("nf4", "fp4", "int8", "nf3")]
    + [("qwen2", "nf4", False), ("gemma3", "nf4", True)],
)
def test_second_start_reads_no_weight_of_the_source(tmp_path, config, quant, double_quant, monkeypatch):
    source = checkpoint(tmp_path / "source", CHECKPOINT_CONFIGS[config])
    plain = load_checkpoint(source, quant=quant, double_quant=double_quant)
    if config == "gemma3":
        monkeypatch.setattr(packed_base, "_FILE_BYTES", 20_000)
    first, directory = cached(source, tmp_path, quant, double_quant=double_quant)
    assert same(first, plain)
    files = open_cached_base(directory)[0].files
    assert (len(files) > 3) == (config == "gemma3")
    assert sorted(file.name for file in directory.iterdir()) == [*sorted(files), "base.json"]
    monkeypatch.setattr(packed_base, "tensors_of_source", None)
    second, again = cached(source, tmp_path, quant, double_quant=double_quant)
    assert again == directory
    assert same(second, plain)
    shutil.rmtree(directory)  # what is loaded holds no mapping of the files
    assert torch.equal(checkpoint_logits(second), checkpoint_logits(plain))


def test_other_settings_and_other_weights_have_a_place_of_their_own(source, tmp_path):
    settings: list[dict[str, Any]] = [{}, {"block_size": 32}, {"double_quant": False}, {"quant": "fp4"}]
    found = {cached(source, tmp_path, **each)[1] for each in settings}
    file, tensors = one_file_checkpoint(tmp_path / "changed", CHECKPOINT_CONFIGS["llama-tied-biased"])
    found.add(cached(tmp_path / "changed", tmp_path)[1])  # the same weights in one file
    times = file.stat()
    save_file({**tensors, UP: tensors[UP] + 1}, file, metadata={"format": "pt"})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # seen by its bytes alone
    model, directory = cached(tmp_path / "changed", tmp_path)
    found.add(directory)
    assert len(found) == 6
    assert same(model, load_checkpoint(tmp_path / "changed", quant="nf4"))


FILE = "00000.safetensors"
DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda base: (base / FILE).write_bytes((base / FILE).read_bytes()[:-1]),
    "missing": lambda base: (base / FILE).unlink(),
    "header": lambda base: (base / FILE).write_bytes(b"\xff" * (base / FILE).stat().st_size),
    "no record": lambda base: (base / CACHE_RECORD_FILE).unlink(),
    "no JSON": lambda base: (base / CACHE_RECORD_FILE).write_text("{"),
    "unknown key": lambda base: change_record(base, extra=1),
    "format": lambda base: change_record(base, format=99),
    "outside": lambda base: change_record(base, files={f"../{FILE}": 1}),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_base_is_reported_and_made_again(source, tmp_path, how, caplog):
    model, directory = cached(source, tmp_path)
    DAMAGE[how](directory)
    with caplog.at_level(logging.WARNING, "qdora"):
        again, _ = cached(source, tmp_path)
    assert same(again, model)
    (said,) = [record.getMessage() for record in caplog.records if "quantised again" in record.getMessage()]
    assert str(directory) in said


def test_bases_and_places_that_do_not_fit_are_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"base\.cache: .*file"):
        cached(source, tmp_path / "file")
    own, other = cached(source, tmp_path)[1], cached(source, tmp_path, block_size=32)[1]
    shutil.rmtree(own)
    shutil.copytree(other, own)
    with pytest.raises(UserError, match=r"holds the packed base of .* not the one that belongs here"):
        cached(source, tmp_path)
    weights = json.loads((other / CACHE_RECORD_FILE).read_text())["weights"]
    change_record(other, weights=weights | {UP: weights[UP] | {"kind": "int8"}})
    with pytest.raises(UserError, match=rf"{UP}: cannot be read"):
        open_cached_base(other)[1].stored()[UP].read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_room_asked_for_is_what_is_taken(tmp_path, dtype, monkeypatch):
    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = checkpoint(tmp_path / "source", CHECKPOINT_CONFIGS["llama-tied-biased"], dtype=dtype)
    _, directory = cached(model, tmp_path / "one")
    files = [load_file(file) for file in directory.glob("*.safetensors")]
    taken = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    free = [taken - 1, taken, taken]
    monkeypatch.setattr(packed_base.shutil, "disk_usage", lambda _: SimpleNamespace(free=free.pop(0)))
    with pytest.raises(UserError, match=r"the disk is full: 0\.0 GiB are free, the packed base needs"):
        cached(model, tmp_path / "two")
    with monkeypatch.context() as patch:
        patch.setattr(packed_base, "write_tensors", full)
        with pytest.raises(DiskFull, match=r"base\.cache: .* cannot be written: the disk is full"):
            cached(model, tmp_path / "two")
    assert [file.name for file in (tmp_path / "two").iterdir() if not file.name.endswith(".lock")] == []
    cached(model, tmp_path / "two")


def test_what_a_killed_write_left_does_not_count(source, tmp_path, monkeypatch):
    def num_bytes() -> int:
        return sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())

    made = cached(source, tmp_path)[1]
    total = int(1.3 * num_bytes())
    made.rename(tmp_path / f".{made.name}.partial")
    monkeypatch.setattr(packed_base.shutil, "disk_usage", lambda _: SimpleNamespace(free=total - num_bytes()))
    cached(source, tmp_path)
    assert made.is_dir()


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_base_that_may_only_be_read(source, tmp_path, has_lock, monkeypatch):
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
