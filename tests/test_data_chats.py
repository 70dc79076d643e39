"""Chats -> tokens: what is learnt, and that the model sees before each turn what a server would give it."""

from __future__ import annotations

import re
from datetime import date
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdora.data.chat_template import (
    chat_template_of,
    prompt_text,
    set_chat_date,
    set_chat_settings,
    template_options,
    use_data_settings,
)
from qdora.data.encode_chats import EncodedChat, encode_chats
from qdora.data.example import Example
from qdora.data.messages import Turn, parse_tools
from qdora.data.tokenize import tokenize_all
from qdora.errors import UserError
from qdora.recipe.data_settings import DataConfig
from tests import tiny_tokenizer

CHATML = tiny_tokenizer.CHATML
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOOP = "{% for m in messages %}"
STRIPS = (
    "{% set last = messages | map(attribute='role') | list %}{% set ns = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.user %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
)
"""Reasoning is printed for the last answer only, a stub where there is none."""
STRIPS_CLOSED = STRIPS + PROMPT
STRIPS_OPEN = STRIPS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
CHOOSES = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if thinking is defined and thinking %}<think>\n{% endif %}{% endif %}",
)
"""With `thinking`, the prompt begins a thought that answers do not have."""
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
"""The end mark is outside the marks of what is generated."""
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:"
BARE += "{% endif %}"
"""No marks at all."""
JOINED = CHATML.replace("}}\n{{", "}}\n\n{{").replace("assistant\n", "assistant\n\n")
"""The prompt ends in two line ends: one token alone, two before a word."""
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls and m.reasoning_content and "
    "(messages | last).role != 'assistant' or loop.last and m.tool_calls %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"
) + PROMPT
LAST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{% if loop.last and system is defined %}{{ system }}. "
    "{% endif %}{{ m.content }}<|assistant|>{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}"
)
"""The system prompt stands before the last question, and nowhere once that is answered; no generation prompt."""
NINE_LETTERS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'tool' %}[{{ m.tool_call_id }}]{% endif %}\n"
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "{{ c.function.name }}[{{ c.id }}]{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"
) + PROMPT
TEMPLATES = {
    "chatml": CHATML,
    "strips": STRIPS_CLOSED,
    "strips, open prompt": STRIPS_OPEN,
    "next role": NEXT_ROLE,
    "trailer": TRAILER,
    "returns": RETURNS,
    "parts": PARTS,
    "no system": NO_SYSTEM,
    "drops system": DROPS_SYSTEM,
    "marked": MARKED,
    "bare": BARE,
    "last system": LAST_SYSTEM,
    "joined": JOINED,
}
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|return|>", "<|eos|>", "<think>", "</think>"]
CHAT = (Turn("user", "Hi"), Turn("assistant", "the cat"), Turn("user", "Why?"), Turn("assistant", "the dog"))


def make(template: str, *, fast: bool = True) -> Any:
    tokenizer = tiny_tokenizer.make(chat_template=template, more=["\n\n", "a \n", " a"] * 9)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    return tokenizer if fast else _Slow(tokenizer)


class _Slow:
    """A tokenizer that does not say where its tokens stand."""

    is_fast = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_tokenizer"], name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self._tokenizer(*args, **options)


def chat(*turns: Turn, tools: Any = None) -> Example:
    return Example("t", "7", "", "", messages=turns or CHAT, tools=parse_tools(tools))


def encoded(tokenizer: Any, *turns: Turn, notes: set[str] | None = None, **options: Any) -> list[EncodedChat]:
    [found] = encode_chats(tokenizer, [chat(*turns)], notes=notes, **options)
    assert not isinstance(found, str), found
    return found


def learnt(tokenizer: Any, part: EncodedChat) -> str:
    return str(tokenizer.decode([id for id, is_learnt in zip(part.ids, part.mask, strict=True) if is_learnt]))


def runs(part: EncodedChat) -> list[tuple[int, int]]:
    """(start, end) of each run of learnt tokens."""
    changes = np.flatnonzero(np.diff(np.array([0, *part.mask, 0], dtype=int)))
    return list(pairwise(changes.tolist()))[::2]


# One text or several


def test_only_what_the_assistant_says_is_learnt() -> None:
    tokenizer = tiny_tokenizer.make(bos=True)
    [one] = tokenize_all([chat()], tokenizer, name="x", max_length=200).examples
    assert tokenizer.decode(one.input_ids) == (  # no <s>: the template decides
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nthe dog<|im_end|>\n"
    )
    assert tokenizer.decode(one.input_ids[one.loss_mask]) == "the cat<|im_end|>\nthe dog<|im_end|>\n"
    [all_of_it] = tokenize_all([chat()], tokenizer, name="x", max_length=200, loss_on="all").examples
    assert all_of_it.loss_mask.sum() == len(all_of_it) - 1
    [last] = tokenize_all([chat()], tokenizer, name="x", max_length=200, loss_on="last").examples
    assert tokenizer.decode(last.input_ids[last.loss_mask]) == "the dog<|im_end|>\n"
    assert last.input_ids.tolist() == one.input_ids.tolist()


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "strips",
            [(1, "<think>\n\n</think>\n\nthe cat<|im_end|>\n"), (3, "<think>\n\n</think>\n\nthe dog<|im_end|>\n")],
        ),
        ("strips, open prompt", [(1, "\n</think>\n\nthe cat<|im_end|>\n"), (3, "\n</think>\n\nthe dog<|im_end|>\n")]),
        ("next role", [(None, "the cat<|user|>the dog<|user|>")]),
        ("trailer", [(None, "the cat<|im_end|>\nthe dog<|im_end|>\n<|eos|>")]),
        ("returns", [(1, "the cat<|return|>"), (3, "the dog<|return|>")]),
        ("parts", [(None, " the cat<|im_end|>\n the dog<|im_end|>\n")]),
        ("marked", [(None, "the cat<|im_end|>the dog<|im_end|>")]),
        ("bare", [(1, " the cat\n<|im_end|>"), (3, " the dog\n<|im_end|>")]),
        ("joined", [(1, "the cat<|im_end|>\n"), (3, "the dog<|im_end|>\n")]),
    ],
)
def test_what_each_kind_of_template_teaches(name: str, expected: list[tuple[int | None, str]]) -> None:
    tokenizer = make(TEMPLATES[name])
    assert [(part.turn, learnt(tokenizer, part)) for part in encoded(tokenizer)] == expected


def test_end_mark_outside_the_marks_of_the_template_is_learnt_too() -> None:
    tokenizer = make(MARKED_SHORT)
    [part] = encoded(tokenizer)
    assert learnt(tokenizer, part) == "the cat<|im_end|>the dog<|im_end|>"


def test_reasoning_is_learnt_where_the_model_thinks() -> None:
    tokenizer = make(STRIPS_OPEN)
    said = [Turn(each.role, each.content, reasoning="hm" if each.role == "assistant" else "") for each in CHAT]
    first, second = encoded(tokenizer, *said)
    assert learnt(tokenizer, first) == "hm\n</think>\n\nthe cat<|im_end|>\n"
    assert "the cat<|im_end|>" in tokenizer.decode(second.ids)
    assert tokenizer.decode(second.ids).count("hm") == 1


def test_call_of_a_tool_ends_where_its_result_begins() -> None:
    tokenizer = make(NEXT_ROLE)
    call = Turn("assistant", "", ({"type": "function", "function": {"name": "the", "arguments": {"a": 1}}},))
    [part] = encoded(tokenizer, CHAT[0], call, Turn("tool", "12"), CHAT[1])
    assert learnt(tokenizer, part) == 'the({"a": 1})<|tool|>the cat<|user|>'
    [part] = encoded(tokenizer, CHAT[0], call)
    assert learnt(tokenizer, part) == 'the({"a": 1})<|tool|>'


SAYS = {"user": "uvw \n", "system": "xyz ", "assistant": "abc \n"}


@st.composite
def chats(draw: st.DrawFn) -> tuple[Turn, ...]:
    """Turns whose letters tell the roles apart; an answer is never empty."""

    def turn(role: str) -> Turn:
        text = draw(st.text(SAYS[role], min_size=1, max_size=8)) + SAYS[role][0]
        learnt = role != "assistant" or draw(st.booleans())
        return Turn(
            role, text, reasoning=draw(st.sampled_from(["", "ba"])) if role == "assistant" else "", learnt=learnt
        )

    pairs = draw(st.integers(1, 3))
    system = [turn("system")] if draw(st.booleans()) else []
    return (*system, *(turn(role) for _ in range(pairs) for role in ("user", "assistant")))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(turns=chats())
def test_model_sees_before_each_turn_what_a_server_gives_it(name: str, fast: bool, turns: tuple[Turn, ...]) -> None:
    """The expectation is transformers' own rendering of the chat before the turn, encoded as a text of its own."""
    tokenizer = make(TEMPLATES[name], fast=fast)
    template = chat_template_of(tokenizer)
    messages = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.content}] if name == "parts" else turn.content}
        | ({"reasoning_content": turn.reasoning} if turn.reasoning else {})
        for turn in template.fitted(turns)
    ]
    moved = len(turns) - len(messages)
    wanted = [index for index, turn in enumerate(turns) if turn.role == "assistant" and turn.learnt]
    parts = encoded(tokenizer, *turns)
    found: list[tuple[EncodedChat, int, int]] = [(part, *run) for part in parts for run in runs(part)]
    assert len(found) == len(wanted)
    for index, (part, start, end) in zip(wanted, found, strict=True):
        prompt = tokenizer.apply_chat_template(messages[: index - moved], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert part.ids[:start] == ids
        said = tokenizer.decode(part.ids[start:end])
        assert turns[index].content in said
        assert not set(said.split("<|")[0]) & set("uvwxyz")
        assert said.rstrip("\n").endswith("|>")


def test_turns_that_are_shown_otherwise_once_they_are_answered() -> None:
    """The thought before a call is there while the model answers its result, and gone when the answer is (gpt-oss)."""
    tokenizer = make(FORGETS)
    call = Turn("assistant", "", ({"type": "function", "function": {"name": "f", "arguments": {}}},), reasoning="hm")
    [part] = encoded(tokenizer, CHAT[0], call, Turn("tool", "12"), CHAT[1])
    assert learnt(tokenizer, part) == "<think>hm</think>f<|im_end|>the cat<|im_end|>"
    assert tokenizer.decode(part.ids) == (
        "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n<think>hm</think>f<|im_end|><|im_start|>tool\n12<|im_end|>"
        "<|im_start|>assistant\nthe cat<|im_end|>"
    )


def test_system_prompt_that_moves_is_where_the_model_sees_it() -> None:
    tokenizer = make(LAST_SYSTEM)
    texts = [tokenizer.decode(part.ids) for part in encoded(tokenizer, Turn("system", "Be kind"), *CHAT)]
    assert texts == [
        "<|user|>Be kind. Hi<|assistant|> the cat<|im_end|>",
        "<|user|>Hi<|assistant|> the cat<|im_end|><|user|>Be kind. Why?<|assistant|> the dog<|im_end|>",
    ]


def test_ids_of_calls_are_made_where_the_template_wants_nine_letters() -> None:
    tokenizer = make(NINE_LETTERS)
    call = {"id": "call_0123456789", "type": "function", "function": {"name": "f", "arguments": {}}}
    turns = (CHAT[0], Turn("assistant", "", (call, call)), Turn("tool", "1"), Turn("tool", "2"), CHAT[1])
    [part] = encoded(tokenizer, *turns)
    text = tokenizer.decode(part.ids)
    one, two = re.findall(r"f\[(\w{9})\]", text)
    assert one != two
    assert re.findall(r"tool\[(\w{9})\]", text) == [one, two]


def test_weight_takes_a_turn_out() -> None:
    tokenizer = make(CHATML)
    quiet = (CHAT[0], Turn("assistant", "the cat", learnt=False), *CHAT[2:])
    [part] = encoded(tokenizer, *quiet)
    assert learnt(tokenizer, part) == "the dog<|im_end|>\n"
    [fault] = encode_chats(tokenizer, [chat(*quiet)], loss_on="all")
    assert fault == "messages[1]: weight and train are not used with data.loss_on all. Fix: set it to answer."
    out = (*CHAT[:3], Turn("assistant", "the dog", learnt=False))
    assert encode_chats(tokenizer, [chat(*out)], loss_on="last") == [[]]
    with pytest.raises(
        UserError, match=r"x: 1 example \(7\) has no token in the loss: .* not learnt \(weight, train\)"
    ):
        tokenize_all([chat(*out), chat()], tokenizer, name="x", max_length=100, loss_on="last")


def test_turns_behind_the_last_learnt_one_are_left_out() -> None:
    tokenizer = make(CHATML)
    [part], [short] = encoded(tokenizer, *CHAT[:3]), encoded(tokenizer, *CHAT[:2])
    assert part == short


def test_chat_that_the_assistant_begins() -> None:
    tokenizer = make(CHATML)
    [part] = encoded(tokenizer, *CHAT[1:3])
    assert learnt(tokenizer, part) == "the cat<|im_end|>\n"


@pytest.mark.parametrize("body, expected", [(CHATML, "the cat<|im_end|>\n"), (MARKED, "the cat<|im_end|>")])
def test_chat_that_the_assistant_begins_otherwise_than_the_prompt_ends(body: str, expected: str) -> None:
    tokenizer = make(body.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"))
    notes: set[str] = set()
    [part] = encoded(tokenizer, CHAT[1], notes=notes)
    assert learnt(tokenizer, part) == expected
    assert part.ids == tokenizer(f"<|im_start|>assistant\n{expected}", add_special_tokens=False)["input_ids"]
    [note] = notes
    assert "before an answer the chat template writes '<|im_start|>assistant\\n<think>\\n', but answers in the" in note


@pytest.mark.parametrize("fast", [True, False])
def test_tokens_of_a_whole_chat_are_those_of_its_text(fast: bool) -> None:
    tokenizer = make(CHATML, fast=fast)
    [part] = encoded(tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": each.role, "content": each.content} for each in CHAT], tokenize=False
    )
    assert part.ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_whole_chat_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make(CHATML)
    encoded(tokenizer)  # knows the generation prompt now
    given: list[str] = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts, **options: given.extend(texts) or call(self, texts, **options)
    )
    encoded(tokenizer, *CHAT * 5)
    [whole] = given
    assert whole.count("the cat") == 5


# What a template does not take


@pytest.mark.parametrize("name", ["no system", "drops system"])
def test_system_prompt_goes_into_the_first_turn(name: str) -> None:
    tokenizer = make(TEMPLATES[name])
    notes: set[str] = set()
    [part] = encoded(tokenizer, Turn("system", "Be kind."), *CHAT, notes=notes)
    assert tokenizer.decode(part.ids).startswith("<|im_start|>user\nBe kind.\n\nHi<|im_end|>\n")
    assert notes == {"the chat template takes no system prompt: it is put before the first turn of the user."}
    assert prompt_text(tokenizer, (Turn("system", "Be kind."), CHAT[0])).startswith("<|im_start|>user\nBe kind.\n\nHi")
    with pytest.raises(UserError, match="the chat template refuses it: no system"):
        prompt_text(make(NO_SYSTEM), (CHAT[0], Turn("system", "x")))


def test_a_template_that_refuses_a_role() -> None:
    tokenizer = make(NO_SYSTEM)
    refused = [Example("t", str(n), "", "", messages=(CHAT[0], Turn("system", "x"), *CHAT[1:])) for n in range(5)]
    with pytest.raises(UserError) as error:
        tokenize_all(refused, tokenizer, name="chats", max_length=200)
    assert error.value.faults == (
        *(f"chats: example {n}: the chat template refuses it: no system" for n in range(3)),
        "chats: 2 more chats that do not fit the template",
    )


def test_no_chat_template() -> None:
    with pytest.raises(
        UserError, match=r"chats: holds chats, but the tokenizer .* has no chat template. Fix: set model.token"
    ):
        tokenize_all([chat()], tiny_tokenizer.make(chat_template=None), name="chats", max_length=200)


@pytest.mark.parametrize(
    "body, fault",
    [
        ("{{ 1 // (messages | length - 2) }}", "integer division or modulo by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fails_is_one_line(body: str, fault: str) -> None:
    with pytest.raises(UserError, match=rf"^x: example 7: the chat template refuses it: {fault}"):
        tokenize_all([chat(*CHAT[:2])], make(CHATML + body), name="x", max_length=200)
    with pytest.raises(UserError, match=rf"^the chat template refuses it: {fault}"):
        prompt_text(make(CHATML + body), CHAT[:2])


def test_named_templates_without_a_default_one() -> None:
    tokenizer = tiny_tokenizer.make()
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(UserError) as error:
        tokenize_all([chat()], tokenizer, name="x", max_length=200)
    assert error.value.faults == (
        "the tokenizer has chat templates named rag, tool_use, and none named default. Fix: give one with "
        "data.chat_template.",
    )
    assert len(tokenize_all([chat(tools=[{"name": "f"}])], tokenizer, name="x", max_length=200)) == 1


def test_prompt_unlike_the_answers_is_noted_with_what_the_template_reads() -> None:
    tokenizer = make(CHOOSES)
    notes: set[str] = set()
    [part] = encoded(tokenizer, notes=notes)
    assert (learnt(tokenizer, part), notes) == ("the cat<|im_end|>\nthe dog<|im_end|>\n", set())
    set_chat_settings(tokenizer, template_kwargs={"thinking": True})
    [part] = encoded(tokenizer, notes=notes)
    assert learnt(tokenizer, part) == "the cat<|im_end|>\nthe dog<|im_end|>\n"
    [note] = notes
    assert "before an answer the chat template writes '<|im_start|>assistant\\n<think>\\n', but answers in the" in note
    assert "set data.template_kwargs (it reads thinking)" in note


@pytest.mark.parametrize("answer", ["<b>bold</b>", "<th", "<thin air"])
def test_an_answer_that_begins_like_the_prompt_goes_on_is_learnt_whole(answer: str) -> None:
    """The prompt opens a thought that the template does not print with the answer."""
    tokenizer = make(CHOOSES)
    set_chat_settings(tokenizer, template_kwargs={"thinking": True})
    [part] = encoded(tokenizer, CHAT[0], Turn("assistant", answer))
    assert learnt(tokenizer, part) == f"{answer}<|im_end|>\n"
    call = {"type": "function", "function": {"name": "think", "arguments": {}}}
    calls = "{% for c in m.tool_calls %}<{{ c.function.name }}{% endfor %}"
    tokenizer = make(CHOOSES.replace("<|im_end|>", f"{calls}<|im_end|>"))
    set_chat_settings(tokenizer, template_kwargs={"thinking": True})
    [part] = encoded(tokenizer, CHAT[0], Turn("assistant", "", (call,)))
    assert learnt(tokenizer, part) == "<think<|im_end|>\n"


def test_what_the_template_leaves_out_is_noted() -> None:
    call = Turn("assistant", "", ({"type": "function", "function": {"name": "f", "arguments": {}}},), reasoning="hm")
    notes: set[str] = set()
    tools = [{"name": "f", "description": "d"}]
    example = chat(CHAT[0], call, Turn("tool", "12"), CHAT[1], tools=tools)
    encode_chats(make(CHATML), [example], notes=notes)
    assert sorted(note.partition(". Fix")[0] for note in notes) == [
        f"the chat template does not print {what}" for what in ("reasoning_content", "tool_calls", "tools")
    ]
    notes.clear()
    encode_chats(make(CHATML), [chat()], notes=notes)
    assert not notes


def call_of(name: str, **id: str) -> dict[str, Any]:
    return {"type": "function", **id, "function": {"name": name, "arguments": {}}}


FIRST_ONLY = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}<|im_end|>\n{% endif %}{% endfor %}" + PROMPT
)
"""As gpt-oss's: the first system turn, and the first call of a turn."""


@pytest.mark.parametrize(
    "turns, lost",
    [
        ((Turn("system", "a"), Turn("user", "b"), Turn("assistant", "", (call_of("f"),)), Turn("tool", "c")), []),
        (
            (Turn("user", "b"), Turn("assistant", "", (call_of("f"), call_of("g"))), Turn("tool", "c"), CHAT[1]),
            ["the tool_calls of a turn but the first"],
        ),
        ((Turn("system", "a"), Turn("system", "d"), *CHAT[:2]), ["a second system turn"]),
        ((Turn("system", "a"), *CHAT[:2], Turn("system", "d"), *CHAT[:2]), ["system turns after other turns"]),
    ],
)
def test_turns_and_calls_after_the_first_that_are_left_out_are_noted(turns: tuple[Turn, ...], lost: list[str]) -> None:
    notes: set[str] = set()
    encode_chats(make(FIRST_ONLY), [chat(*turns)], notes=notes)
    assert sorted(note.partition(". Fix")[0] for note in notes) == [
        f"the chat template does not print {what}" for what in lost
    ]
    notes.clear()
    everything = FIRST_ONLY.replace(" or loop.first", " or true").replace(
        "m.tool_calls[0].function.name", "m.tool_calls | map(attribute='function') | map(attribute='name') | join(' ')"
    )
    encode_chats(make(everything), [chat(*turns)], notes=notes)
    assert not notes


SHORT_IDS = (
    "{% for m in messages %}{{ m.role }}{% for c in m.tool_calls or [] %}"
    "{% if c.id is not defined or c.id|length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "[{{ c.function.name }} {{ c.id }}]{% endfor %}"
    "{% if m.role == 'tool' %}{% if m.tool_call_id is not defined or m.tool_call_id|length != 9 %}"
    "{{ raise_exception('nine') }}{% endif %}[{{ m.content }} {{ m.tool_call_id }}]"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
"""As Mistral's: it wants ids of nine letters."""


@pytest.mark.parametrize("named", ["b", "none", "b and a", "unknown"])
def test_a_result_gets_the_short_id_of_its_own_call(named: str) -> None:
    """The result of call b comes first; without its id it is taken for that of the first call."""
    ids = {"none": ({}, {}), "unknown": ({"tool_call_id": "x"}, {})}.get(named, ({"tool_call_id": "call-b"}, {}))
    if named == "b and a":
        ids = (ids[0], {"tool_call_id": "call-a"})
    results = [Turn("tool", f"r{n}", labels=each) for n, each in enumerate(ids)]
    calls = Turn("assistant", "", (call_of("f", id="call-a"), call_of("g", id="call-b")))
    tokenizer = make(SHORT_IDS)
    part = encoded(tokenizer, CHAT[0], calls, *results, CHAT[1])[-1]
    text = str(tokenizer.decode(part.ids))
    of_call = dict(re.findall(r"\[([fg]) (\w{9})\]", text))
    of_result = dict(re.findall(r"\[(r\d) (\w{9})\]", text))
    first, second = ("g", "f") if named.startswith("b") else ("f", "g")
    assert of_result == {"r0": of_call[first], "r1": of_call[second]}
    assert of_call["f"] != of_call["g"]


def test_content_that_the_template_leaves_out_is_noted() -> None:
    call = ({"type": "function", "function": {"name": "f", "arguments": {}}},)
    one_of_both = (
        LOOP
        + (
            "<|im_start|>{{ m.role }}\n{% if m.tool_calls %}call {{ m.tool_calls[0].function.name }}"
            "{% else %}{{ m.content.split('</think>')[-1].strip() }}{% endif %}<|im_end|>\n{% endfor %}"
        )
        + PROMPT
    )
    tokenizer = make(one_of_both)
    for turn, what in (
        (Turn("assistant", "the cat", call), "text beside calls of tools"),
        (
            Turn("assistant", "<think>\nHm. So:\n</think>\n\nthe cat"),
            "reasoning that is in the content, before </think>",
        ),
        (Turn("assistant", " a \n  dog\n"), None),
        (Turn("assistant", "", call), None),
    ):
        notes: set[str] = set()
        [part] = encoded(tokenizer, CHAT[0], turn, notes=notes)
        assert learnt(tokenizer, part).startswith("call f" if turn.tool_calls else ("the cat", "a \n  dog"))
        assert [note.partition(". Fix")[0] for note in notes if "reasoning_content" not in note] == (
            []
            if what is None
            else [f"the chat template leaves out or changes {what}: the model does not learn it as it is"]
        )
    notes = set()
    encoded(make(CHATML.replace("m['content']", "m['content'].split()[0]")), *CHAT[:2], notes=notes)
    assert any("leaves out or changes the content of an answer" in note for note in notes)


def test_a_turn_of_which_the_template_prints_nothing_is_not_learnt() -> None:
    call = Turn("assistant", "", ({"type": "function", "function": {"name": "f", "arguments": {}}},))
    tokenizer = make(CHATML)
    [part] = encoded(tokenizer, CHAT[0], call, Turn("tool", "12"), CHAT[1])
    assert learnt(tokenizer, part) == "the cat<|im_end|>\n"
    assert encoded(tokenizer, CHAT[0], call) == []
    [silent] = encoded(tokenizer, CHAT[0], Turn("assistant", ""))
    assert learnt(tokenizer, silent) == "<|im_end|>\n"
    tokenizer.add_tokens(["<yes>"])
    [part] = encoded(tokenizer, CHAT[0], Turn("assistant", "<yes>"), CHAT[2], CHAT[3])
    assert learnt(tokenizer, part) == "<yes><|im_end|>\nthe dog<|im_end|>\n"  # an answer that is one added token


def test_an_answer_to_results_of_tools_does_not_begin_where_an_earlier_one_does() -> None:
    """The header of answers to results is printed for answers alone: before a second call there is another one."""
    template = (
        "{% set ns = namespace(open=false) %}" + LOOP + "{% if m.role == 'tool' %}<|tool|>{{ m.content }}"
        "{% set ns.open = true %}{% elif m.role == 'user' %}{% set ns.open = false %}<|user|>{{ m.content }}"
        "{% elif m.tool_calls %}{{ '\n' if ns.open else '<|assistant|>' }}{% set ns.open = false %}"
        "call {{ m.tool_calls[0].function.name }}<|eos|>"
        "{% else %}{{ '<|return|>' if ns.open else '<|assistant|>' }}{% set ns.open = false %}{{ m.content }}<|eos|>"
        "{% endif %}{% endfor %}"
        "{% if ns.open %}<|return|>{% elif add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = Turn("assistant", "", ({"type": "function", "function": {"name": "f", "arguments": {}}},))
    rounds = [CHAT[0], call, Turn("tool", "12"), CHAT[1], CHAT[2], call, Turn("tool", "34"), call, Turn("tool", "5")]
    tokenizer = make(template)
    [part] = encoded(tokenizer, *rounds, CHAT[3])
    said = ["call f<|eos|>", "the cat<|eos|>", "call f<|eos|>", "\ncall f<|eos|>", "the dog<|eos|>"]
    assert learnt(tokenizer, part) == "".join(said)
    assert len(runs(part)) == len(said)


def test_end_mark_that_does_not_stop_the_model_is_noted() -> None:
    tokenizer = make(CHATML)
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|eos|>"])
    for stops, is_noted in ((None, False), ({end}, False), ({end, other}, False), ({other}, True)):
        notes: set[str] = set()
        set_chat_settings(tokenizer, stop_ids=stops and frozenset(stops))
        encoded(tokenizer, notes=notes)
        assert bool(notes) == is_noted
    assert f"a turn ends with '<|im_end|>' ({end}), which is not among the model's stop tokens ({other})" in notes.pop()
    found = tokenize_all([chat()], tokenizer, name="x", max_length=100)
    assert [note for note in found.notes if "the model may not stop" in note]


def test_arguments_are_objects_unless_the_template_joins_texts() -> None:
    calls = "{% for c in m.tool_calls %}{{ ARGUMENTS }}{% endfor %}"
    turns = (
        CHAT[0],
        Turn("assistant", "", ({"type": "function", "function": {"name": "f", "arguments": {"a": "é"}}},)),
    )
    for form in ("c.function.arguments | tojson", "'' + c.function.arguments"):
        tokenizer = make(
            CHATML.replace("<|im_end|>\n{% endfor", calls.replace("ARGUMENTS", form) + "<|im_end|>\n{% endfor")
        )
        [part] = encoded(tokenizer, *turns)
        assert learnt(tokenizer, part) == '{"a": "é"}<|im_end|>\n'


# Settings

DATED = (
    "  {%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}\nToday: {{ date_string }} {{ strftime_now('%-d/%m %A %Y-%m-%d 100%%') }}\n"
)
"""As in Llama 3.2, behind white space that a template drops."""


@pytest.mark.parametrize("body", [CHATML, MARKED])
def test_a_template_prints_the_date_that_was_set(body: str) -> None:
    turns = [{"role": "user", "content": "Hi"}]
    tokenizer = make(DATED + body)
    theirs = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt_text(tokenizer, CHAT[:1]) == theirs  # today
    set_chat_date(tokenizer, "2024-02-01")
    text = prompt_text(tokenizer, CHAT[:1])
    assert text.startswith("Today: 01 Feb 2024 1/02 Thursday 2024-02-01 100%\n<|im_start|>user\nHi<|im_end|>")
    [part] = encoded(tokenizer)
    assert tokenizer.decode(part.ids).startswith("Today: 01 Feb 2024 ")
    assert learnt(tokenizer, part).replace("\n", "") == "the cat<|im_end|>the dog<|im_end|>"
    set_chat_date(tokenizer, date.today().isoformat())
    assert prompt_text(tokenizer, CHAT[:1]) == theirs
    assert "qdora" not in tokenizer.chat_template


def data(**options: Any) -> DataConfig:
    return DataConfig.model_validate({"mix": [{"source": "x.jsonl"}]} | options)


def test_template_kwargs_reach_the_template_or_are_refused() -> None:
    tokenizer = make(CHOOSES)
    assert template_options(CHOOSES) == ["thinking"]
    use_data_settings(tokenizer, data(template_kwargs={"thinking": True}))
    assert prompt_text(tokenizer, CHAT[:1]).endswith("<|im_start|>assistant\n<think>\n")
    for given_kwargs, fault in (
        ({"thinkin": True}, "does not read 'thinkin', it reads thinking. Did you mean 'thinking'?"),
        ({"messages": []}, "does not read 'messages', it reads thinking."),
    ):
        with pytest.raises(UserError, match=fault.replace("?", r"\?")):
            use_data_settings(make(CHOOSES), data(template_kwargs=given_kwargs))
    with pytest.raises(UserError, match=r"data.template_kwargs: the tokenizer has no chat template"):
        use_data_settings(tiny_tokenizer.make(chat_template=None), data(template_kwargs={"a": 1}))


def test_template_from_a_file(tmp_path: Any) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(MARKED, encoding="utf-8-sig")  # as some editors on Windows do
    tokenizer = tiny_tokenizer.make(chat_template=None)
    use_data_settings(tokenizer, data(chat_template=str(file)))
    assert tokenizer.chat_template == MARKED
    file.write_text("{% if %}")
    with pytest.raises(UserError, match=r"data.chat_template: .*mine.jinja: line 1: "):
        use_data_settings(tokenizer, data(chat_template=str(file)))
    with pytest.raises(UserError, match=r"data.chat_template: .*nowhere.jinja: cannot be read"):
        use_data_settings(tokenizer, data(chat_template=str(tmp_path / "nowhere.jinja")))
