"""Uploads against a pretended Hub: private unless asked otherwise, and nothing without asking."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HTTPError

from qdora.errors import RunFailure, UserError
from qdora.export import hub_push
from qdora.export.hub_push import push
from qdora.export.options import ExportOptions, check_options


class FakeHub:
    """Repositories by name, with their visibility and files."""

    def __init__(self, patch: pytest.MonkeyPatch, **private: bool) -> None:
        self.private = private
        self.files: dict[str, list[str]] = {}
        for name in ("create_repo", "repo_info", "upload_folder"):
            patch.setattr(hub_push, name, getattr(self, name))

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        self.private.setdefault(name, private)
        return SimpleNamespace(repo_id=f"me/{name}")

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private[name.removeprefix("me/")])

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        assert commit_message
        self.files[repo_id] = sorted(path.name for path in folder_path.iterdir())
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def test_a_new_repository_is_private_unless_asked_otherwise(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch)
    assert push(export, "mine") == "https://hub/me/mine/commit/1"
    push(export, "shown", private=False)
    assert hub.private == {"mine": True, "shown": False}
    assert hub.files["me/mine"] == ["config.json", "model.safetensors"]


def test_a_public_repository_is_not_written_to_by_accident(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(monkeypatch, shown=False)
    with pytest.raises(UserError, match=r"shown is public.*hf upload OTHER_NAME .* --private$"):
        push(export, "shown")
    assert hub.files == {}
    push(export, "shown", private=False)
    assert "me/shown" in hub.files


def test_a_hub_that_cannot_be_reached_leaves_the_export(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        client: Any = sys.modules[HTTPError.__module__.partition(".")[0]]  # httpx2, or httpx
        raise client.ConnectError("no route to host")

    monkeypatch.setattr(hub_push, "create_repo", offline)
    with pytest.raises(RunFailure, match=r"no route to host .*hf upload mine .* --private$"):
        push(export, "mine")
    assert (export / "config.json").exists()


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "a b", "my--model", "x.git", 97 * "a"])
def test_names_that_the_hub_has_not(name: str) -> None:
    with pytest.raises(UserError, match="--push: got "):
        check_options(ExportOptions(push=name))
