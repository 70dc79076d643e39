"""What a run tells others: its page, its model card, its experiment trackers; it loads nothing and escapes all."""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
import yaml
from pydantic import ByteSize
from rich.console import Console
from scipy import stats
from typer.testing import CliRunner

from qdora.cli import app
from qdora.errors import Diverged, UserError
from qdora.files.run_directory import open_run
from qdora.model.source import ModelSource, public_name
from qdora.recipe.recipe_file import load_recipe
from qdora.recipe.section import with_settings
from qdora.run import report as model_card
from qdora.run.report import Form, _licence, licence_files, page_of_run, run_card, run_facts, write_page
from qdora.run.run import train_run
from qdora.run.verbs import EvalOptions, evaluate_target
from qdora.train import logs as experiment_trackers
from qdora.train.evals import adapter_step
from qdora.train.logs import flat_numbers, flat_settings, layer_facts, tracking
from tests import support
from tests.adapter_numbers import make
from tests.page_parser import Page
from tests.support import UNEVALUATED, make_gradients_nan

QUIET = Console(quiet=True)
EVIL = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>"
TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(scope="module")
def whole(root: Path) -> Path:
    """A finished run with a plan and enough validation examples for intervals."""
    recipe = support.tiny_recipe(root, eval__limit=..., data__validation_fraction=0.5, memory__budget="20GiB")
    train_run(recipe, root / "whole", console=QUIET)
    return root / "whole"


def train(root: Path, run: Path, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return train_run(support.tiny_recipe(root, **changes), run, resume=resume, console=QUIET)


def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def copy_of(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place / "run"))


def facts(run: Path) -> dict[str, Any]:
    return page_of_run(run, console=QUIET)


def test_training_leaves_a_page_that_needs_nothing_else(whole):
    found, steps = page(whole), [line for line in lines(whole) if "loss" in line]
    assert not found.loads()
    assert not {"script", "link", "iframe", "object", "form"} & set(found.tags)
    images = [base64.b64decode(value.partition(",")[2]).decode() for name, value in found.attributes if name == "src"]
    assert ["<svg" in image for image in images] == [True] * 4
    seconds = median(line["time"]["step_seconds"] for line in steps)
    rate = median(line["num_tokens"] / line["time"]["step_seconds"] for line in steps)
    planned = ByteSize(sum(read(whole, "plan.json")["components"].values())).human_readable()
    for words in ("Finished: 6 of 6 steps.", "dora, rank 4, alpha 8", planned, (whole / "recipe.yaml").read_text(),
                  f"{rate:,.0f} tokens/s, {seconds:.3g} s a step",
                  f"{steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f} nats a token"):  # fmt: skip
        assert words in found.text
    assert facts(whole)["numbers"]["planned peak"] == planned
    assert "Warnings" not in found.text


def test_rows_of_the_page_are_evaluations_before_and_after(whole):
    rows = {(row[1], row[2]): row for row in page(whole).table("data", "task", "metric")}
    nll, accuracy = "NLL, nats a token", "accuracy, %"
    assert rows.keys() == {("sums", nll), ("letters", nll), ("average", nll), ("letters", accuracy)}
    before, after = (read(whole, f"eval/step-{step}.json") for step in (0, 6))
    for (task, label), row in rows.items():
        metric, factor, digits = ("acc", 100, 1) if label == accuracy else ("nll_per_token", 1, 4)
        number = sum(task in (each["task"], "average") for each in after["per_example"])
        values = (every["tasks"] | {"average": every["average"]} for every in (before, after))
        old, new = (factor * each[task][metric] for each in values)
        assert (row[0], row[3]) == ("validation, step 6", str(number))
        assert row[4:7] == [f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new - old:+.{digits}f}"]
        low, high = (float(end) for end in row[7].split(" to "))
        assert (low + high) / 2 == pytest.approx(new - old, abs=1.01 * 10**-digits)


def test_an_interrupted_and_a_failed_run_say_so(root, tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    support.train_until(support.tiny_recipe(root), run, 3)
    text = page(run).text
    for words in ("Not finished: 3 of 6 steps, the newest checkpoint is of step 3.", ", only before training"):
        assert words in text
    (run / "report.html").unlink()
    (run / "report.html").mkdir()  # a page that cannot be written is a warning
    train(root, run, resume=True)
    assert (adapter_step(open_run(run)), run_facts(open_run(run))["status"]["state"]) == (6, "finished")
    warned = re.search("WARNING report.html was not written: IsADirectoryError.*", (run / "log.txt").read_text())
    assert warned is not None
    assert warned[0].endswith(f". Fix: qdora report {run}")
    make_gradients_nan(monkeypatch)
    with pytest.raises(Diverged):
        train(root, other, **UNEVALUATED)
    monkeypatch.undo()
    text = page(other).text
    assert "Not finished: 0 of 6 steps" in text
    assert "The last start failed: step 1: gradient norm nan is not finite" in text
    train(root, other, resume=True, **UNEVALUATED)
    text = page(other).text
    assert "The last start failed" not in text
    assert "The run was not evaluated." in text


def test_the_page_of_a_run_in_another_place(whole, tmp_path):
    found = CliRunner().invoke(app, ["report", str(whole), "--out", str(tmp_path / "out"), "--json"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert (document["page"], document["status"]["state"]) == (str(tmp_path / "out/report.html"), "finished")
    assert (tmp_path / "out/report.html").is_file()
    found = CliRunner().invoke(app, ["report", str(tmp_path / "otu")])
    assert (found.exit_code, "otu: no such directory" in found.output) == (2, True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file: .* --out"):
        page_of_run(whole, tmp_path / "file", console=QUIET)


def test_a_run_that_wrote_nothing_yet_has_a_page(whole, tmp_path):
    (tmp_path / "new").mkdir()
    for name in ("recipe.yaml", "environment.json"):
        shutil.copy(whole / name, tmp_path / "new" / name)
    assert facts(tmp_path / "new")["status"]["state"] == "unfinished"
    found = page(tmp_path / "new")
    assert ("Not finished: 0 steps, no checkpoint yet." in found.text, found.tables) == (True, [])


def test_everything_from_the_files_is_escaped(whole, tmp_path):
    run = copy_of(whole, tmp_path)
    for step in (0, 6):
        document = (run / f"eval/step-{step}.json").read_text().replace('"sums"', json.dumps(f"sums{EVIL}"))
        (run / f"eval/step-{step}.json").write_text(document)
    with (run / "log.txt").open("a") as log:
        log.write(f"2026-01-01T00:00:00Z WARNING {EVIL}\n2026-01-01T00:00:01Z harmless\n" * 2)
        log.write(f"Traceback\nRuntimeError: {EVIL}\n2026-01-01T00:00:00Z FAILURE train: RuntimeError: {EVIL}\n")
    with (run / "recipe.yaml").open("a") as recipe:
        recipe.write(f"# {EVIL}\n")
    (run / "figures/steps.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'><script/>{EVIL}</svg>")
    assert write_page(open_run(run), tmp_path / "report.html")["warnings"] == [EVIL]
    found = page(tmp_path)
    assert (found.loads(), "script" in found.tags, "harmless" in found.text) == ([], False, False)
    assert found.text.count("alert('x')") == 4  # the task, the warning, the failure, the recipe
    assert f"The last start failed: RuntimeError: {EVIL}" in found.text


def test_other_evaluations_have_rows_of_their_own(whole, tmp_path):
    run = copy_of(whole, tmp_path)
    for base_only in (False, True):
        asked = EvalOptions(tasks=["letters"], limit=2, base=base_only)
        evaluate_target(str(run), asked, console=QUIET)
    found = {each["data"]: each for each in facts(run)["evaluations"]}
    (loss,) = found["validation-letters-limit-2"]["nll_per_token"]
    scores = [read(run, f"eval/{name}-validation-letters-limit-2.json") for name in ("base", "final")]
    values = [each["tasks"]["letters"]["nll_per_token"] for each in scores]
    assert [loss["before"], loss["after"], loss["num_examples"]] == [*values, 2]
    outcomes = {0: ["wrong"] * 8 + ["unparsable"] * 4, 6: ["right"] * 9 + ["wrong"] * 3}  # answers in words
    for step, answers in outcomes.items():
        records = [{"task": "letters", "id": str(n), "outcome": outcome} for n, outcome in enumerate(answers)]
        numbers = {"num_examples": 12, "acc": answers.count("right") / 12}
        document = {"tasks": {"letters": numbers}, "average": numbers, "settings": {}, "per_example": records}
        (run / f"eval/step-{step}-generated.json").write_text(json.dumps(document))
    facts(run)
    (row,) = [row for row in page(run).table("data", "task") if row[0] == "validation-generated, step 6"]
    half = stats.t.ppf(0.975, 11) * math.sqrt((9 * 0.25**2 + 3 * 0.75**2) / 11 / 12)
    ends = f"{75 - 100 * half:+.1f} to {75 + 100 * half:+.1f}"
    assert row[1:] == ["letters", "accuracy, %", "12", "0.0", "75.0", "+75.0", ends]


@pytest.mark.parametrize("gated", [False, True])
def test_moved_magnitudes_and_the_size_of_the_update(gated):
    assert layer_facts(make(kind="lora", dtype=torch.float32)) == {"rank": 3}
    layer = make(quant="nf4", dtype=torch.float32, alpha=7.0, moved=False)
    assert layer_facts(layer) == {"rank": 3, "magnitude_moved": 0.0, "update": 0.0}
    support.move_all_parameters_(layer)
    gate = torch.tensor([0.5, 2.0, 0.0]) if gated else torch.ones(3)
    if gated:
        layer.add_gate()
        layer.gate.data.copy_(gate)
    weight = layer.base.dequantized().double()
    norms = weight.norm(dim=1)
    moved = (layer.magnitude.detach().double() / norms - 1)[norms > 0].abs()  # row 1 has no magnitude to move from
    update = 7 / 3 * layer.lora_B.detach().double() @ gate.double().diag() @ layer.lora_A.detach().double()
    expected = {"rank": 3, "magnitude_moved": moved.mean().item()}
    expected["update"] = (update.norm() / weight.norm()).item()
    assert layer_facts(layer) == pytest.approx(expected, rel=1e-4)


LLAMA = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags: [a]\n---\n# A model\n"
LICENCE = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}


def test_licences_of_bases_are_as_their_own_files_state_them(tmp_path, monkeypatch):
    source, card = ModelSource("directory", tmp_path, "x"), tmp_path / "README.md"
    assert _licence(source) == {}
    for text, expected in (("---\nlicense: mit\n---\ntext", {"license": "mit"}), ("---\nlicense: [mit, x]\n---\n", {}),
                           ("---\n: {\n---\n", {}), ("# A model\n", {}), (LLAMA, LICENCE)):  # fmt: skip
        card.write_text(text)
        assert _licence(source) == expected
    link = "https://huggingface.co/org/name/blob/abc/LICENSE"
    assert _licence(ModelSource("hub", tmp_path, "org/name", "abc")) == LICENCE | {"license_link": link}
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "other.txt"):
        (tmp_path / name).write_text(name)
    assert licence_files(source) == {name: name for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md")}
    (tmp_path / "org/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ("org/name", "org/here", "builtin", str(tmp_path), "./model", "~/model", "model.gguf")
    assert [public_name(name) for name in names] == ["org/name", *[None] * 6]


def test_cards_of_hub_models_and_local_ones(whole, tmp_path, monkeypatch):
    """A run on a local base, and as if its base and one of its data sets were on the Hub."""
    recipe = load_recipe(str(whole / "recipe.yaml"))
    text = run_card(open_run(whole), recipe, "final")
    assert not [words for words in ("base_model", str(whole.parent), "## Verification") if words in text]
    assert "No licence of the base was found." in text
    (tmp_path / "README.md").write_text(LLAMA)
    (tmp_path / "LICENSE").write_text("the text")
    monkeypatch.setattr(model_card, "find_source", lambda *_, **__: ModelSource("hub", tmp_path, "org/base", "abc"))
    monkeypatch.setattr(model_card, "_data_id", lambda source: {"sums": "org/sums"}.get(source.label))
    recipe = with_settings(recipe, model={"source": "org/base"})
    numbers = {"max_logit_difference": 0.03619, "kl_mean": 1.6e-6, "argmax_agreement": 1.0}
    check: dict[str, Any] = {"passed": True, "num_positions": 85, "exported_vs_reference": numbers}
    text = run_card(open_run(whole), recipe, "final", check, Form("A merge."))
    link = "https://huggingface.co/org/base/blob/abc/LICENSE"
    assert yaml.safe_load(text.split("---\n")[1]) == LICENCE | {
        "base_model": "org/base", "base_model_relation": "finetune", "datasets": ["org/sums"], "tags": ["qdora"],
        "library_name": "transformers", "pipeline_tag": "text-generation", "license_link": link,
    }  # fmt: skip
    facts = ("`org/base` at revision `abc`", "0.0362", "(https://huggingface.co/datasets/org/sums)", f"]({link})")
    assert [fact for fact in facts if fact not in text] == []


def tracker(fail: str = "") -> Mock:
    """A tracker that fails where it is asked to."""
    made = Mock()
    if fail:
        getattr(made, fail).side_effect = KeyError(f"no {fail} with {TOKEN}\nsecond line")
    return made


def test_a_tracker_that_fails_is_told_no_more(root, tmp_path, monkeypatch, caplog):
    missing = next(name for name in ("trackio", "mlflow", "wandb") if find_spec(name) is None)
    recipe = support.tiny_recipe(root, **UNEVALUATED).model_copy(update={"trackers": (missing,)})
    with pytest.raises(UserError, match=rf"trackers: {missing} is not installed.*pip install 'qdora\[{missing}\]'"):
        train_run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    made = {"one": tracker(), "bad": tracker("log"), "broken": tracker("start"), "last": tracker("finish")}
    monkeypatch.setattr(experiment_trackers, "_MAKE", {name: lambda run, name=name: made[name] for name in made})
    with tracking(["bad", "one", "last"], tmp_path, {"train": {"steps": 6}}) as tell:
        for step in (1, 2):
            tell({"step": step, "loss": 0.5})
    expected = [call({"loss": 0.5}, step=1), call({"loss": 0.5}, step=2)]
    made["one"].store_init_configuration.assert_called_once_with({"train.steps": 6})
    assert made["one"].log.call_args_list == made["last"].log.call_args_list == expected
    assert [made[name].log.call_count for name in ("bad", "one", "last")] == [1, 2, 2]
    assert [made[name].finish.call_count for name in ("bad", "one", "last")] == [0, 1, 1]
    assert caplog.text.count("trackers: bad failed and gets no more metrics: KeyError: 'no log with hf_***") == 1
    assert caplog.text.count("trackers: last failed") == 1
    assert TOKEN not in caplog.text
    made["one"] = tracker()
    with (
        pytest.raises(UserError, match=r"broken did not start: KeyError: 'no start with hf_\*\*\*"),
        tracking(["one", "broken"], tmp_path, {}),
    ):
        pass
    assert made["one"].finish.call_count == 1


def test_tensorboard_has_every_number_of_two_processes_at_its_step_once(root, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, recipe = tmp_path / "run", support.tiny_recipe(root, train__steps=2, eval__every=1)
    recipe = recipe.model_copy(update={"trackers": ("tensorboard",)})
    assert support.run_processes(2, lambda _rank: train_run(recipe, run)) == ["", ""]
    (events,) = (run / "tensorboard").glob("events.out.tfevents.*")
    board = accumulator.EventAccumulator(str(events))
    board.Reload()
    expected: dict[str, dict[int, float]] = {}
    for line in lines(run):
        for name, value in flat_numbers(line).items():
            expected.setdefault(name, {})[line["step"]] = value
    assert {"loss", "lr", "gradient_norm", "time/step_seconds"} <= expected.keys()
    assert set(board.Tags()["scalars"]) == expected.keys()
    for name, values in expected.items():
        assert {event.step: event.value for event in board.Scalars(name)} == pytest.approx(values, rel=1e-6), name
    (settings,) = (run / "tensorboard").rglob("hparams.yml")
    assert "train.lr: 0.001\n" in settings.read_text()


def test_ids_and_projects_of_wandb(tmp_path, monkeypatch):
    """By stand-ins of wandb and trackio, which are not installed here."""
    wandb, trackio = Mock(), Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    for variable in ("WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)

    def ids(name: str) -> dict[str, Any]:
        (tmp_path / name).mkdir(exist_ok=True)
        with tracking(["wandb", "trackio"], tmp_path / name, {}):
            found: dict[str, Any] = wandb.init.call_args.kwargs
        return found

    first = ids("run")
    trackio.init.assert_called_once_with(project="qdora", name="run")
    own = {"name": "run", "dir": str(tmp_path / "run"), "id": first["id"], "resume": "allow"}
    assert re.fullmatch("[A-Za-z0-9_-]{8,64}", first["id"])
    assert ids("other")["id"] != first["id"]
    monkeypatch.setenv("WANDB_PROJECT", "papers")
    assert (first, ids("run")) == ({"project": "qdora", **own}, {"project": "papers", **own})
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert (ids("named")["id"], ids("run")["id"]) == ("mine", first["id"])


def test_numbers_and_settings_are_flat_and_hold_no_token():
    line = {"step": 3, "loss": 0.5, "c": None, "tasks": {"a": {"acc": 1, "found": True, "name": "x"}}}
    assert flat_numbers(line) == {"loss": 0.5, "tasks/a/acc": 1.0}
    settings = {"model": {"source": f"https://x/?t={TOKEN}", "revision": None}, "train": {"betas": [1, 2], "log": True}}
    expected = {"model.source": "https://x/?t=hf_***", "train.betas": "[1, 2]", "train.log": True}
    assert flat_settings(settings) == expected
