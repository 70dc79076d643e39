"""Trackers are told every number of a run, once, and cannot end it; tensorboard truly writes."""

from __future__ import annotations

import json
import re
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from hypothesis import given
from hypothesis import strategies as st

from qdora.errors import UserError
from qdora.run import experiment_trackers, prepare
from qdora.run.experiment_trackers import flat_numbers, flat_settings, tracking
from qdora.run.train import train_run
from tests import launched, tiny_run

TOKEN = "hf_" + "a1B2" * 8


def recipe(root: Path, *names: str, **changes: Any) -> Any:
    return tiny_run.recipe(root, train__steps=2, **changes).model_copy(update={"trackers": names})


class Told(GeneralTracker):
    """A tracker that remembers, and fails where it is asked to."""

    name, requires_logging_directory, tracker = "told", False, None

    def __init__(self, fail: str = "") -> None:
        super().__init__()
        self.fail, self.lines, self.settings, self.finished = fail, [], {}, 0

    def _maybe_fail(self, where: str) -> None:
        if self.fail == where:
            raise KeyError(f"no {where} with {TOKEN}\nsecond line")

    def start(self) -> None:
        self._maybe_fail("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings = values

    def log(self, values: dict[str, Any], step: int | None, **_rest: Any) -> None:
        self._maybe_fail("log")
        self.lines.append((step, values))

    def finish(self) -> None:
        self.finished += 1
        self._maybe_fail("finish")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Told]:
    found = {"one": Told(), "bad": Told("log"), "broken": Told("start"), "last": Told("finish")}
    monkeypatch.setattr(experiment_trackers, "_MAKE", {name: lambda run, name=name: found[name] for name in found})
    monkeypatch.setattr(prepare, "find_spec", lambda name: name)
    return found


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_one_that_is_not_installed_is_refused_with_the_command(root: Path, tmp_path: Path) -> None:
    missing = next(name for name in ("trackio", "mlflow", "wandb") if find_spec(name) is None)
    with pytest.raises(UserError, match=rf"trackers: {missing} is not installed.*pip install 'qdora\[{missing}\]'"):
        train_run(recipe(root, missing), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_every_number(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train_run(recipe(root, "tensorboard", eval__every=1), tmp_path / "run")
    assert_board(tmp_path / "run")
    (settings,) = (tmp_path / "run/tensorboard").rglob("hparams.yml")
    assert "train.lr: 0.001\n" in settings.read_text()


def assert_board(run: Path) -> None:
    """The event file has the numbers of metrics.jsonl, each at its step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = (run / "tensorboard").glob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    expected: dict[str, dict[int, float]] = {}
    for line in lines_of(run):
        for name, value in flat_numbers(line).items():
            expected.setdefault(name, {})[line["step"]] = value
    assert {"loss", "lr", "gradient_norm", "time/step_seconds"} <= expected.keys()
    assert set(board.Tags()["scalars"]) == expected.keys()
    for name, values in expected.items():
        assert {event.step: event.value for event in board.Scalars(name)} == pytest.approx(values, rel=1e-6), name


def train_with_tensorboard(rank: int, settings: Any, directory: Path) -> None:
    train_run(settings, directory)


def test_of_two_processes_the_first_tells_the_tracker(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    settings = recipe(root, "tensorboard", eval__tasks=[], eval__limit=...)
    assert launched.run(2, train_with_tensorboard, settings, tmp_path / "run") == ["", ""]
    assert_board(tmp_path / "run")


def test_a_tracker_that_fails_is_told_no_more_and_the_others_go_on(
    root: Path, tmp_path: Path, made: dict[str, Told]
) -> None:
    train_run(recipe(root, "bad", "one", "last", eval__tasks=[], eval__limit=...), tmp_path / "run")
    assert [step for step, _ in made["one"].lines] == [1, 2]
    assert made["one"].lines == made["last"].lines
    assert made["one"].lines[0][1]["loss"] == lines_of(tmp_path / "run")[0]["loss"]
    assert (made["bad"].finished, made["one"].finished, made["last"].finished) == (0, 1, 1)
    log = (tmp_path / "run/log.txt").read_text()
    assert log.count("trackers: bad failed and gets no more metrics: KeyError: 'no log with hf_***") == 1
    assert log.count("trackers: last failed") == 1
    assert TOKEN not in log


def test_one_that_does_not_start_stops_the_run_and_the_others_are_closed(
    root: Path, tmp_path: Path, made: dict[str, Told]
) -> None:
    with pytest.raises(UserError, match=r"broken did not start: KeyError: 'no start with hf_\*\*\*") as caught:
        train_run(recipe(root, "one", "broken", eval__tasks=[], eval__limit=...), tmp_path / "run")
    assert len(str(caught.value).splitlines()) == 1
    assert made["one"].finished == 1
    assert made["one"].lines == []
    (tmp_path / "run/tensorboard").mkdir()  # as one that has started before would leave
    train_run(recipe(root, "one", eval__tasks=[], eval__limit=...), tmp_path / "run")
    assert [step for step, _ in made["one"].lines] == [1, 2]


@pytest.fixture
def inits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """What wandb and trackio, which are not installed here, are started with."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def stand_in(name: str) -> types.SimpleNamespace:
        config = types.SimpleNamespace(update=lambda *_args, **_options: None)
        logged = types.SimpleNamespace(log=lambda *_args, **_options: None, finish=lambda: None)
        init = lambda **options: (calls.append((name, options)), logged)[1]  # noqa: E731
        return types.SimpleNamespace(init=init, config=config)

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, stand_in(name))
    for variable in ("WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
    return calls


def test_the_trackers_of_accelerate_get_project_run_and_directory(
    tmp_path: Path, inits: list[tuple[str, dict[str, Any]]]
) -> None:
    (tmp_path / "mine").mkdir()
    with tracking(["wandb", "trackio"], tmp_path / "mine", {}, cpu=True) as tell:
        tell({"step": 1, "loss": 2.0})
    id = (tmp_path / "mine/wandb_id.txt").read_text().strip()
    assert inits == [
        (
            "wandb",
            {"project": "qdora", "name": "mine", "dir": str(tmp_path / "mine"), "id": id, "resume": "allow"},
        ),
        ("trackio", {"project": "qdora", "name": "mine"}),
    ]


def test_a_resumed_run_keeps_its_id_at_wandb_and_the_environment_names_the_project(
    root: Path, tmp_path: Path, inits: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "find_spec", lambda name: name)
    monkeypatch.setenv("WANDB_PROJECT", "papers")
    settings = recipe(root, "wandb", eval__tasks=[], eval__limit=...)
    train_run(settings, tmp_path / "run")
    longer = settings.model_copy(update={"train": settings.train.model_copy(update={"steps": 3})})
    train_run(longer, tmp_path / "run", resume=True)
    train_run(settings, tmp_path / "other")
    (first, resumed, other) = (options for _, options in inits)
    assert first == resumed
    assert first["project"] == "papers"
    assert re.fullmatch("[A-Za-z0-9_-]{8,64}", first["id"])
    assert other["id"] != first["id"]
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    with tracking(["wandb"], tmp_path / "run", {}, cpu=True):
        assert inits[-1][1]["id"] == "mine"


NUMBERS = st.floats(allow_nan=False) | st.integers(-(2**40), 2**40)
NESTED = st.recursive(
    NUMBERS | st.booleans() | st.text() | st.none() | st.lists(NUMBERS),
    lambda inner: st.dictionaries(st.text("abc", min_size=1), inner, max_size=4),
)


@given(values=st.dictionaries(st.text("abc", min_size=1), NESTED, max_size=5))
def test_every_number_and_nothing_else_is_flattened(values: dict[str, Any]) -> None:
    def leaves(node: Any) -> list[Any]:
        return [leaf for child in node.values() for leaf in leaves(child)] if isinstance(node, dict) else [node]

    numbers = [leaf for leaf in leaves(values) if isinstance(leaf, int | float) and not isinstance(leaf, bool)]
    flat = flat_numbers(values)
    assert sorted(flat.values()) == sorted(map(float, numbers))
    for path, value in flat.items():
        node: Any = values
        for key in path.split("/"):
            node = node[key]
        assert node == value


def test_settings_are_flat_and_hold_no_token() -> None:
    values = {
        "model": {"source": f"https://x/?t={TOKEN}", "revision": None},
        "train": {"lr": 1e-3, "betas": [0.9, 0.99], "steps": 4, "log": True},
        "data": {"mix": [{"task": TOKEN}]},
    }
    assert flat_settings(values) == {
        "model.source": "https://x/?t=hf_***",
        "train.lr": 1e-3,
        "train.betas": "[0.9, 0.99]",
        "train.steps": 4,
        "train.log": True,
        "data.mix": "[{'task': 'hf_***'}]",
    }
