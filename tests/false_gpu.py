"""A GPU that is not there: tensors that a CPU computes and that say that they are on a device of their own.

    gpu = FalseGpu()
    with gpu:
        model.to(gpu.device)
        with gpu.phase("step"):
            ...
    gpu.count("launch", "backward"); gpu.lines("wait", "step")

It shows what a GPU's host does, which tensors of a CPU cannot: which operations a GPU would be sent, what is copied
between the host and the device, and where the host would wait for the device. Values are real, so the program runs with
all its branches. A tensor of the device and one of the CPU do not mix, as on a GPU.

    launch  an operation on the device that makes or writes values. Views and allocations are none. One that takes a
            vendor's library several kernels counts once, as does one over a list of tensors, which CUDA cuts into
            kernels of some 30 to 300. Attention is one launch, as by a flash kernel
    copy    between host and device, in either direction
    wait    the host waits until the device is done: a value is read, the shape of a result depends on values, or a copy
            is blocking or touches memory of the host that is not pinned

Not seen: waits inside libraries that do not call torch (bitsandbytes' paged optimizers synchronise once a step), and
explicit synchronisation. The device takes the branches of a GPU wherever the program asks only whether a device is
"cpu"; its name is not "cuda".

It makes torch's PrivateUse1 backend a device for the rest of the process. autograd counts the devices in the first
backward pass of a process or of those that it was forked from, and then starts threads, after which forked processes
cannot compute gradients. So tests run it in processes that are forked from one without any backward pass
(`on_false_gpu`).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import linecache
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from qdora.quant import kernels
from tests import support


class FakeCuda:
    """Streams and events in the place of torch's; `log` has their calls and the copies, in order.

    Entries are (stream, what it does, with what). The stream "main" computes; others are "stream 0" and so on, and
    events "event 0" and so on.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, str, str]] = []
        self.current = FakeStream(self, "main")
        copy, streams, events = Tensor.copy_, itertools.count(), itertools.count()

        def copying(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
            self.log.append((self.current.name, "copies", "" if non_blocking else "and the host waits"))
            return copy(target, source)

        def kept(_: Tensor, stream: FakeStream) -> None:
            self.log.append((stream.name, "uses the memory", ""))

        monkeypatch.setattr(Tensor, "copy_", copying)
        monkeypatch.setattr(Tensor, "record_stream", kept)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(self, f"stream {next(streams)}"))
        monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(self, f"event {next(events)}"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)

    def read(self) -> list[tuple[str, str, str]]:
        """What was logged since the last call."""
        found, self.log = self.log, []
        return found

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class FakeStream:
    """Without other methods, so that a call of one fails."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream | FakeEvent) -> None:
        self._cuda.log.append((self.name, "waits for", other.name))

    wait_event = wait_stream


class FakeEvent:
    """Can only be recorded."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def record(self, stream: FakeStream) -> None:
        self._cuda.log.append((stream.name, "records", self.name))


class FakeCudart:
    """CUDA's page-locked memory: `locked` has its pieces, address -> bytes, and `log` the calls, in order."""

    class cudaError(IntEnum):
        """Of the driver's answers these two."""

        success = 0
        memory = 2

    def __init__(self, most: int = 1 << 60) -> None:
        self.most, self.locked, self.log = most, dict[int, int](), list[str]()

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
        """In the place of torch's; returns self."""
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "_cudart", self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("waits"))
        return self

    def cudaGetErrorString(self, error: cudaError) -> str:
        """As the driver words it."""
        return {0: "no error", 2: "out of memory"}[error]

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> cudaError:
        """Refuses more than `most` bytes in all."""
        assert flags == 0
        if sum(self.locked.values()) + num_bytes > self.most:
            return self.cudaError.memory
        assert address not in self.locked
        self.locked[address] = num_bytes
        self.log.append("locks")
        return self.cudaError.success

    def cudaHostUnregister(self, address: int) -> cudaError:
        """The memory must still be there."""
        assert is_mapped(address)
        del self.locked[address]
        self.log.append("unlocks")
        return self.cudaError.success


def is_mapped(address: int) -> bool:
    """Whether this process has memory there."""
    spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
    return any(int(start, 16) <= address < int(end, 16) for start, end in spans)


TYPE = "false_gpu"
# Imported once for all processes: they need what these import, which takes seconds.
_PRELOADED = ("tests.test_false_gpu", "tests.test_gpu_launches", "tests.test_gpu_waits", "tests.test_model_attention")
Kind = Literal["launch", "copy", "wait"]
aten = torch.ops.aten
_CREATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"}
# The result's shape, or Python's next step, depends on values.
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim"}
_READS |= {"bincount"}
_TORCH = str(Path(torch.__file__).parent)
_CHECKPOINT = str(Path("torch", "utils", "checkpoint.py"))


class Event(NamedTuple):
    """Something that the host asks of the device."""

    kind: Kind
    phase: str
    operation: str
    num_bytes: int
    """Of all tensors that a launch reads or writes, or of a copy."""
    line: str
    """File and text of the innermost line of Python outside torch."""


# id of a tensor's storage -> the memory that it stands for. A storage keeps its Python object as long as it lives.
_MEMORY: dict[int, torch.UntypedStorage] = {}
_PINNED: set[int] = set()
_CUDART = FakeCudart()


def _until_freed(storage: torch.UntypedStorage, forget: Callable[[], object]) -> None:
    weakref.finalize(storage, forget).atexit = False


class _OnDevice(Tensor):
    """A tensor of the false device: its sizes and strides. Its values are in `_MEMORY`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func}: a tensor of {TYPE} is used outside of FalseGpu")

    def tolist(self) -> Any:
        """torch refuses it for tensors of other classes."""
        return self.cpu().tolist()


_MODULE = SimpleNamespace(  # what torch asks of the module torch.false_gpu
    is_available=lambda: True,
    is_initialized=lambda: True,
    current_device=lambda: 0,
    device_count=lambda: 1,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None,
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
)


class _Generator(torch.Generator):
    """The generator of the false device is one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == TYPE else device)


@functools.cache
def _register() -> torch.device:
    _setup_privateuseone_for_python_backend(TYPE, _MODULE)
    return torch.device(TYPE, 0)


class FalseGpu(TorchDispatchMode):
    """While active, tensors can be on `device`, and `events` has what was asked of it.

    The phase of an event is the innermost `phase` of the program, or "recompute" for what a checkpoint computes again
    and "backward" for all else in a backward pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.device = _register()
        self.events: list[Event] = []
        self._phase = "other"
        self._patches: list[ExitStack] = []

    def __enter__(self) -> FalseGpu:
        patches, has_kernels = ExitStack(), kernels.is_available
        for owner, name, ours in (
            (kernels, "is_available", lambda kind: has_kernels("cpu" if kind == TYPE else kind)),
            (torch, "Generator", _Generator),
            (torch, "tensor", _tensor),
            (torch.nn.functional, "scaled_dot_product_attention", _attention(self.device)),
            (torch.cuda, "cudart", lambda: _CUDART),
            (torch.cuda, "_cudart", _CUDART),
            (torch.cuda, "synchronize", lambda: None),
        ):
            patches.enter_context(patch.object(owner, name, ours))
        self._patches.append(patches)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.pop().close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the phase of what happens in the block, outside of backward passes."""
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    def count(self, kind: Kind, phase: str | None = None) -> int:
        """How many events there were, in a phase or in all."""
        return len(self.lines(kind, phase))

    def lines(self, kind: Kind, phase: str | None = None) -> list[str]:
        """The lines of Python of these events, in order."""
        return [each.line for each in self.events if each.kind == kind and phase in (None, each.phase)]

    def clear(self) -> None:
        """Forget the events."""
        self.events.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = list(_tensors((args, kwargs)))
        ours = [each for each in given if isinstance(each, _OnDevice)]
        name = func._schema.name.partition("::")[2]
        if name in ("is_pinned", "_pin_memory") and not ours:
            return _pin(given[0]) if name == "_pin_memory" else _is_pinned(given[0])
        target = kwargs.get("device")
        on_device = bool(ours) if target is None else torch.device(target).type == TYPE
        if not ours and not on_device:
            pinned = kwargs.pop("pin_memory", False)
            made = func(*args, **kwargs)
            return _pin(made) if pinned else made
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        _check_devices(name, given, target)
        inner = {id(each): _values(each) for each in ours}
        values = self.kernel(func)(*_replaced(args, inner), **_replaced(kwargs, inner))
        self._note(func, name, args, kwargs, values, on_device)
        outer = {id(inner[id(each)]): each for each in ours}
        shared = {inner[id(each)].untyped_storage()._cdata: each for each in ours}
        return self._on_device(values, outer, shared) if on_device and name != "_local_scalar_dense" else values

    def kernel(self, func: Any) -> Callable[..., Any]:
        """What computes the values of an operation from tensors of the CPU."""
        if func is aten.mm.dtype:  # a product whose sums are written in a wider dtype, which a CPU lacks
            return lambda left, right, out_dtype: left.to(out_dtype) @ right.to(out_dtype)
        return func  # type: ignore[no-any-return]

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, values: Any, on_device: bool) -> None:
        """Record what an operation asks of the device."""
        there = [isinstance(each, _OnDevice) for each in _tensors(args)]
        if name in ("_to_copy", "copy_") and there[0] != (there[1] if name == "copy_" else on_device):
            made = list(_tensors(values)) if name == "_to_copy" and there[0] else []
            (host,) = made or [each for each in _tensors(args) if not isinstance(each, _OnDevice)]
            self._note_copy(name, host, kwargs.get("non_blocking", args[-1]) is True)
            return
        index = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        by_mask = any(each.dtype in (torch.bool, torch.uint8) for each in _tensors(index))
        by_mask = by_mask and (name == "index" or args[2].numel() > 1)  # to write one value asks nothing of the mask
        lengths = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _READS or by_mask or lengths:
            self._add("wait", name, 0)
        makes = name not in _CREATES and name != "_local_scalar_dense" and not _is_view(func)
        made = values if func._schema.returns else args  # lists of tensors are changed in place without a result
        if makes and any(each.numel() for each in _tensors(made)):
            read = values if name == "index_select" else args  # a gather reads what it takes
            self._add("launch", name, sum(each.nbytes for each in _tensors((read, values))))

    def _note_copy(self, name: str, host: Tensor, non_blocking: bool) -> None:
        if host.numel():
            self._add("copy", name, host.nbytes)
            if not non_blocking or not _is_pinned(host):
                self._add("wait", name, 0)

    def _add(self, kind: Kind, operation: str, num_bytes: int) -> None:
        line, is_recomputed = _line_of_caller()
        phase = self._phase
        if torch._C._current_graph_task_id() != -1:
            phase = "recompute" if is_recomputed else "backward"
        self.events.append(Event(kind, phase, operation, num_bytes, line))

    def _on_device(self, value: Any, outer: dict[int, Tensor], shared: dict[int, Tensor]) -> Any:
        """The results as tensors of the device: the arguments themselves, views of them, or new ones."""
        if isinstance(value, (list, tuple)):
            return type(value)(self._on_device(each, outer, shared) for each in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) in outer:
            return outer[id(value)]
        storage = value.untyped_storage()
        made: Tensor = Tensor._make_wrapper_subclass(
            _OnDevice,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=self.device,
            storage_size=storage.nbytes(),
        )
        base = shared.get(storage._cdata)
        if base is not None:
            torch._functionalize_unsafe_set(made, base)
        else:
            key = id(made.untyped_storage())
            _MEMORY[key] = storage
            _until_freed(made.untyped_storage(), functools.partial(_MEMORY.pop, key))
        return made


def _on_false_gpu(module: str, name: str, options: dict[str, Any]) -> None:
    with FalseGpu() as gpu:
        getattr(importlib.import_module(module), name).__wrapped__(gpu, **options)


def on_false_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test that runs in a process of its own, with an active FalseGpu as its first argument.

    Its other arguments, parameters and fixtures, are pickled.
    """

    @functools.wraps(test)
    def run(**options: Any) -> None:
        fault = support.run_from_server(_on_false_gpu, test.__module__, test.__name__, options, preload=_PRELOADED)
        assert not fault, fault

    others = list(inspect.signature(test).parameters.values())[1:]
    run.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
    return run


def _values(tensor: Tensor) -> Tensor:
    """The values of a tensor of the device, as a tensor of the CPU that shares their memory."""
    memory = _MEMORY[id(tensor.untyped_storage())]
    return torch.empty(0, dtype=tensor.dtype).set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def _is_pinned(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    return id(storage) in _PINNED or storage.data_ptr() in _CUDART.locked


def _pin(tensor: Tensor) -> Tensor:
    """A copy that counts as pinned."""
    pinned = tensor.clone()
    key = id(pinned.untyped_storage())
    _PINNED.add(key)
    _until_freed(pinned.untyped_storage(), functools.partial(_PINNED.discard, key))
    return pinned


def _check_devices(name: str, given: Sequence[Tensor], target: Any) -> None:
    """Numbers (0 dimensions) of the CPU may meet tensors of the device, and copies cross; nothing else does."""
    strangers = [each for each in given if not isinstance(each, _OnDevice) and each.ndim > 0]
    if strangers and target is None and name != "copy_" and len(strangers) < len(given):
        shapes = ", ".join(str(tuple(each.shape)) for each in strangers)
        raise RuntimeError(f"{name}: expected all tensors on one device, got {shapes} on the cpu")


def _is_view(func: Any) -> bool:
    aliases = [each.alias_info for each in func._schema.returns if each.alias_info is not None]
    # The one that is named shares its argument's memory, though its schema does not say so
    return func is aten._unsafe_view.default or any(not each.is_write for each in aliases)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in nested sequences and dicts, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_tensors, values))
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _replaced(values: Any, inner: dict[int, Tensor]) -> Any:
    if isinstance(values, Tensor):
        return inner.get(id(values), values)
    if isinstance(values, (list, tuple)):
        return type(values)(_replaced(each, inner) for each in values)
    return {key: _replaced(each, inner) for key, each in values.items()} if isinstance(values, dict) else values


def _line_of_caller() -> tuple[str, bool]:
    """File and text of the innermost line outside torch and this file, and whether a checkpoint is being recomputed."""
    frame: Any = sys._getframe(1)
    line, recomputed = "", False
    while frame is not None:
        name = frame.f_code.co_filename
        recomputed = recomputed or name.endswith(_CHECKPOINT)
        if not line and name != __file__ and not name.startswith((_TORCH, "<")) and "contextlib" not in name:
            shown = "/".join(Path(name).parts[-2:])
            line = f"{shown}: {linecache.getline(name, frame.f_lineno).strip()}"
        frame = frame.f_back
    return line, recomputed


_plain_tensor = torch.tensor


def _tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
    """torch copies numbers to a device unseen; here that is a copy of a tensor."""
    return _plain_tensor(data, **options).to(device or "cpu")


def _attention(device: torch.device) -> Callable[..., Tensor]:
    plain = torch.nn.functional.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *rest: Any, **options: Any
    ) -> Tensor:
        """By the CPU's flash kernel, in one operation; torch knows no fused attention for a foreign device."""
        if query.device != device or query.shape[-1] != value.shape[-1]:  # which that kernel does not take
            return plain(query, key, value, attn_mask, *rest, **options)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        options = dict(zip(("dropout_p", "is_causal"), rest, strict=False)) | options
        given = {name: options[name] for name in ("dropout_p", "is_causal", "scale") if name in options}
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=attn_mask, **given)[0]

    return attention
