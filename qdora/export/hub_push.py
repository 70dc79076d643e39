"""Upload an export to the Hugging Face Hub: only on request, and private by default."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import create_repo, repo_info, upload_folder
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx2's or httpx's

from qdora.errors import RunFailure, UserError, first_line


def push(directory: Path, name: str, *, private: bool = True) -> str:
    """Upload every file as one commit, with the account of `hf auth login`; returns its address.

    A missing repository (NAME or ORGANISATION/NAME) is created; an existing one keeps its visibility. UserError for a
    private upload to a public one, RunFailure if the Hub refuses or cannot be reached.
    """
    files = f"{shlex.quote(str(directory))}{' --private' if private else ''}"
    try:
        repository = create_repo(name, private=private, exist_ok=True).repo_id
        if private and not repo_info(repository).private:
            fix = f"The export is complete. Fix: hf upload OTHER_NAME {files}"
            raise UserError(f"--push: {name} is public, so nothing was uploaded. {fix}")
        return str(upload_folder(repo_id=repository, folder_path=directory, commit_message="Model exported by qdora"))
    except (HTTPError, OSError) as error:
        fix = f"The export is complete. Fix: hf upload {name} {files}"
        raise RunFailure(f"--push: {name}: {first_line(error)} {fix}") from error
