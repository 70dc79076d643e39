"""The GPU suite's own logic, on a CPU: nothing may fail on a rented card that could have failed here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import contenders  # noqa: E402
import gpu_suite  # noqa: E402
from gpu import layer_cost, model_step, numerics, offloaded_step, plan, runner, shaped_model  # noqa: E402
from gpu.part import Part  # noqa: E402
from gpu.runner import FIRST, SECTIONS, Section  # noqa: E402

CPU = torch.device("cpu")
# They start programs, or differ from others in their sizes.
SLOW = {"tests", "quickstart", "layer_2", "layer_3", "streamed_40gb", "step_in_turns_long"}
SLOW |= {name for name in SECTIONS if name.startswith("alone")}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in SECTIONS]
)
def test_a_section_runs_on_a_cpu_and_no_check_fails(name, tmp_path):
    runner.run_here(name, tmp_path / "part.json", 600, smoke=True)
    written = json.loads((tmp_path / "part.json").read_text())
    assert len(written) >= 2
    assert runner.failed_checks({name: {"result": written}}) == []


def test_the_first_sections_take_ten_minutes_at_most_and_the_help_says_how_long_all_take(capsys):
    assert sum(SECTIONS[name].seconds for name in FIRST) <= 600
    assert list(SECTIONS)[: len(FIRST)] == list(FIRST)
    with pytest.raises(SystemExit):
        gpu_suite.main(["--help"])
    assert f"of {sum(section.seconds for section in SECTIONS.values()) / 60:.0f} minutes" in capsys.readouterr().out


# In place of the suite: a section's process writes what it has, then does what its name says.
SCRIPT = """
import json, os, sys, time
name, part, _ = sys.argv[sys.argv.index("--child") + 1:]
found = {"sections": list(json.load(open(OUT))["sections"])} if os.path.exists(OUT) else {}
json.dump(found, open(part, "w"))
if name == "crashes": raise RuntimeError("CUDA error: an illegal memory access")
if name == "exits":
    os.write(2, b"Error an illegal memory access at line 90 in file pythonInterface.cpp\\n")
    os._exit(1)
if name == "hangs": time.sleep(60)
"""


def test_the_file_is_written_after_each_section_whatever_becomes_of_it(monkeypatch, tmp_path, capsys):
    out, script = tmp_path / "out.json", tmp_path / "script.py"
    script.write_text(f"OUT = {str(out)!r}\n{SCRIPT}")
    monkeypatch.setattr(gpu_suite, "__file__", str(script))
    names = ["crashes", "exits", "hangs", "works"]
    for name in names:
        monkeypatch.setitem(SECTIONS, name, Section("none:none", 0.3))  # type: ignore[arg-type]
    assert gpu_suite.main(["--smoke", "--out", str(out), "--sections", *names]) == 1
    found = json.loads(out.read_text())["sections"]
    assert [found[name]["status"] for name in found] == ["failed: exit 1", "failed: exit 1", "timed out", "done"]
    for number, name in enumerate(names[1:], 1):
        assert found[name]["result"]["sections"] == names[:number]
    assert found["crashes"]["last_lines"][-1] == "RuntimeError: CUDA error: an illegal memory access"
    assert "pythonInterface.cpp" in found["exits"]["last_lines"][-1]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["not_done"] == names[:3]
    gpu_suite.main(["--smoke", "--out", str(out), "--continue", "--sections", "exits", "works"])
    assert "works ..." not in capsys.readouterr().out


def test_failed_checks_are_found_at_any_depth():
    result = {"a": {"ok": True}, "b": {"c": {"ok": False}, "d": {"error": ["..."]}}, "e": 3}
    assert runner.failed_checks({"s": {"result": result}}) == ["s / b / c", "s / b / d"]


def no_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_part_is_written_at_once_keeps_errors_and_stops_in_time(tmp_path):
    part = Part(tmp_path / "part.json", 60)
    part.attempt("good", int, "3")
    assert json.loads((tmp_path / "part.json").read_text()) == {"good": 3}
    part.attempt("bad", no_memory)
    part._end = 0
    part.attempt("late", int, "4")
    assert part.entries["bad"]["error"][-1].endswith("CUDA out of memory.")
    assert part.entries["skipped"] == ["late"]
    assert "late" not in part.entries


def test_a_file_of_another_card_is_left_alone_and_one_of_this_card_is_added_to(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"card": {"name": "A"}, "sections": {"card": {"status": "done"}}}))
    assert gpu_suite.started(out, {"name": "A"})["sections"] == {"card": {"status": "done"}}
    for card in ({"name": "B"}, None):
        with pytest.raises(SystemExit, match="another card"):
            gpu_suite.started(out, card)


def test_without_a_gpu_the_full_suite_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main(["--out", str(tmp_path / "out.json")]) == 2
    assert "--smoke" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_wrong_layer_is_noticed(monkeypatch):
    """The checks are worth something: a gradient that is 30 % off in one row of 200 fails, and so does NaN."""

    def wrong(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
        found = right(layer, x, dy)
        found["dB"][4] *= 1.3
        return found

    right = numerics.results
    monkeypatch.setattr(numerics, "results", wrong)
    checks = numerics.layer("dora", (37, 192, 200, 5), CPU)
    assert [name for name, entry in checks.items() if not entry["ok"]] == ["dB"]
    assert not numerics.check(float("nan"), 1.0)["ok"]


@pytest.mark.parametrize("share, outcome", [(1.0, "too small"), (0.5, None)])
def test_only_a_card_below_40_gb_may_be_too_small(monkeypatch, share, outcome):
    monkeypatch.setattr(model_step.on, "limit_memory", lambda *_: share)
    monkeypatch.setattr("qdora.train.passes.batch_loss", no_memory)
    part = Part(None, 60)
    if outcome is None:
        with pytest.raises(RuntimeError, match="out of memory"):
            model_step.on_40gb(part, plan.SMOKE, CPU, "peft_lora", 0)
        return
    model_step.on_40gb(part, plan.SMOKE, CPU, "peft_lora", 0)
    assert set(part.entries) == {"limit_share", "held_bytes", outcome}
    assert runner.failed_checks({"s": {"result": part.entries}}) == []


def test_a_contender_without_room_is_named_and_the_others_are_timed(monkeypatch):
    right = layer_cost.make_case, model_step.make_model

    def case(name: str, *args: Any) -> Any:
        return no_memory() if name == "peft_dora_defaults" else right[0](name, *args)

    def model(settings: Any, name: str, *args: Any, **options: Any) -> Any:
        return no_memory() if name == "peft_dora" else right[1](settings, name, *args, **options)

    monkeypatch.setattr(layer_cost, "make_case", case)
    monkeypatch.setattr(model_step, "make_model", model)
    found = layer_cost.case(plan.SMOKE, layer_cost.make_base((64, 64), CPU), 2, 8)
    assert found["errors"] == {"peft_dora_defaults": "out of memory"}
    assert "own_dora / peft_lora" in found["ratios"]
    part = Part(None, 60)
    model_step.in_turns(part, plan.SMOKE, CPU, 0)
    assert "out of memory" in part.entries["peft_dora"]["error"]
    assert set(part.entries["ratios"]) == {"own_dora / own_lora", "own_dora / peft_lora", "own_lora / peft_lora"}


def test_an_offloaded_step_survives_a_lack_of_memory(monkeypatch):
    monkeypatch.setattr("qdora.train.passes.batch_loss", no_memory)
    part = Part(None, 60)
    offloaded_step.run(part, plan.SMOKE, CPU)
    assert runner.failed_checks({"s": {"result": part.entries}}) == ["s / plain", "s / offloaded"]


def test_the_shapes_are_those_of_the_published_models():
    """Llama-3-8B and -70B: 8,030,261,248 and 70,553,706,496 parameters, as their model cards' files have it."""
    for settings, published in ((plan.FULL.middle, 8_030_261_248), (plan.FULL.large, 70_553_706_496)):
        layer = sum(out * in_ for out, in_ in shaped_model.linear_shapes(settings).values())
        hidden, layers = settings["hidden_size"], settings["num_hidden_layers"]
        total = layers * (layer + 2 * hidden) + hidden + 2 * settings["vocab_size"] * hidden
        assert total == published


def test_models_share_their_bytes_and_layers_have_their_own():
    weights = shaped_model.Weights(CPU)
    own, peft = (shaped_model.build(plan.SMOKE.middle, weights, engine) for engine in ("own", "peft"))
    first, second = (own.model.layers[i].mlp.up_proj.packed for i in (0, 1))
    assert peft.model.layers[0].mlp.up_proj.weight.data_ptr() == first.data_ptr() != second.data_ptr()
    assert peft.lm_head.weight.data_ptr() == own.lm_head.weight.data_ptr()
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(own(input_ids=ids).logits, peft(input_ids=ids).logits, rtol=0.05, atol=0.02)


def test_a_call_leaves_no_gradients_of_the_one_before():
    case = layer_cost.make_case("own_dora", layer_cost.make_base((64, 64), CPU), 2, 8)
    case.step()
    first = [p.grad.clone() for p in case.layer.parameters()]  # type: ignore[union-attr]
    case.step()
    for before, parameter in zip(first, case.layer.parameters(), strict=True):
        assert torch.equal(before, parameter.grad)  # type: ignore[arg-type]


def test_linear4bit_shares_the_bytes_only_if_asked():
    packed = layer_cost.make_base((64, 64), CPU).packed
    assert contenders.linear4bit(packed, torch.bfloat16, copy=False).weight.data_ptr() == packed.packed.data_ptr()
    assert contenders.linear4bit(packed, torch.bfloat16).weight.data_ptr() != packed.packed.data_ptr()
