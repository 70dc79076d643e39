"""The base of a run: loaded, or with base.prune pruned once into the run directory and read from there."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from qdora.files.atomic import atomic_directory
from qdora.files.console import Progress, bar
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import Compute
from qdora.model.source import ModelSource
from qdora.model.store import PrunedBase, fingerprints, save_pruned_base
from qdora.prune.pruner import Pruner
from qdora.recipe.recipe_file import settings
from qdora.recipe.settings import Recipe
from qdora.run.load_base import load_base
from qdora.run.prepare import PreparedRun
from qdora.train.distributed import Processes, mesh_of

logger = logging.getLogger("qdora")

FOLDER = "base"
"""Folder of a run directory that holds its pruned base."""

SharedBases = Callable[[str, Callable[[Path], None]], Path]
"""Bases that several runs share: (key, function that fills an empty directory) -> that directory."""


def compress_base(
    recipe: Recipe,
    source: ModelSource,
    compute: Compute,
    calibration: Tensor | None,
    directory: Path,
    *,
    key: str,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune and quantise the base of a recipe and write it to `directory`; returns what compressed.json says.

    `key` is the `compression_key` of the other arguments.

    Raises:
        As `load_model` and `Pruner`.
    """
    prune = recipe.base.prune
    assert prune is not None
    pruner = Pruner(prune, calibration)
    model = load_base(recipe, source, compute, progress, placer=pruner)
    compression = {"prune": settings(recipe)["base"]["prune"], "quant": recipe.base.quant}
    record = save_pruned_base(model, pruner.layers, directory, key=key, settings=compression)
    logger.info(
        "Pruned %d layers by %s: %.2f %% of their %s weights are zero.",
        len(pruner.layers),
        prune.method,
        100 * record["sparsity"],
        f"{record['num_weights']:,}",
    )
    del model
    gc.collect()
    return record


def base_of_run(
    prepared: PreparedRun,
    run: RunDirectory,
    processes: Processes,
    console: Console,
    *,
    resume: bool,
    shared: SharedBases | None = None,
) -> PreTrainedModel:
    """The frozen base of a run. With base.prune the first process prunes it, and all processes read its files.

    With `shared` it is pruned once for all runs with the same key. Each run has the files in its own directory.
    """
    recipe, source, compute = prepared.recipe, prepared.source, prepared.compute
    mesh = mesh_of(processes, compute.device, recipe.train.parallel)
    if recipe.base.prune is None:
        with bar(console, "loading the base") as progress:
            return load_base(recipe, source, compute, progress, mesh=mesh)
    directory = run.inside(FOLDER)

    def compress() -> None:
        found = resume and directory.is_dir()
        if found and run.checkpoint_steps():  # which belong to the base that is there
            return
        key = compression_key(recipe, source, compute, prepared.calibration)
        if found and PrunedBase(directory).key == key:  # else an earlier start with another recipe has left it
            return
        with bar(console, "pruning the base") as progress:

            def fill(path: Path) -> None:
                compress_base(recipe, source, compute, prepared.calibration, path, key=key, progress=progress)

            if shared is None:
                fill(directory)
                return
            made = shared(key, lambda path: fill(path / FOLDER)) / FOLDER
        with atomic_directory(directory) as unfinished:
            shutil.copytree(made, unfinished, dirs_exist_ok=True, copy_function=_link_or_copy)

    processes.first(compress)
    with bar(console, "loading the pruned base") as progress:
        return load_base(recipe, source, compute, progress, placer=PrunedBase(directory), mesh=mesh)


def compression_key(recipe: Recipe, source: ModelSource, compute: Compute, calibration: Tensor | None) -> str:
    """A hash of all that decides a pruned base, 16 hex digits: the model, base.*, the dtype, the calibration tokens."""
    facts = {
        "files": fingerprints(source),
        "base": recipe.base.model_dump(mode="json"),
        "dtype": str(compute.dtype),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    if calibration is not None:
        digest.update(repr(tuple(calibration.shape)).encode() + calibration.numpy().tobytes())
    return digest.hexdigest()[:16]


def _link_or_copy(source: str, target: str) -> None:
    """Link the file, which takes no room: files of a base are replaced, never changed in place."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
