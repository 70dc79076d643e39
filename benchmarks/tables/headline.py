"""The table at the top of README.md: seven results, each from its result file, with a link to its whole table."""

from __future__ import annotations

from tables.table import gib, markdown, read, report_rows

_PAGE = "benchmarks/README.md"


def headline() -> str:
    """One row for each result."""
    rows = [_magnitudes(), _time(), _memory(), _export(), _study(), _plan(), _resume()]
    table = [[question, answer, f"[{title}]({_PAGE}#{_anchor(title)})"] for question, answer, title in rows]
    return markdown(["question", "measured on a CPU", "full table"], table).replace("---:", "---")


def _anchor(title: str) -> str:
    return title.lower().replace(":", "").replace(" ", "-")


def _magnitudes() -> tuple[str, str, str]:
    moved = {(arm["storage"], arm["compute"]): arm["share_moved"]["magnitude"] for arm in read("magnitudes")["arms"]}
    own, plain = moved["bfloat16", "bfloat16"], moved["plain bf16", "bfloat16"]
    answer = f"{own:.2%} of the magnitudes move in 200 steps; in plain bf16 storage {plain:.2%} do"
    return "Do DoRA's magnitudes train if the adapter is stored in bf16?", answer, "magnitudes in bf16"


def _time() -> tuple[str, str, str]:
    document = read("step_time")
    pairs = [
        found["ratios"]["own_dora / own_lora"]["median"]
        for batches in document["pairs"].values()
        for found in batches.values()
    ]
    ratios, rounds = document["time"]["on"]["ratios"], len(document["time"]["on"]["seconds"]["own_dora"])
    among = f"{ratios['own_dora / own_lora']['median']:.2f} in {rounds} rounds among PEFT's"
    single = read("one_micro_batch")["ratios"]["own_dora / own_lora"]["median"]
    answer = (
        f"{min(pairs):.2f} to {max(pairs):.2f} times a QLoRA step of qdora ({among}, {single:.2f} with a single "
        f"micro-batch); PEFT's QDoRA takes {1 / ratios['own_dora / peft_dora']['median']:.2f} times as long as "
        "qdora's (SmolLM2-135M)"
    )
    return "What does a QDoRA step cost?", answer, "time of a training step"


def _memory() -> tuple[str, str, str]:
    arms = read("step_memory")["cases"]["8B, checkpointing"]["arms"]
    peaks = [gib(arms[name]["peak_bytes"]) for name in ("own_dora_8bit", "own_lora_8bit", "peft_dora_8bit")]
    answer = (
        f"{peaks[0]} GiB with QDoRA, {peaks[1]} with QLoRA, {peaks[2]} with PEFT's QDoRA (tensors, counted without a "
        "GPU)"
    )
    return "How much memory does a step of an 8B model need?", answer, "memory of a training step"


def _study() -> tuple[str, str, str]:
    pair = next(row for row in report_rows("study", "comparisons") if row["role"] == "primary")
    low, high, gain = (float(pair[name]) for name in ("lower", "upper", "improvement"))
    told = (
        f"{pair['verdict']}: over the compressed bases DoRA's NLL is {gain:.4f} nats per token lower (95 % interval "
        f"{low:.4f} to {high:.4f})"
    )
    found = [row for row in report_rows("study", "repair") if row["adapter"] == "LoRA" and row["left"]]
    ordered = sorted((row for row in found if row["length"] == "128 steps"), key=lambda row: float(row["left"]))
    left = " to ".join(
        f"{float(row['left']):.2f} ({row['base']}{'' if row['left_lower'] else ', one run'})"
        for row in (ordered[0], ordered[-1])
    )
    question = "Does DoRA repair a compressed base better than LoRA?"
    answer = f"{told}; LoRA on a compressed base is {left} worse than LoRA on the uncompressed one (SmolLM2-135M)"
    return question, answer, "compressed bases: LoRA against DoRA"


def _export() -> tuple[str, str, str]:
    forms = read("export_exactness")["forms"]["float32"]
    half = read("quickstart")["export"]["verification"]["exported_vs_reference"]["kl_mean"]
    packed, peft = forms["nf4-lora"]["kl_mean"], forms["PEFT merged"]["kl_mean"]
    answer = (
        f"yes: mean KL {half:.0e} nats if merged in fp16, {packed:.0e} in 4 bits (`nf4-lora`); {peft:.2f} after PEFT's "
        "`merge_and_unload`, which quantises again"
    )
    return "Does the exported model equal the trained one?", answer, "exports"


def _plan() -> tuple[str, str, str]:
    document = read("plan_accuracy")
    error, count = document["largest_error"]["tensor"], document["num_measured"]["tensor"]
    answer = f"at most {error:.1%} in {count} runs on a CPU (bytes of live tensors)"
    return "How large is the error of `qdora plan`?", answer, "memory plans against real runs"


def _resume() -> tuple[str, str, str]:
    document = read("moments")
    answer = (
        f"{document['num_right']} of {document['num_moments']} killed or disturbed runs, exports and studies, started "
        "again, end with the same bytes as undisturbed ones"
    )
    return "Does a killed run lose anything?", answer, "killed runs"
