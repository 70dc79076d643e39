"""Change PEFT's 4-bit layers when PEFT is imported. Python runs this file at its start where `python -m qdora.peft` has
put its folder in front of PYTHONPATH: in the command and in every process that it starts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


def _say(text: str) -> None:
    print(f"qdora.peft: {text} (process {os.getpid()})", file=sys.stderr, flush=True)


def _patch(module: ModuleType) -> None:
    module.patch()
    _say(f"the 4-bit LoRA and DoRA layers of PEFT {module.peft.__version__} are qdora's")


def _mend_llama_factory(module: ModuleType) -> None:
    """LLaMA-Factory 0.9.5 calls the method "bnb", transformers "bitsandbytes", so it refuses DoRA on 4-bit bases."""
    if module.QuantizationMethod.BNB == "bnb":
        module.QuantizationMethod = SimpleNamespace(BNB="bitsandbytes")  # type: ignore[attr-defined]
        _say("LLaMA-Factory's check of DoRA's base takes bitsandbytes")


def _add_axolotl_plugin(module: ModuleType) -> None:
    """qdora's turns off axolotl's fused kernels, which would run in place of PEFT's layers."""
    prepare = module.prepare_plugins

    def prepare_with_ours(cfg: Any) -> None:
        cfg["plugins"] = [*(cfg.get("plugins") or []), "qdora.peft.AxolotlPlugin"]
        prepare(cfg)

    module.prepare_plugins = prepare_with_ours  # type: ignore[attr-defined]


_CALLS: dict[str, Callable[[Any], object]] = {
    # Not complete if it is what imports PEFT: so `_patch` comes after it
    "peft": lambda _: importlib.import_module("qdora.peft"),
    "qdora.peft": _patch,
    "llamafactory.model.adapter": _mend_llama_factory,
    "axolotl.cli.config": _add_axolotl_plugin,
}


class _AfterImport:
    """A finder that lets others find a module and calls a function whenever the module has been run. Programs also ask
    whether a module is there and do not run it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in _CALLS:
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            _CALLS[name](module)

        spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec


_ROOT = os.path.dirname(os.path.dirname(_HERE))
if _ROOT not in sys.path:  # a checkout that is not installed
    sys.path.append(_ROOT)
sys.meta_path.insert(0, _AfterImport())
_others = [folder for folder in sys.path if os.path.abspath(folder) != _HERE]
_existing = PathFinder.find_spec("sitecustomize", _others)
if _existing is not None and _existing.loader is not None:
    _existing.loader.exec_module(importlib.util.module_from_spec(_existing))
