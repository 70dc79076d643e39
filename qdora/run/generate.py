"""qdora generate: let a run or a model go on from a prompt, and stream what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from qdora.errors import UserError
from qdora.memory.allocator import keep_freed_memory
from qdora.model.inject import adapted_layers
from qdora.nn.adapted_linear import prepare_decoding
from qdora.run.load_run import LoadedModel, load_target

Write = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; else the logits are divided by it.
        top_p: Keep the likeliest tokens up to this probability.
        top_k: Keep this many of the likeliest tokens.
        seed: Of the draws.
        max_new_tokens: Most tokens of the answer.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    max_new_tokens: int = 256

    def faults(self) -> list[str]:
        """What is not allowed, one line each."""
        found = []
        if not 0 <= self.temperature <= 100:
            found.append(f"--temperature: {self.temperature:g}, allowed: 0 to 100; 0 takes the most likely token.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"--top-p: {self.top_p:g}, allowed: more than 0, at most 1.")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"--top-k: {self.top_k}, allowed: at least 1.")
        if self.max_new_tokens < 1:
            found.append(f"--max-new-tokens: {self.max_new_tokens}, allowed: at least 1.")
        if self.temperature == 0:
            names = [("--top-p", self.top_p), ("--top-k", self.top_k)]
            found += [
                f"{name}: has no effect at temperature 0; give --temperature." for name, x in names if x is not None
            ]
        return found

    def settings(self) -> dict[str, Any]:
        """For transformers' `generate`; whatever the model's own generation config says is replaced."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": 0 if self.top_k is None else self.top_k,
        }


def generate_from(
    target: str,
    prompt: str,
    sampling: Sampling = Sampling(),
    *,
    system: str | None = None,
    raw: bool = False,
    step: int | None = None,
    base_only: bool = False,
    quant: str | None = None,
    write: Write | None = None,
) -> dict[str, Any]:
    """Load what `target` names and let it answer.

    Args:
        target: Run directory, model directory, Hub id, or builtin.
        prompt: What the user says.
        sampling: How.
        system: System message, for a model with a chat template.
        raw: Give the prompt to the model as it is, without the chat template.
        step, base_only, quant: As of `load_target`.
        write: Called with each piece of text as soon as it is known.
    Returns:
        As of `answer`.
    Raises:
        UserError: Settings or a target that cannot be used, an empty prompt.
    """
    faults = sampling.faults()
    if not prompt:
        faults.append("--prompt: is empty, allowed: some text.")
    if system is not None and raw:
        faults.append("--system: has no effect with --raw, which leaves the chat template out.")
    if faults:
        raise UserError(*faults)
    keep_freed_memory()
    loaded = load_target(target, step=step, base_only=base_only, quant=quant, verb="generate")
    prepare_decoding(adapted_layers(loaded.model).values())
    return {"target": target, "label": loaded.label, **answer(loaded, prompt, sampling, system, raw, write)}


def answer(
    loaded: LoadedModel, prompt: str, sampling: Sampling, system: str | None, raw: bool, write: Write | None
) -> dict[str, Any]:
    """Let a model in memory answer.

    Returns:
        JSON values: the text, numbers of tokens, seconds, tokens per second after the first, why it stopped
        ("end" or "length").
    Raises:
        UserError: A system message without a chat template, or a prompt that leaves no room in the context.
    """
    ids = prompt_ids(loaded.tokenizer, prompt, system, raw)
    model = loaded.model
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and len(ids) >= limit:
        raise UserError(f"--prompt: has {len(ids)} tokens, allowed: fewer than {limit}, the context of the model.")
    stops = _stop_ids(model, loaded.tokenizer)
    streamer = _Streamer(loaded.tokenizer, write or (lambda text: None))
    device = next(model.parameters()).device
    tokens = torch.tensor([ids], device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        began = time.perf_counter()
        generate: Any = model.generate
        out = generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            streamer=streamer,
            max_new_tokens=sampling.max_new_tokens,
            max_length=None,
            eos_token_id=sorted(stops) or None,
            pad_token_id=loaded.tokenizer.pad_token_id,
            use_cache=True,
            **sampling.settings(),
        )
        seconds = time.perf_counter() - began
    new = out[0, len(ids) :].tolist()
    ended = bool(new) and new[-1] in stops
    after_first = streamer.last_time - streamer.first_time
    return {
        "prompt": prompt,
        "text": str(loaded.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)),
        "num_prompt_tokens": len(ids),
        "num_new_tokens": len(new),
        "stopped": "end" if ended else "length",
        "seconds": seconds,
        "tokens_per_second": (len(new) - 1) / after_first if len(new) > 1 and after_first > 0 else None,
    }


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None, raw: bool) -> list[int]:
    """The tokens that the model is given: through the chat template where there is one, unless `raw`.

    Raises:
        UserError: A system message for a tokenizer that has no chat template.
    """
    if raw or not tokenizer.chat_template:
        if system is not None:
            raise UserError("--system: the tokenizer has no chat template to put it in; leave it out.")
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # The template writes the beginning mark itself.
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _stop_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ends of sequence of the tokenizer and of the model's own settings (chat models have several)."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])}
    return {int(stop) for stop in stops if stop is not None}


class _Streamer:
    """Hands on text as soon as its words are whole, and keeps the time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        self.text: Any = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text.on_finalized_text = lambda text, stream_end=False: write(text + ("\n" if stream_end else ""))
        self.first_time = self.last_time = 0.0
        self.num_calls = 0

    def put(self, value: torch.Tensor) -> None:
        """Called by transformers with the prompt, then with each token."""
        self.num_calls += 1
        if self.num_calls > 1:
            self.last_time = time.perf_counter()
            self.first_time = self.first_time or self.last_time
        self.text.put(value)

    def end(self) -> None:
        """Called by transformers after the last token."""
        self.text.end()
