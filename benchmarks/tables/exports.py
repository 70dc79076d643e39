"""Tables of what leaves a run: how exact each export is, in llama.cpp too, how fast it decodes, what merging takes."""

from __future__ import annotations

from frame import table

from tables.table import markdown, read

_FORMS = {
    "reference": "the reference itself",
    "base": "base, no adapter",
    "merged": "`--format merged`",
    "nf4-lora": "`--format nf4-lora`",
    "requantised": "`--requantize` (merged, then NF4 again)",
    "PEFT running": "PEFT's DoRA on Linear4bit",
    "PEFT merged": "PEFT's `merge_and_unload`",
}


@table()
def export_exactness() -> str:
    """Logits and NLL of every form against an independent float32 merge, in both dtypes."""
    document = read("export_exactness")
    dtypes = document["forms"]
    columns = ("largest difference", "mean", "mean KL", "same argmax", "NLL")
    header = ["form", *(f"{dtype}: {column}" for dtype in dtypes for column in columns)]
    rows = []
    for form, label in _FORMS.items():
        row = [label]
        for dtype in dtypes:
            found = dtypes[dtype][form]
            row += [f"{found[key]:.1e}" for key in ("max_logit_difference", "mean_logit_difference", "kl_mean")]
            row += [f"{100 * found['argmax_agreement']:.1f}%", f"{found['nll_per_token']:.4f}"]
        rows.append(row)
    note = (
        f"\nSmolLM2-135M, {document['steps']} steps on PIQA and ARC-Easy; {document['num_positions']:,} tokens of "
        f"held-out text. The standard deviation of the logits is {document['logit_spread']:.1f}; the NLL of the "
        f"reference is {document['reference_nll_per_token']:.4f}.\n"
    )
    return markdown(header, rows) + note


@table()
def gguf_logits() -> str:
    """Every GGUF type in llama.cpp, against the adapter in float32 and against transformers with the same values."""
    document = read("gguf_logits")
    header = ["file", "MB", "error against the merge", "mean KL in llama.cpp", "same argmax", "NLL"]
    header += ["mean KL, transformers", "mean logit difference between the two"]
    rows = []
    for type_, found in document["forms"].items():
        here, there = found["llama.cpp"], found["transformers"]
        rows.append(
            [
                type_,
                f"{found['num_bytes'] / 1e6:.0f}",
                _distance(found["tensors"]),
                f"{here['kl_mean']:.1e}",
                f"{100 * here['argmax_agreement']:.1f}%",
                f"{here['nll_per_token']:.4f}",
                f"{there['kl_mean']:.1e}",
                f"{found['between']['mean_logit_difference']:.1e}",
            ]
        )
    running = document["running"]
    same = "the same tokens" if all(each["same_tokens"] for each in document["forms"].values()) else "other tokens"
    note = (
        f"\n{document['num_positions']:,} tokens. The standard deviation of the logits is "
        f"{document['logit_spread']:.1f}; the NLL of the adapter in float32 is "
        f"{document['reference_nll_per_token']:.4f}. The adapter running in {running['dtype']} has a mean KL of "
        f"{running['kl_mean']:.1e} from it. llama.cpp's own tokenizer gives {same}.\n"
    )
    return markdown(header, rows) + note


def _distance(tensors: dict[str, float]) -> str:
    if tensors["lossy_error"]:
        return f"{100 * tensors['lossy_error']:.1f}% of a tensor's norm"
    if tensors["q8_0_error"]:
        return f"{tensors['q8_0_error']:.2f} of half a step"
    return f"{tensors['dense_error']:g}"
