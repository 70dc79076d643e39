"""A base that torch divides among processes over gloo: gradients, bytes, norms and runs against a whole base."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from qdora.errors import RunFailure, UserError
from qdora.model.inject import adapted_layers, frozen_layers
from qdora.model.load import block_list
from qdora.quant.packed import PackedWeight
from qdora.recipe.recipe_file import resolved_yaml
from qdora.run.run import train_run
from qdora.train.distributed import Processes, StopRequest
from qdora.train.guards import check_division
from qdora.train.trainer import Trainer
from tests import support
from tests.support import assert_close_runs, in_batches, timeless, train_until, write
from tests.test_train_distributed import GATED, assert_same_files, exact, stopped, train

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
    "lora": (2, "llama", {}, {"kind": "lora"}, 0),
    "gated": (2, "llama", {}, DORA | {"gates": True}, 12),
    "int8": (2, "llama", {"quant": "int8"}, DORA, 14),
    "dense": (2, "llama", {"quant": "none"}, DORA, 14),
    "nvfp4": (2, "llama", {"quant": "nvfp4"}, DORA, 14),
    "three, qwen3": (3, "qwen3", {}, DORA, 14),
    "four, experts": (4, "qwen3_moe", {}, EXPERTS, 2),
}
FAST = ("double", "experts")


@pytest.mark.parametrize("case", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_processes_with_a_part_of_a_base_train_as_one(root: Path, case: str) -> None:
    size, family, *rest = CASES[case]
    assert support.run_processes(size, same_as_whole, write(root / family, family), *rest) == [""] * size


def parts(rank: int, source: Path, loading: dict[str, Any]) -> None:
    """The parts of all processes are the weights of a whole base, bit for bit. A block is whole only while it
    computes."""
    counts = list[int]()
    with support.dividing_processes() as processes:
        whole, sharded = support.load_sharded(source, **loading), support.load_sharded(source, processes, **loading)
        layers = frozen_layers(sharded)
        divided = 0
        for path, layer in frozen_layers(whole).items():
            share, right = layers[path].share, layer.stored_weight
            assert share is not None
            found, _ = share.whole()
            assert isinstance(found, PackedWeight)
            assert isinstance(right, PackedWeight)
            for name, tensor in found.tensors().items():
                assert torch.equal(tensor, right.tensors()[name]), (path, name)
            divided += sum(right.tensors()[name].nbytes for name in ("packed", "absmax"))
            assert torch.equal(layers[path].squared_row_norm(), layer.squared_row_norm())
            with pytest.raises(RunFailure, match="read outside of its forward pass"):
                _ = layers[path].stored_weight
        head, table = sharded.get_output_embeddings(), whole.get_input_embeddings().weight
        divided += table.nbytes * (1 if head.weight is sharded.get_input_embeddings().weight else 2)
        before = support.num_resident_bytes(sharded)
        replicated = support.num_resident_bytes(whole) - divided
        assert before == pytest.approx(divided / processes.size + replicated, rel=0.03)
        support.adapt_sharded(sharded)
        listed = block_list(sharded)
        assert listed is not None

        def count(*_: Any) -> None:
            """Blocks that have memory for their codes."""
            codes = [block.self_attn.q_proj.base._buffers["packed"] for block in listed[1]]
            counts.append(sum(tensor.untyped_storage().nbytes() > 0 for tensor in codes))

        for block in listed[1]:
            block.register_forward_pre_hook(count)
        support.train_plainly(sharded, processes, num_steps=1)
        assert set(counts) <= {1, 2}  # in the backward pass the block before is there until its own is over
        after = support.num_resident_bytes(sharded) - support.num_adapter_bytes(sharded)
        assert before <= after <= 1.02 * before  # torch pads what a process has less than the first: a row of a tensor
        counts.clear()
        with torch.no_grad():
            sharded.eval()(input_ids=torch.tensor([[5, 6, 7]]))
        assert set(counts) == {1}
        count()
        assert counts[-1] == 0
        assert all(layer.base.share is not None for layer in adapted_layers(sharded).values())


LOADED = [(2, {}), (2, {"quant": "nf3"}), pytest.param(3, {"double_quant": False}, marks=pytest.mark.slow)]


@pytest.mark.parametrize("size, loading", LOADED)
def test_each_process_holds_its_part(root: Path, size: int, loading: dict[str, Any]) -> None:
    five = support.write_llama(root / "five", num_hidden_layers=5)
    source = five if size == 2 else write(root / "qwen3", "qwen3")
    assert support.run_processes(size, parts, source, loading) == [""] * size


SHARD = {"train__parallel": "shard"}


MASKED = {"base__prune": {"method": "magnitude", "sparsity": 0.5}, "adapter__mask": "keep"}
SLOW = [{"train__batch": 9, "data__packing": True}, GATED, MASKED, {"train__optimizer": "paged_adamw_8bit"}]


@pytest.mark.parametrize(
    "changes",
    [
        {"train__batch": 5, "eval__tasks": ["sums", "letters"], "eval__limit": 2, "eval__every": 3},
        *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW),
    ],
    ids=["evaluated", "packed", "gates", "masked", "8bit"],
)
def test_two_with_half_a_base_write_what_one_does(root: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    train_run(exact(root, **changes), runs[0])
    assert support.run_processes(2, train, exact(root, **SHARD, **changes), runs[1]) == ["", ""]
    assert_close_runs(*runs)
    assert_same_files(*runs)


@pytest.mark.slow
def test_torchrun_on_two_machines_trains_what_one_process_does(root: Path, tmp_path: Path) -> None:
    """As a user starts it on each machine: two processes, which divide the base; the other machine repeats it."""
    one, two, file = tmp_path / "one", tmp_path / "two", tmp_path / "recipe.yaml"
    train_run(exact(root), one)
    file.write_text(resolved_yaml(exact(root, train__parallel="hybrid")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(support.free_port())]
    command = ["-m", "qdora.cli", "train", str(file), "-d", str(two)]
    logs = [tmp_path / f"machine-{number}" for number in (0, 1)]
    machines = []
    for number, log in enumerate(logs):
        with log.open("w") as output:
            started = [*launcher, "--node-rank", str(number), *command]
            machines.append(subprocess.Popen(started, stdout=output, stderr=subprocess.STDOUT))
    try:
        ends = [machine.wait(270) for machine in machines]
        assert ends == [0, 0], "".join(log.read_text() for log in logs)
    finally:
        for machine in machines:
            machine.terminate()  # and its processes
    assert json.loads((two / "environment.json").read_text())["num_processes"] == 4
    assert_close_runs(one, two)
    assert_same_files(one, two)


def test_a_run_goes_on_with_a_base_that_is_divided_otherwise(root: Path, tmp_path: Path) -> None:
    """One process; two with half of the base each; one again."""
    one, run = tmp_path / "one", tmp_path / "run"
    train_run(exact(root), one)
    train_until(exact(root), run, 2)
    assert support.run_processes(2, stopped, exact(root, **SHARD), run, 4, (0, 1), True) == ["", ""]
    train_run(exact(root), run, resume=True)
    assert_close_runs(one, run)


def test_where_one_process_cannot_compute_the_others_end_and_the_run_goes_on(root: Path, tmp_path: Path) -> None:
    settings, run = (
        exact(root, **SHARD, train__batch=2, train__micro_batch_tokens=96, train__checkpoint_every=1),
        tmp_path,
    )

    def fail(number: int, *_: Any) -> None:
        if number == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def broken(rank: int) -> None:
        if rank == 1:
            in_batches(pytest.MonkeyPatch(), fail)
        with pytest.raises(RuntimeError, match="out of memory in a micro-batch" if rank else ""):
            train_run(settings, run)

    assert support.run_processes(2, broken, timeout=60) == ["", ""]
    assert support.run_processes(2, train, settings, run, True) == ["", ""]
    assert [line["step"] for line in timeless(run)] == [1, 2, 3, 4, 5, 6]


def test_an_adapted_head_is_refused(tmp_path: Path) -> None:
    support.write_llama(tmp_path / "model", tie_word_embeddings=False)
    settings = exact(tmp_path, **SHARD, adapter__targets=["q_proj", "lm_head"])
    for error in support.run_processes(2, train, settings, tmp_path / "run"):
        assert "adapter.targets: must not have the head with train.parallel shard" in error


def test_an_evaluation_that_fails_in_one_process_saves_nothing() -> None:
    for size, error in ((2, torch.OutOfMemoryError("CUDA out of memory.")), (1, UserError("sums: an empty choice"))):
        saved: list[int] = []
        trainer: Any = Trainer.__new__(Trainer)
        trainer.recipe = SimpleNamespace(eval=SimpleNamespace(every=3), train=SimpleNamespace(checkpoint_every=None))
        trainer.evaluations, trainer.best, trainer.processes = Mock(), None, Processes(0, size)
        trainer.step, trainer.num_steps, trainer.stop = 3, 6, StopRequest()
        trainer.evaluate, trainer.save = Mock(side_effect=error), lambda saved=saved: saved.append(3)
        with pytest.raises(type(error)):
            trainer.evaluate_and_save()
        assert saved == [3] * (size == 1)


def checked(rank: int, source: Path, kind: str) -> None:
    """Undisturbed it passes and leaves no trace. A wrong byte in one process is an error in all."""
    with support.dividing_processes() as processes:
        model = support.load_sharded(source, processes)
        support.adapt_sharded(model, dropout=0.1, kind=kind)
        before = torch.get_rng_state()
        assert "one loss with the divided base" in str(check_division(model, processes))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert model.training
        expected = support.load_sharded(source)
        support.adapt_sharded(expected, dropout=0.1, kind=kind)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected.eval()(input_ids=ids).logits)
        model.train()
        found = block_list(model)
        assert found is not None
        for number in (3, 1):
            layer = found[1][number].mlp.gate_proj.base

            def flip(*_args: Any, layer: Any = layer) -> None:
                """After each gathering of the block the second process has two other codes."""
                if rank == 1:
                    layer._parameters["packed_share"].data[3, 0] ^= 0x77

            hook = found[1][number].register_forward_pre_hook(flip)
            text = rf"divided: process 1 has a loss of .* other bytes in model\.layers\.{number}\.mlp\.gate_proj\.base"
            with pytest.raises(RunFailure, match=text):
                check_division(model, processes)
            hook.remove()


@pytest.mark.parametrize("kind", ["dora", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_divided_base_is_checked_before_the_first_step(tmp_path: Path, kind: str) -> None:
    source = support.write_llama(tmp_path, num_hidden_layers=4)
    assert support.run_processes(2, checked, source, kind) == ["", ""]
    assert check_division(None, Processes()) is None  # type: ignore[arg-type]
