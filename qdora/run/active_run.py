"""A run in memory: its fixed parts, and the state that changes with its steps."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qdora.data.batches import StepLoader
from qdora.files.run_directory import RunDirectory
from qdora.recipe.settings import Recipe
from qdora.run.expert_load import ExpertLoad
from qdora.train.best import BestSoFar
from qdora.train.distributed import Processes
from qdora.train.gates import Gates
from qdora.train.loss_scale import LossScale
from qdora.train.optimizer import AdapterOptimizer
from qdora.train.out_of_memory import Backoff
from qdora.train.schedule import Schedule
from qdora.train.step_checks import BadSteps


@dataclass(frozen=True, kw_only=True)
class ActiveRun:
    """The parts of a run that do not change while it trains."""

    recipe: Recipe
    directory: RunDirectory
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    loader: StepLoader
    num_steps: int
    processes: Processes
    console: Console


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The parts of a run that change with its steps. A checkpoint holds the state of each."""

    optimizer: AdapterOptimizer | None
    """None if nothing is trained."""
    gates: Gates | None
    bad_steps: BadSteps
    backoff: Backoff
    schedule: Schedule
    loss_scale: LossScale | None
    """None unless the model computes in float16."""
    expert_load: ExpertLoad
    best: BestSoFar | None
    """Chooses the best step by the evaluations; None without eval.best_by."""
