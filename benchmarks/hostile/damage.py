"""Damage to stored bytes: raw, inside a safetensors header, inside JSON."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Damage:
    """What was done, and the new content (None: the file is gone). `silent`: a format without sums cannot show it."""

    what: str
    content: bytes | None
    silent: bool = False


def damage_raw(rng: random.Random, content: bytes, suffix: str) -> Damage:
    """Bits flipped, cut, blocks of zeros, other bytes behind, the file empty, gone or random."""
    size = len(content)
    choice = rng.randrange(9)
    place = rng.randrange(max(size, 1))
    start = _values_start(content, suffix)
    if choice < 4:
        flipped = bytearray(content)
        places = [rng.randrange(size) for _ in range(rng.choice([1, 1, 8]))]
        for each in places:
            flipped[each] ^= 1 << rng.randrange(8)
        return Damage(
            f"bits flipped at {places[:2]}", bytes(flipped), silent=start is not None and min(places) >= start
        )
    if choice == 4:
        return Damage(f"cut at byte {place} of {size}", content[:place])
    if choice == 5:
        end = min(size, place + rng.choice([1, 64, 4096]))
        zeros = content[:place] + bytes(end - place) + content[end:]
        return Damage(f"zeros from byte {place}", zeros, silent=start is not None and place >= start)
    if choice == 6:
        return Damage("more bytes behind", content + rng.randbytes(rng.choice([1, 8, 4096])))
    if choice == 7:
        return Damage(
            "another thing", rng.choice([b"", b"\0", b"null", rng.randbytes(200), b"\0" * size, b"{}", b"[]"])
        )
    return Damage("gone", None)


def _values_start(content: bytes, suffix: str) -> int | None:
    """Where the values of tensors begin."""
    if suffix == ".safetensors":
        return 8 + int.from_bytes(content[:8], "little")
    return None


def damage_safetensors(rng: random.Random, content: bytes) -> Damage:
    """A header that claims something else."""
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    values = content[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry, second = header[name], header[other]
    choice = rng.randrange(13)
    silent, what = False, ""
    if choice == 0:
        new = rng.choice(["F64", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F8_E4M3", "X", "", 3, None])
        what, entry["dtype"] = f"{name}: dtype {new}", new
    elif choice == 1:
        new = rng.choice([[], [-1], [0], [10**12], [2**63, 2], [2**64], [1] * 5000, [*entry["shape"], 1],
                          entry["shape"][::-1],
                          [1.5], ["4"], None, [None], [2**32, 2**32], entry["shape"] * 2])  # fmt: skip
        silent = isinstance(new, list) and new in (entry["shape"], entry["shape"][::-1])
        what, entry["shape"] = f"{name}: shape {str(new)[:40]}", new
    elif choice == 2:
        new = rng.choice([[0, 0], [-8, 8], [8, 0], [2**63, 2**63 + 8], [2**64, 2**64], [len(values),
                          len(values) + 64], [0], None,
                          [0, 10**12], [1, 5], "0"])  # fmt: skip
        what, entry["data_offsets"] = f"{name}: offsets {new}", new
    elif choice == 3:
        what = f"the places of {name} and {other} exchanged"
        entry["data_offsets"], second["data_offsets"] = second["data_offsets"], entry["data_offsets"]
        silent = True
    elif choice == 4:
        entry["shape"], entry["data_offsets"] = [10**6, 10**6], [0, 4 * 10**12]
        what = f"{name}: 1e12 elements"
    elif choice == 5:
        new = rng.choice(
            [
                "../canary/secret",
                "",
                "\0",
                name + "\u200b",
                "a" * 10**5,
                "__metadata__",
                "lm_head.weight",
                f"{name}.x",
                "\ud800",
            ]
        )
        header[new] = header.pop(name)
        what = f"{name} is called {new[:30]!r}"
    elif choice == 6:
        del header[name]
        what = f"{name} is not in the header"
    elif choice == 7:
        new = rng.choice([None, 3, [], {"a": 1}, {"format": None}, {"format": "np"}, "x"])
        header["__metadata__"], what = new, f"metadata {new}"
    elif choice == 8:
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        what = "one more empty tensor"
    elif choice == 9:
        new = rng.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])
        return Damage(f"a header of {new} bytes", new.to_bytes(8, "little") + content[8:])
    elif choice == 10:
        text = rng.choice(
            [b"{}", b"[]", b"null", b"{" * 50_000, b'{"a":' * 50_000, b"\xff" * 9, b" " * 9, b'{"a":{}}', b'{"a":3}']
        )
        return Damage(f"header {text[:12]!r}", len(text).to_bytes(8, "little") + text + values)
    elif choice == 11:
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(second)}}}"
        what = f"{name} twice in the header"
        return Damage(what, len(text).to_bytes(8, "little") + text.encode() + values, silent=True)
    else:
        start = entry["data_offsets"][0]
        shift = rng.choice([1, 2, 4])
        for each in (header[key] for key in names):
            each["data_offsets"] = [place + shift if place > start else place for place in each["data_offsets"]]
        what = f"offsets behind {start} moved by {shift}"
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return Damage(what, len(text).to_bytes(8, "little") + text + values, silent=silent)


def paths_of(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value below the top."""
    found = [path] if path else []
    if isinstance(document, dict | list):
        for key, child in document.items() if isinstance(document, dict) else enumerate(document):
            found += paths_of(child, (*path, key))
    return found


def parent_of(document: Any, path: tuple[Any, ...]) -> Any:
    """The dict or list that holds the value."""
    for step in path[:-1]:
        document = document[step]
    return document


_JSON_VALUES: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, 10**12, 10**30, 1.5, -0.5, float("nan"), float("inf"), "", "x", "4",
    "../canary/secret.json",
    "/etc/passwd", "..", "a\0b", "\ud800", "x" * 10**5, [], {}, [[]], [None], {"a": 1}, [1] * 1000,
    "model-00001-of-00007.safetensors",
]  # fmt: skip


def damage_json(rng: random.Random, content: bytes, suffix: str) -> Damage:
    """A value, a key, or the text of a JSON file (or of a recipe, which is mutated as text)."""
    if suffix != ".json":
        return damage_raw(rng, content, suffix)
    document: Any = json.loads(content)
    choice = rng.randrange(8)
    if choice == 0:
        text = rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"3", b'"x"', b"NaN", b"{}",
                           b"\xef\xbb\xbf" + content, b"9" * 5000,
                           content.decode().encode("utf-16"), content + content,
                           b'{"format": ' + b"9" * 5000 + b"}"])  # fmt: skip
        return Damage(f"the text {text[:12]!r}", text)
    path = rng.choice(paths_of(document))
    parent = parent_of(document, path)
    where = ".".join(map(str, path))[-60:]
    if choice == 1 and isinstance(parent, dict):
        parent[f"{path[-1]}s"] = parent.pop(path[-1])
        what = f"{where} misspelt"
    elif choice == 2:
        del parent[path[-1]]
        what = f"{where} missing"
    else:
        parent[path[-1]] = rng.choice(_JSON_VALUES)
        what = f"{where} = {str(parent[path[-1]])[:40]!r}"
    return Damage(what, json.dumps(document, indent=1).encode("utf-8", "surrogatepass"))
