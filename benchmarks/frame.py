"""The frame of the benchmarks: a function becomes a command with a result file, and a table of a page.

    @bench(smoke={"rounds": 2})  # what --smoke takes instead of the defaults
    def one_layer(rounds: int = 25) -> dict[str, Any]:
        '''Time of one layer. (This docstring is what --help says.)'''

    @table("one_layer")  # the block <!-- table: one_layer --> of a page
    def one_layer_table(result: Any) -> str:
        return tabulated(result["layers"].items(), {"layer": "{0}", "µs": lambda row: f"{1e6 * row[1]['median']:.0f}"})

**Options.** Each parameter is one, of the type of its default: `--rounds N`. A tuple takes several values, False is a
flag, None takes a text. Three names are special: `data`, the first argument DATA, a Path (None with --smoke); `smoke`,
whether --smoke is given; `out`, the Path of the result file. A file with one benchmark runs it, a file with several
takes its name first: `python benchmarks/host_memory.py load_memory --layers 4 --smoke`.

**Result.** benchmarks/results/NAME.json, or --out, or a temporary file with --smoke: command, commit, machine and
versions, then what the function returns, which is also printed as the last line. A generator's rows are saved one after
the other under the key `rows`, a mapping: `yield name, row`; what it returns at the end is added. With `keep` the rows
that an earlier call left in the file stay unless they come again.

**Tables.** `readme_tables.py` finds every `@table`. The table has the function's name without `_table`; the function
gets the named result files. A column of `tabulated` is a function of the row, or a format string that may look into it:
"{ratios[dora / lora][median]:.3f}". There are three more formats: `{ratio:.3f}` of a mapping with median and quartiles,
`{num_bytes:.2fGiB}` and `{num_bytes:.1fMiB}`.
"""

from __future__ import annotations

import argparse
import json
import string
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import isgenerator, signature
from pathlib import Path
from typing import Any, TypeVar

from measure import RESULTS, facts, save

from qdora.files.pages import markdown_table

MIB, GIB = 2**20, 2**30
Function = TypeVar("Function", bound=Callable[..., Any])
Column = str | Callable[[Any], str]
BENCHES: dict[str, Bench] = {}
TABLES: dict[str, Callable[[], str]] = {}
"""By name, as the decorators find them."""
_RAW = argparse.RawDescriptionHelpFormatter


@dataclass(frozen=True)
class Bench:
    """A benchmark; the module's docstring has the meaning of the fields."""

    run: Callable[..., Any]
    smoke: Mapping[str, Any] = field(default_factory=dict)
    rows: str = "cases"
    keep: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """Parameter -> default, of its options."""
        special = ("data", "smoke", "out")
        return {name: each.default for name, each in signature(self.run).parameters.items() if name not in special}


def bench(**options: Any) -> Callable[[Function], Function]:
    """Make the function a command of its file, with the options of `Bench`."""

    def register(function: Function) -> Function:
        BENCHES[function.__name__] = Bench(function, **options)
        return function

    return register


def main(arguments: Sequence[str] | None = None, module: str = "__main__") -> None:
    """The command line of a file: run what it asks for, write and print the result."""
    benches = {name: each for name, each in BENCHES.items() if each.run.__module__ == module}
    call = ["python", f"benchmarks/{Path(sys.modules[module].__file__ or '').name}"]
    parser = argparse.ArgumentParser(description=sys.modules[module].__doc__, formatter_class=_RAW)
    if len(benches) == 1:
        (name,) = benches
        _add_options(parser, benches[name])
    else:
        commands = parser.add_subparsers(dest="bench", required=True)
        for name, each in benches.items():
            doc = each.run.__doc__ or ""
            command = commands.add_parser(
                name, help=doc.partition("\n")[0].replace("%", "%%"), description=doc, formatter_class=_RAW
            )
            _add_options(command, each)
    given = vars(parser.parse_args(arguments))
    if len(benches) > 1:
        name = given.pop("bench")
        call.append(name)
    chosen, smoke, out = benches[name], given.pop("smoke"), given.pop("out")
    if not smoke and given.get("data", "") is None:
        parser.error("DATA is missing")
    out = out or (smoke_place(f"{name}.json") if smoke else RESULTS / f"{name}.json")
    special = {key: value for key, value in (("smoke", smoke), ("out", out)) if key in signature(chosen.run).parameters}
    made = chosen.run(**chosen.defaults | (dict(chosen.smoke) if smoke else {}) | given | special)
    head = facts(" ".join(call + _words(given)))
    result = _rows_saved(chosen, made, head, out) if isgenerator(made) else head | made
    save(out, result)
    print(json.dumps(result))


def _add_options(parser: argparse.ArgumentParser, added: Bench) -> None:
    if "data" in signature(added.run).parameters:
        parser.add_argument("data", type=Path, nargs="?", help="not needed with --smoke")
    for name, default in added.defaults.items():
        option, hidden = "--" + name.replace("_", "-"), argparse.SUPPRESS
        if default is False:
            parser.add_argument(option, action="store_true", default=hidden)
        elif isinstance(default, tuple):
            kind = type(default[0]) if default else str
            parser.add_argument(option, type=kind, nargs="+", default=hidden, help=f"default: {default}")
        else:
            kind = str if default is None else type(default)
            parser.add_argument(option, type=kind, default=hidden, help=f"default: {default}")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small sizes: shows that it runs; to a temporary file")


def _rows_saved(chosen: Bench, made: Iterator[Any], head: dict[str, Any], out: Path) -> dict[str, Any]:
    """The result with the rows of a generator, saved after each."""
    rows: dict[str, Any] = json.loads(out.read_text())[chosen.rows] if chosen.keep and out.exists() else {}
    while True:
        try:
            name, row = next(made)
        except StopIteration as end:
            return head | {chosen.rows: rows} | (end.value or {})
        rows[name] = row
        save(out, head | {chosen.rows: rows})


def _words(given: Mapping[str, Any]) -> list[str]:
    """The options as they were given."""
    words = ["DATA"] if given.get("data") else []
    for option, value in given.items():
        if option != "data":
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += ["--" + option.replace("_", "-"), *map(str, values)]
    return words


def smoke_place(name: str) -> Path:
    """Where results of --smoke go: never among the results."""
    return Path(tempfile.gettempdir()) / f"smoke-{name}"


def table(*results: str) -> Callable[[Function], Function]:
    """Make the function a table of the pages, called with the named files of benchmarks/results/."""

    def register(function: Function) -> Function:
        TABLES[function.__name__.removesuffix("_table")] = lambda: function(*map(read, results))
        return function

    return register


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def tabulated(rows: Iterable[Any], columns: Mapping[str, Column]) -> str:
    """A table with a row for each of `rows`; of a tuple, as `items()` has them, columns may have {0} and {1}."""
    return markdown([*columns], [[cell(column, row) for column in columns.values()] for row in rows])


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, all columns but the first to the right."""
    return markdown_table(header, [*rows], right=[False] + [True] * (len(header) - 1)) + "\n"


def cell(column: Column, row: Any) -> str:
    """A column's text of a row."""
    if callable(column):
        return column(row)
    return _CELLS.vformat(column, row if isinstance(row, tuple) else (), row if isinstance(row, Mapping) else {})


def quartiles(found: Mapping[str, float], form: str = ".3f", of_ends: str = ".2f") -> str:
    """1.034 (1.02–1.05)."""
    return f"{found['median']:{form}} ({found['lower']:{of_ends}}–{found['upper']:{of_ends}})"


class _Cells(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, Mapping):
            return quartiles(value, format_spec, format_spec)
        for unit, size in (("MiB", MIB), ("GiB", GIB)):
            if format_spec.endswith(unit):
                return format(value / size, format_spec.removesuffix(unit))
        return str(super().format_field(value, format_spec))


_CELLS = _Cells()
