"""Writes the tables of README.md from the files in benchmarks/results/.

    python benchmarks/readme_tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; no number in it is typed by hand. With --check nothing
is written and a README that differs from the files is an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tables.memory import chunked_loss, layer_memory, step_memory
from tables.table import markdown, percent, read

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def quickstart() -> str:
    """Base, adapter and merged side by side."""
    document = read("quickstart")
    columns = document["evaluations"]
    tasks = list(columns["base"]["tasks"])
    header = ["task", "n", "chance", *(f"{label} {what}" for label in columns for what in ("acc %", "NLL"))]
    rows = []
    for task in [*tasks, "average"]:
        found = [each["average"] if task == "average" else each["tasks"][task] for each in columns.values()]
        numbers = [
            text for row in found for text in (percent(row["acc"], row["acc_stderr"]), f"{row['nll_per_token']:.3f}")
        ]
        rows.append([task, str(found[0]["num_examples"]), percent(found[0]["chance"]), *numbers])
    check = document["export"]["verification"]
    exact, running = check["exported_vs_reference"], check["exported_vs_running"]
    note = (
        f"\nThe merged fp16 model against the adapter in float32 arithmetic, on {check['num_positions']:,} held-out "
        f"tokens: largest logit difference {exact['max_logit_difference']:.2g}, mean KL {exact['kl_mean']:.1g} nats, "
        f"same next token {exact['argmax_agreement']:.2%}. (The adapter running in {check['running_dtype']} is "
        f"{running['max_logit_difference']:.2g} away from both.) The run took "
        f"{document['run_seconds'] / 60:.1f} minutes after set-up on {document['num_cpus']} shared cores.\n"
    )
    return markdown(header, rows) + note


def real_data() -> str:
    """Validation and test NLL and accuracy of both arms, mean over seeds."""
    document = read("real_data")
    arms = document["arms"]
    kinds = list(dict.fromkeys(arm["kind"] for arm in arms))
    base_test = next(arm["test"]["base"] for arm in arms if "base" in arm["test"])
    base_validation = arms[0]["validation"]["base"]
    header = [
        "task",
        "val NLL base",
        *(f"val {kind}" for kind in kinds),
        "test NLL base",
        *(f"test {k}" for k in kinds),
    ]
    header += ["test acc % base", *(f"acc {kind}" for kind in kinds), "chance"]
    rows = []
    for task in base_test:
        row = [task, f"{base_validation[task]['nll_per_token']:.3f}"]
        row += [_mean(arms, kind, ("validation", "adapter", task)) for kind in kinds]
        row += [f"{base_test[task]['nll_per_token']:.3f}"]
        row += [_mean(arms, kind, ("test", "adapter", task)) for kind in kinds]
        row += [percent(base_test[task]["acc"], base_test[task]["acc_stderr"])]
        row += [_mean(arms, kind, ("test", "adapter", task), accuracy=True) for kind in kinds]
        rows.append([*row, percent(base_test[task]["chance"])])
    seeds = sorted({arm["seed"] for arm in arms})
    note = (
        f"\n{document['num_training_examples']:,} training examples per run, seeds {', '.join(map(str, seeds))}; "
        "± is the standard error over examples for one seed, and over examples and seeds in the mean of several.\n"
    )
    return markdown(header, rows) + note


def _mean(arms: list[dict[str, Any]], kind: str, path: tuple[str, str, str], *, accuracy: bool = False) -> str:
    """Mean over the seeds of an arm, with sqrt(examples' variance + variance between seeds / seeds)."""
    rows = [arm[path[0]][path[1]][path[2]] for arm in arms if arm["kind"] == kind]
    name = "acc" if accuracy else "nll_per_token"
    values = [row[name] for row in rows]
    mean = sum(values) / len(values)
    between = sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1) / len(values)
    error = (sum(row[f"{name}_stderr"] ** 2 for row in rows) / len(rows) + between) ** 0.5
    return percent(mean, error) if accuracy else f"{mean:.3f} ± {error:.3f}"


def magnitudes() -> str:
    """Share of entries that moved, and the distance of the loss curve from float32 storage."""
    header = ["storage (compute)", "magnitudes moved", "lora_A", "lora_B", "largest gap to float32 storage", "mean gap"]
    rows = []
    for arm in read("magnitudes")["arms"]:
        moved = [f"{arm['share_moved'][leaf]:.2%}" for leaf in ("magnitude", "lora_A", "lora_B")]
        gap = arm["gap_to_float32_storage"]
        gaps = ["–", "–"] if gap is None else [f"{gap['largest_nats']:.1e}", f"{gap['mean_nats']:.1e}"]
        rows.append([f"{arm['storage']} ({arm['compute']})", *moved, *gaps])
    return markdown(header, rows)


def load_memory() -> str:
    """Bytes of the checkpoint, of the packed model, of the largest tensor, and the peak."""
    document = read("load_memory")
    columns = {
        "checkpoint": "checkpoint_bytes",
        "packed model": "packed_model_bytes",
        "largest tensor": "largest_tensor_bytes",
        "peak over an empty process": "used_bytes",
        "allowed": "allowed_bytes",
    }
    row = [f"{document[name] / 2**30:.3f} GiB" for name in columns.values()]
    return markdown(list(columns), [row])


def packing() -> str:
    """Padding, real tokens a second and time of each way to make micro-batches, and the losses' differences."""
    document = read("packing")
    labels = {
        "arrival": "padded, in order of arrival",
        "grouped": "padded, grouped by length",
        "packed": "packed",
        "packed_to_max_length": f"packed, rows always {document['max_length']} long",
    }
    found = document["time"]
    rows = []
    for way, label in labels.items():
        speed = found["tokens_per_second"][way]
        times = found["ratios"].get(f"{way} / packed")
        row = [label, percent(found["padding_share"][way]), f"{found['micro_batches_per_step'][way]:.1f}"]
        row.append(f"{speed['median']:.0f} ({speed['lower']:.0f}–{speed['upper']:.0f})")
        rows.append([*row, f"{times['median']:.2f} ({times['lower']:.2f}–{times['upper']:.2f})" if times else "1"])
    losses = document["losses"]
    note = (
        f"\n{found['num_steps']} steps of {document['step_tokens']:,} tokens in turns, median and quartiles. Largest "
        f"difference of an example's NLL from that of the example alone, float32, {losses['num_examples']} examples: "
        f"packed {losses['packed']['max_difference']:.1e} nats (relative "
        f"{losses['packed']['max_relative_difference']:.1e}), grouped by length "
        f"{losses['grouped']['max_difference']:.1e} ({losses['grouped']['max_relative_difference']:.1e}).\n"
    )
    header = ["micro-batches", "padding %", "a step", "real tokens/s", "time, packed = 1"]
    return markdown(header, rows) + note


def failed() -> str:
    """What was tried and did not help."""
    rows = [[row["tried"], row["instead"], row["figure"]] for row in read("tried")["rows"]]
    return markdown(["tried", "in use", "measured"], rows)


def peft_interop() -> str:
    """Largest logit differences in float32, and the bf16 means beside them."""
    header = [
        "adapter",
        "ours against PEFT",
        "ours, float64 reference",
        "PEFT, reference",
        "ours bf16 (mean)",
        "PEFT bf16",
    ]
    rows = []
    for case in read("peft_interop")["cases"]:
        against = case["against_reference"]
        largest = (case["ours_against_peft_float32"], against["ours float32"], against["peft linear4bit float32"])
        means = (against["ours bfloat16"], against["peft linear4bit bfloat16"])
        label = f"{case['adapter']}, {case['direction'].replace('->', '→')}"
        rows.append([label, *(f"{each['max']:.1e}" for each in largest), *(f"{each['mean']:.3f}" for each in means)])
    return markdown(header, rows)


def layer_time() -> str:
    """Ratios of one layer's time; medians over rounds, and the share of what was asked that is so."""
    document = read("layer_time")
    columns = {
        "QDoRA / QLoRA": "own_dora / own_lora",
        "norm computed": "own_dora_new_norm / own_lora",
        "dropout / none": "own_dora_dropout / own_dora",
        "QDoRA / PEFT QLoRA": "own_dora / peft_lora",
        "QDoRA / frozen": "own_dora / frozen",
        "PEFT QDoRA / its QLoRA": "peft_dora / peft_lora",
        "norm by addmm": "peft_dora_addmm / peft_lora",
        "its defaults": "peft_dora_defaults / peft_lora",
    }
    rows = []
    for case in document["cases"]:
        label = f"{case['in_features']} → {case['out_features']}, r {case['rank']}, {case['tokens']:,}"
        label += "" if case["allocator"] == "tuned" else ", default allocator"
        rows.append([label, *(f"{case['ratios'][name]['median']:.3f}" for name in columns.values())])
    bars = document["bars"]
    asked = {
        "QDoRA at most 1.03 times QLoRA": "own_dora / own_lora",
        "at most PEFT's QLoRA (1.03 times at 256 tokens)": "own_dora / peft_lora",
        "dropout at most 1.05 times none": "own_dora_dropout / own_dora",
    }
    counts = []
    for what, name in asked.items():
        found = [bar for bar in bars if bar["ratio"] == name]
        worst = max(found, key=lambda bar: bar["median"] / bar["limit"])
        counts.append(
            f"{what}: {sum(bar['within'] for bar in found)} of {len(found)} cases, "
            f"at worst {worst['median']:.3f} ({worst['case'].split(',')[0]})"
        )
    return markdown(["layer, rank, tokens", *columns], rows) + f"\n{'; '.join(counts)}.\n"


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "real_data": real_data,
    "magnitudes": magnitudes,
    "peft_interop": peft_interop,
    "load_memory": load_memory,
    "packing": packing,
    "layer_time": layer_time,
    "layer_memory": layer_memory,
    "step_memory": step_memory,
    "chunked_loss": chunked_loss,
    "failed": failed,
}


def filled(text: str) -> str:
    """README with every table made anew."""
    return _BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def main() -> None:
    """Write, or with --check compare."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    wanted = filled(text)
    if "--check" in sys.argv[1:]:
        if wanted != text:
            sys.exit("README.md differs from benchmarks/results: run python benchmarks/readme_tables.py")
        return
    readme.write_text(wanted)


if __name__ == "__main__":
    main()
