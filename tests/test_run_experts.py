"""Whole runs on mixtures of experts: resumed, pruned, gated, cached, on two processes, exported, analysed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qdora.adapter import expert_tokens
from qdora.adapter.expert_linear import AdaptedExperts
from qdora.errors import Interrupted, UserError
from qdora.export.export_run import export_run
from qdora.export.logit_comparison import comparison_text
from qdora.export.options import ExportOptions
from qdora.export.verify import verify_merged
from qdora.files.run_directory import RunDirectory
from qdora.model import experts
from qdora.model.experts import use_expert_layers_
from qdora.model.inject import adapted_layers
from qdora.model.load import load_model
from qdora.model.source import resolve
from qdora.rank.rank import RankSettings, rank_run
from qdora.rank.update_gradient import gradient_spectra, update_spectrum
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from qdora.train.expert_load import FILE, ExpertLoad
from tests import support
from tests.support import assert_same_run, stop_after
from tests.test_train_distributed import assert_close_runs

QUIET = Console(quiet=True)
IDS = torch.randint(3, 327, (2, 12), generator=torch.Generator().manual_seed(7))
SHORT: dict[str, Any] = {"train__steps": 4, "eval__at_start": False, "eval__at_end": False, "eval__limit": ...}
PRUNE = {"method": "wanda", "pattern": "2:4", "calibration": {"sequences": 2, "length": 16}}
GATES = {"mean_rank": 1.5, "warmup": 1, "anneal": 2, "shrink_every": 1, "lr": 0.05}
NO_FACTORS = {f"adapter__{key}": ... for key in ("rank", "alpha", "dropout", "experts")}


def recipe(root: Path, name: str = "qwen3_moe", **changes: Any) -> Any:
    """Experts of rank 2 beside attention of rank 4."""
    folder = root / name
    if not (folder / "model").exists():
        support.write_mixture(folder / "model", name)
    return support.tiny_recipe(folder, **({"adapter__experts": {"rank": 2}} | SHORT | changes))


def exported(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    found = export_run(run, out, ExportOptions(**{"dtype": "float32"} | options), console=QUIET)
    assert found["verification"]["passed"], found["verification"]["faults"]
    return found


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    train_run(recipe(root, train__lr=0.02), root / "run", console=QUIET)
    return root / "run"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


CASES: dict[str, dict[str, Any]] = {
    "gates": {"adapter__gates": GATES, "adapter__experts": {"rank": 3}},
    "pruned": {"base__prune": PRUNE, "adapter__mask": "keep"},
    "full": {"adapter__kind": "full", "base__quant": "none", **NO_FACTORS},
}


@pytest.mark.parametrize(
    "changes",
    [pytest.param(each, id=name, marks=[pytest.mark.slow] * (name == "pruned")) for name, each in CASES.items()],
)
def test_resumed_and_exported(
    root: Path, tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(root, "gpt_oss" if "adapter__kind" in changes else "qwen3_moe", **changes)
    train_run(asked, tmp_path / "whole", console=QUIET)
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        train_run(asked, tmp_path / "run", console=QUIET)
    monkeypatch.undo()
    train_run(asked, tmp_path / "run", resume=True, console=QUIET)
    if asked.adapter.kind == "full":
        first, second = (load_file(tmp_path / each / "adapter/parameters.safetensors") for each in ("whole", "run"))
        assert first.keys() == second.keys()
        assert any("experts.down_proj.bias" in name for name in first)
        assert all(torch.equal(first[name], second[name]) for name in first)
    else:
        assert_same_run(tmp_path / "whole", tmp_path / "run", step=4)
        assert (tmp_path / "whole" / FILE).read_text() == (tmp_path / "run" / FILE).read_text()
    found = exported(tmp_path / "run", tmp_path / "out")
    if asked.adapter.mask == "keep":
        assert found["zeros"]["kept"] == found["zeros"]["pruned"] > 0
    if asked.adapter.gates is not None:
        layers = adapted_layers(load_run(tmp_path / "run").model)
        assert sum(layer.rank for layer in layers.values()) == 1.5 * len(layers)
        assert {layer.rank for layer in layers.values() if isinstance(layer, AdaptedExperts)} <= {1, 2, 3}


@pytest.mark.parametrize("kind", ["magnitude", "none"])
def test_other_kinds_are_exported_as_they_run(root: Path, tmp_path: Path, kind: str) -> None:
    steps = {"train__steps": 0} if kind == "none" else {}
    train_run(recipe(root, adapter__kind=kind, **NO_FACTORS, **steps), tmp_path / "run", console=QUIET)
    layers = adapted_layers(load_run(tmp_path / "run").model)
    assert len(layers) == (12 if kind == "magnitude" else 0)
    for layer in layers.values():
        assert not layer.lora_B.any()
        assert not torch.equal(layer.magnitude.square(), layer.base_squared)
    exported(tmp_path / "run", tmp_path / "out")


def test_the_export_is_audited_and_runs_elsewhere(run: Path, tmp_path: Path) -> None:
    found = exported(run, tmp_path / "out", audit=True)
    weights, forms = found["verification"]["weights"], found["audit"]["forms"]
    assert weights["num_layers"] == 12
    assert weights["num_rows"] > 4 * 60 + 8 * 16, "those of the stacks, too"
    assert forms.keys() == {"adapter", "base", "merged", "original", "requantized", "nf4-lora"}
    assert forms["merged"]["logits"]["kl_mean"] < 1e-8 < forms["base"]["logits"]["kl_mean"]
    assert forms["original"]["logits"]["kl_mean"] > 1e-4
    assert "a stack of experts" in forms["nf4-lora"]["why_not"]
    own = load_model(resolve(str(tmp_path / "out")), quant="none", compute_dtype=torch.float32)
    loaded = load_run(run)
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for model in (own, library):
        torch.testing.assert_close(logits(model), logits(loaded.model), rtol=0, atol=2e-4)
    said = [
        model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=399, pad_token_id=0)
        for model in (loaded.model, library)
    ]
    assert torch.equal(*said)
    assert said[0].shape[1] == IDS.shape[1] + 6
    (file,) = (tmp_path / "out").glob("*.safetensors")  # a wrong expert in it is noticed
    tensors = load_file(file)
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] *= 1.0001
    save_file(tensors, file, {"format": "pt"})
    check = verify_merged(loaded.model, tmp_path / "out", comparison_text(loaded.tokenizer, {}))
    assert check["weights"]["worst_layer"] == "model.layers.1.mlp.experts.gate_up_proj"
    assert not check["passed"]


@pytest.mark.parametrize("options", [{"format_": "nf4-lora"}, {"requantize": True}], ids=str)
def test_forms_in_4_bits_are_refused(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"does not load 4 layers .* a stack of experts\)\. Fix: use --format merged"):
        export_run(run, tmp_path / "out", ExportOptions(**options), console=QUIET)
    assert not (tmp_path / "out").exists()


def test_what_a_run_leaves_names_the_experts(run: Path, tmp_path: Path) -> None:
    checks = json.loads((run / "checks.json").read_text())
    assert {check["state"] for group in checks.values() for check in group} == {"passed"}
    layers = {each["path"]: each for each in json.loads((run / "trained.json").read_text())["layers"]}
    name = "model.layers.0.mlp.experts.down_proj"
    stack = adapted_layers(load_run(run).model)[name]
    update = stack.scaling * (stack.lora_B.detach().double() @ stack.lora_A.detach().double())
    expected = float(update.norm() / stack.base.dequantized(torch.float64).norm())
    assert layers[name]["update"] == pytest.approx(expected, rel=1e-3)
    record = json.loads((run / FILE).read_text())
    assert (record["num_steps"], record["window"], len(record["blocks"])) == (4, 2, 2)
    assert all(sum(block["last"]) == pytest.approx(1) for block in record["blocks"].values())
    assert "Experts: between the first and the last 2 steps" in (run / "log.txt").read_text()
    console = Console(file=io.StringIO(), width=130)
    export_run(run, tmp_path / "out", ExportOptions(format_="peft"), console=console)
    assert "PEFT has no DoRA for experts, so only qdora loads this adapter." in console.file.getvalue()


def test_curvature_gives_ranks_of_experts(run: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    asked = RankSettings(layers=[name], examples=2, max_rank=3, draws=8, eigenvalues=2)
    layer = rank_run(run, asked, console=QUIET)["layers"][name]
    found = layer["components"]
    assert np.shape(found["worths"]) == np.shape(found["curvature_errors"]) == (4, 2 + 3)
    worths = np.sort(found["worths"], axis=1)[:, ::-1].sum(axis=0)
    np.testing.assert_allclose(layer["energies"], worths[:3])
    assert layer["spectrum"]["size"] == 2 * layer["parameters_per_rank"]
    assert np.shape(layer["spectrum"]["eigenvalues"]) == (2,)


@pytest.mark.parametrize("share", ["none", "A", "B"])
@pytest.mark.parametrize("kind, norm", [("lora", "none"), ("dora", "held")])
def test_spectra_of_stacks_are_those_of_the_formed_matrices(tmp_path: Path, kind: Any, norm: Any, share: Any) -> None:
    model, layers = support.adapted_mixture(tmp_path, kind=kind, share=share)
    plain = load_model(resolve(str(tmp_path)), quant="none", compute_dtype=torch.float64)
    gains = {}
    for name, layer in layers.items():
        base = plain.get_submodule(name).weight.detach()
        update = (layer.scaling * (layer.lora_B.detach() @ layer.lora_A.detach())).reshape(base.shape)
        length = (base + update).square().sum(1).sqrt()
        magnitude = length if layer.magnitude is None else layer.magnitude.detach().flatten()
        gains[name] = magnitude / length
        plain.get_submodule(name).weight = torch.nn.Parameter(gains[name][:, None] * (base + update))
        if isinstance(layer, AdaptedExperts):
            shown = update if share == "B" else gains[name][:, None] * update
            values = [torch.linalg.svdvals(part).square()[:3] for part in support.parts_of_experts(shown, 4, share)]
            np.testing.assert_allclose(update_spectrum(layer).energies, torch.stack(values).sum(0).numpy(), rtol=1e-8)
    batches = support.curved_batches()
    found = gradient_spectra(model, list(layers), batches, 5, norm=norm)
    total, count = torch.zeros(()), 0
    for batch in batches:
        out = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].double()
        wanted = batch.labels[:, 1:]
        total = total + torch.nn.functional.cross_entropy(out.flatten(0, 1), wanted.flatten(), reduction="sum")
        count += int((wanted != -100).sum())
    weights = [plain.get_submodule(name).weight for name in layers]
    for name, gradient in zip(layers, torch.autograd.grad(total / count, weights), strict=True):
        gradient = gains[name][:, None] * gradient
        is_stack = isinstance(layers[name], AdaptedExperts)
        parts = support.parts_of_experts(gradient, 4, share) if is_stack else [gradient]
        values = torch.stack([torch.linalg.svdvals(part).square() for part in parts]).sum(0)
        np.testing.assert_allclose(found[name].energies, values[:5].numpy(), rtol=1e-4, atol=1e-9 * float(values[0]))
        assert found[name].cost * 3 == layers[name].lora_A.numel() + layers[name].lora_B.numel()


def reached_and_trained(rank: int, settings: Any, directory: Path) -> None:
    """Train, and leave which experts this process reached in each product of a block."""
    count, seen = experts._counts, []

    def noted(owners: Tensor, num_experts: int) -> list[int]:
        found = count(owners, num_experts)
        seen.append([expert for expert, number in enumerate(found) if number])
        return found

    experts._counts = noted
    train_run(settings, directory)
    directory.with_name(f"reached-{rank}.json").write_text(json.dumps(seen))


HARD = {"adapter__gates": {**GATES, "mode": "hard_concrete"}}


@pytest.mark.parametrize("gates", [{}, pytest.param(HARD, marks=pytest.mark.slow)], ids=["plain", "gates"])
def test_two_processes_train_what_one_does(tmp_path: Path, gates: dict[str, Any]) -> None:
    """Also where an expert is reached by the tokens of one process only."""
    support.mixture("qwen3_moe", num_experts=16).save_pretrained(tmp_path / "model")
    support.tokenizer().save_pretrained(tmp_path / "model")
    exact = {"adapter__dropout": 0.0, "adapter__dtype": "float32", "train__batch": 2}
    settings = support.tiny_recipe(tmp_path, **SHORT | exact | gates, adapter__experts={"rank": 2})
    train_run(settings, tmp_path / "one", console=QUIET)
    assert support.run_processes(2, reached_and_trained, settings, tmp_path / "two") == ["", ""]
    assert_close_runs(tmp_path / "one", tmp_path / "two")
    first, second = (json.loads((tmp_path / f"reached-{rank}.json").read_text()) for rank in (0, 1))
    assert any(set(one) != set(other) for one, other in zip(first, second, strict=False))


DENSE_EXPERTS: dict[str, Any] = {"base__skip": ["lm_head", "experts"], "train__lr": 0.03}


def test_dense_experts_leave_with_a_base_in_4_bits(root: Path, tmp_path: Path) -> None:
    """As LoRA that PEFT reads: the gain is in the dense weights, too, and float32 loses nothing of it.

    Beside a linear layer that weighs the shared expert, which stays dense where others are quantised again.
    """
    run = tmp_path / "dense"
    experts = {"adapter__experts": {"rank": 2, "share": "B"}}
    train_run(recipe(root, "qwen2_moe", **DENSE_EXPERTS, **experts), run, console=QUIET)
    with pytest.raises(UserError, match=r"is a DoRA layer on a dense weight, .* Fix: use --dtype float32"):
        export_run(run, tmp_path / "b", ExportOptions(format_="nf4-lora", dtype="bfloat16"), console=QUIET)
    found = exported(run, tmp_path / "out", format_="nf4-lora", audit=True)
    layers = found["verification"]["weights"]["num_layers"]
    assert layers == found["num_adapted_layers"] == found["num_folded_layers"]
    assert found["audit"]["forms"]["nf4-lora"]["logits"]["kl_mean"] < 1e-8
    exported(run, tmp_path / "again", requantize=True, dtype=None)
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    names = {name: type(module).__name__ for name, module in library.named_modules()}
    assert names["model.layers.0.mlp.shared_expert_gate"] == "Linear"
    assert names["model.layers.0.mlp.shared_expert.up_proj"] == "Linear4bit"


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("gpt_oss", "deepseek_v3") else pytest.param(name, marks=pytest.mark.slow)
        for name in support.MIXTURES
    ],
)
def test_a_merged_run_of_each_family_runs_in_transformers(root: Path, tmp_path: Path, name: str) -> None:
    train_run(recipe(root, name, train__lr=0.03), tmp_path / "run", console=QUIET)
    export_run(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="float32"), console=QUIET)
    library = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    wanted, base = (logits(load_run(tmp_path / "run", base_only=only).model) for only in (False, True))
    assert float((base - wanted).abs().max()) > 0.01 * float(wanted.std()), "training changed something"
    torch.testing.assert_close(logits(library), wanted, rtol=0, atol=1e-4 * float(wanted.std()))


@pytest.mark.parametrize("padded", [False, True])
def test_shares_are_those_of_the_router(monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    monkeypatch.setattr(experts, "needs_padding", lambda *_: padded)
    monkeypatch.setattr(expert_tokens, "_MOST_PADDING", 1.0)
    model = support.mixture("olmoe")
    wanted: list[np.ndarray] = []
    for block in model.model.layers:
        block.mlp.gate.register_forward_hook(
            lambda _module, _inputs, out: wanted.append(np.bincount(out[2].reshape(-1), minlength=4))
        )
    use_expert_layers_(model)
    load = ExpertLoad(model)
    model(torch.arange(3, 43).view(2, 20))  # evaluation does not count
    wanted.clear()
    model.train()
    batches = [torch.arange(3, 43).view(2, 20), torch.arange(50, 90).view(2, 20)]
    for batch in (batches[0], *batches):  # the first step is computed twice, as after a lack of memory
        load.begin()
        model(batch)
        if len(wanted) > 2:
            load.step()
    wanted = wanted[2:]
    record = load.record()
    assert (record["num_steps"], record["window"]) == (2, 1)
    first, second = record["blocks"].values()
    assert first["first"] == pytest.approx(wanted[0] / wanted[0].sum())
    assert second["last"] == pytest.approx(wanted[3] / wanted[3].sum())
    assert first["moved"] == pytest.approx(np.abs(wanted[2] - wanted[0]).sum() / 2 / wanted[0].sum())
    assert first["noise"] is None, "a single step has no spread"


def counted(*divisions: tuple[float, ...], steps: int = 10, seed: int | None = None) -> dict[str, Any]:
    """The record of `steps` steps with each division of the tokens, drawn for 200 tokens if there is a seed."""
    load = ExpertLoad(torch.nn.Module())
    random = None if seed is None else np.random.default_rng(seed)
    load._now = {"mlp.experts": np.zeros(len(divisions[0]), np.int64)}
    for division in divisions:
        for _ in range(steps):
            load._now["mlp.experts"][:] = division if random is None else random.multinomial(200, division)
            load.step()
    record = load.record()
    return {"window": record["window"], **record["blocks"]["mlp.experts"]}


def test_moved_is_what_went_elsewhere_and_noise_what_moves_by_chance(tmp_path: Path) -> None:
    none = pytest.approx(0, abs=1e-15)
    found = counted((9, 1), (5, 5), steps=3)
    assert found == {"window": 3, "first": [0.9, 0.1], "last": [0.5, 0.5], "moved": pytest.approx(0.4), "noise": none}
    found = counted((6, 4, 0), (5, 5, 0), (3, 4, 3))  # the first and the last ten of thirty
    assert (found["window"], found["first"], found["last"]) == (10, [0.6, 0.4, 0.0], [0.3, 0.4, 0.3])
    assert found["moved"] == pytest.approx(0.3)
    division = (0.4, 0.3, 0.2, 0.06, 0.04)
    records = [counted(division, division, seed=seed) for seed in range(300)]
    # Of multinomial draws, from the mean of the absolute value of a normal variable.
    expected = sum(math.sqrt(2 * p * (1 - p) / 2000 * 2 / math.pi) for p in division) / 2
    for name in ("moved", "noise"):
        assert np.mean([record[name] for record in records]) == pytest.approx(expected, rel=0.06)
    changed = counted(division, (0.2, 0.3, 0.2, 0.16, 0.14), seed=0)
    assert changed["moved"] > 6 * changed["noise"]
    assert changed["noise"] == pytest.approx(expected, rel=0.5), "a change does not count as noise"
    ExpertLoad(torch.nn.Linear(2, 2)).write(RunDirectory(tmp_path))
    assert not (tmp_path / FILE).exists()
