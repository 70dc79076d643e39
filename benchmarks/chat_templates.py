"""What chats teach through the chat templates of a directory, compared with variants that mark what is generated.

DATA holds `<name>.jinja` and, where there is one, `<name>_training.jinja`, whose `{% generation %}` marks say what
the assistant writes. Every template renders 24 chats. Each word says whose it is, and the tokenizer has a token for
each byte and for each mark of the template, so that texts are equal where tokens are. Of every turn that is learnt it
is counted

- whether its answer and an end mark are learnt, and nothing that anyone else said;
- whether its tokens follow those that transformers makes of the chat before it, with the generation prompt;
- whether the tokens are those of the marked variant, without what the generation prompt gives.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from byte_tokenizer import byte_tokenizer
from frame import bench, main, table, tabulated

from qdora.data.chats import encode_chats
from qdora.data.example import Example
from qdora.data.formats import parse_messages, parse_tools

TURNS = (1, 2, 5)
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_MARKS = re.compile(
    r"<\|[^\s<>|'\"{}]+\|>|<｜[^\s<>｜'\"{}]+｜>|</?(?:s|sop|bos|eos|think|start_of_\w+|end_of_\w+|tool_\w+)>"
    r"|\[/?[A-Z_]{2,}\]|\[gMASK\]"
)
"""The spellings of special tokens."""
PARAMETERS = {"type": "object", "properties": {"place": {"type": "string", "description": "toolplace"}}}
TOOL = {"type": "function", "function": {"name": "tooltool", "description": "toolfacts", "parameters": PARAMETERS}}
FUNCTION = {"name": "tooltool", "arguments": {"place": "argword"}}
Chat = list[dict[str, Any]]


def chat_of(turns: int, *, system: bool = False, tools: bool = False, reasoning: bool = False) -> Chat:
    """The words of the user are u..., those of the system s..., of the tool r..., of the assistant a... and t..."""

    def said(message: dict[str, Any], name: str) -> dict[str, Any]:
        thought = {"reasoning_content": f"thoughtword{name}"} if reasoning else {}
        return {"role": "assistant", **message, **thought}

    found: Chat = [{"role": "system", "content": "sysword"}] if system else []
    for number in range(turns):
        found.append({"role": "user", "content": f"userword{number}"})
        if tools and number == 0:
            call = {"id": "callcall1", "type": "function", "function": FUNCTION}
            found.append(said({"content": "", "tool_calls": [call]}, "first"))
            found.append({"role": "tool", "tool_call_id": "callcall1", "content": "resultword"})
        found.append(said({"content": f"answerword{number}"}, str(number)))
    return found


def tokenizer_of(*templates: str) -> Any:
    """A token for each byte and for each mark in the templates; the first is the tokenizer's own."""
    tokenizer = byte_tokenizer()
    marks = sorted({mark for text in templates for mark in _MARKS.findall(text)} | {"<begin>"})
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.bos_token, tokenizer.chat_template = "<begin>", templates[0]
    return tokenizer


def in_forms(messages: Chat) -> list[Chat]:
    """The chat with plain texts, with lists of parts, with the arguments of calls as JSON text, and with the system
    prompt in the first turn of the user."""

    def parts(message: dict[str, Any]) -> dict[str, Any]:
        return message | {"content": [{"type": "text", "text": message["content"]}]}

    def texts(message: dict[str, Any]) -> dict[str, Any]:
        calls = json.loads(json.dumps(message.get("tool_calls", [])))
        for call in calls:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        return message | ({"tool_calls": calls} if calls else {})

    folded = messages
    if messages[0]["role"] == "system":
        folded = [messages[1] | {"content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]
    return [messages, [parts(each) for each in messages], [texts(each) for each in messages], folded]


def served(tokenizer: Any, messages: Chat, tools: Any, form: int, **options: Any) -> Any:
    """transformers' own rendering in one form."""
    chat = in_forms(messages)[form]
    return tokenizer.apply_chat_template(chat, tools=tools, **{"tokenize": False} | options)


def form_of(tokenizer: Any, messages: Chat, tools: Any) -> int | str:
    """The first form in which the template prints the last answer, or why it takes none."""
    reasons = []
    for form in range(4):
        try:
            if messages[-1]["content"] in served(tokenizer, messages, tools, form):
                return form
        except (jinja2.TemplateError, TypeError) as error:
            reasons.append(str(error))
    return reasons[0] if reasons else "prints no answer"


def runs(mask: Sequence[int | bool]) -> list[tuple[int, int]]:
    """(start, end) of each run of learnt tokens."""
    found, place = [], 0
    for learnt, group in itertools.groupby(map(bool, mask)):
        length = len(list(group))
        if learnt:
            found.append((place, place + length))
        place += length
    return found


def marked_turns(tokenizer: Any, messages: Chat, tools: Any, form: int) -> list[set[str]]:
    """What the marked variant says that each turn writes, without what its generation prompt gives: in the whole chat,
    and at the end of the chat up to it, where some templates write another end mark."""

    def turn(whole: Chat, index: int) -> str:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = served(tokenizer, whole, tools, form, **options)
        number = sum(each["role"] == "assistant" for each in messages[:index])
        before = served(tokenizer, messages[:index], tools, form, add_generation_prompt=True)
        spans = runs(found["assistant_masks"])
        start, end = spans[number][0], spans[number][1] if number + 1 < len(spans) else len(found["input_ids"])
        prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
        pairs = zip(prompt, found["input_ids"], strict=False)
        given = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        header = before.removeprefix(served(tokenizer, messages[:index], tools, form))
        return str(tokenizer.decode(found["input_ids"][max(start, given) : end])).removeprefix(header)

    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [{turn(messages, index), turn(messages[: index + 1], index)} for index in said]


def counted(tokenizer: Any, variant: Any, messages: Chat, counts: Counter[str]) -> str | None:
    """Count the turns of a chat that pass each check; or why the template does not take the chat."""
    tools = [TOOL] if any("tool_calls" in message for message in messages) else None
    example = Example("t", "0", "", "", messages=parse_messages(messages), tools=parse_tools(tools))
    [found] = encode_chats(tokenizer, [example])
    form = form_of(tokenizer, messages, tools)
    if isinstance(found, str) or isinstance(form, str):
        assert isinstance(found, str) == isinstance(form, str), (found, form)
        return str(form)
    said = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [(part.ids, start, end) for part in found for start, end in runs(part.mask)]
    counts["texts"] += len(found)
    marked: dict[int, set[str]] = {}
    if variant is not None:
        theirs = form_of(variant, messages, tools)
        assert isinstance(theirs, int), theirs
        marked = dict(zip(said, marked_turns(variant, messages, tools, theirs), strict=True))
    if len(turns) < len(said):  # a call that the template does not print is no turn
        said = [index for index in said if messages[index]["content"]]
    counts["turns"] += len(said)
    marks = tuple(tokenizer.get_added_vocab())
    for index, (ids, start, end) in zip(said, turns, strict=True):
        text = tokenizer.decode(ids[start:end])
        shown = served(tokenizer, messages[:index], tools, form, add_generation_prompt=True)
        prompt = tokenizer(shown, add_special_tokens=False)["input_ids"]
        printed = messages[index]["content"] in text and text.rstrip().endswith(marks)
        counts["answer_and_end"] += printed
        counts["others"] += any(word in text for word in ("sysword", "userword", "resultword"))
        counts["served"] += start <= len(prompt) and ids[: len(prompt)] == prompt
        if marked:
            counts["marked"] += 1
            counts["as_marked"] += text in marked[index]
    return None


def measure(template: Path) -> dict[str, Any]:
    beside = template.with_name(f"{template.stem}_training.jinja")
    texts = [each.read_text(encoding="utf-8") for each in (template, beside) if each.exists()]
    tokenizer, variant = tokenizer_of(*texts), tokenizer_of(*texts[::-1]) if len(texts) > 1 else None
    counts: Counter[str] = Counter()
    options = itertools.product(TURNS, *3 * [(False, True)])
    chats = [chat_of(turns, system=system, tools=tools, reasoning=thinks) for turns, system, tools, thinks in options]
    refusals = [reason for chat in chats if (reason := counted(tokenizer, variant, chat, counts)) is not None]
    names = ("texts", "turns", "answer_and_end", "others", "served", "marked", "as_marked")
    found = {"chats": len(chats), "refused": dict(Counter(refusals))}
    return found | {name: counts[name] for name in names}


@bench()
def chat_templates(data: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "chatml.jinja").write_text(CHATML)
        files = sorted((data or Path(folder)).glob("*.jinja"))
        found = {file.stem: measure(file) for file in files if not file.stem.endswith("_training")}
    return {"turns": list(TURNS), "templates": found}


@table("chat_templates")
def chat_templates_table(result: Any) -> str:
    def marked(row: Any) -> str:
        return f"{row[1]['as_marked']} of {row[1]['marked']}" if row[1]["marked"] else "no variant"

    columns = {
        "template": "{0}",
        "chats": "{1[chats]}",
        "refused by it": lambda row: f"{sum(row[1]['refused'].values())}",
        "examples": "{1[texts]}",
        "turns": "{1[turns]}",
        "answer and end mark learnt": "{1[answer_and_end]}",
        "words of others learnt": "{1[others]}",
        "as a server shows it": "{1[served]}",
        "learnt as in the marked variant": marked,
    }
    reasons = sorted({reason for found in result["templates"].values() for reason in found["refused"]})
    return tabulated(result["templates"].items(), columns) + f"\nReason of refusals: {'; '.join(reasons)}\n"


if __name__ == "__main__":
    main()
