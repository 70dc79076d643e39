"""Upload an exported directory to the Hugging Face Hub: only on request, and private by default."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # httpx2's or httpx's
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from qdora.errors import RunFailure, UserError, first_line


def check_repository(name: str) -> None:
    """Raise UserError unless `name` can be the name of a Hub repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push: must be NAME or ORGANISATION/NAME, got {name!r}. {first_line(error)}") from error


def push(directory: Path, name: str, *, private: bool = True) -> str:
    """Upload every file of a complete export as one commit, with the account of `hf auth login`; returns its address.

    A missing repository is created, private or public. An existing one keeps its visibility; a public one is refused
    for a private upload, which would publish the model.

    Raises:
        UserError: The repository `name` (NAME or ORGANISATION/NAME) is public and `private` is asked for.
        RunFailure: The Hub refuses or cannot be reached; nothing on this machine changes.
    """
    api = HfApi()
    upload = f"{shlex.quote(str(directory))}{' --private' if private else ''}"
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.repo_info(repository.repo_id).private:
            raise UserError(
                f"--push: {name} is public, so nothing was uploaded. The export is complete. Fix: upload it to another "
                f"repository with: hf upload OTHER_NAME {upload}"
            )
        commit = api.upload_folder(
            repo_id=repository.repo_id, folder_path=str(directory), commit_message="Model exported by qdora"
        )
    except (HTTPError, OSError) as error:
        first = first_line(error)
        raise RunFailure(
            f"--push: {name}: {first} The export is complete. Fix: upload it with: hf upload {name} {upload}"
        ) from error
    return str(commit)
