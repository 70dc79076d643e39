"""A counter of the bytes of live tensors, real or fake, by their storages.

torch's own MemTracker does not accept frozen parameters.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_DEVICE_OF = torch.ops.prim.device.default  # what `tensor.device` calls for a fake tensor


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, counts the live bytes of storages that operations created, and their peak.

        with FakeTensorMode(), LiveBytes() as live:
            with live.label("base"):
                model = ...
            live.reset_peak()
            ...
        live.peak_bytes, live.peak_by_label  # the most bytes alive after any operation since then

    Enter it inside a FakeTensorMode, not around one. A storage is counted once, however many views it has, from the
    operation that creates it until its last owner releases it.

    Not counted: earlier tensors, unless they are registered; tensors on the meta device; sparse tensors; workspaces of
    kernels; what an allocator wastes; a change of a storage's size. In such a mode autograd adds two gradients of one
    tensor into a third, which takes up to one tensor more.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._label = "other"
        # id -> storage, bytes, label
        self._counted: dict[int, tuple[weakref.ref[UntypedStorage], int, str]] = {}
        self._by_label: Counter[str] = Counter()
        self.peak_by_label: dict[str, int] = {}

    @property
    def live_bytes(self) -> int:
        return self._by_label.total()

    @property
    def live_by_label(self) -> dict[str, int]:
        return {label: num_bytes for label, num_bytes in self._by_label.items() if num_bytes}

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak_by_label.values())

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Count tensors created within the block under `name`; the innermost block decides."""
        outer, self._label = self._label, name
        try:
            yield
        finally:
            self._label = outer

    def register(self, what: Tensor | Iterable[Tensor], label: str) -> None:
        """Count tensors that already exist, or give known ones another label."""
        for tensor in [what] if isinstance(what, Tensor) else what:
            if (storage := _storage(tensor)) is not None:
                self._count(storage, label)
        self._note_peak()

    def reset_peak(self) -> None:
        """Restart the peak at what is alive now."""
        self.peak_by_label = self.live_by_label

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _DEVICE_OF:  # half of all calls; the fake mode takes a tenth of a millisecond for each
            return args[0].fake_device
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        storages = [storage for storage in map(_storage, _tensors(result)) if storage is not None]
        new = [storage for storage in storages if id(storage) not in self._counted]
        # A view of an earlier tensor, or a write into it, is no new memory
        given = {id(_storage(each)) for each in _tensors((args, kwargs))} if new else set()
        for storage in new:
            if id(storage) not in given:
                self._count(storage, self._label)
        self._note_peak()
        return result

    def _count(self, storage: UntypedStorage, label: str) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        if key in self._counted:
            self._forget(key)
        self._counted[key] = weakref.ref(storage, lambda _: self._forget(key)), num_bytes, label
        self._by_label[label] += num_bytes

    def _forget(self, key: int) -> None:
        _, num_bytes, label = self._counted.pop(key)
        self._by_label[label] -= num_bytes

    def _note_peak(self) -> None:
        if self.live_bytes > self.peak_bytes:
            self.peak_by_label = self.live_by_label


def _storage(tensor: Tensor) -> UntypedStorage | None:
    """The memory behind a tensor; None on the meta device, and for a sparse tensor."""
    # A fake tensor has the device that it stands for; only its storage is on meta.
    device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
    return None if device.type == "meta" or tensor.layout != torch.strided else tensor.untyped_storage()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
