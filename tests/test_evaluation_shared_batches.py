"""Processes with whole models divide an evaluation's batches and get the scores of a single process, bit for bit."""

from __future__ import annotations

import logging
import math
from typing import Any
from unittest.mock import Mock, patch

import pytest
from torch import nn

from qdora.errors import RunFailure
from qdora.evaluation import token_scores
from qdora.evaluation.batches import batches_shared, results_of
from qdora.evaluation.generation import GenerationResult, evaluate_generated
from qdora.evaluation.suite import EvaluationResult, evaluate
from qdora.run.step_evaluations import evaluate_together
from qdora.train.distributed import processes_of_launch
from tests import launched, tiny, tiny_tokenizer
from tests.test_evaluation_suite import questions, texts

SIZE = 3
SETS = {"choices": questions("choices", 12), "free": texts("free", 7), "both": questions("both", 3) + texts("both", 2)}
# So few tokens that there are more batches than processes.
FEW = {"max_batch_tokens": 48}


class Counted(nn.Module):
    """Counts the forward passes of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.tokenizer = tiny.llama(vocab_size=400, initializer_range=0.3), tiny_tokenizer.make()
        self.num_passes = 0
        self.model.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.num_passes += 1

    def evaluated(self) -> EvaluationResult:
        return evaluate(self.model, self.tokenizer, SETS, **FEW)

    def generated(self) -> GenerationResult:
        asked = {"choices": SETS["choices"]}
        return evaluate_generated(self.model, self.tokenizer, asked, max_new_tokens=5, max_batch_tokens=60)


def without_times(result: Any) -> dict[str, Any]:
    document: dict[str, Any] = result.to_dict(per_example=True)
    del document["settings"]["seconds"]
    return document


def _together(rank: int) -> None:
    counted = Counted()
    with processes_of_launch() as processes:
        for evaluation in (counted.evaluated, counted.generated):
            counted.num_passes = 0
            alone = without_times(evaluation())
            most, counted.num_passes = counted.num_passes, 0
            assert without_times(evaluate_together(processes, evaluation)) == alone
            passes = processes.gather(counted.num_passes)
            assert sum(passes) == most > SIZE  # nothing is computed twice
            assert max(passes) < most * 2 / SIZE


def test_scores_and_answers_are_those_of_one_process() -> None:
    assert launched.run(SIZE, _together) == [""] * SIZE


def _one_fails(rank: int) -> None:
    counted = Counted()
    with processes_of_launch() as processes:
        own = "a fault of its own" if rank == 1 else "process 1 failed: a fault of its own"
        fault = ValueError("a fault of its own") if rank == 1 else None
        broken = Mock(wraps=token_scores._score_shared, side_effect=fault)
        with patch.object(token_scores, "_score_shared", broken), pytest.raises((ValueError, RunFailure), match=own):
            evaluate_together(processes, counted.evaluated)

        def written() -> EvaluationResult:
            found = counted.evaluated()
            if rank == 0:
                raise OSError("the disk is full")
            return found

        own = "the disk is full" if rank == 0 else "process 0 failed: the disk is full"
        with pytest.raises((OSError, RunFailure), match=own):
            evaluate_together(processes, written)

        def between() -> GenerationResult:
            written()
            return counted.generated()

        with pytest.raises((OSError, RunFailure), match=own):
            evaluate_together(processes, between)
        assert processes.gather(rank) == [0, 1, 2]  # no message of one is taken for another of the others
        assert math.isfinite(evaluate_together(processes, counted.evaluated).average.nll)


def test_where_one_fails_the_others_say_who() -> None:
    assert launched.run(SIZE, _one_fails) == [""] * SIZE


def test_a_process_that_stops_at_once_sends_no_more() -> None:
    processes = Mock(rank=0, size=2, shards=False)
    processes.exchange.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        evaluate_together(processes, lambda: results_of(nn.Module(), [[1]], lambda batch: batch))
    assert processes.exchange.call_count == 1  # of which the others have a part


def test_alone_all_batches_are_computed_and_reported() -> None:
    done: list[tuple[int, int]] = []
    batches = [[3, 1], [0], [2, 4]]
    found = results_of(nn.Module(), batches, lambda batch: [10 * item for item in batch], lambda *now: done.append(now))
    assert found == {item: 10 * item for item in range(5)}
    assert done == [(2, 5), (3, 5), (5, 5)]
    with pytest.raises(ZeroDivisionError):
        results_of(nn.Module(), [[1]], lambda _: [1 // 0])


def test_processes_with_other_examples_are_refused() -> None:
    with batches_shared(0, 2, lambda value: [value, []]):
        assert results_of(nn.Module(), [[1]], lambda batch: batch) == {1: 1}
        with pytest.raises(RunFailure, match="the processes evaluate different examples"):
            results_of(nn.Module(), [[1], [2]], lambda batch: batch)


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _warned(rank: int) -> None:
    logger, heard = logging.getLogger("qdora"), Heard()
    logger.addHandler(heard)

    def evaluation() -> bool:
        logger.warning("one prompt was cut")
        return True

    with processes_of_launch() as processes:
        for each in (processes, processes.dividing(base=True)):
            evaluate_together(each, evaluation)
        logger.warning("afterwards")
    assert heard.texts == ["one prompt was cut"] * (2 if rank == 0 else 0) + ["afterwards"]


def test_what_all_find_is_told_once() -> None:
    assert launched.run(2, _warned) == ["", ""]
