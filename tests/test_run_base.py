"""The base of a run: recorded, pruned once, streamed, or with new tokens; the same one in all that follows."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdora.errors import UserError
from qdora.export.export import export_run
from qdora.export.verify import comparison_text, verify_merged
from qdora.files.run_directory import RunDirectory
from qdora.model.build_model import choose_compute, find_model
from qdora.model.inject import adapted_layers
from qdora.model.tokens import extend_vocabulary, new_token_ids, trained_matrices
from qdora.plan import plan as parts
from qdora.plan.fit import plan
from qdora.recipe.options import EvalOptions, ExportOptions, GenerateOptions, Sampling
from qdora.recipe.recipe_file import load_recipe, override
from qdora.recipe.section import with_settings
from qdora.recipe.settings import CalibrationConfig, Recipe
from qdora.run import base as calibration
from qdora.run.base import load_base, residency_here, residency_of
from qdora.run.load_run import load_run
from qdora.run.run import train_run
from qdora.run.verbs import evaluate_target, generate_from
from tests import support
from tests.support import assert_same_run
from tests.test_plan_memory import a_config, a_recipe

QUIET = Console(quiet=True)
OLD, NEW = "a" * 40, "b" * 40


def nll(target: Path) -> float:
    return float(evaluate_target(str(target), console=QUIET)["evaluation"]["average"]["nll_per_token"])


def change_weights_(directory: Path) -> None:
    """Other weights in files of the same names and sizes."""
    file = directory / "model.safetensors"
    torch.manual_seed(1)
    changed = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", autouse=True)
def _model(root: Path) -> None:
    """Its rows are whole blocks of 64."""
    support.write_llama(root / "model", intermediate_size=128)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with two commits, main at the older one: of org/small with other weights, and of org/words, a
    tokenizer, with other ids."""
    cache = tmp_path / "cache"
    for commit in (OLD, NEW):
        support.write_llama(cache / "models--org--small/snapshots" / commit)
        tokenizer = support.tokenizer()
        if commit == NEW:
            change_weights_(cache / "models--org--small/snapshots" / commit)
            tokenizer.add_tokens(["+", "follows"])
        tokenizer.save_pretrained(cache / "models--org--words/snapshots" / commit)
    move_main(cache, OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def move_main(cache: Path, commit: str) -> None:
    for repository in cache.iterdir():
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(commit)


@pytest.mark.parametrize(("what", "revision"), [("base", None), ("tokenizer", "main")])
def test_a_moved_branch(tmp_path, hub, what, revision):
    names = {"model__source": "org/small", "model__revision": revision}
    if what == "tokenizer":
        names = {"model__tokenizer": "org/words", "model__tokenizer_revision": revision}
    recipe, run = support.tiny_recipe(tmp_path, **names, train__steps=2, eval__at_start=False), tmp_path / "run"

    def kept() -> str | None:
        model = load_recipe(run / "recipe.yaml").model
        return model.revision if what == "base" else model.tokenizer_revision

    train_run(recipe, run, console=QUIET)
    assert kept() == OLD
    before = nll(run)
    move_main(hub, NEW)
    assert nll(run) == before
    again = load_recipe(run / "recipe.yaml", ["train.steps=3"])
    # With no revision as a study resumes its cells, which have none
    train_run(override(recipe, ["train.steps=3"]) if revision is None else again, run, resume=True, console=QUIET)
    assert kept() == OLD
    setting, fault = "model.revision", "org/small is not the base that was trained on"
    if what == "tokenizer":
        setting, fault = "model.tokenizer_revision", "source letters differs from that of the checkpoint"
    with pytest.raises(UserError, match=fault):
        train_run(override(again, ["train.steps=4", f"{setting}={NEW}"]), run, resume=True)
    if what == "base":
        files = ("adapter_config.json", "qdora.json")
        adapter, own = (json.loads((run / "adapter" / name).read_text()) for name in files)
        assert adapter["revision"] == own["base"]["revision"] == OLD
        assert export_run(run, tmp_path / "out", console=QUIET)["verification"]["passed"]
        shutil.rmtree(hub / "models--org--small/snapshots" / OLD)
        with pytest.raises(UserError, match=f"org/small at {OLD}: .* LocalEntryNotFoundError"):
            load_run(run)


def test_a_base_that_has_changed_in_its_place_is_refused(tmp_path):
    recipe, run, out = support.tiny_recipe(tmp_path, train__steps=2), tmp_path / "run", tmp_path / "out"
    train_run(recipe, run, console=QUIET)
    longer = load_recipe(run / "recipe.yaml", ["train.steps=4"])
    change_weights_(tmp_path / "model")
    for call in (
        lambda: nll(run),
        lambda: export_run(run, out, console=QUIET),
        lambda: train_run(longer, run, resume=True),
    ):
        with pytest.raises(UserError, match=r"model is not the base that was trained on: model\.safetensors differs\."):
            call()
    assert load_recipe(run / "recipe.yaml").train.steps == 2
    assert not out.exists()


PRUNE = {"method": "wanda", "pattern": "2:4", "calibration": {"sequences": 4, "length": 48}}


def pruned_recipe(root: Path, prune: dict[str, Any] = PRUNE, **changes: Any) -> Recipe:
    return support.tiny_recipe(root, base__prune=prune, train__steps=3, **changes)


@pytest.fixture(scope="module")
def pruned(root: Path) -> Path:
    train_run(pruned_recipe(root), root / "pruned", console=QUIET)
    return root / "pruned"


def test_evaluation_and_export_take_the_pruned_base_that_was_trained_on(pruned, tmp_path):
    record = json.loads((pruned / "base/compressed.json").read_text())
    assert (record["sparsity"], record["settings"]["prune"]["pattern"], len(record["layers"])) == (0.5, "2:4", 14)
    assert all((layer["sparsity"], layer["kind"]) == (0.5, "nf4") for layer in record["layers"].values())
    assert all(0.1 < layer["relative_error"] < 1 for layer in record["layers"].values())
    adapter = json.loads((pruned / "adapter/qdora.json").read_text())
    assert adapter["base"]["quant"]["prune"]["method"] == "wanda"
    assert (
        "Compressed 14 layers to nf4, blocks of 64, scales quantised, too; 50.00 %" in (pruned / "log.txt").read_text()
    )
    stored = {}
    for file in (pruned / "base").glob("*.safetensors"):
        stored |= load_file(file)
    for path, layer in adapted_layers(load_run(pruned).model).items():
        packed = layer.base.stored_weight
        assert torch.equal(packed.packed, stored[f"{path}.weight"].view(-1))
        assert not layer.base.dequantized()[~layer.base.keep_mask()].any()
    evaluated = evaluate_target(str(pruned), EvalOptions(split="validation"), console=QUIET)["evaluation"]
    at_end = json.loads((pruned / "eval/step-3.json").read_text())
    assert evaluated["tasks"]["sums"]["nll_per_token"] == at_end["tasks"]["sums"]["nll_per_token"]
    found = export_run(pruned, tmp_path / "merged", ExportOptions(dtype="float32"), console=QUIET)
    assert found["verification"]["passed"]


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit", "paged_lion_8bit"])
def test_full_fine_tuning_keeps_the_zeros(root, tmp_path, optimizer):
    """A first step without clipping is that of a dense run from the pruned weights, but for the zeros."""
    no_adapter = {f"adapter__{name}": ... for name in ("rank", "alpha", "dropout")}
    changes = no_adapter | {"adapter__kind": "full", "base__quant": "none", "train__optimizer": optimizer}
    changes |= {"train__warmup": 0, "train__clip": None, "train__weight_decay": 0.1, "model__dtype": "bfloat16"}
    recipe = pruned_recipe(root, {"method": "magnitude", "pattern": "2:4"}, **changes, adapter__mask="keep")
    train_run(recipe, tmp_path / "run", console=QUIET)
    support.train_until(recipe, tmp_path / "again", 2)
    train_run(recipe, tmp_path / "again", resume=True, console=QUIET)
    file = "adapter/parameters.safetensors"
    support.same_tensors(tmp_path / "run" / file, tmp_path / "again" / file)
    zeros = dict[str, torch.Tensor]()
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "_proj" in name:  # magnitude, 2:4
            groups = weight.detach().view(-1, 4)
            zeros[name] = torch.ones_like(groups).scatter_(1, groups.abs().topk(2).indices, 0).bool().view_as(weight)
            weight.data.masked_fill_(zeros[name], 0)
    found = export_run(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="bfloat16"), console=QUIET)
    assert found["verification"]["passed"]
    exported = load_file(tmp_path / "out/model.safetensors")
    for name, zero in zeros.items():
        assert torch.equal(exported[name] == 0, zero), name
    shutil.copytree(root / "model", tmp_path / "dense/model")
    model.save_pretrained(tmp_path / "dense/model")
    for each, directory in ((recipe, root), (support.tiny_recipe(tmp_path / "dense", **changes), tmp_path / "dense")):
        train_run(with_settings(each, train={"steps": 1}), directory / f"one-{optimizer}", console=QUIET)
    masked, dense = (load_file(each / f"one-{optimizer}" / file) for each in (root, tmp_path / "dense"))
    for name, weight in dense.items():
        zero = zeros.get(name, torch.zeros(()).bool())
        assert torch.equal(masked[name], weight.masked_fill(zero, 0)), name
    assert all(dense[name][zero].any() for name, zero in zeros.items())
    masks = plan(recipe, device_kind="cpu").moments[0].by_component[parts.MASKS]
    assert masks == sum(zero.numel() for zero in zeros.values()) / 8


def test_a_source_of_weight_0_is_evaluated_and_never_drawn(root, tmp_path):
    """Neither for training nor for calibration: the rest is that of a run without it."""
    both = support.tiny_recipe(root, base__prune=PRUNE, train__steps=..., train__epochs=1)
    sums, letters = (each.model_copy(update={"weight": float(each is both.data.mix[0])}) for each in both.data.mix)
    for name, mix in (("both", (sums, letters)), ("one", (sums,))):
        train_run(with_settings(both, data={"mix": mix, "strategy": "weights"}), tmp_path / name, console=QUIET)
    for file in (support.ADAPTER, "checkpoints/step-7/optimizer.safetensors", "base/model-00000.safetensors"):
        support.same_tensors(tmp_path / "both" / file, tmp_path / "one" / file)
    scores = json.loads((tmp_path / "both/eval/step-7.json").read_text())
    assert scores["tasks"].keys() == {"sums", "letters"}
    few = tuple(each.model_copy(update={"max_epochs": 0.5}) for each in (sums, letters))
    for name, mix in (("capped", (few[0], letters)), ("all capped", few)):  # the others are used up before the end
        capped = with_settings(both, data={"mix": mix, "strategy": "weights"}, train={"epochs": 2})
        train_run(capped, tmp_path / name, console=QUIET)
        sources = json.loads((tmp_path / name / "mix.json").read_text())["sources"]
        assert [(each["num_draws"], each["num_examples"]) for each in sources] == [(14, 28), (0, 22)]


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("case", ["stopped", "another recipe before"])
def test_resumed_on_its_own_pruned_base(root, pruned, tmp_path, case, monkeypatch):
    """Without another compression, unless an earlier start with another recipe has left its base."""
    run = tmp_path / "run"
    if case == "stopped":
        support.train_until(pruned_recipe(root), run, 2)
        monkeypatch.setattr("qdora.run.run.compress_base", interrupt)
    else:
        for until, pattern in (("qdora.run.run.adapt", "6:8"), ("qdora.run.run.compress_base", "2:4")):
            with monkeypatch.context() as patch:
                patch.setattr(until, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    train_run(pruned_recipe(root, {**PRUNE, "pattern": pattern}), run, console=QUIET)
        assert json.loads((run / "base/compressed.json").read_text())["sparsity"] == 0.25
    train_run(pruned_recipe(root), run, resume=True, console=QUIET)
    assert_same_run(run, pruned, step=3)


def test_sparsegpt_by_a_text_on_a_dense_base(root, tmp_path):
    (tmp_path / "text.txt").write_text("a sum of numbers and letters. " * 60)
    prune: dict[str, Any] = {"method": "sparsegpt", "sparsity": 0.6}
    prune |= {"calibration": {"sequences": 3, "length": 32, "text": str(tmp_path / "text.txt")}}
    train_run(pruned_recipe(root, prune, base__quant="none"), tmp_path / "run", console=QUIET)
    record = json.loads((tmp_path / "run/base/compressed.json").read_text())
    assert record["sparsity"] == pytest.approx(0.6, abs=0.001)
    layers = adapted_layers(load_run(tmp_path / "run").model).values()
    assert len(layers) == 14
    assert not any(layer.base.dequantized()[~layer.base.keep_mask()].any() for layer in layers)


def test_calibration_takes_pieces_of_the_text(root, tmp_path):
    settings, ids = CalibrationConfig(sequences=50, length=5, seed=1), list(range(10, 30))
    found = calibration.pieces(ids, [1], settings)
    assert found.shape == (50, 5)
    assert bool((found[:, 0] == 1).all())
    assert bool((found[:, 1:].diff(dim=1) == 1).all())
    assert (found[:, 1].min(), found[:, 4].max()) == (10, 29)
    assert torch.equal(found, calibration.pieces(ids, [1], settings))
    assert calibration.pieces(ids[:4], [1], settings).unique().tolist() == [1, 10, 11, 12, 13]
    with pytest.raises(UserError, match="got 5, but the text has only 3 tokens"):
        calibration.pieces([1, 2, 3], [1], settings)
    long = {**PRUNE, "calibration": {"sequences": 1, "length": 129}}
    with pytest.raises(UserError, match=r"base\.prune\.calibration\.length: must be at most 128"):
        train_run(pruned_recipe(root, long), tmp_path / "run")


def test_a_quantised_checkpoint_is_not_compressed(tmp_path, monkeypatch):
    """Nor is any data read."""
    recipe, file = pruned_recipe(tmp_path), tmp_path / "model/config.json"
    form = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": form}))
    monkeypatch.setattr("qdora.run.prepare.read_data", None)
    with pytest.raises(UserError, match=r"model\.source: is in nf4; base\.prune and .* need full precision"):
        train_run(recipe, tmp_path / "run")


def test_runs_that_share_a_base_compress_it_once(root, pruned):
    arms = {
        "dora": pruned_recipe(root),
        "lora": pruned_recipe(root, adapter__kind="lora"),
        "denser": pruned_recipe(root, {**PRUNE, "pattern": "6:8"}),
        "other text": pruned_recipe(root, {**PRUNE, "calibration": {"sequences": 4, "length": 40}}),
    }
    for name, each in arms.items():
        shared = with_settings(each, base={"cache": str(root / "shared")})  # as a study does
        train_run(shared, root / name, console=QUIET)
    assert len(list((root / "shared").glob("[!.]*"))) == 3
    files = {name: root / name / "base/model-00000.safetensors" for name in arms}
    assert [files["dora"].samefile(files[name]) for name in ("lora", "denser", "other text")] == [True, False, False]
    assert_same_run(root / "dora", pruned, step=3)
    load_run(root / "lora")  # it is whole by itself


def test_a_base_by_gptq_survives_a_kill_is_cached_and_stays_with_its_run(root, tmp_path, monkeypatch):
    def recipe(cache: str, **changes: Any) -> Recipe:
        by_gptq = {"base__quant": "int3", "base__method": "gptq", "base__calibration": {"sequences": 4, "length": 48}}
        return support.tiny_recipe(root, **by_gptq, base__cache=str(tmp_path / cache), train__steps=3, **changes)

    whole, run, lora, streamed = (tmp_path / name for name in ("whole", "run", "lora", "streamed"))
    train_run(recipe("one"), whole, console=QUIET)
    writes = support.killed_at_second_write(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train_run(recipe("two"), run, console=QUIET)
    train_run(recipe("two"), run, resume=True, console=QUIET)
    assert_same_run(run, whole, step=3)
    (cached,) = (tmp_path / "two").glob("[!.]*")
    found = [{file.name: file.read_bytes() for file in sorted(folder.iterdir())} for folder in
             (whole / "base", run / "base", cached)]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert [*found[0]] == ["compressed.json", "model-00000.safetensors", "model-00001.safetensors"]
    train_run(recipe("two", adapter__kind="lora"), lora, console=QUIET)
    with monkeypatch.context() as patch:
        support.stream_on_cpu(patch)
        train_run(recipe("two", base__residency="host"), streamed, console=QUIET)
    assert_same_run(streamed, whole, step=3)
    assert len(writes) == 3  # a block is made once
    shutil.rmtree(tmp_path / "two")
    support.assert_resumes(recipe("three"), whole, tmp_path / "resumed", stop_at=2, step=3)
    evaluated = evaluate_target(str(run), EvalOptions(split="validation"), console=QUIET)["evaluation"]
    at_end = json.loads((run / "eval/step-3.json").read_text())
    assert evaluated["tasks"]["sums"]["nll_per_token"] == at_end["tasks"]["sums"]["nll_per_token"]
    for original in ("dequantized", "original"):
        options = ExportOptions(dtype="float32", base=original)
        assert export_run(run, tmp_path / original, options, console=QUIET)["verification"]["passed"]
    assert "int3, blocks of 64, scales quantised, too, by GPTQ with clipped scales" in (run / "README.md").read_text()
    assert json.loads((run / "adapter/qdora.json").read_text())["base"]["quant"]["method"] == "gptq"
    shutil.rmtree(run / "base")
    with pytest.raises(UserError, match=r"compressed\.json: missing"):  # and not rounded anew
        load_run(run)


# --- streamed


def test_the_residency_of_the_last_start_is_that_of_later_commands(root, tmp_path, caplog):
    run, gpu, given = RunDirectory(tmp_path), torch.device("cuda"), support.tiny_recipe(root)
    chosen = override(given, ["base.residency=host", "base.streamed_blocks=1"])
    assert residency_here(run, chosen, gpu) == chosen
    run.write_json("environment.json", {"residency": residency_of(given)})
    assert residency_here(run, chosen, gpu) == given
    run.write_json("environment.json", {"residency": residency_of(chosen)})
    assert residency_here(run, given, gpu) == chosen
    assert residency_here(run, given, gpu, differentiated=True).base.residency == "device"
    with caplog.at_level(logging.INFO, logger="qdora"):
        assert residency_here(run, given, torch.device("cpu")).base.residency == "device"
    assert "using device instead of host" in caplog.text


TOKENS = ["<sum>", "<end>"]
NEW_ROWS = {"model__add_tokens": TOKENS, "adapter__also_train": ["embed_tokens", "lm_head"]}
WHOLE = NEW_ROWS | {"adapter__also_train_rows": "all"}
TEXT = "<sum>3 + 4 = 7<end>"


def token_recipe(root: Path, **changes: Any) -> Recipe:
    """The tiny recipe on sums whose text has the new tokens."""
    found, sums = support.tiny_recipe(root, **changes), root / "marked.jsonl"
    rows = [{"prompt": f"<sum>{a} + {b} =", "completion": f" {a + b}<end>"} for a in range(6) for b in range(5)]
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = found.data.mix[0].model_copy(update={"source": str(sums)})
    return with_settings(found, data={"mix": (source,)})


@pytest.fixture(scope="module")
def rows_run(root: Path) -> Path:
    train_run(token_recipe(root, **NEW_ROWS), root / "rows", console=QUIET)
    return root / "rows"


@pytest.fixture(scope="module", params=["rows", "whole"])
def run(root: Path, rows_run: Path, request: pytest.FixtureRequest) -> Path:
    if request.param == "rows":
        return rows_run
    train_run(token_recipe(root, **WHOLE), root / "whole", console=QUIET)
    return root / "whole"


def test_new_rows_move_and_all_others_stay_bit_for_bit(root, rows_run):
    asked = token_recipe(root, **NEW_ROWS)
    source, tokenizer = find_model(asked)
    model: Any = load_base(asked, source, choose_compute("float32"))
    extend_vocabulary(model, new_token_ids(tokenizer, asked.model.add_tokens))
    start, loaded = model.get_input_embeddings().weight.detach(), load_run(rows_run)
    ids = loaded.tokenizer.convert_tokens_to_ids(TOKENS)
    assert loaded.tokenizer("<sum>1 + 1 =")["input_ids"][0] == ids[0]
    matrix = loaded.model.get_input_embeddings().weight
    others = [row for row in range(len(start)) if row not in ids]
    assert torch.equal(matrix[others], start[others])
    assert (matrix[ids] != start[ids]).float().mean() > 0.9
    held = load_file(rows_run / "adapter/adapter_model.safetensors")
    names = [name for name in held if "embed_tokens" in name or "lm_head" in name]
    assert names == ["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    config = json.loads((rows_run / "adapter/adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": ids}
    assert "| also trained | embed_tokens, lm_head (rows of the new tokens) |" in (rows_run / "README.md").read_text()
    options = GenerateOptions(prompt="<sum>1 + 1 =", raw=True)
    answer = generate_from(str(rows_run), options, Sampling(max_new_tokens=2))
    assert answer["num_new_tokens"] == 2
    bare = load_run(rows_run, base_only=True)  # the base of a run has rows for its tokens
    assert not trained_matrices(bare.model)
    assert bare.model(**bare.tokenizer(TEXT, return_tensors="pt")).logits.isfinite().all()


def test_resumed_equals_uninterrupted(root, run, tmp_path):
    asked = token_recipe(root, **(NEW_ROWS if run.name == "rows" else WHOLE))
    support.assert_resumes(asked, run, tmp_path / "run", stop_at=3)


def test_exports_have_the_rows_and_the_tokens(run, tmp_path):
    loaded, out = load_run(run), tmp_path / "merged"
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"merged": {"dtype": "float32"}, "nf4-lora": {}}
    options |= {"peft": {}} if run.name == "rows" else {}
    for form, own in options.items():
        exported = export_run(run, tmp_path / form, ExportOptions(format=form, **own), console=QUIET)
        assert form == "peft" or exported["verification"]["passed"], exported["verification"]
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / form)
        assert torch.equal(tokenizer(TEXT, return_tensors="pt")["input_ids"], ids)
        assert len(tokenizer) == len(loaded.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded.model(ids).logits, rtol=1e-4, atol=1e-4)
    tensors = load_file(out / "model.safetensors")
    tensors["model.embed_tokens.weight"][ids[0, 0]] *= 1.0001
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    check = verify_merged(loaded.model, out, comparison_text(loaded.tokenizer, {}))
    assert any("its trained rows are not those of the run" in fault for fault in check["faults"])


def test_an_adapter_with_rows_is_continued_only_with_the_same_rows(root, rows_run, tmp_path):
    again = {"adapter__resume_from": str(rows_run / "adapter"), "adapter__rank": ..., "adapter__alpha": ...}
    train_run(token_recipe(root, **NEW_ROWS, **again, train__steps=1), tmp_path / "run", console=QUIET)
    assert trained_matrices(load_run(tmp_path / "run").model)
    turned = {"model__add_tokens": list(reversed(TOKENS))}
    for changes, words in (
        (WHOLE, r"model.add_tokens: must be \[.*\], with also_train and also_train_rows as in"),
        (NEW_ROWS | turned, r"model.add_tokens: must be \[.*\], with also_train and also_train_rows as in"),
    ):
        with pytest.raises(UserError, match=words):
            train_run(token_recipe(root, **changes, **again), tmp_path / "other")


def test_full_fine_tuning_takes_new_tokens(root, tmp_path):
    no_adapter = {"adapter__rank": ..., "adapter__alpha": ..., "adapter__dropout": ..., "adapter__kind": "full"}
    tokens = ["<sum>", "<other>"]
    full = token_recipe(root, model__add_tokens=tokens, base__quant="none", train__steps=2, **no_adapter)
    train_run(full, tmp_path / "run", console=QUIET)
    exported = export_run(tmp_path / "run", tmp_path / "out", ExportOptions(dtype="float32"), console=QUIET)
    assert exported["verification"]["passed"], exported["verification"]


def test_a_plan_counts_rows_and_whole_matrices():
    config = a_config(num_hidden_layers=1, tie_word_embeddings=False)
    rows, whole = (plan(a_recipe(train__optimizer="adamw", **changes), config=config) for changes in (NEW_ROWS, WHOLE))
    few, all_ = (found.moments[-1].by_component for found in (rows, whole))  # in the update
    num_new, num_whole, num_adapters = 2 * 2 * 64, 2 * 514 * 64, 4 * 1024 + 512
    assert (rows.num_trainable, whole.num_trainable) == (num_adapters + num_new, num_adapters + num_whole)
    assert abs(few[parts.DENSE] - 2 * (num_whole + 3 * 64)) <= 2 * 4 * 16  # and rotary tables
    more = {part: all_.get(part, 0) - few[part] for part in few}
    assert more[parts.DENSE] == 0
    assert more[parts.ADAPTERS] == -(4 * num_new + 2 * 2 * 8)  # rows are float32 beside the matrices; and their ids
    assert more[parts.GRADIENTS] == 4 * (num_whole - num_new)
    assert more[parts.OPTIMIZER] == (8 + 2) * num_whole - 8 * num_new  # two states, and the low bits of bf16
