"""What the figures of a study's report share: sizes, colours, markers, and the legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
STROKES = ("-", "--", ":", "-.")
SHADE = "#777777"
WIDE, NARROW = 11.0, 4.0  # inches: at 10 points, letters have about 13 pixels on a page and on a telephone
_MARKERS = "osD^vPX*"


def styles_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    number = len(COLORS)
    return {
        name: (COLORS[index % number], _MARKERS[(index + index // number) % len(_MARKERS)])
        for index, name in enumerate(names)
    }


def legend(figure: Figure, drawn: Mapping[str, Any], wide: bool) -> None:
    """Above the figure, in as many columns as the longest name allows, if anything is named; name -> what is drawn."""
    if not drawn:
        return
    columns = max(1, (100 if wide else 34) // (6 + max(map(len, drawn))))
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper left", ncols=columns, fontsize="small")
