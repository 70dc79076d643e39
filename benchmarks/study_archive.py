"""scores.json.xz: the finished cells of a study with the scores of every example.

It is enough to compute every comparison, damage and repair anew (recompute_study.py), and to go on with the study in
another directory. Adapters and generated answers are not in it.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

from qdora.errors import UserError
from qdora.files.atomic import atomic_write_json, atomic_write_text
from qdora.files.run_directory import RunDirectory
from qdora.recipe.data_settings import is_path
from qdora.study.cells import Expander
from qdora.study.grid import load_study
from qdora.study.results import Results, StudyDirectory, cells_now, read_index

SCORES_FILE = "scores.json.xz"
_KEPT = ("task", "id", "nll", "num_answer_tokens", "acc", "acc_norm", "gold", "loglikelihoods")


def pack(directory: Path) -> bytes:
    """The content of scores.json.xz of a study's directory: study, and of each cell its record, its result, its scores
    (name -> value of each example), and of a trained one [step, loss] of each step that was logged."""
    store, index, cells = StudyDirectory(directory, makes=False), read_index(directory), []
    for cell in index["cells"]:
        result = store.result(cell["key"])
        scores = losses = None
        if result is not None and "files" in result:
            rows = json.loads((store.cell(cell["key"]) / result["files"]["scores"]).read_bytes())["per_example"]
            scores = {name: [_rounded(row.get(name)) for row in rows] for name in _KEPT}
        if result is not None and cell["kind"] == "trained":
            run = RunDirectory(store.cell(cell["key"]))
            lines = run.metrics() if run.metrics_file.is_file() else []
            losses = [[line["step"], line["loss"]] for line in lines if line.get("loss") is not None]
        if result is not None and "files" in result:
            result = result | {"files": {"scores": result["files"]["scores"]}}
        cells.append({"cell": cell, "result": result, "scores": scores, "losses": losses})
    # Names of this machine are in the settings, which no number depends on, and in sources of the axes
    study = {name: value for name, value in index["study"].items() if name not in ("recipe", "settings")}
    hide_places(study)
    text = json.dumps({"study": study, "cells": cells}, separators=(",", ":"))
    return lzma.compress(text.encode(), preset=6)


def hide_places(study: dict[str, Any]) -> None:
    """Put DATA in the place of the folder of the data, in a study file and in the labels of its axes; and MODEL."""
    axes = (axis.values() for axis in study.get("product", {}).values() if isinstance(axis, dict))
    if is_path(study.get("settings", {}).get("model.source", "builtin")):
        study["settings"]["model.source"] = "MODEL"
    for settings in (study.get("settings", {}), *(choice for axis in axes for choice in axis)):
        for source in settings.get("data.mix", ()):
            if "path" in source:
                source["path"] = f"DATA/{source['task']}"
            elif "name" in source:
                source["source"] = f"DATA/{source['name']}"


def unpack(packed: bytes, grid: Path, directory: Path) -> int:
    """Fill a new study's directory with the finished cells of scores.json.xz, and return how many there are.

    Adapters are not in it, so a cell whose adapter an unfinished one reads is left out, and runs again. In the study
    file the data must be at the paths that it had: they are part of the names of the cells.
    """
    expander, store = Expander(load_study(grid), str(grid)), StudyDirectory(directory)
    if any((directory / "results").glob("*.json")):
        raise UserError(f"{directory}: must have no results yet. Fix: name another directory.")
    archive = json.loads(lzma.decompress(packed))
    done = {each["cell"]["key"]: each for each in archive["cells"] if each["result"] is not None}
    number = -1
    while len(done) != number:  # what reads an adapter may leave one itself
        number = len(done)
        still_read = {each["cell"]["adapter_key"] for each in archive["cells"] if each["cell"]["key"] not in done}
        done = {key: each for key, each in done.items() if key not in still_read}
    if not any(cell.key in done for cell in expander.now().cells):
        raise UserError(f"{grid}: no cell of the archive is in this study. Its data must have the paths that it had.")
    for key, each in done.items():
        _write_cell(each, store.cell(key))
    for key, each in done.items():  # last: with results the directory counts as filled
        store.write_result(key, each["result"])
    return sum(cell.key in done for cell in cells_now(expander, Results(store, expander.study)).cells)


def _write_cell(each: dict[str, Any], directory: Path) -> None:
    """Scores and losses of a cell of the archive, as its run wrote them."""
    directory.mkdir(parents=True, exist_ok=True)
    if each["scores"] is not None:
        file = directory / each["result"]["files"]["scores"]
        file.parent.mkdir(parents=True, exist_ok=True)
        columns = {name: each["scores"][name] for name in _KEPT}
        rows = [zip(columns, row, strict=True) for row in zip(*columns.values(), strict=True)]
        # Scores without choices have no accuracies
        without_none = [{name: value for name, value in row if value is not None} for row in rows]
        atomic_write_json(file, {"per_example": without_none})
    if each["losses"]:
        lines = "".join(json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in each["losses"])
        atomic_write_text(RunDirectory(directory).metrics_file, lines)


def _rounded(value: Any) -> Any:
    """A score to 9 decimals: with 7, a p-value of arms that differ by 1e-4 nats was off by 2e-6."""
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 9) if isinstance(value, float) else value
