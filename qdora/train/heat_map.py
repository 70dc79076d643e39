"""The picture of an interference report: cosines between tasks, those beyond noise in bold."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qdora.atomic_files import atomic_write_text
from qdora.train.interference import CERTAIN

logger = logging.getLogger("qdora")


def draw_heat_map(report: Mapping[str, Any], path: Path) -> bool:
    """Draw the cosines of a report as SVG; what cannot be drawn is logged and never raises.

    On the diagonal stands the cosine between the two halves of a task's own probe. Cosines are bold where they differ
    from 0 by more than twice their noise.

    Args:
        report: From `qdora.train.interference.measure`, with the `step` it was measured after.
        path: Of the file; its directory is made if needed.
    Returns:
        Whether it was drawn.
    """
    try:
        text = _svg(report)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    except Exception as error:  # as in figures.py: the run is worth more than its pictures
        logger.warning("figures/%s was not drawn: %s: %s", path.name, type(error).__name__, error)
        return False
    return True


def _svg(report: Mapping[str, Any]) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names = report["tasks"]
    cosines = np.array(report["cosines"], dtype=float)  # None becomes nan
    noise = np.array(report["noise"], dtype=float)
    np.fill_diagonal(cosines, np.array(report["own_cosines"], dtype=float))
    side = 2.5 + 0.6 * len(names)
    with mpl.rc_context({"svg.hashsalt": "qdora"}):  # the same run draws the same bytes
        figure = Figure(figsize=(side + 1, side), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(cosines, cmap="RdBu", vmin=-1, vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row in range(len(names)):
            for column in range(len(names)):
                value = cosines[row, column]
                certain = abs(value) > CERTAIN * noise[row, column]
                text = "" if np.isnan(value) else f"{value:.2f}"
                style: dict[str, Any] = {"fontweight": "bold"} if certain else {}
                if row == column:
                    style = {"fontstyle": "italic"}
                axes.text(column, row, text, ha="center", va="center", fontsize="small", **style)
        axes.set_title(f"cosines between the tasks' gradients, step {report['step']}", fontsize="medium")
        figure.colorbar(image, label="cosine; diagonal: between halves of a probe")
        svg = io.StringIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return svg.getvalue()
