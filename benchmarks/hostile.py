"""Hostile inputs: does each give one clear line and the right exit code, or the right result?

    python benchmarks/hostile.py [--part recipes|data|stored|all] [--seed 0] [--count N]
                                 [--out benchmarks/results/hostile.json]

    recipes   1,000 mutated recipes: wrong types, huge numbers, tags and anchors, deep nesting, paths, keys twice, bytes
    data      300 mutated data files of every format: cut, wrong encoding, null bytes, mixed types, a 50 MB line
    stored    200 mutated checkpoints, adapters, indices, GGUF headers, base caches: flipped bits, cut, wrong shapes

A case is read by the real code in a process of its own. It must end within 30 s of CPU time, take no more memory than
twice its file and 128 MiB, write nothing outside its directory, and give either one clear line for each fault with the
right exit code, or the right result. `--only N` runs one case and shows all that it said. Linux only.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hostile import parts
from hostile.report import of_cases
from measure import facts, parser_of, write


def main() -> None:
    """Run the parts; exits with 1 if there is a fault that is not known."""
    parser = parser_of(__doc__, "hostile")
    parser.add_argument("--part", choices=(*parts.COUNTS, "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="cases of each part; default: as many as the part has by itself")
    parser.add_argument("--only", type=int, help="run this case of the part alone")
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork takes no threads along
    chosen = parts.COUNTS if args.part == "all" else (args.part,)
    # Parts that are not run now keep what the file says of them.
    before = json.loads(args.out.read_text())["parts"] if args.out.exists() else {}
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in chosen:
            outcomes = parts.run(part, args.seed, args.count, Path(folder), only=args.only)
            found[part] = of_cases(outcomes, args.seed)
    if args.only is not None:
        print(json.dumps(found, indent=2))
        return
    command = f"python benchmarks/hostile.py --part {args.part} --seed {args.seed}"
    command += "" if args.count is None else f" --count {args.count}"
    result = {**facts(command), "parts": {**before, **found}}
    write(args.out, result)
    sys.exit(any(part["new_faults"] for part in found.values()))


if __name__ == "__main__":
    main()
