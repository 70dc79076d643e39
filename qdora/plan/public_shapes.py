"""The shapes of public models, for plans of models that the Hub does not give: offline, or gated and not yet accepted.

public_shapes.yaml beside this file holds the values of each model's config that decide sizes and layers, and where they
were read. Only plans use it; a run reads the config of the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml
from transformers import AutoConfig, PreTrainedConfig


@dataclass(frozen=True)
class PublicShape:
    """The stored shape of a model.

    Attributes:
        values: The keys of config.json that decide the architecture, with model_type.
        source: Address of the page that the values were read from.
    """

    values: dict[str, Any]
    source: str

    def config(self) -> PreTrainedConfig:
        """The config of a model of this shape."""
        return AutoConfig.for_model(**self.values)


@cache
def public_shapes() -> dict[str, PublicShape]:
    """Hub id -> shape of every model in the file."""
    text = resources.files("qdora.plan").joinpath("public_shapes.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    shapes: dict[str, PublicShape] = {}
    for model in data["models"]:
        source = data["sources"].get(model["source"], model["source"])
        shapes |= dict.fromkeys(model["names"], PublicShape(model["config"], source))
    return shapes
