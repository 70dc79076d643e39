"""The frame of the benchmarks: options, result files, tables, pages, and the contenders; nothing is measured."""

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
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import frame
import measure
from frame import BENCHES, TABLES, bench, tabulated

from qdora.quant.packed import dequantize

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def pages() -> Any:
    """The script that writes the tables, which imports every benchmark."""
    return importlib.import_module("readme_tables")


@pytest.fixture
def benches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(frame, "BENCHES", {})
    monkeypatch.setattr(frame, "RESULTS", tmp_path)


def run(*arguments: str, name: str = "speed") -> dict[str, Any]:
    """The result file of the call, in the frame's own place."""
    frame.main(arguments, __name__)
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else frame.RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(Path(out).read_text())
    return result


def test_options_have_the_types_of_their_defaults_and_smoke_yields_to_them(
    benches: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @bench(smoke={"rounds": 2, "sizes": (1,)})
    def speed(
        data: Path | None,
        rounds: int = 9,
        share: float = 0.5,
        sizes: tuple[int, ...] = (4, 8),
        *,
        smoke: bool,
        all_of: bool = False,
    ) -> dict[str, Any]:
        return {"given": [None if data is None else data.name, rounds, share, *sizes, smoke, all_of]}

    whole = run("some/DIR", "--sizes", "3", "5", "--share", "2", "--all-of")
    assert whole["given"] == ["DIR", 9, 2.0, 3, 5, False, True]
    assert whole["command"].split()[2:] == shlex.split("DATA --sizes 3 5 --share 2.0 --all-of")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == whole
    assert {"commit", "device", "num_threads", "versions"} < set(whole)
    for order in (["--smoke", "--rounds", "7"], ["--rounds", "7", "--smoke"]):
        small = run(*order, "--out", str(tmp_path / "small.json"))
        assert small["given"] == [None, 7, 0.5, 1, True, False]
    assert frame.smoke_place("speed.json").name == "smoke-speed.json"
    before = (tmp_path / "speed.json").read_text()
    frame.main(["--smoke"], __name__)
    assert (tmp_path / "speed.json").read_text() == before, "a smoke test replaces no result"
    with pytest.raises(SystemExit):
        frame.main([], __name__)
    assert "DATA is missing" in capsys.readouterr().err


def test_a_file_of_several_benchmarks_wants_a_name(benches: None) -> None:
    @bench()
    def speed() -> dict[str, Any]:
        return {"fast": True}

    @bench()
    def other() -> dict[str, Any]:
        raise AssertionError

    assert run("speed")["command"].endswith(" speed")
    with pytest.raises(SystemExit):
        frame.main([], __name__)


def test_rows_are_saved_one_by_one_and_stay_unless_they_come_again(benches: None, tmp_path: Path) -> None:
    def worst(rows: list[dict[str, int]]) -> dict[str, int]:
        return {"worst": max(row["value"] for row in rows)}

    @bench(by=("size", "rank"), keep=True, judge=worst)
    def speed(sizes: tuple[int, ...] = (2, 1), value: int = 5, fails: bool = False) -> Iterator[dict[str, int]]:
        for size in sizes:
            yield {"size": size, "rank": 3, "value": value}
        if fails:
            raise ValueError
        return {"end": len(sizes)}

    assert [row["size"] for row in run()["cases"]] == [1, 2]
    with pytest.raises(ValueError):
        run("--sizes", "3", "--value", "9", "--fails")
    again = run("--sizes", "1", "--value", "4")
    assert [(row["size"], row["value"]) for row in again["cases"]] == [(1, 4), (2, 5), (3, 9)]
    assert (again["worst"], again["end"]) == (9, 1)


def test_rows_may_have_names(benches: None) -> None:
    @bench(rows="kinds")
    def speed(name: str = "a") -> Iterator[tuple[str, dict[str, int]]]:
        yield name, {"value": 1}

    assert run()["kinds"] == {"a": {"value": 1}}
    assert run("--name", "b")["kinds"] == {"b": {"value": 1}}, "not kept"


def test_a_list_of_numbers_or_strings_is_one_line_of_a_result_file(tmp_path: Path) -> None:
    said = "a [\n  1,\n  2\n] of [1,  2]"
    result = {"numbers": [1, 2.5], "strings": [said, "b {", ""], "rows": [[1, 2], [None]], "none": [], "cases": [{}]}
    measure.save(tmp_path / "found.json", result)
    text = (tmp_path / "found.json").read_text()
    assert json.loads(text) == result
    assert '  "numbers": [1, 2.5],\n' in text
    assert '  "rows": [\n    [1, 2],\n    [null]\n  ],\n' in text


def test_contenders_alternate_and_ratios_are_of_the_same_round() -> None:
    order: list[str] = []
    readings = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}  # type: ignore[misc]
    found = measure.alternating(readings, 2, warmup=1)
    assert "".join(order) == "cab" + "abc" + "bca"
    assert found == {"a": [4, 9], "b": [5, 7], "c": [6, 8]}
    same = measure.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])  # 2, 3 and 1
    assert same == {"median": 2.0, "lower": 1.5, "upper": 2.5, "of_medians": pytest.approx(4 / 3)}
    assert measure.spread([3.0]) == {"median": 3.0, "lower": 3.0, "upper": 3.0}


def test_a_function_runs_in_a_process_of_its_own() -> None:
    assert measure.alone(measure.spread, [1.0, 2.0, 6.0]) == {"median": 2.0, "lower": 1.5, "upper": 4.0}
    with pytest.raises(RuntimeError, match="this system has no VmNone"):
        measure.alone(measure.status_bytes, "VmNone")
    (first, second) = measure.launch_variables(2)
    assert (first["RANK"], second["RANK"], first["WORLD_SIZE"]) == ("0", "1", "2")
    assert first["MASTER_PORT"] == second["MASTER_PORT"]


def test_columns_look_into_rows() -> None:
    rows = {"x": {"bytes": 3 << 29, "ratios": {"a / b": {"median": 2.0, "lower": 1.25, "upper": 2.5}}}}
    columns = {
        "name": "{0}",
        "GiB": "{1[bytes]:.2fGiB}",
        "MiB": "{1[bytes]:,.0fMiB}",
        "a": "{1[ratios][a / b][median]:.1f}",
        "b": "{1[ratios][a / b]:.2f}",
        "c": lambda item: str(len(item)),
    }
    lines = tabulated(rows.items(), columns).splitlines()
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| x | 1.50 | 1,536 | 2.0 | 2.00 (1.25–2.50) | 2 |"


def test_tables_are_those_of_the_result_files(pages: Any) -> None:
    texts = {page: page.read_text() for page in pages.PAGES}
    marks = [mark for text in texts.values() for mark in re.findall(r"<!-- table: (\w+) -->", text)]
    assert sorted(marks) == sorted(TABLES)
    for page, text in texts.items():
        assert pages.filled(text) == text, f"{page.name}: run python benchmarks/readme_tables.py"
    for guide, content in ((pages.MODELS, "Llama 3"), (pages.SETTINGS, "- `rank` (`16`)")):
        assert pages.wanted(guide) == guide.read_text(), f"{guide.name}: run python benchmarks/readme_tables.py"
        assert content in guide.read_text()
    for name, make in TABLES.items():  # memory in GiB; rates, the size of a file, and cards in GB
        sizes = set(re.findall(r"(?:[\d.]+ ?)?\bGB\b(?!/s| of rows)", make()))
        assert sizes <= {"8 GB", "24 GB", "40 GB", "80 GB"}, name


def commands(pages: Any, mark: str = "") -> Iterator[tuple[str, str | None, list[str]]]:
    """Script, benchmark and options of every command on the pages of the benchmarks, in sections with a mark."""
    sections = [part for page in pages.PAGES[1:] for part in page.read_text().split("\n## ") if mark in part]
    for section in sections:
        for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL):
            for line in re.sub(r"^\w+=\w+ ", "", block, flags=re.MULTILINE).replace(" && ", "\n").splitlines():
                program, script, *options = shlex.split(line, comments=True)
                assert program == "python"
                names = [name for name, each in BENCHES.items() if each.run.__module__ == Path(script).stem]
                yield script, options.pop(0) if len(names) > 1 else next(iter(names), None), options


def test_every_benchmark_is_explained_with_options_that_it_has(pages: Any) -> None:
    shown = set()
    for script, name, options in commands(pages):
        if name is None:  # with options of its own
            text = "".join((ROOT / "benchmarks" / file).read_text() for file in (Path(script).name, "shared_study.py"))
            assert all(f'"{option}"' in text for option in options if option.startswith("--")), script
            continue
        parser = argparse.ArgumentParser(script)
        frame._add_options(parser, BENCHES[name])
        parser.parse_args(options)
        shown.add(name)
    assert shown == set(BENCHES)


def test_the_command_above_a_table_is_that_of_its_result_file(pages: Any) -> None:
    """Script and name aside, which were others in earlier versions, and options that say where files are."""

    def plain(words: list[str]) -> list[str]:
        return re.sub(r"--(out|work|llama-cpp) \S+", "", " ".join(words)).replace(",", " ").split()

    checked = set()
    for _, name, options in commands(pages, "<!-- table"):
        out = options[options.index("--out") + 1] if "--out" in options else f"benchmarks/results/{name}.json"
        if name is not None and (ROOT / out).is_file() and "--smoke" not in options:
            command = re.sub(r"^\w+=\w+ ", "", json.loads((ROOT / out).read_text())["command"])
            given = [word for word in shlex.split(command)[2:] if word not in BENCHES]
            assert plain(options) == plain(given), name
            checked.add(out)
    assert len(checked) >= 25


@pytest.mark.parametrize("name", ["axolotl_dora", "axolotl_dora_uncached", "qdora_peft_dora"])
def test_contenders_on_pefts_interface_compute_dora(name: str) -> None:
    contenders = importlib.import_module("contenders")
    base = contenders.random_base(64, 96)
    layer: Any = contenders.layer_on(base, contenders.CONTENDERS[name], 16)
    x, dy = contenders.random_input(base, 8)
    ours = [x, layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight]

    def plain() -> list[torch.Tensor]:
        """y, and the gradients."""
        leaves = [each.detach().double().requires_grad_() for each in ours]
        wide, a, b, m = leaves
        adapted = dequantize(base, torch.float64) + layer.scaling["default"] * b @ a
        y = wide @ adapted.T * (m / adapted.norm(dim=1).detach())
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]

    for _ in range(2):  # the second time after a step
        for each in ours:
            each.grad = None
        y = layer(x)
        y.backward(dy)
        for got, wanted in zip([y.detach(), *(each.grad for each in ours)], plain(), strict=True):
            assert float((got.double() - wanted).abs().max() / wanted.abs().max()) < 0.015
        with torch.no_grad():
            ours[2].mul_(3.0)
