"""Chats -> tokens: what is learnt, and that the model sees before each turn what a server would give it."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data.chats import (
    Encoded,
    chat_template_of,
    encode_chats,
    prompt_text,
    set_chat_date,
    set_chat_settings,
    use_data_settings,
)
from qdora.data.example import Example, Turn
from qdora.data.formats import parse_tools
from qdora.recipe.data_settings import DataConfig
from tests import support
from tests.data_rows import fault_of, faults_of, says, tokenized

CHATML, LOOP = support.CHATML, "{% for m in messages %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
STRIPS = (
    "{% set last = messages | map(attribute='role') | list %}{% set ns = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.user %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
"""Reasoning is printed for the last answer only, a stub where there is none."""
STRIPS_OPEN = STRIPS + PROMPT.replace("assistant\n", "assistant\n<think>\n")
THINKING = "assistant\n{% if thinking is defined and thinking %}<think>\n{% endif %}"
CHOOSES = CHATML.replace("assistant\n", THINKING)
"""With `thinking`, the prompt begins a thought that answers do not have."""
BEGUN = CHATML.replace("assistant\n", "assistant\n<think>\n")
NEXT_ROLE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}("
    "{{ c.function.arguments | tojson }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""A turn ends where the mark of the next one begins."""
TRAILER = CHATML.replace("{% if add", "{% if not add_generation_prompt %}<|eos|>{% endif %}{% if add")
"""One more mark at the end of a chat."""
RETURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|im_end|>' }}"
    "{% endfor %}" + PROMPT
)
"""The end mark of the last turn is one of its own."""
PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Prints nothing for plain text, like those of vision models."""
NO_SYSTEM = "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system') }}{% endfor %}" + CHATML
DROPS_SYSTEM = CHATML.replace(LOOP, "{% for m in messages if m.role != 'system' %}")
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}" + PROMPT
)
MARKED_SHORT = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:"
BARE += "{% endif %}"
JOINED = CHATML.replace("}}\n{{", "}}\n\n{{").replace("assistant\n", "assistant\n\n")
"""The prompt ends in two line ends: one token alone, two before a word."""
LAST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% if loop.last and system is defined %}{{ system }}. "
    "{% endif %}{{ m.content }}<|assistant|>{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)
"""The system prompt stands before the last question, and nowhere once that is answered; no generation prompt."""
SHORT_IDS = LOOP + (
    "{{ m.role }}{% for c in m.tool_calls or [] %}{{ c.id|length == 9 or raise_exception('nine') }}"
    "[{{ c.function.name }} {{ c.id }}]{% endfor %}{% if m.role == 'tool' %}"
    "{{ m.tool_call_id|length == 9 or raise_exception('nine') }}[{{ m.content }} {{ m.tool_call_id }}]"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
"""As Mistral's: it wants ids of nine letters."""
OTHER_HEADER = (
    "{% set ns = namespace(open=false) %}" + LOOP + "{% if m.role == 'tool' %}<|tool|>{{ m.content }}"
    "{% set ns.open = true %}{% elif m.role == 'user' %}{% set ns.open = false %}<|user|>{{ m.content }}"
    "{% elif m.tool_calls %}{{ '\n' if ns.open else '<|assistant|>' }}{% set ns.open = false %}"
    "call {{ m.tool_calls[0].function.name }}<|eos|>"
    "{% else %}{{ '<|return|>' if ns.open else '<|assistant|>' }}{% set ns.open = false %}{{ m.content }}<|eos|>"
    "{% endif %}{% endfor %}{% if ns.open %}<|return|>{% elif add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Answers to results of tools have a header of their own, but for a second call."""
CALLS = "{% for c in m.tool_calls %}{{ ARGUMENTS }}{% endfor %}<|im_end|>\n{% endfor"
AS_OBJECT, AS_TEXT = (
    CHATML.replace("<|im_end|>\n{% endfor", CALLS.replace("ARGUMENTS", form))
    for form in ("c.function.arguments | tojson", "'' + c.function.arguments")
)
NAMES_CALL = CHOOSES.replace("<|im_end|>", "{% for c in m.tool_calls %}<{{ c.function.name }}{% endfor %}<|im_end|>")
TEMPLATES = [CHATML, STRIPS + PROMPT, STRIPS_OPEN, NEXT_ROLE, TRAILER, RETURNS, PARTS]
TEMPLATES += [NO_SYSTEM, DROPS_SYSTEM, MARKED, BARE, LAST_SYSTEM, JOINED]
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|return|>", "<|eos|>", "<think>", "</think>"]
CHAT = (Turn("user", "Hi"), Turn("assistant", "the cat"), Turn("user", "Why?"), Turn("assistant", "the dog"))
HI, CAT, WHY, DOG = CHAT
KIND, TOOL = Turn("system", "Be kind"), Turn("tool", "12")


def call_of(name: str, arguments: Any = None, **id: str) -> dict[str, Any]:
    return {"type": "function", **id, "function": {"name": name, "arguments": arguments or {}}}


def calling(*calls: dict[str, Any], content: str = "", reasoning: str = "") -> Turn:
    return Turn("assistant", content, calls, reasoning=reasoning)


def make(template: str, **kwargs: Any) -> Any:
    tokenizer = support.tokenizer(chat_template=template, more=["\n\n", "a \n", " a"] * 9)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    set_chat_settings(tokenizer, template_kwargs=kwargs)
    return tokenizer


kept = cache(make)
"""For tests that do not change the tokenizer."""


def chat(*turns: Turn, tools: Any = None) -> Example:
    return Example("t", "7", "", "", messages=turns or CHAT, tools=parse_tools(tools))


def encoded(tokenizer: Any, *turns: Turn, **options: Any) -> list[Encoded]:
    [found] = encode_chats(tokenizer, [chat(*turns)], **options)
    assert not isinstance(found, str), found
    return found


def learnt(tokenizer: Any, part: Encoded) -> str:
    return str(tokenizer.decode([id for id, is_learnt in zip(part.ids, part.mask, strict=True) if is_learnt]))


def runs(part: Encoded) -> list[tuple[int, int]]:
    """(start, end) of each run of learnt tokens."""
    changes = np.flatnonzero(np.diff(np.array([0, *part.mask, 0], dtype=int)))
    return list(pairwise(changes.tolist()))[::2]


STUB = "<think>\n\n</think>\n\n"
THOUGHT = [Turn(each.role, each.content, reasoning="hm" if each.role == "assistant" else "") for each in CHAT]
GIVEN = calling(call_of("the", {"a": 1}))


@pytest.mark.parametrize(
    "template, turns, expected",
    [
        (STRIPS + PROMPT, CHAT, [(1, f"{STUB}the cat<|im_end|>\n"), (3, f"{STUB}the dog<|im_end|>\n")]),
        (STRIPS_OPEN, CHAT, [(1, "\n</think>\n\nthe cat<|im_end|>\n"), (3, "\n</think>\n\nthe dog<|im_end|>\n")]),
        (STRIPS_OPEN, THOUGHT[:2], [(None, "hm\n</think>\n\nthe cat<|im_end|>\n")]),
        (NEXT_ROLE, CHAT, [(None, "the cat<|user|>the dog<|user|>")]),
        (NEXT_ROLE, (HI, GIVEN, TOOL, CAT), [(None, 'the({"a": 1})<|tool|>the cat<|user|>')]),
        (NEXT_ROLE, (HI, GIVEN), [(None, 'the({"a": 1})<|tool|>')]),
        (TRAILER, CHAT, [(None, "the cat<|im_end|>\nthe dog<|im_end|>\n<|eos|>")]),
        (RETURNS, CHAT, [(1, "the cat<|return|>"), (3, "the dog<|return|>")]),
        (PARTS, CHAT, [(None, " the cat<|im_end|>\n the dog<|im_end|>\n")]),
        (MARKED, CHAT, [(None, "the cat<|im_end|>the dog<|im_end|>")]),
        (MARKED_SHORT, CHAT, [(None, "the cat<|im_end|>the dog<|im_end|>")]),
        (BARE, CHAT, [(1, " the cat\n<|im_end|>"), (3, " the dog\n<|im_end|>")]),
        (JOINED, CHAT, [(1, "the cat<|im_end|>\n"), (3, "the dog<|im_end|>\n")]),
        (CHATML, CHAT[:3], [(None, "the cat<|im_end|>\n")]),
        (CHATML, CHAT[1:3], [(None, "the cat<|im_end|>\n")]),  # the assistant begins
        (CHATML, (HI, replace(CAT, learnt=False), WHY, DOG), [(None, "the dog<|im_end|>\n")]),
        (AS_OBJECT, (HI, calling(call_of("f", {"a": "é"}))), [(None, '{"a": "é"}<|im_end|>\n')]),
        (AS_TEXT, (HI, calling(call_of("f", {"a": "é"}))), [(None, '{"a": "é"}<|im_end|>\n')]),
        (CHATML, (HI, replace(CAT, in_prompt=True), WHY, DOG), [(None, "the dog<|im_end|>\n")]),
        # a turn of which the template prints nothing
        (CHATML, (HI, calling(call_of("f")), TOOL, CAT), [(None, "the cat<|im_end|>\n")]),
        (CHATML, (HI, calling(call_of("f"))), []),
        (CHATML, (HI, Turn("assistant", "")), [(None, "<|im_end|>\n")]),
        (CHATML, (HI, Turn("assistant", "<think>"), WHY, DOG), [(None, "<think><|im_end|>\nthe dog<|im_end|>\n")]),
    ],
)
def test_what_each_kind_of_template_teaches(template: str, turns: Any, expected: list[tuple[int | None, str]]) -> None:
    tokenizer = kept(template)
    assert [(part.turn, learnt(tokenizer, part)) for part in encoded(tokenizer, *turns)] == expected


def test_answers_behind_another_header_than_that_of_the_prompt() -> None:
    tokenizer, call = kept(OTHER_HEADER), calling(call_of("f"))
    [part] = encoded(tokenizer, HI, call, TOOL, CAT, WHY, call, Turn("tool", "34"), call, Turn("tool", "5"), DOG)
    said = ["call f<|eos|>", "the cat<|eos|>", "call f<|eos|>", "\ncall f<|eos|>", "the dog<|eos|>"]
    assert (learnt(tokenizer, part), len(runs(part))) == ("".join(said), len(said))


SAYS = {"user": "uvw \n", "system": "xyz ", "assistant": "abc \n"}


@st.composite
def chats(draw: st.DrawFn) -> tuple[Turn, ...]:
    """Turns whose letters tell the roles apart; an answer is never empty."""

    def turn(role: str) -> Turn:
        text = draw(st.text(SAYS[role], min_size=1, max_size=8)) + SAYS[role][0]
        if role != "assistant":
            return Turn(role, text)
        return Turn(role, text, reasoning=draw(st.sampled_from(["", "ba"])), learnt=draw(st.booleans()))

    pairs = draw(st.integers(1, 3))
    system = [turn("system")] if draw(st.booleans()) else []
    return (*system, *(turn(role) for _ in range(pairs) for role in ("user", "assistant")))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: str(TEMPLATES.index(template)))
@settings(max_examples=25, deadline=None)
@given(turns=chats())
def test_model_sees_before_each_turn_what_a_server_gives_it(template: str, turns: tuple[Turn, ...]) -> None:
    """The expectation is transformers' own rendering of the chat before the turn, encoded as a text of its own."""
    tokenizer = kept(template)
    messages = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.content}] if template == PARTS else turn.content}
        | ({"reasoning_content": turn.reasoning} if turn.reasoning else {})
        for turn in chat_template_of(tokenizer).fitted(turns)
    ]
    moved = len(turns) - len(messages)
    wanted = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.learnt]
    parts = encoded(tokenizer, *turns)
    found: list[tuple[Encoded, int, int]] = [(part, *run) for part in parts for run in runs(part)]
    assert len(found) == len(wanted)
    for index, (part, start, end) in zip(wanted, found, strict=True):
        prompt = tokenizer.apply_chat_template(messages[: index - moved], tokenize=False, add_generation_prompt=True)
        assert part.ids[:start] == tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = tokenizer.decode(part.ids[start:end])
        assert turns[index].content in said
        assert not set(said.split("<|")[0]) & set("uvwxyz")
        assert said.rstrip("\n").endswith("|>")


def test_the_tokens_of_a_whole_chat_are_those_of_its_text() -> None:
    tokenizer = kept(CHATML)
    messages = [{"role": each.role, "content": each.content} for each in CHAT]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    [part] = encoded(tokenizer)
    assert part.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    begins = support.tokenizer(bos=True)  # the template decides: no <s>
    for loss_on, expected in (
        ("answer", "the cat<|im_end|>\nthe dog<|im_end|>\n"),
        ("last", "the dog<|im_end|>\n"),
        ("all", text.removeprefix("<|im_start|>")),  # nothing predicts the first token
    ):
        [done] = tokenized([chat()], begins, loss_on=loss_on).examples
        assert begins.decode(done.input_ids) == text
        assert begins.decode(done.input_ids[done.loss_mask]) == expected


@pytest.mark.parametrize("named, order", [(("b",), "gf"), (("b", "a"), "gf"), ((), "fg"), (("x",), "fg")], ids=str)
def test_a_result_gets_the_short_id_of_its_own_call(named: tuple[str, ...], order: str) -> None:
    """The result of call b comes first; without its id it is taken for that of the first call."""
    results = [Turn("tool", f"r{n}", labels={"tool_call_id": f"call-{id}"}) for n, id in enumerate(named)]
    results += [Turn("tool", f"r{n}") for n in range(len(named), 2)]
    calls, tokenizer = calling(call_of("f", id="call-a"), call_of("g", id="call-b")), kept(SHORT_IDS)
    text = str(tokenizer.decode(encoded(tokenizer, HI, calls, *results, CAT)[-1].ids))
    of_call = dict(re.findall(r"\[([fg]) (\w{9})\]", text))
    assert dict(re.findall(r"\[(r\d) (\w{9})\]", text)) == {"r0": of_call[order[0]], "r1": of_call[order[1]]}
    assert of_call["f"] != of_call["g"]


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM], ids=["no", "drops"])
def test_system_prompt_goes_into_the_first_turn(template: str) -> None:
    tokenizer = kept(template)
    [part] = encoded(tokenizer, KIND, *CHAT)
    start = "<|im_start|>user\nBe kind\n\nHi<|im_end|>\n"
    assert tokenizer.decode(part.ids).startswith(start)
    assert prompt_text(tokenizer, (KIND, HI)).startswith(start)
    assert prompt_text(tokenizer, (KIND,)).startswith("<|im_start|>user\nBe kind<|im_end|>\n")


@pytest.mark.parametrize("answer", ["<b>bold</b>", "<th", "<thin air"])
def test_an_answer_that_begins_like_the_prompt_goes_on_is_learnt_whole(answer: str) -> None:
    """The prompt opens a thought that the template does not print with the answer."""
    tokenizer = make(NAMES_CALL, thinking=True)
    [part] = encoded(tokenizer, HI, Turn("assistant", answer))
    assert learnt(tokenizer, part) == f"{answer}<|im_end|>\n"
    [part] = encoded(tokenizer, HI, calling(call_of("think")))
    assert learnt(tokenizer, part) == "<think<|im_end|>\n"
    [part] = encoded(kept(BEGUN), CAT)
    assert part.ids == kept(BEGUN)("<|im_start|>assistant\nthe cat<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert learnt(kept(BEGUN), part) == "the cat<|im_end|>\n"


def use(template: str | None, **options: Any) -> Any:
    """A tokenizer with this template and these settings of `data`."""
    tokenizer = support.tokenizer(chat_template=template)
    use_data_settings(tokenizer, DataConfig.model_validate({"mix": [{"source": "x.jsonl"}]} | options))
    return tokenizer


def test_settings_of_the_template_and_what_is_refused(tmp_path: Path) -> None:
    thinking = use(CHOOSES, template_kwargs={"thinking": True})
    assert prompt_text(thinking, CHAT[:1]).endswith("<|im_start|>assistant\n<think>\n")
    file = tmp_path / "mine.jinja"
    file.write_text(MARKED, encoding="utf-8-sig")  # as some editors on Windows do
    assert use(None, chat_template=str(file)).chat_template == MARKED
    file.write_text("{% if %}")
    endless = make(CHATML + "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    plain, quiet, no_system = make(CHATML), replace(DOG, learnt=False), make(NO_SYSTEM)
    named, none = support.tokenizer(), support.tokenizer(chat_template=None)
    named.chat_template = {"tool_use": CHATML, "rag": CHATML}

    def made(*examples: Example, by: Any, **options: Any) -> Any:
        return tokenized(examples, by, **options)

    for call, words in (
        (lambda: made(chat(), by=none), "x: holds chats, but ... has no chat template. Fix: set model.tokenizer"),
        (lambda: made(chat(), by=named), "Available template names are ['rag', 'tool_use']"),
        (lambda: made(chat(*CHAT[:2]), by=endless), "x: example 7: the chat template refuses it: maximum rec"),
        (lambda: prompt_text(no_system, (HI, KIND), (), "a: line 2"), "a: line 2: the chat template refuses it: no sy"),
        (lambda: made(chat(HI, quiet), by=plain, loss_on="all"), "7: weight and train of a turn are not used"),
        (lambda: made(chat(*CHAT[:3], quiet), chat(), by=plain, loss_on="last"), "x: example 7: no token in the loss"),
        (lambda: use(CHOOSES, template_kwargs={"thinkin": 1}), "reads ['thinking'], got ['thinkin']"),
        (lambda: use(CHOOSES, template_kwargs={"messages": []}), "reads ['thinking'], got ['messages']"),
        (lambda: use(None, template_kwargs={"a": 1}), "data.template_kwargs: ... reads [], got ['a']"),
        (lambda: use(None, chat_template=str(file)), "data.chat_template: ... mine.jinja: ... line 1"),
        (lambda: use(None, chat_template=f"{tmp_path}/no.jinja"), "data.chat_template: ... no.jinja: ... No such file"),
    ):
        assert says(fault_of(call), words), words
    assert made(chat(tools=[{"name": "f"}]), by=named).num_examples == 1
    refused = [Example("t", str(n), "", "", messages=(HI, KIND, CAT)) for n in range(5)]
    *three, more = faults_of(made, *refused, by=no_system)
    assert [fault.partition(": the")[0] for fault in three] == [f"x: example {n}" for n in range(3)]
    assert more == "and 2 more"


DATED = (
    "  {%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}\nToday: {{ date_string }} {{ strftime_now('%-d/%m %A %Y-%m-%d 100%%') }}\n"
)
"""As in Llama 3.2, behind white space that a template drops."""


@pytest.mark.parametrize("body", [CHATML, MARKED])
def test_a_template_prints_the_date_that_was_set(body: str) -> None:
    tokenizer, user = make(DATED + body), [{"role": "user", "content": "Hi"}]
    theirs = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert prompt_text(tokenizer, CHAT[:1]) == theirs  # today
    set_chat_date(tokenizer, "2024-02-01")
    text = prompt_text(tokenizer, CHAT[:1])
    assert text.startswith("Today: 01 Feb 2024 1/02 Thursday 2024-02-01 100%\n<|im_start|>user\nHi<|im_end|>")
    [part] = encoded(tokenizer)
    assert tokenizer.decode(part.ids).startswith("Today: 01 Feb 2024 ")
    assert learnt(tokenizer, part).replace("\n", "") == "the cat<|im_end|>the dog<|im_end|>"
    set_chat_date(tokenizer, date.today().isoformat())
    assert prompt_text(tokenizer, CHAT[:1]) == theirs
