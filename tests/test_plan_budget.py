"""qdora plan and memory.budget: a run over it is refused or changed; mix, time and public shapes without weights."""

from __future__ import annotations

import io
import itertools
import json
import mmap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import GatedRepoError
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qdora.cli import app
from qdora.data.sources import read_data, tokenized_mix
from qdora.errors import HubFailure, UserError
from qdora.files.atomic import json_text
from qdora.model import source as model_source
from qdora.model.build_model import Compute, find_model
from qdora.plan import fit, show
from qdora.plan import plan as parts
from qdora.plan.fit import assumed_workload, with_changes, workload_of_data
from qdora.plan.plan import MicroBatchShape, Moment, Plan
from qdora.plan.show import plan_run
from qdora.recipe.recipe_file import load_recipe, override, recipe_names, resolved_yaml
from qdora.recipe.section import parse_size, size_text
from qdora.recipe.settings import Recipe
from qdora.run.run import train_run
from qdora.train.distributed import Processes, processes_of_launch
from tests import support
from tests.support import training_lines

CPU = Compute(torch.device("cpu"), torch.float32)
QUIET = Console(quiet=True)
SHAPE = MicroBatchShape(1, 64, 63, masked=False)


def one_layer(root: Path, **changes: Any) -> Recipe:
    return support.one_layer_recipe(root, **{"eval__at_start": False} | changes)


def shown(recipe: Recipe, **options: Any) -> tuple[dict[str, Any], str]:
    """What a plan returns and prints."""
    console = Console(file=io.StringIO(), width=200)
    found = plan_run(recipe, "r.yaml", console=console, **options)
    return found, console.file.getvalue()  # type: ignore[attr-defined]


def test_over_budget_does_not_start_unless_forced(tmp_path):
    few: dict[str, Any] = {"train__steps": 1, "eval__at_end": False, "eval__limit": ...}
    recipe, run = one_layer(tmp_path, memory__budget="100MiB", **few), tmp_path / "run"
    with pytest.raises(UserError, match=r"^memory.budget: 100.0 MiB, but the run needs about 60\d"):
        train_run(recipe, run)
    assert not run.exists()
    assert train_run(recipe, run, force=True)["num_steps"] == 1
    kept = json.loads((run / "plan.json").read_text())
    assert (kept["fits"], kept["device"]) == (False, "cpu")


def test_auto_changes_what_leaves_the_numbers_alone(tmp_path, monkeypatch):
    recipe = one_layer(tmp_path, memory__budget="auto", memory__checkpointing=False, train__batch=24, train__steps=1)

    def within(free: int) -> tuple[Recipe, Plan]:
        monkeypatch.setattr(fit, "available_memory_bytes", lambda: free)
        monkeypatch.setattr(fit, "held_memory_bytes", lambda: 0)
        _, tokenizer = find_model(recipe)
        mix = tokenized_mix(recipe, tokenizer, read_data(recipe.data)[0])
        changed, plan = fit.within_budget(recipe, CPU, workload_of_data(recipe, mix, tokenizer))
        return changed, plan

    changed, plan = within(10 * 2**30)
    assert (changed, plan.fits) == (recipe, True)
    changed, tight = within(plan.peak_bytes - 1000)
    # The plan is that of the changed recipe, which runs
    assert (tight.fits, tight.changes) == (True, ())
    assert tight.peak_bytes < plan.peak_bytes
    assert changed != recipe
    assert (changed.adapter, changed.train.optimizer) == (recipe.adapter, recipe.train.optimizer)
    with pytest.raises(UserError, match="Fix: change, cheapest first"):
        within(plan.peak_bytes // 2)


def test_a_gpu_without_bfloat16_is_planned_in_float32(tmp_path):
    peaks = {}
    for asked in ("auto", "bfloat16", "float32"):
        recipe = one_layer(tmp_path, memory__budget="10GiB", model__dtype=asked)
        compute = Compute(torch.device("cuda"), torch.bfloat16 if asked == "bfloat16" else torch.float32)
        same, plan = fit.within_budget(recipe, compute, assumed_workload)
        assert same == recipe
        peaks[asked] = plan.peak_bytes
    assert peaks["auto"] == peaks["float32"] > peaks["bfloat16"]


@support.needs_division
@pytest.mark.slow
def test_auto_divides_a_base_that_does_not_fit_whole(tmp_path):
    """Eight blocks: divided among four, a process holds two, and three while they are gathered."""
    support.write_llama(tmp_path / "model", num_hidden_layers=8, tie_word_embeddings=False)

    def within(num_bytes: int, num_processes: int = 4, **changes: Any) -> tuple[Recipe, Plan | None]:
        given = support.tiny_recipe(tmp_path, memory__budget=f"{num_bytes}B", adapter__targets=["q_proj"], **changes)
        return fit.within_budget(given, CPU, assumed_workload, processes=Processes(size=num_processes))

    same, whole = within(2**30)
    changed, plan = within(whole.peak_bytes - 1)
    assert (same.train.parallel, changed.train.parallel) == ("auto", "shard")
    assert plan.peak_bytes < whole.peak_bytes
    assert parts.GATHERED in plan.components
    assert within(plan.peak_bytes, train__parallel="shard")[1] is not None
    for refused in ({"train__parallel": "replicate"}, {"adapter__init": "loftq"}, {"num_processes": 1}):
        with pytest.raises(UserError, match=r"memory\.budget"):
            within(whole.peak_bytes - 1, **refused)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"memory\.budget"):
        within(plan.peak_bytes - 1, train__parallel="shard")


def test_what_the_process_and_nccl_hold_counts_as_free(monkeypatch):
    """A plan has the whole process in it, but the system's available memory has not what it holds already."""
    monkeypatch.setattr(fit, "available_memory_bytes", lambda: 2**30)
    before, kept = fit.held_memory_bytes(), mmap.mmap(-1, 2**26, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, len(kept), mmap.PAGESIZE):  # new pages: malloc would give what earlier tests have freed
        kept[page] = 1
    assert fit.held_memory_bytes() - before == pytest.approx(len(kept), rel=0.1)
    for held, counted in ((5, 5), (2**33, parts.CONTEXT_BYTES["cpu"])):
        monkeypatch.setattr(fit, "held_memory_bytes", lambda held=held: held)
        assert fit.free_bytes(torch.device("cpu")) == 2**30 + counted
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (5 * 2**30, 8 * 2**30))
    assert [fit.free_bytes(torch.device("cuda"), count) // 2**30 for count in (1, 2)] == [5, 6]


def first_has_less(rank: int, recipe: Recipe) -> None:
    with processes_of_launch() as processes, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "available_memory_bytes", lambda: (10 + rank) * 2**30)
        patch.setattr(fit, "held_memory_bytes", lambda: 0)
        _, plan = fit.within_budget(recipe, CPU, assumed_workload, processes=processes)
    assert plan.budget_bytes == 10 * 2**30


def test_budget_auto_is_the_same_for_all_processes(tmp_path):
    """Else one could divide the base that another one holds whole, and wait for it for ever."""
    assert support.run_processes(2, first_has_less, one_layer(tmp_path, memory__budget="auto")) == ["", ""]


def proposed(recipe: Recipe) -> list[str]:
    """All changes that are proposed if each saves a little and none is enough."""
    options: dict[str, Any] = {"num_micro_batches": 1, "block_bytes": 1000, "num_blocks": 4, "budget_bytes": 1}
    first = Plan(device_kind="cuda", moments=[], shape=SHAPE, **options)
    sizes = (round(1e9 * 0.9**count) for count in itertools.count())

    def plan_of(_recipe: Recipe) -> Plan:
        return replace(first, moments=[Moment("forward", 0, {parts.OTHER: next(sizes)})])

    _, found = with_changes(recipe, plan_of(recipe), plan_of, lambda _recipe: 1.0)
    return [change.setting for change in found.changes]


def test_all_changes_that_go_together_are_proposed(tmp_path):
    def of(**changes: Any) -> list[str]:
        return proposed(support.tiny_recipe(tmp_path, **changes))

    assert of(data__max_length=1024, adapter__rank=16, adapter__experts={"rank": 6}, memory__checkpointing=False) == [
        "train.micro_batch_tokens=1024", "memory.keep_scales=false", "memory.loss_chunk=64",
        "memory.checkpointing=true", "memory.checkpointing=true, memory.offload_activations=true",
        "base.residency=host, base.streamed_blocks=4",
        "train.optimizer=paged_adamw_8bit", "adapter.rank=8, adapter.alpha=4", "adapter.experts.rank=3",
        "data.max_length=512, train.micro_batch_tokens=512, data.too_long=truncate",
    ]  # fmt: skip
    # Else a micro-batch could have more of the shorter rows, but it is never longer than a step
    shorter = of(data__max_length=2048, train__batch=..., train__tokens_per_step=1000)[-1]
    assert shorter == "data.max_length=1024, data.too_long=truncate"
    # Either rank may be halved, since the gates have more components to remove in the other layers, but not both.
    for mean_rank, experts, count in ((7.5, {}, 1), (8, {}, 0), (7.5, {"rank": 16}, 2), (8, {"rank": 16}, 1)):
        found = of(adapter__rank=16, adapter__gates={"mean_rank": mean_rank}, adapter__experts=experts)
        assert len([setting for setting in found if "rank" in setting]) == count
    whole = {"adapter__also_train": ["embed_tokens"], "adapter__also_train_rows": "all"}
    for changes, streams in ((whole, True), ({"train__parallel": "shard"}, False)):
        settings = of(**changes)
        assert any("residency" in setting for setting in settings) is streams


def test_plan_and_run_say_the_same(tmp_path):
    recipe = one_layer(tmp_path, train__steps=12, data__strategy="equal")
    train_run(recipe, tmp_path / "run", console=QUIET)
    found, text = shown(recipe, budget="1GiB")
    mix, memory = found["mix"], found["memory"]
    assert json.loads(json_text(mix)) == json.loads((tmp_path / "run/mix.json").read_text())
    assert [part["num_draws"] for part in mix["sources"]] == [24, 24]
    assert [part["num_examples"] for part in mix["sources"]] == [28, 22]  # without those held out
    for words in ("12 steps, 48 examples", "sums", "letters", "50.0%", "1.09", "packed base", "total",
                  "fits in 1.00 GiB", "Estimated time: ", "on one A100 40GB (assumed)"):  # fmt: skip
        assert words in text
    assert ("This machine has no GPU; --device cpu" in text) is not torch.cuda.is_available()
    assert "Warning" not in text
    text = shown(recipe, device_kind="cpu")[1]
    assert "two CPU cores (assumed)" in text
    assert "no GPU" not in text
    assert sum(memory["components"].values()) == memory["peak_bytes"]
    found, text = shown(override(recipe, ["adapter.rank=16"]), budget="1MiB")
    assert found["memory"]["fits"] is False
    for words in ("does not fit in 1.0 MiB", "cheapest first"):
        assert words in text
    [rank] = [line.partition(": ")[0].split() for line in text.splitlines() if "adapter.rank" in line]
    assert rank[::2] == ["-s", "-s"]  # as on the command line
    adapter = override(recipe, rank[1::2]).adapter
    assert (adapter.rank, adapter.alpha) == (8, recipe.adapter.alpha / 2)
    with pytest.raises(UserError, match=r"^--budget: must be a size .*, got 'much'"):
        plan_run(recipe, "r.yaml", budget="much")


def test_a_plan_refuses_what_a_run_refuses_or_assumes(tmp_path, monkeypatch):
    def assumed(**changes: Any) -> tuple[list[str], Any]:
        found, _ = shown(one_layer(tmp_path, **changes))
        return found["memory"]["assumptions"], found

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(show, "MOST_STEPS", 3)
    assert assumed(train__steps=3)[0] == []
    assert "largest of the first 3 steps" in assumed(train__steps=4)[0][0]
    (text,), found = assumed(data__mix=[{"source": "nobody/has-this"}])
    assert "the data cannot be read: data.mix[0]: nobody/has-this: " in text
    assert (found["mix"], found["memory"]["micro_batch"]["length"]) == (None, 96)
    with pytest.raises(UserError, match=r"data\.template_kwargs: the chat template reads .*nonsense"):
        assumed(data__template_kwargs={"nonsense": True})
    mix = [{"source": part.source, "max_epochs": 0.5} for part in one_layer(tmp_path).data.mix]
    short = one_layer(tmp_path, train__steps=12, data__mix=mix)
    for call in (lambda: plan_run(short, "r.yaml"), lambda: train_run(short, tmp_path / "run")):
        with pytest.raises(UserError, match=r"^train.steps: must be at most .* max_epochs .* leaves 25 .* got 12"):
            call()
    assert not (tmp_path / "run").exists()
    train_run(one_layer(tmp_path, train__steps=7, data__mix=mix), tmp_path / "run", console=QUIET)
    assert [line["num_examples"] for line in training_lines(tmp_path / "run")] == [4, 4, 4, 4, 4, 4, 1]
    recipe = one_layer(tmp_path)
    with (tmp_path / "data/sums.jsonl").open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(UserError, match=r"^data\.mix\[0\]: .*sums\.jsonl: line \d+: not JSON"):
        plan_run(recipe, "r.yaml")
    for tokenizer in (tmp_path / "model").glob("tokenizer*"):
        tokenizer.unlink()
    first, second = assumed()[0]
    assert "there is no tokenizer: model.tokenizer: " in first
    assert "no tokens were counted" in second
    recipe = one_layer(tmp_path)
    with (tmp_path / "data/letters.jsonl").open("a") as file:
        file.write("no JSON\n")
    with pytest.raises(UserError, match=r"^data\.mix\[1\]: .*letters\.jsonl: line \d+: not JSON"):
        plan_run(recipe, "r.yaml")


def test_plan_on_the_command_line(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(resolved_yaml(one_layer(tmp_path)))
    for options, code in (((), 0), (("--budget", "1MiB"), 1)):
        done = CliRunner().invoke(app, ["plan", str(file), "--json", "-s", "train.steps=3", *options])
        assert done.exit_code == code, done.stderr
        found = json.loads(done.stdout)
        assert (found["mix"]["num_steps"], found["memory"]["fits"]) == (3, False if options else None)


def test_time_of_a_step_by_hand():
    options: dict[str, Any] = {"attention_width": 0, "quantised": True}
    work = parts.Work(num_linear=1000, num_head=500, num_trainable=10, checkpointing=True, **options)
    rates = parts.Rates("x", flops=1e3, bytes=1e6, link=1e3)
    shape = MicroBatchShape(2, 5, 8, masked=False)
    # Three passes over the base, four over the adapters; the head twice forward and backward.
    flops = 10 * 2 * (3 * 1000 + 4 * 10) + 4 * 500 * 8
    seconds = work.step_seconds(shape, 3, rates)
    assert seconds == pytest.approx(3 * (flops / 1e3 + 3 * 4.6 * 1000 / 1e6) + 300 / 1e6, rel=1e-12)
    few = replace(work, share_met=0.25).step_seconds(shape, 3, rates)  # of the experts a token meets few
    assert seconds - few == pytest.approx(3 * 0.75 * 10 * 2 * (3 * 1000 + 4 * 10) / 1e3, rel=1e-9)
    # Causal attention: half of 4 * length a feature and token, again in the recomputation, and 2.5 times that backward
    wide = replace(work, attention_width=7).step_seconds(shape, 3, rates)
    assert wide - seconds == pytest.approx(3 * 10 * 2 * 5 * 7 * (1 + 1 + 2.5) / 1e3, rel=1e-9)
    # Each of the two passes over the blocks takes as long as its computing or its copies: 30 s are hidden by the
    # backward pass (two forward passes of 20 s and what decodes), not by the forward pass.
    forward = 10 * 2 * 1000 / 1e3 + 4.6 * 1000 / 1e6
    assert work.forward_seconds(shape, rates) == pytest.approx(forward, rel=1e-12)
    for link, waiting in ((30, 30 - forward), (100, 100 - forward + 100 - 2 * forward)):
        away = replace(work, streamed_bytes=link * 1000).step_seconds(shape, 3, rates)
        assert away - seconds == pytest.approx(3 * waiting, rel=1e-9)
    # Short chunks of the loss read the head more often: two products of 2 * 10^6 FLOPs a token take 4 ms; two
    # readings of 2 * 10^6 bytes take 0.4 s, as 100 tokens do.
    work = parts.Work(num_linear=0, num_head=10**6, num_trainable=0, checkpointing=False, **options)
    rates, shape = parts.Rates("x", flops=1e9, bytes=1e7), MicroBatchShape(1, 1001, 1000, masked=False)
    for chunk, expected in ((None, 4.0), (100, 4.0), (250, 4.0), (300, 4.0), (64, 16 * 0.4)):
        assert replace(work, head_chunk=chunk).step_seconds(shape, 1, rates) == pytest.approx(expected)


def test_sizes():
    sizes = {"40GiB": 40 * 2**30, "1.5 gb": 1_500_000_000, "512 MiB": 2**29, "2TB": 2 * 10**12}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "-1GiB", "1 XB", "nan", "1e999"):
        with pytest.raises(ValueError, match="must be a size such as 40GiB"):
            parse_size(text)
    assert [size_text(n) for n in (2048, 2**20, 3 * 2**20, 2**30)] == ["2 KiB", "1.0 MiB", "3.0 MiB", "1.00 GiB"]


PUBLISHED: dict[str, int] = yaml.safe_load(Path(__file__).with_name("published_parameters.yaml").read_text())
ROUNDED = dict.fromkeys(["deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-Next-80B-A3B-Instruct"], 1_000_000_000)
GATED = "meta-llama/Llama-3.2-1B-Instruct"


def test_every_shape_has_the_published_number_of_parameters():
    shapes, wrong, config = parts.public_shapes(), {}, {}
    for name, published in PUBLISHED.items():
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(shapes[name].config())
        count, unit = sum(parameter.numel() for parameter in model.parameters()), ROUNDED.get(name, 1)
        if round(count / unit) * unit != published:
            wrong[name] = (count, published)
        config[name] = model.config.get_text_config()
    assert not wrong
    assert {id(shape.values) for shape in shapes.values()} == {id(shapes[name].values) for name in PUBLISHED}
    on_the_hub = {name for name in (load_recipe(each).model.source for each in recipe_names()) if name.count("/") == 1}
    assert {"meta-llama/Llama-3.3-70B-Instruct"} <= on_the_hub <= shapes.keys()
    # Sizes that no number of parameters shows; s is a sliding window, f full attention
    layers = {"google/gemma-3-4b-it": "sssssfs", "google/gemma-2-9b": "sfs", "openai/gpt-oss-20b": "sf",
              "allenai/Olmo-3-1025-7B": "sssf"}  # fmt: skip
    for name, kinds in layers.items():
        assert "".join(kind[0] for kind in config[name].layer_types).startswith(kinds)
    assert config["mistralai/Mistral-7B-v0.1"].sliding_window == 4096
    assert config["mistralai/Mistral-7B-v0.3"].sliding_window is None
    assert config["microsoft/Phi-4-mini-instruct"].rope_parameters["partial_rotary_factor"] == 0.75
    assert config["zai-org/GLM-4-9B-0414"].rope_parameters["partial_rotary_factor"] == 0.5


def test_a_gated_model_is_planned_by_its_stored_shape(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> str:
        answer: Any = SimpleNamespace(headers={}, request=None)
        raise GatedRepoError("403", response=answer)

    def gated(name: str) -> Recipe:
        return one_layer(tmp_path, model__source=name, model__tokenizer=None, train__steps=1)

    monkeypatch.setattr(model_source, "snapshot_download", refuse)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 100, "num_hidden_layers": 1, "tie_word_embeddings": True}
    public = parts.PublicShape({"model_type": "llama", **sizes}, "https://example.org/tiny", context=95)
    # Embedding, which is the head too, q and o, k and v, the three matrices of the MLP, and the norms
    num_weights = 100 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 3 * 64
    own, shapes = one_layer(tmp_path), parts.public_shapes()
    monkeypatch.setattr(fit, "public_shapes", lambda: {GATED: public, own.model.source: public})
    found, text = shown(gated(GATED))
    assert (found["memory"]["stored_shape"], found["memory"]["num_weights"]) == (public.source, num_weights)
    assert f"the shape stored in qdora, from {public.source}" in text
    assert f"there is no tokenizer: model.source: {GATED}: is no directory" in text
    assert "rows of up to 96 tokens exceed the model's context of 95." in text
    with pytest.raises(UserError, match="GatedRepoError"):
        train_run(gated(GATED), tmp_path / "run")
    with pytest.raises(HubFailure, match="GatedRepoError"):
        shown(gated("someone/unlisted"))
    # A model at hand has its own config and context
    found = fit.plan(override(own, ["data.max_length=200"]), device_kind="cpu").to_dict()
    assert [found[key] for key in ("stored_shape", "longest_row", "context_length")] == [None, 200, 128]
    contexts = [shapes[f"meta-llama/Meta-Llama-3{version}-8B"].context for version in ("", ".1")]
    assert (contexts, shapes["yahma/llama-7b-hf"].context) == ([8192, 131_072], None)
