"""Times ./scripts/quickstart in a fresh clone with a venv of its own, once it is set up, and keeps what it showed."""

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
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "qdora"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        subprocess.run(["./scripts/setup", "gguf", "--with-model"], cwd=clone, check=True)
        began = time.perf_counter()
        subprocess.run([str(clone / "scripts/quickstart")], cwd=folder, check=True)  # from any folder
        result: dict[str, Any] = {"run_seconds": round(time.perf_counter() - began, 1)}
        names = ("side_by_side", "merged/export")
        # The temporary clone's path says nothing to a reader.
        texts = [(clone / f"runs/quickstart/{name}.json").read_text().replace(str(clone), ".") for name in names]
    side, export = map(json.loads, texts)
    evaluations = {**side["beside"], "merged": side["evaluation"]}
    return result | {"num_cpus": len(os.sched_getaffinity(0)), "evaluations": evaluations, "export": export}


@table("quickstart")
def quickstart_table(result: Any) -> str:
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
