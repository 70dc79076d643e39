"""The table at the top of README.md, the answers that begin the pages, and what was tried and did not help."""

from __future__ import annotations

from collections.abc import Iterator

from frame import GIB, markdown, read, table

from tables.study import interval, primary_rows, ranks_that_did_not_help, worths


@table()
def headline() -> str:
    pages = {_magnitudes: "correctness", _time: "time", _memory: "memory", _export: "correctness", _study: "README"}
    rows = []
    for result, page in (pages | {_plan: "memory", _resume: "correctness"}).items():
        question, answer, title = result()
        anchor = title.lower().replace(":", "").replace(" ", "-")
        rows.append([question, answer, f"[{title}](benchmarks/{page}.md#{anchor})"])
    return markdown(["question", "measured on a CPU", "full table"], rows).replace("---:", "---")


@table()
def answer_quality() -> str:
    return f"**LoRA or DoRA?** {_study()[1]}.\n"


@table()
def answer_time() -> str:
    return f"**A QDoRA step takes** {_time()[1]}.\n"


@table()
def answer_memory() -> str:
    return f"**A step of an 8B model needs** {_memory()[1]}. `qdora plan` errs by {_plan()[1]}.\n"


@table()
def answer_correctness() -> str:
    families = [row for row in read("architectures")["families"].values() if "merged" in row]
    worst = max(row["merged"] for row in families)
    return (
        f"**Does the exported model equal the trained one?** Y{_export()[1][1:]}. Over {len(families)} families "
        f"of models its logits differ by at most {worst:.0e} of their spread. {_resume()[1]}.\n"
    )


def _magnitudes() -> tuple[str, str, str]:
    moved = {(arm["storage"], arm["compute"]): arm["share_moved"]["magnitude"] for arm in read("magnitudes")["arms"]}
    own, plain = moved["bfloat16", "bfloat16"], moved["plain bf16", "bfloat16"]
    answer = f"{own:.2%} of the magnitudes move in 200 steps; in plain bf16 storage {plain:.2%} do"
    return "Do DoRA's magnitudes train if the adapter is stored in bf16?", answer, "magnitudes in bf16"


def _time() -> tuple[str, str, str]:
    document, single = read("step_time"), read("one_micro_batch")
    off, on = (next(iter(document["pairs"][mode].values()))["ratios"] for mode in ("off", "on"))
    among, alone = document["time"]["on"]["ratios"], single["ratios"]
    ours = [each["own_dora / own_lora"]["median"] for each in (off, on, among, alone)]
    peft = [1 / each["own_dora / peft_dora"]["median"] for each in (alone, among)]
    answer = (
        f"{ours[0]:.2f} times a QLoRA step of qdora with {document['batch']} examples, {ours[1]:.2f} times with "
        f"checkpointing ({ours[2]:.2f} in fewer rounds, among PEFT's), {ours[3]:.2f} times in one micro-batch of "
        f"{single['rows']} x {single['length']} tokens. PEFT's QDoRA, with bf16 adapters, takes {peft[0]:.2f} times as "
        f"long as qdora's in that micro-batch, {peft[1]:.2f} times with {document['batch']} padded examples and "
        "checkpointing (SmolLM2-135M)"
    )
    return "What does a QDoRA step cost?", answer, "time of a training step"


def _memory() -> tuple[str, str, str]:
    arms = read("step_memory")["cases"]["8B, checkpointing"]["arms"]
    peaks = [arms[name]["peak_bytes"] / GIB for name in ("own_dora_8bit", "own_lora_8bit", "peft_dora_8bit")]
    answer = (
        f"{peaks[0]:.2f} GiB with QDoRA, {peaks[1]:.2f} with QLoRA, {peaks[2]:.2f} with PEFT's QDoRA (tensors, counted "
        "without a GPU)"
    )
    return "How much memory does a step of an 8B model need?", answer, "memory of a training step"


def _study() -> tuple[str, str, str]:
    rows, (bit, zero) = primary_rows(), (each[4] / each[2] for each in worths())
    nll, points = (
        [scale * float(rows[measure][name]) for name in ("improvement", "lower", "upper")]
        for measure, scale in (("nll_per_token", 1), ("acc", 100))
    )
    answer = (
        f"LoRA. Over five compressed bases DoRA's NLL is {nll[0]:.4f} nats per token lower (95 % interval {nll[1]:.4f} "
        f"to {nll[2]:.4f}), {rows['nll_per_token']['verdict']}: at most {bit:.3f} bit per weight or {zero:.2f} "
        f"percentage points of zeros. Its accuracy is {points[0]:.2f} points higher ({points[1]:.2f} to "
        f"{points[2]:.2f}). LoRA's steps are not longer, and servers load its adapters. `dora` is the default because "
        "published runs of larger models favour it; that was not tested (SmolLM2-135M; the reference is decoded from a "
        "4-bit file)"
    )
    return "LoRA or DoRA?", answer, "compressed bases: LoRA against DoRA"


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
    cases = read("plan_accuracy")["cases"].values()
    error = max(abs(case["tensor_ratio"] - 1) for case in cases)
    answer = f"at most {error:.1%} in {len(cases)} runs on a CPU (bytes of live tensors)"
    return "How large is the error of `qdora plan`?", answer, "memory plans against real runs"


def _resume() -> tuple[str, str, str]:
    document = read("moments")
    answer = (
        f"{document['num_right']} of {document['num_moments']} killed or disturbed runs, exports and studies, started "
        "again, end with the same bytes as undisturbed ones"
    )
    return "Does a killed run lose anything?", answer, "killed runs"


# Beginnings of the rows of `failed` that a user of a recipe may ask about -> what they mean.
_SHORT = {
    "PCGrad": "Projecting conflicting gradients of tasks (PCGrad) does not measurably lower the average loss",
    "a rank for each layer": "None of four ways to choose a rank for each layer lowers the loss measurably",
    "blocks compiled": "Compiling the blocks (`torch.compile`) saves little on a CPU, and nothing is known of GPUs",
    "8-bit AdamW states on CPU": "8-bit optimizer states slow a CPU down; `train.optimizer: adamw` is faster there",
}


@table()
def failed() -> str:
    return markdown(["tried", "in use instead", "measured"], list(_failures()))


@table()
def failed_short() -> str:
    """A list item for each idea that a user may ask about."""
    rows = list(_failures())
    found = [(said, figure) for start, said in _SHORT.items() for tried, _, figure in rows if tried.startswith(start)]
    return "".join(f"- {said}. Measured: {figure}.\n" for said, figure in found)


def _failures() -> Iterator[list[str]]:
    for row in (*read("tried")["rows"], *read("compiled_blocks")["rows"]):
        yield [row["tried"], row["instead"], row["figure"]]
    # The NLL of the combined run without PCGrad minus that with it: lower is better.
    found = {kind: each["nll"]["average"] for kind, each in read("pcgrad")["kinds"].items()}
    ends = {kind: interval(-each["value"], -each["upper"], -each["lower"]) for kind, each in found.items()}
    figure = f"change of the average NLL: QLoRA {ends['lora']}, QDoRA {ends['dora']} nats a token"
    yield ["PCGrad on the adapter's gradients", "the plain mix of tasks", figure]
    yield from filter(None, [ranks_that_did_not_help()])
    gaps = read("expert_upcycling")["differences"]
    averages = [gaps[f"experts - {other}"]["average"] for other in ("attention", "both")]
    against = [interval(each["value"], each["lower"], each["upper"]) for each in averages]
    figure = f"against attention alone {against[0]}, against both {against[1]} nats a token"
    figure = f"NLL of a mixture made from SmolLM2-135M: {figure}"
    yield ["adapters on the experts alone", "adapters on attention, too", figure]
    load = ", ".join(f"{run['load']['last']:.3f} with {run['factor']:g}" for run in read("router_loss")["runs"])
    figure = f"sum of squared shares of a small mixture's experts, times their number: {load}; one seed"
    yield ["the auxiliary loss of frozen routers", "none", figure]
