"""What all tests share: one thread, no network, no GPU unless `-m gpu` asks for it, a folder for tiny runs."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("MPLCONFIGDIR", os.path.expanduser("~/.cache/matplotlib"))  # its list of fonts takes seconds
# What runs keep for later ones goes here, not into the user's cache.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="qdora-tests-")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib.figure
import pytest
from _pytest.mark.expression import Expression
from hypothesis import HealthCheck, settings

# A busy machine takes long to make inputs, which says nothing of the code.
settings.register_profile("qdora", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qdora")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from this process and all that it starts, before torch is imported.

    With a GPU, forks fail, numbers are not the CPU's, and processes share one card.
    """
    if not asks_for_gpu(config.option.markexpr):
        os.environ.update(CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    import torch

    # Tiny tensors: a second thread only waits for the first, and on a busy machine it waits long.
    torch.set_num_threads(1)
    # The first backward pass starts threads if autograd then counts a GPU, and processes forked later cannot compute
    # gradients. A CUDA build of torch without a GPU counts one as soon as a plan has made fake CUDA tensors.
    torch.ones(1, requires_grad=True).backward()


def asks_for_gpu(expression: str) -> bool:
    """Whether `-m expression` selects some tests because of their mark `gpu`."""
    expressed = Expression.compile(expression or "other")

    def selects(gpu: bool, others: bool) -> bool:
        return expressed.evaluate(lambda mark: gpu if mark == "gpu" else others)

    return any(selects(True, others) and not selects(False, others) for others in (False, True))


def pytest_collection_finish() -> None:
    """Leave the million objects of the imported modules out of later garbage collections: one takes 0.3 s with them."""
    gc.collect()
    gc.freeze()


class _Empty:
    """In place of the class of figures, a figure and all of its parts: a file without a drawing."""

    def __getattr__(self, _name: str) -> Any:
        return self

    def __call__(self, *_arguments: Any, **_options: Any) -> Any:
        return self

    def __iter__(self) -> Iterator[None]:
        return iter(())

    def savefig(self, stream: Any, **_options: Any) -> None:
        stream.write("<svg/>")


_Figure = matplotlib.figure.Figure


@pytest.fixture(scope="session", autouse=True)
def _quick_runs() -> Iterator[None]:
    """A third of a tiny run's time goes into figures (see `_figures`), another third into waiting for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure, "Figure", _Empty())
        patch.setattr(os, "fsync", lambda _descriptor: None)
        yield


@pytest.fixture(autouse=True)
def _figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Figures are drawn in tests that are marked `figures`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("figures") is not None:
            patch.setattr(matplotlib.figure, "Figure", _Figure)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a module's runs keep their model and data."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """A run of the tiny recipe that nothing disturbed."""
    from qdora.run.run import train_run  # most tests do not need it
    from tests import support

    train_run(support.tiny_recipe(root), root / "whole")
    return root / "whole"


@pytest.fixture(scope="session")
def dora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of DoRA on a Llama whose rows are whole blocks of 64: a run to export, in a folder with its model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from qdora.run.run import train_run
    from tests import support

    root = tmp_path_factory.mktemp("dora")
    torch.manual_seed(0)
    sizes = support.LM_SIZES | {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 400}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, tie_word_embeddings=True, rope_theta=50000.0))
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter.data *= 5
    model.save_pretrained(root / "model")
    support.tokenizer().save_pretrained(root / "model")
    train_run(support.tiny_recipe(root, train__steps=3, train__lr=0.02), root / "run")
    return root / "run"
