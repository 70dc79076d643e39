"""The GPU suite's own logic, on a CPU: nothing may fail on a rented card that could have failed here."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import contenders  # noqa: E402
import gpu_suite  # noqa: E402
from gpu import device as on  # noqa: E402
from gpu import kernel_profile, layer_cost, model_step, numerics_layer, plan, run_sections, sections, shaped_model  # noqa: E402
from gpu.part import Part  # noqa: E402
from gpu.sections import SECTIONS, Section  # noqa: E402

from qdora.nn.host_embedding import HostEmbedding  # noqa: E402
from qdora.ops.packed import empty_packed  # noqa: E402
from qdora.train import passes  # noqa: E402

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name",  # step_streamed_40gb differs from step_streamed_8gb in its sizes
    [pytest.param(name, marks=pytest.mark.slow if name == "step_streamed_40gb" else ()) for name in SECTIONS],
)
def test_a_section_runs_on_a_cpu_and_no_check_fails(name, tmp_path):
    part = Part(tmp_path / "part.json", 60)
    sections.run_here(name, part, CPU, smoke=True)
    written = json.loads((tmp_path / "part.json").read_text())
    assert len(written) >= 3
    assert run_sections.failed_checks({name: {"result": written}}) == []


@pytest.mark.slow
def test_the_whole_command_writes_one_file(tmp_path):
    out = tmp_path / "gpu.json"
    assert gpu_suite.main(["--smoke", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert list(found["sections"]) == list(SECTIONS)
    assert all(entry["status"] == "done" and entry["result"] for entry in found["sections"].values())
    turns = found["sections"]["step_in_turns"]["result"]["16 tokens"]
    assert set(turns["step_seconds"]) == set(model_step.MODELS)


def test_a_wrong_layer_is_noticed(monkeypatch):
    """The checks are worth something: a gradient that is 30 % off in one row of 200 fails."""

    def wrong(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
        found = right(layer, x, dy)
        found["dB"][3] *= 1.3
        return found

    right = numerics_layer.results
    monkeypatch.setattr(numerics_layer, "results", wrong)
    checks = numerics_layer.layer("dora", (37, 192, 200, 5), CPU)
    assert [name for name, entry in checks.items() if not entry["ok"]] == ["dB"]


def test_not_a_number_is_no_pass():
    assert not numerics_layer.check(float("nan"), 1.0)["ok"]


# A section's process: writes what it has, then does what its name says.
SCRIPT = """
import json, sys, time
name, part = sys.argv[sys.argv.index("--child") + 1], sys.argv[sys.argv.index("--part") + 1]
open(part, "w").write(json.dumps({"found": name}))
print("a line")
if name == "crashes": raise RuntimeError("CUDA error: an illegal memory access")
if name == "hangs": time.sleep(60)
if name == "half": open(part, "w").write('{"found": ')
"""


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, names: list[str], seconds: float = 100) -> dict[str, Any]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(run_sections, "GRACE_SECONDS", 1)
    for name in names:
        monkeypatch.setitem(SECTIONS, name, Section("none:none", 1))
    command, out = [sys.executable, str(script)], folder / "out.json"
    run_sections.run_all({"sections": {}}, out, names, command, seconds=seconds, folder=folder)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_crash_and_a_hang_keep_what_they_found_and_cost_the_others_nothing(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, ["crashes", "hangs", "half", "works"])["sections"]
    assert [found[name]["status"] for name in found] == ["failed: exit 1", "timed out", "done", "done"]
    for name in ("crashes", "hangs", "works"):
        assert found[name]["result"] == {"found": name}
    assert found["half"]["result"] == {}
    assert found["crashes"]["last_lines"][-1] == "RuntimeError: CUDA error: an illegal memory access"
    assert found["hangs"]["seconds"] < 20
    assert "last_lines" not in found["works"]


def test_what_does_not_fit_into_the_budget_is_named(monkeypatch, tmp_path):
    found = run(monkeypatch, tmp_path, ["works", "later"], seconds=run_sections._LEAST_SECONDS + 0.01)["sections"]
    assert found["later"]["status"].startswith("skipped")


def test_failed_checks_are_found_at_any_depth():
    result = {"a": {"ok": True}, "b": {"c": {"ok": False}, "d": {"error": ["..."]}}, "e": 3}
    assert run_sections.failed_checks({"s": {"result": result}}) == ["s / b / c", "s / b / d"]


def test_a_part_is_written_at_once_keeps_errors_and_stops_in_time(tmp_path):
    part = Part(tmp_path / "part.json", 60)

    def fails() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    part.attempt("good", lambda: 3)
    assert json.loads(part.path.read_text()) == {"good": 3}  # type: ignore[union-attr]
    part.attempt("bad", fails)
    part._end = time.monotonic()
    part.attempt("late", lambda: 4)
    assert part.entries["bad"]["error"][-1].endswith("CUDA out of memory")
    assert part.entries["skipped"] == ["late"]
    assert "late" not in part.entries


def test_a_file_of_another_card_is_left_alone_and_one_of_this_card_is_added_to(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"smoke": False, "card": {"name": "A"}, "sections": {"card": {"status": "done"}}}))
    assert gpu_suite.started(out, {"name": "A"}, False)["sections"] == {"card": {"status": "done"}}
    for card, smoke in (({"name": "B"}, False), ({"name": "A"}, True), (None, False)):
        with pytest.raises(SystemExit, match="another card"):
            gpu_suite.started(out, card, smoke)
    assert gpu_suite.slug("NVIDIA A100-SXM4-40GB") == "nvidia_a100_sxm4_40gb"


def test_continuing_runs_only_what_is_not_done(monkeypatch, tmp_path):
    ran: list[str] = []
    monkeypatch.setattr(gpu_suite, "run_all", lambda document, out, names, *_, **__: ran.extend(names) or document)
    out = tmp_path / "gpu.json"
    states = {"card": "done", "untested_choices": "timed out"}
    entries = {name: {"status": status} for name, status in states.items()}
    out.write_text(json.dumps({"smoke": True, "card": None, "failed_checks": [], "sections": entries}))
    with pytest.raises(KeyError):  # nothing ran, so no list of failed checks was made
        gpu_suite.main(["--smoke", "--out", str(out), "--continue", "--sections", "card", "untested_choices"])
    assert ran == ["untested_choices"]


def test_without_a_gpu_the_full_suite_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--smoke"):
        on.pick(smoke=False)
    assert gpu_suite.main(["--out", str(tmp_path / "out.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_short_calls_are_repeated_within_a_sample():
    assert on.calls_for(CPU, lambda: time.sleep(0.005), 0.02) in (2, 3, 4)
    assert on.calls_for(CPU, lambda: None, 1.0) == 100
    sample = on.timed(CPU, lambda: time.sleep(0.005), 3)
    assert 0.005 <= sample.seconds < 0.05


def test_memory_errors_are_known_under_every_name():
    assert on.is_out_of_memory(torch.OutOfMemoryError())
    assert on.is_out_of_memory(RuntimeError("step 1: cannot be computed: CUDA out of memory. Tried to allocate"))
    assert not on.is_out_of_memory(RuntimeError("illegal memory access"))


def test_the_shapes_are_those_of_the_published_models():
    """Llama-3-8B and -70B: 8,030,261,248 and 70,553,706,496 parameters, as their model cards' files have it."""
    for settings, published in ((plan.FULL.middle, 8_030_261_248), (plan.FULL.large, 70_553_706_496)):
        layer = sum(out * in_ for out, in_ in shaped_model.linear_shapes(settings).values())
        hidden, layers = settings["hidden_size"], settings["num_hidden_layers"]
        total = layers * (layer + 2 * hidden) + hidden + 2 * settings["vocab_size"] * hidden
        assert total == published


def test_models_share_their_bytes_and_layers_have_their_own():
    weights = shaped_model.Weights(CPU)
    own = shaped_model.build(plan.SMOKE.middle, weights, "own")
    peft = shaped_model.build(plan.SMOKE.middle, weights, "peft")
    first, second = (own.model.layers[i].mlp.up_proj.packed for i in (0, 1))
    assert peft.model.layers[0].mlp.up_proj.weight.data_ptr() == first.data_ptr() != second.data_ptr()
    assert peft.lm_head.weight.data_ptr() == own.lm_head.weight.data_ptr()
    ids = torch.arange(12).unsqueeze(0)
    torch.testing.assert_close(own(input_ids=ids).logits, peft(input_ids=ids).logits, rtol=0.05, atol=0.02)
    before = weights.num_bytes
    weights.forget_from(1)
    assert set(weights._kept) == {path for path in weights._kept if path.startswith("layers.0.")} != set()
    assert weights.num_bytes < before


def test_the_embedding_on_the_host_is_that_of_a_run_and_stays_there():
    """So that a step looks up its rows by ids of the host, as in a run, and does not wait for the card."""

    class Elsewhere:
        device = torch.device("meta")

        def packed(self, _path, shape):
            return empty_packed("nf4", shape, device="meta")

        def dense(self, _path, shape):
            return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    model = shaped_model.build(plan.SMOKE.middle, Elsewhere(), "own", embedding_on_host=True)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    assert (embedding.weight.device.type, embedding.device.type) == ("cpu", "meta")
    others = [each for each in model.buffers() if each is not embedding.weight]
    assert {each.device.type for each in others} == {"meta"}


def test_kernels_of_an_annotation_count_once():
    def event(name, microseconds, *, on_gpu=True, annotation=False):
        kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
        times = {"self_device_time_total": microseconds, "self_cpu_time_total": 1.0}
        return SimpleNamespace(key=name, count=2, device_type=kind, is_user_annotation=annotation, **times)

    events = [event("adam", 5.0), event("Optimizer.step#AdamW.step", 5.0, annotation=True)]
    events.append(event("aten::add", 0.0, on_gpu=False))
    assert kernel_profile._rows(events, torch.device("cuda")) == [("adam", 5.0, 2)]
    assert kernel_profile._rows(events[2:], CPU) == [("aten::add", 1.0, 2)]


def test_layers_are_taken_off_until_a_step_fits(monkeypatch):
    weights = shaped_model.Weights(CPU)
    settings = plan.SMOKE.large | {"num_hidden_layers": 7}
    model = model_step.make_model(settings, "own_dora", CPU, rank=2, weights=weights, embedding_on_host=True)
    right = passes.batch_loss

    def fits_three(model: Any, *args: Any, **settings: Any) -> Any:
        if len(model.model.layers) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return right(model, *args, **settings)

    monkeypatch.setattr(passes, "batch_loss", fits_three)
    monkeypatch.setattr(model_step, "_LEAST_LAYERS", 1)
    found = model_step._fitting_layers(Part(None, 60), model, weights, "adamw", 16, CPU)
    assert (found["num_layers"], found["failed_with_layers"]) == (3, [7, 5])
    assert {path.split(".")[1] for path in weights._kept} == {"0", "1", "2"}


def test_a_model_that_does_not_load_is_loaded_with_fewer_layers(monkeypatch):
    right = shaped_model.Weights.packed

    def full(self: Any, path: str, shape: tuple[int, int]) -> Any:
        if path.startswith("layers.2."):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, path, shape)

    monkeypatch.setattr(shaped_model.Weights, "packed", full)
    part = Part(None, 60)
    model_step.large(part, plan.SMOKE, CPU)
    assert part.entries["loading_fails_in_layer"] == 2
    assert part.entries["adamw, 16 tokens"]["num_layers"] == 1


def test_a_contender_without_room_is_named_and_the_others_are_timed(monkeypatch):
    right = layer_cost.make_case

    def make(name: str, *args: Any) -> Any:
        if name == "peft_dora_defaults":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(name, *args)

    monkeypatch.setattr(layer_cost, "make_case", make)
    base = layer_cost.make_base((64, 64), CPU)
    found = layer_cost.time_case(plan.SMOKE, base, 2, 8)
    assert found["errors"] == {"peft_dora_defaults": "out of memory"}
    assert "own_dora / peft_lora" in found["ratios"]
    assert layer_cost.memory_case(base, 2, 8)["peft_dora_defaults"] == {"error": "out of memory"}


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
