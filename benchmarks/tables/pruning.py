"""The table of pruned bases."""

from __future__ import annotations

from tables.table import markdown, read

_COLUMNS = {"30": "30 %", "50": "50 %", "60": "60 %", "70": "70 %", "2:4": "2:4"}
_METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}


def pruning() -> str:
    """Perplexity by method and sparsity, and what it was measured on."""
    document = read("pruning")
    found = {(case["method"], case["pattern"]): case["perplexity"] for case in document["cases"]}
    rows = [[name, *(f"{found[method, pattern]:,.1f}" for pattern in _COLUMNS)] for method, name in _METHODS.items()]
    dense, sizes = document["cases"][0], document["calibration"]
    note = (
        f"\nDense: {dense['perplexity']:.1f}. {dense['num_tokens']:,} tokens in windows of {dense['window']}; inputs "
        f"measured on {sizes['sequences']} × {sizes['length']} tokens of training examples.\n"
    )
    return markdown(["perplexity", *_COLUMNS.values()], rows) + note
