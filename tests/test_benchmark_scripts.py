"""What the benchmarks do with their command lines and result files; nothing is measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gates
import measure
import plan_accuracy
import torch
from contenders import CONTENDERS, layer_on, random_base, random_input

from qdora.ops.packed import dequantize


def test_a_cost_that_was_measured_alone_has_a_verdict() -> None:
    """The budget is another part, which the file need not have yet."""
    run = {"deviation": 0.01, "largest_jump": 0.0}
    cost: dict[str, Any] = {
        "run": run,
        "gated": {"held_bytes": 2, "step_peak_bytes": 3},
        "shrunk": {"held_bytes": 1, "step_peak_bytes": 4},
        "times": {"one length": {"ratios": {"shrunk / ungated": {"median": 0.9}}}},
    }
    found = gates.verdict({"cost": cost})
    assert found.pop("less at the peak") is False
    assert set(found.values()) == {True}
    assert gates.verdict({"cost": {**cost, "run": {**run, "deviation": 0.1}}})["budget within 2 %"] is False


def test_a_single_case_leaves_the_others_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def main(name: str) -> None:
        monkeypatch.setattr(sys, "argv", ["plan_accuracy.py", "--out", str(out), "--only", name])
        plan_accuracy.main()

    out, kept = tmp_path / "found.json", {"planned_rss_bytes": 5, "tensor_ratio": 0.99, "rss_ratio": 1.01}
    out.write_text(json.dumps({"cases": {"deep, r16": kept, "wide, r16": kept}}))
    monkeypatch.setattr(plan_accuracy, "counted", lambda _name: {"planned_rss_bytes": 7, "tensor_ratio": 1.5})
    monkeypatch.setattr(plan_accuracy, "resident", lambda _name, planned: {"rss_ratio": planned / 7})
    main("wide, r16")
    document = json.loads(out.read_text())
    new = {"planned_rss_bytes": 7, "tensor_ratio": 1.5, "rss_ratio": 1.0}
    assert document["cases"] == {"deep, r16": kept, "wide, r16": new}
    assert document["largest_error"]["tensor"] == 0.5
    with pytest.raises(SystemExit):
        main("wide, r61")
    assert json.loads(out.read_text()) == document


def test_a_smoke_test_replaces_no_result() -> None:
    parser = measure.parser_of("", "speed", smoke="tiny shapes")
    assert parser.parse_args([]).out == measure.RESULTS / "speed.json"
    assert not parser.parse_args([]).smoke
    smoke = parser.parse_args(["--smoke"])
    assert smoke.smoke
    assert smoke.out.name == "smoke-speed.json"
    assert measure.RESULTS not in smoke.out.parents
    for order in (["--smoke", "--out", "a.json"], ["--out", "a.json", "--smoke"]):
        assert parser.parse_args(order).out == Path("a.json")


def test_a_list_of_numbers_or_strings_is_one_line_of_a_result_file(tmp_path: Path) -> None:
    said = "a [\n  1,\n  2\n] of [1,  2]"
    result = {"numbers": [1, 2.5], "strings": [said, "b {", ""], "rows": [[1, 2], [None]], "none": [], "cases": [{}]}
    measure.save(tmp_path / "found.json", result)
    text = (tmp_path / "found.json").read_text()
    assert json.loads(text) == result
    assert '  "numbers": [1, 2.5],\n' in text
    assert '  "rows": [\n    [1, 2],\n    [null]\n  ],\n' in text


@pytest.mark.parametrize("name", ["axolotl_dora", "axolotl_dora_uncached", "qdora_peft_dora"])
def test_contenders_on_pefts_interface_compute_dora(name: str) -> None:
    base = random_base(64, 96)
    layer: Any = layer_on(base, CONTENDERS[name], 16)
    x, dy = random_input(base, 8)
    ours = [x, layer.lora_A.default.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight]

    def plain() -> list[torch.Tensor]:
        """y, and the gradients."""
        leaves = [each.detach().double().requires_grad_() for each in ours]
        wide, a, b, m = leaves
        adapted = dequantize(base, torch.float64) + layer.scaling["default"] * b @ a
        y = wide @ adapted.T * (m / adapted.norm(dim=1).detach())
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]

    for _ in range(2):  # the second time after a step
        for each in ours:
            each.grad = None
        y = layer(x)
        y.backward(dy)
        for got, wanted in zip([y.detach(), *(each.grad for each in ours)], plain(), strict=True):
            assert float((got.double() - wanted).abs().max() / wanted.abs().max()) < 0.015
        with torch.no_grad():
            ours[2].mul_(3.0)
