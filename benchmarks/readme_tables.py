"""Writes the tables of README.md and benchmarks/README.md and two guides, from benchmarks/results/ and the recipe.

    python benchmarks/readme_tables.py [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; no number in it is typed by hand. With --check the
script writes nothing and fails if a page differs from its sources. Guides have no marks, since a terminal shows them:
the guide of the models has one table, which is made here, and the guide of the settings is made whole.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from tables.combined import combined_vs_solo
from tables.compressed import (
    study_checkpoints,
    study_controls,
    study_primary,
    study_students,
    study_tasks,
    study_transplants,
    study_units,
)
from tables.exports import decode_speed, export_exactness, gguf_logits, merge_streamed
from tables.failed import failed, failed_short
from tables.gates import gates
from tables.headline import headline
from tables.memory import chunked_loss, layer_memory, load_memory, sharded_memory, step_memory
from tables.models import architectures, mixtures, models_short
from tables.plan import cards, expert_plans, machines, plan_accuracy, plan_recipes, several_cards
from tables.ranks import curvature, curvature_draws, rank_methods
from tables.runs import (
    chat_model,
    chat_templates,
    data_loading,
    file_formats,
    hostile,
    mixing,
    moments,
    out_of_memory,
)
from tables.settings import settings
from tables.study import error_adapters, pruning, study, study_changes, study_nulls
from tables.times import (
    expert_cost,
    expert_launches,
    host_time,
    layer_time,
    one_micro_batch,
    packing,
    peft_time,
    roofline,
    step_time,
)
from tables.training import (
    foreign_trainers,
    loss_curve,
    magnitudes,
    peft_interop,
    peft_trainers,
    quickstart,
    real_data,
    router_loss,
)
from tables.upcycling import expert_upcycling, upcycled_mixture

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "benchmarks/README.md")
MODELS = ROOT / "qdora/guide/models.md"
SETTINGS = ROOT / "qdora/guide/settings.md"
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "quickstart": quickstart,
    "real_data": real_data,
    "magnitudes": magnitudes,
    "router_loss": router_loss,
    "peft_interop": peft_interop,
    "peft_trainers": peft_trainers,
    "foreign_trainers": foreign_trainers,
    "load_memory": load_memory,
    "architectures": architectures,
    "mixtures": mixtures,
    "export_exactness": export_exactness,
    "gguf_logits": gguf_logits,
    "decode_speed": decode_speed,
    "merge_streamed": merge_streamed,
    "curvature": curvature,
    "curvature_draws": curvature_draws,
    "rank_methods": rank_methods,
    "combined_vs_solo": combined_vs_solo,
    "upcycled_mixture": upcycled_mixture,
    "expert_upcycling": expert_upcycling,
    "packing": packing,
    "mixing": mixing,
    "data_loading": data_loading,
    "chat_templates": chat_templates,
    "chat_model": chat_model,
    "file_formats": file_formats,
    "hostile": hostile,
    "moments": moments,
    "layer_time": layer_time,
    "roofline": roofline,
    "host_time": host_time,
    "step_time": step_time,
    "peft_time": peft_time,
    "loss_curve": loss_curve,
    "layer_memory": layer_memory,
    "step_memory": step_memory,
    "chunked_loss": chunked_loss,
    "out_of_memory": out_of_memory,
    "plan_recipes": plan_recipes,
    "expert_plans": expert_plans,
    "expert_cost": expert_cost,
    "expert_launches": expert_launches,
    "one_micro_batch": one_micro_batch,
    "cards": cards,
    "plan_accuracy": plan_accuracy,
    "pruning": pruning,
    "error_adapters": error_adapters,
    "study": study,
    "study_primary": study_primary,
    "study_units": study_units,
    "study_tasks": study_tasks,
    "study_transplants": study_transplants,
    "study_checkpoints": study_checkpoints,
    "study_controls": study_controls,
    "study_students": study_students,
    "study_changes": study_changes,
    "study_nulls": study_nulls,
    "gates": gates,
    "several_cards": several_cards,
    "machines": machines,
    "sharded_memory": sharded_memory,
    "failed": failed,
    "failed_short": failed_short,
}


def filled(text: str) -> str:
    """A page with every table made anew."""
    return _BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def wanted(page: Path) -> str:
    """What a page should be."""
    if page == SETTINGS:
        return settings()
    text = page.read_text(encoding="utf-8")
    if page == MODELS:
        return re.sub(r"(?:^\|.*\n)+", lambda _: models_short(), text, flags=re.MULTILINE)
    return filled(text)


def main() -> None:
    """Write, or with --check compare."""
    for page in (*PAGES, MODELS, SETTINGS):
        text = wanted(page)
        if "--check" not in sys.argv[1:]:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page.relative_to(ROOT)} is not up to date: run python benchmarks/readme_tables.py")


if __name__ == "__main__":
    main()
