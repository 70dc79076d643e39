"""Live bytes against counts made by hand: sizes of dtypes and shapes, and when the last owner lets go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from qdora.ops.packed import empty_packed
from qdora.plan.live_bytes import LiveBytes


@pytest.fixture(params=["real", "fake"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveBytes]:
    """A counter that is active, on tensors of both kinds."""
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext(), LiveBytes() as counter:
        yield counter


def test_a_storage_counts_once_and_until_its_last_view_dies(live: LiveBytes) -> None:
    first = torch.empty(100)
    assert live.live_bytes == 400
    view = first.view(10, 10)[3:]
    alias = view.detach()
    assert live.live_bytes == 400
    del first, view
    assert live.live_bytes == 400
    half = alias.to(torch.bfloat16)  # 70 elements of 2 bytes
    assert live.live_bytes == 540
    del alias
    assert live.live_bytes == 140
    del half
    assert live.live_bytes == 0
    assert live.peak_bytes == 540
    kept = torch.empty(1)
    live.reset_peak()
    assert live.peak_bytes == kept.element_size()


def test_writes_in_place_and_into_buffers_are_no_new_memory(live: LiveBytes) -> None:
    total, other = torch.zeros(8, 8), torch.ones(8, 8)
    assert live.live_bytes == 512
    total.add_(other)
    torch.mm(total, other, out=total)
    total[2:4].copy_(other[:2])
    assert live.live_bytes == live.peak_bytes == 512
    buffer = torch.empty(0)
    torch.mm(total, other, out=buffer)  # resized by the operation
    assert live.live_bytes == 768


def test_a_resized_storage_counts_with_its_new_size(live: LiveBytes) -> None:
    values = torch.zeros(10)
    values.resize_(1000)
    assert live.peak_bytes == 4000
    values.untyped_storage().resize_(0)  # as sharded training does; no operation of torch's
    assert live.live_bytes == 0


def test_operations_with_several_results(live: LiveBytes) -> None:
    values, indices = torch.empty(6, 5).sort()  # 30 float32 and 30 int64, the input gone
    assert live.live_bytes == 360
    parts = torch.split(values, 2)
    assert live.live_bytes == 360
    del values, indices
    assert live.live_bytes == 120
    del parts
    assert live.live_bytes == 0


def test_what_autograd_saves_lives_until_the_backward_pass(live: LiveBytes) -> None:
    x = torch.ones(16, requires_grad=True)  # 64 bytes
    y = x.sin().exp()  # sin saves x; exp saves its result; the result of sin dies
    assert live.live_bytes == 3 * 64 - 64
    total = y.sum()
    del y  # saved by exp
    assert live.live_bytes == 2 * 64 + 4
    total.backward()  # type: ignore[no-untyped-call]
    assert live.live_bytes == 2 * 64 + 4  # x and its gradient


class _Workspace(torch.autograd.Function):
    """Doubles; needs 5 times its input while it runs forward, 9 times backward, and saves what nobody else holds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.empty(5 * x.numel())
        ctx.save_for_backward(torch.empty(3 * x.numel()))
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        torch.empty(9 * grads[0].numel())
        return 2 * grads[0]


def test_inside_custom_autograd_functions(live: LiveBytes) -> None:
    x = torch.ones(25, requires_grad=True)  # 100 bytes
    y = _Workspace.apply(x)  # type: ignore[no-untyped-call]
    assert live.peak_bytes == 100 + 500
    assert live.live_bytes == 100 + 300 + 100
    ones = torch.ones(25)
    live.reset_peak()
    assert live.peak_bytes == 600
    y.backward(ones)
    assert live.peak_bytes == 600 + 900
    assert live.live_bytes == 400  # x, y, ones, the gradient; what was saved is gone


def test_a_checkpoint_keeps_its_input_only(live: LiveBytes) -> None:
    def block(x: Tensor) -> Tensor:
        return x.sin().exp().sin().exp()  # saves its input, the result of the first exp, and its output

    x = torch.ones(25, requires_grad=True)
    y = block(x)
    assert live.live_bytes == 300
    del y
    assert live.live_bytes == 100
    y = checkpoint(block, x, use_reentrant=False)
    assert live.live_bytes == 200
    del x
    assert live.live_bytes == 200
    del y
    assert live.live_bytes == 0


def test_registered_tensors_and_only_those(live: LiveBytes) -> None:
    with live.label("ignored"):
        frozen = nn.BatchNorm1d(4).requires_grad_(False)  # 16 float32 and one int64
    other = LiveBytes()
    with other:
        frozen.weight + 1.0
        frozen.weight.view(2, 2).mul_(2.0)
        assert other.live_bytes == 0
        other.register([*frozen.parameters(), *frozen.buffers()], "base")
        other.register([frozen.weight, frozen.bias.view(2, 2)], "base")
        assert other.live_bytes == other.peak_bytes == 16 * 4 + 8
        assert other.live_by_label == {"base": 72}
        other.register(frozen.bias, "adapter")
        assert other.live_by_label == {"base": 56, "adapter": 16}
    del frozen
    assert other.live_bytes == 0
    assert other.live_by_label == {}


def test_labels_tell_what_is_alive_at_the_peak(live: LiveBytes) -> None:
    with live.label("base"):
        base = torch.empty(100)
        with live.label("adapter"):
            adapter = torch.empty(10)
        base2 = torch.empty(1)
    kept = torch.empty(3)
    large = []
    with contextlib.suppress(ValueError), live.label("workspace"):
        large.append(torch.empty(50))
        raise ValueError
    assert live.peak_by_label == {"base": 404, "adapter": 40, "other": 12, "workspace": 200}
    del large
    after = torch.empty(2)  # a label ends with its block, also by an error
    assert live.live_by_label == {"base": 404, "adapter": 40, "other": 20}
    assert live.peak_by_label["workspace"] == 200
    del base, base2, adapter, kept, after
    assert live.live_by_label == {}


def test_the_meta_device_takes_no_memory(live: LiveBytes) -> None:
    made = torch.empty(100, device="meta") + 1.0
    live.register(made, "other")
    assert live.peak_bytes == 0


def test_a_sparse_tensor_is_passed_over() -> None:
    with LiveBytes() as live:
        dense = torch.ones(2, 2)
        sparse = dense.to_sparse()
        assert sparse.sum() == 4
        live.register(sparse, "other")


def test_real_inputs_of_a_fake_operation() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = torch.empty(100)
    with LiveBytes() as live:
        index = torch.arange(10)  # 80 bytes, real
        picked = fake[index]  # 40 bytes, fake
        assert live.live_bytes == 120
        del picked, index
        assert live.live_bytes == 0


def test_frozen_packed_weights_under_fake_tensors() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        packed = empty_packed("nf4", (64, 128))
        # Half a byte a weight; a byte for each of 128 blocks, one nested scale, 256 of the code book, one offset.
        assert live.live_bytes == 4096 + 128 + 4 + 1024 + 4
        assert live.live_bytes == packed.num_bytes


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=12),
    dropped=st.lists(st.integers(0, 11), max_size=12),
    fake=st.booleans(),
)
def test_any_order_of_making_and_dropping(sizes: list[int], dropped: list[int], fake: bool) -> None:
    with FakeTensorMode() if fake else contextlib.nullcontext(), LiveBytes() as live:
        kept = {index: torch.empty(size, dtype=torch.float64) for index, size in enumerate(sizes)}
        assert live.peak_bytes == 8 * sum(sizes)
        for index in dropped:
            kept.pop(index, None)
            assert live.live_bytes == 8 * sum(sizes[left] for left in kept)
        assert live.peak_bytes == 8 * sum(sizes)
