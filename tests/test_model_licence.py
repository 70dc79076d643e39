"""Licences of bases: what their own files say, and nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdora.model.licence import Licence, licence_files, licence_of
from qdora.model.source import ModelSource, public_name
from qdora.run.model_card import CardFacts, model_card

LLAMA = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags: [a]\n---\n# A model\n"


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: apache-2.0\n---\ntext", Licence("apache-2.0")),
        (LLAMA, Licence("other", "llama3", "LICENSE")),
        ("---\nlicense: [mit, x]\n---\n", None),
        ("---\ntags: [a]\n---\n", None),
        ("---\n: {\n---\n", None),
        ("# A model\n---\nlicense: mit\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("", None),
        (None, None),
    ],
)
def test_what_a_card_says(tmp_path: Path, card: str | None, expected: Licence | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(ModelSource("directory", tmp_path, "x")) == expected


def test_a_file_on_the_hub_gets_its_address(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(LLAMA)
    found = licence_of(ModelSource("hub", tmp_path, "org/name", "abc"))
    assert found == Licence("other", "llama3", "https://huggingface.co/org/name/blob/abc/LICENSE")
    text = model_card(CardFacts(base_name="org/name", licence=found))
    assert "\nlicense: other\nlicense_link: https://huggingface.co/org/name/blob/abc/LICENSE\nlicense_name: ll" in text
    assert "has the licence [`llama3`](https://huggingface.co/org/name/blob/abc/LICENSE), which also applies" in text


def test_the_texts_that_are_passed_on(tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "other.txt", "LICENSE.huge"):
        (tmp_path / name).write_text(name * (200_000 if name.endswith("huge") else 1))
    (tmp_path / "LICENSES").mkdir()
    assert licence_files(ModelSource("directory", tmp_path, "x")) == {
        "LICENSE": "LICENSE",
        "NOTICE.txt": "NOTICE.txt",
        "USE_POLICY.md": "USE_POLICY.md",
    }


def test_what_others_find_a_model_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert public_name("org/name") == "org/name"
    for local in ("builtin", str(tmp_path), "./model", "~/model", "model.gguf"):
        assert public_name(local) is None
    (tmp_path / "org/name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("org/name") is None
