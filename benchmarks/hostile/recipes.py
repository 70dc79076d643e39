"""Mutated recipes: values, keys, the traps of YAML, bytes. Read as `qdora validate` and `qdora plan` read them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from hostile.damage import parent_of, paths_of
from hostile.judge import Case, Judged
from hostile.material import Material
from qdora.errors import UserError
from qdora.files.atomic import json_text
from qdora.plan.plan_view import plan_run
from qdora.recipe.recipe_file import (
    load_recipe,
    missing_files,
    read_yaml,
    recipe_from,
    recipe_names,
    recipe_text,
    resolved_yaml,
    settings,
)
from qdora.recipe.settings import Recipe

PART = "recipes"
QUIET = Console(quiet=True)
NAME = "recipe.yaml"

# Written as YAML source, so that tags and odd spellings reach the parser.
HOSTILE_VALUES = [
    "null", "true", "no", "''", "' '", "[]", "{}", "[[]]", "[null]", "{a: {b: [1]}}", "-1", "0", "1", "-0.0", "1e-320",
    "1000000000000000000", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 500, "9" * 5000,
    "1e308", "-1e308", "1e999", ".nan", ".inf", "-.inf", "nan", "inf", "1e-4", "0x7fffffff", "017", "1_000", "12:30:45",
    "2024-01-01", "2024-13-45", "2001-12-14t21:59:43.10-05:00", "١٢٣", "０．５", "½",
    '"\\0"', '"a\\0b"', '"\\ud800"', '"\\u202e gnp.exe"', '"\\u200b"', '"\\r\\n"', '"\\x1b[31mred\\x1b[0m"', "é" * 3000,
    "a" * 300, "/" * 5000, "../../../../etc/passwd", "../canary/secret.json", "/dev/zero", "/dev/null",
    "/proc/self/mem",
    "~", "~nobody_at_all/x", "~/../..", ".", "..", "/", "file:///etc/passwd", "https://example.org/x.jsonl",
    "!!python/object/apply:os.system [touch ../escaped]", "!!python/name:os.system", "!!int abc", "!!float x",
    "!!binary aGVsbG8=", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp x", "!unknown 3", "!!null 5",
    "!!bool maybe", "!!str 7", "*nowhere", "<<: 3", "{<<: [1]}", "&a [*a]", "{&k a: *k}", "? [a, b]", "%x", "@x", "`x",
]  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A mutated recipe: its bytes, the `-s` overrides, and whether its meaning is that of the unmutated one."""

    what: str
    content: bytes
    same: bool = False
    overrides: tuple[str, ...] = ()


def cases(seed: int, count: int, material: Material) -> Iterator[Case]:
    """`count` seeded cases. Half of them change a recipe that can be planned here, the others a shipped one."""
    shipped = {name: recipe_text(name) for name in recipe_names()}
    # Warm: the first plan of a process takes seconds, which each fork would pay again.
    plan_run(recipe_from(read_yaml(own_recipe(material), "own")), "own", device_kind="cpu", console=QUIET)
    for number in range(count):
        rng = random.Random(f"{PART} {seed} {number}")
        own = rng.random() < 0.5
        name = "own" if own else rng.choice(sorted(shipped))
        text = own_recipe(material) if own else shipped[name]
        written = rng.choice(_OPERATORS)(rng, text)
        yield Case(
            part=PART,
            number=number,
            what=f"{name}: {written.what}",
            write=partial(_write, written, text),
            read=partial(_read, written, own),
            judge=_judge,
            may_refuse=not written.same,
            may_read_outside=True,
        )


def own_recipe(material: Material) -> str:
    """A recipe on the tiny model that gives nearly every section, so that every key can be hit."""
    document = {
        "model": {"source": str(material.model), "dtype": "float32", "attention": "sdpa"},
        "base": {"quant": "nf4", "block_size": 64, "double_quant": True, "skip": ["lm_head"], "residency": "device"},
        "adapter": {"kind": "dora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": "all-linear"},
        "data": {
            "mix": [
                {"source": str(material.sums), "limit": 20, "name": "sums"},
                {"source": str(material.letters), "validation": str(material.held_out)},
            ],
            "strategy": "temperature",
            "temperature": 2.0,
            "max_length": 96,
            "too_long": "truncate",
            "seed": 3,
        },
        "train": {"steps": 6, "batch": 4, "lr": 1e-3, "schedule": "cosine", "warmup": 0.3, "optimizer": "adamw"},
        "eval": {"limit": 4, "at_end": True},
        "memory": {"checkpointing": True},
        "trackers": [],
    }
    return yaml.safe_dump(document, sort_keys=False)


def _write(written: Written, text: str, folder: Path) -> int:
    (folder / NAME).write_bytes(written.content)
    (folder / "unmutated.yaml").write_text(text, encoding="utf-8")
    return len(written.content)


def _read(written: Written, plans: bool, folder: Path) -> Any:
    """What `qdora validate --json` prints; a second reading of what it prints without; then `qdora plan`."""
    recipe = load_recipe(NAME, written.overrides)
    # A Hub id is not looked up; of paths only their existence is.
    faults = missing_files(recipe, NAME) if plans else []
    if faults:
        raise UserError(*faults)
    found = json.loads(json_text(settings(recipe)))
    (folder / "again.yaml").write_text(resolved_yaml(recipe), encoding="utf-8")
    again = json.loads(json_text(settings(load_recipe("again.yaml"))))
    if plans:
        json_text(plan_run(recipe, NAME, device_kind="cpu", console=QUIET))
    expected = json.loads(json_text(settings(load_recipe("unmutated.yaml")))) if written.same else None
    return {"settings": found, "again": again, "expected": expected}


def _judge(value: Any) -> Judged:
    found, expected = value["settings"], value["expected"]
    if value["again"] != found:
        return "fault", f"the resolved recipe reads back as another one: {_difference(found, value['again'])}"
    if expected is not None and found != expected:
        return "fault", f"another recipe than before: {_difference(expected, found)}"
    return "right", "the same recipe" if expected is not None else "accepted"


def _difference(first: Any, second: Any, path: str = "") -> str:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            if first.get(key) != second.get(key):
                return _difference(first.get(key), second.get(key), f"{path}.{key}")
    return f"{path}: {first!r} became {second!r}"[:300]


def _dotted(path: tuple[Any, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


_HOLE = "HOLE_FOR_A_VALUE"


def _value(rng: random.Random, text: str) -> Written:
    """A value becomes a hostile one."""
    document = yaml.safe_load(text)
    path, value = rng.choice(paths_of(document)), rng.choice(HOSTILE_VALUES)
    parent_of(document, path)[path[-1]] = _HOLE
    content = yaml.safe_dump(document, sort_keys=False, width=10**6).replace(_HOLE, value)
    return Written(f"{_dotted(path)} = {value[:60]}", content.encode("utf-8", "surrogatepass"))


def _override(rng: random.Random, text: str) -> Written:
    """An override gives a hostile value, or has a hostile key."""
    path, value = _dotted(rng.choice(paths_of(yaml.safe_load(text)))), rng.choice(HOSTILE_VALUES)
    forms = [f"{path}={value}"] * 6 + [f"{path}[999999]={value}", f"{path}.x.y={value}", f"{path}", f"={value}"]
    forms += [f"..{path}={value}", f"{path}[-1]={value}", f"{path} = {value}\n", f"{value}={value}", f"{path}=={value}"]
    item = rng.choice(forms)
    return Written(f"-s {item[:80]}", text.encode(), overrides=(item,))


def _new_value(rng: random.Random, text: str) -> Written:
    """A known key that the recipe does not give gets a hostile value."""
    document = yaml.safe_load(text)
    section = rng.choice([name for name in document if isinstance(document[name], dict)])
    fields = getattr(Recipe.model_fields[section].annotation, "model_fields", {})
    key, value = (
        rng.choice([name for name in fields if name not in document[section]] or ["x"]),
        rng.choice(HOSTILE_VALUES),
    )
    document[section][key] = _HOLE
    content = yaml.safe_dump(document, sort_keys=False, width=10**6).replace(_HOLE, value)
    return Written(f"{section}.{key} = {value[:60]}", content.encode("utf-8", "surrogatepass"))


def _key(rng: random.Random, text: str) -> Written:
    """A key is renamed, doubled, deleted, or becomes something that is no text."""
    document = yaml.safe_load(text)
    path = rng.choice([place for place in paths_of(document) if isinstance(place[-1], str)])
    parent, name = parent_of(document, path), path[-1]
    value = parent.pop(name)
    new: Any = rng.choice([None, name + "s", name[:-1], name.upper(), f" {name}", f"{name}\u200b", "é", "", 1,
                           1.5, True,
                           "__class__", "../x", "a" * 5000, f"{name}.x", "<<", "=", "\ud800",
                           "hf_" + "a" * 30])  # fmt: skip
    if rng.random() < 0.8:
        parent[new] = value
    try:
        content = yaml.safe_dump(document, sort_keys=False).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        content = repr(document).encode("utf-8", "surrogatepass")
    return Written(f"{_dotted(path)} renamed to {new!r}"[:90], content)


def _twice(rng: random.Random, text: str) -> Written:
    """A line comes twice."""
    lines = text.splitlines()
    index = rng.choice([number for number, line in enumerate(lines) if ":" in line])
    return Written(
        f"line {index + 1} twice", "\n".join([*lines[: index + 1], lines[index], *lines[index + 1 :]]).encode()
    )


def _moved(rng: random.Random, text: str) -> Written:
    """A value moves to another section, or a section becomes its own value."""
    document = yaml.safe_load(text)
    first, second = rng.choice(paths_of(document)), rng.choice(paths_of(document))
    value = copy.deepcopy(parent_of(document, first)[first[-1]])
    parent_of(document, second)[second[-1]] = value
    return Written(f"{_dotted(second)} = that of {_dotted(first)}", yaml.safe_dump(document, sort_keys=False).encode())


def _deep(rng: random.Random, text: str) -> Written:
    """Deep nesting."""
    depth, (left, right) = rng.choice([50, 400, 900, 3000, 100_000]), rng.choice(["[]", ("{a: ", "}")])
    path = rng.choice(paths_of(yaml.safe_load(text)))
    document = yaml.safe_load(text)
    parent_of(document, path)[path[-1]] = _HOLE
    content = yaml.safe_dump(document, sort_keys=False, width=10**6).replace(_HOLE, left * depth + right * depth)
    return Written(f"{_dotted(path)} nested {depth} deep", content.encode())


def _bytes(rng: random.Random, text: str) -> Written:
    """Bytes: cut, flipped, another encoding, control characters."""
    content = text.encode()
    place = rng.randrange(len(content))
    choice = rng.randrange(10)
    if choice < 3:
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 20])):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        return Written("flipped bits", bytes(flipped))
    if choice == 3:
        return Written(f"cut at byte {place}", content[:place])
    if choice == 4:
        encoding = rng.choice(["utf-16", "utf-16-le", "utf-32", "cp037"])
        return Written(f"written as {encoding}", text.encode(encoding, "replace"))
    if choice == 5:
        added = rng.choice(
            [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\x1b[2J", b"\x85", b"\xe2\x80\xa8", b"\t"]
        )
        return Written(f"{added!r} at byte {place}", content[:place] + added + content[place:])
    if choice == 6:
        return Written(
            "only", rng.choice([b"", b"\n", b"---\n", b"...", b"# nothing", b"3", b"[]", b"\0" * 100, b"null", b"-"])
        )
    if choice == 7:
        return Written("two documents", content + b"\n---\n" + content)
    if choice == 8:
        lines = text.splitlines()
        rng.shuffle(lines)
        return Written("shuffled lines", "\n".join(lines).encode())
    size = rng.choice([2 << 20, 12 << 20])
    return Written(
        f"{size >> 20} MiB of {'comment'}",
        content + rng.choice([b"# x\n", b"- x\n", b"x: y\n", b" ", b"a"]) * (size // 4),
    )


def _same(rng: random.Random, text: str) -> Written:
    """Changes of the spelling that leave the meaning as it is."""
    document = yaml.safe_load(text)
    choice = rng.randrange(9)
    if choice == 0:
        return Written("a byte order mark", b"\xef\xbb\xbf" + text.encode(), same=True)
    if choice == 1:
        return Written("CRLF", text.replace("\n", "\r\n").encode(), same=True)
    if choice == 2:
        return Written("blank lines and comments", f"\n\n# é\n{text}\n\n   \n# end\n...\n".encode(), same=True)
    if choice == 3:
        return Written(
            "keys in another order", yaml.safe_dump(_reordered(rng, document), sort_keys=False).encode(), same=True
        )
    if choice == 4:
        return Written("flow style", yaml.safe_dump(document, default_flow_style=True).encode(), same=True)
    if choice == 5:
        return Written("JSON", json.dumps(document, indent=rng.choice([None, 2])).encode(), same=True)
    if choice == 6:
        document["data"]["mix"] = _Anchored(document["data"]["mix"])
        head = f"anchored: &all {json.dumps(document['data']['mix'])}\n"
        del document["data"]["mix"]
        return _anchored(document, head)
    if choice == 7:
        section = rng.choice([name for name in document if isinstance(document[name], dict)])
        values = document.pop(section)
        merged = f"{section}:\n  <<: {json.dumps(values)}\n"
        return Written(
            f"{section} merged with <<", (yaml.safe_dump(document, sort_keys=False) + merged).encode(), same=True
        )
    return Written("a directive and a document mark", f"%YAML 1.1\n---\n{text}".encode(), same=True)


class _Anchored(list[Any]):
    """A list that is written with an anchor."""


def _anchored(document: dict[str, Any], head: str) -> Written:
    # The anchor stands at a value that is needed anyway: `mix` of data, named again nowhere else would be no alias.
    mix = head.removeprefix("anchored: ").strip()
    rest = yaml.safe_dump({key: value for key, value in document.items() if key != "data"}, sort_keys=False)
    inner = json.dumps(document["data"])
    text = f"{rest}data:\n  <<: {inner}\n  mix: {mix}\n"
    return Written("an anchor", text.encode(), same=True)


def _reordered(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: _reordered(rng, value[key]) for key in keys}
    return [_reordered(rng, each) for each in value] if isinstance(value, list) else value


_OPERATORS: list[Callable[[random.Random, str], Written]] = []
for _operator, _times in (
    (_value, 6), (_new_value, 5), (_override, 4), (_key, 3), (_bytes, 3), (_same, 3), (_moved, 2), (_twice, 1),
    (_deep, 1),
):  # fmt: skip
    _OPERATORS += [_operator] * _times
