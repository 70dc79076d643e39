"""AdamW for adapters stored in bf16, with no update lost to rounding.

A bf16 parameter keeps the 16 bits that bf16 drops in an int16 beside it (ops/split_float.py). At each step the two are
joined to float32, updated there and split again, so training runs as with float32 parameters while the layers read
bf16. Gradients arrive and accumulate in float32 (`Tensor.grad_dtype`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qdora.ops.split_float import join_float32, split_float32

OptimizerName = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw"]

logger = logging.getLogger("qdora")

# Constants of bitsandbytes' 8-bit format; they are made anew, not stored.
_NOT_STORED = ("qmap1", "qmap2")


class AdapterOptimizer:
    """AdamW over named parameters, stored in bf16 or float32.

    Matrices take the named optimizer. Vectors (magnitudes, biases, norms) always take torch's AdamW with float32
    states and no weight decay: 8-bit states start at 4,096 elements in bitsandbytes, and a magnitude has one number a
    row that must not be quantised away.

    Args:
        parameters: Path -> trainable parameter, bf16 or float32.
        name: paged_adamw_8bit, paged_adamw_32bit (bitsandbytes; paged on CUDA, the same arithmetic unpaged
            elsewhere) or adamw (torch, fused).
        lr, betas, eps, weight_decay: AdamW, arXiv 1711.05101.
    Raises:
        ValueError: For another storage dtype.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        name: OptimizerName = "adamw",
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = dict(parameters)
        self._masters: dict[str, nn.Parameter] = {}
        self._residuals: dict[str, Tensor] = {}
        for key, parameter in self.parameters.items():
            if parameter.dtype == torch.bfloat16:
                parameter.grad_dtype = torch.float32
                self._residuals[key] = torch.zeros_like(parameter, dtype=torch.int16)
                self._masters[key] = nn.Parameter(torch.empty(0, device=parameter.device))
            elif parameter.dtype == torch.float32:
                self._masters[key] = parameter
            else:
                raise ValueError(f"{key} is stored in {parameter.dtype}; allowed: bfloat16, float32.")
        matrices = [key for key, parameter in self.parameters.items() if parameter.ndim >= 2]
        vectors = [key for key, parameter in self.parameters.items() if parameter.ndim < 2]
        self._inner: list[tuple[list[str], torch.optim.Optimizer]] = []
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        if matrices:
            masters = [self._masters[key] for key in matrices]
            self._inner.append((matrices, _matrix_optimizer(name, masters, options | {"weight_decay": weight_decay})))
        if vectors:
            masters = [self._masters[key] for key in vectors]
            self._inner.append((vectors, torch.optim.AdamW(masters, **options, weight_decay=0.0, fused=True)))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate `lr`; parameters without a gradient stay as they are.

        Meanwhile all parameters are there in float32 (4 bytes each), when activations are not.
        """
        self._join()
        for _, inner in self._inner:
            for group in inner.param_groups:
                group["lr"] = lr
            inner.step()
        self._split()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Euclidean norm of all gradients together, a float32 scalar."""
        grads = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        if not grads:
            return torch.zeros(())
        norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in grads])
        total: Tensor = torch.linalg.vector_norm(norms)
        return total

    @torch.no_grad()
    def scale_gradients_(self, factor: Tensor | float) -> None:
        """Multiply every gradient by `factor`."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def master(self, key: str) -> Tensor:
        """The full float32 value of a parameter, a new tensor."""
        parameter = self.parameters[key].detach()
        return join_float32(parameter, self._residuals[key]) if key in self._residuals else parameter.clone()

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resume needs beside the parameters: 'residual/<path>' and 'state/<path>/<name>'."""
        tensors = {f"residual/{key}": residual for key, residual in self._residuals.items()}
        for keys, inner in self._inner:
            for key in keys:
                for name, value in inner.state.get(self._masters[key], {}).items():
                    if name not in _NOT_STORED:
                        stored = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.int64)
                        tensors[f"state/{key}/{name}"] = stored.detach()
        return tensors

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. bitsandbytes' states are made first and filled, so they stay paged.

        Raises:
            ValueError: If a tensor is missing, unknown or of another shape: all of them at once.
        """
        self._check_names(tensors)
        for key, residual in self._residuals.items():
            residual.copy_(tensors[f"residual/{key}"])
        self._join()
        for keys, inner in self._inner:
            for index, key in enumerate(keys):
                prefix = f"state/{key}/"
                stored = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
                if stored:
                    _load_state(inner, self._masters[key], index, stored)
        self._split()

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        prefixes = [f"state/{key}/" for key in self.parameters]
        faults = [f"residual/{key} is missing" for key in self._residuals if f"residual/{key}" not in tensors]
        for name, tensor in tensors.items():
            key = name.removeprefix("residual/")
            if name.startswith("residual/"):
                if key not in self._residuals:
                    faults.append(f"{name} belongs to no parameter")
                elif tensor.shape != self._residuals[key].shape:
                    faults.append(f"{name} is {tuple(tensor.shape)}, not {tuple(self._residuals[key].shape)}")
            elif not name.startswith(tuple(prefixes)):
                faults.append(f"{name} belongs to no parameter")
        # A missing state would silently start Adam anew for its parameter. A run saved before its first step has none.
        started = [key for key in self.parameters if any(n.startswith(f"state/{key}/") for n in tensors)]
        if started:
            faults += [f"state/{key} is missing" for key in self.parameters if key not in started]
        if faults:
            raise ValueError("optimizer state does not fit these parameters: " + "; ".join(faults[:5]))

    def _join(self) -> None:
        for key, residual in self._residuals.items():
            parameter, master = self.parameters[key], self._masters[key]
            master.data = join_float32(parameter.detach(), residual)
            master.grad = parameter.grad

    def _split(self) -> None:
        for key, residual in self._residuals.items():
            master = self._masters[key]
            high, low = split_float32(master.detach())
            self.parameters[key].copy_(high)
            residual.copy_(low)
            master.grad = None
            master.data = torch.empty(0, device=high.device)


def _matrix_optimizer(
    name: OptimizerName, masters: list[nn.Parameter], options: dict[str, Any]
) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(masters, **options, fused=True)
    bits = 8 if name == "paged_adamw_8bit" else 32
    if masters[0].device.type == "cuda":
        paged: torch.optim.Optimizer = (bnb.optim.PagedAdamW8bit if bits == 8 else bnb.optim.PagedAdamW32bit)(
            masters, **options
        )
        return paged
    logger.warning("%s: no CUDA here, so its states are not paged; the arithmetic is the same.", name)
    plain: torch.optim.Optimizer = (bnb.optim.AdamW8bit if bits == 8 else bnb.optim.AdamW32bit)(masters, **options)
    return plain


def _load_state(inner: torch.optim.Optimizer, master: nn.Parameter, index: int, stored: dict[str, Tensor]) -> None:
    names = {"step", "exp_avg", "exp_avg_sq"}
    if isinstance(inner, torch.optim.AdamW):
        if stored.keys() != names or any(stored[n].shape != master.shape for n in names - {"step"}):
            raise ValueError(f"optimizer state does not fit a parameter of {tuple(master.shape)}: {sorted(stored)}")
        inner.state[master] = {
            name: tensor.to(torch.float32 if name == "step" else tensor.dtype).to(master.device).clone()
            for name, tensor in stored.items()
        }
        return
    inner.init_state(inner.param_groups[0], master, 0, index)  # type: ignore[attr-defined]
    state = inner.state[master]
    shapes = {
        name: value.shape for name, value in state.items() if isinstance(value, Tensor) and name not in _NOT_STORED
    }
    if shapes != {name: tensor.shape for name, tensor in stored.items() if name != "step"} or "step" not in stored:
        raise ValueError(f"optimizer state does not fit a parameter of {tuple(master.shape)}: {sorted(stored)}")
    for name, tensor in stored.items():
        if isinstance(state[name], Tensor):
            state[name].copy_(tensor)
        else:
            state[name] = int(tensor)
