"""The consoles print what they are given."""

from __future__ import annotations

import pytest
from rich.table import Table

from qdora.files.console import bar, consoles


@pytest.mark.parametrize("name", ["lr[best]", "runs/[/b]", "qa[hard] :smile:"])
def test_names_in_brackets_are_printed_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdora.files.console._shown", {"progress": True, "results": True})  # as without --json
    for console in consoles():
        table = Table(name)
        table.add_row(name)
        console.print(table)
        console.print(f"run: {name}", soft_wrap=True)
        with bar(console, name):
            pass
    shown = capsys.readouterr()
    assert shown.out.count(name) == shown.err.count(name) == 4
