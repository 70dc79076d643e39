"""Benchmarks run: each with --smoke on a random model, to a result file with all its parts. Minutes in all: slow."""

from __future__ import annotations

import csv
import importlib
import json
import lzma
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from qdora.errors import UserError
from qdora.export.gguf import find_llama_cpp
from qdora.model.loftq import nearest_low_rank
from qdora.model.source import builtin_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def smoke(tmp_path: Path, script: str, *options: str, seconds: float = 280) -> dict[str, Any]:
    out = tmp_path / "result.json"
    printed = run_smoke(script, "--out", str(out), *options, seconds=seconds)
    result: dict[str, Any] = json.loads(out.read_text())
    assert json.loads(printed.splitlines()[-1]) == result
    return result


def run_smoke(script: str, *options: str, seconds: float = 280) -> str:
    """What the script prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--smoke", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_step_time(tmp_path: Path) -> None:
    result = smoke(tmp_path, "step_time.py", "--checkpointing", "on")
    seconds = result["time"]["on"]["seconds"]
    assert len(seconds) == 7
    assert all(len(each) == 2 and min(each) > 0 for each in seconds.values())
    assert result["time"]["on"]["ratios"]["own_dora / own_lora"]["median"] > 0
    (pair,) = result["pairs"]["on"].values()
    assert set(pair["seconds"]) == {"own_lora", "own_dora"}
    (peak,) = result["peaks"]["on"].values()
    assert peak["peak_bytes"] == peak["loaded_bytes"] + peak["added_bytes"]


def test_host_time(tmp_path: Path) -> None:
    result = smoke(tmp_path, "host_time.py")
    assert set(result["within"]) == {"forward", "forward and backward"}
    whole, half = (result["passes"][name]["seconds"] for name in ("forward and backward", "forward"))
    assert whole["own_dora"]["median"] > half["own_dora"]["median"] > 0


def test_one_micro_batch(tmp_path: Path) -> None:
    result = smoke(tmp_path, "one_micro_batch.py")
    assert {len(each) for each in result["seconds"].values()} == {2}
    assert set(result["seconds"]) == {"own_dora", "own_lora", "peft_lora", "peft_dora", "frozen", "dense"}
    assert set(result["passes"]) == set(result["bars"])
    assert all(seconds > 0 for seconds in result["parts"]["gradient of m"]["own_dora"])
    assert result["parts"]["gradient of m"]["own_lora"] == [0.0, 0.0]
    assert all(seconds > 0 for each in result["parts"]["norms and operands"].values() for seconds in each)


def test_roofline(tmp_path: Path) -> None:
    result = smoke(tmp_path, "roofline.py")
    assert result["passes"]
    for case in result["cases"].values():
        ours, theirs = case["own_dora"], case["peft_lora"]
        assert case["ratio"] == pytest.approx(ours["seconds"] / theirs["seconds"])
        # PEFT: codes made dense (4 launches), a copy, two products, a factor and a sum; 12 backward.
        assert ours["forward"]["launches"] < 9 <= theirs["forward"]["launches"]
        assert theirs["backward"]["launches"] >= 12
    # By hand: x, A, low; low, B, out; codes, scales, tile; out twice, x, tile. All of 2 bytes but codes and scales.
    tokens, columns, rows, rank = 8, 64, 128, 16
    products = tokens * columns + rank * columns + tokens * rank + tokens * rank + rows * rank + tokens * rows
    tile = rows * columns // 2 + 4 * rows * columns // 64 + 2 * rows * columns
    addition = 2 * tokens * rows + tokens * columns + rows * columns
    first = result["cases"]["64 → 128, 8 tokens"]["own_dora"]["forward"]
    assert first["launches"] == 4
    assert first["bytes"] == 2 * products + tile + 2 * addition


def test_peft_time(tmp_path: Path) -> None:
    result = smoke(tmp_path, "peft_time.py")
    assert len(result["cases"]) == 5
    for case in result["cases"].values():
        assert len(case["ratios"]) == 6
        assert case["rounds"] == 2
        for found in case["bytes"].values():
            assert 0 <= found["kept"] < found["held"] <= found["peak"]
    # The output and u of 8 tokens, the norm and g, in bf16.
    assert result["cases"]["layer 576 -> 1536, 8"]["bytes"]["axolotl_dora"]["held"] == 2 * 1536 * (8 + 8 + 1 + 1)


def test_architectures(tmp_path: Path) -> None:
    result = smoke(tmp_path, "architectures.py")
    llama, falcon, mixture = (result["families"][name] for name in ("Llama 3", "Falcon 7B", "Qwen2-MoE"))
    assert llama["refused"] == llama["failed"] == falcon["failed"] == mixture["failed"] == {}
    assert list(falcon["refused"]) == list(mixture["refused"]) == ["nf4_lora"]
    assert (llama["num_adapted"], falcon["num_adapted"], mixture["num_adapted"]) == (14, 8, 18)
    assert {"o_proj", "gate_proj", "gate_up_proj"} < set(mixture["targets"])
    assert 0 < mixture["nf4_skip"] < 1e-4
    assert 0 < mixture["peft"] < 1e-4
    assert mixture["peft_again"] == 0
    for row in (llama, falcon, mixture):
        assert row["resumed"]
        assert row["answered"]
        assert 0 < row["merged"] < 1e-4
        assert 0 < row["gradients"] < 1e-4
        assert row["packing"] < 1e-5
    # A later call replaces the rows that it names, and keeps the others.
    again = smoke(tmp_path, "architectures.py", "--families", "Falcon 7B")
    assert again["families"]["Llama 3"] == llama


def test_router_loss(tmp_path: Path) -> None:
    result = smoke(tmp_path, "router_loss.py")
    assert [run["factor"] for run in result["runs"]] == [0.0, 0.001, 0.01, 0.1, 1.0]
    for run in result["runs"]:
        assert run["load"]["last"] >= 1.0
        assert run["nll_per_token"] > 0
        assert all((each is None) == (run["factor"] == 0.0) for each in run["router_aux_loss"])


def test_loss_curve(tmp_path: Path) -> None:
    result = smoke(tmp_path, "loss_curve.py")
    assert len(result["curves"]) == 11
    assert all(len(curve["losses"]) == 3 for curve in result["curves"])
    passes = result["passes"]
    assert passes["one_norm_per_step"]
    assert passes["accumulation_float32"]
    assert passes["accumulation_bfloat16"]


def test_gates(tmp_path: Path) -> None:
    result = smoke(tmp_path, "gates.py")
    assert {mode: len(runs) for mode, runs in result["budget"].items()} == {"l1": 3, "hard_concrete": 3}
    assert result["passes"]["budget within 2 %"]
    assert result["passes"]["no jump of the loss"]
    assert result["passes"]["less held"]
    assert result["passes"]["less at the peak"]
    held = {name: result["cost"][name]["held_bytes"] for name in ("gated", "shrunk", "ungated")}
    assert held["shrunk"] < 0.6 * held["gated"]
    assert set(result["cost"]["times"]) == {"one length", "new lengths"}
    # Gates themselves: 4 bytes each
    assert held["gated"] - held["ungated"] == 4 * 16 * 14


def test_rank_methods(tmp_path: Path) -> None:
    options = ("--dir", str(tmp_path / "study"), "--methods", "uniform,l1,svd,gradient,curvature")
    out = tmp_path / "out"
    run_smoke("rank_methods.py", "--out", str(out), *options)
    costs = json.loads((out / "run.json").read_text())["costs_in_seconds"]
    assert set(costs) == {"scout", "svd", "gradient", "curvature", "sizes"}
    # 5 ways: 3 rates with a seed of the search, then 4 seeds; without training: the bases
    trained = list((tmp_path / "study/results").glob("*.json"))
    assert len(trained) >= 35
    sizes = set()
    for adapter in (tmp_path / "study").rglob("adapter/adapter_model.safetensors"):
        with safe_open(adapter, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        if "scout" not in adapter.parts:
            sizes.add(sum(math.prod(shape) for name, shape in shapes.items() if "magnitude" not in name))
    assert sizes
    assert min(sizes) >= 0.95 * max(sizes), "equal trainable parameters"


def test_layer_memory(tmp_path: Path) -> None:
    result = smoke(tmp_path, "layer_memory.py")
    tokens, out, rank = 64, 192, 16
    later = {name: found["later"] for name, found in result["layer"]["ranks"]["16"].items()}
    assert len(later) == 9
    # What a layer of ours holds by the design: its output and x A^T, for DoRA the same output.
    assert later["own_lora"]["held_bytes"] == later["own_dora"]["held_bytes"] == tokens * (out + rank) * 2
    assert later["own_lora"]["saved_bytes"] == tokens * rank * 2
    assert later["own_dora"]["saved_bytes"] == tokens * (out + rank) * 2
    # Norm, gain, 1 / m and s g of each row, s g B, and a decoded scale of each block are made once and stay.
    first = result["layer"]["ranks"]["16"]["own_dora"]["first"]
    kept = 16 * out + 2 * rank * out + 4 * 128 * out // 64
    assert first["held_bytes"] - later["own_dora"]["held_bytes"] == first["kept_by_layer_bytes"] == kept
    # In bf16 x's gradient; in float32 those of A, B and m.
    assert later["own_dora"]["gradient_bytes"] == 2 * tokens * 128 + 4 * (rank * (128 + out) + out)
    assert later["peft_dora"]["saved_bytes"] > later["own_dora"]["saved_bytes"]
    assert {*result["large_layer"]["ranks"]} == {"16", "64", "256", "512"}


def test_layer_time(tmp_path: Path) -> None:
    result = smoke(tmp_path, "layer_time.py")
    assert [(case["rank"], case["allocator"]) for case in result["cases"]] == [
        (16, "default"),
        (16, "tuned"),
        (64, "tuned"),
    ]
    assert len(result["bars"]) == 9
    assert all(len(case["seconds"]) == 11 for case in result["cases"])
    # A later call keeps the cases of others, and replaces its own.
    again = smoke(tmp_path, "layer_time.py", "--ranks", "8")
    assert [case["rank"] for case in again["cases"]] == [8, 8, 16, 16, 64]


def test_expert_cost(tmp_path: Path) -> None:
    result = smoke(tmp_path, "expert_cost.py")
    assert [case["skewed"] for case in result["cases"]] == [False, True]
    for case in result["cases"]:
        assert case["held"]["own_dora"] > case["held"]["own_lora"] > case["held"]["frozen"] > 0
        assert set(case["ratios"]) == {"own_dora / own_lora", "own_dora / frozen", "own_dora / peft_lora"}
    assert all(size > 0 for size in result["cases"][0]["peak"].values())


def test_expert_launches(tmp_path: Path) -> None:
    result = smoke(tmp_path, "expert_launches.py")
    assert [case["routing"] for case in result["after"]] == ["even", "zipf"]
    for case in result["after"]:
        assert case["waits"] == 2, "the counts of a routing, forward and recomputed"
        assert case["launches"]["forward"] >= case["launches"]["recompute"] > 0


def test_layer_cost(tmp_path: Path) -> None:
    result = smoke(tmp_path, "layer_cost.py")
    assert [row["value"] for row in result["by_rank"]] == [8, 16]
    assert [row["value"] for row in result["by_tokens"]] == [1024, 2048]
    assert (tmp_path / "result.svg").read_text().startswith("<?xml")


def test_packing(tmp_path: Path) -> None:
    result = smoke(tmp_path, "packing.py")
    assert result["losses"]["num_examples"] == 24
    assert result["losses"]["packed"]["max_difference"] < 1e-4
    assert all(len(each) == 2 and min(each) > 0 for each in result["time"]["seconds"].values())
    shares = result["time"]["padding_share"]
    assert shares["packed"] < shares["grouped"] <= shares["arrival"]


def test_step_memory(tmp_path: Path) -> None:
    result = smoke(tmp_path, "step_memory.py")
    vocabulary, hidden, inner, layers, tokens, rank = 512, 64, 128, 2, 32, 16
    kv = hidden // 2
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    weights = sum(out * in_ for out, in_ in shapes)
    lora = layers * rank * sum(out + in_ for out, in_ in shapes)
    magnitudes = layers * sum(out for out, _ in shapes)
    for case in result["cases"].values():
        assert len(case["arms"]) == 14
        own, dora = (case["arms"][name] for name in ("own_lora", "own_dora"))
        # 4 bits a weight, 8 a block of 64, a float32 for each 256 of those, and two small tensors a layer.
        packed = own["peak_by_label"]["packed base"]
        least = layers * weights * (1 / 2 + 1 / 64)
        assert least < packed < least + layers * 7 * (256 + 1 + 1) * 4 + layers * weights / 64 / 16
        assert own["peak_by_label"]["embeddings, head, norms"] == 2 * (2 * vocabulary + 2 * layers + 1) * hidden
        assert own["peak_by_label"]["adapters"] == 2 * lora
        # Magnitude, squared norm of the base; norm, gain, 1 / m.
        assert dora["peak_by_label"]["adapters"] == 2 * lora + 20 * magnitudes
        assert (own["num_trainable"], dora["num_trainable"]) == (lora, lora + magnitudes)
        for arm in case["arms"].values():
            assert sum(arm["peak_by_label"].values()) == arm["peak_bytes"] == max(arm["phase_peak_bytes"].values())
            assert arm["peak_bytes"] == case["floor"]["total_bytes"] + arm["above_floor_bytes"]
    checkpointed, plain = result["cases"].values()
    inputs = 2 * layers * tokens * hidden
    # Beside the inputs of blocks a head's input, its gradient, the loss and the labels.
    assert inputs < checkpointed["floor"]["held_bytes"] < inputs + 8 * tokens * hidden
    assert plain["floor"]["held_bytes"] > 3 * checkpointed["floor"]["held_bytes"]
    assert (tmp_path / "result.svg").read_text().startswith("<?xml")


def test_chunked_loss(tmp_path: Path) -> None:
    result = smoke(tmp_path, "chunked_loss.py")
    fake, real = result["bytes"]["fake"], result["bytes"]["real"]
    assert fake == real
    logits = result["num_tokens"] * result["vocabulary"]
    # The logits, the log-softmax and its gradient in float32; of a chunk bf16 alone, in 128 MiB.
    assert 12 * logits <= fake["peak_bytes"]["plain"] < 12.1 * logits
    assert 2**27 <= fake["peak_bytes"]["chunked"] < 2**27 + 2**24
    gradients = result["gradients"]
    assert gradients["chunked, float32"] < 1e-5
    assert gradients["chunked, bfloat16"] < 2 * gradients["plain, bfloat16"]
    assert result["time"]["chunked / plain"]["median"] > 0


def test_mixing(tmp_path: Path) -> None:
    result = smoke(tmp_path, "mixing.py")
    assert len(result["mixes"]) == 5
    assert all(sum(mix["draws"].values()) == 500 for mix in result["mixes"].values())
    assert [(each["kind"], each["num_rows"]) for each in result["streams"]] == [
        (kind, rows) for kind in ("parquet", "jsonl") for rows in (2_000, 20_000)
    ]
    assert result["passes"]["resume exact from every point"]


def test_pruning(tmp_path: Path) -> None:
    result = smoke(tmp_path, "pruning.py")
    cases = {(case["method"], case["pattern"]): case for case in result["cases"]}
    assert len(cases) == 16
    assert len({case["num_tokens"] for case in cases.values()}) == 1
    for (method, pattern), case in cases.items():
        wanted = 0.0 if method == "dense" else 0.5 if pattern == "2:4" else int(pattern) / 100
        assert abs(case["sparsity"] - wanted) < 0.01
        assert case["perplexity"] > 1
    # What is there is not computed again.
    again = smoke(tmp_path, "pruning.py")
    assert again["cases"] == result["cases"]


def test_error_adapters(tmp_path: Path) -> None:
    result = smoke(tmp_path, "error_adapters.py")
    assert [(case["quant"], case["pattern"]) for case in result["cases"]] == [
        (quant, pattern) for quant in ("none", "nf4") for pattern in ("50 %", "2:4")
    ]
    for case in result["cases"]:
        assert 0.5 < case["error_left"] < 0.8  # rank 8 of 64
        assert set(case["ranks"]) == {"8", "4"}


def test_what_an_error_adapter_gains_has_the_interval_of_a_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    error_adapters = importlib.import_module("error_adapters")
    draw = np.random.default_rng(0)
    tokens = draw.integers(5, 60, 200).astype(float)
    base = np.stack([3.0 * tokens + draw.normal(0, 5, 200), tokens], axis=1)
    scores = base - np.stack([0.2 * tokens + draw.normal(0, 3, 200), 0 * tokens], axis=1)
    found = error_adapters.told(scores, base)
    gained = base[:, 0] - scores[:, 0]
    picked = draw.integers(0, 200, (40_000, 200))  # 4,000 leave an error of the size that is allowed
    means = gained[picked].sum(1) / tokens[picked].sum(1)
    assert found["gained"] == pytest.approx(gained.sum() / tokens.sum())
    assert found["perplexity"] == pytest.approx(math.exp(scores[:, 0].sum() / tokens.sum()))
    for end, share in (("lower", 2.5), ("upper", 97.5)):
        assert found[end] == pytest.approx(np.percentile(means, share), abs=0.1 * means.std())


def test_the_first_components_of_an_error_adapter_are_the_one_of_a_smaller_rank() -> None:
    matrix = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    (left, right), (small, smaller) = (nearest_low_rank(matrix, rank) for rank in (6, 2))
    torch.testing.assert_close(left[:, :2] @ right[:2], small @ smaller, rtol=1e-4, atol=1e-5)


def test_combined_vs_solo(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(*options: str) -> dict[str, Any]:
        run_smoke("combined_vs_solo.py", "--out", str(out), *options)
        found: dict[str, Any] = json.loads((out / "run.json").read_text())
        return found

    found = run("--dir", str(tmp_path / "study"))
    assert found["cells"] == found["cells_done"] == 3 * (3 + 3), (
        "3 runs: 3 rates with a seed of the search, then 3 seeds"
    )
    tasks, both = ["demo/facts", "demo/odd"], ("combined", "alone")
    archive = json.loads(lzma.decompress((out / "scores.json.xz").read_bytes()))
    sums: dict[tuple[str, str, str], tuple[float, float]] = {}
    for each in archive["cells"]:
        if each["cell"]["kind"] == "trained":
            labels, scores = each["cell"]["labels"], each["scores"]
            for task in set(scores["task"]):
                mine = [number for number, name in enumerate(scores["task"]) if name == task]
                tokens = sum(scores["num_answer_tokens"][number] for number in mine)
                sums[labels["data"], labels["seed"], task] = sum(scores["nll"][number] for number in mine), tokens

    def improvement(seed: str, names: list[str]) -> float:
        """Of the combined run in NLL per answer token of these tasks."""
        parts = [(sums[task, seed, task], sums["combined", seed, task]) for task in names]
        return sum(alone[0] - together[0] for alone, together in parts) / sum(alone[1] for alone, _ in parts)

    for name, names in [("all tasks", tasks), *((task, [task]) for task in tasks)]:
        expected = [improvement(seed, names) for seed in ("0", "1", "2")]
        row = next(row for row in found["comparisons"][name] if row["measure"] == "nll_per_token")
        assert (row["arm"], row["reference"]) == both
        assert row["role"] == ("primary" if name == "all tasks" else "exploratory")
        assert math.isclose(row["improvement"], statistics.mean(expected), abs_tol=1e-7)
        half = 4.302652730 * statistics.stdev(expected) / math.sqrt(3)  # Student's t with 2 degrees of freedom
        assert math.isclose(row["half_width"], half, abs_tol=1e-7)
        together, alone = (found["scores"][name][each]["nll_per_token"] for each in both)
        assert math.isclose(alone - together, row["improvement"], abs_tol=1e-7)
    shutil.rmtree(tmp_path / "study")  # as on another machine: nothing runs again
    again = run("--dir", str(tmp_path / "study"), "--resume-from", str(out))
    assert not list((tmp_path / "study").rglob("adapter"))
    for name, rows in found["comparisons"].items():
        for before, after in zip(rows, again["comparisons"][name], strict=True):
            assert after["verdict"] == before["verdict"]
            assert math.isclose(after["improvement"], before["improvement"], abs_tol=1e-8), "scores have 9 decimals"
    # A single task that diverged has the score of a uniform guess over the vocabulary, the other one keeps its own
    (key,) = (
        each["cell"]["key"]
        for each in archive["cells"]
        if each["cell"]["kind"] == "trained"
        and each["cell"]["labels"].items() >= {"data": "demo/odd", "seed": "1"}.items()
    )
    (tmp_path / f"study/results/{key}.json").write_text(json.dumps({"diverged": "Diverged: x", "num_vocabulary": 400}))
    tokens = sums["demo/odd", "1", "demo/odd"][1]
    sums["demo/odd", "1", "demo/odd"] = math.log(400) * tokens, tokens
    lost = run("--dir", str(tmp_path / "study"), "--report")["comparisons"]["all tasks"][0]
    assert lost["num_diverged"] == 1
    expected = statistics.mean(improvement(seed, tasks) for seed in ("0", "1", "2"))
    assert math.isclose(lost["improvement"], expected, abs_tol=1e-7)


def test_data_loading(tmp_path: Path) -> None:
    result = smoke(tmp_path, "data_loading.py")
    assert list(result["ways"]) == ["grouped", "packed", "streamed"]
    for way in result["ways"].values():
        parts = way["seconds_to_first_step"]
        assert list(parts) == ["imports", "tokenizer", "data", "tokenise", "load base", "adapters", "first step"]
        assert sum(parts.values()) == way["total_seconds_to_first_step"]
        assert len(way["step_seconds"]) == len(way["loader_seconds"]) == 2
        assert all(0 < wait < step for wait, step in zip(way["loader_seconds"], way["step_seconds"], strict=True))


def test_file_formats(tmp_path: Path) -> None:
    result = smoke(tmp_path, "file_formats.py", "--kinds", "csv.gz")
    result = smoke(tmp_path, "file_formats.py", "--kinds", "parquet")
    assert list(result["kinds"]) == ["csv.gz", "parquet"]
    for found in result["kinds"].values():
        assert found["limit"]["num_examples"] == 100
        assert found["limit"]["num_rows"] > 1000
        assert found["first"]["num_tokens"] == found["again"]["num_tokens"] > 2**18
        assert 0 < found["again"]["seconds"] < found["first"]["seconds"]
    assert all(result["passes"].values())


def test_curvature(tmp_path: Path) -> None:
    result = smoke(tmp_path, "curvature.py")
    assert [layer["norm"] for layer in result["layers"]] == ["attached"] * 3 + ["held"] * 3
    for layer in result["layers"]:
        assert len(layer["eigenvalues"]) == len(layer["residuals"]) == 4
        assert layer["num_matvecs"] > 4 + 4
        assert max(layer["residuals"]) < 0.01 * abs(layer["eigenvalues"][0])


def test_curvature_draws(tmp_path: Path) -> None:
    result = smoke(tmp_path, "curvature_draws.py")
    assert result["num_layers"] == 14
    assert result["num_components"] == 14 * 32
    assert [layer["layer"].rpartition(".")[2] for layer in result["layers"]] == ["v_proj", "down_proj"]
    for layer in result["layers"]:
        assert 0 < layer["relative_error"]["median"] < 0.3
        assert 0.3 < layer["root_mean_square_in_own_errors"] < 3
        assert 0.7 < layer["summed_worth_drawn_by_exact"] < 1.5
        assert abs(layer["drawn_rank"] - layer["exact_rank"]) < 5


def test_export_exactness(tmp_path: Path) -> None:
    result = smoke(tmp_path, "export_exactness.py")
    forms = result["forms"]["float32"]
    assert set(forms) == {
        "reference",
        "base",
        "merged",
        "nf4-lora",
        "requantised",
        "PEFT running",
        "PEFT merged",
    }
    for name in ("merged", "nf4-lora", "PEFT running"):
        assert forms[name]["max_logit_difference"] < 1e-4 < forms["requantised"]["max_logit_difference"]
    assert result["forms"]["bfloat16"].keys() == forms.keys()


def test_decode_speed(tmp_path: Path) -> None:
    result = smoke(tmp_path, "decode_speed.py")
    assert set(result["tokens_per_second"]) == {"base", "lora", "dora", "merged"}
    assert result["dora / lora"]["median"] > 0


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


def test_merge_streamed(tmp_path: Path) -> None:
    result = smoke(tmp_path, "merge_streamed.py", "--layers", "2")
    assert result["num_files"] > 2
    assert result["num_bytes"] == result["checkpoint_bytes"]


def test_study(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Told before it runs, interrupted at once, run, and run again when all cells are there
    for more in (["--dry-run"], ["--hours", "0"], [], []):
        run_smoke("study.py", "--dir", str(tmp_path / "study"), "--out", str(out), *more)
        assert (out / "arms.csv").exists() == (not more)
    with (out / "arms.csv").open(newline="") as file:
        arms = {(row["base"], row["adapter"], row["kind"]): row for row in csv.DictReader(file)}
    pairs = [(base, kind) for base in ("16 bits", "nf4", "Wanda 2:4") for kind in ("LoRA", "DoRA")]
    assert {key[:2] for key in arms if key[2] == "trained"} == {*pairs, ("Wanda 2:4", "DoRA, masked")}
    assert {key[:2] for key in arms if key[2] == "transplant"} == {("Wanda 2:4", "LoRA"), ("Wanda 2:4", "DoRA")}
    assert all(row["num_seeds"] == "3" and row["num_missing"] == "0" for key, row in arms.items() if key[2] != "base")
    assert float(arms["Wanda 2:4", "LoRA", "trained"]["sparsity"]) == 0.5
    kept = json.loads(lzma.decompress((out / "scores.json.xz").read_bytes()))["cells"]
    assert all(each["scores"] for each in kept)
    again = [sys.executable, str(ROOT / "benchmarks/recompute_study.py"), str(out)]
    assert subprocess.run(again, capture_output=True, timeout=280).returncode == 0
    stages = Counter(each["cell"]["stage"] for each in kept)
    assert stages["bases"] == 3
    assert (stages["main"], stages["transplants"], stages["masks"]) == (18, 6, 3)
    shutil.rmtree(tmp_path / "study")  # as on another machine
    told = run_smoke("study.py", "--dir", str(tmp_path / "study"), "--resume-from", str(out), "--dry-run")
    assert "main: 18 cells, 18 done" in told


def test_study_nulls(tmp_path: Path) -> None:
    result = smoke(tmp_path, "study_nulls.py")
    for name, scenario in result["scenarios"].items():
        intervals = {"difference", "primary", "score", "left"} | (REPAIRS if scenario["repairs"] else set())
        assert set(scenario["shares"]) == intervals | {"winner", "equivalent"}, name
        assert all(0 <= share <= 1 for share in scenario["shares"].values())
    assert set(result["passes"]) == {"coverage", "winner", "equivalent", "promised power"}


REPAIRS = {"transplant", "repaired", "repaired_share", "damage_choice"}


def test_out_of_memory(tmp_path: Path) -> None:
    runs = smoke(tmp_path, "out_of_memory.py")["runs"]
    assert set(runs) == {"float32", "bfloat16"}
    for run in runs.values():
        assert run["same_tokens"]
        assert run["backoffs"][0]["tokens_after"] <= 400 < run["backoffs"][0]["tokens_before"]
        assert run["largest_relative_difference"] < 1e-4


def test_chat_model(tmp_path: Path) -> None:
    result = smoke(tmp_path, "chat_model.py")
    assert result["num_steps"] > 0
    for arm in ("base", "trained"):
        found = result["arms"][arm]
        assert all(0 <= found[name] <= result["num_questions"] for name in ("stopped", "in_manner", "equal"))
        assert found["examples"][0]["trained"].startswith("<call>weather")
