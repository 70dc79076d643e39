"""What compression damaged, what is left of it after training, and what training repaired beyond a transplant.

Damage is measured without training, by the share of questions whose right choice is the likeliest one per character.
The NLL of an untrained answer measures the answers' format.

What is left of the damage is an arm on the compressed base against the same arm on the uncompressed one, both trained.
The transplant is the adapter that the uncompressed base was trained with, evaluated on the compressed base: it knows
the format and the tasks, but nothing of the compression. What a trained adapter gains on it is repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdora.evaluate.example_intervals import example_interval
from qdora.study import statistics
from qdora.study.cells import Kind, axes_of
from qdora.study.compare import Arm, Results, improvement_interval, quality, seed_improvements
from qdora.study.grid import Study, num_first_seeds
from qdora.study.scores import combined


def repair_row(arm: Arm, arms: Sequence[Arm], results: Results) -> dict[str, float]:
    """What is left of the damage, how much a transplant has, and what was repaired; only of trained arms.

    All in the metric's units, positive values worse; `repaired_share` of the transplant's damage, if that is
    significant. `magnitudes`: what is lost if the trained magnitudes are set back.
    """
    study, row = results.study, dict[str, float]()
    if arm.kind != "trained":
        return row

    def improvements(factor: float, own: Arm, other: Arm) -> dict[str, float]:
        return seed_improvements([(factor, own, other)], results, study.compare.metric)

    back = _same_arm(arm, arms, "set_back")
    if back is not None and (lost := improvements(1.0, arm, back)):
        row |= improvement_interval(lost, study).columns("magnitudes")
    twin = dense_twin(arm, arms, study)
    if twin is None or arm.base_key == arm.dense_key:
        return row
    if any(results.diverged(key) for seed, key in twin.seeds.items() if seed in arm.seeds):
        return row
    if left := improvements(-1.0, arm, twin):
        row |= improvement_interval(left, study).columns("left")
    transplant = _same_arm(arm, arms, "transplant")
    damage = improvements(-1.0, transplant, twin) if transplant is not None else {}
    repaired = improvements(1.0, arm, transplant) if transplant is not None else {}
    if damage and repaired:
        row |= improvement_interval(damage, study).columns("transplant")
        row |= improvement_interval(repaired, study).columns("repaired")
        if row["transplant_lower"] > 0:
            shared = [seed for seed in damage if seed in repaired]
            above, below = ([values[seed] for seed in shared] for values in (repaired, damage))
            share = statistics.ratio_interval(above, below, num_first=num_first_seeds(study, shared))
            row |= share.columns("repaired_share")
    return row


def _same_arm(arm: Arm, arms: Sequence[Arm], kind: Kind) -> Arm | None:
    """The arm in another kind of cells."""
    return next((each for each in arms if (each.kind, each.name, each.context) == (kind, arm.name, arm.context)), None)


def dense_twin(arm: Arm, arms: Sequence[Arm], study: Study) -> Arm | None:
    """The arm of the same name that was trained on the uncompressed base, in the same context but for the base."""
    based = axes_of(study, "base.")

    def rest(one: Arm) -> dict[str, str]:
        return {axis: label for axis, label in one.context.items() if axis not in based}

    dense = [each for each in arms if each.kind == "trained" and each.base_key == each.dense_key]
    like = {} if study.rates is None else study.rates.like.get(study.compare.arm, {})
    names = (arm.name, like.get(arm.name, arm.name))
    return next((each for name in names for each in dense if each.name == name and rest(each) == rest(arm)), None)


def damage_row(arm: Arm, results: Results) -> dict[str, Any]:
    """What compression did to a base that is only evaluated; empty for other arms.

    `damage_choice`: acc_norm of the uncompressed base, less that of this one; its interval is over examples.
    """
    if arm.kind != "base":
        return {}
    (key,) = arm.seeds.values()
    result = results.result(key) or {}
    layers = ((result.get("compression") or {}).get("layers") or {}).values()
    errors = [layer["relative_error"] for layer in layers]
    row: dict[str, Any] = {"weight_error": sum(errors) / len(errors)} if errors else {}
    row |= {name: result[name] for name in ("perplexity", "hidden_error") if name in result}
    choice = quality(arm, results, "acc_norm")
    if choice is None or arm.dense_key in (None, key) or results.result(str(arm.dense_key)) is None:
        return row
    scores = [results.scores(each)["acc_norm"] for each in (str(arm.dense_key), key)]
    lost = combined([(1.0, scores[0]), (-1.0, scores[1])])
    return row | example_interval(lost, "equal").columns("damage_choice")
