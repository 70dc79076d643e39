"""Blocks on disk: the numbers of a run in memory bit for bit, in less memory than the base has bytes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qdora.errors import UserError
from qdora.export.export_run import export_run
from qdora.export.options import ExportOptions
from qdora.memory import disk_residency
from qdora.memory.disk_residency import DiskResidency
from qdora.model.inject import frozen_layers
from qdora.model.load import load_model
from qdora.model.packed_base import BaseCache
from qdora.model.source import resolve
from qdora.run.evaluate import evaluate_target
from qdora.run.train import train_run
from tests import tiny_experts, tiny_run, tiny_streamed
from tests.run_files import assert_same_run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_streamed.write_source(tmp_path_factory.mktemp("source"))


@pytest.mark.parametrize("kind", ["dora", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_streamed", [None, 1, 2])
def test_gradients_and_logits_are_those_of_a_resident_base(
    source: Path, tmp_path: Path, kind: str, num_streamed: int | None
) -> None:
    expected = tiny_streamed.of_resident_base(source, kind)
    model, _ = tiny_streamed.on_disk(source, tmp_path, num_streamed)
    assert sum(layer.residency is not None for layer in frozen_layers(model).values()) == 7 * (num_streamed or 5)
    tiny_streamed.assert_equal(tiny_streamed.gradients(tiny_streamed.adapt(model, kind)), expected)


def test_generated_text_is_the_same(source: Path, tmp_path: Path) -> None:
    said = [
        tiny_streamed.adapt(model).generate(tiny_streamed.IDS[0], max_new_tokens=6, do_sample=False)
        for model in (tiny_streamed.resident(source), tiny_streamed.on_disk(source, tmp_path)[0])
    ]
    assert torch.equal(*said)


def test_one_load_serves_recomputation_and_backward(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, loads = disk_residency._Pages.start, list[int]()

    def counted(pages: disk_residency._Pages, block: int, slot: int, previous: int | None) -> None:
        loads.append(block)
        start(pages, block, slot, previous)

    monkeypatch.setattr(disk_residency._Pages, "start", counted)
    model, _ = tiny_streamed.on_disk(source, tmp_path)
    tiny_streamed.adapt(model)
    tiny_streamed.gradients(model)
    before = len(loads)
    tiny_streamed.gradients(model)
    # Of two slots the last block of one pass and the one before it serve the next pass, too. Three micro-batches, and
    # an evaluation, which begins where the last backward pass ended and ends with a look at the next one's first block.
    blocks = tiny_streamed.NUM_BLOCKS
    passes = 3 * 2 * (blocks - 2) + (blocks - 2)
    assert passes <= len(loads) - before <= passes + 4


def mapped_bytes(directory: Path) -> int:
    """Bytes of the files in a directory that this process has in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = str(directory) in line
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def test_two_blocks_are_in_memory_at_most(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128, "num_hidden_layers": 8, "vocab_size": 4096}
    source = tiny_streamed.write_source(tmp_path / "source", **sizes)
    model, residency = tiny_streamed.on_disk(source, tmp_path / "cache")
    base = residency.cache.base
    assert base is not None
    block = sum(t.nbytes for n, t in model.named_buffers() if n.startswith("model.layers.0."))
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    dense = 2 * head.weight.nbytes
    # The system maps up to 16 pages around one that is touched: a few at either end of a block's tensors.
    allowed = 2 * block + dense + (1 << 20)
    total = sum(file.stat().st_size for file in base.directory.glob("*.safetensors"))
    assert total > 2 * allowed - dense
    assert mapped_bytes(base.directory) < allowed
    seen = []

    def look(*_: Any) -> None:
        seen.append(mapped_bytes(base.directory))

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(look)
    tiny_streamed.gradients(tiny_streamed.adapt(model))
    look()
    assert len(seen) == 8 * (3 * 2 + 1) + 1
    assert max(seen) < allowed
    assert min(seen) > 0


@pytest.fixture(scope="module")
def run_on_disk(root: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run again, its base on disk."""
    assert whole.is_dir()
    folder = tmp_path_factory.mktemp("disk")
    recipe = tiny_run.recipe(root, base__residency="disk", base__cache=str(folder / "cache"))
    train_run(recipe, folder / "run")
    assert len(list((folder / "cache").glob("*/base.json"))) == 1
    return folder / "run"


def test_whole_run_with_evaluation_is_the_same(whole: Path, run_on_disk: Path) -> None:
    assert_same_run(run_on_disk, whole)


def test_run_on_disk_is_evaluated_and_exported(whole: Path, run_on_disk: Path, tmp_path: Path) -> None:
    ours, theirs = (evaluate_target(str(run))["evaluation"]["tasks"] for run in (run_on_disk, whole))
    assert ours == theirs
    found = export_run(run_on_disk, tmp_path / "merged", ExportOptions(dtype="float32"))
    assert found["verification"]["passed"]
    export_run(whole, tmp_path / "expected", ExportOptions(dtype="float32"))
    file = "model.safetensors"
    assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()


def test_what_cannot_be_is_said(source: Path, tmp_path: Path, root: Path) -> None:
    with pytest.raises(UserError, match=r"base\.streamed_blocks: must be at most the model's 5 blocks, got 6"):
        tiny_streamed.on_disk(source, tmp_path, 6)
    residency = DiskResidency(BaseCache(tmp_path, tiny_streamed.WANTED, tiny_streamed.CPU, mapped=True))
    with pytest.raises(UserError, match=r"base\.residency: must be one of device, host on a GPU, got disk"):
        load_model(
            resolve(str(source)), quant="nf4", device=torch.device("meta"), reader=residency.cache, placer=residency
        )
    with pytest.raises(UserError, match=r"memory\.checkpointing: must be true with base\.residency disk, got false"):
        tiny_run.recipe(root, base__residency="disk", memory__checkpointing=False)
    with pytest.raises(UserError, match=r"base\.streamed_blocks: would be ignored because base\.residency is device"):
        tiny_run.recipe(root, base__streamed_blocks=1)
    with pytest.raises(
        UserError, match=r"base\.residency: must be device with quant none, which packs no weights, got disk"
    ):
        tiny_run.recipe(root, base__residency="disk", base__quant="none")
    with pytest.raises(UserError, match=r"base\.residency: must be device with a pruned base, got disk"):
        tiny_run.recipe(root, base__residency="disk", base__prune={"method": "magnitude", "sparsity": 0.5})


@pytest.mark.parametrize("num_streamed", [None, 1])
def test_stacks_of_experts_stay_on_disk(tmp_path: Path, num_streamed: int | None) -> None:
    source = tiny_experts.write(tmp_path / "source", "gpt_oss")
    expected = tiny_streamed.gradients(tiny_streamed.adapt(tiny_streamed.resident(source)))
    for _ in range(2):  # written, then read
        model, _ = tiny_streamed.on_disk(source, tmp_path / "cache", num_streamed)
        tiny_streamed.assert_equal(tiny_streamed.gradients(tiny_streamed.adapt(model)), expected)
