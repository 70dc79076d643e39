"""What a run checks of itself as it starts, in words: lines of log.txt, and checks.json for the page of the run."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedModel

from qdora.data.batching import PackedLayout
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
from qdora.model.trained_embeddings import untrained_rows
from qdora.recipe.data_settings import DataConfig
from qdora.train.distributed import Processes
from qdora.train.packed_attention import packed_layout
from qdora.train.shard_check import check_division

logger = logging.getLogger("qdora")

CHECKS_FILE = "checks.json"
_DATA, _TOKENS, PACKING, DIVISION, GRADIENTS = _GROUPS = "data", "tokens", "packing", "division", "gradients"
_AT_A_TIME = 4096
_NEAR = 4
"""A stop token among the last tokens of an answer ends it: some templates write a line end behind it."""
_MOST_LOOKED_AT = 1000
_MOST_NAMED = 8
_USUAL = "That is usual only for experts that no token has chosen yet."
_STUB = re.compile(
    r"<([\w:]*(?:think|thinking|thought|reasoning))>\s*</\1>|\[THINK\]\s*\[/THINK\]"
    r"|<\|START_THINKING\|>\s*<\|END_THINKING\|>|<\|channel\|>analysis<\|message\|>\s*<\|end\|>"
)
"""A block for reasoning, in the marks of the usual templates, with nothing in it."""


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
    """What the examples teach: to stop, anything at all, to think.

    Every example of a source is looked at, of a stream the first rows. Empty thinking blocks are looked for in at most
    1,000 examples of a source that could have one.
    """
    stops = sorted(chat_settings(tokenizer).stop_ids or ())
    vocabulary = tokenizer.get_vocab()
    thinks = [number for token, number in vocabulary.items() if _may_think(token)]
    size = 1 + max([*vocabulary.values(), *stops])
    tables = _table(stops, size), _table(thinks, size)
    learnt = [_learnt(part, tokenizer, data, *tables) for part in sources]
    return [
        *_stop_checks(learnt, sources, [tokenizer.decode([each]) for each in stops]),
        *_label_checks(learnt),
        *_stub_checks(learnt),
    ]


@dataclass(frozen=True, kw_only=True)
class _Learnt:
    """What is in the loss of a source.

    Attributes:
        num_answers, num_stopped: Stretches of labelled tokens, and those that end with a stop token. Not of plain text,
            whose pieces end anywhere.
        num_without_label, fewest_labels: Examples with nothing to learn; the labels of the example with the fewest.
        is_sample, num_decoded, num_stubs, stub: Examples that were searched for an empty thinking block, whether these
            are only some of those that could have one, those that have one in the loss, and the first block.
    """

    name: str
    is_stream: bool
    num_examples: int
    num_answers: int
    num_stopped: int
    num_without_label: int
    fewest_labels: int
    is_sample: bool
    num_decoded: int
    num_stubs: int
    stub: str


def _may_think(token: str) -> bool:
    lower = token.lower()
    return any(word in lower for word in ("think", "thought", "reasoning", "analysis"))


def _table(ids: Sequence[int], size: int) -> Any:
    """Token id -> whether it is one of these, (size,) bool."""
    table = np.zeros(size, dtype=np.bool_)
    table[ids] = True
    return table


def _learnt(part: Source, tokenizer: Any, data: DataConfig, is_stop: Any, thinks: Any) -> _Learnt:
    examples = part.first()
    keeps_text = data.loss_on != "all" or data.too_long == "split"
    num_answers = num_stopped = 0
    labels: list[int] = []
    candidates: list[int] = []
    for start, ids, mask, lengths in _batches(examples):
        ends = np.cumsum(lengths)
        begins = ends - lengths
        counts = np.add.reduceat(mask, begins, dtype=np.int64)
        labels += counts.tolist()
        answers, stopped = _answers(ids, mask, begins, is_stop)
        is_text = counts >= lengths - 2  # all but a beginning mark is learnt
        owner = np.searchsorted(ends, answers, side="right")
        counted = ~is_text[owner] if keeps_text else np.ones(len(owner), dtype=np.bool_)
        num_answers += int(counted.sum())
        num_stopped += int((counted & stopped).sum())
        may_think = np.logical_or.reduceat(thinks[ids] & mask, begins)
        candidates += (np.flatnonzero(may_think) + start).tolist()
    searched = candidates or range(len(examples))  # some tokenizers spell such words letter by letter
    decoded = _spread(searched)
    stubs = [found[0] for index in decoded if (found := _STUB.search(_learnt_text(examples[index], tokenizer)))]
    return _Learnt(
        name=part.name,
        is_stream=isinstance(part, ExampleStream),
        num_examples=len(examples),
        num_answers=num_answers,
        num_stopped=num_stopped,
        num_without_label=labels.count(0),
        fewest_labels=min(labels, default=0),
        is_sample=len(decoded) < len(searched),
        num_decoded=len(decoded),
        num_stubs=len(stubs),
        stub="".join(stubs[0].split()) if stubs else "",
    )


def _batches(examples: Sequence[TokenizedExample]) -> Iterator[tuple[int, Any, Any, Any]]:
    """(number of the first, ids and mask of some examples one behind the other, their lengths)."""
    for start in range(0, len(examples), _AT_A_TIME):
        part = examples[start : start + _AT_A_TIME]
        ids = np.concatenate([each.input_ids for each in part])
        mask = np.concatenate([each.loss_mask for each in part])
        yield start, ids, mask, np.fromiter(map(len, part), dtype=np.int64)


def _answers(ids: Any, mask: Any, begins: Any, is_stop: Any) -> tuple[Any, Any]:
    """(first token of each stretch of labelled tokens of one example, whether a stop token ends it)."""
    is_first, is_last = mask.copy(), mask.copy()
    is_first[1:] &= ~mask[:-1]
    is_first[begins] = mask[begins]
    is_last[:-1] &= ~mask[1:]
    is_last[begins[1:] - 1] = mask[begins[1:] - 1]
    first, last = np.flatnonzero(is_first), np.flatnonzero(is_last)
    stopped = np.zeros(len(first), dtype=np.bool_)
    for back in range(_NEAR):
        place = np.maximum(last - back, first)
        stopped |= is_stop[ids[place]]
    return first, stopped


def _learnt_text(example: TokenizedExample, tokenizer: Any) -> str:
    text: str = tokenizer.decode(example.input_ids[example.loss_mask].tolist(), skip_special_tokens=False)
    return text


def _of(number: int, part: _Learnt, what: str) -> str:
    """'sums: 3 of 40 answers'."""
    rows = ", in the first rows of the stream" if part.is_stream else ""
    return f"{part.name}: {number:,} of {part.num_examples if what == 'examples' else part.num_answers:,} {what}{rows}"


def _stop_checks(learnt: Sequence[_Learnt], sources: Sequence[Source], stops: Sequence[str]) -> Iterator[Check]:
    if not stops:
        yield Check(
            "warning", "neither the model nor the tokenizer names a stop token: no answer teaches when to stop."
        )
        return
    names = ", ".join(stops)
    for part, source in zip(learnt, sources, strict=True):
        missing = part.num_answers - part.num_stopped
        if missing and not any(MAY_NOT_STOP in note for note in source.notes):
            text = f"{_of(missing, part, 'answers')} do not end with a stop token ({names}) in the loss"
            cut = getattr(source, "num_truncated", 0)
            text += (
                f"; {cut:,} examples are cut to data.max_length, which takes the end of long answers." if cut else "."
            )
            yield Check("warning" if 2 * part.num_stopped < part.num_answers else "passed", text)
    total = sum(part.num_answers for part in learnt)
    if total and all(part.num_answers == part.num_stopped for part in learnt):
        yield Check("passed", f"stop tokens are in the loss: all {total:,} answers end with one ({names}).")
    if not total:
        yield Check("passed", "all of the data is plain text; only the end of a text is a stop token.")


def _label_checks(learnt: Sequence[_Learnt]) -> Iterator[Check]:
    for part in learnt:
        if part.num_without_label:
            yield Check("warning", f"{_of(part.num_without_label, part, 'examples')} have no token in the loss.")
    if not any(part.num_without_label for part in learnt):
        total, fewest = (
            pick(getattr(part, name) for part in learnt)
            for pick, name in ((sum, "num_examples"), (min, "fewest_labels"))
        )
        yield Check("passed", f"all {total:,} examples have tokens in the loss, each at least {fewest:,}.")


def _stub_checks(learnt: Sequence[_Learnt]) -> Iterator[Check]:
    for part in learnt:
        if part.num_stubs:
            of = f"the {part.num_decoded:,} examples looked at" if part.is_sample else f"{part.num_examples:,} examples"
            yield Check(
                "warning",
                f"{part.name}: {part.num_stubs:,} of {of} have an empty thinking block in the loss ({part.stub}): the "
                "model learns not to think. Fix: give the reasoning as reasoning_content, or let the chat template put "
                "the empty block into the prompt, as many do with data.template_kwargs: {enable_thinking: false}.",
            )
    if not any(part.num_stubs for part in learnt):
        yield Check("passed", "no empty thinking block (such as <think></think>) is in the loss.")


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
