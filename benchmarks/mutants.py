"""What do the tests prove? Faults put into the code one at a time, each against the tests that run its line.

    python benchmarks/mutants.py cover FOLDER             the fast suite once: which test runs which line, in how long
    python benchmarks/mutants.py draw LIST [--skip 0] [--number 500] [--wording]
    python benchmarks/mutants.py run LIST FOLDER OUT [--processes 2]     OUT is JSON; the same call goes on after a stop

`draw` shuffles every place where a mutation fits (seed 0) and takes the first 60 of each of five rooms, then the next
ones of the whole package; --skip leaves out the first of them. Tests run from the fastest on, until their
seconds in `cover` add up to 60, in a process forked from one that has imported the libraries: a loaded machine chooses
no other tests. A mutant is killed if a test fails; it hangs if they do not end within 240 s. Needs `pip install
coverage`. Lines that only processes started by tests run are not covered. With --wording a mutant spells the longer
words of one message backwards, all its tests run, and the result is how many fail. Branches that the fast suite takes:
`coverage report --data-file FOLDER/.coverage`.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import contextlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "quantisers and products": ("qdora/quant/", "qdora/adapter/"),
    "optimizer": ("qdora/train/optimizer.py", "qdora/train/guards.py"),
    "mix and loader": ("qdora/data/mix", "qdora/data/batches.py", "qdora/data/stream.py"),
    "checkpoints": ("qdora/train/checkpoint.py", "qdora/files/run_directory.py"),
    "exports": ("qdora/export/",),
}
OF_EACH_ROOM, TESTS_S, HANGS_S, MOST_TESTS = 60, 60.0, 240.0, 300
SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult,
}  # fmt: skip
Mutant = dict[str, Any]


def mutants(file: Path) -> Iterator[Mutant]:
    """Every mutation of a file: its bytes from `start` to `end` are replaced. Wording, types and decorators are not."""
    source = file.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def mutant(node: Any, text: str) -> Mutant:
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        place = {"file": str(file.relative_to(ROOT)), "line": node.lineno, "start": start, "end": end}
        return place | {"old": source[start:end].decode(), "new": text}

    def visit(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr) or is_wording(node):
            return
        if isinstance(node, ast.Return) and not (node.value is None or ast.unparse(node.value) == "None"):
            yield mutant(node.value, "None")
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield mutant(node.value, "None")
        if isinstance(node, ast.If | ast.IfExp | ast.While) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield mutant(node.test, f"(not ({ast.unparse(node.test)}))")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield mutant(node, f"({ast.unparse(node.operand)})")
        if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            value = node.value
            other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value or 1.0
            yield mutant(node, repr(other))
        swapped = swap(node)
        if swapped is not None:
            text = ast.unparse(swapped)
            yield mutant(node, text if isinstance(node, ast.AugAssign) else f"({text})")
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "type_params", "op", "ops"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child)

    yield from visit(ast.parse(source))


def messages(file: Path) -> Iterator[Mutant]:
    """Every line of prose in the code with its words of four and more letters spelled backwards; names stay."""
    source = file.read_bytes()
    starts = list(itertools.accumulate(map(len, source.splitlines(keepends=True)), initial=0))
    nodes: list[Any] = list(ast.walk(ast.parse(source)))
    inner = {
        child for node in nodes if isinstance(node, ast.JoinedStr | ast.Expr) for child in ast.iter_child_nodes(node)
    }
    for node in nodes:
        if is_text(node) and node not in inner and node.lineno == node.end_lineno:
            start, end = (starts[node.lineno - 1] + at for at in (node.col_offset, node.end_col_offset))
            old = source[start:end].decode()
            new = re.sub(r"\{[^{}]*\}|(?<![\w.\-/\\])[a-z]{4,}(?![\w.\-/])", backwards, old)
            if new != old and old.count(" ") >= 3 and not re.search(r"\{[^}]*\{", old):
                place = {"file": str(file.relative_to(ROOT)), "line": node.lineno, "start": start, "end": end}
                yield place | {"old": old, "new": new, "wording": True}


def backwards(word: re.Match[str]) -> str:
    return word[0] if word[0].startswith("{") else word[0][::-1]


def is_wording(node: ast.AST) -> bool:
    """A message: what a logger, a console or an exception of ours is given."""
    name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    return name.split(".")[0] in ("logger", "UserError", "Failure", "console") or name.endswith(".print")


def swap(node: ast.AST) -> ast.AST | None:
    """The node with another operator; None if it has none. Texts are joined by + and paths by /: those stay."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return ast.Compare(node.left, [SWAPPED[type(node.ops[0])]()], node.comparators)
    if isinstance(node, ast.BoolOp):
        return ast.BoolOp(SWAPPED[type(node.op)](), node.values)
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED and not any(map(is_text, (node.left, node.right))):
        return ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
    if isinstance(node, ast.AugAssign) and type(node.op) in SWAPPED:
        return ast.AugAssign(node.target, SWAPPED[type(node.op)](), node.value)
    return None


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def draw(number: int, skip: int, wording: bool) -> list[Mutant]:
    """Mutants in an order that depends on the code alone."""
    of_file = messages if wording else mutants
    everything = [each for file in sorted((ROOT / "qdora").rglob("*.py")) for each in of_file(file)]
    random.Random(0).shuffle(everything)
    if wording:
        return everything[skip : skip + number]
    chosen: list[Mutant] = []
    for start in ROOMS.values():
        chosen += [each for each in everything if each["file"].startswith(start)][:OF_EACH_ROOM]
    return [*chosen, *(each for each in everything if each not in chosen)][skip : skip + number]


class Cover:
    """A plugin of pytest: the lines that each test runs, and its seconds. One file of each for every process."""

    def __init__(self, folder: Path) -> None:
        import coverage

        self.file = folder / f"seconds-{os.getpid()}.json"
        self.coverage = coverage.Coverage(
            str(folder / ".coverage"), data_suffix=True, branch=True, source=[str(ROOT / "qdora")]
        )
        self.seconds: dict[str, float] = {}
        self.coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.seconds[report.nodeid] = float("inf")

    def pytest_unconfigure(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        self.file.write_text(json.dumps(self.seconds))


def pytest_configure(config: Any) -> None:
    """With `-p mutants` this file is a plugin of pytest. Only the workers of xdist run tests."""
    folder = os.environ.get("MUTANTS_COVER")
    if folder and (hasattr(config, "workerinput") or not config.getoption("numprocesses", None)):
        config.pluginmanager.register(Cover(Path(folder)))


def cover(folder: Path) -> None:
    folder.mkdir(parents=True)
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    own = os.environ | {"MUTANTS_COVER": str(folder.resolve()), "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    options = ["-n2", "--dist", "worksteal", "-m", "not slow and not gpu and not network", "-p", "mutants"]
    subprocess.run([sys.executable, "-m", "pytest", *options, "--timeout=900"], cwd=ROOT, env=own, check=False)
    import coverage

    combined = coverage.Coverage(str(folder / ".coverage"))
    combined.combine([str(folder)])
    combined.save()
    files = list(folder.glob("seconds-*.json"))
    seconds = {test: value for file in files for test, value in json.loads(file.read_text()).items()}
    (folder / "seconds.json").write_text(json.dumps(seconds))


def tests_of(mutant: Mutant, data: Any, seconds: dict[str, float]) -> list[str]:
    """Passing tests that run its line, the fastest first; of a line of a module all that run anything of the file."""
    by_line = data.contexts_by_lineno(str(ROOT / mutant["file"]))
    found = set(by_line.get(mutant["line"], ())) - {""}
    if not found and mutant["line"] in by_line:
        found = {test for tests in by_line.values() for test in tests} - {""}
    known = sorted((test for test in found if test in seconds), key=seconds.__getitem__)[:MOST_TESTS]
    total = list(itertools.accumulate(seconds[test] for test in known))
    return [test for test, until in zip(known, total, strict=True) if until <= TESTS_S]


def run(chosen: list[Mutant], folder: Path, out: Path, processes: int) -> None:
    """Try the mutants that `out` does not have yet."""
    import coverage

    data = coverage.CoverageData(str(folder / ".coverage"))
    data.read()
    seconds = json.loads((folder / "seconds.json").read_text())
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    todo = [each for each in chosen if key(each) not in done]
    copies = [Path(tempfile.mkdtemp(prefix="mutants-")) for _ in range(processes)]
    for copy in copies:
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"}
    sys.dont_write_bytecode = True
    sys.path = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "benchmarks")]
    for library in ("accelerate", "bitsandbytes", "datasets", "peft", "pytest", "scipy.stats", "transformers"):
        importlib.import_module(library)

    running: dict[int, tuple[Mutant, Path, float, int]] = {}
    while todo or running:
        while todo and len(running) < processes:
            mutant = todo.pop(0)
            copy = next(copy for copy in copies if copy not in {each[1] for each in running.values()})
            tests = tests_of(mutant, data, seconds)
            if not tests:
                done[key(mutant)] = {"result": "not covered"}
                continue
            running[start(mutant, copy, tests)] = mutant, copy, time.monotonic(), len(tests)
        for pid, (mutant, copy, began, number) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            took = time.monotonic() - began
            if not ended and took < HANGS_S:
                continue
            result = "killed" if status else "survived"
            if mutant.get("wording"):
                result = f"{os.waitstatus_to_exitcode(status)} fail"
            if not ended:
                result = "hangs"
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            shutil.copy2(ROOT / mutant["file"], copy / mutant["file"])
            del running[pid]
            done[key(mutant)] = {"result": result, "seconds": round(took, 1), "tests": number}
            out.write_text(json.dumps(done, indent=1))
            print(f"{len(done)} of {len(chosen)}: {result} {mutant['file']}:{mutant['line']}", flush=True)
        time.sleep(0.05)
    out.write_text(json.dumps(done, indent=1))
    results = [done[key(each)]["result"] for each in chosen]
    print(json.dumps({result: results.count(result) for result in sorted(set(results))}))


class Failures:
    """A plugin of pytest that counts."""

    number = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.number += report.failed


def start(mutant: Mutant, copy: Path, tests: list[str]) -> int:
    """The process that runs the tests on the mutated copy; it ends with 0 if all pass."""
    source = (ROOT / mutant["file"]).read_bytes()
    mutated = source[: mutant["start"]] + mutant["new"].encode() + source[mutant["end"] :]
    (copy / mutant["file"]).write_bytes(mutated)
    pid = os.fork()
    if pid:
        return pid
    atexit._clear()  # the copies are the parent's
    os.setpgid(0, 0)
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        import pytest

        options = ["-q", "-n0", "-p", "no:cacheprovider", "--hypothesis-seed=0", *tests]
        failures = Failures()
        code = pytest.main(options if mutant.get("wording") else ["-x", *options], plugins=[failures])
        code = min(failures.number, 99) if mutant.get("wording") else code
        atexit._run_exitfuncs()
    os._exit(int(code))


def key(mutant: Mutant) -> str:
    return f"{mutant['file']}:{mutant['start']}-{mutant['end']}: {mutant['new']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("cover").add_argument("folder", type=Path)
    drawn = verbs.add_parser("draw")
    drawn.add_argument("list", type=Path)
    drawn.add_argument("--number", type=int, default=500)
    drawn.add_argument("--skip", type=int, default=0)
    drawn.add_argument("--wording", action="store_true")
    ran = verbs.add_parser("run")
    for name in ("list", "folder", "out"):
        ran.add_argument(name, type=Path)
    ran.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    if args.verb == "cover":
        cover(args.folder)
    elif args.verb == "draw":
        args.list.write_text("".join(json.dumps(each) + "\n" for each in draw(args.number, args.skip, args.wording)))
    else:
        run([json.loads(line) for line in args.list.read_text().splitlines()], args.folder, args.out, args.processes)


if __name__ == "__main__":
    main()
