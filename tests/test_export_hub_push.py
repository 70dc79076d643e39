"""Uploads against a pretended Hub: private unless asked otherwise, and nothing without asking."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HTTPError

from qdora.errors import RunFailure, UserError
from qdora.export.hub_push import check_repository, push


class FakeHub:
    """Repositories by name, with their visibility and files."""

    def __init__(self, **private: bool) -> None:
        self.private = private
        self.files: dict[str, list[str]] = {}

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        assert exist_ok
        self.private.setdefault(name, private)
        return SimpleNamespace(repo_id=f"me/{name}")

    def repo_info(self, name: str) -> Any:
        return SimpleNamespace(private=self.private[name.removeprefix("me/")])

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        assert commit_message
        self.files[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def use(monkeypatch: pytest.MonkeyPatch, hub: Any) -> Any:
    monkeypatch.setattr("qdora.export.hub_push.HfApi", lambda: hub)
    return hub


def test_a_new_repository_is_private_unless_asked_otherwise(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, FakeHub())
    assert push(export, "mine") == "https://hub/me/mine/commit/1"
    push(export, "shown", private=False)
    assert hub.private == {"mine": True, "shown": False}
    assert hub.files["me/mine"] == ["config.json", "model.safetensors"]


def test_a_public_repository_is_not_written_to_by_accident(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = use(monkeypatch, FakeHub(shown=False))
    with pytest.raises(UserError, match=r"shown is public, .* Fix: upload it .*: hf upload OTHER_NAME .* --private$"):
        push(export, "shown")
    assert hub.files == {}
    push(export, "shown", private=False)
    assert "me/shown" in hub.files


def test_a_hub_that_cannot_be_reached_leaves_the_export(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Offline(FakeHub):
        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
            client: Any = sys.modules[HTTPError.__module__.partition(".")[0]]  # httpx2, or httpx
            raise client.ConnectError("no route to host")

    use(monkeypatch, Offline())
    with pytest.raises(
        RunFailure,
        match=r"no route to host The export is complete\. Fix: .* hf upload mine .* --private$",
    ):
        push(export, "mine")
    assert (export / "config.json").exists()


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "../x", "-x", "a b", "my--model", "a..b", "x.git", "org/model-", 97 * "a"]
)
def test_names_that_the_hub_has_not(name: str) -> None:
    with pytest.raises(UserError, match="must be NAME or ORGANISATION/NAME"):
        check_repository(name)
