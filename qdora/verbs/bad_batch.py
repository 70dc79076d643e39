"""The examples of a step that was not applied, kept to be looked at and to be run again.

batch.json           why, the loss, and of each example its id, task, text, summed NLL, token ids and labels
batch.safetensors    input_ids, attention_mask, labels (examples, longest) int64; nll_sum (examples,) float64
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from qdora.atomic_files import json_bytes
from qdora.data.batching import IGNORED
from qdora.train.bad_steps import BadStep


def bad_examples(bad: BadStep) -> list[dict[str, Any]]:
    """This process's examples of the step, as JSON values."""
    found: list[dict[str, Any]] = []
    losses = iter(bad.example_nll)
    for micro in bad.batch.micro_batches:
        tasks = [micro.task_names[index] for index in micro.task_ids.tolist()]
        for task, (name, ids, labels) in zip(tasks, micro.examples(), strict=True):
            found.append(
                {
                    "id": name,
                    "task": task,
                    "nll_sum": next(losses),
                    "num_label_tokens": int((labels != IGNORED).sum()),
                    "input_ids": ids.tolist(),
                    "labels": labels.tolist(),
                }
            )
    return found


def write_bad_batch(directory: Path, bad: BadStep, examples: list[dict[str, Any]], tokenizer: Any) -> None:
    """Write the step's examples, of all processes, into an existing directory; NaN is null in the JSON file.

    Args:
        directory: Where to.
        bad: What was wrong.
        examples: `bad_examples` of all processes, one after the other.
        tokenizer: For the texts, and the padding in batch.safetensors.
    """
    document = {
        "step": bad.step,
        "reason": bad.reason,
        "loss": bad.loss,
        "gradient_norm": bad.gradient_norm,
        "examples": [{"text": tokenizer.decode(each["input_ids"]), **each} for each in examples],
    }
    (directory / "batch.json").write_bytes(json_bytes(document, indent=1))
    ids = [torch.tensor(each["input_ids"]) for each in examples]
    labels = [torch.tensor(each["labels"]) for each in examples]
    tensors = {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "nll_sum": torch.tensor([each["nll_sum"] for each in examples], dtype=torch.float64),
    }
    save_file(tensors, directory / "batch.safetensors")
