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

from tables.combined import combined_vs_solo, remedy_that_did_not_help
from tables.exports import decode_speed, export_exactness, gguf_logits, merge_streamed
from tables.gates import gates
from tables.memory import chunked_loss, layer_memory, load_memory, step_memory
from tables.plan import plan_accuracy, plan_recipes, plan_shapes
from tables.ranks import curvature, curvature_draws, rank_curve, rank_methods, ranks_that_did_not_help
from tables.runs import data_loading, kill_resume, mixing, out_of_memory
from tables.streaming import disk_residency, stream_schedule
from tables.study import pruning, study
from tables.table import markdown, read
from tables.times import layer_time, packing, step_time
from tables.training import loss_curve, magnitudes, peft_interop, quickstart, real_data

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def failed() -> str:
    """What was tried and did not help."""
    rows = [[row["tried"], row["instead"], row["figure"]] for row in read("tried")["rows"]]
    found = [remedy_that_did_not_help(), ranks_that_did_not_help()]
    return markdown(["tried", "in use", "measured"], [*rows, *filter(None, found)])


TABLES: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "real_data": real_data,
    "magnitudes": magnitudes,
    "peft_interop": peft_interop,
    "load_memory": load_memory,
    "export_exactness": export_exactness,
    "gguf_logits": gguf_logits,
    "decode_speed": decode_speed,
    "merge_streamed": merge_streamed,
    "curvature": curvature,
    "curvature_draws": curvature_draws,
    "rank_curve": rank_curve,
    "rank_methods": rank_methods,
    "combined_vs_solo": combined_vs_solo,
    "packing": packing,
    "mixing": mixing,
    "data_loading": data_loading,
    "kill_resume": kill_resume,
    "layer_time": layer_time,
    "step_time": step_time,
    "loss_curve": loss_curve,
    "layer_memory": layer_memory,
    "step_memory": step_memory,
    "chunked_loss": chunked_loss,
    "out_of_memory": out_of_memory,
    "plan_shapes": plan_shapes,
    "plan_recipes": plan_recipes,
    "plan_accuracy": plan_accuracy,
    "pruning": pruning,
    "study": study,
    "gates": gates,
    "stream_schedule": stream_schedule,
    "disk_residency": disk_residency,
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
