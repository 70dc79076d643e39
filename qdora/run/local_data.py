"""Checking the lengths of data before a run: `qdora validate`."""

from __future__ import annotations

import logging
from collections.abc import Collection

from qdora.data.build_data import read_data, tokenized_sources
from qdora.errors import HubFailure
from qdora.model.build_model import find_model
from qdora.recipe.settings import Recipe

logger = logging.getLogger("qdora")


def check_lengths(recipe: Recipe, names: Collection[str]) -> None:
    """Read and tokenise some sources of a recipe, as a run does at its start; `data.cache` keeps the tokens for it.

    Without a tokenizer a note says that nothing was checked.

    Raises:
        UserError: Faulty rows, and with data.too_long: error examples that are too long, of all these sources at once.
    """
    try:
        _, tokenizer = find_model(recipe, weights=False)
    except HubFailure as error:  # anything else a run would refuse, too
        logger.info("The lengths of the examples are not checked: there is no tokenizer: %s", error.faults[0])
        return
    train, _ = read_data(recipe.data, names)
    tokenized_sources(recipe.data, tokenizer, train, names)
