"""What a run checks of itself as it starts, in words: lines of log.txt, and checks.json."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from qdora.data.batches import PackedLayout
from qdora.data.chat_template import chat_settings
from qdora.data.encode_chats import MAY_NOT_STOP
from qdora.data.example import Example
from qdora.data.mix import Source
from qdora.data.mix_plan import MixPlan, mix_warnings
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import ExampleTally, TokenizedExample, text_batches
from qdora.errors import UserError, first_few
from qdora.files.json_file import read_json_object
from qdora.files.run_directory import RunDirectory, unharmed
from qdora.model.tokens import untrained_rows
from qdora.recipe.data_settings import DataConfig
from qdora.train.distributed import Processes
from qdora.train.packed_attention import packed_layout
from qdora.train.shard_check import check_division

logger = logging.getLogger("qdora")

CHECKS_FILE = "checks.json"
_DATA, _TOKENS, PACKING, DIVISION, GRADIENTS = _GROUPS = "data", "tokens", "packing", "division", "gradients"
_NEAR = 4
"""A stop token among the last tokens of an answer ends it: some templates write a line end behind it."""
_MOST_LOOKED_AT = 1000
_MOST_NAMED = 8
_USUAL = "That is usual only for experts that no token has chosen yet."


@dataclass(frozen=True)
class Check:
    """The answer to one question, in words; `open` where it is not known yet."""

    state: Literal["passed", "warning", "open"]
    text: str


def tell_checks(run: RunDirectory, found: Mapping[str, Sequence[Check]]) -> None:
    """Log the checks and put them into checks.json, in place of those of the same groups.

    Raises: RunFailure: The disk cannot be written.
    """
    for each in (check for group in found.values() for check in group):
        if each.state == "warning":
            logger.warning("%s", each.text)
        elif each.state == "passed":
            logger.info("Checked: %s", each.text)
    told = {group: [asdict(each) for each in checks] for group, checks in found.items()}
    now = _kept(run) | told
    run.write_json(CHECKS_FILE, {group: now[group] for group in _GROUPS if group in now})


def begin_checks(run: RunDirectory, data: Sequence[Check], *, trains: bool) -> None:
    """Tell what is known before the model is loaded. A run that goes on keeps what is known of its gradients."""
    unknown = [asdict(Check("open", "whether every trainable tensor gets a gradient: known after 3 updates."))]
    run.write_json(CHECKS_FILE, {GRADIENTS: _kept(run).get(GRADIENTS, unknown)} if trains else {})
    tell_checks(run, {_DATA: data})


def check_model(
    model: PreTrainedModel,
    run: RunDirectory,
    processes: Processes,
    *,
    packs: bool,
    sources: Sequence[Source],
    tokenizer: Any,
) -> PackedLayout | None:
    """Try the loaded and adapted model before its first step, and tell what was found. All processes call this.

    Packed examples must stay apart in its attention, and a divided base must be the same as the whole one. Tokens that
    cannot be learnt are named, unless the base is divided.

    Args:
        packs: Whether the recipe packs examples.
        sources: The training data.
    Returns:
        How micro-batches are packed for this model; None if they are not.
    Raises:
        As `packed_layout` and `check_division`.
    """
    layout, text = packed_layout(model) if packs else (None, "examples are not packed: none shares a row with another.")
    found = {PACKING: [Check("passed", text)]}
    divided = check_division(model, processes)
    if divided is not None:
        found[DIVISION] = [Check("passed", divided)]

    processes.first(unharmed(CHECKS_FILE)(lambda: tell_checks(run, found)))
    if not processes.shards:
        # By itself: what fails in it, such as memory, must not lose the others
        about = f"the check of tokens in {CHECKS_FILE}"
        processes.first(unharmed(about)(lambda: tell_checks(run, {_TOKENS: _token_checks(model, sources, tokenizer)})))
    return layout


def _token_checks(model: PreTrainedModel, sources: Sequence[Source], tokenizer: Any) -> list[Check]:
    """A warning that names the tokens of the data that cannot be learnt; some examples of each source are looked at."""
    examples = [each for part in sources for each in _spread(part.first())]
    if not examples or not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    read = np.unique(np.concatenate([each.input_ids for each in examples])).tolist()
    learnt = np.unique(np.concatenate([each.input_ids[each.loss_mask] for each in examples])).tolist()
    names = [tokenizer.convert_ids_to_tokens(each) for each in untrained_rows(model, read, learnt)]
    if not names:
        return []
    return [
        Check(
            "warning",
            f"the training data has tokens that the base never learnt: {first_few(names, _MOST_NAMED)}. Their "
            "rows in the embedding or the output head are zero, and an adapter does not change them. Fix: name the "
            "instruct version of the model in model.source, or set adapter.also_train: [embed_tokens, lm_head] and "
            "adapter.also_train_rows: all.",
        )
    ]


def _spread(items: Sequence[Any]) -> Sequence[Any]:
    """At most 1,000 of the items, at even distances."""
    return items[:: -(-len(items) // _MOST_LOOKED_AT) or 1]


def _kept(run: RunDirectory) -> dict[str, Any]:
    try:
        return read_json_object(run.inside(CHECKS_FILE))
    except (UserError, OSError):
        return {}


def data_checks(sources: Sequence[Source], plan: MixPlan, tokenizer: Any, data: DataConfig) -> list[Check]:
    """`example_checks`, and the other warnings about the mix."""
    others = (Check("warning", text) for text in mix_warnings(plan))
    return [*example_checks(sources, tokenizer, data), *others]


def repeated_checks(
    sources: Sequence[Source], scored: Mapping[str, Sequence[Example]], tokenizer: Any, data: DataConfig
) -> list[Check]:
    """A warning for every source with scored examples that are training examples, too, of whichever source.

    At most 1,000 scored examples of each are looked up, as tokens; of a stream only the first rows are known.
    """
    looked_up = {name: _as_tokens(name, _spread(each), tokenizer, data) for name, each in scored.items()}
    wanted = {part for each in looked_up.values() for parts in each for part in parts}
    lengths = {len(part) for part in wanted}
    trained: set[bytes] = set()
    for each in (example for source in sources for example in source.first()):
        if each.input_ids.nbytes in lengths and (part := each.input_ids.tobytes()) in wanted:
            trained.add(part)
    found = {name: sum(trained.issuperset(parts) for parts in each) for name, each in looked_up.items()}
    return [
        Check(
            "warning",
            f"{name}: of {len(looked_up[name]):,} validation examples looked up, {number:,} are training examples, "
            "too, so their loss does not tell how the model does on new data. Fix: remove the copies, or name other "
            "validation data.",
        )
        for name, number in found.items()
        if number
    ]


def _as_tokens(name: str, examples: Sequence[Example], tokenizer: Any, data: DataConfig) -> list[list[bytes]]:
    """The token ids of each example that can be encoded as a whole, as int32; of some chats in several parts."""
    tally = ExampleTally(name, data.max_length, data.too_long)
    try:
        found = [parts for batch in text_batches(examples) for parts in tally.add(batch, tokenizer, data.loss_on)]
    except UserError:  # such as chats without a chat template, which are an error only where they are scored
        return []
    whole = ([each for each, cut in parts if isinstance(each, TokenizedExample) and not cut] for parts in found)
    return [
        [each.input_ids.tobytes() for each in parts]
        for parts, outcomes in zip(whole, found, strict=True)
        if parts and len(parts) == len(outcomes)
    ]


def example_checks(sources: Sequence[Source], tokenizer: Any, data: DataConfig) -> list[Check]:
    """What the examples of each source teach: to stop (at most 1,000 are looked at), and anything at all."""
    stops = sorted(chat_settings(tokenizer).stop_ids or ())
    names = ", ".join(tokenizer.decode([each]) for each in stops)
    found = []
    if not stops:
        text = "neither the model nor the tokenizer names a stop token: no answer teaches when to stop."
        found.append(Check("warning", text))
    for part in sources:
        examples = part.first()
        where = f"{part.name}, the first rows" if isinstance(part, ExampleStream) else part.name
        ends = [end for each in _spread(examples) for end in _ends(each, stops, data)]
        missing, cut = ends.count(False), getattr(part, "num_truncated", 0)
        if stops and missing and not any(MAY_NOT_STOP in note for note in part.notes):
            text = f"{where}: {missing:,} of {len(ends):,} answers do not end with a stop token ({names}) in the loss"
            why = f"; {cut:,} examples are cut to data.max_length, which takes the end of long answers" if cut else ""
            found.append(Check("warning" if 2 * missing > len(ends) else "passed", f"{text}{why}."))
        elif stops and ends and not missing:
            found.append(
                Check("passed", f"{where}: all {len(ends):,} answers looked at end with a stop token ({names}).")
            )
        empty = sum(not each.loss_mask.any() for each in examples)
        text = f"{where}: {empty:,} of {len(examples):,} examples have no token in the loss."
        found.append(Check("warning" if empty else "passed", text))
    return found


def _ends(example: TokenizedExample, stops: Sequence[int], data: DataConfig) -> list[bool]:
    """Whether a stop token ends each stretch of labelled tokens; none of plain text, whose pieces end anywhere."""
    ids, mask = example.input_ids, example.loss_mask
    if (data.loss_on != "all" or data.too_long == "split") and mask.sum() >= len(mask) - 2:
        return []  # all but a beginning mark is learnt
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    return [bool(np.isin(ids[max(begin, end - _NEAR) : end], stops).any()) for begin, end in edges]


def gradient_check(missing: Sequence[str], num_tensors: int, num_updates: int) -> Check:
    """Whether all trainable tensors had a gradient; `missing` are the names of those that had none."""
    if not missing:
        return Check(
            "passed", f"in {num_updates} updates each of the {num_tensors:,} trainable tensors had a gradient."
        )
    return Check("warning", f"{without_gradient(missing, num_tensors, num_updates)} {_USUAL}")


def without_gradient(missing: Sequence[str], num_tensors: int, num_updates: int) -> str:
    """What is wrong where trainable tensors had no gradient."""
    return (
        f"in {num_updates} updates {len(missing):,} of {num_tensors:,} trainable tensors had no gradient, e.g. "
        f"{missing[0]}: they did not train."
    )
