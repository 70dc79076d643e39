"""Times ./scripts/quickstart in a fresh clone with a venv of its own and keeps what it showed.

    python benchmarks/quickstart.py --out benchmarks/results/quickstart.json

Set-up (venv, downloads) and the run itself are timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def timed(command: list[str], cwd: Path) -> float:
    """Seconds of a command that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True)
    return time.perf_counter() - began


def main() -> None:
    """Clone, set up, run, gather."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quickstart.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "qdora"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        setup = timed(["./scripts/setup", "gguf", "--with-model"], clone)
        run = timed([str(clone / "scripts/quickstart")], Path(folder))  # from another folder, as anyone may
        made = clone / "runs/quickstart"
        side = json.loads((made / "side_by_side.json").read_text())
        export = json.loads((made / "merged/export.json").read_text())
        environment = json.loads((made / "environment.json").read_text())
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, check=True)
    document: dict[str, Any] = {
        "command": "python benchmarks/quickstart.py",
        "commit": commit.stdout.strip(),
        "setup_seconds": round(setup, 1),
        "run_seconds": round(run, 1),
        "num_cpus": len(os.sched_getaffinity(0)),
        "evaluations": {**side["beside"], "merged": side["evaluation"]},
        "export": export,
        "environment": environment,
    }
    # The temporary clone's path says nothing to a reader.
    args.out.write_text(json.dumps(document, indent=1).replace(str(clone), ".") + "\n")
    print(json.dumps({key: document[key] for key in ("commit", "setup_seconds", "run_seconds")}))


if __name__ == "__main__":
    main()
