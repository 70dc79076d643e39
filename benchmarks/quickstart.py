"""Times ./scripts/quickstart in a fresh clone with a venv of its own and keeps what it showed.

Set-up (venv, downloads) and the run itself are timed apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from frame import bench, main, markdown, table

ROOT = Path(__file__).resolve().parent.parent


@bench()
def quickstart() -> dict[str, Any]:
    """Clone, set up, run, gather."""

    def seconds_of(command: list[str], cwd: str | Path) -> float:
        began = time.perf_counter()
        subprocess.run(command, cwd=cwd, check=True)
        return round(time.perf_counter() - began, 1)

    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "qdora"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds = {"setup_seconds": seconds_of(["./scripts/setup", "gguf", "--with-model"], clone)}
        seconds["run_seconds"] = seconds_of([str(clone / "scripts/quickstart")], folder)  # from any folder
        names = ("side_by_side", "merged/export")
        # The temporary clone's path says nothing to a reader.
        texts = [(clone / f"runs/quickstart/{name}.json").read_text().replace(str(clone), ".") for name in names]
    side, export = map(json.loads, texts)
    evaluations = {**side["beside"], "merged": side["evaluation"]}
    return {**seconds, "num_cpus": len(os.sched_getaffinity(0)), "evaluations": evaluations, "export": export}


@table("quickstart")
def quickstart_table(result: Any) -> str:
    """Base, adapter and merged side by side."""
    columns = result["evaluations"]
    header = ["task", "n", "chance", *(f"{label} {what}" for label in columns for what in ("acc %", "NLL"))]
    rows = []
    for task in [*columns["base"]["tasks"], "average"]:
        found = [each["average"] if task == "average" else each["tasks"][task] for each in columns.values()]
        row = [task, str(found[0]["num_examples"]), f"{100 * found[0]['chance']:.1f}"]
        for each in found:
            row += [f"{100 * each['acc']:.1f} ± {100 * each['acc_stderr']:.1f}", f"{each['nll_per_token']:.3f}"]
        rows.append(row)
    check = result["export"]["verification"]
    exact, running = check["exported_vs_reference"], check["exported_vs_running"]
    note = (
        f"\nThe merged fp16 model against the adapter in float32 arithmetic, on {check['num_positions']:,} held-out "
        f"tokens: largest logit difference {exact['max_logit_difference']:.2g}, mean KL {exact['kl_mean']:.1g} nats, "
        f"same next token {exact['argmax_agreement']:.2%}. (The largest logit difference of the adapter in "
        f"{check['running_dtype']} from both is {running['max_logit_difference']:.2g}.) The run took "
        f"{result['run_seconds'] / 60:.1f} minutes after set-up on {result['num_cpus']} shared cores.\n"
    )
    return markdown(header, rows) + note


if __name__ == "__main__":
    main()
