"""A chat model made end to end: trained on 400 made-up conversations with tools, then asked 50 times.

    python benchmarks/chat_model.py [--smoke]

SmolLM2-135M-Instruct learns to call one of three tools for a question, to report the result in one fixed form, and to
answer small talk in one fixed form. The 50 conversations that it is asked (`qdora generate --chats`) have names and
numbers that are not in the training data. Counted for the model before and after training: answers in the trained
form with the right content, and answers that stop by themselves. The chat template, which prints tools and calls, is
given by `data.chat_template`. All steps are commands of the command line, as a user gives them.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from byte_tokenizer import write_model
from measure import facts, parser_of, printed, write

from qdora.files.run_directory import RunDirectory

TEMPLATE = """\
{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.' }}
{%- else %}{{ '<|im_start|>system\\n' + messages[0].content }}{% endif %}
{%- if tools %}{{ '\\n\\nFunctions:' }}{% for tool in tools %}{{ '\\n' + tool.function.name + '(' }}
{%- for name in tool.function.parameters.properties %}{{ name + (', ' if not loop.last else '') }}{% endfor %}
{{- '): ' + tool.function.description }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}
{%- for message in messages if message.role != 'system' %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' }}
{{- call.function.arguments | tojson }}{{ '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Rome", "Quito", "Dakar", "Tokyo", "Seoul", "Delhi", "Berne", "Turin")
NEW_CITIES = ("Madrid", "Porto", "Minsk", "Kyoto", "Bergen", "Nairobi")
ITEMS = ("lamp", "chair", "kettle", "scarf", "clock", "mirror", "pillow", "ladder", "basket", "candle", "vase", "rug")
NEW_ITEMS = ("umbrella", "mattress", "suitcase", "wallet", "backpack", "toaster")
TOPICS = ("cooking", "gardening", "music", "chess", "history", "sailing", "painting", "cycling", "poetry", "baking")
NEW_TOPICS = ("skiing", "pottery", "fishing", "drawing")
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy")


def function(name: str, description: str, *parameters: str) -> dict[str, Any]:
    """A tool of texts."""
    properties = {parameter: {"type": "string"} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS = [
    function("weather", "the weather in a city", "city"),
    function("stock", "how many of an item are in the shop", "item"),
    function("convert", "an amount of euros in dollars", "euros"),
]

Turns = list[dict[str, Any]]


def called(name: str, **arguments: str) -> dict[str, Any]:
    """A turn of the assistant that calls a tool."""
    return {"role": "assistant", "content": "", "tool_calls": [{"name": name, "arguments": arguments}]}


def exchange(draw: random.Random, kind: str, *, new: bool) -> Turns:
    """A question and what follows it to the final answer: two turns for small talk, four with a tool."""
    if kind == "weather":
        city, sky = draw.choice(NEW_CITIES if new else CITIES), draw.choice(SKIES)
        degrees = draw.randint(31, 39) if new else draw.randint(1, 30)
        forms = ("What is the weather in {}?", "How is the weather in {} today?", "Tell me the weather in {}.")
        question, call = draw.choice(forms).format(city), called("weather", city=city)
        result, answer = f"{sky}, {degrees} degrees", f"Report: it is {sky} in {city}, {degrees} degrees. Over."
    elif kind == "stock":
        item = draw.choice(NEW_ITEMS if new else ITEMS)
        count = draw.randint(61, 89) if new else draw.randint(2, 60)
        forms = ("How many of the {} do you have?", "Is the {} in stock?", "Do you still have the {}?")
        question, call = draw.choice(forms).format(item), called("stock", item=item)
        result, answer = f"{count}", f"Report: {count} of the {item} in stock. Over."
    elif kind == "convert":
        euros = draw.randint(501, 899) if new else draw.randint(2, 500)
        dollars = euros + draw.randint(1, 90)
        forms = ("How many dollars are {} euros?", "Convert {} euros to dollars.", "What are {} euros in dollars?")
        question, call = draw.choice(forms).format(euros), called("convert", euros=str(euros))
        result, answer = f"{dollars}", f"Report: {euros} euros are {dollars} dollars. Over."
    else:
        topic = draw.choice(NEW_TOPICS if new else TOPICS)
        question = draw.choice(("I like {}.", "My hobby is {}.", "Do you like {}?")).format(topic)
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"Ahoy! We like {topic}. Over."},
        ]
    user, tool = {"role": "user", "content": question}, {"role": "tool", "content": result}
    return [user, call, tool, {"role": "assistant", "content": answer}]


EPOCHS = 1
KINDS = ("weather", "stock", "convert", "talk")


def conversations(num: int, seed: int) -> Iterator[dict[str, Any]]:
    """Training rows: two or three exchanges each."""
    draw = random.Random(seed)
    for _ in range(num):
        kinds = [draw.choice(KINDS) for _ in range(draw.randint(2, 3))]
        yield {"tools": TOOLS, "messages": [turn for kind in kinds for turn in exchange(draw, kind, new=False)]}


def questions(num: int, seed: int) -> Iterator[tuple[dict[str, Any], str]]:
    """(conversation to answer, the trained answer): a call, a report or small talk, each behind one other exchange."""
    draw = random.Random(seed)
    for number in range(num):
        kind = KINDS[number % len(KINDS)]
        turns = exchange(draw, kind, new=True)
        # In turn, the answer to the question and the answer to the tool's result.
        stop = 3 if len(turns) == 4 and number // len(KINDS) % 2 else 1
        before = exchange(draw, draw.choice(KINDS), new=False)
        yield {"tools": TOOLS, "messages": before + turns[:stop]}, as_printed(turns[stop])


def as_printed(turn: dict[str, Any]) -> str:
    """The turn as the template prints it."""
    calls = [f"<call>{call['name']} {json.dumps(call['arguments'])}</call>" for call in turn.get("tool_calls", ())]
    return str(turn["content"]) + "".join(calls)


def in_manner(answer: str, trained: str) -> bool:
    """Whether an answer has the form of the trained one, whatever names and numbers it gives."""
    if trained.startswith("<call>"):
        return answer.startswith("<call>") and answer.endswith("</call>")
    return answer.startswith(trained.split()[0]) and answer.endswith("Over.")


def main() -> None:
    """Write the data, train, ask."""
    args = parser_of(__doc__, "chat_model", smoke="a random model").parse_args()
    num_chats, num_questions, num_new = (8, 4, 4) if args.smoke else (400, 50, 48)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = write_model(root / "model") if args.smoke else "builtin"
        asked = list(questions(num_questions, seed=1))
        write_rows(root / "chats.jsonl", conversations(num_chats, seed=0))
        write_rows(root / "validation.jsonl", conversations(max(4, num_chats // 10), seed=2))
        write_rows(root / "questions.jsonl", (row for row, _ in asked))
        (root / "template.jinja").write_text(TEMPLATE)
        made = recipe(source, 2048 if args.smoke else 512)  # a token is a byte in a smoke test
        (root / "recipe.yaml").write_text(json.dumps(made))  # JSON is YAML
        qdora("train", str(root / "recipe.yaml"), "--run-dir", str(root / "run"))
        arms = {}
        for arm, more in (("base", ["--base"]), ("trained", [])):
            call = ["generate", str(root / "run"), "--chats", str(root / "questions.jsonl"), *more]
            found = json.loads(qdora(*call, "--max-new-tokens", str(num_new), "--json"))
            arms[arm] = counts(found["answers"], [trained for _, trained in asked])
        num_steps = RunDirectory(root / "run").last_step()
    result = facts("python benchmarks/chat_model.py") | {
        "num_chats": num_chats,
        "num_questions": num_questions,
        "epochs": EPOCHS,
        "num_steps": num_steps,
        "max_new_tokens": num_new,
        "arms": arms,
    }
    write(args.out, result)


def recipe(source: str, max_length: int) -> dict[str, Any]:
    """What a user would write; paths are relative to the recipe."""
    chats = {"source": "chats.jsonl", "validation": "validation.jsonl", "format": "messages"}
    return {
        "model": {"source": source},
        "adapter": {"kind": "dora", "rank": 16, "alpha": 32},
        "data": {"mix": [chats], "max_length": max_length, "chat_template": "template.jinja"},
        "train": {"epochs": EPOCHS, "batch": 8, "lr": 1e-3, "schedule": "cosine", "warmup": 0.1, "optimizer": "adamw"},
    }


def write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def qdora(*arguments: str) -> str:
    """Standard output of a command. Raises RuntimeError if it fails, with what it said."""
    return printed("-m", "qdora.cli", "--quiet", *arguments)


def counts(answers: list[dict[str, Any]], trained: list[str]) -> dict[str, Any]:
    """How many of the answers do what, and the first ones to read."""

    pairs = list(zip(answers, trained, strict=True))

    def num(holds: Callable[[str, str], bool]) -> int:
        return sum(holds(answer["text"].strip(), wanted) for answer, wanted in pairs)

    return {
        "stopped": sum(answer["stopped"] == "end" for answer in answers),
        "in_manner": num(in_manner),
        "equal": num(str.__eq__),
        "examples": [{"trained": wanted, "answer": answer["text"]} for answer, wanted in pairs[:8]],
    }


if __name__ == "__main__":
    main()
