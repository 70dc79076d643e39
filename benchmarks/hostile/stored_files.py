"""Mutated checkpoints, adapters, model indices and base caches, read as a run reads them.

Each must be refused, or give the tensors of the unmutated files. A checkpoint of a run has a check sum of each file, so
every damage to it must be noticed; what is left then is the checkpoint before, from which the run reaches the same end.
The other files have none: a bit that is flipped inside the values of a tensor, or a tensor that stands at the place of
another one of its size, cannot be noticed, and is counted apart.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from hostile.damage import Damage, damage_json, damage_raw, damage_safetensors
from hostile.judge import Case, Judged
from hostile.material import Material, StoredMaterial, make_stored
from qdora.files.run_directory import write_complete
from qdora.model.adapter_file import load_adapter
from qdora.model.load import Quantization, load_model
from qdora.model.packed_base import BaseCache
from qdora.model.source import resolve
from qdora.run.load_run import load_run
from qdora.run.train import train_run

PART = "stored"
NF4 = Quantization("nf4", 64, True, ("lm_head",))


@dataclass(frozen=True)
class Kind:
    """A kind of stored files: what is copied, which files of it are mutated, how it is read, whether it has sums."""

    copied: Callable[[StoredMaterial], Path]
    files: tuple[str, ...]
    """Patterns below the copy; the first match of a random one is mutated."""
    read: Callable[[StoredMaterial, Path], dict[str, str]]
    has_sums: bool = False


def cases(seed: int, count: int, material: Material) -> Iterator[Case]:
    """`count` seeded cases over all kinds."""
    stored = make_stored(material)
    expected: dict[str, dict[str, str]] = {}
    for number in range(count):
        rng = random.Random(f"{PART} {seed} {number}")
        name = rng.choice(_NAMES)
        kind = KINDS[name]
        if name not in expected:
            copy = stored.root / "expected" / name
            shutil.copytree(kind.copied(stored), copy)
            expected[name] = kind.read(stored, copy)
        folder = kind.copied(stored)
        file = _chosen(rng, folder, kind.files)
        resummed = kind.has_sums and rng.random() < 0.5 and file.name != "complete.json"
        damage = _damage(rng, file, (folder / file).read_bytes())
        what = f"{name}/{file}{' with new sums' if resummed else ''}: {damage.what}"
        yield Case(
            part=PART,
            number=number,
            what=what,
            write=partial(_write, folder, file, damage, resummed),
            read=partial(_read, kind, stored),
            judge=partial(_judge, expected[name], damage, resummed, kind.has_sums),
            may_fail=kind.has_sums,
        )


def _chosen(rng: random.Random, folder: Path, patterns: tuple[str, ...]) -> Path:
    return rng.choice(sorted(folder.glob(rng.choice(patterns)))).relative_to(folder)


def _damage(rng: random.Random, file: Path, content: bytes) -> Damage:
    if rng.random() < 0.3:
        return damage_raw(rng, content, file.suffix)
    if file.suffix == ".safetensors":
        return damage_safetensors(rng, content)
    return damage_json(rng, content, file.suffix)


def _write(folder: Path, file: Path, damage: Damage, resummed: bool, inside: Path) -> int:
    target = inside / "stored"
    shutil.copytree(folder, target)
    if damage.content is None:
        (target / file).unlink()
    else:
        (target / file).write_bytes(damage.content)
    if resummed:
        place = next(each for each in (target / file).parents if each.name.startswith("step-"))
        (place / "complete.json").unlink()
        write_complete(place, int(place.name.removeprefix("step-")))
    return sum(each.stat().st_size for each in target.rglob("*") if each.is_file())


def _read(kind: Kind, stored: StoredMaterial, inside: Path) -> Any:
    return kind.read(stored, inside / "stored")


def _judge(expected: Mapping[str, str], damage: Damage, resummed: bool, has_sums: bool, found: Any) -> Judged:
    differ = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if not differ:
        return "right", "the same tensors"
    if resummed or (damage.silent and not has_sums):
        return "undetectable", f"{len(differ)} other tensors, e.g. {differ[0]}"
    return "fault", f"{len(differ)} other tensors without a word, e.g. {differ[0]}"


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: _hash(tensor) for name, tensor in tensors.items()}


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return hashlib.sha1(content + str((tensor.dtype, tuple(tensor.shape))).encode()).hexdigest()[:12]


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _read_checkpoint(stored: StoredMaterial, folder: Path) -> dict[str, str]:
    """The run continues from its newest checkpoint, and this is the adapter that it ends with."""
    train_run(stored.recipe, folder, resume=True, console=Console(quiet=True))
    return {"adapter": hashlib.sha1((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()}


def _read_run(stored: StoredMaterial, folder: Path) -> dict[str, str]:
    """A finished run is loaded, as `qdora eval` and `qdora export` do."""
    return _hashes(_all_tensors(load_run(folder).model))


def _read_adapter(stored: StoredMaterial, folder: Path) -> dict[str, str]:
    model = _load(str(stored.model))
    load_adapter(model, folder)
    return _hashes(_all_tensors(model))


def _read_model(stored: StoredMaterial, folder: Path) -> dict[str, str]:
    return _hashes(_all_tensors(_load(str(folder))))


def _read_cache(stored: StoredMaterial, folder: Path) -> dict[str, str]:
    return _hashes(_all_tensors(_load(str(stored.model), reader=BaseCache(folder, NF4, torch.device("cpu")))))


def _load(source: str, **settings: Any) -> nn.Module:
    return load_model(resolve(source), quant="nf4", compute_dtype=torch.float32, **settings)


_SUMMED = ("checkpoints/step-4/*.json", "checkpoints/step-4/*.safetensors", "checkpoints/step-4/adapter/*")
KINDS = {
    "checkpoint": Kind(lambda stored: stored.halfway, _SUMMED, _read_checkpoint, has_sums=True),
    "run": Kind(lambda stored: stored.whole, ("recipe.yaml", "adapter/*.json", "adapter/*.safetensors"), _read_run),
    "adapter": Kind(lambda stored: stored.whole / "adapter", ("*.json", "*.safetensors"), _read_adapter),
    "model": Kind(
        lambda stored: stored.model, ("model.safetensors.index.json", "config.json", "*.safetensors"), _read_model
    ),
    "cache": Kind(lambda stored: stored.cache, ("*/base.json", "*/*.safetensors"), _read_cache),
}
_NAMES = ["checkpoint", "checkpoint", "run", "adapter", "adapter", "model", "model", "cache"]
