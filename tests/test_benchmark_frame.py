"""The frame of the benchmarks: options, result files, tables and pages; nothing is measured."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import frame
import measure
from frame import BENCHES, bench

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages() -> Any:
    """The script that writes the tables, which imports every benchmark."""
    return importlib.import_module("readme_tables")


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(frame, "BENCHES", {})
    monkeypatch.setattr(frame, "RESULTS", tmp_path)


def run(*arguments: str) -> dict[str, Any]:
    """The result file of the call, in the frame's own place."""
    frame.main(arguments, __name__)
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else frame.RESULTS / "speed.json"
    result: dict[str, Any] = json.loads(Path(out).read_text())
    return result


def test_options_have_the_types_of_their_defaults_and_smoke_yields_to_them(
    benches: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @bench(smoke={"rounds": 2, "sizes": (1,)})
    def speed(
        data: Path | None, rounds: int = 9, share: float = 0.5, sizes: tuple[int, ...] = (4, 8), *, smoke: bool,
        all_of: bool = False,
    ) -> dict[str, Any]:  # fmt: skip
        return {"given": [None if data is None else data.name, rounds, share, *sizes, smoke, all_of]}

    whole = run("some/DIR", "--sizes", "3", "5", "--share", "2", "--all-of")
    assert whole["given"] == ["DIR", 9, 2.0, 3, 5, False, True]
    assert whole["command"].split()[2:] == shlex.split("DATA --sizes 3 5 --share 2.0 --all-of")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == whole
    assert {"commit", "device", "num_threads", "versions"} < set(whole)
    for order in (["--smoke", "--rounds", "7"], ["--rounds", "7", "--smoke"]):
        assert run(*order, "--out", str(tmp_path / "small.json"))["given"] == [None, 7, 0.5, 1, True, False]
    assert frame.smoke_place("speed.json").name == "smoke-speed.json"
    frame.main(["--smoke"], __name__)
    assert json.loads((tmp_path / "speed.json").read_text()) == whole, "a smoke test replaces no result"
    with pytest.raises(SystemExit):
        frame.main([], __name__)
    assert "DATA is missing" in capsys.readouterr().err

    @bench()
    def other() -> dict[str, Any]:
        raise AssertionError

    assert run("speed", "DIR")["command"].endswith(" speed DATA"), "of several benchmarks one is named"
    with pytest.raises(SystemExit):
        frame.main([], __name__)


def test_rows_are_saved_one_by_one_and_stay_unless_they_come_again(benches: None, tmp_path: Path) -> None:
    @bench(rows="sizes", keep=True)
    def speed(sizes: tuple[int, ...] = (2, 1), value: int = 5, fails: bool = False) -> Iterator[tuple[str, int]]:
        for size in sizes:
            yield str(size), value
        if fails:
            raise ValueError
        return {"end": len(sizes)}

    assert run()["sizes"] == {"2": 5, "1": 5}
    with pytest.raises(ValueError):
        run("--sizes", "3", "--value", "9", "--fails")
    again = run("--sizes", "1", "--value", "4")
    assert (again["sizes"], again["end"]) == ({"2": 5, "1": 4, "3": 9}, 1)


def test_contenders_alternate_and_ratios_are_of_the_same_round() -> None:
    order: list[str] = []
    readings = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}  # type: ignore[misc]
    found = measure.alternating(readings, 2, warmup=1)
    assert "".join(order) == "cab" + "abc" + "bca"
    assert found == {"a": [4, 9], "b": [5, 7], "c": [6, 8]}
    same = measure.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])  # 2, 3 and 1
    assert same == {"median": 2.0, "lower": 1.5, "upper": 2.5}
    assert measure.spread([3.0]) == {"median": 3.0, "lower": 3.0, "upper": 3.0}


def test_a_function_runs_in_a_process_of_its_own() -> None:
    assert measure.alone(measure.spread, [1.0, 2.0, 6.0]) == {"median": 2.0, "lower": 1.5, "upper": 4.0}
    with pytest.raises(RuntimeError, match="this system has no VmNone"):
        measure.alone(measure.status_bytes, "VmNone")


def test_commands_of_the_pages_are_those_of_the_benchmarks_and_of_their_result_files(pages: Any) -> None:
    def plain(words: list[str]) -> list[str]:
        """Without script and name, which may be those of an earlier version, and options that say where files are."""
        return re.sub(r"--(out|work|llama-cpp) \S+", "", " ".join(words)).replace(",", " ").split()

    shown, num_checked = set(), 0
    sources = "".join(file.read_text() for file in (ROOT / "benchmarks").glob("*.py"))
    for section in (part for page in pages.PAGES[1:] for part in page.read_text().split("\n## ")):
        blocks = "".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL))
        for line in re.sub(r"^\w+=\w+ ", "", blocks, flags=re.MULTILINE).replace(" && ", "\n").splitlines():
            program, script, *options = shlex.split(line, comments=True)
            assert program == "python"
            names = [name for name, each in BENCHES.items() if each.run.__module__ == Path(script).stem]
            if not names:  # with options of its own
                assert all(f'"{option}"' in sources for option in options if option.startswith("--")), script
                continue
            name = options.pop(0) if len(names) > 1 else names[0]
            parser = argparse.ArgumentParser(script)
            frame._add_options(parser, BENCHES[name])
            parser.parse_args(options)
            shown.add(name)
            out = ROOT / (
                options[options.index("--out") + 1] if "--out" in options else f"benchmarks/results/{name}.json"
            )
            if "<!-- table" in section and out.is_file() and "--smoke" not in options:
                command = re.sub(r"^\w+=\w+ ", "", json.loads(out.read_text())["command"])
                assert plain(options) == plain([word for word in shlex.split(command)[2:] if word not in BENCHES]), name
                num_checked += 1
    assert shown == set(BENCHES)
    assert num_checked >= len(BENCHES) // 2
