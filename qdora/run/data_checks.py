"""What a run checks of its data and its tokens as it starts, in words: lines of log.txt, and checks.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from qdora.data.chat_template import chat_settings
from qdora.data.encode_chats import MAY_NOT_STOP
from qdora.data.example import Example
from qdora.data.mix import Source
from qdora.data.mix_plan import MixPlan, mix_warnings
from qdora.data.stream import ExampleStream
from qdora.data.tokenize import ExampleTally, TokenizedExample, TokenizedSet, text_batches
from qdora.errors import UserError, first_few
from qdora.files.run_directory import RunDirectory
from qdora.model.attention import positions_of
from qdora.model.tokens import untrained_rows
from qdora.recipe.data_settings import DataConfig
from qdora.train.guards import CHECKS_FILE, DATA, GRADIENTS, Check, kept_checks, tell_checks

_NEAR = 4
"""A stop token among the last tokens of an answer ends it: some templates write a line end behind it."""
_MOST_LOOKED_AT = 1000


def begin_checks(run: RunDirectory, data: Sequence[Check], *, trains: bool) -> None:
    """Log what is known before the model is loaded. A run that goes on keeps what is known of its gradients."""
    unknown = [asdict(Check("open", "whether every trainable tensor gets a gradient: known after 3 updates."))]
    run.write_json(CHECKS_FILE, {GRADIENTS: kept_checks(run).get(GRADIENTS, unknown)} if trains else {})
    tell_checks(run, {DATA: data})


def _spread(items: Sequence[Any]) -> Sequence[Any]:
    """At most 1,000 of the items, at even distances."""
    return items[:: -(-len(items) // _MOST_LOOKED_AT) or 1]


def token_checks(model: PreTrainedModel, sources: Sequence[Source], tokenizer: Any) -> list[Check]:
    """A warning that names the tokens of the data that cannot be learnt; some examples of each source are looked at."""
    examples = [example for part in sources for example in _spread(part.first())]
    if not examples or not any(parameter.requires_grad for parameter in model.parameters()):
        return []
    read = np.unique(np.concatenate([example.input_ids for example in examples])).tolist()
    learnt = np.unique(np.concatenate([example.input_ids[example.loss_mask] for example in examples])).tolist()
    names = [tokenizer.convert_ids_to_tokens(id) for id in untrained_rows(model, read, learnt)]
    if not names:
        return []
    return [
        Check(
            "warning",
            f"the training data has tokens that the base never learnt: {first_few(names, 8)}. Their "
            "rows in the embedding or the output head are zero, and an adapter does not change them. Fix: name the "
            "instruct version of the model in model.source, or set adapter.also_train: [embed_tokens, lm_head] and "
            "adapter.also_train_rows: all.",
        )
    ]


def data_checks(sources: Sequence[Source], plan: MixPlan, tokenizer: Any, data: DataConfig) -> list[Check]:
    """`example_checks`, and the other warnings about the mix."""
    return example_checks(sources, tokenizer, data) + [Check("warning", text) for text in mix_warnings(plan)]


def example_checks(sources: Sequence[Source], tokenizer: Any, data: DataConfig) -> list[Check]:
    """What the examples of each source teach: to stop (at most 1,000 are looked at), and anything at all."""
    stops = sorted(chat_settings(tokenizer).stop_ids or ())
    names = ", ".join(tokenizer.decode([id]) for id in stops)
    checks = []
    if not stops:
        text = "neither the model nor the tokenizer names a stop token: no answer teaches when to stop."
        checks.append(Check("warning", text))
    for part in sources:
        examples = part.first()
        where = f"{part.name}, the first rows" if isinstance(part, ExampleStream) else part.name
        ends = [end for example in _spread(examples) for end in _ends(example, stops, data)]
        missing, cut = ends.count(False), getattr(part, "num_truncated", 0)
        if stops and missing and not any(MAY_NOT_STOP in note for note in part.notes):
            text = f"{where}: {missing:,} of {len(ends):,} answers do not end with a stop token ({names}) in the loss"
            why = f"; {cut:,} examples are cut to data.max_length, which takes the end of long answers" if cut else ""
            checks.append(Check("warning" if 2 * missing > len(ends) else "passed", f"{text}{why}."))
        elif stops and ends and not missing:
            text = f"{where}: all {len(ends):,} answers looked at end with a stop token ({names})."
            checks.append(Check("passed", text))
        empty = sum(not example.loss_mask.any() for example in examples)
        text = f"{where}: {empty:,} of {len(examples):,} examples have no token in the loss."
        checks.append(Check("warning" if empty else "passed", text))
    return checks


def _ends(example: TokenizedExample, stops: Sequence[int], data: DataConfig) -> list[bool]:
    """Whether a stop token ends each stretch of labelled tokens; none of plain text, whose pieces end anywhere."""
    ids, mask = example.input_ids, example.loss_mask
    if (data.loss_on != "all" or data.too_long == "split") and mask.sum() >= len(mask) - 2:
        return []  # all but a beginning mark is learnt
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
    return [bool(np.isin(ids[max(begin, end - _NEAR) : end], stops).any()) for begin, end in edges]


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
    for example in (example for source in sources for example in source.first()):
        if example.input_ids.nbytes in lengths and (part := example.input_ids.tobytes()) in wanted:
            trained.add(part)
    numbers = {name: sum(trained.issuperset(parts) for parts in each) for name, each in looked_up.items()}
    why = "so their loss does not tell how the model does on new data. Fix: remove the copies, or name other validation"
    return [
        Check(
            "warning",
            f"{name}: of {len(looked_up[name]):,} validation examples looked up, {number:,} are training examples, "
            f"too, {why} data.",
        )
        for name, number in numbers.items()
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


def vocabulary_faults(sources: Sequence[Source], config: PreTrainedConfig, num_added: int) -> list[str]:
    """One line for each source with a token that the embedding has no row for; streams are not looked at.

    `num_added` tokens of `model.add_tokens` get rows.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    faults = []
    for name, examples in _known_examples(sources):
        largest = max((int(each.input_ids.max()) for each in examples if len(each)), default=0)
        if size is not None and largest >= size + num_added:
            faults.append(
                f"model.tokenizer: source {name!r} has token id {largest:,}, and the model's embedding has "
                f"{size:,} rows. Fix: use the tokenizer that belongs to the model."
            )
    return faults


def context_warnings(sources: Sequence[Source], config: PreTrainedConfig) -> list[str]:
    """One line for each source with examples that are longer than the model has positions."""
    positions, warnings = positions_of(config), []
    for name, examples in _known_examples(sources):
        lengths = [len(each) for each in examples if positions is not None and len(each) > positions]
        if lengths:
            warnings.append(
                f"{name}: {len(lengths):,} of {len(examples):,} examples are longer than the model has "
                f"positions (up to {max(lengths):,} tokens, max_position_embeddings {positions:,}). Evaluation cuts "
                "them, training does not, and a model that learnt a vector for each position fails. Fix: "
                f"set data.max_length: {positions} and data.too_long: truncate."
            )
    return warnings


def _known_examples(sources: Sequence[Source]) -> list[tuple[str, Sequence[TokenizedExample]]]:
    return [(part.name, part.examples) for part in sources if isinstance(part, TokenizedSet)]
