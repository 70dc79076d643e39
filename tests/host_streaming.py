"""`qdora` with streamed blocks, without a GPU: `python -m tests.host_streaming train ...`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from qdora.cli import main
from qdora.memory.stream import HostResidency
from qdora.run import base as load_base
from tests.support import LateCopies

load_model = load_base.load_model


def load_streamed(*args: Any, **options: Any) -> PreTrainedModel:
    """Three blocks are streamed; their copies come as late as a GPU's could."""
    return load_model(*args, **options | {"placer": HostResidency(3, copies=LateCopies)})


if __name__ == "__main__":
    load_base.load_model = load_streamed
    main()
