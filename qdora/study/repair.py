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

from qdora.evaluation.example_intervals import example_interval
from qdora.study import statistics
from qdora.study.cells import Kind, axes_of
from qdora.study.compare import Arm, Results, improvement_interval, quality, seed_improvements
from qdora.study.grid import Study, num_first_seeds
from qdora.study.scores import combined


def repair_row(arm: Arm, arms: Sequence[Arm], results: Results) -> dict[str, Any]:
    """What is left of the damage, how much a transplant has, and what was repaired; empty for other than trained arms.

    All in the metric's units, positive values worse; `repaired_share` of the transplant's damage. Where there is none,
    `repair_reason` says why. `magnitudes`: what is lost if the trained magnitudes are set back.
    """
    if arm.kind != "trained":
        return {}
    study = results.study
    measure, twin = study.compare.metric, dense_twin(arm, arms, study)
    row: dict[str, Any] = {}
    back = _same_arm(arm, arms, "set_back")
    if back is not None and (lost := seed_improvements([(1.0, arm, back)], results, measure)):
        row |= improvement_interval(lost, study).columns("magnitudes")
    if arm.base_key == arm.dense_key:
        return row | {"repair_reason": "the base is not compressed"}
    if twin is None:
        return row | {"repair_reason": "the arm is not trained on the uncompressed base"}
    if any(results.diverged(key) for seed, key in twin.seeds.items() if seed in arm.seeds):
        return row | {"repair_reason": "the arm diverged on the uncompressed base"}
    left = seed_improvements([(-1.0, arm, twin)], results, measure)
    row |= improvement_interval(left, study).columns("left") if left else {}
    transplant = _same_arm(arm, arms, "transplant")
    if transplant is None:
        return row | {"repair_reason": "no adapter was transplanted"}
    damage = seed_improvements([(-1.0, transplant, twin)], results, measure)
    repaired = seed_improvements([(1.0, arm, transplant)], results, measure)
    if not damage or not repaired:
        return row | {"repair_reason": "the cells share no seed"}
    of_damage = improvement_interval(damage, study)
    row |= of_damage.columns("transplant") | improvement_interval(repaired, study).columns("repaired")
    if not of_damage.lower > 0:  # nan, too
        return row | {"repair_reason": "the transplant is not significantly worse"}
    shared = [seed for seed in damage if seed in repaired]
    above, below = ([values[each] for each in shared] for values in (repaired, damage))
    share = statistics.ratio_interval(above, below, num_first=num_first_seeds(study, shared))
    return row | share.columns("repaired_share") | {"repair_reason": ""}


def _same_arm(arm: Arm, arms: Sequence[Arm], kind: Kind) -> Arm | None:
    """The arm in another kind of cells."""
    return next((each for each in arms if (each.kind, each.name, each.context) == (kind, arm.name, arm.context)), None)


def dense_twin(arm: Arm, arms: Sequence[Arm], study: Study) -> Arm | None:
    """The arm of the same name that was trained on the uncompressed base, in the same context but for the base."""
    based = axes_of(study, "base.")
    context = {axis: label for axis, label in arm.context.items() if axis not in based}
    like = {} if study.rates is None else study.rates.like.get(study.compare.arm, {})
    for name in (arm.name, like.get(arm.name, arm.name)):
        for other in arms:
            kept = {axis: label for axis, label in other.context.items() if axis not in based}
            if (other.kind, other.name, kept) == ("trained", name, context) and other.base_key == other.dense_key:
                return other
    return None


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
