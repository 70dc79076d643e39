"""Benchmarks run: each with --smoke on a random model, to a result file with all its parts. Minutes in all: slow."""

from __future__ import annotations

import csv
import json
import lzma
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from qdora.errors import UserError
from qdora.export.gguf import find_llama_cpp
from qdora.model.source import builtin_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent


def smoke(tmp_path: Path, command: str, *options: str) -> dict[str, Any]:
    out = tmp_path / "result.json"
    printed = run_smoke(command, "--out", str(out), *options)
    result: dict[str, Any] = json.loads(out.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    return result


def run_smoke(command: str, *options: str) -> str:
    """What a script prints; its name may be followed by a benchmark's and by options."""
    file, *words = command.split()
    call = [sys.executable, str(ROOT / "benchmarks" / file), *words, "--smoke", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(call, env=environment, capture_output=True, text=True, check=False, timeout=850)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def step_time(result: Any) -> bool:
    (pair,), (peak,) = result["pairs"]["on"].values(), result["peaks"]["on"].values()
    seconds = result["time"]["on"]["seconds"]
    assert peak["peak_bytes"] == peak["loaded_bytes"] + peak["added_bytes"]
    assert set(pair["seconds"]) == {"own_lora", "own_dora"}
    return len(seconds) == 7 and all(len(each) == 2 and min(each) > 0 for each in seconds.values())


def host_time(result: Any) -> bool:
    half, whole = (each["seconds"]["own_dora"]["median"] for each in result["passes"].values())
    return 0 < half < whole and set(result["within"]) == {"forward", "forward and backward"}


def packing(result: Any) -> bool:
    assert all(0 <= share < 0.5 for share in result["time"]["padding_share"].values())
    return all(len(each) == 2 and min(each) > 0 for each in result["time"]["seconds"].values())


def peft_time(result: Any) -> bool:
    found = [each for case in result["cases"].values() for each in case["bytes"].values()]
    assert all(0 <= each["kept"] < each["held"] <= each["peak"] for each in found)
    # The output and u of 8 tokens, the norm and g, in bf16.
    held = result["cases"]["layer 576 -> 1536, 8"]["bytes"]["axolotl_dora"]["held"]
    return len(found) == 3 * 6 and held == 2 * 1536 * (8 + 8 + 1 + 1)


def expert_cost(result: Any) -> bool:
    even, skewed = result["cases"]
    assert all(size > 0 for size in even["peak"].values())
    assert "peak" not in skewed
    return all(
        each["held"]["own_dora"] > each["held"]["own_lora"] > each["held"]["frozen"] > 0 for each in (even, skewed)
    )


def chunked_loss(result: Any) -> bool:
    fake, logits = result["bytes"]["fake"], result["num_tokens"] * result["vocabulary"]
    assert fake == result["bytes"]["real"]
    # The logits, the log-softmax and its gradient in float32; of a chunk bf16 alone, in 128 MiB.
    assert 12 * logits <= fake["peak_bytes"]["plain"] < 12.1 * logits
    return 2**27 <= fake["peak_bytes"]["chunked"] < 2**27 + 2**24


def layer_memory(result: Any) -> bool:
    tokens, in_, out, rank = 64, 128, 192, 16
    ranks = result["layer"]["ranks"]["16"]
    lora, dora, first = ranks["own_lora"]["later"], ranks["own_dora"]["later"], ranks["own_dora"]["first"]
    # What a layer of ours holds by the design: its output and x A^T, for DoRA the same output.
    assert lora["held_bytes"] == dora["held_bytes"] == tokens * (out + rank) * 2
    assert (lora["saved_bytes"], dora["saved_bytes"]) == (tokens * rank * 2, tokens * (out + rank) * 2)
    # Norm, gain, 1 / m and s g of each row, s g B, and a decoded scale of each block are made once and stay.
    kept = 16 * out + 2 * rank * out + 4 * in_ * out // 64
    assert first["held_bytes"] - dora["held_bytes"] == first["kept_by_layer_bytes"] == kept
    # In bf16 x's gradient; in float32 those of A, B and m.
    assert dora["gradient_bytes"] == 2 * tokens * in_ + 4 * (rank * (in_ + out) + out)
    return len(ranks) == 9 and ranks["peft_dora"]["later"]["saved_bytes"] > dora["saved_bytes"]


def step_memory(result: Any) -> bool:
    vocabulary, hidden, inner, layers, tokens, rank = 512, 64, 128, 2, 32, 16
    shapes = [(hidden, hidden)] * 2 + [(hidden // 2, hidden)] * 2 + [(inner, hidden)] * 2 + [(hidden, inner)]
    lora = layers * rank * sum(out + in_ for out, in_ in shapes)
    magnitudes = layers * sum(out for out, _ in shapes)
    for case in result["cases"].values():
        own, dora = (case["arms"][name]["peak_by_label"] for name in ("own_lora", "own_dora"))
        assert own["embeddings, head, norms"] == 2 * (2 * vocabulary + 2 * layers + 1) * hidden
        # Magnitude, squared norm of the base; norm, gain, 1 / m.
        assert own["adapters"] == 2 * lora == dora["adapters"] - 20 * magnitudes
        for arm in case["arms"].values():
            assert sum(arm["peak_by_label"].values()) == arm["peak_bytes"] == max(arm["phase_peak_bytes"].values())
            assert arm["peak_bytes"] == case["floor"]["total_bytes"] + arm["above_floor_bytes"]
    checkpointed, _, plain = (case["floor"]["held_bytes"] for case in result["cases"].values())
    inputs = 2 * layers * tokens * hidden
    # Beside the inputs of blocks a head's input, its gradient, the loss and the labels.
    return inputs < checkpointed < inputs + 8 * tokens * hidden and plain > 3 * checkpointed


def load_memory(result: Any) -> bool:
    assert result["checkpoint_bytes"] > 3 * result["packed_model_bytes"] / 2
    return result["passes"] and result["used_bytes"] > 0


def sharded_memory(result: Any) -> bool:
    held = {
        size: each["held_bytes"] == [each["planned_bytes"]] * int(size) for size, each in result["processes"].items()
    }
    return held == {"1": True, "2": True} and result["passes"]["counted"] and result["passes"]["loading"]


def plan_accuracy(result: Any) -> bool:
    (case,) = result["cases"].values()
    # Of two megabytes in all; the bar of 3 % is for models of real runs.
    assert abs(case["planned_tensor_bytes"] - case["measured_tensor_bytes"]) < 2**19
    return bool(case["process_bytes"] < case["measured_rss_bytes"])


def plan_recipes(result: Any) -> bool:
    streamed = {name for name, each in result["plans"].items() if each["num_streamed"]}
    assert streamed == {"qwen3-30b-a3b-8gb", "llama-8b-8gb", "qwen-32b-24gb", "llama-70b-40gb", "llama-70b-2x24gb"}
    for each in map(result["plans"].__getitem__, streamed):
        assert each["components"]["streaming slots"] == 2 * each["block_bytes"]
        assert each["host_bytes"] > 0
    several = result["plans"]["llama-405b-8x80gb"]
    ways = {way["way"]: way["peak_bytes"] for way in several["ways"]}
    return (
        all(result["passes"].values())
        and list(ways) == ["replicate", "shard"]
        and ways["shard"] == several["peak_bytes"]
    )


def data_loading(result: Any) -> bool:
    for way in result["ways"].values():
        parts = way["seconds_to_first_step"]
        assert list(parts) == ["imports", "tokenizer", "data", "tokenise", "load base", "adapters", "first step"]
        assert len(way["step_seconds"]) == len(way["loader_seconds"]) == 2
        assert all(0 < wait < step for wait, step in zip(way["loader_seconds"], way["step_seconds"], strict=True))
    return list(result["ways"]) == ["grouped", "packed", "streamed"]


def architectures(result: Any) -> bool:
    llama, falcon, mixture = result["families"].values()
    assert llama["refused"] == llama["failed"] == falcon["failed"] == mixture["failed"] == {}
    assert list(falcon["refused"]) == list(mixture["refused"]) == ["nf4_lora"]
    assert {"o_proj", "gate_proj", "gate_up_proj"} < set(mixture["targets"])
    assert 0 < mixture["nf4_skip"] < 1e-4
    assert 0 < mixture["peft"] < 1e-4
    for row in (llama, falcon, mixture):
        assert row["resumed"]
        assert 0 < row["merged"] < 1e-4
        assert 0 < row["gradients"] < 1e-4
        assert row["packing"] < 1e-5
    return (llama["num_adapted"], falcon["num_adapted"], mixture["num_adapted"]) == (14, 8, 18)


def pruning(result: Any) -> bool:
    for case in result["cases"]:
        wanted = 0.0 if case["method"] == "dense" else 0.5 if ":" in case["pattern"] else int(case["pattern"]) / 100
        assert abs(case["sparsity"] - wanted) < 0.01
        assert case["perplexity"] > 1
    return len(result["cases"]) == 16 and len({case["num_tokens"] for case in result["cases"]}) == 1


def curvature_draws(result: Any) -> bool:
    for layer in result["layers"]:
        assert 0 < layer["relative_error"]["median"] < 0.3
        assert 0.3 < layer["root_mean_square_in_own_errors"] < 3
        assert 0.7 < layer["summed_worth_drawn_by_exact"] < 1.5
        assert abs(layer["drawn_rank"] - layer["exact_rank"]) < 5
    return (result["num_layers"], result["num_components"], len(result["layers"])) == (14, 14 * 32, 2)


CHECKS: dict[str, Callable[[Any], bool]] = {
    "layer_times.py host_time": host_time,
    "layer_times.py peft_time": peft_time,
    "step_times.py step_time --checkpointing on": step_time,
    "step_times.py one_micro_batch": lambda found: {len(each) for each in found["seconds"].values()} == {2},
    "data_loading.py packing": packing,
    "step_times.py decode_speed": lambda found: set(found["tokens_per_second"]) == {"base", "lora", "dora", "merged"},
    "memory_peaks.py layer_memory": layer_memory,
    "memory_peaks.py step_memory": step_memory,
    "memory_peaks.py chunked_loss": chunked_loss,
    "host_memory.py load_memory": load_memory,
    "host_memory.py load_memory --experts": load_memory,
    "host_memory.py sharded_memory": sharded_memory,
    "host_memory.py merge_streamed": lambda found: found["num_bytes"] == found["checkpoint_bytes"],
    "memory_plans.py plan_accuracy": plan_accuracy,
    "memory_plans.py plan_recipes": plan_recipes,
    "expert_cost.py": expert_cost,
    "data_loading.py data_loading": data_loading,
    "architectures.py": architectures,
    "loss_curve.py": lambda found: {len(each["losses"]) for each in found["curves"]} == {3},
    "pruning.py": pruning,
    "real_data.py": lambda found: [arm["kind"] for arm in found["arms"]] == ["lora", "dora"],
    "curvature_draws.py": curvature_draws,
}


@pytest.mark.parametrize("command", CHECKS)
def test_a_smoke_run_measures_what_it_should(command: str, tmp_path: Path) -> None:
    more = ["--work", str(tmp_path)] if "sharded" in command else []
    assert CHECKS[command](smoke(tmp_path, command, *more))
    if "step_memory" in command:
        assert (tmp_path / "result.svg").read_text().startswith("<?xml")


def test_layer_time_keeps_the_cases_of_an_earlier_call(tmp_path: Path) -> None:
    result = smoke(tmp_path, "layer_times.py layer_time")
    cases = [(case["rank"], case["allocator"]) for case in result["cases"]]
    assert cases == [(16, "default"), (16, "tuned"), (64, "tuned")]
    assert all(len(case["seconds"]) == 11 for case in result["cases"])
    again = smoke(tmp_path, "layer_times.py layer_time", "--ranks", "8")
    assert [case["rank"] for case in again["cases"]] == [8, 8, 16, 16, 64]


def test_gguf_logits(tmp_path: Path) -> None:
    """The real converter, and llama.cpp itself, where they are installed."""
    pytest.importorskip("llama_cpp")
    try:
        find_llama_cpp(None, "f16")
        builtin_file()
    except UserError as error:
        pytest.skip(str(error))
    result = smoke(tmp_path, "gguf_logits.py")
    form = result["forms"]["f16"]
    assert form["tensors"]["dense_error"] == 0
    assert form["same_tokens"]
    assert form["llama.cpp"]["mean_logit_difference"] < 0.01 * result["logit_spread"]
    assert form["llama.cpp"]["kl_mean"] < 1e-4


def test_study(tmp_path: Path) -> None:
    out, place = tmp_path / "out", ["--dir", str(tmp_path / "study")]
    # Predicted before it runs, interrupted at once, run, and run again when all cells are there
    for more in (["--dry-run"], ["--hours", "0"], [], []):
        run_smoke("study.py", *place, "--out", str(out), *more)
        assert (out / "arms.csv").exists() == (not more)
    with (out / "arms.csv").open(newline="") as file:
        arms = {(row["base"], row["adapter"], row["kind"]): row for row in csv.DictReader(file)}
    pairs = [(base, kind) for base in ("16 bits", "nf4", "Wanda 2:4") for kind in ("LoRA", "DoRA")]
    assert {key[:2] for key in arms if key[2] == "trained"} == {*pairs, ("Wanda 2:4", "DoRA, masked")}
    assert all(row["num_seeds"] == "3" and row["num_missing"] == "0" for key, row in arms.items() if key[2] != "base")
    again = [sys.executable, str(ROOT / "benchmarks/recompute_study.py"), str(out)]
    assert subprocess.run(again, capture_output=True, timeout=280).returncode == 0
    shutil.rmtree(tmp_path / "study")  # as on another machine
    assert "main: 18 cells, 18 done" in run_smoke("study.py", *place, "--resume-from", str(out), "--dry-run")


def test_rank_methods(tmp_path: Path) -> None:
    options = ("--dir", str(tmp_path / "study"), "--methods", "uniform,l1,svd,gradient,curvature")
    run_smoke("rank_methods.py", "--out", str(tmp_path / "out"), *options)
    costs = json.loads((tmp_path / "out/run.json").read_text())["costs_in_seconds"]
    assert set(costs) == {"scout", "svd", "gradient", "curvature", "sizes"}
    sizes = set()
    for adapter in (tmp_path / "study").rglob("adapter/adapter_model.safetensors"):
        with safe_open(adapter, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        if "scout" not in adapter.parts:
            sizes.add(sum(math.prod(shape) for name, shape in shapes.items() if "magnitude" not in name))
    assert min(sizes) >= 0.95 * max(sizes), "equal trainable parameters"


def test_combined_vs_solo(tmp_path: Path) -> None:
    run_smoke("combined_vs_solo.py", "--out", str(tmp_path / "out"), "--dir", str(tmp_path / "study"))
    found = json.loads((tmp_path / "out/run.json").read_text())
    assert found["cells"] == found["cells_done"] == 3 * (3 + 3)  # 3 runs: 3 rates of the search, then 3 seeds
    archive = json.loads(lzma.decompress((tmp_path / "out/scores.json.xz").read_bytes()))
    sums: dict[tuple[str, str, str], list[float]] = {}
    for each in archive["cells"]:
        if each["cell"]["kind"] == "trained":
            labels, scores = each["cell"]["labels"], each["scores"]
            for task, nll, tokens in zip(scores["task"], scores["nll"], scores["num_answer_tokens"], strict=True):
                both = sums.setdefault((labels["data"], labels["seed"], task), [0.0, 0.0])
                both[0], both[1] = both[0] + nll, both[1] + tokens
    tasks = ["demo/facts", "demo/odd"]
    for name, names in [("all tasks", tasks), *((task, [task]) for task in tasks)]:
        expected = []  # of each seed: what the combined run improves in NLL per answer token
        for seed in ("0", "1", "2"):
            pairs = [(sums[task, seed, task], sums["combined", seed, task]) for task in names]
            gained = sum(alone[0] - together[0] for alone, together in pairs)
            expected.append(gained / sum(alone[1] for alone, _ in pairs))
        row = next(row for row in found["comparisons"][name] if row["measure"] == "nll_per_token")
        assert (row["arm"], row["reference"]) == ("combined", "alone")
        assert math.isclose(row["improvement"], statistics.mean(expected), abs_tol=1e-7)
        half = 4.302652730 * statistics.stdev(expected) / math.sqrt(3)  # Student's t with 2 degrees of freedom
        assert math.isclose(row["half_width"], half, abs_tol=1e-7)
