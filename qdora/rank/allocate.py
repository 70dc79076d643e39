"""Ranks for all layers under one budget of parameters, from the worth of each rank component.

A component is worth the next-largest energy of its layer's spectrum and costs as many parameters as one rank more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdora.errors import UserError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LayerSpectrum:
    """The worth of each component of a layer.

    Attributes:
        energies: (most,) worth of the first, second, ... component; never rising, never negative.
        cost: Parameters of a component.
    """

    energies: Array
    cost: int


def allocate(spectra: Mapping[str, LayerSpectrum], budget: int) -> dict[str, int]:
    """Ranks of large summed energy whose parameters fit into the budget; at least 1.

    Components are taken by energy per parameter as long as they fit: the best ranks hold at most the energy of one
    component more. Beyond rank 1 no component without energy is given.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = budget - sum(spectrum.cost for spectrum in spectra.values())
    if left < 0:
        least = f"{budget - left:,} parameters for rank 1 everywhere"
        raise UserError(f"--budget: must be at least {least}, got {budget:,}.")
    components = [
        (float(energy) / spectrum.cost, name)
        for name, spectrum in spectra.items()
        for energy in spectrum.energies[1:]
        if energy > 0
    ]
    # A layer's own stay in their order: they never rise
    for _, name in sorted(components, key=lambda each: -each[0]):
        if spectra[name].cost <= left:
            ranks[name] += 1
            left -= spectra[name].cost
    return ranks
