"""qdora validate."""

from __future__ import annotations

from pathlib import Path

from qdora.cli.shared_options import Recipe, Set
from qdora.cli.verb import emit, verb
from qdora.errors import UserError


@verb
def validate(recipe: Recipe, set_: Set = None) -> None:
    """Check a recipe and print it with its defaults.

    Settings, paths, the config of a model in a directory, and the columns and first rows of data on this machine are
    checked. With `data.too_long: error` all of this data is read, and examples that are too long are reported.
    `qdora plan` reads all data.
    """
    from qdora.recipe.data_settings import is_path
    from qdora.recipe.recipe_file import load_recipe, missing_files, resolved_yaml, settings

    loaded = load_recipe(recipe, set_ or [])
    faults = missing_files(loaded, recipe)
    if faults:
        raise UserError(*faults)
    if is_path(loaded.model.source) and Path(loaded.model.source).is_dir():
        from qdora.model.source import check_directory

        check_directory(Path(loaded.model.source), weights=False)
    local = [source.label for source in loaded.data.mix if source.is_local]
    if local:
        from qdora.run.prepare import check_data

        check_data(loaded, local)
    emit(settings(loaded), plain=resolved_yaml(loaded))
