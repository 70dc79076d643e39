"""Tables of what is trained: accuracy, magnitudes, loss curves, adapters in PEFT."""

from __future__ import annotations

from typing import Any

from frame import table

from tables.table import markdown, percent, read


@table()
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


@table()
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


@table()
def router_loss() -> str:
    """NLL, load and moved tokens for each factor of the routers' auxiliary loss, means over the seeds."""
    header = ["factor", "validation NLL per byte", "load, first steps", "load, last steps", "tokens moved"]
    runs, rows = read("router_loss")["runs"], []
    for factor in dict.fromkeys(run["factor"] for run in runs):
        own = [run for run in runs if run["factor"] == factor]
        nll, first, last, moved = (
            sum(values) / len(own)
            for values in (
                [run["nll_per_token"] for run in own],
                [run["load"]["first"] for run in own],
                [run["load"]["last"] for run in own],
                [run["moved"] for run in own],
            )
        )
        rows.append([f"{factor:g}", f"{nll:.4f}", f"{first:.3f}", f"{last:.3f}", f"{moved:.1%}"])
    seeds = len({run["seed"] for run in runs})
    return (
        markdown(header, rows)
        + f"\nNumber of seeds: {seeds}. Load: number of experts E times the sum of squared shares, 1 if even.\n"
    )


@table()
def peft_interop() -> str:
    """Largest logit differences in float32, and the bf16 means beside them."""
    header = [
        "adapter",
        "qdora against PEFT",
        "qdora, float64 reference",
        "PEFT, reference",
        "qdora bf16 (mean)",
        "PEFT bf16",
    ]
    rows = []
    for case in read("peft_interop")["cases"]:
        against = case["against_reference"]
        largest = (case["ours_against_peft_float32"], against["ours float32"], against["peft linear4bit float32"])
        means = (against["ours bfloat16"], against["peft linear4bit bfloat16"])
        label = f"{case['adapter']}, {case['direction'].replace('->', '→').replace('ours', 'qdora')}"
        rows.append([label, *(f"{each['max']:.1e}" for each in largest), *(f"{each['mean']:.3f}" for each in means)])
    return markdown(header, rows)


@table()
def peft_trainers() -> str:
    """The layer inside TRL's trainers: the largest of its three ways in, by version; a resumed run and a cast one."""
    document, older = read("peft_trainers"), read("peft_trainers_trl_1_14")
    header = ["trainer", *(f"loss, TRL {each['peers']['trl']}" for each in (document, older))]
    rows = []
    for trainer in document["trainers"]:
        ours = [
            [each["trainers"][trainer][way] for way in ("use", "patch", "accelerate")] for each in (document, older)
        ]
        differences = [max(each["largest_difference_of_loss"] for each in runs) for runs in ours]
        moved = min(each["share_of_magnitudes_moved"] for runs in ours for each in runs)
        fast = {f"{each['num_fast']} of {each['num_layers']}" for runs in ours for each in runs}
        rows.append([trainer, *(f"{each:.1e}" for each in differences), ", ".join(sorted(fast)), f"{moved:.0%}"])
    says = {True: "yes", False: "no"}
    note = (
        f"\nLosses of a resumed run equal: {says[document['resumed']['passed']]}. Magnitudes float32, unchanged by a "
        f"cast of the model to bfloat16 between two steps, and trained after it: {says[document['cast']['passed']]}.\n"
    )
    table = markdown([*header, "fast layers", "magnitudes moved"], rows) + note
    exports = document["exports"]
    rows = [["PEFT, loaded again", f"{exports['peft_again_against_live']:.1e}", ""]]
    for form in ("merged", "merged, float32", "nf4-lora", "GGUF"):
        rows.append([form, *(f"{exports[form][key]:.1e}" for key in ("against_live", "against_peft_again"))])
    note = (
        f"\nThe builtin model after ten steps of DPO with PEFT's own layer, exported by qdora: largest difference of a "
        f"logit, {exports['num_tokens']} tokens. The logits have a standard deviation of "
        f"{exports['spread_of_logits']:.1f}, and the adapter changes them by up to "
        f"{exports['adapter_against_base']:.1f}. TRL holds the trained adapter in bfloat16.\n\n"
    )
    return table + note + markdown(["exported form", "against the trained model", "against PEFT, float32"], rows)


@table()
def foreign_trainers() -> str:
    """The layer inside other programs, by the way in."""
    rows = []
    for trainer, found in read("foreign_trainers")["trainers"].items():
        versions = found["versions"]
        for way, processes in found["processes"].items():
            if not way.startswith("peft"):
                difference = max(each["largest_difference_of_loss"] for each in processes)
                fast = " + ".join(f"{each['num_fast']} of {each['num_layers']}" for each in processes)
                moved = min(each["share_of_magnitudes_moved"] for each in processes)
                dtypes = sorted({dtype for each in processes for dtype in each["magnitude_dtypes"]})
                magnitudes = f"{moved:.0%}, {', '.join(dtypes).replace('torch.', '')}"
                name = f"{trainer} {versions[trainer]}, PEFT {versions['peft']}"
                rows.append([name, way, f"{difference:.1e}", fast, magnitudes])
    return markdown(["trainer", "way in", "loss, qdora against PEFT", "fast layers", "magnitudes moved"], rows)


@table()
def loss_curve() -> str:
    """Distances of loss curves, and what accumulation changes."""
    document = read("loss_curve")
    labels = {
        "fast – plain": "fast, plain formula",
        "plain, recut – plain": "plain, plain with other micro-batches",
        "seeds of plain": "plain, another seed",
        "seeds of fast": "fast, another seed",
        "plain, float32 – plain": "plain in float32, plain",
        "plain, float32 – fast": "plain in float32, fast",
        "lora – plain": "LoRA, plain",
    }
    rows = []
    for name, label in labels.items():
        gaps = document["gaps"][name]
        mean = sum(gap["mean_nats"] for gap in gaps) / len(gaps)
        tail = sum(abs(gap["tail_nats"]) for gap in gaps) / len(gaps)
        largest = max(gap["largest_nats"] for gap in gaps)
        rows.append([label, str(len(gaps)), *(f"{each:.4f}" for each in (mean, largest, tail))])
    found = {dtype: document["accumulation"][dtype] for dtype in ("float32", "bfloat16")}
    differences = " and ".join(f"{each['gradient_difference']:.1e} in {dtype}" for dtype, each in found.items())
    norms = sorted({count for each in found.values() for count in each["norms_per_layer_and_step"]})
    note = (
        f"\n{document['num_steps']} steps, {document['num_blocks']} blocks. Whole model with checkpointing, eight "
        f"examples one by one or in one batch: the relative difference of the gradients is {differences}; "
        f"the bfloat16 gradient differs from the float32 one by {found['bfloat16']['gradient_to_float32']:.1e}. Norms "
        f"computed per layer and step: {', '.join(f'{count:g}' for count in norms)}.\n"
    )
    return (
        markdown(["curves", "pairs", "mean gap, nats", "largest gap", "gap of the last 100 steps' means"], rows) + note
    )
