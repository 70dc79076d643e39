"""qdora guide."""

from __future__ import annotations

from importlib import resources
from typing import Annotated

import typer

from qdora.cli.verb import emit, verb, wants_json
from qdora.errors import UserError, not_one_of


@verb
def guide(
    topic: Annotated[str | None, typer.Argument(help="Print this guide; default: list all.")] = None,
) -> None:
    """List the guides, or print one."""
    texts = {
        file.name.removesuffix(".md"): file.read_text(encoding="utf-8")
        for file in sorted(resources.files("qdora").joinpath("guide").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".md")
    }
    if topic is None:
        titles = {name: text.splitlines()[0].lstrip("# ") for name, text in texts.items()}
        width = max(map(len, titles))
        emit({"guides": titles}, plain="".join(f"{name:<{width}}  {title}\n" for name, title in titles.items()))
        return
    if topic not in texts:
        raise UserError(not_one_of("guide", topic, texts))
    if wants_json():
        emit({"topic": topic, "text": texts[topic]})
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(texts[topic]))
