"""The check of a divided base before the first step: it passes, and sees a wrong row in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdora.errors import RunFailure
from qdora.model.inject import adapted_layers
from qdora.model.load import block_list
from qdora.train.distributed import Processes
from qdora.train.shard_check import check_division
from tests import launched, tiny_run, tiny_sharded

pytestmark = tiny_sharded.needs_division


@pytest.fixture(scope="module")
def source(root: Path) -> Path:
    """Llama of four blocks, of which the check gathers three."""
    return tiny_run.write_model(root / "model", num_hidden_layers=4)


def with_model(rank: int, source: Path, action: Callable[[Any, Processes, int], None], options: dict[str, Any]) -> None:
    with tiny_sharded.launch() as processes:
        model = tiny_sharded.load(source, processes)
        tiny_sharded.adapt(model, dropout=0.1, **options)
        action(model, processes, rank)


def passes(model: Any, processes: Processes, rank: int) -> None:
    before = torch.get_rng_state()
    text = check_division(model, processes)
    assert text is not None
    assert "3 whole blocks" in text
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    expected = tiny_sharded.load(Path(model.config._name_or_path))
    tiny_sharded.adapt(expected, kind=next(iter(adapted_layers(model).values())).kind)
    model.eval(), expected.eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["dora", pytest.param("lora", marks=pytest.mark.slow)])
def test_an_undisturbed_base_passes_and_stays_as_it_is(source: Path, kind: str) -> None:
    assert launched.run(2, with_model, source, passes, {"kind": kind}) == ["", ""]


def flip_in_pass(number: int) -> Callable[[Any, Processes, int], None]:
    def flipped(model: Any, processes: Processes, rank: int) -> None:
        """After each gathering for a forward pass the second process has other codes in a row."""
        found = block_list(model)
        assert found is not None
        layer = found[1][number].mlp.gate_proj.base

        def flip(*_args: Any) -> None:
            layer._parameters["packed_share"].data[3] ^= 0x77

        if rank == 1:
            found[1][number].register_forward_pre_hook(flip)
        with pytest.raises(RunFailure, match="not the same when it is divided: process 1 has a loss of"):
            check_division(model, processes)

    return flipped


def test_a_wrong_row_is_an_error_in_all_processes(source: Path) -> None:
    """In a block that is gathered whole, and in one that is not: there the processes differ from each other."""
    for number in (3, 1):
        assert launched.run(2, with_model, source, flip_in_pass(number), {}) == ["", ""]


def test_a_whole_base_is_not_checked() -> None:
    assert check_division(None, Processes()) is None  # type: ignore[arg-type]
