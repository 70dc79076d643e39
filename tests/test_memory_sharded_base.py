"""A base that torch divides among processes over gloo: losses, gradients, bytes and norms, against a whole base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.adapter.row_share import span
from qdora.errors import RunFailure, UserError
from qdora.memory import sharded_base
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import block_list
from qdora.quant.packed import PackedWeight, empty_packed
from qdora.train.distributed import Processes
from tests import support
from tests.support import write

pytestmark = support.needs_division


def same_as_whole(rank: int, source: Path, loading: dict[str, Any], adapters: dict[str, Any], num_by_rows: int) -> None:
    """Three steps of descent; the second and third take the norms from the rows of each process."""
    with support.dividing_processes() as processes:
        whole, sharded = support.load_sharded(source, **loading), support.load_sharded(source, processes, **loading)
        for model in (whole, sharded):
            support.adapt_sharded(model, **adapters)
        expected = support.train_plainly(whole, Processes())
        counts, found = support.norm_counts(processes, sharded)
        support.assert_same_steps(found, expected)
        assert counts == [0, num_by_rows, num_by_rows]
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            whole.eval(), sharded.eval()
            torch.testing.assert_close(sharded(input_ids=ids).logits, whole(input_ids=ids).logits)


DORA: dict[str, Any] = {"kind": "dora"}
EXPERTS = DORA | {"targets": ["q_proj", "experts"]}
# Of Llama's seven layers a block six are divided by rows: the blocks of down_proj, 48 wide, cross rows. On three
# processes 64 rows do not divide; on four a process has one micro-batch, another two.
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any], int]] = {
    "double": (2, "llama", {}, DORA, 12),
    "experts": (2, "qwen3_moe", {}, EXPERTS, 2),
    "plain": (2, "llama", {"double_quant": False}, DORA, 12),
    "lora": (2, "llama", {}, {"kind": "lora"}, 0),
    "gated": (2, "llama", {}, DORA | {"gates": True}, 12),
    "no-checkpoints": (2, "llama", {}, DORA | {"checkpointing": False}, 12),
    "int8": (2, "llama", {"quant": "int8"}, DORA, 14),
    "dense": (2, "llama", {"quant": "none"}, DORA, 14),
    "qwen3": (2, "qwen3", {}, DORA, 14),
    "three": (3, "llama", {}, DORA, 12),
    "three, qwen3": (3, "qwen3", {}, DORA, 14),
    "four, experts": (4, "qwen3_moe", {}, EXPERTS, 2),
}
FAST = ("double", "experts")


@pytest.mark.parametrize("case", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_processes_with_a_part_of_a_base_train_as_one(root: Path, case: str) -> None:
    size, family, *rest = CASES[case]
    assert support.run_processes(size, same_as_whole, write(root / family, family), *rest) == [""] * size


def parts(rank: int, source: Path, loading: dict[str, Any]) -> None:
    """Each process reads, quantises and holds its rows, and the parts of all are the weights of a whole base, bit for
    bit. A block is whole only while it computes."""
    rows: list[int] = []
    real = sharded_base.quantize

    def counted(weight: torch.Tensor, *args: Any, **options: Any) -> PackedWeight:
        rows.append(weight.shape[0])
        return real(weight, *args, **options)

    sharded_base.quantize = counted
    with support.dividing_processes() as processes:
        whole, sharded = support.load_sharded(source, **loading), support.load_sharded(source, processes, **loading)
        layers = frozen_layers(sharded)
        assert set(frozen_layers(whole)) <= set(layers)
        divided, mine = 0, []
        for path, layer in frozen_layers(whole).items():
            share, right = layers[path].share, layer.stored_weight
            assert share is not None
            found, bits = share.whole()
            assert bits is None
            assert isinstance(found, PackedWeight)
            assert isinstance(right, PackedWeight)
            for name, tensor in found.tensors().items():
                assert torch.equal(tensor, right.tensors()[name]), (path, name)
            for name in ("packed", "absmax"):
                divided += right.tensors()[name].nbytes
            assert torch.equal(layers[path].squared_row_norm(), layer.squared_row_norm())
            with pytest.raises(RunFailure, match="read outside of its forward pass"):
                _ = layers[path].stored_weight
            own = span(layer.out_features, rank, processes.size)
            mine.append(own.stop - own.start if share.by_rows else layer.out_features)
        assert sorted(rows) == sorted(mine)
        assert sum(rows) < sum(layer.out_features for layer in frozen_layers(whole).values())
        head, table = sharded.get_output_embeddings(), whole.get_input_embeddings().weight
        divided += table.nbytes * (1 if head.weight is sharded.get_input_embeddings().weight else 2)
        before = support.num_resident_bytes(sharded)
        replicated = support.num_resident_bytes(whole) - divided
        assert before == pytest.approx(divided / processes.size + replicated, rel=0.03)
        support.adapt_sharded(sharded)
        counts, num_whole = whole_blocks(sharded)
        support.train_plainly(sharded, processes, num_steps=1)
        assert set(counts) <= {1, 2}  # in the backward pass the block before is there until its own is over
        assert num_whole() == 0
        after = support.num_resident_bytes(sharded) - support.num_adapter_bytes(sharded)
        assert before <= after <= 1.02 * before  # torch pads what a process has less than the first: a row of a tensor
        assert all(layer.base.share is not None for layer in adapted_layers(sharded).values())
        counts.clear()
        with torch.no_grad():
            sharded.eval()(input_ids=torch.tensor([[5, 6, 7]]))
        assert set(counts) == {1}
        assert num_whole() == 0


def whole_blocks(model: Any) -> tuple[list[int], Callable[[], int]]:
    """How many blocks have memory for their codes at the start of each block's passes, and how many have it now."""
    found = block_list(model)
    assert found is not None
    blocks, counts = list(found[1]), list[int]()

    def num_whole() -> int:
        codes = [block.self_attn.q_proj.base._buffers["packed"] for block in blocks]
        return sum(tensor.untyped_storage().nbytes() > 0 for tensor in codes)

    for block in blocks:
        block.register_forward_pre_hook(lambda *_: counts.append(num_whole()))
    return counts, num_whole


@pytest.mark.parametrize("size, double_quant", [(2, True), pytest.param(3, False, marks=pytest.mark.slow)])
def test_each_process_holds_its_part(root: Path, size: int, double_quant: bool) -> None:
    five = support.write_llama(root / "five", num_hidden_layers=5)
    source = five if size == 2 else write(root / "qwen3", "qwen3")
    assert support.run_processes(size, parts, source, {"double_quant": double_quant}) == [""] * size


def test_a_process_without_rows_of_a_small_layer_has_empty_parts() -> None:
    form = empty_packed("nf4", (3, 64), 16, False, "meta")
    found = sharded_base._quantized(torch.empty(0, 64), form, "w")
    assert {name: (tuple(each.shape), each.dtype) for name, each in found.items()} == {
        "packed": ((0, 32), torch.uint8),
        "absmax": ((0, 4), torch.float32),
    }


def test_a_recipe_that_cannot_be_divided_is_refused(root: Path) -> None:
    for words, changes in (
        ("base.residency host", {"base__residency": "host"}),
        ("adapter.init loftq", {"adapter__init": "loftq"}),
        ("adapter.also_train", {"adapter__also_train": ["lm_head"], "adapter__also_train_rows": "all"}),
        ("memory.host_embeddings", {"memory__host_embeddings": True}),
    ):
        with pytest.raises(UserError, match=f"train.parallel: must be auto or replicate with {words}"):
            support.tiny_recipe(root, train__parallel="shard", **changes)
    assert support.tiny_recipe(root, train__parallel="hybrid").train.parallel == "hybrid"
