"""Model cards: licences of bases as their own files state them, and what a card says of a run and of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from qdora.files.run_directory import open_run
from qdora.model.source import ModelSource, public_name
from qdora.recipe.recipe_file import load_recipe
from qdora.run import model_card
from qdora.run.model_card import _licence, _licence_files, run_card

LLAMA = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags: [a]\n---\n# A model\n"
LLAMA_LICENCE = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}


@pytest.mark.parametrize(
    "card, expected",
    [
        ("---\nlicense: apache-2.0\n---\ntext", {"license": "apache-2.0"}),
        (LLAMA, LLAMA_LICENCE),
        ("---\nlicense: [mit, x]\n---\n", {}),
        ("---\ntags: [a]\n---\n", {}),
        ("---\n: {\n---\n", {}),
        ("---\n- license: mit\n---\n", {}),
        ("# A model\n---\nlicense: mit\n---\n", {}),
        ("", {}),
        (None, {}),
    ],
)
def test_what_the_card_of_a_base_says(tmp_path: Path, card: str | None, expected: dict[str, str]) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert _licence(ModelSource("directory", tmp_path, "x")) == expected


def test_a_file_on_the_hub_gets_its_address(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(LLAMA)
    link = "https://huggingface.co/org/name/blob/abc/LICENSE"
    assert _licence(ModelSource("hub", tmp_path, "org/name", "abc")) == LLAMA_LICENCE | {"license_link": link}


def test_the_texts_that_are_passed_on(tmp_path: Path) -> None:
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "other.txt", "LICENSE.huge"):
        (tmp_path / name).write_text(name * (200_000 if name.endswith("huge") else 1))
    (tmp_path / "LICENSES").mkdir()
    assert _licence_files(ModelSource("directory", tmp_path, "x")) == {
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


def test_the_card_of_a_hub_model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of `tiny_run`, as if its base and one of its data sets were on the Hub."""
    (tmp_path / "README.md").write_text(LLAMA)
    (tmp_path / "LICENSE").write_text("the text")
    source = ModelSource("hub", tmp_path, "org/base", "abc")
    monkeypatch.setattr(model_card, "find_source", lambda *_, **__: source)
    monkeypatch.setattr(model_card, "_data_id", lambda source: {"sums": "org/sums"}.get(source.label))
    recipe = load_recipe(str(whole / "recipe.yaml"))
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"source": "org/base"})})
    numbers = {"max_logit_difference": 0.03619, "kl_mean": 1.6e-6, "argmax_agreement": 1.0}
    check: dict[str, Any] = {"passed": True, "num_positions": 85, "exported_vs_reference": numbers}
    text = run_card(open_run(whole), recipe, "final", check, form="merged")
    front = yaml.safe_load(text.split("---\n")[1])
    link = "https://huggingface.co/org/base/blob/abc/LICENSE"
    assert front == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["org/sums"],
        "library_name": "transformers",
        "license": "other",
        "license_name": "llama3",
        "license_link": link,
        "pipeline_tag": "text-generation",
        "tags": ["qdora"],
    }
    assert "Fine-tuned from `org/base` at revision `abc` with qdora " in text
    assert "- sums: [org/sums](https://huggingface.co/datasets/org/sums) (" in text
    assert (
        "passed on 85 tokens. Against the adapter in float32: largest logit difference 0.0362, mean KL 1.6e-06" in text
    )
    assert f"The base has the licence [`llama3`]({link}), which also applies to this model." in text
    assert "Its texts are beside this card: `LICENSE`." in text
    for heading in ("Training", "Data", "Results", "Verification", "Licence"):
        assert f"\n\n## {heading}\n\n" in text
    assert text.index("| data | task | metric |") > text.index("## Results")


def test_the_card_of_a_local_model_names_no_path(whole: Path) -> None:
    text = run_card(open_run(whole), load_recipe(str(whole / "recipe.yaml")), "final")
    assert "base_model" not in text.split("---\n")[1]
    assert str(whole.parent) not in text
    assert "No licence of the base was found." in text
    assert "## Verification" not in text
