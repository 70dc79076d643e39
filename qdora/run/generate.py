"""qdora generate: stream the answers of a run or a model to a prompt, or to a file of conversations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from qdora.data.chat_template import prompt_text, require_chat_template
from qdora.data.example import Messages, RowFault, Tools, Turn
from qdora.data.files import read_rows
from qdora.data.formats import asked_chat
from qdora.data.tokenize import encode_batch, special_prefix, with_prefix
from qdora.errors import UserError
from qdora.evaluate.generation import generate
from qdora.files.run_directory import is_without_chats
from qdora.files.user_paths import user_path
from qdora.memory.oom import keep_freed_memory
from qdora.model.attention import context_length
from qdora.model.tokens import stop_ids_of_model
from qdora.recipe.options import Sampling
from qdora.run.load_run import LoadedModel, load_target

logger = logging.getLogger("qdora")

Write = Callable[[str], None]


def nowhere(text: str) -> None:
    """`write` for a caller that waits for the whole answer."""


def generate_from(
    target: str,
    prompt: str,
    sampling: Sampling = Sampling(),
    *,
    system: str | None = None,
    raw: bool = False,
    write: Write = nowhere,
    **which: Any,
) -> dict[str, Any]:
    """Load a run, an adapter or a model and let it answer a prompt.

    Args:
        target: Directory of a run, an adapter or a model, Hub id, or builtin.
        prompt: The user's text.
        system: System message, for a model with a chat template.
        raw: Use the prompt as it is, without the chat template.
        write: Called with each piece of text as soon as it is known.
        which: step, base_only, base_model, quant of `load_target`.
    Returns:
        JSON values: the text, token counts, seconds, tokens per second after the first, why it stopped: "end" of
        sequence, "length" (`max_new_tokens`), or "context", since prompt and answer fill the model's context.
    Raises:
        UserError: Settings or a target that cannot be used, a prompt that is empty or leaves no room in the context.
    """
    faults = []
    if not prompt:
        faults.append("--prompt: is empty. Fix: give some text.")
    if system is not None and raw:
        faults.append("--system: is not used with --raw, which skips the chat template. Fix: remove one of them.")
    if faults:
        raise UserError(*faults)
    keep_freed_memory()
    loaded = load_target(target, verb="generate", **which)
    ids = prompt_ids(loaded.tokenizer, prompt, system, raw)
    if loaded.run is not None and not raw and loaded.tokenizer.chat_template and is_without_chats(loaded.run.path):
        logger.info("The run has trained no chats, and the prompt gets the chat template. --raw leaves it as it is.")
    found = _answer(loaded, ids, sampling, write, where="--prompt")
    return {"target": target, "label": loaded.label, "prompt": prompt, **found}


def answer_chats(
    target: str, file: str, sampling: Sampling = Sampling(), *, write: Write = nowhere, **which: Any
) -> dict[str, Any]:
    """Load a run, an adapter or a model and let it answer each conversation of a file.

    Args:
        file: Any data file of the format messages or sharegpt, with the column `tools` if there are any, as for
            training. The last turn of a conversation is not the assistant's.
        target, sampling, write, which: See `generate_from`.
    Returns:
        JSON values: `answers` as `generate_from` returns them, without the prompt, in the order of the file.
    Raises:
        UserError: As `generate_from`; a row that is no such conversation.
    """
    chats = _read_chats(user_path(file))
    keep_freed_memory()
    loaded = load_target(target, verb="generate", **which)
    asked = [(where, chat_ids(loaded.tokenizer, turns, tools, where)) for where, turns, tools in chats]
    answers = []
    for where, ids in asked:
        write(f"--- {where}\n")
        answers.append(_answer(loaded, ids, sampling, write, where=where))
    return {"target": target, "label": loaded.label, "chats": file, "answers": answers}


def _settings(sampling: Sampling) -> dict[str, Any]:
    """For `evaluate.generation.generate`."""
    if sampling.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, **sampling.model_dump(include={"temperature", "top_p"}), "top_k": sampling.top_k or 0}


def _read_chats(file: Path) -> list[tuple[str, Messages, Tools]]:
    """(place, turns, tools) of each row. Raises UserError with all faults."""
    rows, chats, faults = read_rows(file), [], []
    for place, row in rows:
        try:
            if isinstance(row, RowFault):
                raise row
            chats.append((rows.at(place), *asked_chat(row)))
        except RowFault as fault:
            faults.append(f"{rows.at(place)}: {fault}")
    rows.refuse(faults)
    return chats


def _answer(loaded: LoadedModel, ids: list[int], sampling: Sampling, write: Write, *, where: str) -> dict[str, Any]:
    """The answer to the tokens of a prompt, as JSON values. `where` they come from, for messages."""
    model, tokenizer, context = loaded.model, loaded.tokenizer, context_length(loaded.model)
    if context is not None and len(ids) >= context:
        raise UserError(f"{where}: got {len(ids)} tokens, must be fewer than {context}, the context of the model.")
    most = sampling.max_new_tokens if context is None else min(sampling.max_new_tokens, context - len(ids))
    streamer, stops = _Streamer(tokenizer, write), stop_ids_of_model(model, tokenizer)
    device, tokens = next(model.parameters()).device, torch.tensor([ids])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        began = time.perf_counter()
        options = {"streamer": streamer, "max_new_tokens": most, "eos_token_id": sorted(stops) or None}
        out = generate(model, tokens, torch.ones_like(tokens), **options, **_settings(sampling))
        seconds = time.perf_counter() - began
    new = out[0, len(ids) :].tolist()
    ended = bool(new) and new[-1] in stops
    is_cut = not ended and most < sampling.max_new_tokens
    if is_cut:
        text = "The answer ends after %d tokens: with the prompt of %d it fills the model's context of %d tokens."
        logger.warning(text, most, len(ids), context)
    return {
        "text": str(tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)),
        "num_prompt_tokens": len(ids),
        "num_new_tokens": len(new),
        "stopped": "end" if ended else "context" if is_cut else "length",
        "seconds": seconds,
        "tokens_per_second": (len(new) - 1) / (streamer.times[-1] - streamer.times[1]) if len(new) > 1 else None,
    }


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None, raw: bool) -> list[int]:
    """The tokens of a prompt: through the chat template if there is one, unless `raw`.

    Raises:
        UserError: A system message for a tokenizer without a chat template, or a template that refuses the prompt.
    """
    if raw or not tokenizer.chat_template:
        if system is not None:
            raise UserError("--system: the tokenizer has no chat template. Fix: remove --system.")
        [ids] = encode_batch(tokenizer, [prompt])
        return with_prefix(ids, special_prefix(tokenizer))
    turns = [Turn("system", system)] if system is not None else []
    return chat_ids(tokenizer, (*turns, Turn("user", prompt)))


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, turns: Messages, tools: Tools = (), where: str = "--prompt"
) -> list[int]:
    """The tokens that the model sees before it answers these turns. `where` they come from, for messages.

    Raises:
        UserError: There is no chat template, or it refuses the turns.
    """
    require_chat_template(tokenizer, where)
    try:
        text = prompt_text(tokenizer, turns, tools)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    # The template writes the begin-of-text token itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


class _Streamer:
    """Writes text as soon as a word is complete, and records when the prompt and each token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        self.text: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text.on_finalized_text = lambda text, stream_end=False: write(text + ("\n" if stream_end else ""))
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers with the prompt, then with each token."""
        self.times.append(time.perf_counter())
        self.text.put(value)

    def end(self) -> None:
        """Called by transformers after the last token."""
        self.text.end()
