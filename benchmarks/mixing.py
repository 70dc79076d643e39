"""The mix of sources: observed against asked shares, exact resume, and the memory of a stream of ten million rows.

    python benchmarks/mixing.py [--smoke]

Shares and resume: 10,000 draws, as steps of one example, from sources as large as the train splits of the eight
commonsense tasks, by each strategy; at 20 random draws the state is kept as JSON, and a second loader goes on from each
of them. Memory: made-up rows in shards in a temporary directory (1.2 GB at 10 million rows), each size in a process of
its own that draws as many examples as the smallest source has, and then resumes at 20 of them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from byte_tokenizer import byte_tokenizer
from measure import facts, fresh, parser_of, peak_rss_bytes, write

from qdora.data.batching import Batching
from qdora.data.loader import StepLoader
from qdora.data.mix import Source, make_mix
from qdora.data.readers import local_shards
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import TokenizedExample, TokenizedSet
from qdora.recipe.data_settings import DataConfig, SourceConfig

SIZES = {
    "boolq": 9427,
    "piqa": 16113,
    "siqa": 33410,
    "hellaswag": 39905,
    "winogrande": 63238,
    "arc_e": 2251,
    "arc_c": 1119,
    "obqa": 4957,
}
WEIGHTS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
TEMPERATURE = 2.0
NUM_POINTS, NUM_COMPARED = 20, 50
SHARD_ROWS, GROUP_ROWS = 500_000, 100_000
GROWTH = 16 * 2**20
"""Bytes that the peak may differ between the sizes; the text of a million rows is some 60 MB."""


def main() -> None:
    """All parts, or one source's memory."""
    args = arguments()
    if args.source is not None:
        print(json.dumps(memory(args.source, args.draws)))
        return
    num_draws = 500 if args.smoke else 10_000
    rows = [2_000, 20_000] if args.smoke else [1_000_000, 10_000_000]
    result: dict[str, Any] = facts("python benchmarks/mixing.py")
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "mixed"
        write_rows(small, "parquet", min(rows), GROUP_ROWS // 20)
        result |= {"sizes": SIZES, "num_draws": num_draws, "mixes": mixes(small, num_draws), "streams": []}
        for kind in ("parquet", "jsonl"):
            for num_rows in rows:
                source = Path(folder) / f"{kind}-{num_rows}"
                num_bytes = write_rows(source, kind, num_rows)
                options = ("--source", str(source), "--draws", str(min(rows)))
                found = {"kind": kind, "num_rows": num_rows, "num_bytes": num_bytes, **fresh(__file__, *options)}
                result["streams"].append(found)
    write(args.out, {**result, "passes": verdict(result)})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of(__doc__, "mixing", smoke="few draws and rows")
    parser.add_argument("--draws", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def mixes(streamed: Path, num_draws: int) -> dict[str, Any]:
    """Shares and resume of each strategy; asked shares by the definition of the strategy, from the sizes."""
    sets: list[Source] = [tokenized_set(name, size) for name, size in SIZES.items()]
    sizes = np.array(list(SIZES.values()), dtype=np.float64)
    cases: dict[str, tuple[list[Source], dict[str, Any], Any]] = {
        "proportional": (sets, {}, sizes),
        "equal": (sets, {}, np.ones(len(sizes))),
        "temperature": (sets, {"temperature": TEMPERATURE}, np.sqrt(sizes)),
        "weights": (sets, {"weights": WEIGHTS}, np.array(WEIGHTS)),
    }
    found = {name: mixed(each, asked, num_draws, strategy=name, **more) for name, (each, more, asked) in cases.items()}
    # Two streams, since a resumed one must not be the one that was drawn from.
    pair = [[*sets[:-1], stream(streamed, "obqa", 7)] for _ in range(2)]
    found["weights, one source streamed"] = mixed(
        pair[0], np.array(WEIGHTS), num_draws, other=pair[1], strategy="weights", weights=WEIGHTS
    )
    return found


def mixed(
    sets: list[Source], asked: Any, num_draws: int, *, other: list[Source] | None = None, **options: Any
) -> dict[str, Any]:
    """Differences of the shares after `num_draws` draws, and how many of the random points resume exactly."""
    points = sorted(random.Random(0).sample(range(num_draws), NUM_POINTS))
    loader, again = loader_of(sets, **options), loader_of(other or sets, **options)
    drawn, states = [], {}
    for position in range(num_draws + NUM_COMPARED):
        if position in points:
            states[position] = json.dumps(loader.state_dict())
        drawn.append(one_example(loader))
    resumed = 0
    for position in random.Random(1).sample(points, NUM_POINTS):
        again.load_state_dict(json.loads(states[position]))
        resumed += [one_example(again) for _ in range(NUM_COMPARED)] == drawn[position : position + NUM_COMPARED]
    names = [part.name for part in sets]
    counts = Counter(names[task] for task, _, _ in drawn[:num_draws])
    shares = asked / asked.sum()
    gaps = [abs(counts[name] / num_draws - share) for name, share in zip(names, shares.tolist(), strict=True)]
    return {
        "asked": dict(zip(names, shares.tolist(), strict=True)),
        "draws": {name: counts[name] for name in names},
        "max_difference": max(gaps),
        "max_relative_difference": max(gap / share for gap, share in zip(gaps, shares.tolist(), strict=True)),
        "resumed_exactly": resumed,
        "num_points": NUM_POINTS,
    }


def loader_of(sets: list[Source], **options: Any) -> StepLoader:
    """Steps of one draw."""
    order = make_mix(sets, **options).order
    return StepLoader(sets, order, tokens_per_step=None, batch=1, batching=Batching(4096, 0))


def one_example(loader: StepLoader) -> tuple[int, str, list[int]]:
    """(number of the task, id, tokens) of the next draw."""
    (batch,) = loader.next_step().micro_batches
    return int(batch.task_ids[0]), batch.example_ids[0], batch.input_ids[0].tolist()


def tokenized_set(name: str, size: int) -> TokenizedSet:
    """Examples of three tokens, the number of the example among them."""
    mask = np.array([False, True, True])
    examples = (TokenizedExample(name, f"{name} {n}", np.array([1, n, 2], dtype=np.int32), mask) for n in range(size))
    return TokenizedSet(name, tuple(examples))


def stream(source: Path, name: str = "stream", number: int = 0) -> ExampleStream:
    """A stream with one token for each byte."""
    names = [*(f"other {each}" for each in range(number)), name]
    mix = tuple(SourceConfig(source=str(source), stream=True, name=each) for each in names)
    data = DataConfig(mix=mix, too_long="truncate")
    return ExampleStream(local_shards(source, "train"), data, number, byte_tokenizer())


def write_rows(folder: Path, kind: str, num_rows: int, group_rows: int = GROUP_ROWS) -> int:
    """Shards of prompts and completions, all different. Returns their bytes."""
    folder.mkdir()
    for shard, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        path = folder / f"train-{shard:03}.{kind}"
        prompts, completions = columns(start, min(start + SHARD_ROWS, num_rows))
        if kind == "parquet":
            table = pa.table({"prompt": prompts, "completion": completions})
            pq.write_table(table, path, row_group_size=group_rows)
        else:
            middle = '", "completion": "'
            lines = pc.binary_join_element_wise('{"prompt": "', prompts, middle, completions, '"}\n', "")
            path.write_text("".join(lines.to_pylist()))
    return sum(path.stat().st_size for path in folder.iterdir())


def columns(start: int, stop: int) -> tuple[Any, Any]:
    """Sums of two numbers, as text."""
    first = np.arange(start, stop)
    second = first % 997
    texts = [pa.array(numbers).cast(pa.string()) for numbers in (first, second, first + second)]
    prompts = pc.binary_join_element_wise("What is ", texts[0], " plus ", texts[1], "? Give the sum alone.", "")
    return prompts, pc.binary_join_element_wise(" ", texts[2], "")


def memory(source: Path, num_draws: int) -> dict[str, Any]:
    """Peak of this process over `num_draws` draws, then resume at random draws by streams made anew."""
    points = set(random.Random(0).sample(range(num_draws), NUM_POINTS))
    empty = peak_rss_bytes()
    part = stream(source)
    states: dict[int, str] = {}
    expected: dict[int, list[Any]] = {}
    began = time.perf_counter()
    for position in range(num_draws + NUM_COMPARED):
        if position in points:
            states[position], expected[position] = json.dumps(part.state_dict()), []
        example = drawn_from(part)
        for point, kept in expected.items():
            if position - point < NUM_COMPARED:
                kept.append(example)
    seconds = time.perf_counter() - began
    peak = peak_rss_bytes()
    resumed, waits = 0, []
    for position, state in states.items():
        began = time.perf_counter()
        again = stream(source)
        again.load_state_dict(json.loads(state))
        found = [drawn_from(again)]
        waits.append(time.perf_counter() - began)
        found += [drawn_from(again) for _ in range(NUM_COMPARED - 1)]
        resumed += found == expected[position]
    return {
        "num_draws": num_draws,
        "empty_bytes": empty,
        "peak_bytes": peak,
        "draws_per_second": num_draws / seconds,
        "resumed_exactly": resumed,
        "num_points": NUM_POINTS,
        "max_seconds_to_resume": max(waits),
    }


def drawn_from(part: ExampleStream) -> tuple[str, bytes]:
    """(id, tokens) of the next example."""
    example = part.next()
    return example.id, example.input_ids.tobytes()


def verdict(result: dict[str, Any]) -> dict[str, bool]:
    """Shares within 1 % of all draws, and of the asked share itself; every resume exact; peaks alike at all sizes."""
    return {
        **{f"{name}: within 0.01": mix["max_difference"] < 0.01 for name, mix in result["mixes"].items()},
        **{
            f"{name}: each source within 1 % of its share": mix["max_relative_difference"] < 0.01
            for name, mix in result["mixes"].items()
        },
        "resume exact from every point": all(
            each["resumed_exactly"] == each["num_points"] for each in (*result["mixes"].values(), *result["streams"])
        ),
        **{f"{kind}: constant memory": growth <= GROWTH for kind, growth in growths(result["streams"])},
    }


def growths(streams: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """(kind, bytes by which the peak of the largest source is above that of the smallest)."""
    for kind in sorted({each["kind"] for each in streams}):
        peaks = {each["num_rows"]: each["peak_bytes"] for each in streams if each["kind"] == kind}
        yield kind, peaks[max(peaks)] - peaks[min(peaks)]


if __name__ == "__main__":
    main()
